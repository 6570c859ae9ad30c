"""Layers that NVIDIA ModelOpt 0.47 exported (writers/modelopt_export.py), and files of Black Forest Labs."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from requanto.checkpoint.foreign.modelopt import recognize
from requanto.checkpoint.foreign.readers import scan
from requanto.checkpoint.foreign.source import FilesSource, TensorsSource
from requanto.checkpoint.format import CheckpointError, rebuild

DATA = Path(__file__).parent / "data" / "modelopt_0_47.safetensors"
#: name of the layer -> the line of its weight
LINES = {
    "nvfp4": "qnvfp4 4x128 group=16",
    "nvfp4_weights": "qnvfp4 4x128 group=16",
    "nvfp4_fp8": "qnvfp4 4x128 group=32",
    "nvfp4_awq": "qnvfp4 4x128 group=16",
    "nvfp4_svd": "qnvfp4 4x128 group=16 rank=32 columns",
    "fp8": "qfloat8_e4m3fn 4x128",
    "fp8_rows": "qfloat8_e4m3fn 4x128 activation=qfloat8_e4m3fn",
    "fp8_blocks": "qfloat8_e4m3fn 4x128",
    "mxfp8": "qmxfp8_e4m3 4x128 group=32",
    "mxfp4_fp8": "qmxfp4 4x128 group=32",
    "int8": "qint8 4x128",
    "int8_smooth": "qint8 4x128 columns",
    "int8_weights": "qint8 4x128",
    "int4_awq": "qint4 4x128",
}


@pytest.fixture(scope="module")
def exported():
    """(configs by name, tensors, what ModelOpt dequantizes)."""
    source = FilesSource([DATA])
    tensors = {name: source[name] for name in source if not name.startswith("reference.")}
    reference = {name.partition(".")[2]: source[name] for name in source if name.startswith("reference.")}
    return json.loads(source.metadata["hf_quant_configs"]), tensors, reference


def only(exported, name):
    """The config and tensors of one layer."""
    tensors = {key: value for key, value in exported[1].items() if key.startswith(f"{name}.")}
    return {**copy.deepcopy(exported[0][name]), "quant_method": "modelopt"}, tensors


def values(config, tensors, name):
    source = TensorsSource(tensors)
    weight = scan(config, source).weights[f"{name}.weight"]
    return rebuild(f"{name}.weight", weight.text, weight.build(source), torch.float32).dequantize()


@pytest.mark.parametrize("name", LINES)
def test_values_are_those_of_modelopt(exported, name):
    config, tensors = only(exported, name)
    found = scan(config, TensorsSource(tensors))
    assert found.table == {f"{name}.weight": LINES[name]}
    assert found.consumed == set(tensors)
    rounded = name in ("nvfp4_svd",)  # a product of matrices
    torch.testing.assert_close(
        values(config, tensors, name), exported[2][name], rtol=2e-6 if rounded else 0, atol=1e-6 * rounded
    )


def test_activations(exported):
    types, notes = {}, {}
    for name in LINES:
        config, tensors = only(exported, name)
        found = scan(config, TensorsSource(tensors))
        types |= {module: one.type for module, one in found.activations.items()}
        notes[name] = found.weights[f"{name}.weight"].note
        if name == "fp8":
            scale = found.activations[name].build(TensorsSource(tensors))
            assert torch.equal(scale, tensors["fp8.input_scale"])
    assert types == {"fp8": "qfloat8_e4m3fn", "int8": "qint8"}
    assert {name for name, note in notes.items() if not note} == {
        *("nvfp4_weights", "fp8", "fp8_rows", "int8", "int8_weights", "int4_awq"),
    }
    assert notes["int8_smooth"] == "inputs stay float; ModelOpt's kernels quantize them (int8)"


def test_the_config_of_config_json(exported):
    """As convert_hf_quant_config_format writes it, for several layers at once."""
    algorithms = {name: exported[0][name]["quantization"] for name in LINES}
    config = {
        "quant_method": "modelopt",
        "quant_algo": "MIXED_PRECISION",
        "ignore": ["lm_head", "model.*"],
        "quantized_layers": {
            name: {key: one[key] for key in ("quant_algo", "group_size") if key in one}
            for name, one in algorithms.items()
        },
        "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
        "producer": {"name": "modelopt", "version": "0.47.0"},
    }
    tensors = {**exported[1], "attn.k_proj.k_scale": torch.ones(()), "model.embed.weight": torch.ones(4, 4)}
    found = scan(config, TensorsSource(tensors))
    assert found.table == {f"{name}.weight": text for name, text in LINES.items()}
    assert set(tensors) - found.consumed == {"model.embed.weight"}
    assert "key-value cache" in found.format
    flat = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": []}
    assert scan(flat, TensorsSource(only(exported, "nvfp4")[1])).table == {"nvfp4.weight": LINES["nvfp4"]}


def test_hf_quant_config_is_recognized(exported):
    config, tensors = only(exported, "nvfp4")
    found = recognize({"hf_quant_config": exported[0]["nvfp4"]}, TensorsSource(tensors))
    assert found == config
    assert recognize({}, TensorsSource({"a.weight": torch.ones(2, 2)})) is None


@pytest.mark.parametrize("stored", [(2, 3), (2, 1, 3, 1)])
def test_blocks_of_float8(stored):
    codes, scale = torch.randn(160, 384).to(torch.float8_e4m3fn), torch.rand(2, 3) + 0.1
    tensors = {"a.weight": codes, "a.weight_scale": scale.reshape(stored)}
    config = {"quant_method": "modelopt", "quantization": {"quant_algo": "fp8_pb_wo"}}
    expected = codes.float() * scale.repeat_interleave(128, 0)[:160].repeat_interleave(128, 1)
    assert torch.equal(values(config, tensors, "a"), expected)


# ------------------------------------------------------------------ Black Forest Labs


def test_files_of_black_forest_labs(written):
    folder = written("hf")
    tensors, reference = load_file(folder / "bfl.safetensors"), load_file(folder / "bfl.reference.safetensors")
    source = TensorsSource(tensors)
    config = recognize({}, source)
    found = scan(config, source)
    assert found.table == {
        "blocks.0.fp8r.weight": "qfloat8_e4m3fn 24x64 activation=qfloat8_e4m3fn",
        "blocks.0.nvfp4.weight": "qnvfp4 24x64 group=16",
    }
    assert set(tensors) - found.consumed == {"blocks.0.norm.weight"}
    for name in ("blocks.0.fp8r", "blocks.0.nvfp4"):
        assert torch.equal(values(config, tensors, name), reference[name])
    # What says that it is another program's is left to its reader.
    assert recognize({}, TensorsSource({**tensors, "blocks.0.fp8r.comfy_quant": torch.ones(1)})) is None
    assert recognize({}, TensorsSource(tensors, {"_quantization_metadata": "{}"})) is None
    assert recognize({}, TensorsSource({**tensors, "blocks.0.fp8r.weight_scale": torch.ones(())})) is None


# ------------------------------------------------------------------ what is refused


BAD = {
    "no scale": ("nvfp4", lambda c, t: t.pop("nvfp4.weight_scale"), "nvfp4.weight needs the tensor nvfp4.weight_scale"),
    "no factor": (
        "nvfp4",
        lambda c, t: t.pop("nvfp4.weight_scale_2"),
        "nvfp4.weight needs the tensor nvfp4.weight_scale_2",
    ),
    "no codes": (
        "nvfp4",
        lambda c, t: t.pop("nvfp4.weight"),
        "the files hold nvfp4.weight_scale.*, but nvfp4.weight is missing",
    ),
    "floats": (
        "fp8",
        lambda c, t: t.update({"fp8.weight": t["fp8.weight"].float()}),
        "the files hold fp8.weight_scale, but fp8.weight is float32, expected codes",
    ),
    "no input scale": ("fp8", lambda c, t: t.pop("fp8.input_scale"), "fp8.weight needs the tensor fp8.input_scale"),
    "cut": (
        "nvfp4",
        lambda c, t: t.update({"nvfp4.weight": t["nvfp4.weight"][:, :60]}),
        r"nvfp4.weight is uint8 \(4, 60\), expected uint8 .* multiple of 16",
    ),
    "a cut scale": (
        "nvfp4",
        lambda c, t: t.update({"nvfp4.weight_scale": t["nvfp4.weight_scale"][:, :5]}),
        r"nvfp4.weight_scale is float8_e4m3fn \(4, 5\)",
    ),
    "NaN": (
        "nvfp4",
        lambda c, t: t.update({"nvfp4.weight_scale_2": torch.tensor(float("nan"))}),
        "nvfp4.weight_row_scale holds NaN or Inf",
    ),
    "another algorithm": (
        "nvfp4",
        lambda c, t: c["quantization"].update(quant_algo="FP8"),
        "nvfp4.weight needs the tensor|nvfp4.weight is uint8 .* expected float8_e4m3fn for FP8",
    ),
    "an unknown algorithm": (
        "nvfp4",
        lambda c, t: c["quantization"].update(quant_algo="NVFP3"),
        "quant_algo is 'NVFP3' .written by ModelOpt 0.47.0., which this Requanto does not know",
    ),
    "no algorithm": ("nvfp4", lambda c, t: c["quantization"].pop("quant_algo"), "quant_algo is None"),
    "refused": (
        "nvfp4",
        lambda c, t: c["quantization"].update(quant_algo="W4A8_AWQ"),
        "quant_algo is 'W4A8_AWQ': its weights are int4 rounded to float8 a second time",
    ),
    "excluded": (
        "nvfp4",
        lambda c, t: c["quantization"].update(exclude_modules=["nv*"]),
        "a quantized weight of nvfp4, which the config excludes",
    ),
    "not named": (
        "nvfp4",
        lambda c, t: c.update(
            quantization={"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": {"quant_algo": "FP8"}}}
        ),
        "nvfp4, which quantized_layers of the config does not name",
    ),
    "a cut pre-scale": (
        "nvfp4_svd",
        lambda c, t: t.update({"nvfp4_svd.pre_quant_scale": torch.ones(5)}),
        r"nvfp4_svd.pre_quant_scale is float32 \(5,\), expected .* \(128,\)",
    ),
    "a negative pre-scale": (
        "nvfp4_svd",
        lambda c, t: t["nvfp4_svd.pre_quant_scale"].neg_(),
        "nvfp4_svd.weight_column holds -.*, and a column scale is positive",
    ),
    "half a low-rank term": (
        "nvfp4_svd",
        lambda c, t: t.pop("nvfp4_svd.weight_quantizer._svdquant_lora_b"),
        "nvfp4_svd.weight needs the tensor nvfp4_svd.weight_quantizer._svdquant_lora_b",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused(exported, case):
    name, change, message = BAD[case]
    config, tensors = only(exported, name)
    tensors = {key: value.clone() for key, value in tensors.items()}
    values(config, tensors, name)
    change(config, tensors)
    with pytest.raises(CheckpointError, match=message):
        values(config, tensors, name)
