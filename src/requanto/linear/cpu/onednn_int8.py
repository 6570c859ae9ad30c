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
import math
from collections.abc import Iterable
from weakref import WeakValueDictionary

import torch

from requanto.dtypes.qtypes import qtype
from requanto.linear.activations import (
    coarse_rows,
    nan_rows,
    quantize_by,
    quantize_unsigned,
    single_scale,
    split_16bit,
    split_32bit,
    split_row,
)
from requanto.linear.cpu.aot import cache
from requanto.linear.cpu.onednn_bf16 import padded
from requanto.linear.cpu.scales import row_scale
from requanto.runtime.buffers import rows_that_fit
from requanto.runtime.tracing import neutral
from requanto.tensor.layout import Layout, Parts, register_layout
from requanto.tensor.qtensor import QTensor
from requanto.tensor.spec import WeightSpec

logger = logging.getLogger(__name__)

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


class Int8Layout(Layout):
    """int8 ``[N, K]`` in the order that oneDNN multiplies, as bytes: blocks of 64 rows, four codes along K (`words`).

    Every machine can read it, whether oneDNN multiplies it there or not.
    """

    name = "onednn-int8"
    rows_are_views = False

    def pack(self, spec: WeightSpec, parts: Parts) -> dict[str, torch.Tensor]:
        codes = parts["qdata"].reshape(spec.matrix_shape)
        packed = bytes_of(_prepacked(codes))
        expected = self.codes_form(spec)[0].numel()
        if packed.numel() != expected or not _reads_as(packed, codes):
            raise RuntimeError(
                f"oneDNN orders an int8 weight of shape {tuple(codes.shape)} unlike others: set "
                "requanto.settings.pack_on_first_use = False (REQUANTO_PACK=0), and please report it"
            )
        return {"qdata": packed}

    def unpack(self, spec: WeightSpec, parts: Parts) -> torch.Tensor:
        return self.codes(spec, parts, 0, spec.matrix_shape[0]).reshape(spec.codes_shape)

    def codes(self, spec: WeightSpec, parts: Parts, start: int, stop: int) -> torch.Tensor:
        rows, length = spec.matrix_shape
        first = start // 64
        blocks = words(parts["qdata"], rows, length)[first : -(-stop // 64)]
        codes = blocks.transpose(1, 2).contiguous().view(torch.int8).view(-1, 4 * blocks.shape[1])
        return codes[start - 64 * first : stop - 64 * first, :length].contiguous()

    def gather(self, spec: WeightSpec, parts: Parts, index: torch.Tensor) -> torch.Tensor:
        rows, length = spec.matrix_shape
        index = checked_index(index, rows)
        found = words(parts["qdata"], rows, length)[index // 64, :, index % 64]
        return found.contiguous().view(torch.int8).view(len(index), -1)[:, :length].contiguous()

    def clone(self, spec: WeightSpec, parts: Parts) -> dict[str, torch.Tensor]:
        return {"qdata": bytes_of(opaque(parts["qdata"].clone(), *spec.matrix_shape))}

    def codes_form(self, spec: WeightSpec) -> tuple[torch.Size, torch.dtype]:
        rows, length = (padded(size) for size in spec.matrix_shape)
        return torch.Size([rows * length + (4 * rows if _holds_sums(spec.row_length) else 0)]), torch.uint8


class OpaqueInt8Layout(Int8Layout):
    """The same where oneDNN's order is another one: its name holds what that may depend on, and other machines refuse it."""

    def __init__(self) -> None:
        self.name = f"onednn-int8-{cache.machine()}"

    def pack(self, spec: WeightSpec, parts: Parts) -> dict[str, torch.Tensor]:
        return {"qdata": bytes_of(_prepacked(parts["qdata"].reshape(spec.matrix_shape)))}

    def codes(self, spec: WeightSpec, parts: Parts, start: int, stop: int) -> torch.Tensor:
        return opaque(parts["qdata"], *spec.matrix_shape).to_dense().t()[start:stop].contiguous()

    def gather(self, spec: WeightSpec, parts: Parts, index: torch.Tensor) -> torch.Tensor:
        return torch.index_select(self.codes(spec, parts, 0, spec.matrix_shape[0]), 0, index)

    def codes_form(self, spec: WeightSpec) -> tuple[torch.Size, torch.dtype]:
        return torch.Size([_nbytes(*spec.matrix_shape)]), torch.uint8


BLOCKED = register_layout(Int8Layout())


def checked_index(index: torch.Tensor, rows: int) -> torch.Tensor:
    """The index, if all of it lies within the rows; advanced indexing would take -1 for the last one.

    Raises:
        IndexError: it does not.
    """
    if index.numel() and (int(index.min()) < 0 or int(index.max()) >= rows):
        raise IndexError(f"index out of range: found {int(index.min())}..{int(index.max())} for {rows} rows")
    return index.long()


def _prepacked(codes: torch.Tensor) -> torch.Tensor:
    return torch.ops.onednn.qlinear_prepack(codes.contiguous(), None)


@functools.lru_cache(maxsize=1024)
def _nbytes(rows: int, length: int) -> int:
    with neutral():
        return int(torch.ops.mkldnn._nbytes(_prepacked(torch.zeros(rows, length, dtype=torch.int8, device="cpu"))))


#: oneDNN's tensors by the address of their memory, which is theirs for as long as anyone holds a tensor over it.
_opaque: WeakValueDictionary[int, torch.Tensor] = WeakValueDictionary()


def bytes_of(packed: torch.Tensor) -> torch.Tensor:
    """The memory of one of oneDNN's tensors as bytes. It lives as long as these."""
    address, size = torch.ops.mkldnn.data_ptr(packed), int(torch.ops.mkldnn._nbytes(packed))
    memory = (ctypes.c_char * size).from_address(address)
    memory.owner = packed
    _opaque[address] = packed
    return torch.frombuffer(memory, dtype=torch.uint8)


def opaque(codes: torch.Tensor, rows: int, length: int) -> torch.Tensor:
    """oneDNN's own tensor over these bytes; over a copy, where they lie elsewhere (out of a file, say)."""
    found = _opaque.get(codes.data_ptr())
    if found is not None:
        return found
    with neutral():
        packed = _prepacked(torch.zeros(rows, length, dtype=torch.int8, device="cpu"))
        bytes_of(packed).copy_(codes)
    return packed


def words(codes: torch.Tensor, rows: int, length: int) -> torch.Tensor:
    """The bytes of the known order as int32 ``[ceil(N / 64), ceil(K / 64) * 16, 64]``, four codes along K in each."""
    wide, long = padded(rows), padded(length)
    return codes[: wide * long].view(torch.int32).view(wide // 64, long // 4, 64)


@functools.cache
def works() -> bool:
    """True where oneDNN's int8 GEMM exists, is exact, and its memory can be had and reversed.

    Without VNNI, oneDNN adds pairs of products in 16 bits, which overflow: measured, not guessed, since both the
    processor and ONEDNN_MAX_CPU_ISA decide.
    """
    with neutral():
        try:
            codes = torch.full((48, 80), 127, dtype=torch.int8, device="cpu")
            codes[:, ::3] = -128
            packed = _prepacked(codes)
            x = torch.full((5, 80), 255, dtype=torch.uint8, device="cpu")
            out = product(x, Int8Gemm(packed, 48), torch.ones(48, dtype=torch.float32, device="cpu"))
            exact = torch.equal(out.double(), (x.double() - 128) @ codes.double().t())
            bytes_of(packed)
            if exact and torch.equal(packed.to_dense().t().contiguous(), codes):
                return True
            why = "it saturates without VNNI"
        except (RuntimeError, AttributeError, NotImplementedError) as error:
            why = str(error).splitlines()[0]
    logger.info("oneDNN's int8 GEMM is not used on this machine: %s", why)
    return False


def layout(rows: int, length: int) -> Int8Layout | None:
    """The layout that a weight of that shape gets on this machine; None: there is none."""
    if not works():
        return None
    return BLOCKED if _probed(min(rows, 128 + rows % 64), length) is not None else _opaque_layout()


@functools.cache
def _opaque_layout() -> OpaqueInt8Layout:
    logger.info("compiled kernels do not read packed int8 weights on this machine: oneDNN's order is another one")
    found = OpaqueInt8Layout()
    register_layout(found)
    return found


@functools.lru_cache(maxsize=1024)
def _probed(rows: int, length: int) -> int | None:
    """Bytes for each row behind the codes of the known order; None: oneDNN's order of such a weight is another one."""
    with neutral():
        codes = torch.randint(-128, 128, (rows, length), dtype=torch.int8, generator=torch.Generator(), device="cpu")
        memory, wide = bytes_of(_prepacked(codes)), padded(rows)
        behind, left = divmod(memory.numel() - wide * padded(length), wide)
        # Room for a sum a row, or none; small weights are filled up otherwise.
        return behind if not left and behind in (0, 4) and _reads_as(memory, codes) else None


def _holds_sums(length: int) -> bool:
    return bool(_probed(128, length)) if works() else False


def _reads_as(memory: torch.Tensor, codes: torch.Tensor) -> bool:
    """True where the first and the last block of the bytes are these codes in the known order, zeros beside them."""
    rows, length = codes.shape
    blocks, long = words(memory, rows, length), padded(length)
    for block in {0, len(blocks) - 1}:
        part = codes[64 * block : 64 * (block + 1)]
        part = torch.nn.functional.pad(part, (0, long - length, 0, 64 - len(part)))
        expected = part.view(64, long // 4, 4).transpose(0, 1).contiguous()
        if not torch.equal(blocks[block], expected.view(torch.int32).squeeze(-1)):
            return False
    return True


class Int8Gemm:
    """What oneDNN's operator takes beside x and scale, for one weight.

    Attributes:
        packed: oneDNN's tensor.
        zeros: int32 ``[N]``, the zero points of the rows.
    """

    __slots__ = ("packed", "zeros")

    def __init__(self, packed: torch.Tensor, rows: int) -> None:
        self.packed = packed
        with neutral():
            self.zeros = torch.zeros(rows, dtype=torch.int32, device="cpu")

    @property
    def nbytes(self) -> int:
        """Bytes that are held; oneDNN's tensor is the weight's own memory."""
        return self.zeros.nbytes


def gemm_of(weight: QTensor) -> Int8Gemm:
    """Of a weight in this layout; kept with it."""
    storage = weight._storage
    found = storage.derived.get("int8 gemm")
    if found is None:
        rows, length = weight.matrix_shape
        found = storage.derived["int8 gemm"] = Int8Gemm(opaque(storage.parts["qdata"], rows, length), rows)
    return found


def words_of(weight: QTensor) -> torch.Tensor | None:
    """`words` of a weight in this layout; None where compiled kernels cannot read it."""
    layout, parts = weight._storage.state
    return words(parts["qdata"], *weight.matrix_shape) if layout is BLOCKED and weight.numel() else None


def product(x: torch.Tensor, packed: Int8Gemm, scale: torch.Tensor, step: float = 1.0) -> torch.Tensor:
    """``(x - 128) @ w.T * scale * step`` in float32. x: uint8 ``[rows, K]``; scale: float32 ``[N]``."""
    return torch.ops.onednn.qlinear_pointwise(
        x, step, 128, packed.packed, scale, packed.zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )


def product_into(sums: torch.Tensor, x: torch.Tensor, packed: Int8Gemm, scale: torch.Tensor) -> torch.Tensor:
    """`product` in kept memory, ``[rows, N]``: zeros are written, and added to, faster than fresh pages are had."""
    return torch.ops.onednn.qlinear_pointwise.binary(
        x, 1.0, 128, packed.packed, scale, packed.zeros, sums.zero_(), None, 1.0, 0, torch.float32, 1.0, 0, "sum", 1.0,
        "none", [], "",
    )  # fmt: skip


def run_split(
    x: torch.Tensor,
    weight: QTensor,
    bias: torch.Tensor | None,
    activation: qtype | None = None,
    input_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Float activations: two int8 products, or four.

    x is rounded under one scale a row, to 16-bit integers: by half a step of 32512 up to the row's largest element. At
    least half of a row's elements that are not 0 are 128 steps or more, and so keep as many bits as bfloat16 has. The
    error is then, against the result for the row with its elements cut off at 1/254 of the largest, at most
    0.6 % of the norm (0.3 % where errors are independent) if weights are alike, and 3e-5 of it for elements
    of one size: large elements whose weight is 0 do not make it worse than bfloat16's own.

    A row with fewer such elements, and one row alone, for which oneDNN takes as long, is rounded to 32-bit integers: by
    5e-10 of its largest element, which is float32's own error.
    """
    packed = gemm_of(weight)
    scale = row_scale(weight, weight.shape[0])
    one = split_row(x, LEAST) if x.shape[0] == 1 and x.shape[1] else None
    if one is not None:
        total = _of_quarters(product(one[0], packed, scale, one[1]), 1)
        return (total if bias is None else total.add_(bias)).to(x.dtype)
    out = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device="cpu")
    if not x.numel():
        return _empty_sums(out, bias)
    step = _rows_at_once(x, 2 * weight.shape[0])
    for part, into in _parts(x, out, step):
        rows = part.shape[0]
        halves, steps = split_16bit(part, LEAST)
        coarse = coarse_rows(part, halves)
        if coarse is None or len(coarse) < rows:
            sums = product(halves, packed, scale)
            _finish(sums[rows : 2 * rows].add_(sums[:rows], alpha=256), steps, bias, into)
        if coarse is not None:
            _split_finely(part, coarse, packed, scale, bias, into)
    return out


def _split_finely(
    x: torch.Tensor,
    rows: torch.Tensor,
    packed: Int8Gemm,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Writes the product of these rows of x, in 32 bits, into the same ones of ``out``."""
    logger.debug("%d of %d rows of x have a few elements so large that 16 bits are too few: 32 bits", len(rows), len(x))
    for some in rows.split(max(1, len(x) // 2)):  # twice the bytes, and the sums, of 16 bits
        quarters, steps = split_32bit(x[some], LEAST)
        total = _of_quarters(product(quarters, packed, scale), len(some)).mul_(steps)
        out[some] = (total if bias is None else total.add_(bias)).to(out.dtype)


def _of_quarters(sums: torch.Tensor, rows: int) -> torch.Tensor:
    """``[rows, N]`` of the sums of `split_32bit`'s bytes, in place."""
    total = sums[:rows]
    for byte in (1, 2, 3):
        total.add_(sums[byte * rows : (byte + 1) * rows], alpha=256**byte)
    return total


def _empty_sums(out: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The result of sums of nothing."""
    return out.zero_() if bias is None else out.copy_(bias.detach().expand_as(out))


def run_int8(
    x: torch.Tensor,
    weight: QTensor,
    bias: torch.Tensor | None,
    activation: qtype | None = None,
    input_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """int8 activations, per token or static: one int8 product. What is not finite: see `linear.activations`."""
    assert activation is not None
    packed = gemm_of(weight)
    scale = row_scale(weight, weight.shape[0])
    out = None
    step = _rows_at_once(x, weight.shape[0])
    if x.dtype in (torch.float32, torch.bfloat16) and x.numel():
        one = single_scale(x, activation, input_scale)
        if one is not None:
            parts = [_under_one_scale(part, activation, one, packed, scale, bias) for part in x.split(step)]
            out = parts[0] if len(parts) == 1 else torch.cat(parts)
    if out is None:
        out = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device="cpu")
        if not x.numel():
            return _empty_sums(out, bias)
        for part, into in _parts(x, out, step):
            codes, steps = quantize_unsigned(part, activation, input_scale, LEAST)
            _finish(product(codes, packed, scale)[: len(part)], steps, bias, into)
    lost = None if input_scale is None else nan_rows(x)
    return out if lost is None else out.masked_fill_(lost, math.nan)


def _under_one_scale(
    x: torch.Tensor,
    activation: qtype,
    step: float,
    packed: Int8Gemm,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """All of x has one scale: oneDNN multiplies with it, adds the bias, and rounds to x's dtype."""
    codes = quantize_by(x, activation, step)
    return torch.ops.onednn.qlinear_pointwise(
        codes, step, 128, packed.packed, scale, packed.zeros, None if bias is None else bias.float(),
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
