"""int4, int3 and int2 weights in the form of torch's ``_weight_int4pack_mm_for_cpu``.

The form is the stored nibbles in another order: blocks of 64 rows (32 without AVX-512), K outside, row r and row r + half a
block in one byte. Codes of 2 and 3 bits are widened to nibbles: twice the bytes, or a third more, while the layer is packed.
Scales are needed in x's dtype, interleaved with zero points; they are kept per dtype beside the stored ones (an eighth of
the codes' bytes for groups of 64 in bfloat16).

Rows are filled up to whole blocks, K to a multiple of 64: with weights of zero. Groups of a size that the operator does not
take are for compiled kernels alone.
"""

from __future__ import annotations

import functools
import logging
from typing import NamedTuple

import torch

from requanto.dtypes.bit_packing import pack as pack_codes
from requanto.dtypes.bit_packing import unpack
from requanto.dtypes.qtypes import qtype
from requanto.linear.cpu import onednn_bf16
from requanto.linear.cpu.aot import cache, calls
from requanto.linear.cpu.onednn_bf16 import FILLING
from requanto.linear.cpu.onednn_int8 import checked_index
from requanto.linear.registry import Gemm
from requanto.runtime.tracing import neutral
from requanto.tensor.layout import Layout, Parts, register_layout
from requanto.tensor.qtensor import QTensor
from requanto.tensor.spec import WeightSpec

logger = logging.getLogger(__name__)

#: Group sizes that the operator takes.
GROUPS = (32, 64, 128, 256)
#: Rows of codes that are widened to int32 at a time while packing.
_STEP = 64 * 16


def rows_per_block() -> int:
    """Rows of one block: the operator's, on this processor."""
    return 64 if torch.backends.cpu.get_cpu_capability().startswith("AVX512") else 32


class Int4Layout(Layout):
    """4-bit ``[N, K]`` in blocks of rows, uint8 ``[N filled up, K filled up / 2]``.

    Beside the codes lies ``flat``, bool ``[N, groups]``: groups whose codes are all 0 (`Scales`).
    """

    extra = ("flat",)
    rows_are_views = False

    def __init__(self, block: int) -> None:
        self.block = block
        self.name = f"int4-{block}"

    def sizes(self, spec: WeightSpec) -> tuple[int, int]:
        """N and K, filled up."""
        rows, length = spec.matrix_shape
        return rows + -rows % self.block, _length(length)

    def pack(self, spec: WeightSpec, parts: Parts) -> dict[str, torch.Tensor]:
        rows, length = spec.matrix_shape
        beside, offset = _length(length) - length, _offset(spec)
        packed, flat = [], []
        for part in parts["qdata"].reshape(rows, -1).split(_STEP):
            codes = unpack(part, spec.qtype.bits, length)
            flat.append(codes.view(len(part), spec.groups, -1).amax(2) == 0)
            below = -len(part) % self.block
            if beside or below:
                codes = torch.nn.functional.pad(codes, (0, beside, 0, below))
            packed.append(self._packed(codes.add_(offset)))
        return {"qdata": torch.cat(packed), "flat": torch.cat(flat)}

    def _packed(self, codes: torch.Tensor) -> torch.Tensor:
        if self.block == rows_per_block():
            return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)
        half = self.block // 2  # another machine's blocks
        low, high = codes.view(-1, 2, half, codes.shape[1]).transpose(2, 3).unbind(1)
        return (low | (high << 4)).reshape(codes.shape[0], -1)

    def unpack(self, spec: WeightSpec, parts: Parts) -> torch.Tensor:
        rows = spec.matrix_shape[0]
        spans = [(start, min(start + _STEP, rows)) for start in range(0, rows, _STEP)]
        packed = [pack_codes(self.codes(spec, parts, *span), spec.qtype.bits) for span in spans]
        return torch.cat(packed).view(spec.codes_shape)

    def codes(self, spec: WeightSpec, parts: Parts, start: int, stop: int) -> torch.Tensor:
        first, last = start // self.block, -(-stop // self.block)
        blocks = self.blocks(spec, parts)[first:last]
        codes = torch.cat([blocks & 15, blocks >> 4], dim=2).transpose(1, 2).reshape(-1, blocks.shape[1])
        begin = first * self.block
        return codes[start - begin : stop - begin, : spec.row_length].contiguous().sub_(_offset(spec))

    def blocks(self, spec: WeightSpec, parts: Parts) -> torch.Tensor:
        """uint8 ``[blocks, K filled up, block / 2]``: row r of a block and row r + half a block in one byte."""
        return parts["qdata"].view(-1, self.sizes(spec)[1], self.block // 2)

    def gather(self, spec: WeightSpec, parts: Parts, index: torch.Tensor) -> torch.Tensor:
        index, half = checked_index(index, spec.matrix_shape[0]), self.block // 2
        lane = index % self.block
        found = self.blocks(spec, parts)[index // self.block, :, lane % half]
        codes = torch.where((lane < half).unsqueeze(1), found & 15, found >> 4)
        return codes[:, : spec.row_length].contiguous().sub_(_offset(spec))

    def codes_form(self, spec: WeightSpec) -> tuple[torch.Size, torch.dtype]:
        rows, length = self.sizes(spec)
        return torch.Size([rows, length // 2]), torch.uint8

    def extra_forms(self, spec: WeightSpec) -> dict[str, tuple[torch.Size, torch.dtype]]:
        return {"flat": (torch.Size([spec.matrix_shape[0], spec.groups]), torch.bool)}


_OF_BLOCK = {block: register_layout(Int4Layout(block)) for block in (32, 64)}


def layout() -> Int4Layout:
    """The layout of this processor's operator."""
    return _OF_BLOCK[rows_per_block()]


def _offset(spec: WeightSpec) -> int:
    """The operator's zero is 8. Codes of 2 and 3 bits are moved there, so that no zero point is large beside its weights."""
    return 8 - 2 ** (spec.qtype.bits - 1)


class Packed(NamedTuple):
    """A weight in this processor's layout, as GEMMs read it. It holds tensors, not the weight.

    Attributes:
        codes: uint8 ``[N filled up, K filled up / 2]``.
        flat: bool ``[N, groups]``, see `Int4Layout`.
        blocks: the same, block by block.
        rows, own_length: N and K.
        length, groups: K and its groups, filled up.
        group_size: of the weight.
        affine: it has shifts.
    """

    codes: torch.Tensor
    flat: torch.Tensor
    blocks: torch.Tensor
    rows: int
    own_length: int
    length: int
    groups: int
    group_size: int | None
    affine: bool

    @property
    def block(self) -> int:
        """Rows of one block."""
        return 2 * self.blocks.shape[2]


def packed(weight: QTensor) -> Packed | None:
    """The weight's tensors, where they are in this processor's layout."""
    found, parts = weight._storage.state
    if found is not layout():
        return None
    spec = weight._spec
    length = found.sizes(spec)[1]
    groups = 1 if spec.group_size is None else length // spec.group_size
    blocks = found.blocks(spec, parts)
    return Packed(
        parts["qdata"], parts["flat"], blocks, *spec.matrix_shape, length, groups, spec.group_size, spec.affine
    )


class Scales:
    """Scales and zero points as kernels read them, made from a weight's own and kept with its storage.

    Made anew when those were changed in place. (A change behind torch's back, through ``scale.data``, is not seen; assign
    ``weight.scale`` instead.)
    """

    def __init__(self) -> None:
        self._pairs: dict[torch.dtype, torch.Tensor] = {}
        self._words: torch.Tensor | None = None
        self._state: tuple[object, ...] = ()

    @classmethod
    def of(cls, weight: QTensor) -> Scales:
        """The weight's."""
        derived = weight._storage.derived
        found = derived.get("int4 scales")
        if found is None:
            found = derived["int4 scales"] = cls()
        parts = weight._storage.parts
        state = _state(parts["scale"]), _state(parts.get("shift")), _state(parts.get("row_scale"))
        if state != found._state:
            found._pairs, found._words, found._state = {}, None, state
        return found

    @property
    def nbytes(self) -> int:
        """Bytes that are held."""
        words = 0 if self._words is None else self._words.nbytes
        return words + sum(pairs.nbytes for pairs in list(self._pairs.values()))

    def pairs(self, weight: QTensor, codes: Packed, dtype: torch.dtype) -> torch.Tensor:
        """``[groups, rows of whole blocks, 2]``: scale and zero point; ``w = (code - 8) * scale + zero``."""
        found, words = self._pairs.get(dtype), self._words
        if found is None and dtype == torch.bfloat16 and words is not None:
            blocks = words.view(len(codes.blocks), -1, codes.block)
            found = blocks.transpose(0, 1).reshape(blocks.shape[1], -1, 1).view(torch.bfloat16)
            self._pairs[dtype], self._words = found, None
        if found is None:
            found = self._pairs[dtype] = _made(weight, codes, dtype)
        return found

    def words(self, weight: QTensor, codes: Packed) -> torch.Tensor:
        """The same in bfloat16, block by block: int32 ``[N / block * K / group, 1, 2, block / 2]``, the zero point in the
        upper half.

        For many rows (`cpu.aot.calls`). Whichever form was asked for last is kept, and the other one is made of it: to keep
        both would add an eighth to the codes, and they change places once a prompt.
        """
        found = self._words
        if found is None:
            pairs = self.pairs(weight, codes, torch.bfloat16).view(torch.int32)
            blocks = pairs.view(len(pairs), -1, codes.block).transpose(0, 1).contiguous()
            found = self._words = blocks.view(-1, 1, 2, codes.block // 2)
            self._pairs.pop(torch.bfloat16, None)
        return found


def _made(weight: QTensor, codes: Packed, dtype: torch.dtype) -> torch.Tensor:
    with neutral():
        scale = weight.scale.float().reshape(codes.rows, -1)
        if weight.shift is None:
            zero = torch.zeros_like(scale)
        else:
            shift = weight.shift.float().reshape(codes.rows, -1)
            zero = weight.qtype.zero_code * scale - shift
            # A group of equal weights has codes of 0 and any scale (1), beside which its shift would be rounded away.
            zero = torch.where(codes.flat, -shift, zero)
            scale = scale.masked_fill(codes.flat, 0)
        beside, below = codes.groups - scale.shape[1], len(codes.codes) - codes.rows
        if beside or below:
            scale, zero = (torch.nn.functional.pad(part, (0, beside, 0, below)) for part in (scale, zero))
        return torch.stack([scale.t(), zero.t()], dim=2).to(dtype).contiguous()


def _state(tensor: torch.Tensor | None) -> tuple[int, int] | None:
    """Where its numbers lie, and how often they were changed in place."""
    return None if tensor is None else (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)


@functools.cache
def works() -> bool:
    """True where torch's operator exists and its form is the one described above, which this module can reverse."""
    try:
        with neutral():
            rows = 2 * rows_per_block()
            codes = torch.arange(rows * 32, dtype=torch.int64, device="cpu")
            codes = (codes * codes * 2654435761 // 65536 % 16).int().view(rows, 32)  # no two rows alike
            blocked = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1).view(2, 32, rows // 4)
            back = torch.cat([blocked & 15, blocked >> 4], dim=2).transpose(1, 2).reshape(rows, 32)
            if torch.equal(back.int(), codes):
                return True
        why = "its order is not the known one"
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        why = str(error).splitlines()[0]
    logger.info("torch's int4 operator is not used on this machine: %s", why)
    return False


def fits(weight: QTensor) -> bool:
    """True for weights of whole blocks, or nearly, whose groups are the operator's, or the kernels'
    (`requanto.linear.cpu.int4_gemm`)."""
    rows, length = weight.matrix_shape
    return (
        weight.qtype.bits in (2, 3, 4)
        and not weight.qtype.is_codebook
        and _length(length) % 16 == 0
        and (rows + -rows % rows_per_block()) * _length(length) <= (1 + FILLING) * rows * length
        and (weight.group_size in GROUPS or for_kernels(weight))
        and works()
    )


def for_kernels(weight: QTensor) -> bool:
    """True for weights that compiled kernels read in this form and the operator does not."""
    (rows, length), group = weight.matrix_shape, weight.group_size
    if group in GROUPS or not cache.wanted(calls.NIBBLES) or not onednn_bf16.fits(rows, length):
        return False
    # Whole groups in what is filled up, pairs of codes in each; a kernel knows no axis of one.
    whole = rows > onednn_bf16.ROWS if group is None else group % 4 == 0 and onednn_bf16.padded(length) % group == 0
    return whole and rows_per_block() == onednn_bf16.ROWS


def _length(own: int) -> int:
    """K filled up to whole blocks of oneDNN's, unless that were too much: the operator does without."""
    whole = onednn_bf16.padded(own)
    return whole if whole <= (1 + FILLING) * own else own


def run(
    x: torch.Tensor,
    weight: QTensor,
    bias: torch.Tensor | None,
    activation: qtype | None = None,
    input_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Few rows: the nibbles are read once, dequantized in registers."""
    found = packed(weight)
    assert found is not None
    return _gemm(found, x.dtype)(x, weight, bias)


def bind(weight: QTensor, rows: int, dtype: torch.dtype) -> Gemm | None:
    """`run` for one shape of x; None: float16, which goes through float32."""
    found = packed(weight)
    return _gemm(found, dtype) if found is not None and dtype != torch.float16 else None


def _gemm(found: Packed, dtype: torch.dtype) -> Gemm:
    operator, codes = torch.ops.aten._weight_int4pack_mm_for_cpu.default, found.codes
    group, rows, length = found.group_size, found.rows, found.length

    def gemm(x: torch.Tensor, weight: QTensor, bias: torch.Tensor | None) -> torch.Tensor:
        pairs = Scales.of(weight).pairs(weight, found, dtype)
        out = operator(x.reshape(-1, length).contiguous(), codes, group, pairs)
        out = (out if out.shape[1] == rows else out[:, :rows].contiguous()).view(*x.shape[:-1], rows)
        return out if bias is None else out.add_(bias)

    return onednn_bf16.widened(gemm, found.own_length, length)
