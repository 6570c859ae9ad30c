"""The values of the codes of the fixed codebooks.

nf4, fp4   bitsandbytes' values in its order of codes (``csrc/kernels.cu``, ``functional.get_4bit_type``)
nf2, nf3   the construction of nf4 for 4 and 8 values: Dettmers et al. 2023, QLoRA, arXiv:2305.14314
fpX_eAmB   floating-point numbers of X bits: sign, A bits of exponent, B of mantissa; all finite. fp4_e2m1, fp6_e2m3 and
           fp6_e3m2 are the element types of the OCP Microscaling Formats (MX) Specification v1.0.
"""

from __future__ import annotations

import re
import struct
from statistics import NormalDist

#: Quantiles of the normal distribution, scaled to -1 .. 1; code 7 is 0.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

_FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
_MINIFLOAT = re.compile(r"fp([3-7])_e(\d)[mw](\d)")
#: Most exponent bits: with more, a 16-bit scale could not hold absmax / largest value.
MOST_EXPONENT_BITS = 4


def _float32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


#: bitsandbytes' 4-bit float: sign, two bits of exponent, one of mantissa, divided by 12; code 8 is a second 0.
FP4 = tuple(_float32(sign * value / 12) for sign in (1, -1) for value in _FP4_TWELFTHS)


def normal_float(bits: int) -> tuple[float, ...]:
    """The 2^bits ascending values of NormalFloat: quantiles of N(0, 1) divided by the largest one, with an exact 0.

    Half of the values are positive; the negative ones are one fewer. The tail probability of the outermost quantile is the
    mean of ``1 / 2^(bits+1)`` and ``1 / (2^(bits+1) - 2)``; in the paper, for 4 bits: (1/32 + 1/30) / 2.
    """
    outermost = 1 - (1 / 2 ** (bits + 1) + 1 / (2 ** (bits + 1) - 2)) / 2

    def half(count: int) -> list[float]:
        steps = [outermost + (0.5 - outermost) * i / count for i in range(count)]
        return [NormalDist().inv_cdf(step) for step in steps]

    positive, negative = half(2 ** (bits - 1)), half(2 ** (bits - 1) - 1)
    largest = positive[0]
    values = [-v / largest for v in negative] + [0.0] + [v / largest for v in reversed(positive)]
    return tuple(_float32(value) for value in values)


def minifloat(exponent_bits: int, mantissa_bits: int) -> tuple[float, ...]:
    """Values of all bit patterns ``sign | exponent | mantissa``, in order; no infinity, no NaN.

    The exponent's bias is ``2^(exponent_bits - 1) - 1`` and exponent 0 means subnormal numbers, as in IEEE 754 and the MX
    specification.
    """
    bias = 2 ** (exponent_bits - 1) - 1
    values = []
    for exponent in range(2**exponent_bits):
        for mantissa in range(2**mantissa_bits):
            fraction = mantissa / 2**mantissa_bits
            values.append(fraction * 2.0 ** (1 - bias) if exponent == 0 else (1 + fraction) * 2.0 ** (exponent - bias))
    return (*values, *(-value for value in values))


def minifloat_name(name: str) -> str | None:
    """The canonical name of a small float (``fp6_e3w2`` -> ``fp6_e3m2``), or None for other names.

    Raises:
        ValueError: the bits do not add up, or there are too many exponent bits.
    """
    match = _MINIFLOAT.fullmatch(name)
    if match is None:
        return None
    bits, exponent, mantissa = map(int, match.groups())
    if 1 + exponent + mantissa != bits or not exponent:
        raise ValueError(
            f"{name!r}: sign, exponent and mantissa take 1 + {exponent} + {mantissa} bits; expected {bits} in all, at "
            f"least 1 of exponent"
        )
    if exponent > MOST_EXPONENT_BITS:
        raise ValueError(
            f"{name!r}: weights that share a scale need no such range; supported are 1 to {MOST_EXPONENT_BITS} bits "
            f"of exponent"
        )
    return f"fp{bits}_e{exponent}m{mantissa}"


#: (bits, exponent bits, mantissa bits) of every small float
MINIFLOATS = tuple(
    (bits, exponent, bits - 1 - exponent)
    for bits in range(3, 8)
    for exponent in range(1, min(bits - 1, MOST_EXPONENT_BITS) + 1)
)
