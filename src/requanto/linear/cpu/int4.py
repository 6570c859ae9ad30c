"""int4, int3 and int2 weights in the layout of torch's ``_weight_int4pack_mm_for_cpu``.

The layout has blocks of 64 rows (32 without AVX-512), ``[K, block / 2]`` bytes in each; a byte has the codes of row r and
row r + block / 2. Codes of 2 and 3 bits are stored in 4 bits: twice the bytes, or a third more, while the layer is packed.
The operator needs scales in x's dtype, interleaved with zero points (`requanto.linear.cpu.int4_scales`).

N is padded to whole blocks and K to a multiple of 64, with weights of zero. Weights with a group size that the operator does
not support are packed for compiled kernels only.
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
from requanto.linear.cpu.int4_scales import Scales
from requanto.linear.cpu.onednn_bf16 import MAX_PADDING
from requanto.linear.cpu.onednn_int8 import checked_index
from requanto.linear.registry import Gemm
from requanto.runtime.tracing import without_ambient_state
from requanto.tensor.layout import Layout, Parts, register_layout
from requanto.tensor.qtensor import QTensor
from requanto.tensor.spec import WeightSpec

logger = logging.getLogger(__name__)

#: Group sizes that the operator supports.
GROUPS = (32, 64, 128, 256)
#: Rows that are packed or unpacked at a time.
_STEP = 64 * 16


def rows_per_block() -> int:
    """Rows of one block of the operator's layout on this CPU."""
    return 64 if torch.backends.cpu.get_cpu_capability().startswith("AVX512") else 32


class Int4Layout(Layout):
    """4-bit ``[N, K]`` in blocks of rows, uint8 ``[padded N, padded K / 2]``.

    An additional tensor ``flat``, bool ``[N, groups]``, marks groups whose codes are all 0 (see `Scales`). It is empty where
    no shift of floats stands for a group of equal weights: symmetric weights, whole zero points, scales in blocks.
    """

    extra = ("flat",)
    rows_are_views = False

    def __init__(self, block: int) -> None:
        self.block = block
        self.name = f"int4-{block}"

    def sizes(self, spec: WeightSpec) -> tuple[int, int]:
        """N and K, padded."""
        rows, length = spec.matrix_shape
        return rows + -rows % self.block, _padded_length(length)

    def accepts(self, spec: WeightSpec) -> bool:
        return spec.qtype.bits in (2, 3, 4) and not spec.qtype.is_codebook

    def pack(self, spec: WeightSpec, parts: Parts) -> dict[str, torch.Tensor]:
        rows, length = spec.matrix_shape
        pad_columns, offset = _padded_length(length) - length, _offset(spec)
        packed, flat = [], []
        for part in parts["qdata"].reshape(rows, -1).split(_STEP):
            codes = unpack(part, spec.qtype.bits, length)
            if self._flags(spec):
                flat.append(codes.view(len(part), spec.groups, -1).amax(2) == 0)
            pad_rows = -len(part) % self.block
            if pad_columns or pad_rows:
                codes = torch.nn.functional.pad(codes, (0, pad_columns, 0, pad_rows))
            packed.append(self._packed(codes.add_(offset)))
        none = torch.empty(rows, 0, dtype=torch.bool, device=parts["qdata"].device)
        return {"qdata": torch.cat(packed), "flat": torch.cat(flat) if flat else none}

    def _packed(self, codes: torch.Tensor) -> torch.Tensor:
        if self.block == rows_per_block():
            return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)
        half = self.block // 2  # packs for another CPU, whose blocks have another size
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
        """Codes as uint8 ``[blocks, padded K, block / 2]``: row r and row r + block / 2 of a block in one byte."""
        return parts["qdata"].view(-1, self.sizes(spec)[1], self.block // 2)

    def gather(self, spec: WeightSpec, parts: Parts, index: torch.Tensor) -> torch.Tensor:
        index, half = checked_index(index, spec.matrix_shape[0]), self.block // 2
        lane = index % self.block
        found = self.blocks(spec, parts)[index // self.block, :, lane % half]
        codes = torch.where((lane < half).unsqueeze(1), found & 15, found >> 4)
        return codes[:, : spec.row_length].contiguous().sub_(_offset(spec))

    def codes_shape_dtype(self, spec: WeightSpec) -> tuple[torch.Size, torch.dtype]:
        rows, length = self.sizes(spec)
        return torch.Size([rows, length // 2]), torch.uint8

    def extra_shapes_dtypes(self, spec: WeightSpec) -> dict[str, tuple[torch.Size, torch.dtype]]:
        return {"flat": (torch.Size([spec.matrix_shape[0], self._flags(spec)]), torch.bool)}

    @staticmethod
    def _flags(spec: WeightSpec) -> int:
        return spec.groups if spec.affine and not spec.zeros and spec.scale_block is None else 0


_LAYOUT_OF_BLOCK = {block: register_layout(Int4Layout(block)) for block in (32, 64)}


def layout() -> Int4Layout:
    """The layout that torch's operator has on this CPU."""
    return _LAYOUT_OF_BLOCK[rows_per_block()]


def _offset(spec: WeightSpec) -> int:
    """Offset that moves zero to code 8, as in the operator's formula, for codes of 2 and 3 bits; keeps zero points small."""
    return 8 - 2 ** (spec.qtype.bits - 1)


class Packed(NamedTuple):
    """Tensors and sizes of a weight in this CPU's layout. It references the tensors, not the weight.

    Attributes:
        codes: uint8 ``[padded N, padded K / 2]``.
        flat: bool ``[N, groups]`` or ``[N, 0]``, see `Int4Layout`.
        blocks: ``codes`` as uint8 ``[blocks, padded K, block / 2]``.
        out_features, in_features: N and K.
        length: padded K.
        groups: number of groups in padded K.
        group_size: group size of the weight; None: one scale per row.
        affine: whether the weight has a shift.
    """

    codes: torch.Tensor
    flat: torch.Tensor
    blocks: torch.Tensor
    out_features: int
    in_features: int
    length: int
    groups: int
    group_size: int | None
    affine: bool

    @property
    def block(self) -> int:
        """Rows of one block."""
        return 2 * self.blocks.shape[2]


def packed(weight: QTensor) -> Packed | None:
    """The weight as `Packed`; None if it is not in this CPU's layout."""
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


@functools.cache
def works() -> bool:
    """True if torch's operator exists and its layout is the one described above; checked with a small test matrix."""
    try:
        with without_ambient_state():
            rows = 2 * rows_per_block()
            codes = torch.arange(rows * 32, dtype=torch.int64, device="cpu")
            codes = (codes * codes * 2654435761 // 65536 % 16).int().view(rows, 32)  # all rows differ
            blocked = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1).view(2, 32, rows // 4)
            back = torch.cat([blocked & 15, blocked >> 4], dim=2).transpose(1, 2).reshape(rows, 32)
            if torch.equal(back.int(), codes):
                return True
        why = "its layout is unknown"
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        why = str(error).splitlines()[0]
    logger.info("torch's int4 operator is not used on this machine: %s", why)
    return False


def fits(weight: QTensor) -> bool:
    """True for weights that need little padding and whose group size the operator or the compiled kernels
    (`requanto.linear.cpu.int4_gemm`) support."""
    rows, length = weight.matrix_shape
    return (
        weight.qtype.bits in (2, 3, 4)
        # With scales in blocks the weight keeps the size that it has in its file.
        and (weight.qtype.bits == 4 or weight.scale_block is None)
        and not weight.qtype.is_codebook
        and _padded_length(length) % 16 == 0
        and (rows + -rows % rows_per_block()) * _padded_length(length) <= (1 + MAX_PADDING) * rows * length
        and (weight.group_size in GROUPS or only_for_kernels(weight))
        and works()
    )


def only_for_kernels(weight: QTensor) -> bool:
    """True for weights that compiled kernels can read in this layout and the operator cannot."""
    (rows, length), group = weight.matrix_shape, weight.group_size
    if group in GROUPS or not cache.wanted(calls.NIBBLES) or not onednn_bf16.fits(rows, length):
        return False
    # Padded K has whole groups, and each an even number of pairs of codes. Dynamic axes of a kernel have length 2 or more.
    whole = rows > onednn_bf16.ROWS if group is None else group % 4 == 0 and onednn_bf16.padded(length) % group == 0
    return whole and rows_per_block() == onednn_bf16.ROWS


def _padded_length(length: int) -> int:
    """K padded to a multiple of 64, as oneDNN needs, or K itself if that pads too much (the operator needs no padding)."""
    whole = onednn_bf16.padded(length)
    return whole if whole <= (1 + MAX_PADDING) * length else length


def run(
    x: torch.Tensor,
    weight: QTensor,
    bias: torch.Tensor | None,
    activation: qtype | None = None,
    input_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes ``x @ w.T + bias`` with torch's operator (fused dequantize), which is fast for few rows."""
    found = packed(weight)
    assert found is not None
    return _gemm(found, Scales.of(weight), x.dtype)(x, weight, bias)


def make_plan(weight: QTensor, rows: int, dtype: torch.dtype) -> Gemm | None:
    """Plan of `run` for one shape of x; None for float16, which has to be converted to float32."""
    found = packed(weight)
    return _gemm(found, Scales.of(weight), dtype) if found is not None and dtype != torch.float16 else None


def _gemm(found: Packed, scales: Scales, dtype: torch.dtype) -> Gemm:
    operator, codes = torch.ops.aten._weight_int4pack_mm_for_cpu.default, found.codes
    group, rows, length = found.group_size, found.out_features, found.length

    def gemm(x: torch.Tensor, weight: QTensor, bias: torch.Tensor | None) -> torch.Tensor:
        out = operator(x.reshape(-1, length).contiguous(), codes, group, scales.pairs(found, dtype))
        out = (out if out.shape[1] == rows else out[:, :rows].contiguous()).view(*x.shape[:-1], rows)
        return out if bias is None else out.add_(bias)

    return onednn_bf16.with_padded_columns(gemm, found.in_features, length)
