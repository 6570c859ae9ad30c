"""The stored form of a quantized weight, versions 1 and 2 (docs/format.md).

A weight ``W`` is stored as ``W_qdata``, ``W_scale``, when affine ``W_shift``, and of learned types ``W_codebook``; never
under its own name, so that a loader without the plugin finds it missing instead of taking codes for weights. What the
tensors cannot say stands in config.json, ``quantization_config.tensors``, a line a weight:

    "model.layers.0.mlp.up_proj.weight": "qint4 1536x576 group=64 affine"

The words after type and shape: ``group=N`` (else one scale a row), ``affine`` (else symmetric), ``axis=N`` (else 0),
``transposed``, ``activation=TYPE`` (inputs are quantized on the fly), ``rank=R`` (a merged adapter is kept beside the
codes: ``W_up`` and ``W_down``, and the weight is ``dequant(W) + up @ down``), ``scales=B`` (``W_scale`` and ``W_shift`` are
codes of B bits, and ``W_row_scale`` is there: `requanto.scales.compact`), ``rotation=B`` (codes are those of rows rotated in
blocks of B: `requanto.tensor.rotation`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from requanto.config.config import FORMAT, FORMAT_VERSION
from requanto.tensor.qtensor import QTensor
from requanto.tensor.spec import PART_NAMES, WeightSpec, parse_text

PARTS = PART_NAMES
#: dtypes of scales and low-rank factors in a file.
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class CheckpointError(ValueError):
    """A quantized checkpoint that cannot be read as what it says it is."""


def spec_text(tensor: QTensor) -> str:
    """The line that describes a tensor."""
    return tensor._spec.text(tensor.rank)


def read_spec(text: str, name: str, dtype: torch.dtype = torch.float32) -> tuple[WeightSpec, int]:
    """The reverse of :func:`spec_text`: what a weight is, and the rank of its low-rank term.

    Args:
        text: the line.
        name: the weight's, for messages.
        dtype: float dtype that it is seen as, which the line does not say.

    Raises:
        CheckpointError: the line is not of that form.
    """
    try:
        return parse_text(text, dtype)
    except (KeyError, ValueError, AttributeError, IndexError) as error:
        raise CheckpointError(
            f"quantization_config.tensors[{name!r}] is {text!r}, which is no description of a quantized weight "
            f"({error}); expected e.g. 'qint4 1536x576 group=64 affine'. If it was edited, Config and tensors do not belong "
            f"together: restore the config.json that was saved with these files."
        ) from error


def parse_spec(text: str, name: str) -> dict[str, Any]:
    """:func:`read_spec` as keyword arguments of QTensor, with ``affine`` and ``rank``.

    Raises:
        CheckpointError: the line is not of that form.
    """
    spec, rank = read_spec(text, name)
    names = ("qtype", "group_size", "axis", "affine", "transposed", "activation", "scale_bits", "rotation")
    return {"shape": spec.seen_shape, "rank": rank, **{field: getattr(spec, field) for field in names}}


def table_of(named: Iterable[tuple[str, torch.Tensor]]) -> dict[str, str]:
    """Name -> description of every quantized tensor."""
    return {name: spec_text(tensor) for name, tensor in named if isinstance(tensor, QTensor)}


def flatten(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state dict with every QTensor replaced by its stored parts, in place of the weight's own name."""
    flat: dict[str, Any] = {}
    for name, value in state_dict.items():
        if isinstance(value, QTensor):
            flat |= {f"{name}_{part}": inner for part, inner in value.inner_tensors().items()}
        else:
            flat[name] = value
    return flat


def expected_parts(text: str, name: str) -> dict[str, tuple[torch.Size, tuple[torch.dtype, ...]]]:
    """Shape and possible dtypes of each stored part that a description asks for.

    Raises:
        CheckpointError: see :func:`read_spec`.
    """
    spec, rank = read_spec(text, name)
    return _expected(spec, rank)


def _expected(spec: WeightSpec, rank: int) -> dict[str, tuple[torch.Size, tuple[torch.dtype, ...]]]:
    parts = {
        part: (shape, tuple(dtype for dtype in dtypes if dtype != torch.float64))
        for part, (shape, dtypes) in spec.expected.items()
    }
    if rank:
        parts |= {part: (shape, _FLOATS) for part, shape in spec.low_rank_shapes(rank).items()}
    return parts


def rebuild(
    name: str, text: str, parts: dict[str, torch.Tensor], dtype: torch.dtype, check_values: bool = True
) -> QTensor:
    """The QTensor that stored parts and a description make.

    Args:
        name: the weight's name, for messages.
        text: its line in ``quantization_config.tensors``.
        parts: ``qdata``, ``scale``, when affine ``shift``, of learned types ``codebook``, with a low-rank term ``up`` and
            ``down``.
        dtype: float dtype the weight is seen as.
        check_values: refuse scales and shifts that hold NaN or Inf.

    Raises:
        CheckpointError: parts are missing, of another shape or dtype than described, or not finite.
    """
    spec, rank = read_spec(text, name, dtype)
    expected = _expected(spec, rank)
    if set(parts) != set(expected):
        raise CheckpointError(
            f"{name} is described as {text!r} and needs the tensors {', '.join(f'{name}_{p}' for p in expected)}; "
            f"the checkpoint has {', '.join(f'{name}_{p}' for p in parts) or 'none of them'}"
        )
    for part, (shape, dtypes) in expected.items():
        found = parts[part]
        if found.shape != shape or found.dtype not in dtypes:
            raise CheckpointError(
                f"{name}_{part}: found {found.dtype} {tuple(found.shape)}, expected "
                f"{' or '.join(map(str, dtypes))} {tuple(shape)} for {text!r}. Config and tensors do not belong together: "
                f"restore the config.json that was saved with these files."
            )
        if (
            check_values
            and found.dtype.itemsize > 1
            and found.device.type != "meta"
            and not bool(torch.isfinite(found).all())
        ):
            raise CheckpointError(
                f"{name}_{part} holds NaN or Inf: the checkpoint is damaged, take it from its source again"
            )
    return QTensor._of(spec, parts)


def check_version(format_name: str | None, version: int | None, where: str) -> None:
    """Refuses a format that this version cannot read.

    Raises:
        CheckpointError: an unknown format, or a version newer than known.
    """
    if format_name != FORMAT:
        raise CheckpointError(f"{where}: format {format_name!r} is unknown, expected {FORMAT!r}")
    if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
        raise CheckpointError(
            f"{where} is of format version {version!r}; this Requanto reads versions 1 to {FORMAT_VERSION}. "
            f"Install a newer one: pip install -U requanto"
        )
