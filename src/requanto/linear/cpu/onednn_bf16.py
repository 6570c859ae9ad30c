"""A bfloat16 weight in oneDNN's own order, in a buffer of this thread that dequantization writes into.

oneDNN multiplies bfloat16 in pairs along K, and copies every plain weight into that order first: a quarter of a product of
16 rows. A weight that is written in the order from the start is spared the copy, and each of oneDNN's threads reads what the
same thread wrote.

The order is oneDNN's business and may differ by processor and version. So each buffer is made by oneDNN itself, from known
numbers, and is used only if its memory then reads as expected: blocks of 64 rows, in each ``[K / 2, 64, 2]``.

Sizes that are no multiples of 64 are filled up. Rows by oneDNN, whose product leaves them out again; columns by zeros in the
packed forms, beside which `widened` puts zeros of x.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Callable

import torch

from requanto.linear.registry import Gemm
from requanto.runtime.buffers import keep, workspace
from requanto.runtime.settings import settings
from requanto.runtime.tracing import neutral
from requanto.tensor.qtensor import QTensor

logger = logging.getLogger(__name__)

#: Rows of one block.
ROWS = 64
#: Bytes of bfloat16 that are made and multiplied at a time; half of it with so many rows of x, which read them anew.
BLOCK_BYTES = 8 * 2**20
HALVED = range(64, 512)
#: Numbers of a result up to which its parts are put together at the end.
JOINED = 2**21
#: Weights are not filled up by more than this part of their numbers.
FILLING = 1 / 8

#: ``fill(buffer, weight)`` writes blocks of a weight into a buffer.
Fill = Callable[["BlockedWeight", QTensor], None]


def padded(count: int) -> int:
    """Rows or columns of whole blocks that hold so many."""
    return -(-count // ROWS) * ROWS


class BlockedWeight:
    """``[rows, K]`` in bfloat16, K a multiple of 64, to be written through `words`.

    Attributes:
        words: int32 ``[ceil(rows / 64), K / 2, 64]``: the lower half holds the bfloat16 of an even k, the upper one that of
            k + 1. What stands in the last block beyond the rows is not used.
        nbytes: of the buffer.

    Raises:
        RuntimeError: oneDNN's order is another one, or this build of torch has no such operators.
    """

    def __init__(self, rows: int, length: int) -> None:
        # No two rows, and no two columns of a row, begin alike.
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
        memory.owner = self._weight  # whoever holds a view of these words holds what they lie in
        self.words = torch.frombuffer(memory, dtype=torch.int32).view(whole // ROWS, length // 2, ROWS)
        self._views: dict[tuple[int, ...], torch.Tensor] = {}
        filled = probe if whole == rows else torch.cat([probe, probe.new_zeros(whole - rows, length)])
        expected = filled.view(whole // ROWS, ROWS, length // 2, 2).transpose(1, 2).contiguous()
        if not torch.equal(self.words, expected.view(torch.int32).squeeze(-1)):
            raise RuntimeError("oneDNN's order of a bfloat16 weight is not in blocks of 64 rows and pairs along K")

    def view(self, shape: tuple[int, ...]) -> torch.Tensor:
        """`words` in that shape."""
        found = self._views.get(shape)
        if found is None:
            found = self._views[shape] = self.words.view(shape)
        return found

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """``x @ w.T`` in bfloat16. x: bfloat16 ``[..., K]``."""
        return self._multiply(x, self._weight, None, "none", [], "")


@functools.cache
def works() -> bool:
    """True where oneDNN's order is the known one: with AVX-512 or AMX, as of torch 2.11 to 2.13."""
    try:
        with neutral():
            # Whole blocks, and a last one that is filled up: each number of its rows in turn is left over.
            if all(_multiplies(count) for count in (2 * ROWS, ROWS + 1, ROWS + 40, 2 * ROWS - 1)):
                return True
        why = "its product is not the expected one"
    except RuntimeError as error:
        why = str(error).splitlines()[0]
    logger.info("bfloat16 weights are not written in oneDNN's order on this machine: %s", why)
    return False


def _multiplies(count: int) -> bool:
    """True where the product of a weight of so many rows, written in oneDNN's order, is right."""
    weight = _made(count, 2 * ROWS)
    rows = torch.arange(2 * ROWS, device="cpu").remainder(7).sub(3).view(-1, 1).float().expand(-1, 2 * ROWS)
    pairs = rows.bfloat16().view(2, ROWS, ROWS, 2).transpose(1, 2).contiguous()
    weight.words.copy_(pairs.view(torch.int32).squeeze(-1))
    x = torch.arange(10 * ROWS, device="cpu").remainder(5).view(5, -1).bfloat16()
    return torch.equal(weight.product(x).float(), (x.float() @ rows[:count].t()).bfloat16().float())


def _made(rows: int, length: int) -> BlockedWeight:
    with neutral():
        return BlockedWeight(rows, length)


def fits(rows: int, length: int) -> bool:
    """True for weights that are whole blocks, or nearly."""
    numbers = rows * length
    return rows >= ROWS and padded(rows) * padded(length) - numbers <= FILLING * numbers and works()


def rows_at_once(rows: int, length: int, many: int = 1) -> int:
    """Rows of a buffer for a weight ``[rows, length]`` and ``many`` rows of x.

    The same for all large weights of one K, so that a model's layers share few buffers; smaller only where the last part,
    which begins in the one before, would repeat more than an eighth of the work.
    """
    blocks = padded(rows) // ROWS
    wanted = BLOCK_BYTES // 2 if many in HALVED else BLOCK_BYTES
    most = max(1, min(wanted, settings.workspace_bytes // 8) // (2 * ROWS * length))
    parts = -(-blocks // most)
    if parts > 1 and 8 * (parts * most - blocks) <= blocks:
        return most * ROWS
    return -(-blocks // parts) * ROWS


def starts(rows: int, step: int) -> list[int]:
    """First rows of the parts of a weight: the last part ends with it, and may begin in the one before."""
    return [min(start, rows - step) for start in range(0, rows, step)]


def blocked(rows: int, length: int) -> BlockedWeight:
    """This thread's buffer of that shape; those used longest ago are given back for it."""
    return keep(("blocked", rows, length), 2 * rows * length, lambda: _made(rows, length))


def widened(product: Gemm, own: int, length: int) -> Gemm:
    """The product for x of ``own`` columns; the one that is given takes ``length``, zeros beside them."""
    if own == length:
        return product

    def product_widened(x: torch.Tensor, weight: QTensor, bias: torch.Tensor | None) -> torch.Tensor:
        shape = (*x.shape[:-1], length)
        if x.numel() // own * length * x.dtype.itemsize <= settings.workspace_bytes // 4:
            wide = workspace(shape, x.dtype, slot=10)
            wide[..., :own] = x
            wide[..., own:] = 0
        else:
            wide = torch.nn.functional.pad(x, (0, length - own))
        return product(wide, weight, bias)

    return product_widened


def bind(rows: int, length: int, many: int, fill: Callable[[slice], Fill]) -> Gemm:
    """``x @ w.T + bias`` in bfloat16 of a weight ``[rows, length]`` that is made part by part in this thread's buffer.

    Args:
        length: a multiple of 64.
        many: rows of x.
        fill: ``fill(blocks)`` gives the function that makes those blocks of the weight, in oneDNN's order.
    """
    step, total = rows_at_once(rows, length, many), padded(rows)
    first = starts(total, step)
    fills = [fill(slice(start // ROWS, (start + step) // ROWS)) for start in first]
    if step == total:
        (whole,) = fills

        def product(x: torch.Tensor, weight: QTensor, bias: torch.Tensor | None) -> torch.Tensor:
            buffer = blocked(rows, length)
            whole(buffer, weight)
            out = buffer.product(x)
            return out if bias is None else out.add_(bias)

        return product
    # One operator puts few numbers together faster than one a part; many would have to be kept twice.
    joined = many * rows <= JOINED
    new = [max(0, before + step - start) for before, start in zip([-step, *first], first)]

    def product_by_parts(x: torch.Tensor, weight: QTensor, bias: torch.Tensor | None) -> torch.Tensor:
        x = x.contiguous()
        buffer = blocked(step, length)
        parts: list[torch.Tensor] = []
        out = None if joined else x.new_empty(*x.shape[:-1], rows)
        for fill_part, start, repeated in zip(fills, first, new):
            fill_part(buffer, weight)
            part = buffer.product(x)
            if out is None:
                parts.append(part[..., repeated : rows - start])
            else:
                out[..., start : start + step] = part[..., : rows - start]
        out = torch.cat(parts, -1) if out is None else out
        return out if bias is None else out.add_(bias)

    return product_by_parts
