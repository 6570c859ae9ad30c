"""What the compiled kernels compute, written in torch (`requanto.linear.cpu.aot.calls` calls them).

A package is kept under the text of its function, of all it calls and reads, and of how it is compiled
(`aot.source.digest_of`): a change of any has that kernel made anew.

How they are written follows what inductor does with it (measured): uint8 -> int32 -> float32 vectorizes, 16-bit integers do
not; its own float32 -> bfloat16 takes seven times as long as the rest, so halves of 32-bit words are put together by integer
arithmetic; and a result that is not contiguous, or is a part of another, is computed twice or copied.
"""

from __future__ import annotations

import functools

import torch

from requanto.linear.activations import TINY
from requanto.linear.cpu.aot import cache
from requanto.linear.cpu.aot.cache import Source

#: Rows of a block that a byte's lower nibble stands for.
_HALF = 32


def _pair(even: torch.Tensor, odd: torch.Tensor) -> torch.Tensor:
    """The upper halves of two float32's bits as one word, the even one's below."""
    return ((even >> 16) & 0xFFFF) | (odd & -(2**16))


def _rounded(numbers: torch.Tensor) -> torch.Tensor:
    """Bits of float32 whose upper half is the nearest bfloat16; a tie goes away from zero."""
    return numbers.view(torch.int32) + 0x8000


def _nibbles_to_words(
    codes: torch.Tensor, mask: torch.Tensor, unit: torch.Tensor, scales: torch.Tensor, words: torch.Tensor
) -> None:
    own = (scales << 16).view(torch.float32)
    zero = (scales & -(2**16)).view(torch.float32) - 8 * own
    scale = own * unit
    bytes_ = codes.to(torch.int32).unsqueeze(3)  # [groups of all blocks, pairs, 2, 1, half]
    even, odd = (_rounded((bytes_[:, :, k] & mask).float() * scale + zero) for k in (0, 1))
    # Reshaped, values are in the result's order from the start: else inductor keeps the codes' order, and copies again.
    words.copy_(_pair(even, odd).reshape(words.shape))


def _e4m3_numbers(codes: torch.Tensor) -> torch.Tensor:
    """uint8 -> float32, the number / 2^120: sign in bit 31, exponent and mantissa as the first bits of float32's."""
    return (((codes.to(torch.int32) << 24) >> 4) & -0x78100000).view(torch.float32)


def _e4m3_to_words(codes: torch.Tensor, scale: torch.Tensor, words: torch.Tensor) -> None:
    numbers = _e4m3_numbers(codes) * 2.0**120 * scale
    words.copy_(_pair(_rounded(numbers[:, :, 0]), _rounded(numbers[:, :, 1])))


def _row_times_e4m3(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (_e4m3_numbers(codes) * x).sum(1) * 2.0**120 * scale


def _int8_to_words(
    codes: torch.Tensor, even: torch.Tensor, odd: torch.Tensor, scale: torch.Tensor, words: torch.Tensor
) -> None:
    # Of four bytes, one word of bfloat16 takes the first two, the next word the others.
    parts = (_rounded(((codes << left) >> 24).float() * scale) for left in (even, odd))
    words.copy_(_pair(*parts))


def _row_times_int8(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    # Four sums of 16 rows each, which inductor adds up in one loop: so memory is read from its beginning to its end, not
    # every fourth line of it four times.
    sums = []
    for rows in codes.split(16, 2):
        parts = (((rows << (24 - 8 * byte)) >> 24).float() * x[:, byte : byte + 1] for byte in range(4))
        sums.append(functools.reduce(torch.add, parts).sum(1))
    return torch.stack(sums, 1) * scale


def _int8_row_times_int8(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    own = wide.abs().amax().clamp_min(TINY) / 127
    return _row_times_int8((wide * own.reciprocal()).round(), codes, scale) * own


def _rows_to_int8(x: torch.Tensor, codes: torch.Tensor, steps: torch.Tensor) -> None:
    wide = x.float()
    own = wide.abs().amax(1, keepdim=True).clamp_min(TINY) / 127
    # Rounded by itself: a sum that rounds as well would be one operation with the product, and codes others than eager ones.
    codes.copy_(((wide * own.reciprocal()).round() + 128).to(torch.uint8))
    steps.copy_(own)


def _finished(sums: torch.Tensor, steps: torch.Tensor, bias: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_((sums * steps + bias).to(torch.bfloat16))


def _stored_int8(codes: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_((codes.float() * scale).to(torch.bfloat16))


def _stored_nibbles(codes: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, words: torch.Tensor) -> None:
    # One byte is one word: neither side has to be taken apart.
    parts = (part.float() * scale - shift for part in (codes.to(torch.int32) & 15, codes.to(torch.int32) >> 4))
    words.copy_(_pair(*(_rounded(part) for part in parts)))


def _stored_e4m3(codes: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
    # float32: with a bfloat16 result inductor takes 32 numbers at a time, and such an integer's bits as a float one by one.
    out.copy_(_e4m3_numbers(codes) * 2.0**120 * scale)


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


#: Of these examples alone: a model that samples draws the same numbers, whether a kernel is loaded on the way or not.
_GENERATOR = torch.Generator()


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


def _finished_example() -> tuple[torch.Tensor, ...]:
    rows, length = 6, 96
    sums, bias = _normal(rows, length), _uniform(length)
    return sums, _uniform(rows, 1), bias, torch.empty(rows, length, dtype=torch.bfloat16, device="cpu")


def _stored_example(codes: torch.Tensor, dtype: torch.dtype, numbers: int) -> tuple[torch.Tensor, ...]:
    rows = len(codes)
    return codes, *_uniform(numbers, rows, 1), torch.empty(codes.shape, dtype=dtype, device="cpu")


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
    "finished": Source(_finished, (3,), _finished_example, {0: _ROWS, 1: {0: "rows"}, 2: {0: "length"}, 3: _ROWS}),
    "stored-int8": Source(_stored_int8, (2,), _stored_int8_example, _STORED),
    "stored-int4": Source(
        _stored_nibbles, (3,), _stored_nibbles_example, {0: _ROWS, 1: {0: "rows"}, 2: {0: "rows"}, 3: _ROWS}
    ),
    "stored-e4m3": Source(_stored_e4m3, (2,), _stored_e4m3_example, _STORED),
}
