"""Sources of the compiled kernels, written in torch (`requanto.linear.cpu.aot.calls` calls them).

The cache key of a compiled kernel covers the text of its function, of everything it calls and reads, and the compiler
options (`aot.source.digest_of`). A change of any of them, even of a comment, recompiles the kernel.

The code is written for inductor (measured): uint8 -> int32 -> float32 vectorizes, 16-bit integers do not. Its conversion
from float32 to bfloat16 takes seven times as long as everything else, so pairs of bfloat16 are put together as 32-bit words
by integer arithmetic. A result that is not contiguous, or a view of another tensor, is computed twice or copied.
"""

from __future__ import annotations

import functools
import os

import torch

from requanto.linear.activations import TINY
from requanto.linear.cpu.aot import cache
from requanto.linear.cpu.aot.cache import Source

#: Half a block: the rows whose codes are in the lower nibbles of bytes.
_HALF = 32


def _pair(even: torch.Tensor, odd: torch.Tensor) -> torch.Tensor:
    """The upper 16 bits of two float32 as one int32 word, with the even one's in the lower half."""
    return ((even >> 16) & 0xFFFF) | (odd & -(2**16))


def _rounded(values: torch.Tensor) -> torch.Tensor:
    """float32 bits whose upper half is the value rounded to bfloat16; ties round away from zero."""
    return values.view(torch.int32) + 0x8000


def _nibbles_to_words(
    codes: torch.Tensor, mask: torch.Tensor, unit: torch.Tensor, scales: torch.Tensor, words: torch.Tensor
) -> None:
    group_scale = (scales << 16).view(torch.float32)
    zero = (scales & -(2**16)).view(torch.float32) - 8 * group_scale
    scale = group_scale * unit
    bytes_ = codes.to(torch.int32).unsqueeze(3)  # [groups of all blocks, pairs, 2, 1, half]
    even, odd = (_rounded((bytes_[:, :, k] & mask).float() * scale + zero) for k in (0, 1))
    # Without the reshape, inductor computes in the order of the codes and copies the result once more.
    words.copy_(_pair(even, odd).reshape(words.shape))


def _e4m3_values(codes: torch.Tensor) -> torch.Tensor:
    """e4m3 as uint8 -> the value / 2^120 in float32: its sign, exponent and mantissa bits moved to those of float32."""
    return (((codes.to(torch.int32) << 24) >> 4) & -0x78100000).view(torch.float32)


def _e4m3_to_words(codes: torch.Tensor, scale: torch.Tensor, words: torch.Tensor) -> None:
    values = _e4m3_values(codes) * 2.0**120 * scale
    words.copy_(_pair(_rounded(values[:, :, 0]), _rounded(values[:, :, 1])))


def _row_times_e4m3(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (_e4m3_values(codes) * x).sum(1) * 2.0**120 * scale


def _int8_to_words(
    codes: torch.Tensor, even: torch.Tensor, odd: torch.Tensor, scale: torch.Tensor, words: torch.Tensor
) -> None:
    # A word has the codes of k .. k + 3: the first two become one word of two bfloat16, the others the next word.
    parts = (_rounded(((codes << left) >> 24).float() * scale) for left in (even, odd))
    words.copy_(_pair(*parts))


def _row_times_int8(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    # Four sums of 16 rows each, which inductor computes in one loop: so it reads memory sequentially, instead of every
    # fourth cache line four times.
    sums = []
    for rows in codes.split(16, 2):
        parts = (((rows << (24 - 8 * byte)) >> 24).float() * x[:, byte : byte + 1] for byte in range(4))
        sums.append(functools.reduce(torch.add, parts).sum(1))
    return torch.stack(sums, 1) * scale


def _int8_row_times_int8(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    x_scale = wide.abs().amax().clamp_min(TINY) / 127
    x_scale = x_scale + 0 * x_scale  # NaN for an infinite one, and so is the result
    return _row_times_int8((wide * x_scale.reciprocal()).round(), codes, scale) * x_scale


def _rows_to_int8(x: torch.Tensor, codes: torch.Tensor, steps: torch.Tensor) -> None:
    wide = x.float()
    x_scale = wide.abs().amax(1, keepdim=True).clamp_min(TINY) / 127
    x_scale = x_scale + 0 * x_scale  # NaN for an infinite one, and so is the row of the result
    # round() is separate from + 128. Rounding with a large constant would be fused with the multiplication, which gives
    # other codes than eager operators.
    codes.copy_(((wide * x_scale.reciprocal()).round() + 128).to(torch.uint8))
    steps.copy_(x_scale)


def _scale_and_add_bias(sums: torch.Tensor, steps: torch.Tensor, bias: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_((sums * steps + bias).to(torch.bfloat16))


def _stored_int8(codes: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_((codes.float() * scale).to(torch.bfloat16))


def _stored_nibbles(codes: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, words: torch.Tensor) -> None:
    # A byte of two codes becomes a word of two bfloat16.
    parts = (part.float() * scale - shift for part in (codes.to(torch.int32) & 15, codes.to(torch.int32) >> 4))
    words.copy_(_pair(*(_rounded(part) for part in parts)))


def _stored_e4m3(codes: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
    # The result is float32: for bfloat16, inductor does not vectorize the view of integers as floats.
    out.copy_(_e4m3_values(codes) * 2.0**120 * scale)


@functools.cache
def left_shifts() -> tuple[torch.Tensor, torch.Tensor]:
    with cache.plain_mode():
        return tuple(torch.tensor(left, dtype=torch.int32, device="cpu") for left in ([[24], [8]], [[16], [0]]))


@functools.cache
def nibble_masks() -> torch.Tensor:
    with cache.plain_mode():
        return torch.tensor([[15], [240]], dtype=torch.int32, device="cpu")


@functools.cache
def nibble_units() -> torch.Tensor:
    with cache.plain_mode():
        return torch.tensor([[1.0], [1 / 16]], dtype=torch.float32, device="cpu")


#: A separate generator, so that loading a kernel does not change the random numbers of the caller.
_GENERATOR = torch.Generator()


def _after_fork() -> None:
    # Another thread of the parent may have been drawing numbers; its generator stays locked in the child.
    global _GENERATOR
    _GENERATOR = torch.Generator()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _uniform(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=_GENERATOR, dtype=torch.float32, device="cpu")


def _normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=_GENERATOR, dtype=torch.float32, device="cpu")


def _integers(low: int, high: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=_GENERATOR, dtype=dtype, device="cpu")


def _nibbles_example() -> tuple[torch.Tensor, ...]:
    count, pairs = 6, 4
    scales = _normal(count * 2 * _HALF, 2).bfloat16().view(torch.int32)
    return (
        _integers(0, 256, (count, pairs, 2, _HALF), torch.uint8),
        nibble_masks(),
        nibble_units(),
        scales.view(count, 1, 2, _HALF),
        torch.empty(count, pairs, 2 * _HALF, dtype=torch.int32, device="cpu"),
    )


def _e4m3_example() -> tuple[torch.Tensor, ...]:
    blocks, pairs = 4, 6
    return (
        _integers(0, 127, (blocks, pairs, 2, 2 * _HALF), torch.uint8),
        _uniform(blocks, 1, 1, 2 * _HALF),
        torch.empty(blocks, pairs, 2 * _HALF, dtype=torch.int32, device="cpu"),
    )


def _row_example() -> tuple[torch.Tensor, ...]:
    codes = _integers(0, 127, (4, 6, 2 * _HALF), torch.uint8)
    return _uniform(6, 1), codes, _uniform(4, 2 * _HALF)


def _int8_example() -> tuple[torch.Tensor, ...]:
    blocks, quads = 4, 6
    return (
        _integers(-(2**31), 2**31, (blocks, quads, 1, 2 * _HALF), torch.int32),
        *left_shifts(),
        _uniform(blocks, 1, 1, 2 * _HALF),
        torch.empty(blocks, quads, 2, 2 * _HALF, dtype=torch.int32, device="cpu"),
    )


def _int8_row_example() -> tuple[torch.Tensor, ...]:
    blocks, quads = 4, 6
    codes = _integers(-(2**31), 2**31, (blocks, quads, 2 * _HALF), torch.int32)
    return _uniform(quads, 4), codes, _uniform(blocks, 4, 16)


def _int8_int8_row_example() -> tuple[torch.Tensor, ...]:
    x, codes, scale = _int8_row_example()
    return x.bfloat16(), codes, scale


def _rows_to_int8_example() -> tuple[torch.Tensor, ...]:
    rows, length = 6, 96
    codes = torch.empty(rows, length, dtype=torch.uint8, device="cpu")
    return _normal(rows, length).bfloat16(), codes, torch.empty(rows, 1, dtype=torch.float32, device="cpu")


def _scale_and_add_bias_example() -> tuple[torch.Tensor, ...]:
    rows, length = 6, 96
    sums, bias = _normal(rows, length), _uniform(length)
    return sums, _uniform(rows, 1), bias, torch.empty(rows, length, dtype=torch.bfloat16, device="cpu")


def _stored_example(codes: torch.Tensor, dtype: torch.dtype, count: int) -> tuple[torch.Tensor, ...]:
    rows = len(codes)
    return codes, *_uniform(count, rows, 1), torch.empty(codes.shape, dtype=dtype, device="cpu")


def _stored_int8_example() -> tuple[torch.Tensor, ...]:
    return _stored_example(_integers(-127, 128, (6, 96), torch.int8), torch.bfloat16, 1)


def _stored_nibbles_example() -> tuple[torch.Tensor, ...]:
    return _stored_example(_integers(0, 256, (6, 96), torch.uint8), torch.int32, 2)


def _stored_e4m3_example() -> tuple[torch.Tensor, ...]:
    return _stored_example(_integers(0, 127, (6, 96), torch.uint8), torch.float32, 1)


_GROUPS, _PAIRS = {0: "groups"}, {0: "groups", 1: "pairs"}
_ROWS = {0: "rows", 1: "length"}
_STORED = {0: _ROWS, 1: {0: "rows"}, 2: _ROWS}
_ROW_TIMES_CODES = {0: {0: "quads"}, 1: {0: "blocks", 1: "quads"}, 2: {0: "blocks"}}
SOURCES = {
    "nibbles": Source(_nibbles_to_words, (4,), _nibbles_example, {0: _PAIRS, 3: _GROUPS, 4: _PAIRS}),
    "e4m3": Source(
        _e4m3_to_words,
        (2,),
        _e4m3_example,
        {0: {0: "blocks", 1: "pairs"}, 1: {0: "blocks"}, 2: {0: "blocks", 1: "pairs"}},
    ),
    "row": Source(
        _row_times_e4m3,
        (),
        _row_example,
        {0: {0: "length"}, 1: {0: "blocks", 1: "length"}, 2: {0: "blocks"}},
        2**-18,
    ),
    "int8": Source(
        _int8_to_words,
        (4,),
        _int8_example,
        {0: {0: "blocks", 1: "quads"}, 3: {0: "blocks"}, 4: {0: "blocks", 1: "quads"}},
    ),
    "int8-row": Source(_row_times_int8, (), _int8_row_example, _ROW_TIMES_CODES, 2**-18),
    "int8-int8-row": Source(_int8_row_times_int8, (), _int8_int8_row_example, _ROW_TIMES_CODES, 2**-18),
    "rows-to-int8": Source(_rows_to_int8, (1, 2), _rows_to_int8_example, {0: _ROWS, 1: _ROWS, 2: {0: "rows"}}, 2**-20),
    "finished": Source(
        _scale_and_add_bias, (3,), _scale_and_add_bias_example, {0: _ROWS, 1: {0: "rows"}, 2: {0: "length"}, 3: _ROWS}
    ),
    "stored-int8": Source(_stored_int8, (2,), _stored_int8_example, _STORED),
    "stored-int4": Source(
        _stored_nibbles, (3,), _stored_nibbles_example, {0: _ROWS, 1: {0: "rows"}, 2: {0: "rows"}, 3: _ROWS}
    ),
    "stored-e4m3": Source(_stored_e4m3, (2,), _stored_e4m3_example, _STORED),
}
