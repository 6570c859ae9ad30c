"""Codes and scales of cached keys or values ``[batch, heads, tokens, channels]``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from requanto.dtypes.float8 import from_float8, to_float8
from requanto.dtypes.qtypes import qtype

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Coded(NamedTuple):
    """Quantized tokens.

    ``codes`` is ``[batch, heads, tokens, width]``: int8, uint8 bytes of float8 values, or uint8 with 2 or 4 codes each,
    where lane i holds the i-th part of the channels. ``scale`` and ``shift`` (only below 8 bits) are in the dtype of
    the values and have the shape ``[batch, heads, blocks, channels]`` (a scale per channel) or ``[batch, heads, tokens,
    groups]``.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    shift: torch.Tensor | None


@dataclass(frozen=True)
class Codec:
    """Quantizes tokens: a value is ``code * scale``, below 8 bits ``code * scale + shift``.

    Attributes:
        kind: type of the codes.
        per: "channel": one scale for each channel of a block of ``size`` tokens; "token": one for each group of up to
            ``size`` channels of a token.
        size: see ``per``.
    """

    kind: qtype
    per: Literal["channel", "token"]
    size: int

    @property
    def affine(self) -> bool:
        """True if there is a shift."""
        return self.kind.bits < 8

    @property
    def code_dtype(self) -> torch.dtype:
        """dtype of the stored codes."""
        return torch.int8 if self.kind.bits == 8 and not self.kind.is_floating_point else torch.uint8

    def width(self, channels: int) -> int:
        """Bytes of the codes of a token."""
        return -(-channels // (8 // self.kind.bits))

    def groups(self, channels: int) -> int:
        """Scales of a token or of a block."""
        return channels if self.per == "channel" else channels // group_size(channels, self.size)

    @torch.no_grad()
    def encode(self, x: torch.Tensor) -> Coded:
        """Quantizes ``[batch, heads, tokens, channels]``; with scales per channel, tokens is a multiple of ``size``."""
        work = self._grouped(x if x.element_size() >= 4 else x.float())
        dim = 3 if self.per == "channel" else 4
        if self.affine:
            low, high = work.amin(dim), work.amax(dim)
            shift = low.to(x.dtype)
            scale = _rounded_up((high - low) / self._levels, shift, self._levels)
            codes = ((work - _spread(shift, dim, work)) / _spread(scale, dim, work)).round_().clamp_(0, self._levels)
        else:
            shift = None
            absmax = work.abs().amax(dim)
            scale = _rounded_up(absmax / self._levels, absmax.new_zeros((), dtype=x.dtype), self._levels)
            codes = (work / _spread(scale, dim, work)).clamp_(-self._levels, self._levels)
            codes = codes if self.kind.is_floating_point else codes.round_()
        return Coded(self._packed(codes.view(x.shape)), scale, shift)

    def decode(self, coded: Coded, out: torch.Tensor) -> torch.Tensor:
        """Writes the values to ``out`` ``[batch, heads, tokens, channels]`` and returns it.

        Scales per channel may have blocks of ``size`` tokens, or, with as many scales as tokens, one for each token.
        """
        self._write_codes(coded.codes, out)
        if self.per == "channel" and coded.scale.shape[2] == out.shape[2]:
            out.mul_(coded.scale)
            return out if coded.shift is None else out.add_(coded.shift)
        grouped = self._grouped(out)
        dim = 3 if self.per == "channel" else 4
        grouped.mul_(coded.scale.unsqueeze(dim))
        if coded.shift is not None:
            grouped.add_(coded.shift.unsqueeze(dim))
        return out

    @property
    def _levels(self) -> float:
        """The largest code; float8 has its largest value."""
        if self.affine:
            return 2**self.kind.bits - 1
        return self.kind.qmax

    def _grouped(self, x: torch.Tensor) -> torch.Tensor:
        """``[.., blocks, size, channels]`` or ``[.., tokens, groups, group]``."""
        if self.per == "channel":
            return x.unflatten(2, (x.shape[2] // self.size, self.size))
        size = group_size(x.shape[3], self.size)
        return x.unflatten(3, (x.shape[3] // size, size))

    def _packed(self, codes: torch.Tensor) -> torch.Tensor:
        bits = self.kind.bits
        if self.kind.is_floating_point:
            return to_float8(codes, self.kind.dtype).view(torch.uint8)
        if bits == 8:
            return codes.to(torch.int8)
        lanes, width = 8 // bits, self.width(codes.shape[-1])
        codes = codes.to(torch.uint8)
        if codes.shape[-1] != lanes * width:
            codes = torch.nn.functional.pad(codes, (0, lanes * width - codes.shape[-1]))
        packed = codes[..., :width].clone()
        for lane in range(1, lanes):
            packed |= codes[..., lane * width : (lane + 1) * width] << (bits * lane)
        return packed

    def _write_codes(self, codes: torch.Tensor, out: torch.Tensor) -> None:
        bits = self.kind.bits
        if self.kind.is_floating_point:
            _write_float8(codes, self.kind, out)
        elif bits == 8:
            out.copy_(codes)
        else:
            # A lane is a run of channels: shifts and masks work on whole rows, and each part of a row is written once.
            for lane in range(8 // bits):
                part = out[..., lane * codes.shape[-1] : (lane + 1) * codes.shape[-1]]
                one = codes if lane == 0 else codes >> (bits * lane)
                one = one if lane == 8 // bits - 1 else one & (2**bits - 1)
                part.copy_(one[..., : part.shape[-1]])


def group_size(channels: int, largest: int) -> int:
    """The largest divisor of ``channels`` from ``largest`` down to its half; if there is none, all channels."""
    if channels <= largest:
        return channels
    for size in range(largest, largest // 2 - 1, -1):
        if size and channels % size == 0:
            return size
    return channels


def _spread(part: torch.Tensor, dim: int, like: torch.Tensor) -> torch.Tensor:
    return part.to(like.dtype).unsqueeze(dim)


def _rounded_up(scale: torch.Tensor, shift: torch.Tensor, levels: float) -> torch.Tensor:
    """The scale in the dtype of ``shift``, rounded up so that the largest value has a code, but not beyond the dtype.

    0 (all values are the same) becomes 1. No ``levels * scale`` is beyond the dtype either: in float16, the values of a
    group with a shift that are more than 65504 above the lowest one are read as 65504 above it.
    """
    dtype, largest = shift.dtype, torch.finfo(shift.dtype).max
    short = scale.to(dtype)
    short = torch.where(short.to(scale.dtype) < scale, _neighbour(short, 1), short)
    beyond = shift.to(scale.dtype) + short.to(scale.dtype) * levels > largest
    short = torch.where(beyond & short.isfinite(), _neighbour(short, -1), short)
    limit = torch.full_like(short, largest / levels)
    limit = torch.where(limit.to(scale.dtype) * levels > largest, _neighbour(limit, -1), limit)
    short = torch.where(scale.isfinite(), torch.minimum(short, limit), short)
    return torch.where(short == 0, torch.ones_like(short), short)


def _neighbour(positive: torch.Tensor, step: int) -> torch.Tensor:
    """The next number of the dtype above (step 1) or below (step -1)."""
    word = positive.contiguous().view(_WORDS[positive.element_size()])
    return (word + step).view(positive.dtype)


def _write_float8(codes: torch.Tensor, kind: qtype, out: torch.Tensor) -> None:
    """Converts float8 bytes to floats. On a CPU, torch's conversion takes ten times as long as these integer operations."""
    if codes.device.type != "cpu" or torch.compiler.is_compiling() or out.dtype == torch.float64:
        out.copy_(from_float8(codes.view(kind.dtype), out.dtype))
        return
    mantissa = 3 if kind.dtype == torch.float8_e4m3fn else 2
    word = _WORDS[out.element_size()]
    own = {torch.float16: 10, torch.bfloat16: 7, torch.float32: 23}[out.dtype]
    # Sign, exponent and mantissa move to their places; the difference of the exponents' biases is a factor.
    bits = codes.view(torch.int8).to(word)
    bits = (bits << (own - mantissa)).bitwise_and_(torch.iinfo(word).min | ((1 << (7 + own - mantissa)) - 1))
    out.copy_(bits.view(out.dtype))
    bias = {torch.float16: 15}.get(out.dtype, 127) - (7 if mantissa == 3 else 15)
    out.mul_(2.0**bias)
