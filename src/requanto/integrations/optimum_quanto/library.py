"""optimum-quanto's operators (torch.ops.quanto.*) and helper functions."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import torch

from requanto.scales.quanto import affine_codes, group, symmetric_codes, unpack_split

_SCHEMAS = {
    "quantize_symmetric": "(Tensor base, ScalarType dtype, int? axis, Tensor scale) -> Tensor",
    "quantize_affine": "(Tensor base, int bits, int axis, int? group_size, Tensor scale, Tensor shift) -> Tensor",
    "unpack": "(Tensor self, int bits) -> Tensor",
    "qbytes_mm": "(Tensor A, Tensor B, Tensor scales) -> Tensor",
}


def quantize_symmetric(base: torch.Tensor, dtype: torch.dtype, axis: int | None, scale: torch.Tensor) -> torch.Tensor:
    """Returns the codes of ``base / scale``.

    Raises:
        ValueError: the scale does not match the axis.
    """
    if axis is None:
        if scale.ndim > 0:
            raise ValueError(f"with axis=None the scale must be a scalar, found shape {tuple(scale.shape)}")
        return symmetric_codes(base, dtype, scale)
    if base.ndim == 1:
        raise ValueError("a 1-dimensional tensor has one scale: pass axis=None")
    if axis == base.ndim - 1:
        axis = -1
    if axis not in (0, -1):
        raise ValueError(f"axis must be None, 0 (first axis) or -1 (last axis), found {axis}")
    if base.shape[axis] == 1:
        raise ValueError(f"axis {axis} of shape {tuple(base.shape)} has size 1: pass axis=None and a scalar scale")
    if torch.squeeze(scale).ndim > 1:
        raise ValueError(f"scales must vary along one axis only, found shape {tuple(scale.shape)}")
    if scale.ndim != base.ndim:
        raise ValueError(f"the scale must have {base.ndim} axes like the tensor, found shape {tuple(scale.shape)}")
    return symmetric_codes(base, dtype, scale)


def quantize_affine(
    base: torch.Tensor, bits: int, axis: int, group_size: int | None, scale: torch.Tensor, shift: torch.Tensor
) -> torch.Tensor:
    """Returns the unsigned codes of ``(base + shift) / scale``, grouped if ``group_size`` is given."""
    if axis not in (0, -1):
        raise ValueError(f"axis must be 0 (first axis) or -1 (last axis), found {axis}")
    if group_size is not None:
        base = group(base, axis, group_size, pad=base.dim() > 2)
    return affine_codes(base, bits, scale, shift)


def qbytes_mm(activations: torch.Tensor, weights: torch.Tensor, output_scales: torch.Tensor) -> torch.Tensor:
    """Returns ``activations @ (output_scales * weights).T``; int8 by int8 is accumulated exactly.

    Args:
        activations: ``[..., K]``, float or 8-bit codes (their scale is part of ``output_scales``).
        weights: int8 or float8 ``[N, K]``.
        output_scales: ``[N, 1]`` or a scalar; the result is in its dtype.
    """
    if activations.dtype == torch.int8 and weights.dtype == torch.int8 and activations.shape[-1]:
        rows = activations.reshape(-1, activations.shape[-1])
        # float64 holds every such sum exactly; an integer GEMM of any shape is not available on every device.
        exact = torch.float64 if activations.device.type == "cpu" else torch.float32
        out = (rows.to(exact) @ weights.to(exact).t()).float() * output_scales.float().reshape(1, -1)
        return out.to(output_scales.dtype).view(*activations.shape[:-1], weights.shape[0])
    scaled = output_scales * weights.to(output_scales.dtype)
    return torch.matmul(activations.to(output_scales.dtype), scaled.t())


def define_operators() -> None:
    """Defines ``torch.ops.quanto.*``; to be called once per process.

    Raises:
        RuntimeError: another library has already defined one of them.
    """
    implementations = {
        "quantize_symmetric": quantize_symmetric,
        "quantize_affine": quantize_affine,
        "unpack": unpack_split,
        "qbytes_mm": qbytes_mm,
    }
    for name, schema in _SCHEMAS.items():
        torch.library.define(f"quanto::{name}", schema)
        torch.library.impl(f"quanto::{name}", "default")(implementations[name])


class Extension:
    """Replacement for a compiled extension of optimum-quanto: its functions as attributes of ``lib``."""

    def __init__(self, name: str, **functions: Any) -> None:
        self.name = name
        self.lib = SimpleNamespace(**functions)


# The one extension that optimum-quanto has on every machine.
_extensions = {"quanto_cpp": Extension("quanto_cpp", unpack=unpack_split)}


def get_extension(extension_type: str) -> Extension:
    """Returns an extension by name.

    Raises:
        KeyError: there is no extension of this name.
    """
    if extension_type not in _extensions:
        raise KeyError(f"no extension {extension_type!r}: Requanto has only {', '.join(_extensions)}")
    return _extensions[extension_type]


def is_extension_available(extension_type: str) -> bool:
    """Whether there is an extension of this name."""
    return extension_type in _extensions


def is_transformers_available() -> bool:
    """Whether Transformers is installed."""
    return importlib.util.find_spec("transformers") is not None


def is_diffusers_available() -> bool:
    """Whether Diffusers is installed."""
    return importlib.util.find_spec("diffusers") is not None


def axis_to_dim(t: torch.Tensor, axis: int) -> list[int]:
    """Returns all axes except ``axis``."""
    dims = list(range(t.ndim))
    del dims[axis]
    return dims


def dtype_info(dtype: torch.dtype) -> Any:
    """Returns torch.finfo or torch.iinfo of the dtype."""
    return torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
