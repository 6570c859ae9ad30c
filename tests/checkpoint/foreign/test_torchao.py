"""Files of torchao's safetensors support: packed, equal to what torchao dequantizes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from requanto.checkpoint.foreign import readers
from requanto.checkpoint.foreign.source import FilesSource, Source, TensorsSource
from requanto.checkpoint.foreign.torchao import recognize
from requanto.checkpoint.format import CheckpointError, rebuild

CONFIG = {"quant_method": "torchao"}
FLOAT_INPUTS = "here they stay float"
#: file -> line, and the end of the note
LINES = {
    "int8_wo": "qint8 128x256",
    "int8_dyn": "qint8 128x256 activation=qint8",
    "int8_tensor": "qint8 128x256",
    "int8_asym": "quint8 128x256 affine zeros",
    "int8_asym_inputs": ("qint8 128x256", FLOAT_INPUTS),
    "int8_static": "qint8 128x256",
    "int8_pre": "qint8 128x256 activation=qint8 columns",
    "int8_experts": "qint8 3x128x128 axis=1",
    "intx1": "quint1 128x256 group=32 affine",
    **{f"intx{bits}": f"qint{bits} 128x256 group=32" for bits in range(2, 9)},
    **{f"intx{bits}_asym": f"qint{bits} 128x256 group=64 affine zeros" for bits in (2, 3, 4)},
    "intx8_asym": "quint8 128x256 group=64 affine zeros",
    "intx4_rows": "qint4 128x256",
    "intx4_inputs": ("qint4 128x256 group=32 affine zeros", FLOAT_INPUTS),
    "fp8_row": "qfloat8_e4m3fn 128x256",
    "fp8_dyn": "qfloat8_e4m3fn 128x256 activation=qfloat8_e4m3fn",
    "fp8_tensor": "qfloat8_e4m3fn 128x256",
    "fp8_block": "qfloat8_e4m3fn 128x256 group=128",
    "fp8_e5m2": "qfloat8_e5m2 128x256",
    "fp8_experts": "qfloat8_e4m3fn 3x128x128 axis=1",
    "fp8_expert_columns": "float: one scale for each column of an expert",
    "nvfp4": "qnvfp4 128x256 group=16",
    "nvfp4_plain": "qnvfp4 128x256 group=16",
    "nvfp4_swizzled": "qnvfp4 100x256 group=16",
    "nvfp4_dyn": "qnvfp4 128x256 group=16 activation=qnvfp4",
    "nvfp4_experts": "qnvfp4 3x128x128 group=16 axis=1",
    "mxfp8": "qmxfp8_e4m3 128x256 group=32",
    "mxfp8_e5m2": "qmxfp8_e5m2 128x256 group=32",
    "mxfp8_dyn": "qmxfp8_e4m3 128x256 group=32 activation=qmxfp8_e4m3",
    "mxfp6_e2m3": "qmxfp6_e2m3 128x256 group=32",
    "mxfp6_e3m2": "qmxfp6_e3m2 128x256 group=32",
    "mxfp4": "qmxfp4 128x256 group=32",
    "mxfp4_swizzled": "qmxfp4 128x256 group=32",
    "plain4": "qint4 128x256 group=32 affine",
    "plain4_fp8": "qint4 128x256 group=64 activation=qfloat8_e4m3fn",
    "plain4_pre": "qint4 128x256 group=32 affine columns",
    "plain4_experts": "qint4 3x128x128 group=64 affine axis=1",
    "tile4": "qint4 100x256 group=64 affine",
}


@pytest.fixture(scope="module")
def files(written: Callable[..., Path]) -> Path:
    return written("torchao_files")


def test_every_file_has_a_line(files: Path) -> None:
    assert set(json.loads((files / "names.json").read_text())) == set(LINES)


@pytest.mark.parametrize("case", LINES)
def test_values_are_those_of_torchao(files: Path, case: str) -> None:
    source = FilesSource([files / f"{case}.safetensors"])
    wanted = FilesSource([files / "wanted.safetensors"])[case]
    found = readers.scan(CONFIG, source)
    name = "model.layer.gate_up_proj" if "expert" in case else "model.layer.weight"
    assert source.keys() - found.consumed == {"model.layer.bias"}
    line = LINES[case]
    if name in found.floats:
        assert f"float: {found.floats[name].reason}" == line
        value = found.floats[name].build(source)
        assert (value.dtype, value.shape) == (found.floats[name].dtype, found.floats[name].shape)
    else:
        foreign = found.weights[name]
        text, note = (line, "") if isinstance(line, str) else line
        assert foreign.text == text
        assert foreign.note.endswith(note)
        assert bool(foreign.note) == bool(note)
        value = rebuild(name, foreign.text, foreign.build(source), wanted.dtype).dequantize()
    assert torch.equal(value, wanted)


def test_a_fixed_input_scale(files: Path) -> None:
    source = FilesSource([files / "int8_static.safetensors"])
    found = readers.scan(CONFIG, source).activations["model.layer"]
    assert found.type == "qint8"
    assert float(found.build(source)) == pytest.approx(0.03)


@pytest.mark.parametrize("case", ["plain4", "plain4_pre", "tile4", "intx3_asym"])
def test_layers_run(files: Path, case: str) -> None:
    source = FilesSource([files / f"{case}.safetensors"])
    foreign = readers.scan(CONFIG, source).weights["model.layer.weight"]
    weight = rebuild("w", foreign.text, foreign.build(source), torch.bfloat16)
    x = torch.randn(3, 256, dtype=torch.bfloat16, device="cpu")
    wanted = x.float() @ FilesSource([files / "wanted.safetensors"])[case].float().T
    torch.testing.assert_close(torch.nn.functional.linear(x, weight).float(), wanted, atol=0.02, rtol=0.02)


def test_files_without_a_config(files: Path) -> None:
    assert recognize({}, FilesSource([files / "int8_wo.safetensors"])) == CONFIG
    assert recognize({}, FilesSource([files / "wanted.safetensors"])) is None
    assert recognize({}, TensorsSource({}, {"tensor_names": "[]", "format": "pt", "a": '{"_type": "Tensor"}'})) is None


def opened(files: Path, case: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, torch.Tensor]]:
    """Description of the weight, all metadata and the tensors of a file."""
    source = FilesSource([files / f"{case}.safetensors"])
    metadata = dict(source.metadata)
    return json.loads(metadata["model.layer.weight"]), metadata, {key: source[key] for key in source}


@pytest.mark.parametrize(
    ("case", "attributes", "tensors", "message"),
    [
        ("int8_wo", {"block_size": [1, 100]}, {}, r"block_size=\[1, 100\].*sizes that divide \(128, 256\)"),
        ("int8_wo", {"block_size": [1, 64]}, {}, r"_weight_scale is float32 \(128, 1\), expected .* \(128, 4\)"),
        ("int8_wo", {"packing": "new"}, {}, "packing='new'.*a newer version wrote it"),
        ("int8_wo", {}, {"scale": None}, "model.layer.weight needs the tensor model.layer._weight_scale"),
        ("int8_wo", {}, {"qdata": torch.zeros(128, 256, dtype=torch.uint8)}, "_weight_qdata is uint8 .*expected int8"),
        ("intx4", {"target_dtype": "int4x"}, {}, "target_dtype='int4x'.*expected int1 to int8"),
        ("intx4", {"target_dtype": {"_type": "torch.dtype", "_data": "int3"}}, {}, "holds -8 to 7, expected int3"),
        ("intx4_asym", {}, {"zero_point": torch.full((128, 4), 9, dtype=torch.int8)}, "expected zero points of int4"),
        ("plain4", {"shape": [128, 250]}, {}, "block_size.*groups that divide rows of 250"),
        ("plain4", {"shape": [64, 256]}, {}, r"_weight_qdata .* expected .* \(64, 128\)"),
        ("plain4", {"activation_dtype": "int3"}, {}, "activation_dtype='int3'"),
        ("plain4_pre", {}, {"act_pre_scale": torch.ones(2, 256)}, "_weight_act_pre_scale"),
        ("tile4", {"shape": [300, 256]}, {}, "at most 104 x 1024"),
        ("tile4", {}, {"qdata": torch.zeros(13, 8, 16, 4, dtype=torch.int32)}, "_weight_qdata"),
        ("fp8_row", {}, {"scale": torch.ones(64, 1)}, r"_weight_scale is float32 \(64, 1\), expected"),
        ("nvfp4", {"block_size": 32}, {}, "block_size=32.*expected 16"),
        ("nvfp4_swizzled", {}, {"scale": torch.ones(100, 16).to(torch.float8_e4m3fn)}, "expected 2048"),
        ("nvfp4", {}, {"scale": torch.ones(128, 8).to(torch.float8_e4m3fn)}, r"\(128, 16\)"),
        ("mxfp4", {"elem_dtype": "fp5"}, {}, "elem_dtype='fp5'"),
        ("refused", {}, {}, "Int4PlainInt32Tensor: its codes are in an order of"),
    ],
)
def test_headers_and_tensors_that_disagree(
    files: Path, case: str, attributes: dict[str, Any], tensors: dict[str, Any], message: str
) -> None:
    described, metadata, stored = opened(files, case)
    described["_data"] |= attributes
    metadata["model.layer.weight"] = json.dumps(described)
    stored |= {f"model.layer._weight_{part}": value for part, value in tensors.items()}
    source = TensorsSource({key: value for key, value in stored.items() if value is not None}, metadata)
    with pytest.raises(CheckpointError, match=message):
        read(source)


def read(source: Source) -> None:
    for weight in readers.scan(CONFIG, source).weights.values():
        weight.build(source)


def test_unknown_classes_and_empty_headers(files: Path) -> None:
    described, metadata, stored = opened(files, "int8_wo")
    metadata["model.layer.weight"] = json.dumps({**described, "_type": "Int9Tensor"})
    with pytest.raises(CheckpointError, match=r"a torchao 'Int9Tensor', which torchao 0\.18 does not have"):
        readers.scan(CONFIG, TensorsSource(stored, metadata))
    with pytest.raises(CheckpointError, match="no header of a safetensors file describes a quantized tensor"):
        readers.scan(CONFIG, TensorsSource(stored, {"format": "pt"}))


def test_scale_without_a_number_is_damage(files: Path) -> None:
    _, metadata, stored = opened(files, "fp8_row")
    stored["model.layer._weight_scale"][3] = float("nan")
    source = TensorsSource(stored, metadata)
    foreign = readers.scan(CONFIG, source).weights["model.layer.weight"]
    with pytest.raises(CheckpointError, match="w_scale holds NaN"):
        rebuild("w", foreign.text, foreign.build(source), torch.float32)
