"""Rounding to the values of a quantized type, and the search for scale and shift with weighted errors.

`requanto.scales` chooses scales from the weights only. Here every input channel has an importance, derived from samples: how
much an error in it increases the output error.
"""

from __future__ import annotations

import torch

from requanto.dtypes.float8 import rounded_to_float8
from requanto.dtypes.qtypes import qtype
from requanto.scales import blocks
from requanto.scales.codebook import nearest_codes, values_of
from requanto.scales.compact import around_zero, expand_scale, expand_shift, round_scales, whole_zeros
from requanto.scales.weights import _storable


class Grid:
    """Rounding to the codes of one type.

    A "code" in this class is the number that is multiplied by the scale; for a codebook type, the codebook value.

    Args:
        kind: type of the codes; a learned one with its values (`qtype.with_values`).
        affine: values are ``scale * code - shift``, codes ``0 .. 2^bits - 1``; else ``scale * code``, signed codes.
        stored: dtype in which scale and shift will be stored.
        scale_bits: if given, scale and shift are stored in this many bits, relative to one scale per row
            (`requanto.scales.compact`).
        zeros: shifts are whole zero points times the scale.
        unit: NVFP4's number of the tensor, float32 ``[1, 1]`` (`requanto.scales.blocks.tensor_scale`); None for other types.
    """

    def __init__(
        self,
        kind: qtype,
        affine: bool,
        stored: torch.dtype,
        scale_bits: int | None = None,
        unit: torch.Tensor | None = None,
        zeros: bool = False,
    ) -> None:
        self.zeros = zeros
        self.kind, self.affine, self.stored, self.scale_bits, self.unit = kind, affine, stored, scale_bits, unit
        self.low, self.high = (0.0, 2.0**kind.bits - 1) if affine else (float(kind.qmin), float(kind.qmax))
        self.top = kind.span if kind.is_codebook else self.high

    def codes(self, values: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor | None) -> torch.Tensor:
        """Returns the nearest codes as floats; ``scale`` and ``shift`` are broadcast over ``values``."""
        scaled = values / scale if shift is None else (values + shift) / scale
        if self.kind.blocks is not None:
            return blocks.rounded(scaled.float(), self.kind).to(values.dtype)
        if self.kind.is_codebook:
            found = nearest_codes(scaled.float(), self.kind).flatten().to(torch.int32)
            table = values_of(self.kind, found).to(values.dtype)
            return torch.index_select(table, 0, found).view(scaled.shape)
        scaled = scaled.clamp_(self.low, self.high)
        if self.kind.is_floating_point:
            return rounded_to_float8(scaled, self.kind.dtype).to(values.dtype)
        return scaled.round_()

    def values(self, codes: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor | None) -> torch.Tensor:
        """Dequantizes codes."""
        return codes * scale if shift is None else codes * scale - shift

    def round(self, values: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor | None) -> torch.Tensor:
        """Returns the nearest values that can be represented."""
        return self.values(self.codes(values, scale, shift), scale, shift)

    def storable(self, scale: torch.Tensor, shift: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rounds scale and shift of groups as storing does, except for ``scale_bits`` (see :meth:`stored_tables`)."""
        if self.kind.blocks is not None:
            form, unit = self.kind.blocks.scale, None if self.unit is None else self.unit.view(-1)
            return blocks.expand_scale(blocks.nearest_scale(scale.float(), unit, form), unit, form), None
        if self.scale_bits is None and self.zeros and shift is not None:
            scale, shift = around_zero(scale, shift, self.kind)
            scale, _ = _storable(scale, None, self.stored)
            return scale, whole_zeros(scale, shift, self.kind).to(scale.dtype) * scale
        if self.scale_bits is None:
            return _storable(scale, shift, self.stored)
        if shift is not None:  # makes 0 lie within the range of the codes
            low, high = (-shift).clamp(max=0), (scale * self.high - shift).clamp(min=0)
            scale, shift = (high - low) / self.high, -low
        return scale.clamp(min=1e-20), shift

    def stored_tables(
        self, scale: torch.Tensor, shift: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Rounds scale and shift ``[N, G]`` of full rows as storing does; also returns the row scales ``[N, 1]`` or None."""
        scale, shift = self.storable(scale, shift)
        if self.scale_bits is None:
            return scale, shift, None
        bits = self.kind.bits if self.zeros else self.scale_bits
        found = round_scales(scale, shift, self.kind, self.scale_bits, bits)
        scale = expand_scale(found.scale, found.row_scale)
        if found.shift is not None:
            shift = expand_shift(found.shift, scale, self.kind, bits)
        return scale, shift, found.row_scale

    # ------------------------------------------------------------------ scale and shift

    def search(
        self, groups: torch.Tensor, importance: torch.Tensor, steps: int = 24, refits: int = 4
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the scale and shift with the least squared error weighted by importance.

        Clipping ranges from the full range down to 0.3 of it are tried, each refined by one least-squares fit of scale and
        shift to its codes; the best one of each group is refined by ``refits`` more.

        Args:
            groups: float ``[R, g]``.
            importance: ``[g]`` or ``[R, g]``, not negative.
            steps: number of clipping ranges.
            refits: number of least-squares fits of the best one.

        Returns:
            ``[R]`` each, rounded by :meth:`storable`; shift is None if the grid is not affine.
        """
        importance = importance.expand_as(groups)
        low, high = groups.amin(-1), groups.amax(-1)
        top = torch.maximum(-low, high)
        best = torch.full_like(low, torch.inf)
        scale, shift = torch.ones_like(low), (torch.zeros_like(low) if self.affine else None)
        for share in torch.linspace(1.0, 0.3, steps, dtype=torch.float32, device="cpu").tolist():
            if self.affine:
                tried: tuple[torch.Tensor, torch.Tensor | None] = ((high - low) * share / self.high, -low * share)
            else:
                tried = (top * share / self.top, None)
            tried = self.storable(*tried)
            tried = self.fit(groups, importance, *tried)
            best, scale, shift = self._better(groups, importance, best, scale, shift, *tried)
        for _ in range(refits):
            tried = self.fit(groups, importance, scale, shift)
            best, scale, shift = self._better(groups, importance, best, scale, shift, *tried)
        return scale, shift

    def fit(
        self, groups: torch.Tensor, importance: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the least-squares scale and shift for the codes that the given scale and shift produce."""
        codes = self.codes(groups, scale[:, None], None if shift is None else shift[:, None])
        if shift is None:
            square = (importance * codes * codes).sum(-1)
            fitted = (importance * codes * groups).sum(-1) / square
            return self.storable(torch.where((square > 0) & (fitted > 0), fitted, scale), None)
        total = importance.sum(-1)
        mean_code = (importance * codes).sum(-1) / total
        mean = (importance * groups).sum(-1) / total
        centred = codes - mean_code[:, None]
        square = (importance * centred * centred).sum(-1)
        fitted = (importance * centred * groups).sum(-1) / square
        usable = (square > 0) & (fitted > 0) & torch.isfinite(fitted)
        fitted = torch.where(usable, fitted, scale)
        return self.storable(fitted, torch.where(usable, fitted * mean_code - mean, shift))

    def _better(
        self,
        groups: torch.Tensor,
        importance: torch.Tensor,
        best: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor | None,
        new_scale: torch.Tensor,
        new_shift: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        rounded = self.round(groups, new_scale[:, None], None if new_shift is None else new_shift[:, None])
        error = (importance * (rounded - groups).square_()).sum(-1)
        better = error < best
        if shift is not None and new_shift is not None:
            shift = torch.where(better, new_shift, shift)
        return torch.where(better, error, best), torch.where(better, new_scale, scale), shift
