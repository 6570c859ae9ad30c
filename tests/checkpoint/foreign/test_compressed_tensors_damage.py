"""Checkpoints of compressed-tensors that are damaged, or whose config is another's: refused, naming the tensor."""

import json

import pytest
import torch
from safetensors.torch import load_file

from requanto import QTensor
from requanto.checkpoint.foreign.readers import scan
from requanto.checkpoint.foreign.source import FilesSource, TensorsSource
from requanto.checkpoint.format import CheckpointError, rebuild


@pytest.fixture(scope="module")
def checkpoint(written):
    """(config, tensors, what the library decompresses)."""
    folder = written("ct")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    return config, load_file(folder / "model.safetensors"), load_file(folder / "reference.safetensors")


def read(config, tensors, module) -> QTensor:
    source = TensorsSource(tensors)
    weight = scan(config, source).weights[f"{module}.weight"]
    return rebuild(f"{module}.weight", weight.text, weight.build(source), torch.float32)


def group_of(config, module) -> dict:
    return next(group for group in config["config_groups"].values() if group["targets"] == [module])


def only(checkpoint, module) -> tuple[dict, dict]:
    """The config and tensors of one module."""
    config, tensors, _ = checkpoint
    tensors = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{module}.")}
    return json.loads(json.dumps({**config, "config_groups": {"it": group_of(config, module)}})), tensors


def weights(config):
    return config["config_groups"]["it"]["weights"]


NAN = float("nan")
#: case -> module, what to change in config and tensors, what the error says
BAD = {
    "no scale": (
        "int4_group",
        lambda c, t: t.pop("int4_group.weight_scale"),
        "int4_group.weight needs the tensor int4_group.weight_scale, which is not in the files",
    ),
    "no codes": (
        "int4_group",
        lambda c, t: t.pop("int4_group.weight_packed"),
        "the files hold int4_group.weight_s.*, but int4_group.weight and int4_group.weight_packed are missing",
    ),
    "no shape": (
        "int4_group",
        lambda c, t: t.pop("int4_group.weight_shape"),
        "int4_group.weight needs the tensor int4_group.weight_shape",
    ),
    "no zero points": (
        "int4_zeros",
        lambda c, t: t.pop("int4_zeros.weight_zero_point"),
        "int4_zeros.weight needs the tensor int4_zeros.weight_zero_point",
    ),
    "no global scale": (
        "nvfp4",
        lambda c, t: t.pop("nvfp4.weight_global_scale"),
        "nvfp4.weight needs the tensor nvfp4.weight_global_scale",
    ),
    "no input scale": (
        "fp8_static",
        lambda c, t: t.pop("fp8_static.input_scale"),
        "fp8_static.weight needs the tensor fp8_static.input_scale",
    ),
    "other bits": (
        "int4_group",
        lambda c, t: weights(c).update(num_bits=3),
        r"int4_group.weight_packed is int32 \(24, 12\), expected int32 \(24, 9\) for 96 codes of 3 bits",
    ),
    "other group": (
        "int4_group",
        lambda c, t: weights(c).update(group_size=16),
        r"int4_group.weight_scale is \w+ \(24, 3\), expected .* \(24, 6\)",
    ),
    "group that does not divide": (
        "int4_group",
        lambda c, t: weights(c).update(group_size=36),
        "rows of 96 weights, which groups of 36",
    ),
    "truncated codes": (
        "int4_group",
        lambda c, t: t.update({"int4_group.weight_packed": t["int4_group.weight_packed"][:, :5]}),
        r"int4_group.weight_packed is int32 \(24, 5\)",
    ),
    "other shape": (
        "int4_group",
        lambda c, t: t.update({"int4_group.weight_shape": torch.tensor([25, 96])}),
        r"int4_group.weight_shape is \(25, 96\), but int4_group.weight_packed has 24 rows",
    ),
    "NaN scale": (
        "int4_group",
        lambda c, t: t.update({"int4_group.weight_scale": torch.full((24, 3), NAN)}),
        "int4_group.weight_scale holds NaN or Inf",
    ),
    "global scale of zero": (
        "nvfp4",
        lambda c, t: t.update({"nvfp4.weight_global_scale": torch.zeros(1)}),
        "nvfp4.weight_row_scale holds NaN or Inf",
    ),
    "e8m0 NaN": (
        "mxfp4",
        lambda c, t: t.update({"mxfp4.weight_scale": torch.full((24, 3), 255, dtype=torch.uint8)}),
        "mxfp4.weight_scale holds NaN",
    ),
    "symmetric, but zero points": (
        "int4_zeros",
        lambda c, t: weights(c).update(symmetric=True),
        r"int4_zeros.weight_zero_point is int32 \(3, 3\), expected .* \(24, 3\)",
    ),
    "float, but integers": (
        "w8a8_token",
        lambda c, t: (weights(c).update(type="float"), c["config_groups"]["it"].pop("format")),
        "w8a8_token.weight is int8",
    ),
    "integers, but float": (
        "fp8_token",
        lambda c, t: (weights(c).update(type="int"), c["config_groups"]["it"].pop("format")),
        "fp8_token.weight is float8_e4m3fn .* expected int8",
    ),
    "another format": (
        "int4_group",
        lambda c, t: c["config_groups"]["it"].update(format="int-quantized"),
        "int4_group is int-quantized according to the config, but the files hold .*weight_packed.* and no weight",
    ),
    "an unknown format": (
        "int4_group",
        lambda c, t: c["config_groups"]["it"].update(format="pack-trellis"),
        "format is 'pack-trellis' .written by compressed-tensors .*, which this Requanto does not know",
    ),
    "an unknown key": (
        "int4_group",
        lambda c, t: weights(c).update(trellis=1),
        "has the key 'trellis' .written by compressed-tensors",
    ),
    "sparse": (
        "int4_group",
        lambda c, t: c.update(sparsity_config={"format": "sparse-24-bitmask"}),
        "'sparse-24-bitmask', without the values that were pruned",
    ),
    "marlin": (
        "int4_group",
        lambda c, t: c.update(format="marlin-24"),
        "'marlin-24', without the values that were pruned",
    ),
    "transforms": (
        "int4_group",
        lambda c, t: c.update(transform_config={"config_groups": {"u": {}}}),
        "transform_config is not empty",
    ),
    "a preset": (
        "int4_group",
        lambda c, t: c.update(config_groups={"W4A16": ["Linear"]}),
        "expected an object with targets and weights",
    ),
    "no groups": (
        "int4_group",
        lambda c, t: c.update(config_groups={}),
        "config_groups is {}, expected an object",
    ),
    "a pattern": (
        "int4_group",
        lambda c, t: c.update(ignore=["re:(int4"]),
        "which is no regular expression",
    ),
    "ignored": (
        "int4_group",
        lambda c, t: c.update(ignore=["re:int4_.*"]),
        "a quantized weight of int4_group, which quantization_config.ignore leaves float",
    ),
    "no group": (
        "int4_group",
        lambda c, t: c["config_groups"]["it"].update(targets=["other"]),
        "a quantized weight of int4_group, which no group of quantization_config.config_groups describes",
    ),
    "float, but named": (
        "int4_group",
        lambda c, t: (t.clear(), t.update({"int4_group.weight": torch.ones(24, 96)})),
        "int4_group.weight is float32 without scales, but quantization_config",
    ),
    "not compressed": (
        "int4_group",
        lambda c, t: t.update({"int4_group.weight": torch.ones(24, 96)}) or t.pop("int4_group.weight_packed"),
        "the model was saved before its weights were compressed",
    ),
    "g_idx out of range": (
        "int4_group",
        lambda c, t: t.update({"int4_group.weight_g_idx": torch.arange(96, dtype=torch.int32) // 24}),
        "int4_group.weight_g_idx holds groups from 0 to 3, and int4_group.weight has 3 groups",
    ),
    "g_idx uneven": (
        "int4_group",
        lambda c, t: t.update({"int4_group.weight_g_idx": (torch.arange(96) // 40).to(torch.int32)}),
        "puts 16 to 40 columns of int4_group.weight into a group, expected 32",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused(checkpoint, case):
    module, change, message = BAD[case]
    config, tensors = only(checkpoint, module)
    read(config, tensors, module)
    tensors = dict(tensors)
    change(config, tensors)
    with pytest.raises(CheckpointError, match=message):
        read(config, tensors, module)


def test_a_truncated_file_is_refused(written, tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes((written("ct") / "model.safetensors").read_bytes()[:-7])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        FilesSource([file])
