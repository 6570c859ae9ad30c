"""Conversion of weights of 2 to 7 bits between the plain and the execution layout, which permutes bits within blocks.

Plain layout: codes adjacent along K, low bits first. Execution layout: a block has F fields of 32 consecutive k, so number j
of field i is `k = 32 * i + j`. Its codes are cut into planes of 4, 2 or 1 bits, stored one after the other, low bits first:

    bits    2   3      4   5      6      7          4 bits      words j of 16 bits, each with 4 fields; two sets if F is 8
    planes  2   2, 1   4   4, 1   4, 2   4, 2, 1    2 bits      words j with 8 fields, or bytes j with 4
    F       8   8      4   8      4      8          1 bit       bytes j with 8 fields

So one shift and mask of 32 words gives 32 consecutive k: fields need no shuffle between lanes, and a group of 32 or more
never ends inside a field.

Shape, dtype and memory are the same in both layouts. If K is not a multiple of the block (128 for 4 and 6 bits, else 256),
and for 1 and 8 bits, the execution layout is defined to be the plain one.
"""

import functools
import operator

import torch

from ._check import check_bits, check_dtype, exec_block, fail, has_exec_layout

#: Codes that are unpacked at once; temporary memory is about three times as many bytes.
CHUNK_CODES = 1 << 24


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
    """The codes of plain bytes, `[..., 8]` for each `bits` bytes; bits that leave a byte are dropped."""
    data = chunk.reshape(-1, bits).unbind(-1)
    codes = []
    for i in range(8):
        byte, place = divmod(i * bits, 8)
        code = data[byte] >> place
        codes.append(code if place + bits <= 8 else code | data[byte + 1] << (8 - place))
    return torch.stack(codes, dim=-1) & ((1 << bits) - 1)


def _bytes_of(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """The reverse of `_codes_of`."""
    codes, found = codes.reshape(-1, 8).unbind(-1), []
    for byte in range(bits):
        parts = [(code, i * bits - 8 * byte) for i, code in enumerate(codes) if -bits < i * bits - 8 * byte < 8]
        shifted = [code << place if place >= 0 else code >> -place for code, place in parts]
        found.append(functools.reduce(operator.or_, shifted))
    return torch.stack(found, dim=-1)


def _planes(bits: int) -> list[tuple[int, int, list[int]]]:
    """(first bit, bits, shape) of each plane; the shape is (sets, bytes of a word, fields in a byte)."""
    fields, first, found = exec_block(bits) // 32, 0, []
    while first < bits:
        width = max(w for w in (4, 2, 1) if w <= bits - first)
        per_word = min(fields, 16 // width)
        found.append((first, width, [fields // per_word, per_word * width // 8, 8 // width]))
        first += width
    return found


def _forward(chunk: torch.Tensor, bits: int) -> torch.Tensor:
    codes = _codes_of(chunk, bits).reshape(-1, exec_block(bits))
    planes = []
    for first, width, shape in _planes(bits):
        fields = (codes >> first & ((1 << width) - 1)).reshape(-1, *shape, 32).permute(0, 1, 4, 2, 3)
        planes.append(_pack(fields, width).reshape(len(codes), -1))
    return torch.cat(planes, dim=-1).reshape(chunk.shape)


def _backward(chunk: torch.Tensor, bits: int) -> torch.Tensor:
    block = exec_block(bits)
    blocks = chunk.reshape(-1, block * bits // 8)
    codes = torch.zeros((len(blocks), block), dtype=torch.uint8, device=chunk.device)
    begin = 0
    for first, width, shape in _planes(bits):
        plane = blocks[:, begin : begin + block * width // 8].reshape(-1, shape[0], 32, shape[1])
        codes |= _unpack(plane, width, shape[2]).permute(0, 1, 3, 4, 2).reshape(codes.shape) << first
        begin += block * width // 8
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
