"""The layout ``"strips"`` that all CPU kernels read: 16 rows by 32 columns at a time, in the bits of the type.

A packed weight takes the bytes of the stored one plus its padding (`MAX_PADDING` at most), whatever its bits. Scales and
shifts stay as they are stored, row by row: those of a strip are consecutive bytes, which the library transposes. The library
packs and unpacks codes; where there is none, torch operators do (`requanto.linear.cpu.planes`). Codes are in huge pages
(`requanto.runtime.pages`).
"""

from __future__ import annotations

import torch

from requanto.dtypes.bit_packing import pack, unpack
from requanto.linear.cpu import library, planes
from requanto.runtime import pages
from requanto.tensor.layout import Layout, Parts, register_layout
from requanto.tensor.spec import WeightSpec

#: Most padding, relative to the weight's number of elements.
MAX_PADDING = 1 / 8
#: Most bits of a codebook's codes.
MOST_TABLE_BITS = 6
#: Elements that torch's operators convert at a time.
_STEP = 2**22


class StripsLayout(Layout):
    """Codes as uint8 ``[*lead[:-1], ceil(N / 16), ceil(K / 32) * bits * 64]``; see requanto_cpu/csrc/requanto_cpu.h.

    Scales and shifts are those of the plain layout.
    """

    name = "strips"
    rows_are_views = False
    experts_are_views = True

    def accepts(self, spec: WeightSpec) -> bool:
        kind, group = spec.qtype, spec.group_size
        if kind.is_codebook and kind.bits > MOST_TABLE_BITS:
            return False
        if group is not None and group % 8:
            return False
        if spec.axis == 1:
            return len(spec.shape) == 3 and spec.shape[1] % planes.ROWS == 0
        return spec.axis == 0

    def pack(self, spec: WeightSpec, parts: Parts) -> dict[str, torch.Tensor]:
        (rows, length), bits = spec.matrix_shape, spec.qtype.bits
        shape, _ = self.codes_shape_dtype(spec)
        plain = parts["qdata"].view(torch.uint8).reshape(rows, -1)
        call = library.for_tensors(plain)
        if call is not None:
            strips, plain = pages.empty(tuple(shape), torch.uint8), plain.contiguous()
            call.pack(plain.data_ptr(), bits, rows, length, _flip(spec), strips.data_ptr())
        elif rows:
            made = [planes.to_strips(_plain_codes(part, spec), bits) for part in plain.split(_rows_at_once(length))]
            strips = torch.cat(made).view(shape)
        else:
            strips = torch.empty(shape, dtype=torch.uint8, device=plain.device)
        return {"qdata": strips}

    def unpack(self, spec: WeightSpec, parts: Parts) -> torch.Tensor:
        (rows, length), bits, strips = spec.matrix_shape, spec.qtype.bits, parts["qdata"]
        plain = torch.empty(spec.codes_shape, dtype=torch.uint8, device=strips.device)
        call = library.for_tensors(strips, plain)
        if call is not None:
            call.unpack(strips.data_ptr(), bits, rows, length, _flip(spec), 0, rows, plain.data_ptr())
        elif rows:
            step = _rows_at_once(length)
            codes = [self.codes(spec, parts, start, min(start + step, rows)) for start in range(0, rows, step)]
            made = [pack(one, bits) if spec.qtype.is_packed else one.view(torch.uint8) for one in codes]
            plain = torch.cat(made).view(spec.codes_shape)
        return plain.view(spec.qtype.storage_dtype)

    def codes(self, spec: WeightSpec, parts: Parts, start: int, stop: int) -> torch.Tensor:
        (rows, length), bits, strips = spec.matrix_shape, spec.qtype.bits, parts["qdata"]
        out = torch.empty(stop - start, length, dtype=torch.uint8, device=strips.device)
        call = library.for_tensors(strips, out)
        if call is not None:
            call.codes(strips.data_ptr(), bits, rows, length, _flip(spec), start, stop, None, out.data_ptr())
            return _typed(out, spec)
        first, last = start // planes.ROWS, -(-stop // planes.ROWS)
        found = planes.from_strips(self.matrix(strips)[first:last], bits, length)
        return _from_stored(found[start - first * planes.ROWS : stop - first * planes.ROWS], spec)

    def gather(self, spec: WeightSpec, parts: Parts, index: torch.Tensor) -> torch.Tensor:
        (rows, length), bits, strips = spec.matrix_shape, spec.qtype.bits, parts["qdata"]
        index = checked_index(index, rows)
        out = torch.empty(index.numel(), length, dtype=torch.uint8, device=strips.device)
        call = library.for_tensors(strips, out, index)
        if call is not None:
            count, where = index.numel(), index.data_ptr()
            call.codes(strips.data_ptr(), bits, rows, length, _flip(spec), 0, count, where, out.data_ptr())
            return _typed(out, spec)
        return _from_stored(planes.rows_of_strips(self.matrix(strips), bits, length, index), spec)

    def codes_shape_dtype(self, spec: WeightSpec) -> tuple[torch.Size, torch.dtype]:
        *before, rows = spec.lead
        whole_rows, whole_length = planes.padded(rows, spec.row_length)
        strip = whole_length // planes.COLUMNS * spec.qtype.bits * 64
        return torch.Size([*before, whole_rows // planes.ROWS, strip]), torch.uint8

    @staticmethod
    def matrix(strips: torch.Tensor) -> torch.Tensor:
        """The strips of all experts, ``[strips, bytes of one]``."""
        return strips.reshape(-1, strips.shape[-1])


STRIPS = register_layout(StripsLayout())


def fits(spec: WeightSpec) -> bool:
    """True for weights that this layout accepts, and pads little."""
    rows, length = spec.matrix_shape
    if not rows or not length or not STRIPS.accepts(spec):
        return False
    whole_rows, whole_length = planes.padded(rows, length)
    return whole_rows * whole_length <= (1 + MAX_PADDING) * rows * length


def padding_bytes(spec: WeightSpec) -> int:
    """Bytes that a weight takes more in this layout than stored; 0 for one that stays plain."""
    if not fits(spec):
        return 0
    packed, _ = STRIPS.codes_shape_dtype(spec)  # in bytes
    return packed.numel() - spec.codes_shape.numel() * spec.qtype.storage_dtype.itemsize


def checked_index(index: torch.Tensor, rows: int) -> torch.Tensor:
    """The index as contiguous int64, checked to be in range.

    Raises:
        IndexError: an index is out of range.
    """
    if index.numel():
        low, high = torch.aminmax(index)
        if int(low) < 0 or int(high) >= rows:
            raise IndexError(f"index out of range: found {int(low)}..{int(high)} for {rows} rows")
    return index.to(torch.int64).contiguous()


def _flip(spec: WeightSpec) -> int:
    """What is added to signed 8-bit codes, modulo 256: strips have codes from 0."""
    return 128 if spec.qtype.storage_dtype == torch.int8 else 0


def _rows_at_once(length: int) -> int:
    return max(1, _STEP // max(1, length) // planes.ROWS) * planes.ROWS


def _plain_codes(rows: torch.Tensor, spec: WeightSpec) -> torch.Tensor:
    """The codes of plain rows, uint8 ``[rows, K]``, as strips have them."""
    codes = unpack(rows, spec.qtype.bits, spec.row_length) if spec.qtype.is_packed else rows
    return codes ^ 128 if _flip(spec) else codes


def _from_stored(codes: torch.Tensor, spec: WeightSpec) -> torch.Tensor:
    """The weight's own codes for those of strips."""
    return _typed((codes ^ 128 if _flip(spec) else codes).contiguous(), spec)


def _typed(codes: torch.Tensor, spec: WeightSpec) -> torch.Tensor:
    return codes if spec.qtype.is_packed else codes.view(spec.qtype.dtype)
