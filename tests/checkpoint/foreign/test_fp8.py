"""float8 checkpoints of Transformers, written by its own quantizer: blocks, rows, one number; what is refused."""

import pytest
import torch
from safetensors.torch import load_file

from requanto.checkpoint.foreign.readers import scan
from requanto.checkpoint.foreign.source import TensorsSource
from requanto.checkpoint.format import CheckpointError, rebuild

#: module -> its block, its line, what of the config differs
CASES = {
    "blocks": ([128, 128], "qfloat8_e4m3fn 256x384 group=128", {}),
    "small": ([32, 64], "qfloat8_e4m3fn 96x64", {}),
    "powers": ([32, 64], "qfloat8_e4m3fn 64x128 group=64", {"scale_fmt": "ue8m0"}),
    "micro": ([1, 32], "qmxfp8_e4m3 24x96 group=32", {"scale_fmt": "ue8m0"}),
    "ragged": ([128, 128], "qfloat8_e4m3fn 200x160 group=32", {}),
    "tensor": (None, "qfloat8_e4m3fn 24x32 activation=qfloat8_e4m3fn", {}),
    "static": (None, "qfloat8_e4m3fn 24x32", {"activation_scheme": "static"}),
}


@pytest.fixture(scope="module")
def stored(written):
    """(tensors, what Transformers dequantizes)."""
    folder = written("hf")
    return load_file(folder / "fp8.safetensors"), load_file(folder / "fp8.reference.safetensors")


def only(stored, module):
    return {name: tensor for name, tensor in stored[0].items() if name.startswith(f"{module}.")}


def config_of(block, **more):
    return {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": block, **more}


def values(found, tensors, name):
    weight = found.weights[name]
    return rebuild(name, weight.text, weight.build(TensorsSource(tensors)), torch.float32).dequantize()


@pytest.mark.parametrize("module", CASES)
def test_values_are_those_of_transformers(stored, module):
    block, text, more = CASES[module]
    tensors = only(stored, module)
    found = scan(config_of(block, **more), TensorsSource(tensors))
    assert found.table == {f"{module}.weight": text}
    assert found.consumed == set(tensors)
    assert torch.equal(values(found, tensors, f"{module}.weight"), stored[1][module])


def test_activations(stored):
    tensors = only(stored, "static")
    found = scan(config_of(None, activation_scheme="static"), TensorsSource(tensors))
    assert found.activations["static"].type == "qfloat8_e4m3fn"
    assert torch.equal(found.activations["static"].build(TensorsSource(tensors)), torch.tensor(0.5))
    found = scan(config_of([128, 128]), TensorsSource(only(stored, "blocks")))
    assert "quantized to float8 in groups of 128" in found.weights["blocks.weight"].note
    assert not found.activations


def test_codes_are_not_copied(stored):
    tensors = only(stored, "blocks")
    weight = scan(config_of([128, 128]), TensorsSource(tensors)).weights["blocks.weight"]
    assert weight.build(TensorsSource(tensors))["qdata"].data_ptr() == tensors["blocks.weight"].data_ptr()


def test_blocks_that_leave_no_groups_are_dequantized(stored):
    """100 columns in blocks of 64 would need groups of 4."""
    tensors = only(stored, "crooked")
    weight = scan(config_of([8, 64]), TensorsSource(tensors)).floats["crooked.weight"]
    assert "do not divide rows of 100 into groups of 8 or more" in weight.reason
    made = weight.build(TensorsSource(tensors))
    assert (made.shape, made.dtype) == (weight.shape, weight.dtype)
    assert torch.equal(made, stored[1]["crooked"])


def test_experts_that_are_stored_together(stored):
    tensors = {name: value for name, value in stored[0].items() if name.startswith("experts.gate_up_proj")}
    found = scan(config_of([32, 64]), TensorsSource(tensors))
    assert found.table == {"experts.gate_up_proj": "qfloat8_e4m3fn 3x64x128 group=64 axis=1"}
    assert torch.equal(values(found, tensors, "experts.gate_up_proj"), stored[1]["experts.gate_up_proj"])


def test_joined_projections_begin_blocks_of_their_own():
    """Two projections of 24 rows, in blocks of 16: 16 + 8, twice."""
    codes = torch.randn(2, 48, 32).to(torch.float8_e4m3fn)
    scale = torch.rand(2, 4, 1) + 0.1
    tensors = {"experts.gate_up_proj": codes, "experts.gate_up_proj_scale_inv": scale}
    found = scan(config_of([16, 32]), TensorsSource(tensors))
    rows = scale.repeat_interleave(torch.tensor([16, 8, 16, 8]), 1)
    assert torch.equal(values(found, tensors, "experts.gate_up_proj"), codes.float() * rows)


def test_experts_of_four_bits(stored):
    tensors = {name: value for name, value in stored[0].items() if name.startswith("experts.0.")}
    found = scan(config_of([128, 128], scale_fmt="ue8m0", expert_dtype="fp4"), TensorsSource(tensors))
    assert found.table == {"experts.0.w1.weight": "qmxfp4 16x64 group=32"}
    assert torch.equal(values(found, tensors, "experts.0.w1.weight"), stored[1]["experts.0.w1"])


def test_mxfp8(stored):
    """The scales may be stored as bytes."""
    tensors = only(stored, "micro")
    tensors["micro.weight_scale_inv"] = tensors["micro.weight_scale_inv"].view(torch.uint8)
    found = scan({"quant_method": "mxfp8"}, TensorsSource(tensors))
    assert found.table == {"micro.weight": "qmxfp8_e4m3 24x96 group=32"}
    assert torch.equal(values(found, tensors, "micro.weight"), stored[1]["micro"])


@pytest.mark.parametrize("name", ["weight_scale", "scale", "qscale_weight"])
def test_other_names_of_the_scale(stored, name):
    tensors = only(stored, "blocks")
    tensors[f"blocks.{name}"] = tensors.pop("blocks.weight_scale_inv")
    tensors["q_norm.scale"] = torch.ones(8)
    found = scan(config_of([128, 128]), TensorsSource(tensors))
    assert found.consumed == set(tensors) - {"q_norm.scale"}
    assert torch.equal(values(found, tensors, "blocks.weight"), stored[1]["blocks"])


def test_tables_have_no_quantized_inputs(stored):
    tensors = only(stored, "tensor")
    tensors = {
        "ngram.weight": tensors["tensor.weight"],
        "ngram.weight_scale": tensors["tensor.weight_scale_inv"].reshape(1),
    }
    assert scan(config_of([128, 128]), TensorsSource(tensors)).table == {"ngram.weight": "qfloat8_e4m3fn 24x32"}


def test_fbgemm():
    codes, scale = torch.randn(24, 32).to(torch.float8_e4m3fn), torch.rand(24, 1) + 0.1
    experts, rows, length = 2, 24, 32
    together = torch.randn(experts, length, rows).to(torch.float8_e4m3fn)
    tensors = {
        "q_proj.weight": codes,
        "q_proj.weight_scale": scale,
        "q_proj.input_scale_ub": torch.tensor([1200.0]),
        "experts.gate_up_proj": together,
        "experts.gate_up_proj_scale": torch.rand(experts, 1, rows) + 0.1,
        "experts.down_proj": together,
        "experts.down_proj_scale": torch.rand(experts, rows, 1) + 0.1,
    }
    found = scan({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, TensorsSource(tensors))
    assert found.table == {
        "q_proj.weight": "qfloat8_e4m3fn 24x32 activation=qfloat8_e4m3fn",
        **{
            f"experts.{name}_proj": "qfloat8_e4m3fn 2x32x24 axis=1 transposed activation=qfloat8_e4m3fn"
            for name in ("gate_up", "down")
        },
    }
    assert found.consumed == set(tensors)
    assert torch.equal(values(found, tensors, "q_proj.weight"), codes.float() * scale)
    for name in ("gate_up", "down"):
        expected = together.float() * tensors[f"experts.{name}_proj_scale"].reshape(experts, 1, rows)
        assert torch.equal(values(found, tensors, f"experts.{name}_proj"), expected)


def test_scales_of_a_quantized_cache_are_left_out(stored):
    tensors = {**only(stored, "blocks"), "self_attn.k_scale": torch.ones(1), "self_attn.v_scale": torch.ones(1)}
    found = scan(config_of([128, 128]), TensorsSource(tensors))
    assert found.consumed == set(tensors)
    assert "key-value cache" in found.format


NAN = float("nan")
BAD = {
    "no scale": (
        lambda c, t: t.pop("blocks.weight_scale_inv"),
        "blocks.weight is float8_e4m3fn, and the files hold no scale for it .expected blocks.weight_scale_inv",
    ),
    "a scale without codes": (
        lambda c, t: t.update({"blocks.weight": t["blocks.weight"].float()}),
        "the files hold the scale blocks.weight_scale_inv, but blocks.weight is float32, not float8",
    ),
    "a scale alone": (
        lambda c, t: t.pop("blocks.weight"),
        "the files hold the scale blocks.weight_scale_inv, but blocks.weight is missing",
    ),
    "other blocks": (
        lambda c, t: c.update(weight_block_size=[64, 64]),
        r"blocks.weight_scale_inv is float32 \(2, 3\), expected one scale for blocks.weight .* \(4, 6\)",
    ),
    "cut": (
        lambda c, t: t.update({"blocks.weight_scale_inv": t["blocks.weight_scale_inv"][:, :2]}),
        r"blocks.weight_scale_inv is float32 \(2, 2\)",
    ),
    "NaN": (
        lambda c, t: t.update({"blocks.weight_scale_inv": torch.full((2, 3), NAN)}),
        "blocks.weight_scale holds NaN or Inf",
    ),
    "scales of whole numbers": (
        lambda c, t: t.update({"blocks.weight_scale_inv": torch.ones(2, 3, dtype=torch.int32)}),
        "expected scales in float32, bfloat16, float16 or e8m0",
    ),
    "left float": (
        lambda c, t: c.update(modules_to_not_convert=["blocks"]),
        "modules_to_not_convert leaves blocks float",
    ),
    "one size": (lambda c, t: c.update(weight_block_size=128), "weight_block_size is 128, expected two sizes"),
    "a scheme": (
        lambda c, t: c.update(activation_scheme="lazy"),
        "activation_scheme is 'lazy', expected 'dynamic' or 'static'",
    ),
    "a new format": (
        lambda c, t: c.update(scale_fmt="e5m3"),
        "scale_fmt is 'e5m3', and this Requanto knows float and ue8m0",
    ),
    "no static scale": (
        lambda c, t: c.update(activation_scheme="static"),
        "blocks.weight needs the tensor blocks.activation_scale",
    ),
    "one axis": (
        lambda c, t: t.update({"blocks.weight": t["blocks.weight"][0]}),
        "expected float8 with 2 axes, or 3 of experts",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused(stored, case):
    change, message = BAD[case]
    config, tensors = config_of([128, 128]), only(stored, "blocks")
    values(scan(config, TensorsSource(tensors)), tensors, "blocks.weight")
    change(config, tensors)
    with pytest.raises(CheckpointError, match=message):
        values(scan(config, TensorsSource(tensors)), tensors, "blocks.weight")
