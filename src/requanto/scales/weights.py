"""Quantization of float weights to codes, scales and shifts, without data.

Symmetric:  scale = absmax / qmax,          code = round(w / scale),           w ~ scale * code
Affine:     scale = (max - min) / (2^b-1),  code = round((w + shift) / scale), w ~ scale * code - shift,  shift = -min
Codebook:   scale = absmax / max|values|,   code = index of the value nearest to w / scale,  w ~ scale * values[code]

These are the scales of `minmax`; `requanto.scales.search` has others. Everything is computed in float32. Codes are chosen
for the rounded scale and shift that are stored, so rounding these to 16 bits adds no second error. (Formulas: Jacob et al.
2018, arXiv:1712.05877; names as in optimum-quanto.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor

from requanto.dtypes.bit_packing import pack, packed_length
from requanto.dtypes.float8 import to_float8
from requanto.dtypes.qtypes import qtype
from requanto.runtime.buffers import release_scratch, scratch_like
from requanto.scales import blocks
from requanto.scales.codebook import fit_codebook, nearest_codes
from requanto.scales.columns import divide_columns
from requanto.scales.compact import (
    ROW_DTYPE,
    around_zero,
    expand_scale,
    expand_shift,
    fit_scale,
    pack_codes,
    round_scales,
    stored_length,
    whole_zeros,
)
from requanto.scales.rotation import rotate
from requanto.scales.search import ScaleSearch, default_method, find_search

#: Weights quantized at once per torch thread, for up to four threads: the float32 temporaries (2 MB per thread, reused) then
#: stay in the cores' caches. With fewer, operators on groups (a hundredth of the weights) would run on one thread only.
CHUNK = 512 * 1024
#: The same on an accelerator: temporaries of 64 MB, since each step costs kernel launches.
CHUNK_ACCELERATOR = 16 * 1024 * 1024


class QuantizedData(NamedTuple):
    """Codes ``[..., K']`` (bit-packed below 8 bits), scale and shift ``[..., K/group]``, and the learned codebook."""

    qdata: torch.Tensor
    scale: torch.Tensor
    shift: torch.Tensor | None
    codebook: torch.Tensor | None = None
    row_scale: torch.Tensor | None = None


def scale_dtype(weight_dtype: torch.dtype, grouped: bool) -> torch.dtype:
    """dtype of stored scales: the weight's own for groups; float32 for one scale per row, whose size is negligible."""
    return weight_dtype if grouped else torch.float32


def quantize_weight_data(
    weight: torch.Tensor,
    kind: qtype,
    group_size: int | None,
    affine: bool,
    search: str | ScaleSearch | None = None,
    name: str = "weight",
    scale_bits: int | None = None,
    rotation: int | None = None,
    dtype: torch.dtype | None = None,
    column: torch.Tensor | None = None,
    zeros: bool = False,
) -> QuantizedData:
    """Quantizes the rows of ``weight``, in chunks of rows that bound the temporary memory.

    Args:
        weight: float ``[..., K]``; groups are along the last axis. For a meta or fake tensor, so are codes and scales.
        kind: type of the codes.
        group_size: a divisor of K, or None for one group per row.
        affine: with a shift (integer codes of fewer than 8 bits, unsigned ones), or symmetric around zero.
        search: how scale and shift are chosen; a name (`requanto.scales.search`), a function, or None: the type's default.
        name: name of the weight in messages.
        scale_bits: bits of a group's scale and shift (`scales.compact`); None: they are floats.
        rotation: block in which the rows are rotated first (`requanto.scales.rotation`).
        dtype: dtype of the stored scales of groups; None: that of ``weight``.
        column: column scale ``[..., K]`` by which the rows are divided first (`requanto.scales.columns`).
        zeros: shifts are stored as whole zero points (`scales.compact`).

    Raises:
        ValueError: the weight contains NaN or Inf, is not float, or the type does not support ``affine``.
    """
    if not weight.is_floating_point():
        raise ValueError(f"{name}: only float weights can be quantized, found {weight.dtype}")
    kind.affine(not affine, name)
    lead, length = weight.shape[:-1], weight.shape[-1]
    group = group_size or length
    if length and length % group:
        raise ValueError(f"{name}: group size {group} does not divide the row length {length}")
    rows = weight.reshape(lead.numel(), length)
    count, groups = rows.shape[0], (length // group if length else 1)
    stored = scale_dtype(dtype or weight.dtype, groups > 1)
    named = search or default_method(kind, zeros)
    search = find_search(named, kind)

    def prepared(block: torch.Tensor, start: int) -> torch.Tensor:
        """What is rounded for rows ``start ..``; changes ``block``, which is float32."""
        if column is not None:
            block = divide_columns(block, column, start, weight.shape[-2])
        return block if rotation is None else rotate(block, rotation)

    width = packed_length(length, kind.bits) if kind.is_packed else length
    qdata = torch.empty(count, width, dtype=kind.storage_dtype, device=weight.device)
    if kind.blocks is not None:
        scale = torch.empty(count, groups, dtype=torch.uint8, device=weight.device)
        row_scale = scale.new_empty(count, 1, dtype=torch.float32) if kind.blocks.scale == "e4m3" else None
    elif scale_bits is None:
        scale, row_scale = torch.empty(count, groups, dtype=stored, device=weight.device), None
    else:
        scale = torch.empty(count, stored_length(groups, scale_bits), dtype=torch.uint8, device=weight.device)
        row_scale = torch.empty(count, 1, dtype=ROW_DTYPE, device=weight.device)
    shift = torch.empty_like(scale) if affine else None
    zero_bits = kind.bits if zeros else scale_bits
    if zeros:
        shift = torch.empty(count, stored_length(groups, kind.bits), dtype=torch.uint8, device=weight.device)
    codebook = None
    numbers = weight.device.type != "meta" and not isinstance(weight, FakeTensor)
    if kind.is_learned:
        codebook = torch.empty(2**kind.bits, dtype=torch.float32, device=weight.device)
        if numbers:
            if kind.values is None:
                wide = rows if column is None and rotation is None else prepared(rows.to(torch.float32, copy=True), 0)
                kind = kind.with_values(fit_codebook(wide, kind, group))
            codebook.copy_(torch.tensor(kind.values, dtype=torch.float32, device="cpu"))
    if numbers and rows.numel():
        chunk = CHUNK * min(torch.get_num_threads(), 4) if weight.device.type == "cpu" else CHUNK_ACCELERATOR
        step = max(1, chunk // length)
        if kind.blocks is not None and row_scale is not None:
            largest = torch.cat([_largest(prepared, rows, start, step) for start in range(0, count, step)])
            # Of the matrix of each row: of an expert, or of the whole weight.
            largest = largest.view(-1, lead[-1]).amax(1, keepdim=True).repeat_interleave(lead[-1], 0)
            _require_finite(largest, name)
            row_scale.copy_(blocks.tensor_scale(largest, kind, named != "minmax"))
        for start in range(0, count, step):
            part = slice(start, start + step)
            # Sums depend on the memory order, so a transposed view is copied: it must give the same result as its copy.
            block = scratch_like(rows[part], "block").copy_(rows[part])
            block = prepared(block, start).reshape(-1, groups, group)
            if kind.blocks is not None:
                row = None if row_scale is None else row_scale[part]
                scale[part] = blocks.scale_codes(block, kind, row, named)
                found = blocks.expand_scale(scale[part], row, kind.blocks.scale)
                _require_finite(found, name)
                codes = encode(block, found, None, kind)
                qdata[part] = pack(codes, kind.bits) if kind.is_packed else codes
                continue
            found, offset = _search(search, block, kind, affine)
            _require_finite(found, name)
            if row_scale is None and zeros:
                found, offset = around_zero(found, offset, kind)
                found, _ = _storable(found, None, stored)
                zero_codes = whole_zeros(found, offset, kind)
                found, _ = _storable(fit_scale(block, found, zero_codes, kind), None, stored)
                scale[part], shift[part] = found.to(stored), pack_codes(zero_codes, kind.bits)
                offset = expand_shift(zero_codes, found, kind, kind.bits)
            elif row_scale is None:
                found, offset = _storable(found, offset, stored, has_zero=kind.values is None or 0 in kind.values)
                scale[part] = found.to(stored)
                if shift is not None:
                    shift[part] = offset.to(stored)
            else:
                compact = round_scales(found, offset, kind, scale_bits, zero_bits)
                scale[part], row_scale[part] = pack_codes(compact.scale, scale_bits), compact.row_scale
                found = expand_scale(compact.scale, compact.row_scale)
                if shift is not None:
                    shift[part] = pack_codes(compact.shift, zero_bits)
                    offset = expand_shift(compact.shift, found, kind, zero_bits)
                found = found.masked_fill_(found == 0, 1.0)  # groups of zeros: any scale gives the same codes
            codes = encode(block, found, offset, kind)
            qdata[part] = pack(codes, kind.bits) if kind.is_packed else codes
        release_scratch()
    elif rows.numel() == 0:
        scale.fill_(1 if kind.blocks is None else blocks.ONE[kind.blocks.scale])
        if row_scale is not None:
            row_scale.fill_(1)
        if shift is not None:
            shift.zero_()
    return QuantizedData(
        qdata.view(*lead, width),
        scale.view(*lead, scale.shape[-1]),
        shift.view(*lead, shift.shape[-1]) if shift is not None else None,
        codebook,
        None if row_scale is None else row_scale.view(*lead, 1),
    )


def _largest(
    prepared: Callable[[torch.Tensor, int], torch.Tensor], rows: torch.Tensor, start: int, step: int
) -> torch.Tensor:
    """Largest absolute value of each of the rows ``start .. start + step`` after ``prepared``, float32."""
    part = rows[start : start + step]
    block = prepared(scratch_like(part, "block").copy_(part), start)
    return torch.maximum(block.amax(1), block.amin(1).neg_())


def _search(
    search: ScaleSearch, groups: torch.Tensor, kind: qtype, affine: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if groups.shape[0] * groups.shape[1] != 1:
        return search(groups, kind, affine)
    # Torch divides a single sum among its threads, whose number changes the last bits; with two sums it does not.
    scale, shift = search(groups.expand(2, -1, -1).contiguous(), kind, affine)
    return scale[:1], None if shift is None else shift[:1]


def encode(groups: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor | None, kind: qtype) -> torch.Tensor:
    """Codes ``[rows, G * group]`` of float32 ``groups`` ``[rows, G, group]``; unsigned ones if they are bit-packed."""
    if kind.blocks is not None:
        return blocks.encode(groups, scale, kind)
    divisor = scale.unsqueeze(-1)
    if kind.is_codebook:
        divisor = torch.where(divisor == 0, torch.ones_like(divisor), divisor)
        return nearest_codes(groups / divisor, kind).flatten(1)
    buffer = scratch_like(groups, "units")
    if shift is None:
        scaled = torch.div(groups, divisor, out=buffer)
    else:
        scaled = torch.add(groups, shift.unsqueeze(-1), out=buffer).div_(divisor)
    if kind.is_floating_point:
        codes = to_float8(scaled.clamp_(kind.qmin, kind.qmax), kind.dtype)
    elif shift is not None:
        codes = scaled.round_().clamp_(0, 2**kind.bits - 1)
        # Converted via int8, which holds these values: there is no vector instruction for float -> uint8.
        codes = codes.to(torch.int8).view(torch.uint8) if kind.is_packed else codes.to(torch.int16).to(torch.uint8)
    elif kind.is_packed:
        codes = scaled.round_().clamp_(kind.qmin, kind.qmax).add_(kind.zero_code).to(torch.int8).view(torch.uint8)
    else:
        codes = scaled.round_().clamp_(kind.qmin, kind.qmax).to(torch.int8)
    return codes.flatten(1)


def _storable(
    scale: torch.Tensor, shift: torch.Tensor | None, stored: torch.dtype, has_zero: bool = True
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale and shift as float32 values that are exact in the stored dtype, without zero scales.

    A scale of 0 (a group of equal weights) becomes 1, since the codes are all 0. For codebooks without the value 0
    (``has_zero`` is False) it stays 0. A scale too small for the stored dtype becomes the smallest usable number: in float16
    a subnormal one with 4 bits of mantissa, since groups of small weights are common and the smallest normal number (6e-5)
    would be several times their step.
    """
    zero = scale == 0
    smallest = torch.finfo(stored).tiny / (64 if stored == torch.float16 else 1)
    scale = scale.clamp(min=smallest).to(stored).float().masked_fill(zero, 1.0 if has_zero else 0.0)
    return scale, shift.to(stored).float() if shift is not None else None


def _require_finite(scale: torch.Tensor, name: str) -> None:
    # NaN and Inf in a group always propagate to its scale, so checking the scales is enough.
    if not bool(torch.isfinite(scale).all()):
        bad = int((~torch.isfinite(scale)).sum())
        raise ValueError(
            f"{name} holds NaN or Inf in {bad} of {scale.numel()} groups and cannot be quantized. Repair the "
            f"checkpoint, or leave this layer float with modules_to_not_convert."
        )
