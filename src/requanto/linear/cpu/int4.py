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

import torch

from requanto.dtypes.bit_packing import pack as pack_codes
from requanto.dtypes.bit_packing import unpack
from requanto.dtypes.qtypes import qtype
from requanto.linear.cpu import onednn_bf16 as blocked
from requanto.linear.cpu.aot import cache, calls
from requanto.linear.cpu.onednn_bf16 import FILLING
from requanto.linear.registry import Product
from requanto.tensor.layout import Packed, packed_as
from requanto.tensor.qtensor import QTensor

logger = logging.getLogger(__name__)

LAYOUT = "int4"
#: Group sizes that the operator takes.
GROUPS = (32, 64, 128, 256)
#: Rows of codes that are widened to int32 at a time while packing.
_STEP = 64 * 16


def rows_per_block() -> int:
    """Rows of one block: the operator's, on this processor."""
    return 64 if torch.backends.cpu.get_cpu_capability().startswith("AVX512") else 32


class Int4Codes(Packed):
    """4-bit ``[N, K]`` in blocks of rows.

    Attributes:
        bits: of the stored codes: 4, 3 or 2.
        rows, own_length: N and K.
        length, groups: K and its groups, filled up.
    """

    layout = LAYOUT

    def __init__(self, weight: QTensor) -> None:
        super().__init__()
        self.bits, self.block = weight.qtype.bits, rows_per_block()
        self.rows, self.own_length = weight.matrix_shape
        self.length = _length(self.own_length)
        self.groups = 1 if weight.group_size is None else self.length // weight.group_size
        # The operator's zero is 8. Codes of 2 and 3 bits are moved there, so that no zero point is large beside its weights.
        self.offset = 8 - 2 ** (self.bits - 1)
        parts, flat = [], []
        for rows in weight.qdata.split(_STEP):
            codes = unpack(rows, self.bits, self.own_length)
            flat.append(codes.view(len(rows), weight.groups, -1).amax(2) == 0)
            beside, below = self.length - self.own_length, -len(rows) % self.block
            if beside or below:
                codes = torch.nn.functional.pad(codes, (0, beside, 0, below))
            parts.append(torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32).add_(self.offset), 1))
        self.blocked, self.flat = torch.cat(parts), torch.cat(flat)
        self._scales: dict[torch.dtype, torch.Tensor] = {}
        self._words: torch.Tensor | None = None
        self._state: tuple[object, ...] = ()
        self._made_from: tuple[torch.Tensor | None, ...] = ()

    def plain(self) -> torch.Tensor:
        parts = []
        for start, stop in self._parts():
            codes = self.codes(start, stop).sub_(self.offset)
            parts.append(pack_codes(codes[: self.rows - start, : self.own_length].contiguous(), self.bits))
        return torch.cat(parts)

    def _parts(self) -> list[tuple[int, int]]:
        rows = self.blocked.shape[0]
        return [(start, min(start + _STEP, rows)) for start in range(0, rows, _STEP)]

    def codes(self, start: int, stop: int) -> torch.Tensor:
        """Nibbles of whole blocks of rows (codes + offset), uint8 ``[stop - start, K]``."""
        blocks = self.blocked[start:stop].view(-1, self.length, self.block // 2)
        return torch.cat([blocks & 15, blocks >> 4], dim=2).transpose(1, 2).reshape(stop - start, self.length)

    def scales(self, weight: QTensor, dtype: torch.dtype) -> torch.Tensor:
        """``[groups, rows of whole blocks, 2]``: scale and zero point; ``w = (code - 8) * scale + zero``."""
        self._forget_old(weight)
        found = self._scales.get(dtype)
        words = self._words
        if found is None and dtype == torch.bfloat16 and words is not None:
            blocks = words.view(self.blocked.shape[0] // self.block, -1, self.block)
            pairs = blocks.transpose(0, 1).reshape(blocks.shape[1], -1, 1)
            found = pairs.view(torch.bfloat16)
            self._scales[dtype], self._words = found, None
        if found is None:
            scale = weight.scale.float()
            if weight.shift is None:
                zero = torch.zeros_like(scale)
            else:
                zero = weight.qtype.zero_code * scale - weight.shift.float()
                # A group of equal weights has codes of 0 and any scale (1), beside which its shift would be rounded away.
                zero = torch.where(self.flat, -weight.shift.float(), zero)
                scale = scale.masked_fill(self.flat, 0)
            beside, below = self.groups - scale.shape[1], self.blocked.shape[0] - self.rows
            if beside or below:
                scale, zero = (torch.nn.functional.pad(part, (0, beside, 0, below)) for part in (scale, zero))
            found = torch.stack([scale.t(), zero.t()], dim=2).to(dtype).contiguous()
            self._scales[dtype] = found
        return found

    def _forget_old(self, weight: QTensor) -> None:
        """What was made from scales and shifts that are other ones now, or were changed in place, is made anew (changes
        behind torch's back, through ``.data`` or in inference mode, are not seen)."""
        parts = weight._scale, weight._shift, weight.row_scale
        state = _state(parts[0]), _state(parts[1]), _state(parts[2])
        if state != self._state:
            self._scales, self._words, self._state = {}, None, state
            self._made_from = parts  # held: their addresses are not given to others

    def words(self, weight: QTensor) -> torch.Tensor:
        """The same in bfloat16, block by block: int32 ``[N / block * K / group, 1, 2, block / 2]``, the zero point in the
        upper half.

        For many rows (`cpu.aot.calls`). Whichever form was asked for last is kept, and the other one is made of
        it: to keep both would add an eighth to the codes, and they change places once a prompt.
        """
        self._forget_old(weight)
        found = self._words
        if found is None:
            pairs = self.scales(weight, torch.bfloat16).view(torch.int32)
            blocks = pairs.view(len(pairs), -1, self.block).transpose(0, 1).contiguous()
            found = self._words = blocks.view(-1, 1, 2, self.block // 2)
            self._scales.pop(torch.bfloat16, None)
        return found

    @property
    def nbytes(self) -> int:
        words = self._words
        scales = sum(scales.nbytes for scales in list(self._scales.values()))
        return self.blocked.nbytes + scales + (0 if words is None else words.nbytes)


def _state(tensor: torch.Tensor | None) -> tuple[int, int] | None:
    """Where its numbers lie, and how often they were changed in place."""
    return None if tensor is None else (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)


@functools.cache
def works() -> bool:
    """True where torch's operator exists and its form is the one described above, which this module can reverse."""
    try:
        rows = 2 * rows_per_block()
        codes = torch.arange(rows * 32, dtype=torch.int64)
        codes = (codes * codes * 2654435761 // 65536 % 16).int().view(rows, 32)  # no two rows alike
        blocked = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1).view(2, 32, rows // 4)
        back = torch.cat([blocked & 15, blocked >> 4], dim=2).transpose(1, 2).reshape(rows, 32)
        if torch.equal(back.int(), codes):
            return True
        why = "its packed form is not the known one"
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
    if group in GROUPS or not cache.wanted(calls.NIBBLES) or not blocked.fits(rows, length):
        return False
    # Whole groups in what is filled up, pairs of codes in each; a kernel knows no axis of one.
    whole = rows > blocked.ROWS if group is None else group % 4 == 0 and blocked.padded(length) % group == 0
    return whole and rows_per_block() == blocked.ROWS


def _length(own: int) -> int:
    """K filled up to whole blocks of oneDNN's, unless that were too much: the operator does without."""
    whole = blocked.padded(own)
    return whole if whole <= (1 + FILLING) * own else own


def pack(weight: QTensor) -> Int4Codes:
    """The packed form of a plain weight that `fits`."""
    return Int4Codes(weight)


def run(
    x: torch.Tensor,
    weight: QTensor,
    bias: torch.Tensor | None,
    activation: qtype | None = None,
    input_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Few rows: the nibbles are read once, dequantized in registers."""
    packed = packed_as(weight, Int4Codes, pack)
    return _product(packed, weight, x.dtype)(x, weight, bias)


def bind(weight: QTensor, rows: int, dtype: torch.dtype) -> Product | None:
    """`run` for one shape of x; None: float16, which goes through float32."""
    packed = weight.packed
    return _product(packed, weight, dtype) if isinstance(packed, Int4Codes) and dtype != torch.float16 else None


def _product(packed: Int4Codes, weight: QTensor, dtype: torch.dtype) -> Product:
    operator, codes = torch.ops.aten._weight_int4pack_mm_for_cpu.default, packed.blocked
    group, rows, length = weight.group_size, packed.rows, packed.length

    def product(x: torch.Tensor, weight: QTensor, bias: torch.Tensor | None) -> torch.Tensor:
        out = operator(x.reshape(-1, length).contiguous(), codes, group, packed.scales(weight, dtype))
        out = (out if out.shape[1] == rows else out[:, :rows].contiguous()).view(*x.shape[:-1], rows)
        return out if bias is None else out.add_(bias)

    return blocked.widened(product, packed.own_length, length)
