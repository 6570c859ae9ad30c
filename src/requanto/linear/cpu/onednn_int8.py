"""int8 weights in oneDNN's blocked form: int8 products with exact int32 sums.

Dynamic (or static) int8 activations are one product. Float activations are two: x becomes 16-bit integers, split into a high
and a low byte, so that ``x @ w = 256 * (high @ w) + low @ w``. The weight is read once, as 8 bits, and never dequantized.

The blocked form is an opaque mkldnn tensor. It converts back to the stored codes bit for bit (`tests/linear`), so it may
replace them.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Iterable

import torch

from requanto.dtypes.qtypes import qtype
from requanto.linear.activations import (
    STEPS,
    quantize_by,
    quantize_unsigned,
    row_step,
    single_scale,
    split_16bit,
    split_by,
)
from requanto.linear.cpu.onednn_bf16 import padded
from requanto.runtime.buffers import rows_that_fit
from requanto.tensor.layout import Packed, packed_as
from requanto.tensor.qtensor import QTensor

logger = logging.getLogger(__name__)

LAYOUT = "onednn"
#: Rows of x in one product, at most: their 16-bit form and float32 result stay in the cache.
CHUNK = 256
#: Bytes of a product's float32 result, about: larger ones the allocator returns to the system, and their pages are faulted
#: in anew at every product.
SUMS_BYTES = 8 * 2**20
#: Rows of x in one product, at least: with fewer, oneDNN reads the weight more slowly (cpu_passes.json).
LEAST = 4
#: Bytes of this thread's buffers for each number of x: float32, 16-bit codes, and both halves of these.
_BYTES = 8
#: K beyond which an int32 sum of products of 255 * 128 could overflow.
LONGEST = 2**31 // (255 * 128)


@functools.cache
def _tell_once(why: str) -> None:
    logger.info("compiled kernels do not read packed int8 weights on this machine, oneDNN's product does: %s", why)


class OneDnnCodes(Packed):
    """int8 ``[N, K]``, blocked.

    Attributes:
        words: int32 ``[ceil(N / 64), ceil(K / 64) * 16, 64]``, four codes along K in each: the blocked form's own memory, to
            be read, with zeros where it is filled up. None where it is in another order.
    """

    layout = LAYOUT

    def __init__(self, codes: torch.Tensor) -> None:
        super().__init__()
        codes = codes.contiguous()
        self.blocked = torch.ops.onednn.qlinear_prepack(codes, None)
        self.zeros = torch.zeros(codes.shape[0], dtype=torch.int32)
        self.words = self._words(codes)

    def _words(self, codes: torch.Tensor) -> torch.Tensor | None:
        length, (wide, long) = codes.shape[1], (padded(size) for size in codes.shape)
        # Room for a sum a row, or none, beside the codes: small weights are filled up otherwise.
        if not codes.numel() or self.nbytes not in (wide * long, wide * long + 4 * wide):
            return None
        try:
            address = torch.ops.mkldnn.data_ptr(self.blocked)
        except (AttributeError, RuntimeError) as error:  # this build of torch keeps it to itself
            _tell_once(str(error).splitlines()[0])
            return None
        memory = (ctypes.c_char * (wide * long)).from_address(address)
        memory.owner = self.blocked  # whoever holds a view of these words holds what they lie in
        words = torch.frombuffer(memory, dtype=torch.int32).view(wide // 64, long // 4, 64)
        for block in {0, len(words) - 1}:
            part = codes[64 * block : 64 * (block + 1)]
            part = torch.nn.functional.pad(part, (0, long - length, 0, 64 - len(part)))
            expected = part.view(64, long // 4, 4).transpose(0, 1).contiguous()
            if not torch.equal(words[block], expected.view(torch.int32).squeeze(-1)):
                _tell_once("oneDNN's order of int8 is not in blocks of 64 rows and four codes along K")
                return None
        return words

    def plain(self) -> torch.Tensor:
        return self.blocked.to_dense().t().contiguous()

    @property
    def nbytes(self) -> int:
        return int(torch.ops.mkldnn._nbytes(self.blocked))


@functools.cache
def works() -> bool:
    """True where oneDNN's int8 product exists, is exact, and its blocked form can be reversed.

    Without VNNI, oneDNN adds pairs of products in 16 bits, which overflow: measured, not guessed, since both the
    processor and ONEDNN_MAX_CPU_ISA decide.
    """
    try:
        codes = torch.full((48, 80), 127, dtype=torch.int8)
        codes[:, ::3] = -128
        packed = OneDnnCodes(codes)
        x = torch.full((5, 80), 255, dtype=torch.uint8)
        out = product(x, packed, torch.ones(48, dtype=torch.float32))
        exact = torch.equal(out.double(), (x.double() - 128) @ codes.double().t())
        if exact and torch.equal(packed.plain(), codes):
            return True
        why = "it saturates without VNNI"
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        why = str(error).splitlines()[0]
    logger.info("oneDNN's int8 product is not used on this machine: %s", why)
    return False


def pack(weight: QTensor) -> OneDnnCodes:
    """The blocked form of a plain int8 weight."""
    return OneDnnCodes(weight.qdata)


def product(x: torch.Tensor, packed: OneDnnCodes, scale: torch.Tensor, step: float = 1.0) -> torch.Tensor:
    """``(x - 128) @ w.T * scale * step`` in float32. x: uint8 ``[rows, K]``; scale: float32 ``[N]``."""
    return torch.ops.onednn.qlinear_pointwise(
        x, step, 128, packed.blocked, scale, packed.zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )


def product_into(sums: torch.Tensor, x: torch.Tensor, packed: OneDnnCodes, scale: torch.Tensor) -> torch.Tensor:
    """`product` in kept memory, ``[rows, N]``: zeros are written, and added to, faster than fresh pages are had."""
    return torch.ops.onednn.qlinear_pointwise.binary(
        x, 1.0, 128, packed.blocked, scale, packed.zeros, sums.zero_(), None, 1.0, 0, torch.float32, 1.0, 0, "sum", 1.0,
        "none", [], "",
    )  # fmt: skip


def run_split(
    x: torch.Tensor,
    weight: QTensor,
    bias: torch.Tensor | None,
    activation: qtype | None = None,
    input_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Float activations: two int8 products."""
    packed = packed_as(weight, OneDnnCodes, pack)
    scale = packed.row_scale(weight, weight.shape[0])
    one = row_step(x, STEPS) if x.shape[0] == 1 else None
    if one is not None:
        sums = product(split_by(x, one, LEAST), packed, scale, one)
        total = sums[1:2].add_(sums[:1], alpha=256)
        return (total if bias is None else total.add_(bias)).to(x.dtype)
    out = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype)
    step = _rows_at_once(x, 2 * weight.shape[0])
    for part, into in zip(x.split(step), out.split(step)):
        rows = part.shape[0]
        halves, steps = split_16bit(part, LEAST)
        sums = product(halves, packed, scale)
        _finish(sums[rows : 2 * rows].add_(sums[:rows], alpha=256), steps, bias, into)
    return out


def run_int8(
    x: torch.Tensor,
    weight: QTensor,
    bias: torch.Tensor | None,
    activation: qtype | None = None,
    input_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """int8 activations, per token or static: one int8 product."""
    assert activation is not None
    packed = packed_as(weight, OneDnnCodes, pack)
    scale = packed.row_scale(weight, weight.shape[0])
    step = _rows_at_once(x, weight.shape[0])
    if x.dtype != torch.float16:
        one = single_scale(x, activation, input_scale)
        if one is not None:
            parts = [_under_one_scale(part, activation, one, packed, scale, bias) for part in x.split(step)]
            return parts[0] if len(parts) == 1 else torch.cat(parts)
    out = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype)
    for part, into in _parts(x, out, step):
        codes, steps = quantize_unsigned(part, activation, input_scale, LEAST)
        _finish(product(codes, packed, scale)[: len(part)], steps, bias, into)
    return out


def _under_one_scale(
    x: torch.Tensor,
    activation: qtype,
    step: float,
    packed: OneDnnCodes,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """All of x has one scale: oneDNN multiplies with it, adds the bias, and rounds to x's dtype."""
    codes = quantize_by(x, activation, step)
    return torch.ops.onednn.qlinear_pointwise(
        codes, step, 128, packed.blocked, scale, packed.zeros, None if bias is None else bias.float(),
        1.0, 0, x.dtype, "none", [], "",
    )  # fmt: skip


def _rows_at_once(x: torch.Tensor, sums: int) -> int:
    """Rows of x in one product whose float32 result has ``sums`` numbers for each of them."""
    most = max(32, min(CHUNK, SUMS_BYTES // (4 * sums)))
    return rows_that_fit(_BYTES * x.shape[1], 2 ** (most.bit_length() - 1))


def _parts(x: torch.Tensor, out: torch.Tensor, step: int) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    # One row's product is short enough for the splitting of one part to be seen.
    return ((x, out),) if x.shape[0] <= step else zip(x.split(step), out.split(step))


def _finish(sums: torch.Tensor, steps: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    sums.mul_(steps)
    if bias is not None:
        sums.add_(bias)
    out.copy_(sums)
