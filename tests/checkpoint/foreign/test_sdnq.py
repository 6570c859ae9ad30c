"""Layers that SDNQ saved: packed where our format holds them, equal to what SDNQ dequantizes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from requanto.checkpoint.foreign import readers
from requanto.checkpoint.foreign.sdnq import settings_of
from requanto.checkpoint.foreign.source import FilesSource, TensorsSource
from requanto.checkpoint.format import CheckpointError, rebuild

#: case -> the line of the layer "wide", a Linear(128, 64); "float: ..." is the reason why it is dequantized
LINES = {
    "uint1": "quint1 64x128 group=8 affine",
    **{f"uint{bits}": f"qint{bits} 64x128" for bits in range(2, 8)},
    "uint8": "quint8 64x128 affine",
    **{f"int{bits}": f"qint{bits} 64x128" for bits in range(2, 9)},
    "int4_rows": "qint4 64x128",
    "uint4_g16_bf16": "qint4 64x128 group=16 affine",
    "int8_tensor": "qint8 64x128",
    "uint4_tensor": "qint4 64x128 affine",
    "int8_matmul": "qint8 64x128",
    "uint8_matmul": "quint8 64x128 affine",
    "uint4_matmul_svd": "qint4 64x128 affine rank=8",
    "int8_matmul_svd": "qint8 64x128 rank=8",
    "uint4_svd": "qint4 64x128 affine rank=8",
    "fp8": "qfloat8_e4m3fn 64x128",
    "fp8_matmul": "qfloat8_e4m3fn 64x128",
    "fp8_e5m2": "qfloat8_e5m2 64x128 group=32",
    "fp6": "qfp6_e3m2 64x128",
    "fp4": "qfp4_e2m1 64x128 group=16",
    "fp2": "qcodebook2 64x128 group=16",
    "nvfp4": "qnvfp4 64x128 group=16",
    "scales_uint8": "qint4 64x128 group=32 affine",
    "scales_int8": "qint4 64x128 group=32",
    "scales_codebook": "qint4 64x128 group=32 affine",
    "codebook_tensor": "qcodebook4 64x128",
    "codebook_groups": "float: uint3 codes with a codebook for each group have no type here",
    "fp8_e3m4": "float: float8_e3m4fn codes have no type here",
    "ufp4": "float: float4_e2m2fnu codes have no type here",
    "int12": "float: int12 codes have no type here",
    "hadamard_32": "qint4 64x128 group=64 rotation=32",
    "hadamard_svd_32": "qint4 64x128 affine rank=8 rotation=32",
    "hadamard_64_int4": "qint4 64x128 group=64 rotation=64 columns signed order",
    "hadamard_64_uint4": "float: codes with a zero point, rotated by a Hadamard matrix that is not Sylvester's",
    "hadamard_64_int8": "qint8 64x128 rotation=64 columns signed order",
    "hadamard_64_fp8": "qfloat8_e4m3fn 64x128 rotation=64 columns signed order",
    "hadamard_64_fp6": "qfp6_e3m2 64x128 rotation=64 columns signed order",
    "hadamard_svd_64": "qint5 64x128 rank=8 rotation=64 columns signed order",
    "dynamic": "qint6 64x128",
    "mixed": "qint4 64x128 group=64 affine",
    "conv": "qint4 64x128 group=16 affine",
    "conv_int8": "qint8 64x128",
    "conv_svd": "qint6 64x128 rank=8",
    "conv_codebook": "float: uint4 codes with a codebook for each group have no type here",
}


@pytest.fixture(scope="module")
def files(written: Callable[..., Path]) -> Path:
    return written("sdnq_files")


def opened(folder: Path) -> tuple[dict[str, Any], FilesSource, FilesSource]:
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    return config, FilesSource([folder / "model.safetensors"]), FilesSource([folder / "wanted.safetensors"])


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference by the largest weight."""
    assert found.shape == wanted.shape
    return float((found.float() - wanted.float()).abs().max() / wanted.float().abs().max())


@pytest.mark.parametrize("case", LINES)
def test_values_are_those_of_sdnq(files: Path, case: str) -> None:
    config, source, wanted = opened(files / case)
    found = readers.scan(config, source)
    line = found.floats["wide.weight"].reason if "wide.weight" in found.floats else found.weights["wide.weight"].text
    assert line.startswith(LINES[case].removeprefix("float: "))
    names = {key.rsplit(".torch", 1)[0] for key in wanted}
    assert names == found.weights.keys() | found.floats.keys()
    left = {key.rpartition(".")[2] for key in source.keys() - found.consumed}
    assert left <= {"weight", "bias"}, "no part of a quantized weight may be loaded under its own name"
    # SDNQ adds low-rank terms and rotates in bfloat16: its result has been rounded twice. Sums are in another order, or
    # fused into one rounding, in float32.
    coarse = "svd" in case or "hadamard" in case
    for name in names:
        short = wanted[f"{name}.{torch.bfloat16}"]
        if name in found.floats:
            value = found.floats[name].build(source)
            assert value.dtype == found.floats[name].dtype == torch.bfloat16
            assert value.shape == found.floats[name].shape
            assert error(value, short) <= (0.008 if coarse else 0)
            continue
        foreign = found.weights[name]
        parts = foreign.build(source)
        assert error(rebuild(name, foreign.text, parts, torch.bfloat16).dequantize(), short) <= (
            0.008 if coarse else 0.004
        )
        exact = rebuild(name, foreign.text, parts, torch.float32).dequantize()
        if not ("svd" in case or case == "uint4_g16_bf16"):
            affine = any(word in foreign.text for word in ("affine", "rotation"))
            assert error(exact, wanted[f"{name}.{torch.float32}"]) <= (1e-6 if affine else 0)


def test_convolutions_have_scales_for_each_place(files: Path) -> None:
    config, source, _ = opened(files / "conv")
    found = readers.scan(config, source)
    assert found.weights["one.weight"].text == "qint4 48x64x1x1 group=16 affine"
    assert found.weights["conv.weight"].text == "qint4 48x64x3x3 group=16 affine order"
    assert found.weights["line.weight"].text == "qint4 48x64x3 group=16 affine order"
    config, source, _ = opened(files / "conv_int8")
    found = readers.scan(config, source)
    assert found.weights["conv.weight"].text == "qint8 48x64x3x3 group=64 order"
    assert found.floats["up.weight"].shape == (48, 32, 2, 2)
    assert found.floats["up.weight"].reason == "one scale for each column of a transposed convolution"


@pytest.mark.parametrize(
    ("case", "name"), [("conv", "conv"), ("conv", "one"), ("hadamard_64_int4", "wide"), ("hadamard_64_fp8", "wide")]
)
def test_layers_run(files: Path, case: str, name: str) -> None:
    config, source, wanted = opened(files / case)
    foreign = readers.scan(config, source).weights[f"{name}.weight"]
    weight = rebuild(name, foreign.text, foreign.build(source), torch.float32)
    plain = wanted[f"{name}.weight.{torch.float32}"]
    x = torch.randn(2, *((64, 6, 6) if case == "conv" else (128,)), dtype=torch.float32, device="cpu")
    run = F.conv2d if case == "conv" else F.linear
    torch.testing.assert_close(run(x, weight), run(x, plain))


def test_a_code_without_a_negative_is_damage(files: Path) -> None:
    config, source, _ = opened(files / "hadamard_64_int4")
    broken = changed(source, weight=torch.zeros_like(source["wide.weight"]))
    foreign = readers.scan(config, broken).weights["wide.weight"]
    with pytest.raises(CheckpointError, match=r"wide\.weight holds the code -8 in a rotated weight"):
        foreign.build(broken)


def test_packed_bytes_are_taken_over(files: Path) -> None:
    config, source, _ = opened(files / "uint4")
    parts = readers.scan(config, source).weights["wide.weight"].build(source)
    assert torch.equal(parts["qdata"].flatten(), source["wide.weight"])


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("blocks.0.ff.weight", "uint4"),
        ("blocks.0.head.weight", "int8"),  # a word of the name
        ("out.0.weight", "int6"),  # a beginning
        ("blocks.1.attn.to_q.weight", "uint3"),  # a pattern
        ("blocks.1.attn.to_k.weight", "uint4"),  # "minimum" of fewer bits than the usual type
        ("other.weight", "int5"),
    ],
)
def test_type_of_a_layer(name: str, dtype: str) -> None:
    config = {
        "weights_dtype": "uint4",
        "modules_dtype_dict": {
            **{"int8": ["head"], "6bit": [".out"], "uint3": ["blocks.*.to_q.weight"], "minimum_3bits": ["to_k"]},
            **{"minimum-uint2": ["other"]},
        },
        "modules_quant_config": {"other": {"weights_dtype": "int5"}},
    }
    assert settings_of(config, name).kind.name == dtype


def changed(source: Mapping[str, torch.Tensor], **changes: torch.Tensor | None) -> TensorsSource:
    """The tensors of "wide" with some replaced, or left out."""
    tensors = {key: source[key] for key in source if key.startswith("wide")}
    new = {f"wide.{key}": value for key, value in changes.items()}
    return TensorsSource({key: value for key, value in (tensors | new).items() if value is not None})


F32 = torch.float32


@pytest.mark.parametrize(
    ("case", "config", "changes", "message"),
    [
        ("uint4", {}, {"scale": None}, "wide.weight needs the tensor wide.scale"),
        ("uint4", {}, {"zero_point": None}, "wide.weight needs the tensor wide.zero_point"),
        ("int4", {}, {"zero_point": torch.zeros(64, 2, 1, dtype=F32)}, "zero_point is in the files, but int4 codes"),
        ("uint4", {"weights_dtype": "int4"}, {}, "zero_point is in the files, but int4 codes"),
        ("uint4", {"weights_dtype": "uint8"}, {}, r"wide.weight.*found weight \(4096,\)"),
        ("uint4", {"weights_dtype": "int8"}, {}, "wide.weight is uint8 .* int8"),
        ("uint4", {"weights_dtype": "uint99"}, {}, "weights_dtype is 'uint99'"),
        ("uint4", {"scale_dtype": "uint8"}, {}, "needs the tensor wide.scale_2"),
        ("nvfp4", {"scale_dtype": None}, {}, "scale_2 is in the files"),
        ("uint4", {"sdnq_version": "0.3.0"}, {}, "SDNQ 0.3.0 wrote these files"),
        ("uint4", {"sdnq_version": "new"}, {}, "sdnq_version is 'new'"),
        ("fp6", {"sdnq_version": "0.2.1"}, {}, "stood for other numbers"),
        ("uint3", {}, {"weight": torch.zeros(100, 3, dtype=torch.uint8)}, "codes do not divide"),
        ("uint3", {}, {"weight": torch.zeros(3071, dtype=torch.uint8)}, "whole runs"),
        ("uint4", {}, {"scale": torch.ones(64, 2, dtype=F32)}, "no axis of its scale has size 1"),
        ("uint4", {}, {"scale": torch.ones(64, 4, 1, dtype=F32)}, "differ in shape"),
        ("uint4", {}, {"scale": torch.ones(64, 2, 1, dtype=torch.int32)}, "wide.scale is int32, expected float32"),
        ("uint4_svd", {}, {"svd_down": torch.ones(8, 64, dtype=F32)}, "low-rank factors do not fit"),
        ("uint4_svd", {}, {"svd_up": None}, "needs the tensor wide.svd_up"),
        ("uint4_tensor", {}, {"bias": None}, "shape is not in the file"),
        ("scales_uint8", {"scale_dtype": "uint4"}, {}, "whose shape is not in the file"),
    ],
)
def test_config_and_tensors_that_disagree(
    files: Path, case: str, config: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    stored, source, _ = opened(files / case)
    with pytest.raises(CheckpointError, match=message):
        readers.scan({**stored, **config}, changed(source, **changes))


def test_scale_without_a_number_is_damage(files: Path) -> None:
    config, source, _ = opened(files / "uint4")
    broken = changed(source, scale=torch.full((64, 2, 1), float("nan"), dtype=torch.float32))
    foreign = readers.scan(config, broken).weights["wide.weight"]
    with pytest.raises(CheckpointError, match=r"wide\.weight_scale holds NaN"):
        rebuild("wide.weight", foreign.text, foreign.build(broken), torch.float32)
    config, source, _ = opened(files / "ufp4")
    broken = changed(source, zero_point=torch.full_like(source["wide.zero_point"], float("inf")))
    with pytest.raises(CheckpointError, match=r"wide\.weight holds NaN or Inf"):
        readers.scan(config, broken).floats["wide.weight"].build(broken)


def test_files_without_quantized_weights(files: Path) -> None:
    config, _, _ = opened(files / "uint4")
    with pytest.raises(CheckpointError, match="no weight has a scale"):
        readers.scan(config, TensorsSource({"wide.weight": torch.ones(4, 4, dtype=torch.float32)}))
