"""Codes, scales and values of cached tokens, held against float64."""

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from requanto.kv import Codec, KVSettings
from requanto.kv.codec import group_size

KINDS = ("int8", "int4", "int2", "float8", "float8_e5m2")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BLOCK = 8


def codecs(kind: str, group: int = 64) -> dict[str, Codec]:
    made = KVSettings(kind, kind, block=BLOCK, group=group)
    return {"channel": made.key_codec(), "token": made.value_codec()}


def values(seed: int, channels: int, dtype: torch.dtype, tokens: int = 3 * BLOCK) -> torch.Tensor:
    """Random keys with channels of other sizes and offsets, as models have them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, tokens, channels, generator=generator, dtype=torch.float64)
    size = torch.exp(2 * torch.randn(channels, generator=generator, dtype=torch.float64))
    return (x * size + 3 * torch.randn(channels, generator=generator, dtype=torch.float64)).to(dtype)


def decoded(codec: Codec, x: torch.Tensor) -> torch.Tensor:
    return codec.decode(codec.encode(x), torch.empty_like(x, memory_format=torch.contiguous_format))


def spread(codec: Codec, part: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """A scale or shift for each value, in float64."""
    times, dim = (BLOCK, 2) if codec.per == "channel" else (shape[3] // part.shape[3], 3)
    return part.double().repeat_interleave(times, dim)


@pytest.mark.parametrize("per", ["channel", "token"])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=16)
@given(
    seed=st.integers(0, 2**32),
    channels=st.sampled_from([1, 3, 16, 64, 67, 80, 130, 192]),
    dtype=st.sampled_from(DTYPES),
)
def test_every_value_comes_back_within_half_a_step(per, kind, dtype, seed, channels):
    codec, x = codecs(kind)[per], values(seed, channels, dtype)
    coded = codec.encode(x)
    back = codec.decode(coded, torch.empty_like(x)).double()
    step = spread(codec, coded.scale, x.shape)
    if codec.kind.is_floating_point:
        # Half the distance of two codes: relative for normal ones, that of the smallest code below.
        info = torch.finfo(codec.kind.dtype)
        allowed = torch.maximum(x.double().abs() * info.eps / 2, step * info.smallest_normal * info.eps / 2)
    else:
        allowed = step / 2
    offset = 0 if coded.shift is None else spread(codec, coded.shift, x.shape)
    # The products and sums of the values are rounded to their dtype.
    rounding = torch.finfo(dtype).eps * (back.abs() + (back - offset).abs() + step)
    assert ((back - x.double()).abs() <= allowed + rounding).all()


@pytest.mark.parametrize("per", ["channel", "token"])
@pytest.mark.parametrize("kind", ["int8", "int4", "int2"])
@pytest.mark.parametrize("channels", [64, 67, 80])
def test_codes_are_the_rounded_quotients(per, kind, channels):
    codec, x = codecs(kind)[per], values(5, channels, torch.float32)
    coded = codec.encode(x)
    bits, lanes = codec.kind.bits, 8 // codec.kind.bits
    width = coded.codes.shape[-1]
    assert width == -(-channels // lanes)
    parts = [coded.codes.int() >> (bits * lane) & (2**bits - 1) for lane in range(lanes)]
    codes = torch.cat(parts, -1)[..., :channels] if bits < 8 else coded.codes
    offset = 0 if coded.shift is None else spread(codec, coded.shift, x.shape)
    exact = (x.double() - offset) / spread(codec, coded.scale, x.shape)
    assert ((codes.double() - exact).abs() <= 0.5 + 1e-4).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per", ["channel", "token"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_values(kind, per, dtype):
    codec = codecs(kind)[per]
    info = torch.finfo(dtype)
    shape = (1, 1, BLOCK, 32)
    # The difference of two numbers, which float32 has to hold, is at most the largest one.
    largest = info.max if dtype == torch.float16 else info.max / 2
    for value in (0.0, 1.0, -3.5, info.max, -info.max, info.tiny, info.smallest_normal / 8):
        same = torch.full(shape, value, dtype=dtype)
        back = decoded(codec, same)
        assert back.isfinite().all(), value
        if value == 0 or (codec.affine and abs(value) < info.max):
            assert torch.equal(back, same), value
    # From the lowest number to the largest: nothing overflows.
    wide = torch.linspace(-1, 1, BLOCK * 32, dtype=torch.float64).reshape(shape)[..., torch.randperm(32)]
    back = decoded(codec, (wide * largest).clamp(-largest, largest).to(dtype))
    assert back.isfinite().all()
    small = torch.linspace(-1, 1, BLOCK * 32, dtype=torch.float64).reshape(shape) * (
        1e-5 if dtype == torch.float16 else 1e-30
    )
    back = decoded(codec, small.to(dtype)).double()
    limit = {"int2": 0.6, "int4": 0.2}.get(kind, 0.1)
    assert (back - small).norm() < limit * small.norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per", ["channel", "token"])
def test_nan_and_infinity_are_not_hidden(kind, per):
    codec = codecs(kind)[per]
    for bad in (float("nan"), float("inf")):
        x = torch.ones(1, 1, BLOCK, 64)
        x[0, 0, 2, 5] = bad
        assert not decoded(codec, x)[0, 0, 2, 5].isfinite()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_strides_and_ambient_modes_change_nothing(kind, dtype):
    for codec in codecs(kind).values():
        x = values(3, 80, dtype)
        wanted = decoded(codec, x)
        strided = x.transpose(1, 2).contiguous().transpose(1, 2)
        assert torch.equal(decoded(codec, strided), wanted)
        modes = (
            torch.inference_mode(),
            torch.autocast("cpu", dtype=torch.bfloat16),
            torch.enable_grad(),
            contextlib.nullcontext(),
        )
        for mode in modes:
            with mode:
                assert torch.equal(decoded(codec, x.clone()), wanted)


@pytest.mark.parametrize("kind", ["float8", "float8_e5m2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_all_float8_codes_convert_as_in_torch(kind, dtype):
    codec = codecs(kind)["token"]
    codes = torch.arange(256, dtype=torch.int16).to(torch.uint8)
    codes = codes[codes.view(codec.kind.dtype).float().isfinite()].view(1, 1, 1, -1)
    out = torch.empty(codes.shape, dtype=dtype)
    codec._write_codes(codes, out)
    wanted = codes.view(codec.kind.dtype).to(dtype)
    assert torch.equal(out, wanted)


@pytest.mark.parametrize(
    ("channels", "largest", "wanted"),
    [
        (64, 64, 64),
        (80, 64, 40),
        (128, 64, 64),
        (67, 64, 67),
        (96, 64, 48),
        (32, 64, 32),
        (130, 64, 130),
        (3, 1, 1),
        (256, 64, 64),
    ],
)
def test_group_sizes(channels, largest, wanted):
    assert group_size(channels, largest) == wanted


@pytest.mark.parametrize(("kind", "bits"), [("int8", 8.25), ("int4", 4.5), ("int2", 2.5), ("float8", 8.25)])
def test_bits(kind, bits):
    for codec in KVSettings(kind, kind).key_codec(), KVSettings(kind, kind).value_codec():
        x = torch.randn(1, 2, 256, 128).half()
        parts = codec.encode(x)
        assert 8 * sum(part.nbytes for part in parts if part is not None) / x.numel() == bits
