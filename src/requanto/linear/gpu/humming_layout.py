"""The order of a weight's codes that humming's kernels read, and the conversion from and to the plain one.

humming (https://github.com/vllm-project/humming, Apache-2.0) multiplies 16-bit activations by weights of 1 to 8 bits on the
tensor cores of NVIDIA's GPUs. Its kernels want the codes of a tile of 64 rows and 16 columns together: a thread of a warp
reads 32 of them, as its matrix instructions take them. Written from `weight_repack_nk` in the wheel's ``process.cuh``; a
test runs that function on a CPU and compares (`tests/linear/test_humming.py`). The conversion here is plain PyTorch, runs on
any device, and has an inverse, which humming has not.

The codes are a permutation of the plain ones, of the same size. One more thing changes: codes of int8 for bfloat16 are
stored as sign and magnitude (one's complement), since bfloat16 has no room for 8 bits below its magic number.

Scales and zero points are kept in the dtype of the activations and in humming's order, beside the stored ones, which are
never changed: saving, unpacking and dequantizing give exactly the weight that was packed. humming computes
``scale * (code - zero)`` with ``zero = shift / scale``, rounded to that dtype, as is the scale.
"""

from __future__ import annotations

import torch

from requanto.dtypes.bit_packing import pack, unpack
from requanto.dtypes.qtypes import qtype, qtypes
from requanto.linear.gpu import layout as gpu_layout
from requanto.tensor.layout import Layout, Parts, register_layout
from requanto.tensor.parts import float_scale, float_shift
from requanto.tensor.spec import WeightSpec

#: Rows and columns of one tile.
ROWS, COLUMNS = 64, 16
#: Widths whose codes fill words without a remainder. humming packs the others, too, in a form of their own.
WIDTHS = (1, 2, 4, 8)
#: Types: integers of these widths and float8.
KINDS = frozenset(
    kind
    for kind in qtypes.values()
    if kind.bits in WIDTHS
    and not kind.is_codebook
    and kind.blocks is None
    and (not kind.is_floating_point or kind.dtype in (torch.float8_e4m3fn, torch.float8_e5m2))
)
#: Counters with which humming's thread blocks that share a tile's K wait for each other; of one weight, never of two.
LOCKS = 2048
#: Rows of the plain matrix that are converted at a time: one code takes a byte meanwhile.
_STEP = 64 * 64


class HummingLayout(Layout):
    """Codes in humming's order for activations of one dtype, uint8 ``[K / 16, N / 64, 32, 4 * bits]``.

    Additional tensors: ``humming_scale`` ``[G, N]``, ``humming_zero`` ``[G, N]`` or ``[0, N]``, ``humming_locks``.

    Attributes:
        dtype: of the activations, bfloat16 or float16.
    """

    rows_are_views = False
    extra = ("humming_scale", "humming_zero", "humming_locks")

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.name = f"humming-{str(dtype).removeprefix('torch.')}"

    def accepts(self, spec: WeightSpec) -> bool:
        rows, length = spec.matrix_shape
        return spec.qtype in KINDS and len(spec.shape) == 2 and not rows % ROWS and not length % (2 * COLUMNS)

    def pack(self, spec: WeightSpec, parts: Parts) -> dict[str, torch.Tensor]:
        rows, length = spec.matrix_shape
        plain = parts["qdata"]
        packed = plain.new_empty(self.codes_shape_dtype(spec)[0], dtype=torch.uint8)
        for start in range(0, rows, _STEP):
            codes = _bytes_of(plain[start : start + _STEP], spec.qtype, length)
            tiles = _packed(self._signed(codes, spec.qtype), spec.qtype.bits)
            packed[:, start // ROWS : start // ROWS + tiles.shape[1]] = tiles
        return {"qdata": packed, **self.scales(spec, parts), "humming_locks": plain.new_zeros(LOCKS, dtype=torch.int32)}

    def scales(self, spec: WeightSpec, parts: Parts) -> dict[str, torch.Tensor]:
        """``humming_scale`` and ``humming_zero``, from the stored scales and shifts."""
        rows = spec.matrix_shape[0]
        scale = float_scale(spec, parts).reshape(rows, -1)
        zero = (
            zero_points(scale, float_shift(spec, parts).reshape(rows, -1)) if spec.affine else scale.new_empty(rows, 0)
        )
        made = ordered(scale.to(self.dtype), per_row=scale.shape[1] == 1)
        made.made_from = made_from(parts)  # type: ignore[attr-defined]
        return {"humming_scale": made, "humming_zero": ordered(zero.to(self.dtype), per_row=False)}

    def unpack(self, spec: WeightSpec, parts: Parts) -> torch.Tensor:
        rows = spec.matrix_shape[0]
        spans = [(start, min(start + _STEP, rows)) for start in range(0, rows, _STEP)]
        codes = [self.codes(spec, parts, *span) for span in spans]
        if spec.qtype.is_packed:
            codes = [pack(part, spec.qtype.bits) for part in codes]
        return torch.cat(codes).view(spec.codes_shape)

    def codes(self, spec: WeightSpec, parts: Parts, start: int, stop: int) -> torch.Tensor:
        first = start // ROWS
        tiles = parts["qdata"][:, first : -(-stop // ROWS)]
        codes = self._unsigned(_unpacked(tiles, spec.qtype.bits), spec.qtype)
        codes = codes[start - ROWS * first : stop - ROWS * first]
        return codes if spec.qtype.is_packed or spec.qtype.is_unsigned else _typed(codes, spec.qtype)

    def gather(self, spec: WeightSpec, parts: Parts, index: torch.Tensor) -> torch.Tensor:
        rows = spec.matrix_shape[0]
        if index.numel() and (int(index.min()) < 0 or int(index.max()) >= rows):
            raise IndexError(f"index out of range: found {int(index.min())}..{int(index.max())} for {rows} rows")
        codes = self.codes(spec, parts, 0, rows)
        return torch.index_select(codes.view(torch.uint8), 0, index.long()).view(codes.dtype)

    def codes_shape_dtype(self, spec: WeightSpec) -> tuple[torch.Size, torch.dtype]:
        rows, length = spec.matrix_shape
        return torch.Size([length // COLUMNS, rows // ROWS, 32, 4 * spec.qtype.bits]), torch.uint8

    def extra_shapes_dtypes(self, spec: WeightSpec) -> dict[str, tuple[torch.Size, torch.dtype]]:
        rows = spec.matrix_shape[0]
        return {
            "humming_scale": (torch.Size([spec.groups, rows]), self.dtype),
            "humming_zero": (torch.Size([spec.groups if spec.affine else 0, rows]), self.dtype),
            "humming_locks": (torch.Size([LOCKS]), torch.int32),
        }

    def check_unpack(self, parts: Parts) -> None:
        gpu_layout.EXEC.check_unpack(parts)

    def _signed(self, codes: torch.Tensor, kind: qtype) -> torch.Tensor:
        """int8 codes as humming counts them: from the smallest one on; for bfloat16 sign bit and magnitude."""
        if not _is_int8(kind):
            return codes
        return torch.where(codes > 127, codes ^ 127, codes) if self.dtype == torch.bfloat16 else codes ^ 128

    _unsigned = _signed  # both are their own inverse


#: The layouts by dtype of the activations.
LAYOUTS = {dtype: register_layout(HummingLayout(dtype)) for dtype in (torch.bfloat16, torch.float16)}


def _is_int8(kind: qtype) -> bool:
    return kind.bits == 8 and not kind.is_unsigned and not kind.is_floating_point


def _bytes_of(plain: torch.Tensor, kind: qtype, length: int) -> torch.Tensor:
    """Plain codes as uint8 ``[rows, K]``."""
    return unpack(plain, kind.bits, length) if kind.is_packed else plain.view(torch.uint8)


def _typed(codes: torch.Tensor, kind: qtype) -> torch.Tensor:
    return codes.contiguous().view(kind.storage_dtype)


def _order(bits: int) -> list[int]:
    """Which of a word's codes along a thread's 32 is at each place of the word: the even ones, then the odd ones."""
    count = 32 // bits
    return [*range(0, count, 2), *range(1, count, 2)]


def _packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 ``[N, K]`` -> uint8 ``[K / 16, N / 64, 32, 4 * bits]``, N a multiple of 64, K of 16."""
    rows, length = codes.shape
    # Row 64 a + 16 b + 8 c + d and column 16 e + 8 f + 2 g + h: code (b, c, f, h) of thread (d, g) in tile (e, a).
    tiles = codes.view(rows // 64, 4, 2, 8, length // 16, 2, 4, 2).permute(4, 0, 3, 6, 1, 2, 5, 7)
    words = tiles.reshape(length // 16, rows // 64, 32, bits, 32 // bits)[..., _order(bits)].flatten(-2)
    return pack(words, bits) if bits < 8 else words


def _unpacked(tiles: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `_packed`."""
    columns, rows = tiles.shape[:2]
    words = unpack(tiles, bits, 32) if bits < 8 else tiles
    words = words.reshape(columns, rows, 32, bits, 32 // bits)
    back = torch.empty_like(words)
    back[..., _order(bits)] = words
    codes = back.view(columns, rows, 8, 4, 4, 2, 2, 2).permute(1, 4, 5, 2, 0, 6, 3, 7)
    return codes.reshape(rows * 64, columns * 16)


def made_from(parts: Parts) -> tuple[int, ...] | None:
    """Versions of the stored scales and shifts, which change with their values; None: inference tensors have none."""
    stored = [parts[name] for name in ("scale", "shift", "row_scale", "row_shift") if name in parts]
    return None if any(part.is_inference() for part in stored) else tuple(part._version for part in stored)


def zero_points(scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """``shift / scale``, float32; 0 where both are 0. Where only the scale is, no zero point stands for the shift: inf."""
    zero = shift.float() / scale.float()
    return torch.where(shift == 0, torch.zeros_like(zero), zero)


def ordered(values: torch.Tensor, *, per_row: bool) -> torch.Tensor:
    """``[N, G]`` in the order in which a thread needs them: ``[G, N]``.

    Args:
        per_row: they are applied to the result, whose fragments hold other rows than those of the weight.
    """
    values = values.t().contiguous()
    shape = values.shape
    if per_row:  # rows 8 a + 2 b + c of 32: (b, a, c)
        return values.view(shape[0], -1, 4, 4, 2).transpose(2, 3).reshape(shape)
    return values.view(shape[0], shape[1] // 64, 8, 8).transpose(2, 3).reshape(shape)
