"""optimum-quanto's arithmetic: codes computed in the dtype of the weight, its group sizes and its bit packing."""

from __future__ import annotations

import torch

from requanto.dtypes.float8 import to_float8


def symmetric_codes(base: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor) -> torch.Tensor:
    """int8 or float8 codes of ``base / scale``, in base's shape."""
    scaled = _divided(base, scale)
    if not dtype.is_floating_point:
        scaled = torch.round(scaled)
    info = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    return to_float8(torch.clamp(scaled, min=info.min, max=info.max), dtype)


def _divided(base: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``base / scale``; 0 where the scale is 0, as for equal weights, whose value is in the shift."""
    return torch.where(scale == 0, torch.zeros((), dtype=base.dtype, device=base.device), base / scale)


def affine_codes(base: torch.Tensor, bits: int, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Unsigned codes ``0 .. 2^bits - 1`` (uint8) of a grouped ``base``; an integer shift is a zero point."""
    if shift.dtype.is_floating_point:
        codes = torch.round(_divided(base + shift, scale))
    else:
        codes = torch.round(_divided(base, scale)) + shift
    return torch.clamp(codes, min=0, max=2**bits - 1).to(torch.uint8)


def group_size_rule(shape: torch.Size | tuple[int, ...]) -> int | None:
    """optimum-quanto's group size for 2- and 4-bit weights of a shape: the first divisor of 128, 96, 64 and 32, or None."""
    length = torch.Size(shape).numel() // shape[0] if shape[0] else 0
    size = 128
    if length <= size:
        return None
    while length % size and size > 32:
        size -= 32
    return None if length % size else size


def group(base: torch.Tensor, axis: int, group_size: int, pad: bool = False) -> torch.Tensor:
    """Splits a tensor into groups: ``[groups, group_size]`` for axis 0, ``[group_size, groups]`` for axis -1.

    Args:
        base: any tensor.
        axis: 0 or -1. Each index along it is one slice, which is divided into groups.
        group_size: number of values in a group.
        pad: if it does not divide, pad the last group of each slice with the slice's last value, which changes neither
            minimum nor maximum. (A KV cache has any number of tokens, and heads of any size.)

    Raises:
        ValueError: another axis, or without ``pad`` a group size that does not divide.
    """
    if axis not in (0, -1):
        raise ValueError(f"axis must be 0 or -1 to group a tensor, found {axis!r}")
    features = base.shape[axis]
    length = base.numel() // features
    missing = -length % group_size
    if missing and not pad:
        raise ValueError(f"group_size ({group_size}) must divide the {length} weights along axis {axis}")
    if axis == 0:
        if missing:
            rows = base.reshape(features, length)
            base = torch.cat([rows, rows[:, -1:].expand(features, missing)], 1)
        return base.reshape(-1, group_size)
    if missing:
        columns = base.reshape(length, features)
        base = torch.cat([columns, columns[-1:].expand(missing, features)])
    return base.reshape(-1, group_size, features).permute(1, 2, 0).reshape(group_size, -1)


def ungroup(grouped: torch.Tensor, axis: int, orig_shape: torch.Size) -> torch.Tensor:
    """The reverse of :func:`group`; padding is dropped."""
    if grouped.shape == orig_shape:
        return grouped
    features = orig_shape[axis]
    length = torch.Size(orig_shape).numel() // features
    if axis == 0:
        return grouped.reshape(features, -1)[:, :length].reshape(orig_shape)
    columns = grouped.reshape(grouped.shape[0], features, -1).permute(2, 0, 1).reshape(-1, features)
    return columns[:length].reshape(orig_shape)


def grouped_shape(shape: torch.Size | tuple[int, ...], axis: int, group_size: int) -> tuple[int, int]:
    """The shape that :func:`group` gives a tensor of ``shape``."""
    if axis not in (0, -1):
        raise ValueError(f"axis must be 0 or -1 to group a tensor, found {axis!r}")
    groups = torch.Size(shape).numel() // group_size
    return (groups, group_size) if axis == 0 else (group_size, groups)


def pack_split(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Packs codes along axis 0: byte row r has the rows r, r + R ... from low to high bits, R = ceil(rows / per byte)."""
    per_byte = 8 // bits
    rows = codes.shape[0]
    width = -(-rows // per_byte)
    packed = torch.zeros(width, *codes.shape[1:], dtype=torch.uint8, device=codes.device)
    for lane in range(per_byte):
        part = codes[lane * width : (lane + 1) * width].to(torch.uint8)
        if part.shape[0]:
            packed[: part.shape[0]] |= part << (bits * lane)
    return packed


def unpack_split(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The reverse of :func:`pack_split`, padding rows included."""
    mask = 2**bits - 1
    return torch.cat([(packed >> (bits * lane)) & mask for lane in range(8 // bits)]).to(torch.uint8)
