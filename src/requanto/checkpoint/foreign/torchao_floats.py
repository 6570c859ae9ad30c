"""The float classes of torchao: `torchao_types` has the table."""

from __future__ import annotations

import functools
import math

import torch

from requanto.checkpoint.foreign.blocked_scales import blocked_numel, plain_scales
from requanto.checkpoint.foreign.found import ForeignCheckpoint, ForeignFloat, Parts
from requanto.checkpoint.foreign.source import Source
from requanto.checkpoint.foreign.torchao_entry import FLOATS, Entry, count_of, float8_type, is_all
from requanto.checkpoint.foreign.torchao_parts import add_weight, rows_and_groups, spread
from requanto.checkpoint.format import CheckpointError
from requanto.dtypes.bit_packing import pack
from requanto.dtypes.qtypes import qtype, qtypes
from requanto.tensor.spec import WeightSpec


def float8(entry: Entry, found: ForeignCheckpoint) -> None:
    """``Float8Tensor``."""
    entry.known("block_size", "mm_config", "act_quant_kwargs", "kernel_preference", "dtype")
    types = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz]
    shape = entry.shape("qdata", *types)
    kind = float8_type(next(dtype for dtype in types if entry.is_dtype("qdata", dtype)))
    block = entry.blocks(shape, entry.shape("scale", *FLOATS))
    counts = count_of(shape, block)
    if entry.shape("scale", *FLOATS).numel() != counts.numel():
        entry.expect("scale", counts, *FLOATS)
    names = entry.tensor("qdata"), entry.tensor("scale")
    inputs = entry.get("act_quant_kwargs")
    note = ""
    if len(shape) == 3 and block[1] == shape[1] and block[2] != shape[2]:
        dtype = entry.dtype("dtype")
        build = functools.partial(_float8_values, names, shape, block, dtype)
        reason = "one scale for each column of an expert"
        found.floats[entry.name] = ForeignFloat(shape, dtype, entry.sources(), build, reason)
        return
    if inputs is not None and "dim" not in (inputs.get("granularity") or {}):
        note = "torchao rounds the inputs of such layers with one scale for all tokens, here with one for each token"
    axis, group = rows_and_groups(entry, shape, block)
    activation = None if inputs is None else qtypes["qfloat8_e4m3fn"]
    spec = WeightSpec(kind, shape, torch.float32, axis=axis, group_size=group, activation=activation)
    add_weight(entry, found, spec, functools.partial(_float8_parts, names, spec, block), note)


def _float8_parts(names: tuple[str, str], spec: WeightSpec, block: list[int], source: Source) -> Parts:
    return {"qdata": source[names[0]], "scale": spread(source[names[1]], spec, block)}


def _float8_values(
    names: tuple[str, str], shape: torch.Size, block: list[int], dtype: torch.dtype, source: Source
) -> torch.Tensor:
    scale = source[names[1]].float().reshape(count_of(shape, block))
    for axis, size in enumerate(block):
        scale = scale.repeat_interleave(size, axis)
    value = source[names[0]].float() * scale
    if not bool(torch.isfinite(value).all()):
        raise CheckpointError(
            f"{names[0]} or {names[1]} holds NaN or Inf: the checkpoint is damaged, download it again"
        )
    return value.to(dtype)


def nvfp4(entry: Entry, found: ForeignCheckpoint) -> None:
    """``NVFP4Tensor``."""
    entry.known("block_size", "orig_dtype", "is_swizzled_scales", "use_triton_kernel", "act_quant_kwargs")
    if entry.number("block_size") != 16:
        raise entry.wrong("block_size", "16")
    *lead, half = entry.shape("qdata", torch.uint8, torch.float4_e2m1fn_x2)
    inputs = entry.get("act_quant_kwargs")
    spec = WeightSpec(
        *(qtypes["qnvfp4"], torch.Size([*lead, 2 * half]), torch.float32),
        axis=len(lead) - 1,
        group_size=16,
        activation=None if inputs is None else qtypes["qnvfp4"],
    )
    _check_scales(entry, spec, torch.float8_e4m3fn)
    factor = entry.tensor("per_tensor_scale") if entry.has("per_tensor_scale") else None
    if factor is not None and not is_all(entry.shape("per_tensor_scale", torch.float32)):
        entry.expect("per_tensor_scale", [*lead[:-1], 1, 1], torch.float32)
    names = entry.tensor("qdata"), entry.tensor("scale"), factor
    swizzled = bool(entry.get("is_swizzled_scales"))
    add_weight(entry, found, spec, functools.partial(_nvfp4_parts, names, spec, swizzled))


def _nvfp4_parts(names: tuple[str, str, str | None], spec: WeightSpec, swizzled: bool, source: Source) -> Parts:
    row = torch.ones(*spec.lead, 1, dtype=torch.float32, device="cpu")
    if names[2] is not None:
        row = source[names[2]].reshape(-1, *[1] * (row.dim() - 1)).expand_as(row).contiguous()
    codes = source[names[0]].view(torch.uint8)
    return {"qdata": codes, "scale": _block_scales(source[names[1]], spec, swizzled), "row_scale": row}


def mx(entry: Entry, found: ForeignCheckpoint) -> None:
    """``MXTensor``."""
    entry.known(
        *("elem_dtype", "block_size", "orig_dtype", "kernel_preference", "act_quant_kwargs", "is_swizzled_scales")
    )
    kind = _mx_type(entry.get("elem_dtype"))
    if kind is None:
        raise entry.wrong("elem_dtype", "float8_e4m3fn, float8_e5m2, fp6_e2m3, fp6_e3m2 or float4_e2m1fn_x2")
    inputs = entry.get("act_quant_kwargs")
    activation = None if inputs is None else _mx_type(inputs.get("elem_dtype"))
    if inputs is not None and activation is None:
        raise entry.wrong("act_quant_kwargs", "inputs of an MX type")
    shape = entry.shape("qdata", kind.storage_dtype if kind.bits == 8 else torch.uint8)
    shape = torch.Size([*shape[:-1], shape[-1] * (2 if kind.bits == 4 else 1)])
    group = entry.number("block_size")
    if len(shape) < 2 or shape[-1] % group:
        raise entry.wrong("block_size", f"a size that divides rows of {shape[-1]}")
    spec = WeightSpec(kind, shape, torch.float32, axis=len(shape) - 2, group_size=group, activation=activation)
    _check_scales(entry, spec, torch.float8_e8m0fnu)
    names = entry.tensor("qdata"), entry.tensor("scale")
    add_weight(entry, found, spec, functools.partial(_mx_parts, names, spec, bool(entry.get("is_swizzled_scales"))))


def _mx_type(name: object) -> qtype | None:
    known = {"float4_e2m1fn_x2": "qmxfp4", "float8_e4m3fn": "qmxfp8_e4m3", "float8_e5m2": "qmxfp8_e5m2"}
    known |= {"fp6_e2m3": "qmxfp6_e2m3", "fp6_e3m2": "qmxfp6_e3m2"}
    return qtypes[known[name]] if isinstance(name, str) and name in known else None


def _mx_parts(names: tuple[str, str], spec: WeightSpec, swizzled: bool, source: Source) -> Parts:
    codes = source[names[0]]
    if spec.qtype.bits == 6:
        codes = pack(codes, 6)
    return {"qdata": codes, "scale": _block_scales(source[names[1]], spec, swizzled)}


def _check_scales(entry: Entry, spec: WeightSpec, dtype: torch.dtype) -> None:
    plain = torch.Size([*spec.lead, spec.groups])
    found = entry.shape("scale", dtype)
    if entry.get("is_swizzled_scales"):
        if found.numel() != blocked_numel(spec.lead.numel(), spec.groups):
            raise CheckpointError(
                f"{entry.tensor('scale')} holds {found.numel()} scales in blocks of 128 x 4, expected "
                f"{blocked_numel(spec.lead.numel(), spec.groups)} for {tuple(plain)}: it is damaged"
            )
    elif found != plain:
        entry.expect("scale", plain, dtype)


def _block_scales(stored: torch.Tensor, spec: WeightSpec, swizzled: bool) -> torch.Tensor:
    scale = stored.view(torch.uint8)
    if swizzled:
        scale = plain_scales(scale, math.prod(spec.lead), spec.groups)
    return scale.reshape(*spec.lead, spec.groups).contiguous()
