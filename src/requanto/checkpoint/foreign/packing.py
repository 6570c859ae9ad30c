"""Packed codes of other formats, rearranged into rows of ours (`requanto.dtypes.bit_packing`).

Most formats write a stream of codes, low bits first, into little-endian words. Such a stream is ours byte for byte, whatever
the width of the words; what differs is the axis along which the codes follow each other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from requanto.dtypes.bit_packing import pack, unpack

#: codes that are unpacked at a time
_AT_A_TIME = 2**22


def _bytes(words: torch.Tensor) -> torch.Tensor:
    """``[R, W]`` -> uint8 ``[R, W * bytes of a word]``. (A transposed column is contiguous, but has no view as bytes.)"""
    return words.reshape(-1).view(torch.uint8).reshape(*words.shape[:-1], -1)


def rows_of_words(words: torch.Tensor) -> torch.Tensor:
    """Words along columns ``[R, N]`` -> the bytes of N rows, uint8 ``[N, R * bytes of a word]``."""
    return _bytes(words.t())


def codes_of_words(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Words along rows ``[R, W]`` -> uint8 codes ``[R, count]``."""
    stored = _bytes(words)
    return stored[:, :count] if bits == 8 else unpack(stored, bits, count)


def packed_rows(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes ``[R, K]`` -> the bytes of our rows; those of 8 bits are the codes themselves."""
    return codes.contiguous() if bits == 8 else pack(codes, bits)


def with_columns(rows: torch.Tensor, bits: int, length: int, order: torch.Tensor) -> torch.Tensor:
    """Our rows of ``length`` codes with the columns ``order``."""
    moved = torch.empty_like(rows)
    for start, stop in pieces(rows.shape[0], length):
        codes = rows[start:stop] if bits == 8 else unpack(rows[start:stop], bits, length)
        moved[start:stop] = packed_rows(torch.index_select(codes, 1, order), bits)
    return moved


def pieces(count: int, length: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Start and end of runs of rows that are unpacked at a time, so that a whole weight never is.

    Args:
        count: number of rows.
        length: codes in a row.
        multiple: a run begins at such a row.
    """
    step = max(_AT_A_TIME // max(length, 1) // multiple, 1) * multiple
    return ((start, min(start + step, count)) for start in range(0, count, step))


def signed_bytes(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes c -> int8 codes c - 128."""
    return (codes ^ 0x80).view(torch.int8)


def common_group(length: int, group: int) -> int | None:
    """The largest group size that divides rows of ``length`` weights and groups of ``group``; None: one scale a row."""
    if group < 1 or group >= length:
        return None
    return math.gcd(length, group)


def group_indices(length: int, group: int, device: torch.device) -> torch.Tensor | None:
    """For each of our groups the stored one that it is in; None if they are the same.

    A format whose last group may be short, or whose groups cross rows, has no place in ours; smaller groups that repeat
    their scales hold the same weight.
    """
    common = common_group(length, group)
    if common is None or common == group:
        return None
    return torch.arange(0, length, common, device=device) // group
