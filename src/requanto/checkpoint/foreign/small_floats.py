"""NVFP4 and MX weights of other programs: their bytes are those of our form (docs/format.md)."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from requanto.checkpoint.foreign.found import ForeignWeight, Parts
from requanto.checkpoint.foreign.pieces import line, per_row, unfit
from requanto.checkpoint.foreign.source import Source
from requanto.dtypes.bit_packing import packed_length
from requanto.dtypes.qtypes import qtypes

#: dtypes that hold two codes of 4 bits, or packed ones of 6
BYTES = (torch.uint8, torch.int8, torch.float4_e2m1fn_x2)
NOT_QUANTIZED = "inputs stay float: they are not quantized to {}, as the format's own kernels do"


def nvfp4_weight(
    source: Source,
    name: str,
    codes: str,
    scale: str,
    factor: str,
    *,
    group: int = 16,
    divided: bool = False,
    also: Sequence[str] = (),
    words: Sequence[str] = (),
    note: str = "",
) -> ForeignWeight:
    """Describes an NVFP4 weight ``[N, K]``, or of experts ``[E, N, K]``.

    Args:
        name: the weight.
        codes: uint8 ``[..., N, K / 2]``, the first of two codes in the low nibble.
        scale: e4m3 ``[..., N, K / group]``.
        factor: float32, one number for each matrix.
        group: number of weights that share a scale.
        divided: scales are divided by the factor, instead of multiplied.
        also: further tensors that are not loaded.
        words: further words of the line.
        note: see `ForeignWeight`.

    Raises:
        CheckpointError: a tensor is missing or has another shape or dtype.
    """
    shape = _shape_of(source, name, codes, scale, "qnvfp4", group, (torch.float8_e4m3fn, torch.uint8))
    found = source.need(factor, name)
    if found.dtype != torch.float32 or found.shape.numel() not in (1, shape[:-2].numel()):
        raise unfit(factor, found, "one float32 number for each matrix")
    text = line(name, "qnvfp4", shape, _axis(shape), *words, group=group)
    build = functools.partial(_nvfp4, codes=codes, scale=scale, factor=factor, lead=shape[:-1], divided=divided)
    return ForeignWeight(text, (codes, scale, factor, *also), build, note)


def mx_weight(
    source: Source,
    name: str,
    kind: str,
    codes: str,
    scale: str,
    *,
    also: Sequence[str] = (),
    note: str = "",
) -> ForeignWeight:
    """Describes an MX weight ``[N, K]``, or of experts ``[E, N, K]``.

    Args:
        name: the weight.
        kind: ``"qmxfp4"``, ``"qmxfp6_e2m3"`` or ``"qmxfp8_e4m3"``.
        codes: uint8 ``[..., N, K * bits / 8]``, low bits first; of 8 bits e4m3 ``[..., N, K]``.
        scale: e8m0 ``[..., N, K / 32]``.
        also: further tensors that are not loaded.
        note: see `ForeignWeight`.

    Raises:
        CheckpointError: a tensor is missing or has another shape or dtype.
    """
    shape = _shape_of(source, name, codes, scale, kind, 32, (torch.uint8, torch.float8_e8m0fnu))
    text = line(name, kind, shape, _axis(shape), group=32)
    build = functools.partial(_mx, codes=codes, scale=scale, dtype=qtypes[kind].storage_dtype)
    return ForeignWeight(text, (codes, scale, *also), build, note)


def _axis(shape: torch.Size) -> str:
    return f"axis={len(shape) - 2}" if len(shape) > 2 else ""


def _shape_of(
    source: Source, name: str, codes: str, scale: str, kind: str, group: int, scales: tuple[torch.dtype, ...]
) -> torch.Size:
    """The weight's shape."""
    form, stored = qtypes[kind], source.need(codes, name)
    dtypes = BYTES if form.is_packed else (form.dtype,)
    bits = form.bits if form.is_packed else 8
    length = stored.shape[-1] * 8 // bits if len(stored.shape) in (2, 3) else 0
    if stored.dtype not in dtypes or length % group or not length or packed_length(length, bits) != stored.shape[-1]:
        wanted = f"{str(dtypes[0]).removeprefix('torch.')} [rows, K * {bits} / 8] for a K that is a multiple of {group}"
        raise unfit(codes, stored, wanted)
    shape = torch.Size([*stored.shape[:-1], length])
    source.need_shape(scale, name, (*shape[:-1], length // group), *scales)
    return shape


def _nvfp4(source: Source, codes: str, scale: str, factor: str, lead: torch.Size, divided: bool) -> Parts:
    number = source[factor]
    return {
        "qdata": source[codes].view(torch.uint8),
        "scale": source[scale].view(torch.uint8),
        "row_scale": per_row(number.reciprocal() if divided else number, lead),
    }


def _mx(source: Source, codes: str, scale: str, dtype: torch.dtype) -> Parts:
    return {"qdata": source[codes].view(dtype), "scale": source[scale].view(torch.uint8)}
