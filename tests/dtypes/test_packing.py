"""Packing against the format as it is written down, with plain Python integers, and round trips of any shape."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from requanto.dtypes.bit_packing import pack, packed_length, unpack, unpack_pairs

shapes = st.lists(st.integers(1, 5), min_size=0, max_size=3)


def bytes_by_hand(codes: list[int], bits: int) -> list[int]:
    """The codes written one after the other into one big number, low bits first, cut into bytes."""
    number = sum(code << (bits * place) for place, code in enumerate(codes))
    return list(number.to_bytes(-(-len(codes) * bits // 8), "little"))


@given(bits=st.integers(1, 7), data=st.data())
def test_a_row_is_packed_low_bits_first(bits, data):
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=1, max_size=40))
    assert pack(torch.tensor(codes, dtype=torch.uint8), bits).tolist() == bytes_by_hand(codes, bits)


def test_the_bytes_the_format_names():
    assert pack(torch.tensor([1, 2, 15, 0], dtype=torch.uint8), 4).tolist() == [0x21, 0x0F]
    assert pack(torch.tensor([1, 2, 3, 0, 2], dtype=torch.uint8), 2).tolist() == [0b00111001, 0b10]
    assert pack(torch.tensor([1, 7, 2, 5], dtype=torch.uint8), 3).tolist() == [0b10111001, 0b1010]


@given(bits=st.integers(1, 7), lead=shapes, length=st.integers(1, 67), seed=st.integers(0, 2**31))
def test_round_trip(bits, lead, length, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (*lead, length), generator=generator).to(torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*lead, packed_length(length, bits))
    assert torch.equal(unpack(packed, bits, length), codes)


@pytest.mark.parametrize("bits", range(1, 8))
def test_bytes_with_any_strides_are_unpacked(bits):
    codes = torch.randint(0, 2**bits, (6, 40)).to(torch.uint8)
    packed = pack(codes, bits)
    for strided in (packed.t().contiguous().t(), packed.repeat_interleave(2, 1)[:, ::2]):
        assert torch.equal(unpack(strided, bits, 40), codes)
        assert torch.equal(unpack_pairs(strided, bits, 40), unpack_pairs(packed, bits, 40))


@given(bits=st.integers(1, 7), length=st.integers(0, 1000))
def test_packed_length_is_the_bits_rounded_up_to_bytes(bits, length):
    assert packed_length(length, bits) == (length * bits + 7) // 8


@pytest.mark.parametrize("bits", [2, 4])
def test_the_last_byte_is_filled_with_zero_bits(bits):
    packed = pack(torch.full((3, 8 // bits + 1), 2**bits - 1, dtype=torch.uint8), bits)
    assert packed[:, 0].tolist() == [255] * 3
    assert packed[:, 1].tolist() == [2**bits - 1] * 3


@given(bits=st.integers(2, 7), lead=shapes, length=st.integers(1, 67), seed=st.integers(0, 2**31))
def test_pairs_are_two_codes_in_one_number(bits, lead, length, seed):
    codes = torch.randint(0, 2**bits, (*lead, length), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    low, high = codes[..., 0::2].long(), torch.nn.functional.pad(codes, (0, length % 2))[..., 1::2].long()
    found = unpack_pairs(pack(codes, bits), bits, length)
    assert torch.equal(found.long(), low + (high << bits))


@pytest.mark.parametrize("bits", range(1, 8))
def test_no_codes_take_no_bytes(bits):
    assert pack(torch.empty(3, 0, dtype=torch.uint8), bits).shape == (3, 0)
    assert unpack(torch.empty(3, 0, dtype=torch.uint8), bits, 0).shape == (3, 0)
    assert pack(torch.empty(0, 8, dtype=torch.uint8), bits).shape == (0, bits)


def test_views_are_packed_as_they_are_seen():
    codes = torch.randint(0, 16, (6, 10), dtype=torch.uint8)
    assert torch.equal(pack(codes.t(), 4), pack(codes.t().contiguous(), 4))
    assert torch.equal(pack(codes[:, 1::2], 4), pack(codes[:, 1::2].contiguous(), 4))


def test_packing_leaves_the_codes_alone():
    codes = torch.arange(8, dtype=torch.uint8)
    pack(codes, 4)
    assert codes.tolist() == list(range(8))


def test_wrong_input_says_what_was_found():
    with pytest.raises(ValueError, match=r"must be uint8, found torch\.int8"):
        pack(torch.zeros(4, dtype=torch.int8), 4)
    with pytest.raises(ValueError, match=r"must be uint8, found torch\.int32"):
        unpack(torch.zeros(4, dtype=torch.int32), 4, 8)
    for bits in (0, 8):
        with pytest.raises(ValueError, match=f"1 to 7 bits are packed, found bits={bits}"):
            pack(torch.zeros(4, dtype=torch.uint8), bits)
