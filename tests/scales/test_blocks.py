"""NVFP4 and the MX formats: rounding, scales and bytes against a float64 reference and against torchao."""

import pytest
import torch

from requanto import QTensor, qtypes
from requanto.dtypes.bit_packing import unpack
from requanto.scales import blocks

TYPES = ["nvfp4", "mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3", "mxfp8_e5m2"]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def heavy(*shape, seed=0):
    """Weights with outliers, and rows and blocks of very different sizes."""
    rows = torch.logspace(-6, 2, shape[0]).view(-1, *[1] * (len(shape) - 1))
    return randn(*shape, seed=seed) * torch.exp(randn(*shape, seed=seed + 1)) * rows


def values_of(kind):
    """float64 values of all codes, in their order."""
    if kind.values is not None:
        return torch.tensor(kind.values, dtype=torch.float64)
    codes = torch.arange(256, dtype=torch.uint8).view(kind.dtype).double()
    return codes


def scales_of(tensor):
    """float64 scales from the stored bytes, by the definition of their format."""
    stored = tensor.inner_tensors()["scale"]
    assert stored.dtype == torch.uint8
    if tensor.qtype.blocks.scale == "e8m0":
        return torch.exp2(stored.double() - 127)
    return stored.view(torch.float8_e4m3fn).double() * tensor.row_scale.double()


# ------------------------------------------------------------------ numbers


def test_scale_codes_are_the_numbers_of_their_format():
    codes = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(
        blocks.decoded(codes, "e4m3").nan_to_num(999), codes.view(torch.float8_e4m3fn).float().nan_to_num(999)
    )
    assert torch.equal(
        blocks.decoded(codes, "e8m0").nan_to_num(999), codes.view(torch.float8_e8m0fnu).float().nan_to_num(999)
    )


@pytest.mark.parametrize("name", TYPES)
def test_rounding_is_to_the_nearest_value_and_ties_go_to_the_even_code(name):
    kind = qtypes[f"q{name}"]
    values = values_of(kind)
    finite = values[torch.isfinite(values)].unique()
    middle = ((finite[1:] + finite[:-1]) / 2).float()
    x = torch.cat(
        [randn(4000) * float(finite.max()) / 2, randn(500) * 1e-3, finite.float(), finite.float() * 3, middle]
    )
    found = blocks.rounded(x, kind)
    best = (x.double().unsqueeze(1) - finite).abs().amin(1)
    assert torch.equal((x.double() - found.double()).abs(), best)
    codes = blocks.encoded(found.copysign(x), kind)
    assert torch.equal(values[codes.view(torch.uint8).long()], found.double())
    assert torch.equal(codes.view(torch.uint8) >> (kind.bits - 1) != 0, x.signbit())
    tied = blocks.encoded(blocks.rounded(middle, kind), kind).view(torch.uint8)
    assert not bool((tied & 1).any())


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_a_weight_is_its_scale_times_its_code(name, method):
    weight = heavy(24, 160)
    tensor = QTensor.quantize(weight, name, search=method)
    group = tensor.group_size
    assert group == {"nvfp4": 16}.get(name, 32)
    scale = scales_of(tensor).repeat_interleave(group, -1)
    codes = tensor.codes()
    want = values_of(tensor.qtype)[codes.view(torch.uint8).long()] * scale
    torch.testing.assert_close(tensor.dequantize(torch.float64), want, rtol=2e-7, atol=0)
    # Each code is the nearest one for the stored scale.
    finite = values_of(tensor.qtype).nan_to_num(0, 0, 0).unique()
    best = torch.stack([(weight.double() - value * scale).abs() for value in finite]).amin(0)
    assert bool(((want - weight).abs() <= best * (1 + 1e-6) + 1e-12 * scale).all())


def test_e2m1_bytes_have_the_first_code_in_the_low_nibble():
    """As ModelOpt, compressed-tensors and gpt-oss store them: sign, exponent, mantissa in each nibble."""
    row = torch.tensor([6.0, -0.5, 1.0, 3.0, -6.0, 0.0, 1.5, 2.0] * 4).view(1, 32)
    tensor = QTensor.quantize(row, "mxfp4", search="minmax")
    assert tensor.inner_tensors()["scale"].item() == 127  # 2^0
    assert tensor.qdata[0, :4].tolist() == [0x97, 0x52, 0x0F, 0x43]
    assert unpack(tensor.qdata, 4, 32)[0, :8].tolist() == [7, 9, 2, 5, 15, 0, 3, 4]


# ------------------------------------------------------------------ scales


def test_the_plain_scale_is_the_rule_of_the_format():
    weight = heavy(32, 64, seed=3)
    largest = weight.view(32, 2, 32).abs().amax(-1).double()
    mx = QTensor.quantize(weight, "mxfp4", search="minmax")
    assert torch.equal(scales_of(mx), torch.exp2(torch.floor(torch.log2(largest)) - 2))
    nv = QTensor.quantize(weight, "nvfp4", search="minmax")
    assert torch.equal(nv.row_scale, torch.full((32, 1), float(weight.abs().max() / (6 * 448))))
    wanted = weight.view(32, 4, 16).abs().amax(-1) / 6 / nv.row_scale
    stored = nv.inner_tensors()["scale"].view(torch.float8_e4m3fn).float()
    # The smallest number stands for all scales below it, so that no block of small weights has a scale of 0.
    assert torch.equal(stored, wanted.to(torch.float8_e4m3fn).float().clamp(min=2.0**-9))


@pytest.mark.parametrize("name", TYPES)
def test_the_search_never_has_a_larger_error_than_the_rule(name):
    weight = heavy(32, 128, seed=5)
    weight[3] = 0
    group = qtypes[f"q{name}"].blocks.size

    def errors(method):
        tensor = QTensor.quantize(weight, name, search=method)
        return (tensor.dequantize() - weight).view(32, -1, group).double().norm(dim=-1), tensor

    (plain, _), (found, tensor) = errors("minmax"), errors("mse")
    assert float(found.norm()) <= float(plain.norm())
    if name != "nvfp4":  # the same scales can be stored; of NVFP4 the number of the tensor differs
        assert bool((found <= plain).all())
    assert not bool(tensor.dequantize()[3].any())
    assert bool(torch.isfinite(tensor.scale).all())


def test_a_tensors_number_is_of_each_matrix():
    weight = torch.stack([randn(8, 32), 100 * randn(8, 32, seed=1), torch.zeros(8, 32)])
    tensor = QTensor.quantize(weight, "nvfp4")
    assert tensor.row_scale.shape == (3, 8, 1)
    for one, whole in zip(weight, tensor):
        alone = QTensor.quantize(one, "nvfp4")
        assert torch.equal(alone.row_scale, whole.row_scale)
        assert torch.equal(alone.dequantize(), whole.dequantize())
    assert tensor.row_scale[2, 0] == 1


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e30, 1e37])
def test_sizes_at_the_ends_of_float32(name, size):
    weight = randn(4, 64) * size
    tensor = QTensor.quantize(weight, name)
    assert bool(torch.isfinite(tensor.dequantize()).all())
    if size > 1e-38:
        assert float((tensor.dequantize() / size - weight / size).norm() / (weight / size).norm()) < 0.15


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(name, bad):
    weight = randn(4, 64)
    weight[2, 5] = bad
    with pytest.raises(ValueError, match="w holds NaN or Inf"):
        QTensor.quantize(weight, name, name="w")


def test_a_search_of_ones_own_is_rounded_to_scales_that_exist():
    weight = randn(4, 64)

    def thirds(groups, kind, affine):
        return torch.full(groups.shape[:2], 0.3), None

    assert torch.equal(QTensor.quantize(weight, "mxfp4", search=thirds).scale, torch.full((4, 2), 0.25))
    nv = QTensor.quantize(weight, "nvfp4", search=thirds)
    assert bool(((nv.scale - 0.3).abs() < 0.3 / 16).all())


# ------------------------------------------------------------------ torchao's bytes

#: Two rows of 32 bfloat16 numbers as bits, and the scales and codes that torchao 0.18.0 makes of them on a CPU:
#: `nvfp4_quantize` with the scale of `per_tensor_amax_to_scale`, and `to_mx` with ScaleCalculationMode.FLOOR.
TORCHAO = {
    "weight": [
        0,
        -32768,
        15744,
        -16832,
        16032,
        -16672,
        16160,
        -16544,
        15311,
        -17003,
        15537,
        15513,
        15239,
        16065,
        15815,
        -17053,
        -16900,
        -16723,
        15561,
        15779,
        15886,
        -16939,
        -16954,
        16008,
        15728,
        -16618,
        -17619,
        15503,
        15688,
        15738,
        15816,
        -16848,
        -16733,
        14933,
        -17010,
        15659,
        15187,
        15111,
        15697,
        15727,
        -17321,
        15791,
        -17114,
        15368,
        15785,
        15814,
        -16732,
        -17023,
        -17906,
        14497,
        14977,
        14644,
        -17890,
        -17902,
        14691,
        -17980,
        -18053,
        14838,
        15402,
        15126,
        -17693,
        -17534,
        15254,
        -17647,
    ],
    "nvfp4": ("7e79724b", "80b1d4f690005091eb21a35af10811c20f2b0022390a43af090199801837caa5"),
    "mxfp4": ("7c7b", "80b1e4f690005092da10a24ae10811b20f1a0022380933af0800888008008880"),
    "mxfp6_e2m3": (
        "7c7b",
        "0020042c12361a3e00250101001406242833020509272610043920010304062b3a00290500000707220b25010b0c3a2820000000202000202000010020210120",
    ),
    "mxfp6_e3m2": (
        "7a79",
        "00201036193b1d3f03310a09021a122f34390a1114333218103d21080e1012363d013411030213132b15310815163d3421000100212100202000090222240522",
    ),
    "mxfp8_e4m3": (
        "7675",
        "008060ec72f67afe45e15352407464dee8f3556269e5e4705ff9bb515c6064ebfa35e96345406567d56be2506b6cfae8b11a3823b2b126aca82f5341bec849c1",
    ),
    "mxfp8_e5m2": (
        "6f6e",
        "00806cf275f779fb5eed66655c766eebf0f5666d70efee746cf9d9646a6c6ef2f957f06d5f5c6f6fe771ed647172f9f0d449584ed5d54fd2d054655ddbe061dd",
    ),
}


@pytest.mark.parametrize("name", TYPES)
def test_the_plain_methods_give_torchaos_bytes(name):
    weight = torch.tensor(TORCHAO["weight"], dtype=torch.int16).view(torch.bfloat16).view(2, 32)
    tensor = QTensor.quantize(weight, name, search="minmax")
    parts = tensor.inner_tensors()
    codes = parts["qdata"].view(torch.uint8)
    if tensor.qtype.bits == 6:  # torchao has one code a byte here
        codes = tensor.codes()
    scale, data = (bytes.fromhex(text) for text in TORCHAO[name])
    assert bytes(parts["scale"].flatten().tolist()) == scale
    assert bytes(codes.flatten().tolist()) == data


# ------------------------------------------------------------------ activations


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [64, 50, 5])
def test_activations_are_rounded_in_blocks_along_the_last_axis(name, dtype, length):
    kind = qtypes[f"q{name}"]
    x = (heavy(6, length, seed=7) / 100).to(dtype)
    x[4] = 0
    found = blocks.round_blocks(x.view(2, 3, length), kind)
    assert found.dtype == dtype
    assert found.shape == (2, 3, length)
    strided = x.t().contiguous().t()  # as a transposed view
    assert torch.equal(blocks.round_blocks(strided, kind).contiguous(), found.view(6, length))
    size = kind.blocks.size
    whole = torch.nn.functional.pad(x.float(), (0, -length % size))
    for row, got in zip(whole, found.view(6, length)):  # each row as a weight of its own
        want = QTensor.quantize(row.unsqueeze(0), kind, group_size=size).dequantize()[0, :length]
        assert torch.equal(got, want.to(dtype))


def test_a_block_with_nan_or_infinity_becomes_nan():
    x = randn(3, 64)
    x[0, 3], x[1, 40] = float("nan"), float("-inf")
    for name in TYPES:
        found = blocks.round_blocks(x, qtypes[f"q{name}"])
        assert bool(found[0, 3].isnan())
        assert bool(found[1, 40].isnan())
        assert bool(torch.isfinite(found[2]).all())
