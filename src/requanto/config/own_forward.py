"""Finds layers that do something else with their weight than their kind of layer does.

A quantized weight stands in the place of the float one, and the layer's class stays. Where that class has a forward of its
own, it may need the float values: a kernel that is standardized first, a matrix that is cut into heads. Such a layer stays
float. Which one does is found by a trial on the meta device, with a quantized weight that computes nothing.
"""

from __future__ import annotations

import contextlib

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from requanto.config.trial import dtype_of, on_meta, runs
from requanto.dtypes.qtypes import qint8
from requanto.tensor.qtensor import QTensor
from requanto.tensor.spec import WeightSpec, swapped
from requanto.tensor.values import reads_of_values

#: The kinds of layers whose forward is known.
BASES = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_ATTENTION = "nn.MultiheadAttention reads its weight without calling it"


def overrides_forward(module: nn.Module, base: type[nn.Module]) -> bool:
    """True if the class of a module, derived from ``base``, has a forward of its own, or a convolution of its own."""
    return any(
        getattr(type(module), method, None) is not getattr(base, method, None)
        for method in ("forward", "_conv_forward")
    )


def unusual(module: nn.Module, weight: torch.Tensor | None) -> str | None:
    """Why no module with a quantized weight can replace a layer, whatever its forward does; None if one can.

    Args:
        weight: its parameter ``weight``, if it has one.
    """
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return _ATTENTION
    if parametrize.is_parametrized(module, "weight") or (weight is None and hasattr(module, "weight_v")):
        return "its weight is computed at each forward (torch.nn.utils.parametrize, weight_norm or spectral_norm)"
    if weight is None and hasattr(module, "weight_orig"):
        return "its weight is computed at each forward (spectral_norm)"
    if isinstance(weight, nn.parameter.UninitializedTensorMixin):
        return "its weight gets its shape at the first forward (a lazy module); run it once before quantizing"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "max_norm rewrites its rows at each forward"
    return None


def reason_for_float(module: nn.Module, weight: torch.Tensor, axis: int, transposed: bool) -> str | None:
    """Why a layer cannot run on a quantized weight without dequantizing it at each forward; None if it can.

    Args:
        weight: its parameter ``weight``.
        axis, transposed: as in `QTensor.quantize`.
    """
    found = unusual(module, weight)
    if found is not None:
        return found
    base = next((cls for cls in type(module).__mro__ if cls in BASES), None)
    if base is None or type(module).__module__.startswith("requanto.") or not overrides_forward(module, base):
        return None
    if weight.dim() < 2:
        return f"its weight has {weight.dim()} axes"
    for x in _inputs(module, base, weight):
        replaced = {
            name: on_meta(tensor)
            for name, tensor in (*module.named_parameters(), *module.named_buffers())
            if tensor is not weight
        }
        replaced["weight"] = _meta_weight(weight, axis, transposed)
        with reads_of_values() as reads:
            finished = runs(module, replaced, x, contextlib.nullcontext())
        if reads:
            return f"its own forward reads the values of its weight ({reads[0]})"
        if finished:
            return None
    if _leaves_it_to_base(module):
        return None
    return "it has a forward of its own that could not be tried"


def _leaves_it_to_base(module: nn.Module) -> bool:
    """True if a class's own forward never names the weight: it prepares the input and calls the forward it inherits."""
    methods = [getattr(type(module), name, None) for name in ("forward", "_conv_forward")]
    codes = [method.__code__ for method in methods if hasattr(method, "__code__")]
    own = [code for code in codes if code.co_filename != nn.Linear.forward.__code__.co_filename]
    own = [code for code in own if not code.co_filename.startswith(_TORCH)]
    return bool(own) and all("weight" not in code.co_names and "super" in code.co_names for code in own)


_TORCH = nn.Module.__call__.__code__.co_filename.rpartition("module.py")[0]


def _inputs(module: nn.Module, base: type[nn.Module], weight: torch.Tensor) -> list[torch.Tensor]:
    """Inputs that a layer of this kind may take, without memory."""
    dtype = dtype_of(module)
    if base is nn.Embedding:
        return [torch.empty(shape, dtype=torch.long, device="meta") for shape in ((2, 64), (128,))]
    if base is nn.Linear:
        width = getattr(module, "in_features", weight.shape[1])
        shapes: list[tuple[int, ...]] = [(2, 64, width), (128, width), (2, 64, 8, width)]
    else:
        spatial = weight.dim() - 2
        channels = weight.shape[1] * getattr(module, "groups", 1)
        sides = [
            max(32, 2 * gap * taps)
            for gap, taps in zip(getattr(module, "dilation", (1,) * spatial), weight.shape[2:], strict=False)
        ]
        shapes = [(2, channels, *sides)]
    return [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]


def _meta_weight(weight: torch.Tensor, axis: int, transposed: bool) -> QTensor:
    """A quantized weight without memory, of the shape and dtype of a float one."""
    spec = WeightSpec(
        qtype=qint8,
        shape=swapped(weight.shape) if transposed else weight.shape,
        dtype=weight.dtype,
        axis=axis,
        transposed=transposed,
    )
    codes = torch.empty(spec.codes_shape, dtype=torch.int8, device="meta")
    return QTensor._of(spec, {"qdata": codes, "scale": torch.empty(*spec.lead, 1, dtype=weight.dtype, device="meta")})
