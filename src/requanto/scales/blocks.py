"""Types whose scales are stored in 8 bits: NVFP4 and the MX formats.

    nvfp4      e2m1 codes in blocks of 16    scale = e4m3 number * float32 number of the tensor
    mx types   e2m1, e2m3, e3m2, e4m3, e5m2 in blocks of 32    scale = power of two (e8m0)

The MX formats and how a scale follows from a block's largest value ("floor") are those of the OCP Microscaling Formats (MX)
Specification v1.0. In NVFP4 the largest weight of a block becomes 6, the largest code. By default a block tries two scales
and keeps the one of less squared error: in NVFP4 those that make its largest weight 6 and 4, since there is no code between
them (Four Over Six, Cook et al. 2025, arXiv:2512.02010); in MX types the floor and the next power of two. Weights are
rounded to the nearest code, ties to the even one, as conversions to floats do.

NVFP4's float32 number is stored for each row, equal in all rows of a matrix: so weights whose numbers differ can be joined,
and rows multiplied by factors, without rounding.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch

from requanto.dtypes.float8 import to_float8
from requanto.dtypes.qtypes import BlockFormat, qtype
from requanto.runtime.tracing import is_fake, is_tracing, without_ambient_state

#: What the largest block's scale is, as e4m3 number: the largest one, if no block tries a larger scale ...
LARGEST_PLAIN = 448.0
#: ... or one that leaves room for 1.5 times itself, so that the largest weight of the tensor may become 4 instead of 6.
LARGEST_SEARCHED = 256.0
#: What the largest weight of a block may become in NVFP4.
SIX, FOUR = 6.0, 4.0
#: Codes of the largest scale, of that of a block of zeros, of 1, and of the smallest scale of other blocks.
LAST = {"e4m3": 0x7E, "e8m0": 0xFE}
OF_ZEROS = {"e4m3": 0x08, "e8m0": 0}
ONE = {"e4m3": 0x38, "e8m0": 0x7F}
FIRST = {"e4m3": 1, "e8m0": 0}


def _value(code: int, form: str) -> float:
    """The number that a byte stands for."""
    if form == "e8m0":
        return math.nan if code == 0xFF else 2.0 ** (code - 127)
    sign, exponent, mantissa = -1 if code & 0x80 else 1, code >> 3 & 0xF, code & 7
    if code & 0x7F == 0x7F:
        return math.nan
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


_NUMBERS = {form: tuple(_value(code, form) for code in range(256)) for form in ("e4m3", "e8m0")}


def decoded(codes: torch.Tensor, form: str) -> torch.Tensor:
    """float32 numbers of stored scales (uint8, any shape); NaN for the codes that stand for none."""
    if is_tracing() or is_fake(codes):  # a tensor that is made while tracing must not be cached
        table = torch.tensor(_NUMBERS[form], dtype=torch.float32, device=codes.device)
    else:
        table = _table(form, codes.device)
    return torch.index_select(table, 0, codes.flatten().to(torch.int32)).view(codes.shape)


@functools.lru_cache(maxsize=64)
def _table(form: str, device: torch.device) -> torch.Tensor:
    with without_ambient_state():
        return torch.tensor(_NUMBERS[form], dtype=torch.float32, device=device)


def expand_scale(codes: torch.Tensor, row_scale: torch.Tensor | None, form: str) -> torch.Tensor:
    """float32 scales ``[..., G]`` from their stored codes and, of NVFP4, the rows' scales ``[..., 1]``."""
    scale = decoded(codes, form)
    return scale if row_scale is None else scale * row_scale.to(torch.float32)


# ---------------------------------------------------------------------- scales


def tensor_scale(largest: torch.Tensor, kind: qtype, searched: bool) -> torch.Tensor:
    """NVFP4's float32 scale for tensors with these largest absolute weights, any shape; 1 for tensors of zeros."""
    most = _largest(kind) * (LARGEST_SEARCHED if searched else LARGEST_PLAIN)
    scale = (largest.to(torch.float32) / most).clamp_(min=torch.finfo(torch.float32).tiny)
    return scale.masked_fill_(largest == 0, 1.0)


def scale_codes(
    groups: torch.Tensor,
    kind: qtype,
    row_scale: torch.Tensor | None,
    search: str | Callable[..., tuple[torch.Tensor, torch.Tensor | None]],
) -> torch.Tensor:
    """Codes of the scales, uint8 ``[rows, G]``.

    Args:
        groups: float32 ``[rows, G, group]``.
        kind: a type with `qtype.blocks`. In MX types, blocks with NaN or Inf get the code for NaN.
        row_scale: float32 ``[rows, 1]`` of NVFP4, else None.
        search: ``"minmax"``: the rule of the format; ``"mse"``: the better of two; or a function whose scales are rounded.
    """
    form = _form(kind).scale
    if callable(search):
        return nearest_scale(search(groups, kind, False)[0], row_scale, form)
    if (
        groups.shape[:2].numel() == 1
    ):  # torch divides a single sum among its threads, whose number changes the last bits
        row_scale = None if row_scale is None else row_scale.expand(2, 1)
        return scale_codes(groups.expand(2, -1, -1).contiguous(), kind, row_scale, search)[:1]
    largest = _largest_of(groups)
    plain = plain_codes(largest, kind, row_scale)
    if search == "minmax":
        return plain
    best, chosen = torch.full_like(largest, math.inf), plain
    if form == "e4m3":
        other = nearest_scale(largest / FOUR, row_scale, form)
    else:
        other = plain.to(torch.int16).add_(1).clamp_(max=LAST[form]).to(torch.uint8)
    for codes in (plain, other):
        scale = expand_scale(codes, row_scale, form)
        scaled = groups / scale.unsqueeze(-1)
        error = torch.linalg.vector_norm(rounded(scaled, kind).sub_(scaled), dim=-1).mul_(scale)
        better = error < best
        best, chosen = torch.where(better, error, best), torch.where(better, codes, chosen)
    return chosen.masked_fill_(largest == 0, OF_ZEROS[form])


def _largest_of(groups: torch.Tensor) -> torch.Tensor:
    """Largest absolute value of each group, ``[rows, G]``; NaN for groups with NaN."""
    # A pooling of neighbours takes a third of the time of `amax`, which is not vectorized for few elements.
    rows = groups.abs().reshape(groups.shape[0], 1, -1)
    return torch.nn.functional.max_pool1d(rows, groups.shape[-1]).squeeze(1)


def plain_codes(largest: torch.Tensor, kind: qtype, row_scale: torch.Tensor | None) -> torch.Tensor:
    """Codes of the scales that the format's rule gives blocks with these largest absolute values, uint8 ``[rows, G]``."""
    form = _form(kind).scale
    if form == "e4m3":
        return nearest_scale(largest / SIX, row_scale, form)
    # Floor: the largest power of two in the block over that among the codes. From the bits, as torch.log2 may round up.
    exponent = largest.view(torch.int32).bitwise_right_shift(23) - math.floor(math.log2(_largest(kind)))
    return exponent.clamp_(0, LAST[form]).masked_fill_(~torch.isfinite(largest), 0xFF).to(torch.uint8)


def nearest_scale(scale: torch.Tensor, row_scale: torch.Tensor | None, form: str) -> torch.Tensor:
    """Codes of the nearest scales (e8m0: nearest exponent) to float32 ``[rows, G]``; not 0 unless the scale is."""
    zero = scale == 0
    if form == "e8m0":
        exponent = torch.log2(scale).round_().add_(127)
        return exponent.clamp_(0, LAST[form]).to(torch.int32).to(torch.uint8).masked_fill_(zero, OF_ZEROS[form])
    relative = scale if row_scale is None else scale / row_scale
    codes = to_float8(relative.clamp(max=LARGEST_PLAIN), torch.float8_e4m3fn).view(torch.uint8)
    return codes.clamp_(min=FIRST[form]).masked_fill_(zero, OF_ZEROS[form])


# ---------------------------------------------------------------------- codes


def rounded(scaled: torch.Tensor, kind: qtype) -> torch.Tensor:
    """The values of the codes nearest to float32 ``scaled``, of the same shape.

    Ties go to the even code, what is beyond the largest value becomes that, and NaN stays NaN.
    """
    form = _form(kind)
    limit = _largest(kind)
    scaled = scaled.clamp(-limit, limit)
    # Steps between neighbours: 2^(exponent - mantissa bits), with the exponent of the smallest normal number below that one.
    # Adding 1.5 * 2^23 steps makes float32 round to whole steps.
    smallest = 127 + form.smallest_exponent
    power = scaled.view(torch.int32).bitwise_and(0x7F800000).clamp_(min=smallest << 23).view(torch.float32)
    magic = power.mul_(1.5 * 2.0 ** (23 - form.mantissa))
    return scaled.add_(magic).sub_(magic)


def encoded(values: torch.Tensor, kind: qtype) -> torch.Tensor:
    """The codes of float32 values that `rounded` returned: float8 for codes of 8 bits, else uint8 bit patterns."""
    if not kind.is_packed:
        return to_float8(values, kind.dtype)  # exact
    form = _form(kind)
    # float16 has the same fields with more bits: times a power of two, its exponent is that of the code.
    bits = (values * 2.0 ** (1 - form.smallest_exponent - 15)).to(torch.float16).view(torch.int16)
    size = bits.bitwise_right_shift(10 - form.mantissa).bitwise_and_(2 ** (kind.bits - 1) - 1)
    sign = bits.bitwise_right_shift_(16 - kind.bits).bitwise_and_(1 << (kind.bits - 1))
    return size.bitwise_or_(sign).to(torch.uint8)


def encode(groups: torch.Tensor, scale: torch.Tensor, kind: qtype) -> torch.Tensor:
    """Codes ``[rows, G * group]`` of float32 ``groups`` ``[rows, G, group]`` with float32 scales ``[rows, G]``."""
    scaled = groups / scale.unsqueeze(-1)
    return encoded(rounded(scaled, kind).copysign_(scaled), kind).flatten(1)  # also a 0 has its sign


def round_blocks(x: torch.Tensor, kind: qtype) -> torch.Tensor:
    """x ``[..., K]`` with each block along K rounded to ``kind``, in x's dtype.

    In NVFP4 the float32 number is that of the row instead of the tensor, so that a token's result does not depend on the
    others. The last block may be shorter. A block with NaN or infinity becomes NaN.
    """
    form, length = _form(kind), x.shape[-1]
    if not x.numel():
        return x
    rows = x.reshape(-1, length).to(torch.float32)
    groups = torch.nn.functional.pad(rows, (0, -length % form.size)).unflatten(1, (-1, form.size))
    row = tensor_scale(groups.abs().amax((1, 2)).unsqueeze(-1), kind, True) if form.scale == "e4m3" else None
    scale = expand_scale(scale_codes(groups, kind, row, "mse"), row, form.scale).unsqueeze(-1)
    values = rounded(groups / scale, kind).mul_(scale)
    bad = ~torch.isfinite(groups.sum(-1, keepdim=True) * 0)
    values = torch.where(bad, math.nan, values)
    return values.flatten(1)[:, :length].to(x.dtype).view(x.shape)


def _form(kind: qtype) -> BlockFormat:
    if kind.blocks is None:
        raise ValueError(f"{kind.name} has no scales of its own; expected nvfp4 or an mx type")
    return kind.blocks


def _largest(kind: qtype) -> float:
    """The largest value of a code."""
    return kind.span if kind.values is not None else float(kind.qmax)
