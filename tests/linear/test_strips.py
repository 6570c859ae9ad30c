"""The layout of strips: bits come back as they were, with the library and without it, for slices, experts and writes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import requanto
from requanto.linear.cpu import library, planes, strips, weights
from requanto.linear.cpu.strips import STRIPS
from requanto.tensor.qtensor import QTensor

KINDS = (
    "uint1", "int2", "uint2", "int3", "int4", "uint4", "int5", "int6", "int7", "uint7", "int8", "uint8", "nf3", "nf4",
    "codebook4", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "nvfp4", "mxfp4", "mxfp6_e2m3", "mxfp8_e4m3",
)  # fmt: skip


@pytest.fixture(autouse=True)
def with_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requanto.settings, "compiled", None)


@pytest.fixture(params=["library", "operators"])
def how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "operators":
        monkeypatch.setattr(library, "for_tensors", lambda *tensors: None)
    elif library.find() is None:
        pytest.skip("no CPU kernels here")
    return request.param


def quantized(kind: str, shape: tuple[int, ...], **how: object) -> QTensor:
    return QTensor.quantize(torch.randn(shape, generator=torch.Generator().manual_seed(len(kind))), kind, **how)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_come_back_bit_for_bit(kind: str, how: str) -> None:
    for shape in ((33, 96), (16, 32), (1, 160), (48, 64)):
        weight = quantized(kind, shape)
        parts, codes = dict(weight.inner_tensors()), weight.codes().clone()
        packed = {**parts, **STRIPS.pack(weight._spec, parts)}
        STRIPS.check(weight._spec, packed)
        assert torch.equal(bits(STRIPS.unpack(weight._spec, packed)), bits(parts["qdata"]))
        last = shape[0] // 2 + 1
        assert torch.equal(bits(STRIPS.codes(weight._spec, packed, 0, last)), bits(codes[:last]))
        index = torch.tensor([shape[0] - 1, 0, shape[0] // 2, 0])
        assert torch.equal(bits(STRIPS.gather(weight._spec, packed, index)), bits(codes[index]))
        back = STRIPS.plain(weight._spec, packed)
        assert all(torch.equal(bits(part), bits(parts[name])) for name, part in back.items())


@pytest.mark.parametrize("kind", ["int8", "uint8", "float8_e4m3fn", "mxfp8_e4m3", "int4"])
def test_codes_with_other_strides_are_copied_for_as_long_as_they_are_read(
    kind: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPTQ's codes were column by column; what was freed before the library read it had other bytes by then."""
    if how == "library":
        read = library.Library.pack

        def pack(self: library.Library, plain: int, bits: int, rows: int, length: int, *more: int) -> None:
            taken = [torch.full((rows * length * bits // 8,), 0x7F, dtype=torch.uint8) for _ in range(4)]
            read(self, plain, bits, rows, length, *more)
            del taken

        monkeypatch.setattr(library.Library, "pack", pack)
    for shape in ((64, 32), (16, 64), (96, 256)):
        parts = dict(quantized(kind, shape).inner_tensors())
        strided = {**parts, "qdata": parts["qdata"].view(torch.uint8).t().contiguous().t().view(parts["qdata"].dtype)}
        weight = quantized(kind, shape).with_inner(strided)
        assert not weight._storage.parts["qdata"].is_contiguous()
        packed = {**parts, **STRIPS.pack(weight._spec, weight._storage.parts)}
        assert torch.equal(bits(STRIPS.unpack(weight._spec, packed)), bits(parts["qdata"]))


@pytest.mark.parametrize("width", range(1, 9))
def test_both_ways_of_packing_give_the_same_bytes(width: int) -> None:
    if library.find() is None:
        pytest.skip("no CPU kernels here")
    kind = f"uint{width}"
    weight = quantized(kind, (41, 72), group_size=8)
    parts = dict(weight.inner_tensors())
    by_library = STRIPS.pack(weight._spec, parts)["qdata"]
    assert torch.equal(by_library, planes.to_strips(weight.codes(), width).view(by_library.shape))


def test_an_index_out_of_range_raises(how: str) -> None:
    weight = quantized("int4", (32, 64))
    packed = STRIPS.pack(weight._spec, weight.inner_tensors())
    for index in (-1, 32):
        with pytest.raises(IndexError, match=f"{index}"):
            STRIPS.gather(weight._spec, packed, torch.tensor([0, index]))


@pytest.mark.parametrize("options", [{}, {"scale_bits": 4}, {"scale_bits": 6}, {"zero_point": "integer"}])
def test_memory_is_that_of_the_stored_form(options: dict) -> None:
    for kind in ("int2", "int3", "int4") if options else ("int2", "int3", "int4", "int8", "nf4", "float8"):
        linear = nn.Linear(576, 1536, bias=False)
        model = nn.Sequential(linear)
        linear.weight = nn.Parameter(QTensor.quantize(linear.weight, kind, **options), requires_grad=False)
        stored = linear.weight.nbytes
        with torch.inference_mode():
            for rows in (1, 7, 64, 300):
                model(torch.randn(rows, 576))
        assert linear.weight.nbytes <= 1.02 * stored, (kind, options)
        if library.find() is not None:
            assert linear.weight.layout_name == "strips"


def test_experts_are_views_and_rows_are_copies(how: str) -> None:
    weight = quantized("int4", (3, 32, 64))
    values = weight.dequantize(torch.float32)
    weight.pack(STRIPS)
    assert (weight[1].layout_name, weight[1:].layout_name, weight[:, 3:9].layout_name) == ("strips", "strips", "plain")
    for part, want in ((weight[1], values[1]), (weight[1:], values[1:]), (weight[:, 3:9], values[:, 3:9])):
        assert torch.equal(part.dequantize(torch.float32), want)
    weight[0].copy_(weight[2])
    assert torch.equal(weight.dequantize(torch.float32)[0], values[2])
    assert weight.layout_name == "strips"


def test_writes_copies_and_pickles_of_a_packed_weight(how: str) -> None:
    weight, other = quantized("int3", (48, 96)), quantized("int3", (48, 96), symmetric=False)
    other.scale.mul_(2)
    weight.pack(STRIPS)
    copy = weight.clone()
    weight.copy_(other)
    assert torch.equal(weight.dequantize(), other.dequantize())
    assert not torch.equal(copy.dequantize(), other.dequantize())
    weight.scale = other.scale * 2
    assert weight.scale.is_contiguous()
    weight.unpack()
    assert weight.layout_name == "plain"
    assert weight.scale.is_contiguous()


def test_scales_keep_their_order_and_those_in_few_bits_stay_packed() -> None:
    weight = quantized("int4", (64, 256), scale_bits=6)
    scale, stored = weight.scale.clone(), weight._storage.parts["scale"].nbytes
    weight.pack(STRIPS)
    part = weight._storage.parts["scale"]
    assert part.nbytes == stored
    assert torch.equal(weight.scale, scale)


def test_what_the_layout_is_for() -> None:
    accepted = (("int4", (17, 40), 8), ("int8", (17, 5), None), ("nf4", (64, 3, 8, 8), None), ("int2", (2, 16, 32), 32))
    for kind, shape, group in accepted:
        assert STRIPS.accepts(quantized(kind, shape, group_size=group)._spec), (kind, shape)
    for kind, shape, group in (("int4", (16, 36), 12), ("int4", (2, 17, 32), 32)):
        assert not STRIPS.accepts(quantized(kind, shape, group_size=group)._spec), (kind, shape)
    assert not strips.fits(quantized("int8", (17, 64))._spec)  # 15 of 32 rows are padding
    assert strips.fits(quantized("int8", (31, 64))._spec)


def test_tables_as_integers() -> None:
    exact = weights.make_table((-6.0, -1.5, 0.0, 0.5, 4.0))
    assert exact.step == 0.5
    assert exact.error == 0
    assert (exact.step * (exact.levels[:5].float() - 128)).tolist() == [-6.0, -1.5, 0.0, 0.5, 4.0]
    for kind in ("nf4", "nf2", "mxfp6_e3m2"):
        assert 0 < weights.fixed_table(quantized(kind, (16, 64)).qtype).error < weights.MOST_TABLE_ERROR
    assert weights.make_table((0.0, 1e-3, 2e-3, 3e-3, 1.0)).error < weights.MOST_TABLE_ERROR < 1
    assert weights.make_table((0.0, 1.0, float("inf"))).error == float("inf")
    assert weights.make_table((0.0, 0.0)).step > 0
