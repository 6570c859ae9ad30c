"""Codebooks, small floats, unsigned codes and further widths: their values against what is published, and the edges."""

import itertools
import struct
from statistics import NormalDist

import pytest
import torch

import requanto
from requanto import QTensor, qtypes
from requanto.dtypes.qtypes import resolve_qtype
from requanto.scales.codebook import fit_codebook, nearest_codes

#: those with blocks: tests/scales/test_blocks.py
FIXED = [name for name, kind in qtypes.items() if kind.values is not None and kind.blocks is None]
CODEBOOKS = [*FIXED, "qcodebook2", "qcodebook3", "qcodebook4"]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------ published values


def test_nf4_is_the_table_of_the_paper():
    """Dettmers et al. 2023, appendix E, in its order: code 0 is -1."""
    paper = [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]  # fmt: skip
    assert list(qtypes["qnf4"].values) == paper


def test_fp4_is_that_of_bitsandbytes():
    """sign, exponent of two bits (3 - e, so that larger codes are smaller), mantissa; 0.0625 is the only subnormal."""
    for code, (sign, high, low, mantissa) in enumerate(itertools.product((0, 1), repeat=4)):
        exponent = 2 * high + low
        value = (0.0625 * mantissa) if exponent == 0 else 2 ** (4 - exponent) * (1.5 if mantissa else 1)
        value = struct.unpack("f", struct.pack("f", (-1 if sign else 1) * value / 12))[0]
        assert qtypes["qfp4"].values[code] == value


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_normal_floats_are_quantiles_of_the_normal_distribution(bits):
    values = torch.tensor(qtypes[f"qnf{bits}"].values, dtype=torch.float64)
    half = 2 ** (bits - 1)
    assert (values[0], values[-1], values[half - 1]) == (-1, 1, 0)
    assert torch.equal(values, values.sort().values)
    outermost = 1 - (1 / 2 ** (bits + 1) + 1 / (2 ** (bits + 1) - 2)) / 2
    largest = NormalDist().inv_cdf(outermost)
    # Each side divides the probabilities between the outermost and one half evenly.
    for side, count in ((values[half:], half), (-values[: half - 1].flip(0), half - 1)):
        found = [NormalDist().cdf(float(value) * largest) for value in side]
        wanted = torch.linspace(0.5, outermost, count + 1, dtype=torch.float64)[1:]
        torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), wanted, rtol=0, atol=1e-6)


def test_small_floats_of_the_mx_specification():
    """OCP MX v1.0, tables 2 to 5: largest normal, smallest normal, largest and smallest subnormal number."""
    assert qtypes["qfp4_e2m1"].values[:8] == (0, 0.5, 1, 1.5, 2, 3, 4, 6)
    e3m2, e2m3 = (torch.tensor(qtypes[f"qfp6_{name}"].values[:32]) for name in ("e3m2", "e2m3"))
    assert (e3m2.max(), e3m2[4], e3m2[3], e3m2[1]) == (28, 0.25, 0.1875, 0.0625)
    assert (e2m3.max(), e2m3[8], e2m3[7], e2m3[1]) == (7.5, 1, 0.875, 0.125)


@pytest.mark.parametrize("name", [name for name in FIXED if "_e" in name])
def test_small_floats_are_bit_patterns(name):
    """Code -> sign, exponent, mantissa as fields; a number of float32 made of the same fields."""
    bits, exponent_bits, mantissa_bits = (int(part) for part in (name[3], name[6], name[8]))
    bias = 2 ** (exponent_bits - 1) - 1
    for code, value in enumerate(qtypes[name].values):
        sign, rest = code >> (bits - 1), code & (2 ** (bits - 1) - 1)
        exponent, mantissa = rest >> mantissa_bits, rest & (2**mantissa_bits - 1)
        if exponent:
            word = (sign << 31) | ((exponent - bias + 127) << 23) | (mantissa << (23 - mantissa_bits))
            assert value == struct.unpack("f", struct.pack("I", word))[0]
        else:
            assert value == (-1) ** sign * mantissa / 2**mantissa_bits * 2.0 ** (1 - bias)


# ------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("written", "name"),
    [("nf4", "qnf4"), ("FP4", "qfp4"), ("fp6_e3w2", "qfp6_e3m2"), ("qfp5_e2m2", "qfp5_e2m2"), ("uint3", "quint3")],
)
def test_names(written, name):
    assert resolve_qtype(written).name == name
    assert requanto.QuantoConfig(weights=written).weights == name[1:]


def test_small_floats_that_are_none():
    with pytest.raises(ValueError, match=r"'fp6_e3m3': .* take 1 \+ 3 \+ 3 bits; expected 6"):
        resolve_qtype("fp6_e3m3")
    with pytest.raises(ValueError, match=r"'fp7_e5m1': .* 1 to 4 bits of exponent"):
        resolve_qtype("fp7_e5m1")
    with pytest.raises(ValueError, match=r"'fp4_e0m3': .* at least 1 of exponent"):
        resolve_qtype("fp4_e0m3")


# ------------------------------------------------------------------ the nearest value


@pytest.mark.parametrize("name", FIXED)
def test_the_code_is_that_of_the_nearest_value(name):
    kind = qtypes[name]
    values = torch.tensor(kind.values, dtype=torch.float64)
    borders = (values.sort().values[1:] + values.sort().values[:-1]).float() / 2
    beside = torch.cat([borders, borders.nextafter(borders + 1), borders.nextafter(borders - 1)])
    scaled = torch.cat([randn(4000) * kind.span / 2, values.float(), beside, values.float() * 2, torch.zeros(1)])
    codes = nearest_codes(scaled, kind)
    assert codes.dtype == torch.uint8
    error = (scaled.double() - values[codes.long()]).abs()
    best = (scaled.double().unsqueeze(1) - values).abs().amin(1)
    assert (error - best).max() <= 1e-7 * kind.span  # what the border's own float32 rounding allows
    assert values[nearest_codes(torch.zeros(1), kind).long()] == 0


def test_every_value_finds_its_own_code():
    for name in FIXED:
        kind = qtypes[name]
        values = torch.tensor(kind.values)
        assert torch.equal(values[nearest_codes(values, kind).long()], values), name


@pytest.mark.parametrize("name", CODEBOOKS)
def test_scaling_is_by_absmax(name):
    weight = randn(8, 128) * torch.logspace(-4, 2, 8).unsqueeze(1)
    tensor = QTensor.quantize(weight, name, group_size=32)
    scale = weight.view(8, 4, 32).abs().amax(-1) / tensor.qtype.span
    torch.testing.assert_close(tensor.scale, scale, rtol=1e-6, atol=0)
    assert tensor.shift is None
    if not tensor.qtype.is_learned:
        values = torch.tensor(tensor.qtype.values)
        want = (values[tensor.codes().long()].view(8, 4, 32) * tensor.scale.unsqueeze(-1)).view(8, 128)
        assert torch.equal(tensor.dequantize(), want)


# ------------------------------------------------------------------ learned values


def error_of(weight, kind, group=64):
    return float((QTensor.quantize(weight, kind, group_size=group).dequantize() - weight).norm() / weight.norm())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_learned_values_beat_every_fixed_table_of_their_width(bits):
    for seed, shape in enumerate(("normal", "laplace", "uniform")):
        generator = torch.Generator().manual_seed(seed)
        uniform = torch.rand(64, 512, generator=generator) - 0.5
        weight = {
            "normal": torch.randn(64, 512, generator=generator),
            "laplace": -uniform.sign() * torch.log1p(-2 * uniform.abs().clamp(max=0.4999)),
            "uniform": uniform,
        }[shape]
        learned = error_of(weight, f"codebook{bits}")
        for name in FIXED:
            if qtypes[name].bits == bits:
                assert learned < error_of(weight, name), (shape, name)


def test_learned_values_are_a_fixed_point_of_lloyds_algorithm():
    """Each but -1, 0 and 1 is the mean of the weights nearest to it, weighted by the squares of their scales, up to a
    bin's width."""
    weight = randn(256, 256).double()
    kind = qtypes["qcodebook3"]
    values = torch.tensor(fit_codebook(weight.float(), kind, 64), dtype=torch.float64)
    scale = weight.view(-1, 64).abs().amax(1, keepdim=True)
    normal, mass = (weight.view(-1, 64) / scale).flatten(), (scale**2).expand(-1, 64).flatten()
    nearest = (normal.unsqueeze(1) - values).abs().argmin(1)
    assert [values[0], values[3], values[7]] == [-1, 0, 1]
    for code in (1, 2, 4, 5, 6):
        mine = nearest == code
        mean = (normal[mine] * mass[mine]).sum() / mass[mine].sum()
        assert abs(mean - values[code]) < 2 / 4096


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_learned_values_of_one_sided_and_strange_weights(bits):
    kind = qtypes[f"qcodebook{bits}"]
    flat = torch.ones(4, 64)
    for weight in (randn(64, 64).abs(), -randn(64, 64).abs(), flat, -flat, torch.zeros(4, 64), flat * 1e-30):
        values = torch.tensor(fit_codebook(weight, kind, 64))
        assert values.isfinite().all()
        assert (values.diff() >= 0).all()
        assert values.abs().max() <= 1
        assert bits == 2 or 0 in values
        back = QTensor.quantize(weight, kind, group_size=64).dequantize()
        assert (back - weight).abs().max() <= 0.6 * weight.abs().max()
    assert (torch.tensor(fit_codebook(randn(64, 64).abs(), kind, 64)) > 0).sum() >= 2**bits - 2


def test_a_tensor_of_few_distinct_values_is_stored_exactly():
    values = torch.tensor([-0.8, -0.1, 0.3, 1.0])
    weight = values[torch.randint(0, 4, (32, 256), generator=torch.Generator().manual_seed(0))]
    tensor = QTensor.quantize(weight, "codebook2", group_size=None)
    torch.testing.assert_close(tensor.dequantize(), weight, rtol=0, atol=2 / 4096)


def test_the_fit_does_not_depend_on_chance_or_size():
    weight = randn(4096, 1024)  # sampled: every other row
    one, two = (QTensor.quantize(weight, "codebook4") for _ in range(2))
    assert torch.equal(one, two)
    assert one.codebook.shape == (16,)
    assert one.codebook.dtype == torch.float32
    small = QTensor.quantize(weight[:512], "codebook4")
    torch.testing.assert_close(small.codebook, one.codebook, rtol=0, atol=0.03)


@pytest.mark.parametrize("name", CODEBOOKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_groups_of_zeros_stay_zeros(name, dtype):
    weight = randn(4, 128).to(dtype)
    weight[1] = 0
    weight[2, 64:] = 0
    for whole in (QTensor.quantize(weight, name, group_size=32), QTensor.quantize(torch.zeros_like(weight), name)):
        back = whole.dequantize()
        assert back.isfinite().all()
        assert not back[weight == 0].view(-1)[:128].any()
        out = torch.nn.functional.linear(torch.ones(2, 128, dtype=dtype), whole)
        assert not out[:, 1].any()


def test_a_learned_type_without_its_values_is_refused():
    tensor = QTensor.quantize(randn(4, 64), "codebook3")
    options = {"shape": (4, 64), "dtype": torch.float32, "group_size": 32}
    with pytest.raises(ValueError, match="qcodebook3 weight needs its codebook"):
        QTensor(tensor.qdata, tensor.scale, qtype=tensor.qtype, **options)
    with pytest.raises(ValueError, match="qint3 weight has no codebook"):
        QTensor(tensor.qdata, tensor.scale, codebook=tensor.codebook, qtype=qtypes["qint3"], **options)


def test_experts_share_the_values_of_their_tensor():
    tensor = QTensor.quantize(randn(3, 8, 64), "codebook3")
    whole = tensor.dequantize()
    assert torch.equal(tensor[1].dequantize(), whole[1])
    assert torch.equal(tensor[torch.tensor([2, 0])].dequantize(), whole[[2, 0]])
    assert torch.equal(tensor[:, 2:5].dequantize(), whole[:, 2:5])
    assert all(torch.equal(one.dequantize(), two) for one, two in zip(tensor.unbind(), whole))


def test_copy_takes_the_values_along():
    target, source = (
        QTensor.quantize(randn(8, 64), "codebook4"),
        QTensor.quantize(randn(8, 64, seed=1) ** 3, "codebook4"),
    )
    target.copy_(source)
    assert torch.equal(target, source)
    target.copy_(randn(8, 64, seed=2).exp())
    assert torch.equal(target, QTensor.quantize(randn(8, 64, seed=2).exp(), "codebook4"))


# ------------------------------------------------------------------ unsigned codes


@pytest.mark.parametrize("bits", range(1, 9))
def test_unsigned_codes_have_a_shift(bits):
    weight = randn(6, 64) + 3
    tensor = QTensor.quantize(weight, f"uint{bits}", search="minmax")
    codes = tensor.codes().double()
    assert codes.max() <= 2**bits - 1
    want = codes.view(6, -1, tensor.group_size or 64) * tensor.scale.double().unsqueeze(-1)
    want = (want - tensor.shift.double().unsqueeze(-1)).view(6, 64)
    torch.testing.assert_close(tensor.dequantize(torch.float64), want, rtol=1e-6, atol=1e-6)
    step = tensor.scale.double().amax()
    assert (want - weight).abs().max() <= (step / 2 * 1.001 if bits > 1 else 2 * step)
    with pytest.raises(ValueError, match=f"quint{bits} codes are unsigned and need a shift; symmetric=True needs"):
        QTensor.quantize(weight, f"uint{bits}", symmetric=True)


def test_one_bit_is_the_mean_and_the_distance_from_it():
    weight = randn(2, 32)
    back = QTensor.quantize(weight, "uint1").dequantize()
    mean = weight.mean(1, keepdim=True)
    want = mean + (weight - mean).sign() * (weight - mean).abs().mean(1, keepdim=True)
    torch.testing.assert_close(back, want, rtol=1e-5, atol=1e-5)


def test_shifts_that_a_type_cannot_have():
    for name in ("nf4", "fp6_e3m2", "codebook2"):
        with pytest.raises(ValueError, match=r"proj: q\w+ codes are symmetric and have no shift"):
            QTensor.quantize(randn(4, 64), name, symmetric=False, name="proj")


# ------------------------------------------------------------------ widths


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
@pytest.mark.parametrize("symmetric", [False, True])
def test_integers_of_other_widths(bits, symmetric):
    weight = randn(5, 96)
    tensor = QTensor.quantize(weight, f"int{bits}", group_size=32, symmetric=symmetric, search="minmax")
    assert tensor.qdata.shape == (5, 96 * bits // 8)
    assert (tensor.dequantize() - weight).abs().max() <= tensor.scale.max() / 2 * 1.001
    assert tensor.bits_per_weight == bits + (32 if symmetric else 64) / 32


@pytest.mark.parametrize("name", ["int3", "int5", "nf3", "fp6_e2m3"])
def test_rows_are_cut_between_bytes_only(name):
    tensor = QTensor.quantize(randn(4, 96), name, group_size=4)
    whole = tensor.dequantize()
    assert torch.equal(tensor[:, 8:64].dequantize(), whole[:, 8:64])
    assert torch.equal(tensor[1:3].dequantize(), whole[1:3])
    byte = 4 * tensor.qtype.bits % 8
    if byte:
        assert not isinstance(tensor[:, 4:64], QTensor)
        assert torch.equal(tensor[:, 4:64], whole[:, 4:64])


@pytest.mark.parametrize("name", ["int3", "nf3", "codebook3"])
def test_tensor_parallel_cuts(name):
    from requanto.tensor.sharding import join_weights, slice_weight

    tensor = QTensor.quantize(randn(4, 96), name, group_size=32)
    assert torch.equal(slice_weight(tensor, 1, 48, 96).dequantize(), tensor.dequantize()[:, 48:])
    assert torch.equal(slice_weight(tensor, 0, 2, 4).dequantize(), tensor.dequantize()[2:])
    for dim, at in ((0, 2), (1, 48)):
        pieces = [slice_weight(tensor, dim, 0, at), slice_weight(tensor, dim, at, tensor.shape[dim])]
        assert torch.equal(join_weights(pieces, dim).dequantize(), tensor.dequantize())
    if tensor.codebook is not None:
        with pytest.raises(ValueError, match="codebooks of their own"):
            join_weights([tensor, QTensor.quantize(randn(4, 96, seed=1).exp(), name, group_size=32)], 0)
    with pytest.raises(NotImplementedError, match="falls inside a byte"):
        slice_weight(tensor, 1, 36, 96)


def test_all_types_in_one_model(tmp_path, exact):
    """Through quantize, the map, a state dict and requantize."""
    names = [
        "int3",
        "int5",
        "int6",
        "int7",
        "uint2",
        "uint8",
        "nf2",
        "nf4",
        "fp4",
        "fp5_e2m2",
        "codebook2",
        "codebook4",
    ]
    torch.manual_seed(0)
    make = lambda: torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in names))  # noqa: E731
    model = make()
    requanto.quantize(model, weights="int8", modules={str(i): name for i, name in enumerate(names)})
    requanto.freeze(model)
    assert [layer.weight.qtype.name for layer in model] == [f"q{name}" for name in names]
    x = torch.randn(3, 64)
    with torch.no_grad():
        want = model(x)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    again = make()
    requanto.requantize(again, state, requanto.quantization_map(model))
    with torch.no_grad():
        assert torch.equal(again(x), want)
    flat = requanto.checkpoint.flatten(model.state_dict())
    third = make()
    requanto.requantize(third, flat, requanto.quantization_map(model))
    with torch.no_grad():
        assert torch.equal(third(x), want)


def test_quantos_files_have_no_room_for_them():
    from requanto.checkpoint.foreign.quanto_files import from_qtensor, to_qtensor

    for name in ("int3", "uint8", "nf4", "codebook4"):
        with pytest.raises(requanto.CheckpointError, match=f"optimum-quanto has no type q{name}"):
            from_qtensor(QTensor.quantize(randn(4, 64), name), "proj")
        with pytest.raises(requanto.CheckpointError, match=f"optimum-quanto has no type q{name}"):
            to_qtensor({}, qtypes[f"q{name}"], (4, 64), "proj")
