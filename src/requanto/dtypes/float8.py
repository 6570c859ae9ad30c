"""Conversion from and to float8, also on devices where torch only stores it.

Torch on MPS allocates and copies float8 tensors but converts none: it raises a TypeError. There, codes are bytes that are
looked up, and are encoded in integer arithmetic. The results are torch's, bit for bit. Numbers beyond those of e4m3fn become
the largest one, which differs between versions of torch: callers clamp before.
"""

from __future__ import annotations

import functools
import math

import torch

#: Device types without conversions.
WITHOUT = frozenset({"mps"})
#: dtype -> (bias of the exponent, bits that are NaN, those of numbers beyond the largest one: that one, infinity or NaN)
_FORMS = {
    torch.float8_e4m3fn: (7, 0x7F, 0x7E),
    torch.float8_e5m2: (15, 0x7F, 0x7C),
    torch.float8_e4m3fnuz: (8, 0x80, 0x80),
}


def from_float8(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``codes.to(dtype)`` for float8 codes of any shape; for other dtypes of ``codes`` the same."""
    if codes.device.type not in WITHOUT or codes.dtype not in _FORMS:
        return codes.to(dtype)
    index = codes.view(torch.uint8).flatten().to(torch.int32)
    return torch.index_select(_values(codes.dtype, dtype, codes.device), 0, index).view(codes.shape)


def to_float8(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``values.to(dtype)`` for a float8 ``dtype``: to the nearest code, ties to the even one; for other dtypes the same."""
    if values.device.type not in WITHOUT or dtype not in _FORMS:
        return values.to(dtype)
    bias, nan, beyond = _FORMS[dtype]
    mantissa = -round(math.log2(torch.finfo(dtype).eps))
    dropped = 23 - mantissa
    bits = values.to(torch.float32).contiguous().view(torch.int32)
    size = bits & 0x7FFFFFFF
    # Half of the last kept bit is added, a little less if that bit is 0; a carry into the exponent is correct.
    normal = (size + ((1 << (dropped - 1)) - 1) + ((size >> dropped) & 1)) >> dropped
    normal = normal - ((127 - bias) << mantissa)
    # Below the smallest normal number the steps are equal.
    small = torch.round(size.view(torch.float32) * 2.0 ** (bias - 1 + mantissa))
    is_small = size < (128 - bias) << 23
    code = torch.where(is_small, small.clamp(max=127).to(torch.int32), normal).clamp(max=beyond)
    code = torch.where(size > 0x7F800000, torch.full_like(code, nan), code)
    sign = (bits >> 24) & 0x80
    if dtype == torch.float8_e4m3fnuz:  # 0x80 is NaN, and there is no -0
        sign = torch.where(code == 0, torch.zeros_like(sign), sign)
    return (code | sign).to(torch.uint8).view(dtype)


def rounded_to_float8(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The values of the nearest codes, in the dtype of ``values``."""
    return from_float8(to_float8(values, dtype), values.dtype)


@functools.cache
def _values(codes: torch.dtype, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The value of each byte."""
    every = torch.arange(256, dtype=torch.int32, device="cpu").to(torch.uint8).view(codes)
    return every.to(dtype).to(device)
