"""Kernels that torch.compile makes, on request: ``requanto.settings.compiled = True`` or ``REQUANTO_COMPILE=1``.

Eager operators pass over the weight once each. Compiled, it is read once and written once, in half to a third of the time:

* e4m3, one or two rows of x: times x, nothing is written;
* e4m3, more rows: blocks of rows become bfloat16 in this thread's buffer, then F.linear;
* int4 and int2 in their packed form, many rows: the same (`requanto.linear.int4` multiplies).

The price: a C++ compiler, 15 to 30 s for the first kernel on a machine and 2 to 5 s for each further one (torch keeps them
in its cache; later processes take a few seconds in all, most of it to import the compiler). Hence never unasked. Sizes are
dynamic: one kernel serves every layer of a type.

How they are written follows what inductor vectorizes (measured): uint8 -> float32 and 32-bit integers; not 16-bit
integers, and not 32-bit integers beside 16-bit floats. So nibbles are split by float arithmetic, and e4m3 is read as int32,
four codes a word.
"""

from __future__ import annotations

import functools
import threading
import types
from collections.abc import Callable

import torch
import torch.nn.functional as F

from requanto.qtensor import QTensor
from requanto.qtypes import qtype
from requanto.workspace import rows_that_fit, workspace

#: Rows of x that are multiplied with e4m3 codes one by one; beyond, dequantization is shared by enough rows.
ROWS = 2
#: Rows of x from which dequantized int4 blocks beat torch's int4 operator.
INT4_ROWS = 32
#: Bytes of float weight that are made and multiplied at a time.
BLOCK_BYTES = 4 * 2**20
_LOCK = threading.Lock()
_made: set[tuple[object, ...]] = set()


def _compile(function: Callable[..., object], name: str, dynamic: bool | None = True) -> Callable[..., object]:
    """``function``, compiled under a code object of its own: torch counts recompilations by it, and gives up after 8."""
    code = function.__code__.replace(co_name=name)
    own = types.FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)
    return torch.compile(own, dynamic=dynamic, fullgraph=True)


def _call(key: tuple[object, ...], kernel: Callable[..., object], *arguments: object) -> object:
    """One thread compiles, the others wait; then all run at once."""
    if key in _made:
        return kernel(*arguments)
    with _LOCK:
        out = kernel(*arguments)
        _made.add(key)
    return out


def _row_times_e4m3(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    bits = codes.to(torch.int32)
    # sign to bit 31, exponent and mantissa in front of float32's: the number / 2^120
    values = (((bits & 0x80) << 24) | ((bits & 0x7F) << 20)).view(torch.float32)
    return (values * x).sum(1) * (scale * 2.0**120)


def _e4m3_to_bfloat16(words: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> None:
    """int32 ``[rows, K / 4]`` of four codes -> two bfloat16 in each int32 of both outputs: codes 0 and 1, codes 2 and 3."""

    def number(magnitude: torch.Tensor, sign: torch.Tensor) -> torch.Tensor:
        # Exact in bfloat16: the lower half of the float32 is zero.
        return (((magnitude & 0x07F00000) | (sign & -(2**31))).view(torch.float32) * 2.0**120).view(torch.int32)

    def pair(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        return ((low >> 16) & 0xFFFF) | high

    first.copy_(pair(number(words << 20, words << 24), number(words << 12, words << 16)))
    second.copy_(pair(number(words << 4, words << 8), number(words >> 4, words)))


@functools.cache
def _kernel(name: str) -> Callable[..., object]:
    return _compile({"row": _row_times_e4m3, "e4m3": _e4m3_to_bfloat16}[name], f"requanto_{name}")


def _nibbles_to_float(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, low: torch.Tensor, high: torch.Tensor
) -> None:
    """uint8 ``[groups, group, blocks, half]`` and scales ``[groups, 1, blocks, 2, half]`` -> both nibbles' numbers."""
    both = codes.float()
    upper = torch.floor(both * (1 / 16))
    for side, (nibbles, out) in enumerate(((both - 16 * upper, low), (upper, high))):
        values = (nibbles - 8) * scale[..., side, :]
        values = values if zero is None else values + zero[..., side, :]
        # Reshaped, values are in the result's order from the start: else inductor keeps the codes' order, and copies again.
        out.copy_(values.to(out.dtype).reshape(out.shape))


@functools.cache
def _nibbles(*key: object) -> Callable[..., object]:
    # Sizes that inductor must know to vectorize are static, and get a kernel each: the group's and half a block.
    return _compile(_nibbles_to_float, "requanto_nibbles_" + "_".join(map(str, key)), dynamic=None)


def int4_planes(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """``(nibble - 8) * scale + zero`` of packed blocks, in this thread's buffer.

    Args:
        codes: uint8 ``[blocks, K, half]``, row r and row r + half of a block in one byte.
        scale, zero: float32 ``[groups, blocks * 2 * half]``.

    Returns:
        ``[2, K, blocks * half]``: the lower nibbles of all blocks, then the upper ones.
    """
    count, length, half = codes.shape
    groups = len(scale)
    planes = workspace((2, length, count * half), dtype)
    key = (length // groups, half, zero is not None, dtype)
    from torch._dynamo import maybe_mark_dynamic  # not at import: it takes a second or two

    with torch.inference_mode(False), torch.no_grad():
        codes = codes.view(count, groups, -1, half).permute(1, 2, 0, 3)
        scale = scale.reshape(groups, 1, count, 2, half)
        zero = None if zero is None else zero.reshape(scale.shape)
        low, high = planes.view(2, groups, -1, count * half)
        for tensor in (codes, scale, low, high) if zero is None else (codes, scale, zero, low, high):
            maybe_mark_dynamic(tensor, (0, 2))
        _call((*key, count == 1), _nibbles(*key), codes, scale, zero, low, high)
    return planes


def run(
    x: torch.Tensor,
    weight: QTensor,
    bias: torch.Tensor | None,
    activation: qtype | None = None,
    input_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """e4m3 weights with a scale a row: few rows of x one by one, more with blocks of the weight."""
    codes, scale = weight.qdata.view(torch.uint8), weight.scale.reshape(-1).float()
    with torch.inference_mode(False), torch.no_grad():
        if x.shape[0] <= ROWS:
            rows = x.detach().float().clone()
            out = torch.stack([_call(("row",), _kernel("row"), row, codes, scale) for row in rows])
        else:
            out = _blocks(x.detach().clone(), codes).float().mul_(scale)
    if bias is not None:
        out.add_(bias)
    return out.to(x.dtype)


def _blocks(x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """``x @ codes.T`` in bfloat16, K in the order in which the codes come out of their words."""
    rows, length = codes.shape
    x = x.to(torch.bfloat16).view(-1, length // 4, 2, 2).transpose(1, 2).reshape(-1, length)
    # Words begin at multiples of four bytes; a slice of a larger tensor may not.
    words = (codes.clone() if codes.storage_offset() % 4 else codes).view(torch.int32)
    out = x.new_empty(x.shape[0], rows)
    step = rows_that_fit(2 * length, max(64, BLOCK_BYTES // (2 * length)))
    for start in range(0, rows, step):
        part = words[start : start + step]
        block = workspace((len(part), 2, length // 4), torch.int32)
        _call(("e4m3",), _kernel("e4m3"), part, block[:, 0], block[:, 1])
        out[:, start : start + step] = F.linear(x, block.view(torch.bfloat16).view(len(part), length))
    return out
