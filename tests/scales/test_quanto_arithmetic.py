"""optimum-quanto's packing and grouping: what is taken apart comes together again, for every size."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from requanto.scales.quanto import (
    affine_codes,
    group,
    grouped_shape,
    pack_split,
    symmetric_codes,
    ungroup,
    unpack_split,
)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(1, 9), st.sampled_from([2, 4]), st.integers(0, 2**31))
def test_packing(rows, columns, bits, seed):
    codes = torch.randint(0, 2**bits, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = pack_split(codes, bits)
    assert packed.shape[0] == -(-rows * bits // 8)
    assert torch.equal(unpack_split(packed, bits)[:rows], codes)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 7), min_size=2, max_size=4), st.integers(1, 70), st.sampled_from([0, -1]))
def test_grouping_with_padding(shape, size, axis):
    base = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
    grouped = group(base, axis, size, pad=True)
    assert grouped.shape[1 if axis == 0 else 0] == size
    assert torch.equal(ungroup(grouped, axis, base.shape), base)
    # Padding moves neither end of a group.
    assert grouped.min() == base.min()
    assert grouped.max() == base.max()
    if base.numel() // shape[axis] % size == 0:
        assert tuple(grouped.shape) == grouped_shape(base.shape, axis, size)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 50), st.sampled_from([2, 4]), st.floats(1e-3, 1e3), st.booleans())
def test_affine_codes_are_off_by_half_a_step(length, bits, spread, constant):
    base = spread * torch.randn(3, length, generator=torch.Generator().manual_seed(length))
    base = torch.full_like(base, spread) if constant else base
    low, high = base.aminmax(dim=1, keepdim=True)
    scale, shift = (high - low) / (2**bits - 1), -low
    values = scale * affine_codes(base, bits, scale, shift) - shift
    assert ((values - base).abs() <= scale / 2 + 1e-4 * spread).all()


def test_zeros_have_code_zero_whatever_the_type():
    zero = torch.zeros(2, 4)
    for dtype in (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2):
        assert (symmetric_codes(zero, dtype, torch.zeros(2, 1)).float() == 0).all()
