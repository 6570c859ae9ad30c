"""The execution layout is a permutation of the stored bytes' codes, as documented, and reverses exactly."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
from requanto_kernels import from_exec_layout, group_major, has_exec_layout, layout, to_exec_layout


@settings(max_examples=40, deadline=None)
@given(bits=st.sampled_from([2, 3, 4, 5, 6, 7]), rows=st.integers(0, 5), k=st.integers(1, 600), inplace=st.booleans())
def test_round_trip(bits, rows, k, inplace):
    stored = torch.randint(0, 256, (rows, -(-k * bits // 8)), dtype=torch.uint8)
    moved = to_exec_layout(stored.clone(), bits, k, inplace=inplace)
    assert moved.shape == stored.shape
    assert torch.equal(from_exec_layout(moved, bits, k, inplace=inplace), stored)


@pytest.mark.parametrize("bits", [2, 4])
def test_places(bits):
    fields, per_byte = 16 // bits, 8 // bits
    k = 64 * fields
    codes = torch.randint(0, 1 << bits, (k,))
    stored = sum(codes.view(-1, per_byte)[:, i] << (bits * i) for i in range(per_byte)).to(torch.uint8)
    words = to_exec_layout(stored[None], bits).view(torch.int16)[0].int()
    for block in range(2):
        for i in range(fields):
            for j in range(32):
                want = codes[block * 32 * fields + 32 * i + j]
                assert (words[block * 32 + j] >> (bits * i)) & ((1 << bits) - 1) == want


def test_places_of_3_bits():
    codes = torch.randint(0, 8, (512,))
    stream = (
        (codes[:, None] >> torch.arange(3) & 1).flatten().view(-1, 8)
    )  # code k is bits 3 * k .. 3 * k + 2 of the row
    stored = (stream << torch.arange(8)).sum(-1).to(torch.uint8)
    blocks = to_exec_layout(stored[None], 3).view(2, 96)
    words, bytes_ = blocks[:, :64].contiguous().view(torch.int16).int(), blocks[:, 64:].int()
    for block in range(2):
        for i in range(8):
            for j in range(32):
                low, third = (words[block, j] >> (2 * i)) & 3, (bytes_[block, j] >> i) & 1
                assert low + 4 * third == codes[block * 256 + 32 * i + j]


@pytest.mark.parametrize("bits", [5, 6, 7])
def test_places_of_more_than_4_bits(bits):
    fields, k = (4 if bits == 6 else 8), 2 * 32 * (4 if bits == 6 else 8)
    codes = torch.randint(0, 1 << bits, (k,))
    stream = (codes[:, None] >> torch.arange(bits) & 1).flatten().view(-1, 8)
    stored = (stream << torch.arange(8)).sum(-1).to(torch.uint8)
    blocks = to_exec_layout(stored[None], bits).view(2, -1)
    half = fields * 16
    words = blocks[:, :half].contiguous().view(torch.int16).int().view(2, -1, 32)
    rest = blocks[:, half:].int()
    for block in range(2):
        for i in range(fields):
            for j in range(32):
                found = (words[block, i // 4, j] >> (4 * (i % 4))) & 15
                if bits == 5:
                    found += ((rest[block, j] >> i) & 1) << 4
                elif bits == 6:
                    found += ((rest[block, j] >> (2 * i)) & 3) << 4
                else:
                    two = rest[block, 2 * j] | rest[block, 2 * j + 1] << 8
                    found += ((two >> (2 * i)) & 3) << 4 | ((rest[block, 64 + j] >> i) & 1) << 6
                assert found == codes[block * 32 * fields + 32 * i + j]


def test_plain_where_there_is_no_block():
    odd = torch.randint(0, 256, (3, 50), dtype=torch.uint8)
    assert not has_exec_layout(4, 100)
    assert not has_exec_layout(3, 128)
    assert not has_exec_layout(5, 128)
    assert not has_exec_layout(1, 256)
    assert to_exec_layout(odd, 1) is odd
    assert to_exec_layout(odd, 4) is odd
    eight = torch.zeros(3, 128, dtype=torch.int8)
    assert to_exec_layout(eight, 8) is eight


def test_chunks_and_experts(monkeypatch):
    stored = torch.randint(0, 256, (3, 7, 128), dtype=torch.uint8)
    whole = to_exec_layout(stored, 4)
    monkeypatch.setattr(layout, "CHUNK_CODES", 512)
    assert torch.equal(to_exec_layout(stored, 4), whole)
    held = stored.clone()
    assert to_exec_layout(held, 4, inplace=True).data_ptr() == held.data_ptr()
    assert torch.equal(held, whole)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.zeros(2, 64), 4), "qdata.dtype"),
        ((torch.zeros(2, 64, dtype=torch.uint8), 9), "bits"),
        ((torch.zeros(2, 64, dtype=torch.uint8), 3, 256), "qdata.shape"),
        ((torch.zeros(2, 64, dtype=torch.uint8), 4, 64), "qdata.shape"),
    ],
)
def test_bad_input_is_named(args, message):
    with pytest.raises(ValueError, match=message):
        to_exec_layout(*args)


def test_in_place_needs_contiguous_memory():
    with pytest.raises(ValueError, match=r"qdata\.stride"):
        to_exec_layout(torch.zeros(64, 2, dtype=torch.uint8).T, 4, inplace=True)


@pytest.mark.parametrize("shape", [(5, 3), (2, 5, 3), (5, 1), (0, 3)])
def test_group_major(shape):
    scales = torch.randn(shape)
    moved = group_major(scales)
    assert torch.equal(moved, scales)
    assert moved.transpose(-1, -2).is_contiguous()
    assert group_major(moved).data_ptr() == moved.data_ptr()
    assert torch.equal(moved[..., 1:4, :], scales[..., 1:4, :])  # rows are sliced as views
    with pytest.raises(ValueError, match=r"scales\.shape: found \(3,\), expected at least two"):
        group_major(torch.zeros(3))
