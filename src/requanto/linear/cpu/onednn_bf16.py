"""Scratch buffers for bfloat16 weights in oneDNN's blocked layout, which dequantization writes directly.

oneDNN multiplies bfloat16 in pairs along K and first reorders every plain weight: a quarter of the time of a GEMM with 16
rows. A weight that is written in this layout needs no reorder, and oneDNN's threads read what the same thread wrote.

The layout is internal to oneDNN and may depend on CPU and version. So each buffer is made by oneDNN from a weight of random
values, and is used only if its memory has the expected layout: blocks of 64 rows, ``[K / 2, 64, 2]`` in each.

N and K are padded to multiples of 64. oneDNN pads N itself and drops the padding from the result; packed layouts pad K with
zeros, and `with_padded_columns` pads x to match.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Callable

import torch

from requanto.linear.registry import Gemm
from requanto.runtime.buffers import cached_object, scratch_buffer
from requanto.runtime.settings import settings
from requanto.runtime.tracing import without_ambient_state
from requanto.tensor.qtensor import QTensor

logger = logging.getLogger(__name__)

#: Rows of one block.
ROWS = 64
#: Bytes of the bfloat16 weight that are dequantized and multiplied at a time, and the numbers of rows of x for which half
#: of it is used.
BLOCK_BYTES = 8 * 2**20
HALF_BLOCK_ROWS = range(64, 512)
#: Largest result (number of elements) whose parts are concatenated at the end.
MAX_CAT_NUMEL = 2**21
#: Most padding, relative to the weight's number of elements.
MAX_PADDING = 1 / 8

#: ``fill(buffer, weight)`` dequantizes some blocks of a weight into a buffer.
Fill = Callable[["BlockedWeight", QTensor], None]


def padded(count: int) -> int:
    """``count`` rounded up to a multiple of 64."""
    return -(-count // ROWS) * ROWS


class BlockedWeight:
    """A bfloat16 weight ``[rows, K]`` in oneDNN's layout, K a multiple of 64, which is written through `words`.

    Attributes:
        words: int32 ``[ceil(rows / 64), K / 2, 64]``: the bfloat16 of an even k in the lower half, of k + 1 in the upper.
            Padding rows in the last block are not used.
        nbytes: size of the buffer.

    Raises:
        RuntimeError: oneDNN has another layout, or this build of torch does not have the operators.
    """

    def __init__(self, rows: int, length: int) -> None:
        # Random values, so that a wrong order of rows or columns is detected.
        probe = torch.randint(
            -(2**15), 2**15, (rows, length), dtype=torch.int16, generator=torch.Generator(), device="cpu"
        )
        probe = probe.bitwise_and_(-0x4001).bitwise_or_(0x2000).view(torch.bfloat16)  # neither infinite nor denormal
        try:
            self._multiply = torch.ops.mkldnn._linear_pointwise.default
            self._weight = torch.ops.mkldnn._reorder_linear_weight(probe, None)
            self.nbytes = int(torch.ops.mkldnn._nbytes(self._weight))
            address = torch.ops.mkldnn.data_ptr(self._weight)
        except (AttributeError, NotImplementedError) as error:
            raise RuntimeError(str(error).splitlines()[0]) from error
        whole = padded(rows)
        if self.nbytes != 2 * whole * length:
            raise RuntimeError(f"oneDNN stores {(rows, length)} in {self.nbytes} bytes, expected {2 * whole * length}")
        memory = (ctypes.c_char * self.nbytes).from_address(address)
        memory.owner = self._weight  # views of the words keep oneDNN's tensor alive
        self.words = torch.frombuffer(memory, dtype=torch.int32).view(whole // ROWS, length // 2, ROWS)
        self._views: dict[tuple[int, ...], torch.Tensor] = {}
        filled = probe if whole == rows else torch.cat([probe, probe.new_zeros(whole - rows, length)])
        expected = filled.view(whole // ROWS, ROWS, length // 2, 2).transpose(1, 2).contiguous()
        if not torch.equal(self.words, expected.view(torch.int32).squeeze(-1)):
            raise RuntimeError("oneDNN's layout of a bfloat16 weight is not blocks of 64 rows with pairs along K")

    def view(self, shape: tuple[int, ...]) -> torch.Tensor:
        """`words` in another shape; views are cached."""
        found = self._views.get(shape)
        if found is None:
            found = self._views[shape] = self.words.view(shape)
        return found

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        """Computes ``x @ w.T`` in bfloat16. x: bfloat16 ``[..., K]``."""
        return self._multiply(x, self._weight, None, "none", [], "")


@functools.cache
def works() -> bool:
    """True if oneDNN's layout is the known one, checked with small weights: with AVX-512 or AMX in torch 2.11 to 2.13."""
    try:
        with without_ambient_state():
            # Whole blocks, and several sizes of a padded last block.
            if all(_multiplies(count) for count in (2 * ROWS, ROWS + 1, ROWS + 40, 2 * ROWS - 1)):
                return True
        why = "its result is not the expected one"
    except RuntimeError as error:
        why = str(error).splitlines()[0]
    logger.info("bfloat16 weights are not written in oneDNN's layout on this machine: %s", why)
    return False


def _multiplies(count: int) -> bool:
    """True if the GEMM with a weight of ``count`` rows, written in oneDNN's layout, is correct."""
    weight = _made(count, 2 * ROWS)
    rows = torch.arange(2 * ROWS, device="cpu").remainder(7).sub(3).view(-1, 1).float().expand(-1, 2 * ROWS)
    pairs = rows.bfloat16().view(2, ROWS, ROWS, 2).transpose(1, 2).contiguous()
    weight.words.copy_(pairs.view(torch.int32).squeeze(-1))
    x = torch.arange(10 * ROWS, device="cpu").remainder(5).view(5, -1).bfloat16()
    return torch.equal(weight.matmul(x).float(), (x.float() @ rows[:count].t()).bfloat16().float())


def _made(rows: int, length: int) -> BlockedWeight:
    with without_ambient_state():
        return BlockedWeight(rows, length)


def fits(rows: int, length: int) -> bool:
    """True if a weight needs little padding and oneDNN's layout is the known one."""
    numel = rows * length
    return rows >= ROWS and padded(rows) * padded(length) - numel <= MAX_PADDING * numel and works()


def rows_at_once(rows: int, length: int, x_rows: int = 1) -> int:
    """Rows of the buffer for a weight ``[rows, length]`` and ``x_rows`` rows of x.

    The same for all large weights of one K, so that a model's layers share a few buffers. It is smaller only if the last
    part, which overlaps the one before, would repeat more than an eighth of the work.
    """
    blocks = padded(rows) // ROWS
    wanted = BLOCK_BYTES // 2 if x_rows in HALF_BLOCK_ROWS else BLOCK_BYTES
    most = max(1, min(wanted, settings.workspace_bytes // 8) // (2 * ROWS * length))
    parts = -(-blocks // most)
    if parts > 1 and 8 * (parts * most - blocks) <= blocks:
        return most * ROWS
    return -(-blocks // parts) * ROWS


def first_rows(rows: int, step: int) -> list[int]:
    """First row of each part of a weight; the last part ends with the weight and may overlap the one before."""
    return [min(start, rows - step) for start in range(0, rows, step)]


def blocked(rows: int, length: int) -> BlockedWeight:
    """This thread's cached buffer of that shape; least recently used ones are released for it."""
    return cached_object(("blocked", rows, length), 2 * rows * length, lambda: _made(rows, length))


def with_padded_columns(gemm: Gemm, columns: int, length: int) -> Gemm:
    """Wraps a GEMM for x with ``length`` columns, so that it takes x with ``columns`` columns and pads it with zeros."""
    if columns == length:
        return gemm

    def gemm_with_padding(x: torch.Tensor, weight: QTensor, bias: torch.Tensor | None) -> torch.Tensor:
        shape = (*x.shape[:-1], length)
        if x.numel() // columns * length * x.dtype.itemsize <= settings.workspace_bytes // 4:
            wide = scratch_buffer(shape, x.dtype, slot=10)
            wide[..., :columns] = x
            wide[..., columns:] = 0
        else:
            wide = torch.nn.functional.pad(x, (0, length - columns))
        return gemm(wide, weight, bias)

    return gemm_with_padding


def matmul_transposed(
    x: torch.Tensor, weight: QTensor, rows: int, length: int, fill: Callable[[slice], Fill]
) -> torch.Tensor:
    """Computes ``x @ w``, ``[M, length]``, in bfloat16: the GEMM of the backward.

    Args:
        x: bfloat16 ``[M, rows]``.
        rows, length, fill: of the weight ``[rows, length]``, as in `make_plan`.
    """
    step, total = rows_at_once(rows, length), padded(rows)
    out = None
    for start in range(0, total, step):
        count = min(step, total - start)
        buffer = blocked(count, length)
        fill(slice(start // ROWS, (start + count) // ROWS))(buffer, weight)
        # Rows of pairs: one 32-bit word moves two weights.
        pairs = scratch_buffer((count // ROWS, ROWS, length // 2), torch.int32, slot=11)
        pairs.copy_(buffer.words.transpose(1, 2))
        part = x[:, start : start + count]
        part = (part @ pairs.view(count, length // 2).view(torch.bfloat16)[: part.shape[1]]).float()
        out = part if out is None else out.add_(part)  # accumulated in float32, rounded once
    return x.new_zeros(len(x), length) if out is None else out.to(x.dtype)


def make_plan(rows: int, length: int, x_rows: int, fill: Callable[[slice], Fill]) -> Gemm:
    """Plan of ``x @ w.T + bias`` in bfloat16 with a weight ``[rows, length]`` that is dequantized part by part.

    Args:
        length: padded K, a multiple of 64.
        x_rows: rows of x.
        fill: ``fill(blocks)`` returns the function that dequantizes this slice of the weight's blocks.
    """
    step, total = rows_at_once(rows, length, x_rows), padded(rows)
    first = first_rows(total, step)
    fills = [fill(slice(start // ROWS, (start + step) // ROWS)) for start in first]
    if step == total:
        (whole,) = fills

        def gemm(x: torch.Tensor, weight: QTensor, bias: torch.Tensor | None) -> torch.Tensor:
            buffer = blocked(rows, length)
            whole(buffer, weight)
            out = buffer.matmul(x)
            return out if bias is None else out.add_(bias)

        return gemm
    # One torch.cat is faster than a copy per part, but needs memory for the result twice.
    joined = x_rows * rows <= MAX_CAT_NUMEL
    new = [max(0, before + step - start) for before, start in zip([-step, *first], first)]

    def gemm_by_parts(x: torch.Tensor, weight: QTensor, bias: torch.Tensor | None) -> torch.Tensor:
        x = x.contiguous()
        buffer = blocked(step, length)
        parts: list[torch.Tensor] = []
        out = None if joined else x.new_empty(*x.shape[:-1], rows)
        for fill_part, start, repeated in zip(fills, first, new):
            fill_part(buffer, weight)
            part = buffer.matmul(x)
            if out is None:
                parts.append(part[..., repeated : rows - start])
            else:
                out[..., start : start + step] = part[..., : rows - start]
        out = torch.cat(parts, -1) if out is None else out
        return out if bias is None else out.add_(bias)

    return gemm_by_parts
