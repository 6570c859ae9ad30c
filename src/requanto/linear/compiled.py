"""Kernels made by torch's compiler (`requanto.linear.ahead`), for products that eager operators are slow at on a CPU.

Eager operators pass over the weight once each; compiled, it is read once and written once:

* int4, int3 and int2 in their packed form, some rows: blocks become bfloat16 in oneDNN's order, which then multiplies;
* e4m3, more than two rows: the same;
* e4m3, one or two rows of x: times x, nothing is written.

How they are written follows what inductor does with it (measured): uint8 -> int32 -> float32 vectorizes, 16-bit integers do
not; its own float32 -> bfloat16 takes seven times as long as the rest, so halves of 32-bit words are put together by integer
arithmetic; and a result that is not contiguous, or is a part of another, is computed twice or copied.
"""

from __future__ import annotations

import functools

import torch

from requanto.linear import ahead
from requanto.linear.ahead import Source

#: Families, whose kernels are made, or fail, together.
NIBBLES, FLOAT8 = "int4", "float8"
#: Rows of a block that a byte's lower nibble stands for.
_HALF = 32


def _pair(even: torch.Tensor, odd: torch.Tensor) -> torch.Tensor:
    """The upper halves of two float32's bits as one word, the even one's below."""
    return ((even >> 16) & 0xFFFF) | (odd & -(2**16))


def _rounded(numbers: torch.Tensor) -> torch.Tensor:
    """Bits of float32 whose upper half is the nearest bfloat16; a tie goes away from zero."""
    return numbers.view(torch.int32) + 0x8000


def _nibbles_to_words(
    codes: torch.Tensor, mask: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, words: torch.Tensor
) -> None:
    bytes_ = codes.to(torch.int32).unsqueeze(3)  # [groups of all blocks, pairs, 2, 1, half]
    even, odd = (_rounded((bytes_[:, :, k] & mask).float() * scale + zero) for k in (0, 1))
    # Reshaped, values are in the result's order from the start: else inductor keeps the codes' order, and copies again.
    words.copy_(_pair(even, odd).reshape(words.shape))


def _words_to_scales(words: torch.Tensor, side: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> None:
    words = words.transpose(0, 1)
    own = (words << 16).view(torch.float32)
    scale.copy_(own * side)
    zero.copy_((words & -(2**16)).view(torch.float32) - 8 * own)


def _e4m3_numbers(codes: torch.Tensor) -> torch.Tensor:
    """uint8 -> float32, the number / 2^120: sign in bit 31, exponent and mantissa as the first bits of float32's."""
    return (((codes.to(torch.int32) << 24) >> 4) & -0x78100000).view(torch.float32)


def _e4m3_to_words(codes: torch.Tensor, scale: torch.Tensor, words: torch.Tensor) -> None:
    numbers = _e4m3_numbers(codes) * scale
    words.copy_(_pair(_rounded(numbers[:, :, 0]), _rounded(numbers[:, :, 1])))


def _row_times_e4m3(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (_e4m3_numbers(codes) * x).sum(1) * 2.0**120 * scale


@functools.cache
def _nibble_masks() -> torch.Tensor:
    with ahead.plain_mode():
        return torch.tensor([[15], [240]], dtype=torch.int32, device="cpu")


@functools.cache
def _nibble_units() -> torch.Tensor:
    with ahead.plain_mode():
        return torch.tensor([[1.0], [1 / 16]], device="cpu")


def _nibbles_example() -> tuple[torch.Tensor, ...]:
    count, pairs = 6, 4
    return (
        torch.randint(0, 256, (count, pairs, 2, _HALF), dtype=torch.uint8, device="cpu"),
        _nibble_masks(),
        torch.rand(count, 1, 2, _HALF, device="cpu"),
        torch.randn(count, 1, 2, _HALF, device="cpu"),
        torch.empty(count, pairs, 2 * _HALF, dtype=torch.int32, device="cpu"),
    )


def _scales_example() -> tuple[torch.Tensor, ...]:
    groups, blocks = 6, 4
    pairs = torch.randn(groups, blocks * 2 * _HALF, 2, device="cpu").bfloat16()
    scale, zero = (torch.empty(blocks, groups, 2, _HALF, device="cpu") for _ in range(2))
    return pairs.view(torch.int32).view(groups, blocks, 2, _HALF), _nibble_units(), scale, zero


def _e4m3_example() -> tuple[torch.Tensor, ...]:
    blocks, pairs = 4, 6
    return (
        torch.randint(0, 127, (blocks, pairs, 2, 2 * _HALF), dtype=torch.uint8, device="cpu"),
        torch.rand(blocks, 1, 1, 2 * _HALF, device="cpu").mul_(2.0**120),
        torch.empty(blocks, pairs, 2 * _HALF, dtype=torch.int32, device="cpu"),
    )


def _row_example() -> tuple[torch.Tensor, ...]:
    codes = torch.randint(0, 127, (4, 6, 2 * _HALF), dtype=torch.uint8, device="cpu")
    return torch.rand(6, 1, device="cpu"), codes, torch.rand(4, 2 * _HALF, device="cpu")


_GROUPS, _PAIRS = {0: "groups"}, {0: "groups", 1: "pairs"}
_BLOCKS = {0: "blocks", 1: "groups"}
SOURCES = {
    "nibbles": Source(_nibbles_to_words, (4,), _nibbles_example, {0: _PAIRS, 2: _GROUPS, 3: _GROUPS, 4: _PAIRS}),
    "scales": Source(
        _words_to_scales, (2, 3), _scales_example, {0: {0: "groups", 1: "blocks"}, 2: _BLOCKS, 3: _BLOCKS}, 2**-22
    ),
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
}


def _kernel(name: str) -> ahead.Kernel:
    return ahead.kernel(name, SOURCES[name])


def ready_for_nibbles() -> bool:
    """Makes or loads the kernels of int4, int3 and int2. False: they cannot be had (`requanto.linear.ahead.ready`)."""
    return ahead.ready(NIBBLES, {name: SOURCES[name] for name in ("nibbles", "scales")})


def ready_for_float8() -> bool:
    """Makes or loads the kernels of e4m3. False: they cannot be had (`requanto.linear.ahead.ready`)."""
    return ahead.ready(FLOAT8, {name: SOURCES[name] for name in ("e4m3", "row")})


def nibble_scales(scales: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> None:
    """The scales that `nibble_words` takes.

    Args:
        scales: bfloat16 ``[groups, N, 2]``, contiguous: scale and zero point of ``(code - 8) * scale + zero``.
        scale, zero: float32 ``[N / 64, groups, 2, 32]``, written.
    """
    blocks, groups, _, half = scale.shape
    words = scales.view(torch.int32).view(groups, blocks, 2, half)
    _kernel("scales")(words, _nibble_units(), scale, zero)


def nibble_words(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, words: torch.Tensor) -> None:
    """``nibble * scale + zero`` of packed blocks, as bfloat16 in oneDNN's order.

    Args:
        codes: uint8 ``[blocks, K, 32]``, row r and row r + 32 of a block in one byte.
        scale, zero: float32 ``[blocks, groups, 2, 32]``: of the lower nibbles, and of 16 times the upper ones.
        words: int32 ``[blocks, K / 2, 64]``, written.
    """
    groups, half = scale.shape[1], scale.shape[3]
    group = codes.shape[1] // groups
    _kernel("nibbles")(
        codes.view(-1, group // 2, 2, half),
        _nibble_masks(),
        scale.view(-1, 1, 2, half),
        zero.view(-1, 1, 2, half),
        words.view(-1, group // 2, 2 * half),
    )


def e4m3_words(codes: torch.Tensor, scale: torch.Tensor, words: torch.Tensor) -> None:
    """e4m3 as bfloat16 in oneDNN's order.

    Args:
        codes: bytes ``[blocks, K, 64]``.
        scale: float32 ``[blocks * 64]``, times 2^120.
        words: int32 ``[blocks, K / 2, 64]``, written.
    """
    blocks, _, rows = codes.shape
    _kernel("e4m3")(codes.view(blocks, -1, 2, rows), scale.view(blocks, 1, 1, rows), words)


def e4m3_row(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """One row of x, float32 ``[K]``, times e4m3 ``[blocks, K, 64]``, scaled (float32 ``[blocks * 64]``): float32."""
    out = _kernel("row")(x.contiguous().view(-1, 1), codes, scale.view(len(codes), -1))
    if out is None:
        raise RuntimeError("the kernel 'row' returned nothing, expected one tensor")
    return out.view(-1)
