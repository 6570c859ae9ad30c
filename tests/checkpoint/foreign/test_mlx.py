"""MLX: files of its own quantization (writers/mlx_files.py), equal to its own float32 dequantization bit for bit."""

import json

import pytest
import torch
from safetensors.torch import load_file

from requanto.checkpoint.foreign import mlx, readers
from requanto.checkpoint.foreign.source import TensorsSource
from requanto.checkpoint.format import CheckpointError

LINES = {
    "embed_tokens.weight": "qint4 32x128 group=64 affine signed",
    "affine1.weight": "quint1 32x128 group=32 affine signed",
    "affine2.weight": "qint2 32x128 group=32 affine signed",
    "affine3.weight": "qint3 32x128 group=32 affine signed",
    "affine4.weight": "qint4 32x128 group=64 affine signed",
    "affine5.weight": "qint5 32x128 group=32 affine signed",
    "affine6.weight": "qint6 32x128 group=32 affine signed",
    "affine8.weight": "quint8 32x128 group=32 affine signed",
    "half.weight": "qint4 32x64 affine signed",
    "mxfp4.weight": "qmxfp4 32x128 group=32",
    "mxfp8.weight": "qmxfp8_e4m3 32x128 group=32",
    "nvfp4.weight": "qnvfp4 32x128 group=16",
    **{f"layers.0.mlp.experts.{e}.up_proj.weight": "qint4 16x64 affine signed" for e in range(3)},
    **{f"layers.0.block_sparse_moe.experts.{e}.w2.weight": "qnvfp4 16x64 group=16" for e in range(3)},
}


@pytest.fixture
def files(written):
    folder = written("mlx_files")
    config = json.loads((folder / "config.json").read_text())
    return config, load_file(folder / "model.safetensors"), load_file(folder / "expected.safetensors")


def scan(config, tensors, **description):
    source = TensorsSource(tensors)
    found = readers.recognize({"quantization": config, "quantization_config": config, **description}, source)
    assert found["quant_method"] == "mlx"
    return mlx.scan(found, source)


def test_weights_equal_the_library(files, made):
    config, tensors, expected = files
    found = scan(config, tensors)
    assert found.format == "MLX, 4 bits, group size 64"
    assert found.table == LINES
    assert set(tensors) - found.consumed == {"affine4.bias", "norm.weight", "dense.weight", "dense.bias"}
    stacked = {
        "layers.0.mlp.experts.": "layers.0.mlp.switch_mlp.up_proj.",
        "layers.0.block_sparse_moe.experts.": "layers.0.block_sparse_moe.switch_mlp.down_proj.",
    }
    for name, weight in made(found, TensorsSource(tensors)).items():
        key = name
        for own, theirs in stacked.items():
            if name.startswith(own):
                key = f"{theirs}{name.removeprefix(own).split('.')[0]}.weight"
        wanted = expected.pop(key)
        if name == "half.weight":  # MLX rounds code * scale to bfloat16 before it adds the bias
            product = weight.codes().float() * tensors["half.scales"].float()
            error = (weight.dequantize() - wanted.float()).abs()
            assert bool((error <= 2.0**-8 * (product.abs() + wanted.float().abs())).all())
        else:
            assert torch.equal(weight.dequantize(), wanted), name
    assert not expected
    assert bool((tensors["affine4.scales"] < 0).any())  # what "signed" is for


def test_scales_keep_their_dtype(files, made):
    config, tensors, _ = files
    found = scan(config, tensors)
    parts = found.weights["half.weight"].build(TensorsSource(tensors))
    assert {part: value.dtype for part, value in parts.items()} == {
        "qdata": torch.uint8,
        "scale": torch.bfloat16,
        "shift": torch.bfloat16,
    }


def test_stacked_weights_of_other_names_stay_stacked(files, made):
    config, tensors, _ = files
    moved = {
        f"m.experts.gate.{part}": tensors[f"layers.0.mlp.switch_mlp.up_proj.{part}"] for part in ("weight", "scales")
    }
    moved["m.experts.gate.biases"] = tensors["layers.0.mlp.switch_mlp.up_proj.biases"]
    found = scan(config, moved)
    assert found.table == {"m.experts.gate.weight": "qint4 3x16x64 affine axis=1 signed"}
    whole = made(found, TensorsSource(moved))["m.experts.gate.weight"].dequantize()
    one = made(scan(config, tensors), TensorsSource(tensors))["layers.0.mlp.experts.1.up_proj.weight"].dequantize()
    assert torch.equal(whole[1], one)


def test_values_that_mlx_lm_changes_are_changed_back(files, made):
    config, tensors, _ = files
    kernels = torch.randn(8, 1, 4, generator=torch.Generator().manual_seed(0))
    norm = torch.tensor([0.25, -0.5, 1.5], dtype=torch.bfloat16)
    given = {name: value for name, value in tensors.items() if name.startswith("affine4.")}
    given |= {
        "l.linear_attn.conv1d.weight": kernels.transpose(1, 2).contiguous(),
        "l.input_layernorm.weight": norm + 1,
        "l.linear_attn.norm.weight": norm,
    }
    found = scan(config, given, model_type="qwen3_next")
    weights = made(found, TensorsSource(given))
    assert torch.equal(weights["l.linear_attn.conv1d.weight"], kernels)
    assert torch.equal(weights["l.input_layernorm.weight"], norm)
    assert "l.linear_attn.norm.weight" not in weights
    assert list(scan(config, given, model_type="mamba").floats) == ["l.linear_attn.conv1d.weight"]


@pytest.mark.parametrize(
    "description",
    [
        {},
        {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 64}},
        {"quantization": {"group_size": 64}},
        {"quantization": 4},
    ],
)
def test_other_configs_are_not_recognized(files, description):
    assert mlx.recognize(description, TensorsSource(files[1])) is None
    assert mlx.recognize({"quantization": files[0]}, TensorsSource({"m.weight": torch.zeros(2)})) is None
    assert mlx.recognize({"text_config": {"quantization": files[0]}}, TensorsSource(files[1])) is not None


# ---------------------------------------------------------------------- bad input


def test_missing_codes(files):
    config, tensors, _ = files
    del tensors["affine4.weight"]
    with pytest.raises(CheckpointError, match=r"affine4.weight needs the tensor affine4.weight"):
        scan(config, tensors)


@pytest.mark.parametrize("part", ["scales", "biases"])
def test_missing_and_cut_parts(files, part):
    config, tensors, _ = files
    whole = tensors.pop(f"affine4.{part}")
    with pytest.raises(CheckpointError, match=rf"affine4.weight needs the tensor affine4.{part}"):
        scan(config, tensors)
    with pytest.raises(CheckpointError, match=rf"affine4.{part} is .*expected"):
        scan(config, {**tensors, f"affine4.{part}": whole[:, :-1].contiguous()})


def test_scales_that_are_nan(files, made):
    config, tensors, _ = files
    tensors["affine4.scales"][3, 1] = float("nan")
    with pytest.raises(CheckpointError, match=r"affine4.weight_scale holds NaN or Inf"):
        made(scan(config, tensors), TensorsSource(tensors))
    config, tensors, _ = files
    tensors["affine4.scales"][3, 1] = 1
    tensors["nvfp4.scales"][3, 1] = 0x7F
    with pytest.raises(CheckpointError, match=r"nvfp4.weight_scale holds NaN among its e4m3 codes"):
        made(scan(config, tensors), TensorsSource(tensors))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 7}, "bits 7 and group_size 64; MLX has affine with 1 to 6 or 8 bits"),
        ({"bits": True}, "bits True"),
        ({"group_size": 0}, "group_size 0"),
        ({"mode": "fp4"}, "mode 'fp4'"),
        ({"mode": "nvfp4"}, "mode 'nvfp4', bits 4 and group_size 64"),
        ({"group_size": 32}, r"scales is .*expected"),
        ({"affine2": {"group_size": 32, "bits": 4}}, "affine2.scales is"),
        ({"affine2": False}, r"quantization\['affine2'\] is false, and affine2.weight is quantized"),
    ],
)
def test_configs_that_do_not_fit(files, changes, message):
    config, tensors, _ = files
    with pytest.raises(CheckpointError, match=message):
        scan({**config, **changes}, tensors)
