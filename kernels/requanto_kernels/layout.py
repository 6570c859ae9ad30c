"""Conversion of weights of 2, 3 and 4 bits between the plain and the execution layout, which permutes bits within blocks.

Plain layout: codes adjacent along K, low bits first. Execution layout: a block of 32 little-endian 16-bit words has `32 * F`
consecutive k, where F = 16 / bits; field i of word j is `k = 32 * i + j`. So one shift and mask of 32 words gives 32
consecutive k: fields need no shuffle between lanes, and a group of 32 or more never ends inside a field. A block of 3 bits
is one of 2 bits, with the low two bits of each code, and 32 bytes: bit i of byte j is the third bit of `k = 32 * i + j`.

Shape, dtype and memory are the same in both layouts. If K is not a multiple of the block (128 for 4 bits, 256 for 2 and 3
bits), and for other widths, the execution layout is defined to be the plain one.
"""

import torch

from ._check import EXEC_BITS, check_bits, check_dtype, exec_block, fail

#: Codes that are unpacked at once; temporary memory is about three times as many bytes.
CHUNK_CODES = 1 << 24


def has_exec_layout(bits: int, k: int) -> bool:
    """Whether the two layouts differ for this weight."""
    return bits in EXEC_BITS and k % exec_block(bits) == 0


def group_major(scales: torch.Tensor) -> torch.Tensor:
    """Scales or shifts `[..., N, G]` with the same shape, in memory `[..., G, N]`; no copy if they are so already.

    The kernels accept any strides. With this order the scales of the rows of a tile are adjacent, so they are loaded as
    vectors, asynchronously; in the order of the shape every row of a tile costs one small load.
    """
    if scales.dim() < 2:
        fail("scales.shape", tuple(scales.shape), "at least two dimensions, (..., N, G)")
    return scales.transpose(-1, -2).contiguous().transpose(-1, -2)


def _unpack(data: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """`count` fields of `bits` bits, on a new last axis."""
    mask = (1 << bits) - 1
    return torch.stack([(data >> (i * bits)) & mask for i in range(count)], dim=-1)


def _pack(fields: torch.Tensor, bits: int) -> torch.Tensor:
    word = fields[..., 0].clone()
    for i in range(1, fields.shape[-1]):
        word |= fields[..., i] << (i * bits)
    return word


def _codes_of(chunk: torch.Tensor, bits: int) -> torch.Tensor:
    """The codes of plain bytes, one after the other."""
    if bits != 3:
        return _unpack(chunk, bits, 8 // bits)
    a, b, c = chunk.reshape(-1, 3).unbind(-1)  # codes 2 and 5 lie in two bytes; bits that leave a byte are dropped
    codes = (a, a >> 3, a >> 6 | b << 2, b >> 1, b >> 4, b >> 7 | c << 1, c >> 2, c >> 5)
    return torch.stack(codes, dim=-1) & 7


def _bytes_of(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """The reverse of `_codes_of`."""
    if bits != 3:
        return _pack(codes.reshape(-1, 8 // bits), bits)
    d = codes.reshape(-1, 8).unbind(-1)
    a, b = d[0] | d[1] << 3 | d[2] << 6, d[2] >> 2 | d[3] << 1 | d[4] << 4 | d[5] << 7
    return torch.stack([a, b, d[5] >> 1 | d[6] << 2 | d[7] << 5], dim=-1)


def _forward(chunk: torch.Tensor, bits: int) -> torch.Tensor:
    low = bits & ~1  # of 3 bits, 2
    codes = _codes_of(chunk, bits).reshape(-1, 16 // low, 32)
    # Byte b of word j has the fields from b * 8 / low on.
    halves = (codes & ((1 << low) - 1)).reshape(-1, 2, 8 // low, 32).permute(0, 3, 1, 2)
    words = _pack(halves, low).reshape(-1, 64)
    if bits == 3:
        words = torch.cat([words, _pack((codes >> 2).transpose(1, 2), 1)], dim=-1)
    return words.reshape(chunk.shape)


def _backward(chunk: torch.Tensor, bits: int) -> torch.Tensor:
    low = bits & ~1
    blocks = chunk.reshape(-1, 64 if bits != 3 else 96)
    codes = _unpack(blocks[:, :64], low, 8 // low).reshape(-1, 32, 16 // low).transpose(1, 2)
    if bits == 3:
        codes = codes | _unpack(blocks[:, 64:], 1, 8).transpose(1, 2) << 2
    return _bytes_of(codes, bits).reshape(chunk.shape)


def _convert(qdata: torch.Tensor, bits: int, k: int | None, inplace: bool, step) -> torch.Tensor:
    check_bits(bits)
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
