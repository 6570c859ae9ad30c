"""Optimizers, which choose scale and shift of a weight, with the names and the arithmetic of optimum-quanto 0.2.7.

An optimizer returns the same as optimum-quanto's, bit for bit, in the weight's dtype. With an optimizer,
:func:`requanto.quantize` also computes the codes as optimum-quanto does (:func:`quantize_as_quanto`). Without one, Requanto
searches in float32 (`requanto.scales`), which is more accurate for 16-bit weights.

    symmetric  scale = absmax / qmax                         w ~ scale * code
    affine     scale = (max - min) / (2^b - 1), shift = -min w ~ scale * code - shift

HQQ: Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models".
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch

from requanto.dtypes.bit_packing import pack
from requanto.dtypes.qtypes import qtype
from requanto.scales.quanto import affine_codes, group, symmetric_codes
from requanto.tensor.qtensor import QTensor


class Optimizer(ABC):
    """Chooses the scale, or scale and shift, of a float tensor."""

    @abstractmethod
    def __call__(self, base: torch.Tensor, qtype: qtype, axis: int | None = None, **options: Any) -> Any: ...


class SymmetricOptimizer(Optimizer):
    """Optimizer for symmetric codes: a scale, no shift. Subclasses define :meth:`optimize`."""

    def __call__(self, base: torch.Tensor, qtype: qtype, axis: int | None = None) -> torch.Tensor:  # type: ignore[override]
        """The scale.

        Args:
            base: float tensor.
            qtype: type of the codes.
            axis: axis with separate scales (0 or -1), or None: one scale.

        Returns:
            In base's dtype, of size 1 except for ``axis``; a scalar if axis is None or has size 1.
        """
        if axis not in (None, 0, -1):
            raise ValueError(f"axis must be None, 0 (first axis) or -1 (last axis), found {axis!r}")
        if axis is not None and base.shape[axis] == 1:
            axis = None
        scale = self.optimize(base, qtype, axis)
        _require_dtype(self, scale, base)
        return scale

    @abstractmethod
    def optimize(self, base: torch.Tensor, qtype: qtype, axis: int | None = None) -> torch.Tensor:
        """The scale; see :meth:`__call__`."""


class AbsmaxOptimizer(SymmetricOptimizer):
    """Maps the largest magnitude to the largest code."""

    def optimize(self, base: torch.Tensor, qtype: qtype, axis: int | None = None) -> torch.Tensor:
        magnitude = base.abs()
        if axis is None:
            return magnitude.max() / qtype.qmax
        return magnitude.amax(_others(base, axis), keepdim=True) / qtype.qmax


class AffineOptimizer(Optimizer):
    """Optimizer for codes with a shift. Subclasses define :meth:`optimize`."""

    def __call__(  # type: ignore[override]
        self,
        base: torch.Tensor,
        qtype: qtype,
        axis: int,
        group_size: int | None = None,
        zeropoint: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and shift.

        Args:
            base: float tensor.
            qtype: type of the codes.
            axis: 0 or -1.
            group_size: number of weights that share a scale; None: one scale along ``axis``.
            zeropoint: return a uint8 zero point instead of a float shift.
        """
        if axis not in (0, -1):
            raise ValueError(f"axis must be 0 (first axis) or -1 (last axis), found {axis!r}")
        if group_size is not None:
            base = group(base, axis, group_size, pad=base.dim() > 2)
        scale, shift = self.optimize(base, qtype, None if base.shape[axis] == 1 else axis)
        _require_dtype(self, scale, base)
        _require_dtype(self, shift, base)
        if zeropoint:
            shift = torch.clamp(torch.round(shift / scale), 0, 2**qtype.bits - 1).to(torch.uint8)
        return scale, shift

    @abstractmethod
    def optimize(self, base: torch.Tensor, qtype: qtype, axis: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and shift of an already grouped tensor; see :meth:`__call__`."""


class MaxOptimizer(AffineOptimizer):
    """Maps the smallest and the largest value to the first and the last code."""

    def optimize(self, base: torch.Tensor, qtype: qtype, axis: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        # One row (axis None) is one group. optimum-quanto gives each of its columns a scale of 0, hence NaN weights.
        others = list(range(base.dim())) if axis is None else _others(base, axis)
        low, high = base.amin(others, keepdim=True), base.amax(others, keepdim=True)
        return (high - low) / (2**qtype.bits - 1), -low


class HqqOptimizer(MaxOptimizer):
    """Starts from :class:`MaxOptimizer` and changes the shift to reduce an l_p norm of the error, p < 1.

    Args:
        lp_norm: p.
        beta: weight of the quadratic term.
        kappa: factor of beta per step.
        iters: most steps; it stops earlier when the mean error no longer falls.
        verbose: print the error of each step.
    """

    def __init__(
        self,
        lp_norm: float = 0.7,
        beta: float = 10.0,
        kappa: float = 1.01,
        iters: int = 20,
        verbose: bool = False,
    ) -> None:
        self.lp_norm, self.beta, self.kappa, self.iters, self.verbose = lp_norm, beta, kappa, iters, verbose

    def optimize(self, base: torch.Tensor, qtype: qtype, axis: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        scale, shift = super().optimize(base, qtype, axis)
        beta, mean_axis = self.beta, (0 if axis == -1 else -1)
        codes = affine_codes(base, qtype.bits, scale, shift)
        error = base - (scale * codes - shift)
        best = float(error.abs().mean())
        if self.verbose:
            print(f"HQQ start error: {best:.6f}")
        for step in range(self.iters):
            shrunk = _shrink(error, beta, self.lp_norm)
            moved = torch.mean(codes * scale - (base - shrunk), dim=mean_axis, keepdim=True)
            codes = affine_codes(base, qtype.bits, scale, moved)
            error = base - (scale * codes - moved)
            mean = float(error.abs().mean())
            if self.verbose:
                print(f"HQQ error at step {step}: {mean:.6f}")
            if mean >= best:
                break
            best, shift = mean, moved
            beta *= self.kappa
        return scale, shift


def _shrink(x: torch.Tensor, beta: float, p: float) -> torch.Tensor:
    """The proximal operator of the l_p norm (generalized soft threshold)."""
    magnitude = x.abs()
    threshold = 1.0 / beta if p == 1 else (1.0 / beta) * magnitude.pow(p - 1)
    return x.sign() * torch.relu(magnitude - threshold)


def _others(base: torch.Tensor, axis: int) -> list[int]:
    return list(range(1, base.dim())) if axis == 0 else list(range(base.dim() - 1))


def _require_dtype(optimizer: Optimizer, found: torch.Tensor, base: torch.Tensor) -> None:
    if found.dtype != base.dtype:
        raise TypeError(
            f"{type(optimizer).__name__}.optimize must return the dtype of the weight, {base.dtype}, found {found.dtype}"
        )


def default_optimizer(kind: qtype) -> Optimizer:
    """optimum-quanto's default optimizer: absmax for 8 bits, minimum and maximum below."""
    return AbsmaxOptimizer() if kind.bits == 8 else MaxOptimizer()


def check_optimizer(optimizer: Optimizer, kind: qtype, name: str = "optimizer") -> None:
    """Checks that an optimizer can be used for a type.

    Raises:
        ValueError: it is symmetric below 8 bits or affine for 8, or optimum-quanto does not have the type.
        TypeError: it is not an Optimizer.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"{name} must be a requanto Optimizer, found {type(optimizer).__name__}")
    if kind.is_codebook or kind.is_unsigned:
        raise ValueError(f"{name}: optimizers support signed integers and float8 only, found {kind.name}")
    if isinstance(optimizer, SymmetricOptimizer) != (kind.bits == 8):
        wanted = "a SymmetricOptimizer such as AbsmaxOptimizer" if kind.bits == 8 else "an AffineOptimizer"
        raise ValueError(f"{name}: {kind.name} weights need {wanted}, found {type(optimizer).__name__}")


def quantize_as_quanto(
    weight: torch.Tensor,
    kind: qtype,
    optimizer: Optimizer | None = None,
    group_size: int | None = None,
    *,
    transposed: bool = False,
    name: str = "weight",
) -> QTensor:
    """The QTensor with the codes, scales and shifts of optimum-quanto for this optimizer.

    Args:
        weight: float tensor of two axes or more, rows first (``[..., K, N]`` with ``transposed``).
        kind: type of the codes.
        optimizer: None: optimum-quanto's default.
        group_size: a divisor of the row length, only below 8 bits; None: one scale per row.
        transposed: quantize along the second-to-last axis.
        name: name of the weight in messages.

    Raises:
        ValueError: the optimizer does not support the type, or the weight contains NaN or Inf.
    """
    optimizer = optimizer or default_optimizer(kind)
    check_optimizer(optimizer, kind, name)
    canonical = weight.detach().transpose(-1, -2) if transposed else weight.detach()
    rows = canonical.shape[0]
    if kind.bits == 8:
        scale, shift = optimizer(canonical, kind, axis=0), None
    else:
        # A row without groups is one group.
        length = canonical.numel() // max(1, rows)
        scale, shift = optimizer(canonical, kind, axis=0, group_size=group_size or length)
    if not bool(torch.isfinite(scale).all()):
        raise ValueError(f"{name} holds NaN or Inf and cannot be quantized; repair it, or exclude this layer")
    # A row or group of equal weights has scale 0. Its codes are all 0, so any other scale gives the same weights.
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    if kind.bits == 8:
        codes = symmetric_codes(canonical, kind.dtype, scale)
        qdata, group_size = codes, None
    else:
        grouped = canonical.reshape(scale.shape[0], -1)
        qdata = pack(affine_codes(grouped, kind.bits, scale, shift).view(rows, -1), kind.bits)
        group_size = None if scale.shape[0] == rows else group_size
        shift = shift.reshape(rows, -1)
    return QTensor(
        qdata,
        scale.reshape(rows, -1) if scale.numel() > 1 else scale.reshape(1, 1).expand(rows, 1).contiguous(),
        shift,
        qtype=kind,
        shape=weight.shape,
        dtype=weight.dtype,
        group_size=group_size,
        transposed=transposed,
    )
