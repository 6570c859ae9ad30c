"""Scales of float8 weights, chosen by their squared error.

Float8 codes have the same relative spacing in each octave, so a scale of absmax / largest code is not special: the error
depends on where between two codes the weights of a row are. The candidates are the scales that map the largest weight, which
matters most, exactly to a code of the top octave (448, 416 ... 240 for e4m3: from absmax / 448 to nearly twice that). The
candidate with the least squared error is used.
"""

from __future__ import annotations

import math
from functools import cache

import torch

from requanto.dtypes.qtypes import qtype

#: Number of evenly spaced weights of a row that are used; all of them in rows shorter than twice this. With more weights the
#: differences between candidates average out, so they gain little and take time.
SAMPLE = 128
#: Scaled weights computed at once, so that they stay in a core's cache.
BLOCK = 128 * 1024


@cache
def top_codes(kind: qtype) -> tuple[float, ...]:
    """The float8 codes from the largest one down to half of it."""
    info = torch.finfo(kind.dtype)
    codes, code = [], info.max
    while code > info.max / 2:
        codes.append(code)
        octave = 2.0 ** math.floor(math.log2(code))
        # Below a power of two the spacing is half as large.
        code -= octave * info.eps * (0.5 if code == octave else 1.0)
    return tuple(codes)


def mantissa_bits(kind: qtype) -> int:
    """Stored mantissa bits of a float8 type: 3 of e4m3, 2 of e5m2."""
    return -round(math.log2(torch.finfo(kind.dtype).eps))


def float8_scale(groups: torch.Tensor, kind: qtype) -> torch.Tensor:
    """Scale ``[rows, G]`` of least squared error for float32 ``groups`` ``[rows, G, group]``, see the module's docstring.

    Subnormal codes are treated as normal ones: they are for weights 2^14 times smaller than the largest.
    """
    absmax = torch.maximum(groups.amax(-1), groups.amin(-1).neg_()).flatten()
    codes = torch.tensor(top_codes(kind), dtype=torch.float32, device=groups.device)
    sample = groups[..., :: max(1, groups.shape[-1] // SAMPLE)].flatten(0, 1)
    factors = codes / torch.where(absmax == 0, torch.ones_like(absmax), absmax).unsqueeze(-1)
    # Rounds a float32 to the mantissa of float8: add half of the dropped bits' range, then clear these bits.
    dropped = 1 << (23 - mantissa_bits(kind))
    best = torch.empty_like(absmax)
    step = max(1, BLOCK // (sample.shape[-1] * len(codes)))
    for start in range(0, len(absmax), step):
        part = slice(start, start + step)
        scaled = sample[part].unsqueeze(1) * factors[part].unsqueeze(-1)
        bits = scaled.view(torch.int32).add(dropped // 2).bitwise_and_(-dropped)
        errors = torch.linalg.vector_norm(scaled.sub_(bits.view(torch.float32)), dim=-1).div_(codes)
        best[part] = codes[errors.argmin(-1)]
    return absmax.div_(best).view(groups.shape[:-1])
