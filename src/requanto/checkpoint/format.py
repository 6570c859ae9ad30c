"""The checkpoint format of a quantized weight, versions 1 to 4 (docs/format.md).

A weight ``W`` is stored as ``W_qdata``, ``W_scale``, ``W_shift`` if affine, and ``W_codebook`` for learned types. No tensor
is named ``W``: a loader without Requanto then reports a missing weight instead of loading codes as values. The rest of the
description is in config.json, ``quantization_config.tensors``, one line per weight:

    "model.layers.0.mlp.up_proj.weight": "qint4 1536x576 group=64 affine"

The words after type and shape:

    group=N          group size; without it one scale per row
    affine           scale and shift; without it symmetric
    axis=N           without it 0
    transposed       stored ``[in_features, out_features]``
    activation=TYPE  inputs are quantized on the fly
    rank=R           low-rank term ``W_up``, ``W_down`` (e.g. a merged adapter): the weight is ``dequant(W) + up @ down``
    scales=B         ``W_scale`` and ``W_shift`` are codes of B bits, with ``W_row_scale`` (`requanto.scales.compact`)
    rotation=B       rows were rotated in blocks of B before quantization (`requanto.scales.rotation`)
    zeros            ``W_shift`` holds whole zero points, of as many bits as the weight's codes
    columns          column scale ``W_column``, by which dequantized rows are multiplied (`requanto.scales.columns`)
    signed           scales may be negative
    block=N          with ``scales=B``: ``W_row_scale`` (and ``W_row_shift`` if affine) has one number for each N weights
    order            ``W_order``: the weight's column that each stored column is (`requanto.scales.order`)
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
    """A quantized checkpoint is damaged, incomplete, or does not match its config."""


def spec_text(tensor: QTensor) -> str:
    """Returns the line of ``quantization_config.tensors`` that describes a tensor."""
    return tensor._spec.text(tensor.rank)


def read_spec(text: str, name: str, dtype: torch.dtype = torch.float32) -> tuple[WeightSpec, int]:
    """Parses the line that :func:`spec_text` wrote into (spec, rank of the low-rank term).

    Args:
        text: the line.
        name: name of the weight, for messages.
        dtype: ``tensor.dtype`` of the weight; the line does not hold it.

    Raises:
        CheckpointError: the line cannot be parsed.
    """
    try:
        return parse_text(text, dtype)
    except (KeyError, ValueError, AttributeError, IndexError) as error:
        raise CheckpointError(
            f"quantization_config.tensors[{name!r}] is {text!r}, which is no description of a quantized weight "
            f"({error}); expected e.g. 'qint4 1536x576 group=64 affine'. Restore the config.json that was saved with these "
            f"files."
        ) from error


def parse_spec(text: str, name: str) -> dict[str, Any]:
    """Parses a line into keyword arguments of QTensor, plus ``affine`` and ``rank``.

    Raises:
        CheckpointError: the line cannot be parsed.
    """
    spec, rank = read_spec(text, name)
    names = (
        "qtype",
        "group_size",
        "axis",
        "affine",
        "transposed",
        "activation",
        "scale_bits",
        "rotation",
        "column",
        "zeros",
        "signed",
        "scale_block",
        "order",
    )
    return {"shape": spec.seen_shape, "rank": rank, **{field: getattr(spec, field) for field in names}}


def table_of(named: Iterable[tuple[str, torch.Tensor]]) -> dict[str, str]:
    """Maps the name of every quantized tensor to its line."""
    return {name: spec_text(tensor) for name, tensor in named if isinstance(tensor, QTensor)}


def flatten(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Returns the state dict with every QTensor ``W`` replaced by its parts ``W_qdata``, ``W_scale`` ..."""
    flat: dict[str, Any] = {}
    for name, value in state_dict.items():
        if isinstance(value, QTensor):
            flat |= {f"{name}_{part}": inner for part, inner in value.inner_tensors().items()}
        else:
            flat[name] = value
    return flat


def expected_parts(text: str, name: str) -> dict[str, tuple[torch.Size, tuple[torch.dtype, ...]]]:
    """Returns shape and possible dtypes of each stored part of a weight.

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
    name: str,
    text: str,
    parts: dict[str, torch.Tensor],
    dtype: torch.dtype,
    check_values: bool = True,
    check_codes: bool = True,
) -> QTensor:
    """Builds a QTensor from its stored parts and its line.

    Args:
        name: the weight's name, for messages.
        text: its line in ``quantization_config.tensors``.
        parts: ``qdata``, ``scale``, ``shift`` if affine, ``codebook`` for learned types, ``up`` and ``down`` if it has a
            low-rank term.
        dtype: ``tensor.dtype`` of the result.
        check_values: raise for values that no quantization writes (`checkpoint.values`).
        check_codes: with ``check_values``, also look at the codes of float8 weights; not needed where a digest is checked.

    Raises:
        CheckpointError: parts are missing, differ in shape or dtype from the description, or hold damaged values.
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
                f"{' or '.join(map(str, dtypes))} {tuple(shape)} for {text!r}. The config and the tensors do not "
                f"belong together: restore the config.json that was saved with these files."
            )
    if check_values:
        from requanto.checkpoint.values import check_values as check

        check(spec, parts, name, check_codes)
    return QTensor._of(spec, parts)


def check_version(format_name: str | None, version: int | None, where: str) -> None:
    """Raises unless this version of Requanto can read the format.

    Raises:
        CheckpointError: an unknown format, or a newer version of it.
    """
    if format_name != FORMAT:
        raise CheckpointError(
            f"{where}: format {format_name!r} is unknown, expected {FORMAT!r}: another program wrote it, or it was edited. "
            f"Restore the config.json that was saved with the files"
        )
    if type(version) is not int or version < 1:
        raise CheckpointError(
            f"{where}: format_version must be an integer from 1 on, found {version!r}. Restore the config.json that was "
            f"saved with the files"
        )
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{where} is of format version {version!r}; this Requanto reads versions 1 to {FORMAT_VERSION}. "
            f"Install a newer one: pip install -U requanto"
        )
