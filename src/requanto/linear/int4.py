"""int4 and int2 weights in the form of torch's ``_weight_int4pack_mm_for_cpu``.

The form is the stored nibbles in another order: blocks of 64 rows (32 without AVX-512), K outside, row r and row r + half a
block in one byte. int2 codes are widened to nibbles, which doubles their bytes while the layer is packed. Scales are needed
in x's dtype, interleaved with zero points; they are kept per dtype beside the stored ones (an eighth of the codes' bytes for
groups of 64 in bfloat16).
"""

from __future__ import annotations

import torch

from requanto.layout import Packed
from requanto.linear.workspace import workspace
from requanto.packing import pack as pack_codes
from requanto.packing import unpack
from requanto.qtensor import QTensor
from requanto.qtypes import qtype

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
        bits: of the stored codes: 4 or 2.
    """

    layout = LAYOUT

    def __init__(self, weight: QTensor) -> None:
        super().__init__()
        self.bits, self.length, self.block = weight.qtype.bits, weight.row_length, rows_per_block()
        # The operator's zero is 8. Codes of 2 bits are moved there, so that no zero point is large beside its weights.
        self.offset = 8 - 2 ** (self.bits - 1)
        parts = []
        for rows in weight.qdata.split(_STEP):
            codes = unpack(rows, self.bits, self.length).to(torch.int32).add_(self.offset)
            parts.append(torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1))
        self.blocked = torch.cat(parts)
        self._scales: dict[torch.dtype, torch.Tensor] = {}

    def plain(self) -> torch.Tensor:
        return torch.cat([pack_codes(self.codes(*part).sub_(self.offset), self.bits) for part in self._parts()])

    def _parts(self) -> list[tuple[int, int]]:
        rows = self.blocked.shape[0]
        return [(start, min(start + _STEP, rows)) for start in range(0, rows, _STEP)]

    def codes(self, start: int, stop: int) -> torch.Tensor:
        """Nibbles of whole blocks of rows (codes + offset), uint8 ``[stop - start, K]``."""
        blocks = self.blocked[start:stop].view(-1, self.length, self.block // 2)
        return torch.cat([blocks & 15, blocks >> 4], dim=2).transpose(1, 2).reshape(stop - start, self.length)

    def scales(self, weight: QTensor, dtype: torch.dtype) -> torch.Tensor:
        """``[K / group, N, 2]``: scale and zero point; ``w = (code - 8) * scale + zero``."""
        found = self._scales.get(dtype)
        if found is None:
            scale = weight.scale.float()
            if weight.shift is None:
                zero = torch.zeros_like(scale)
            else:
                zero = weight.qtype.zero_code * scale - weight.shift.float()
            found = torch.stack([scale.t(), zero.t()], dim=2).to(dtype).contiguous()
            self._scales[dtype] = found
        return found

    @property
    def nbytes(self) -> int:
        return self.blocked.nbytes + sum(scales.nbytes for scales in self._scales.values())


def fits(weight: QTensor) -> bool:
    """True for the weights that the operator takes: whole blocks of rows, its group sizes."""
    return (
        weight.qtype.bits in (2, 4)
        and weight.group_size in GROUPS
        and weight.shape[0] % rows_per_block() == 0
        and weight.row_length % 16 == 0
        and hasattr(torch.ops.aten, "_convert_weight_to_int4pack_for_cpu")
    )


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
    packed = weight.packed
    if not isinstance(packed, Int4Codes):  # another thread has read the stored form since the table was asked
        packed = pack(weight)
    out = torch.ops.aten._weight_int4pack_mm_for_cpu(
        x.contiguous(), packed.blocked, weight.group_size, packed.scales(weight, x.dtype)
    )
    return out if bias is None else out.add_(bias)


def run_large(x: torch.Tensor, weight: QTensor, packed: Int4Codes, block_bytes: int) -> torch.Tensor:
    """Many rows: some blocks of rows at a time, dequantized as they lie (K outside), times x. Returns ``[rows, N]``."""
    count, length = packed.block, packed.length
    scales = packed.scales(weight, x.dtype)
    scale, zero = (scales[..., i].view(-1, weight.shape[0] // count, count).transpose(0, 1) for i in (0, 1))
    lowest = torch.sub(zero.float(), scale.float(), alpha=8).to(x.dtype).unsqueeze(2)
    scale = scale.unsqueeze(2)
    out = x.new_empty(x.shape[0], weight.shape[0])
    stored = packed.blocked.view(-1, length, count // 2)
    for index in range(stored.shape[0]):
        codes = workspace((length, 2, count // 2), torch.uint8, slot=1)
        torch.bitwise_and(stored[index], 15, out=codes[:, 0])
        torch.bitwise_right_shift(stored[index], 4, out=codes[:, 1])
        block = workspace((length, count), x.dtype)
        block.copy_(codes.view(length, count))
        groups = block.view(scale.shape[1], -1, count)
        torch.addcmul(lowest[index], groups, scale[index], out=groups)
        torch.mm(x, block, out=out[:, index * count : (index + 1) * count])
    return out
