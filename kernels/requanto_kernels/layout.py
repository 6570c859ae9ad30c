"""The execution layout of sub-byte weights: the stored bytes, permuted inside blocks, and back.

Stored form: codes adjacent along K, low bits first. Execution form: a block of 32 little-endian 16-bit words holds
`32 * F` consecutive k, where F = 16 / bits; field i of word j is `k = 32 * i + j`. One shift and mask of a run of words
then gives 32 consecutive k, so fields need no shuffling between lanes and a group of 32 or more never splits a field.
Shape, dtype and memory are those of the stored form. Where K is no multiple of the block (128 for 4 bit, 256 for 2 bit),
and for 8-bit weights, the execution layout is defined to be the stored form itself, and the kernels read it as such.
"""

import torch

from ._check import check_dtype, exec_block, fail

#: Codes that are unpacked at once: bounds the temporary memory to about three times as many bytes.
CHUNK_CODES = 1 << 24


def has_exec_layout(bits: int, k: int) -> bool:
    """Whether the two layouts differ for this weight."""
    return bits < 8 and k % exec_block(bits) == 0


def _unpack(data: torch.Tensor, bits: int, width: int) -> torch.Tensor:
    """Fields of `width`-bit elements on a new last axis."""
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
    # Byte b of word j holds the fields b * per_byte and on.
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
    """Stored form to execution form, on any device, by chunks; `inplace=True` reuses the tensor's own memory.

    qdata: uint8 `[..., N, ceil(K * bits / 8)]`; k: the logical K where the last byte is not full.
    """
    return _convert(qdata, bits, k, inplace, _forward)


def from_exec_layout(qdata: torch.Tensor, bits: int, k: int | None = None, *, inplace: bool = False) -> torch.Tensor:
    """The exact inverse of `to_exec_layout`."""
    return _convert(qdata, bits, k, inplace, _backward)
