"""Kernels that torch.compile makes, on request: ``requanto.settings.compiled = True`` or ``REQUANTO_COMPILE=1``.

Eager operators pass over the weight once each; compiled, it is read once and written once:

* int4 and int2 in their packed form, some rows: blocks become bfloat16 in oneDNN's order, which then multiplies;
* e4m3, more than two rows: the same;
* e4m3, one or two rows of x: times x, nothing is written.

The price: a C++ compiler, 15 to 30 s for the first kernel on a machine and 2 to 5 s for each further one (torch keeps them
in its cache; later processes take a few seconds in all, most of it to import the compiler). Hence never unasked. Sizes are
dynamic: one kernel serves every layer of a type.

How they are written follows what inductor does with it (measured): uint8 -> int32 -> float32 vectorizes, 16-bit integers do
not; its own float32 -> bfloat16 takes seven times as long as the rest, so halves of 32-bit words are put together by integer
arithmetic; and a result that is not contiguous, or is a part of another, is computed twice or copied.
"""

from __future__ import annotations

import functools
import threading
import types
from collections.abc import Callable
from typing import Any

import torch

#: What kernels run in: made under inference mode's rules, they would serve that mode alone.
_PLAIN = functools.partial(torch.inference_mode, False)
_LOCK = threading.Lock()
_made: set[tuple[object, ...]] = set()


def _compile(function: Callable[..., object], name: str) -> Callable[..., object]:
    """``function``, compiled under a code object of its own: torch counts recompilations by it, and gives up after 8."""
    code = function.__code__.replace(co_name=name)
    own = types.FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)
    return torch.compile(own, fullgraph=True, options=_options())


def _options() -> dict[str, int]:
    """The width of this process's vectors, by which torch's cache of kernels is then keyed.

    It is not by itself: under another ATEN_CPU_CAPABILITY, or with a cache from another machine, code for longer vectors is
    built for shorter ones, and writes half of the numbers.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    width = 512 if capability.startswith("AVX512") else 256 if capability == "AVX2" else None
    return {} if width is None else {"cpp.simdlen": width}


def _call(
    key: tuple[object, ...], kernel: Callable[..., object], dynamic: dict[int, tuple[int, ...]], *arguments: object
) -> object:
    """One thread compiles, the others wait; then all run at once. The first result of a kernel is checked.

    Args:
        key: the kernel's name first.
        dynamic: the axes whose sizes may change, by position of the argument.

    Raises:
        RuntimeError: the kernel computes something else than the function it was made from.
    """
    if key in _made:
        return kernel(*arguments)
    from torch._dynamo import maybe_mark_dynamic  # not at import: it takes a second or two

    with _LOCK:
        for position, axes in dynamic.items():
            maybe_mark_dynamic(arguments[position], axes)
        out = kernel(*arguments)
        _check(str(key[0]), out, arguments)
        _made.add(key)
    return out


def _check(name: str, out: object, arguments: tuple[Any, ...]) -> None:
    function, written = _FUNCTIONS[name]
    found = [arguments[place] for place in written] or [out]
    fresh = {place: torch.empty_like(arguments[place]) for place in written}
    returned = function(*(fresh.get(place, argument) for place, argument in enumerate(arguments)))
    for got, want in zip(found, list(fresh.values()) or [returned], strict=True):
        got, want = (
            (t.view(torch.bfloat16) if t.dtype == torch.int32 else t).float().nan_to_num() for t in (got, want)
        )
        # A multiplication that is rounded together with the addition after it may move the last place of a bfloat16.
        if not bool(((got - want).abs() <= 2**-6 * want.abs() + 1e-4 * want.abs().max()).all()):
            raise RuntimeError(
                f"the kernel {name!r} that torch.compile made computes something else than its source. Perhaps torch's "
                "cache of kernels comes from another processor: delete it (TORCHINDUCTOR_CACHE_DIR), or do without these "
                "kernels (requanto.settings.compiled = False, REQUANTO_COMPILE=0). Nothing was returned."
            )


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


def _words_to_scales(
    words: torch.Tensor, side: torch.Tensor, affine: int, scale: torch.Tensor, zero: torch.Tensor
) -> None:
    own = (words << 16).view(torch.float32)
    shift = (words & -(2**16)).view(torch.float32)
    scale.copy_(own * side)
    zero.copy_(shift - 8 * own if affine else -8 * own)


def _e4m3_numbers(codes: torch.Tensor) -> torch.Tensor:
    """uint8 -> float32, the number / 2^120: sign in bit 31, exponent and mantissa as the first bits of float32's."""
    return (((codes.to(torch.int32) << 24) >> 4) & -0x78100000).view(torch.float32)


def _e4m3_to_words(codes: torch.Tensor, scale: torch.Tensor, words: torch.Tensor) -> None:
    numbers = _e4m3_numbers(codes) * scale
    words.copy_(_pair(_rounded(numbers[:, :, 0]), _rounded(numbers[:, :, 1])))


def _row_times_e4m3(x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    return (_e4m3_numbers(codes) * x).sum(1)


#: By name, and which arguments are written; none: the result is returned.
_FUNCTIONS: dict[str, tuple[Callable[..., object], tuple[int, ...]]] = {
    "nibbles": (_nibbles_to_words, (4,)),
    "scales": (_words_to_scales, (3, 4)),
    "e4m3": (_e4m3_to_words, (2,)),
    "row": (_row_times_e4m3, ()),
}


@functools.cache
def _kernel(name: str, *key: object) -> Callable[..., object]:
    # Sizes that inductor must know to vectorize are static, and get a kernel each.
    return _compile(_FUNCTIONS[name][0], "_".join(("requanto", name, *map(str, key))))


@functools.cache
def _nibble_masks() -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.tensor([[15], [240]], dtype=torch.int32)


@functools.cache
def _nibble_units() -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.tensor([[1.0], [1 / 16]])


def nibble_scales(scales: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, *, affine: bool) -> None:
    """The scales that `nibble_words` takes.

    Args:
        scales: bfloat16 ``[groups, N, 2]``, scale and zero point of ``(code - 8) * scale + zero``.
        scale, zero: float32 ``[N / 64, groups, 2, 32]``, written.
    """
    groups = scales.shape[0]
    blocks, _, _, half = scale.shape
    key = ("scales", affine, blocks == 1, groups == 1)
    with _PLAIN():
        words = scales.view(torch.int32).view(groups, blocks, 2, half).transpose(0, 1)
        axes = (0, 1)
        _call(key, _kernel(*key), {0: axes, 3: axes, 4: axes}, words, _nibble_units(), affine, scale, zero)


def nibble_words(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, words: torch.Tensor) -> None:
    """``nibble * scale + zero`` of packed blocks, as bfloat16 in oneDNN's order.

    Args:
        codes: uint8 ``[blocks, K, 32]``, row r and row r + 32 of a block in one byte.
        scale, zero: float32 ``[blocks, groups, 2, 32]``: of the lower nibbles, and of 16 times the upper ones.
        words: int32 ``[blocks, K / 2, 64]``, written.
    """
    blocks, groups, _, half = scale.shape
    group = codes.shape[1] // groups
    key = ("nibbles", group, blocks * groups == 1)
    with _PLAIN():
        _call(
            key,
            _kernel(*key),
            {0: (0,), 2: (0,), 3: (0,), 4: (0,)},
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
    key = ("e4m3", blocks == 1)
    with _PLAIN():
        arguments = codes.view(blocks, -1, 2, rows), scale.view(blocks, 1, 1, rows), words
        _call(key, _kernel(*key), {0: (0, 1), 1: (0,), 2: (0, 1)}, *arguments)


def e4m3_row(x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """One row of x, float32 ``[K]``, times e4m3 ``[blocks, K, 64]`` / 2^120: float32 ``[blocks * 64]``."""
    key = ("row", len(codes) == 1)
    with _PLAIN(), torch.no_grad():
        out = _call(key, _kernel(*key), {0: (0,), 1: (0, 1)}, x.detach().clone().view(-1, 1), codes)
    return out.view(-1)
