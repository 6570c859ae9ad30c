"""Scales and zero points of packed int4 weights in the layouts that kernels read.

torch's operator needs them in x's dtype, in pairs. Those of float scales are cached per dtype in addition to the stored ones
(an eighth of the codes' bytes for groups of 64 in bfloat16). Those of scales in blocks would take a quarter: their codes are
cached in the kernels' order, and the pairs made anew in each call, which takes less time than the operator.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from requanto.runtime.buffers import scratch_buffer
from requanto.runtime.tracing import without_ambient_state
from requanto.scales.compact import unpack_codes
from requanto.tensor.layout import Parts
from requanto.tensor.parts import float_scale, float_shift
from requanto.tensor.qtensor import QTensor
from requanto.tensor.spec import WeightSpec

if TYPE_CHECKING:
    from requanto.linear.cpu.int4 import Packed


class Scales:
    """Scales and zero points in the layouts that kernels read, cached in the weight's storage.

    They are recomputed after in-place changes of the weight's scale or shift. Changes through ``scale.data`` are not
    detected, because torch does not count them; assign ``weight.scale`` instead.
    """

    def __init__(self, spec: WeightSpec, parts: Parts) -> None:
        self._spec = spec
        names = ("scale", "shift", "row_scale", "row_shift")
        self._parts = {name: parts[name] for name in names if name in parts}
        self._pairs: dict[torch.dtype, torch.Tensor] = {}
        self._words: torch.Tensor | None = None
        self._state: list[tuple[int, int]] = []

    @staticmethod
    def of(weight: QTensor) -> Scales:
        """The cached object of a weight."""
        derived = weight._storage.derived  # before the parts: a change in another thread replaces this dictionary
        found = derived.get("int4 scales")
        if found is None:
            kind = Scales if weight._spec.scale_block is None else BlockScales
            found = derived["int4 scales"] = kind(weight._spec, weight._storage.parts)
        return found

    def _refresh(self) -> None:
        state = [(part.data_ptr(), part._version) for part in self._parts.values()]
        if state != self._state:
            self._forget()
            self._state = state

    def _forget(self) -> None:
        """Drops what was computed from the parts."""
        self._pairs, self._words = {}, None

    @property
    def nbytes(self) -> int:
        """Bytes of the cached tensors."""
        words = 0 if self._words is None else self._words.nbytes
        return words + sum(pairs.nbytes for pairs in list(self._pairs.values()))

    def pairs(self, codes: Packed, dtype: torch.dtype) -> torch.Tensor:
        """Scale and zero point, ``[groups, padded N, 2]``, with ``w = (code - 8) * scale + zero``.

        To be read before the next call: it may be a scratch buffer.
        """
        self._refresh()
        found, words = self._pairs.get(dtype), self._words
        if found is None and dtype == torch.bfloat16 and words is not None:
            blocks = words.view(len(codes.blocks), -1, codes.block)
            found = blocks.transpose(0, 1).reshape(blocks.shape[1], -1, 1).view(torch.bfloat16)
            self._pairs[dtype], self._words = found, None
        if found is None:
            found = self._pairs[dtype] = self._make_pairs(codes, dtype)
        return found

    def words(self, codes: Packed, part: slice) -> torch.Tensor:
        """`pairs` in bfloat16 in the order of blocks, int32 ``[blocks of the part * K / group, 1, 2, block / 2]``.

        The lower half of a word is the scale, the upper half the zero point. Compiled kernels read it (`cpu.aot.calls`),
        for many rows of x. Only the order used last is cached, and the other one is converted from it, once per prompt:
        caching both would take an eighth of the codes' bytes more.

        Args:
            part: of the weight's blocks.
        """
        self._refresh()
        found = self._words
        if found is None:
            found = self._words = words_of(self.pairs(codes, torch.bfloat16), codes.block)
            self._pairs.pop(torch.bfloat16, None)
        return found[part.start * codes.groups : part.stop * codes.groups]

    def _make_pairs(self, codes: Packed, dtype: torch.dtype) -> torch.Tensor:
        with without_ambient_state():
            scale = float_scale(self._spec, self._parts).float().reshape(codes.out_features, -1)
            shift = float_shift(self._spec, self._parts)
            if shift is None:
                zero = torch.zeros_like(scale)
            else:
                shift = shift.float().reshape(codes.out_features, -1)
                zero = self._spec.qtype.zero_code * scale - shift
                if codes.flat.numel():
                    # A group of equal weights has codes of 0 and a scale of 1. If the shift is tiny, adding the scale would
                    # lose it.
                    zero = torch.where(codes.flat, -shift, zero)
                    scale = scale.masked_fill(codes.flat, 0)
            pad_columns, pad_rows = codes.groups - scale.shape[1], len(codes.codes) - codes.out_features
            if pad_columns or pad_rows:
                scale, zero = (torch.nn.functional.pad(part, (0, pad_columns, 0, pad_rows)) for part in (scale, zero))
            return torch.stack([scale.t(), zero.t()], dim=2).to(dtype).contiguous()


class BlockScales(Scales):
    """Those of scales in blocks of a row. Only the codes are cached, as bytes ``[1 or 2, groups, padded N]``."""

    def __init__(self, spec: WeightSpec, parts: Parts) -> None:
        super().__init__(spec, parts)
        self._names = ("scale", "shift") if spec.affine else ("scale",)
        self._codes: torch.Tensor | None = None

    def _forget(self) -> None:
        self._codes = None

    @property
    def nbytes(self) -> int:
        return 0 if self._codes is None else self._codes.nbytes

    def pairs(self, codes: Packed, dtype: torch.dtype) -> torch.Tensor:
        return self._pairs_of(codes, dtype, slice(0, len(codes.codes)))

    def words(self, codes: Packed, part: slice) -> torch.Tensor:
        rows = slice(part.start * codes.block, part.stop * codes.block)
        return words_of(self._pairs_of(codes, torch.bfloat16, rows), codes.block)

    def _pairs_of(self, codes: Packed, dtype: torch.dtype, rows: slice) -> torch.Tensor:
        """`pairs` of some rows, in a scratch buffer."""
        spec, count = self._spec, rows.stop - rows.start
        found = scratch_buffer((codes.groups, count, 2), dtype, slot=12)
        pairs = found[: spec.groups]
        if codes.groups > spec.groups:
            found[spec.groups :] = 0
        numbers = self._numbers(codes, rows)
        scale, zero = numbers[0], numbers[1] if spec.affine else None
        if zero is not None:  # it holds minus the shift
            zero.add_(scale, alpha=spec.qtype.zero_code)
        if dtype != torch.bfloat16:
            pairs[:, :, 0] = scale
            pairs[:, :, 1] = 0 if zero is None else zero
        else:  # rounded as integers: torch's conversion to every second element takes four times as long
            words = numbers.view(torch.int32).add_(0x8000)
            low = words[0].bitwise_right_shift_(16)
            low = low.bitwise_and_(0xFFFF) if spec.signed else low
            out = pairs.view(torch.int32).squeeze(-1)
            if zero is None:
                out.copy_(low)
            else:
                torch.bitwise_or(low, words[1].bitwise_and_(-(2**16)), out=out)
        return found

    def _numbers(self, codes: Packed, rows: slice) -> torch.Tensor:
        """Scales and minus shifts of some rows: float32 ``[1 or 2, groups, rows]``, in a scratch buffer; 0 in padding."""
        spec, names, blocks = self._spec, self._names, self._spec.scale_blocks
        stored, count = self._stored(codes)[:, :, rows], rows.stop - rows.start
        found = scratch_buffer(tuple(stored.shape), torch.float32, slot=13).copy_(stored)
        if spec.signed and spec.scale_bits is not None:
            found[0].sub_(2 ** (spec.scale_bits - 1))
        factors = scratch_buffer((len(names), blocks, count), torch.float32, slot=14)
        for name, into in zip(names, factors):
            numbers = self._parts[f"row_{name}"].reshape(codes.out_features, blocks)[rows]
            into[:, : len(numbers)] = numbers.t()
            into[:, len(numbers) :] = 0
        if spec.affine:
            factors[1].neg_()
        found.view(len(names), blocks, -1, count).mul_(factors.unsqueeze(2))
        return found

    def _stored(self, codes: Packed) -> torch.Tensor:
        self._refresh()
        found = self._codes
        if found is None:
            spec = self._spec
            with without_ambient_state():
                shape = len(self._names), spec.groups, len(codes.codes)
                found = torch.zeros(shape, dtype=torch.uint8, device="cpu")
                for name, into in zip(self._names, found):
                    packed = self._parts[name].reshape(codes.out_features, -1)
                    into[:, : codes.out_features] = unpack_codes(packed, spec.code_bits[name], spec.groups).t()
            self._codes = found
        return found


def words_of(pairs: torch.Tensor, block: int) -> torch.Tensor:
    """Pairs in bfloat16 ``[groups, rows, 2]`` in the order of blocks (`Scales.words`)."""
    blocks = pairs.view(torch.int32).view(len(pairs), -1, block).transpose(0, 1).contiguous()
    return blocks.view(-1, 1, 2, block // 2)
