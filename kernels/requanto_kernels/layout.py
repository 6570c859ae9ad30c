"""Conversion of sub-byte weights between the plain and the execution layout, which permutes bytes within blocks.

Plain layout: codes adjacent along K, low bits first. Execution layout: a block of 32 little-endian 16-bit words has `32 * F`
consecutive k, where F = 16 / bits; field i of word j is `k = 32 * i + j`. So one shift and mask of 32 words gives 32
consecutive k: fields need no shuffle between lanes, and a group of 32 or more never ends inside a field. Shape, dtype and
memory are the same in both. If K is not a multiple of the block (128 for 4 bits, 256 for 2 bits), and for 8-bit weights, the
execution layout is defined to be the plain one.
"""

import torch

from ._check import check_dtype, exec_block, fail

#: Codes that are unpacked at once; temporary memory is about three times as many bytes.
CHUNK_CODES = 1 << 24


def has_exec_layout(bits: int, k: int) -> bool:
    """Whether the two layouts differ for this weight."""
    return bits < 8 and k % exec_block(bits) == 0


def _unpack(data: torch.Tensor, bits: int, width: int) -> torch.Tensor:
    """The `bits`-bit fields of `width`-bit elements, on a new last axis."""
    mask = (1 << bits) - 1
    return torch.stack([(data >> shift) & mask for shift in range(0, width, bits)], dim=-1)


def _pack(fields: torch.Tensor, bits: int) -> torch.Tensor:
    word = fields[..., 0].clone()
    for i in range(1, fields.shape[-1]):
        word |= fields[..., i] << (i * bits)
    return word


def _forward(chunk: torch.Tensor, bits: int) -> torch.Tensor:
    fields, per_byte = 16 // bits, 8 // bits
    codes = _unpack(chunk, bits, 8).reshape(-1, fields, 32)
    # Byte b of word j has the fields from b * per_byte on.
    halves = codes.reshape(-1, 2, per_byte, 32).permute(0, 3, 1, 2)
    return _pack(halves, bits).reshape(chunk.shape)


def _backward(chunk: torch.Tensor, bits: int) -> torch.Tensor:
    fields, per_byte = 16 // bits, 8 // bits
    codes = _unpack(chunk, bits, 8).reshape(-1, 32, fields).permute(0, 2, 1).reshape(-1, per_byte)
    return _pack(codes, bits).reshape(chunk.shape)


def _convert(qdata: torch.Tensor, bits: int, k: int | None, inplace: bool, step) -> torch.Tensor:
    if bits not in (2, 4, 8):
        fail("bits", bits, "2, 4 or 8")
    if bits == 8:
        return qdata
    check_dtype("qdata", qdata, (torch.uint8,))
    k = qdata.shape[-1] * 8 // bits if k is None else k
    if qdata.shape[-1] != -(-k * bits // 8):
        fail("qdata.shape", tuple(qdata.shape), f"{-(-k * bits // 8)} bytes a row for K={k}")
    if not has_exec_layout(bits, k):
        return qdata
    if inplace and not qdata.is_contiguous():
        fail("qdata.stride", qdata.stride(), "a contiguous tensor for inplace=True")
    out = qdata if inplace else torch.empty_like(qdata, memory_format=torch.contiguous_format)
    source, target = qdata.reshape(-1, qdata.shape[-1]), out.view(-1, qdata.shape[-1])
    rows = max(1, CHUNK_CODES // k)
    for start in range(0, source.shape[0], rows):
        target[start : start + rows] = step(source[start : start + rows].contiguous(), bits)
    return out


def to_exec_layout(qdata: torch.Tensor, bits: int, k: int | None = None, *, inplace: bool = False) -> torch.Tensor:
    """Converts the plain to the execution layout, on any device, in chunks; `inplace=True` reuses the tensor's memory.

    qdata: uint8 `[..., N, ceil(K * bits / 8)]`; k: K, needed if the last byte is not full.
    """
    return _convert(qdata, bits, k, inplace, _forward)


def from_exec_layout(qdata: torch.Tensor, bits: int, k: int | None = None, *, inplace: bool = False) -> torch.Tensor:
    """The exact inverse of `to_exec_layout`."""
    return _convert(qdata, bits, k, inplace, _backward)
