"""Files of ComfyUI: layouts written by comfy-kitchen itself (data/), and marks, scales and casts in files made here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from requanto.checkpoint.foreign import readers
from requanto.checkpoint.foreign.comfyui import is_cast, recognize
from requanto.checkpoint.foreign.source import FilesSource, Source, TensorsSource
from requanto.checkpoint.format import CheckpointError, rebuild
from requanto.report.convert_foreign import convert_checkpoint
from requanto.report.inspect import inspect_directory

DATA = Path(__file__).parent / "data" / "comfy_kitchen_0_2_40.safetensors"
COMFY = {"quant_method": "comfyui"}
LINES = {
    "fp8": "qfloat8_e4m3fn 24x64",
    "fp8_e5m2": "qfloat8_e5m2 24x64",
    "nvfp4": "qnvfp4 40x96 group=16",
    "nvfp4_large": "qnvfp4 144x16 group=16",
    "mxfp8": "qmxfp8_e4m3 40x96 group=32",
    "int8": "qint8 24x64",
    "int8_rows": "qint8 24x64",
    "int8_turned": "qint8 24x64 rotation=16 columns signed order",
    "int4_turned": "qint4 16x256 rotation=256 columns signed order",
    "awq": "qint4 24x64 group=32 affine",
    "svd": "qint4 128x128 group=64 rank=16 columns",
    "svd_tiles": "qint4 128x128 group=64 rank=16 columns",
}


def opened() -> FilesSource:
    return FilesSource([DATA])


def of(source: Source, module: str) -> dict[str, torch.Tensor]:
    """The tensors of one layer."""
    return {name: source[name] for name in source if name.rpartition(".")[0] == module}


def mark(**conf: Any) -> torch.Tensor:
    return torch.tensor(list(json.dumps(conf).encode()), dtype=torch.uint8, device="cpu")


def test_layouts_of_comfy_kitchen(made: Callable[..., dict[str, Any]]) -> None:
    source = opened()
    assert readers.recognize({}, source) == COMFY
    found = readers.scan(COMFY, source)
    assert {name.removesuffix(".weight"): one.text for name, one in found.weights.items()} == LINES
    weights = made(found, source)
    for module in LINES:
        wanted = source[f"reference.{'svd' if module == 'svd_tiles' else module}"]
        value = weights[f"{module}.weight"].dequantize()[: len(wanted)]
        # sums of the rotation are in another order; SVDQuant's reference comes out of its GEMM, with rounded inputs
        exact = not any(word in module for word in ("turned", "svd", "awq"))
        tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(value, wanted, **tolerance)
    assert torch.equal(weights["svd.weight"].dequantize(), weights["svd_tiles.weight"].dequantize())
    left = {name for name in source if name not in found.consumed and not name.startswith("reference.")}
    assert left == {name for name in source if name.endswith(".bias")}


def test_rows_with_the_least_code_are_negated() -> None:
    source = opened()
    codes, wanted = source["int8_turned.weight"], source["reference.int8_turned"]
    parts = readers.scan(COMFY, source).weights["int8_turned.weight"].build(source)
    negated = (parts["scale"] < 0).squeeze(1)
    assert 0 < int(negated.sum()) <= int((codes == -128).any(1).sum())
    # in columns of both signs it has no place
    codes = codes.clone()
    codes[0, 0] = codes[0, 3] = -128
    broken = TensorsSource({**of(source, "int8_turned"), "int8_turned.weight": codes})
    found = readers.scan(COMFY, broken).floats["int8_turned.weight"]
    assert "-128" in found.reason
    torch.testing.assert_close(found.build(broken)[1:], wanted[1:].to(torch.bfloat16))
    codes = torch.full_like(source["int4_turned.weight"], -120)
    broken = TensorsSource({**of(source, "int4_turned"), "int4_turned.weight": codes})
    with pytest.raises(CheckpointError, match=r"int4_turned\.weight holds the code -8 several times in a row"):
        readers.scan(COMFY, broken).weights["int4_turned.weight"].build(broken)


def test_layers_with_shifted_inputs() -> None:
    """A layer behind GELU: x + 0.171875 is quantized, and the bias is that for such inputs."""
    conf = mark(format="svdquant_w4a4", act_unsigned=True)
    tensors = of(opened(), "svd") | {
        "svd.comfy_quant": conf,
        "svd.bias": torch.randn(128, device="cpu", dtype=torch.float32),
    }
    source = TensorsSource(tensors)
    found = readers.scan(COMFY, source)
    foreign = found.weights["svd.weight"]
    weight = rebuild("w", foreign.text, foreign.build(source), torch.float32)
    x = torch.randn(4, 128, dtype=torch.float32, device="cpu")
    low = tensors["svd.weight_proj_up"].float() @ tensors["svd.weight_proj_down"].float().t()
    inner = weight.dequantize() - low  # codes * scale / smooth
    wanted = F.linear(x + 0.171875, inner, tensors["svd.bias"]) + x @ low.t()
    value = F.linear(x, weight.dequantize(), found.floats["svd.bias"].build(source))
    torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-4)
    with pytest.raises(CheckpointError, match="has no bias in which the shift"):
        readers.scan(COMFY, TensorsSource({k: v for k, v in tensors.items() if k != "svd.bias"}))


# ---------------------------------------------------------------------- float8 of old files, and marks in the header


def float8(rows: int = 4, length: int = 8, dtype: torch.dtype = torch.float8_e4m3fn) -> torch.Tensor:
    return torch.randn(rows, length, dtype=torch.float32, device="cpu").to(dtype)


def one(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float32, device="cpu")


def old_file() -> dict[str, torch.Tensor]:
    return {
        "m.a.weight": float8(),
        "m.a.scale_weight": one(0.5),
        "m.a.scale_input": one(0.25),
        "m.b.weight": float8(4, 4),
        "m.b.scale_weight": one(2.0).reshape(1),
        "m.b.scale_input": one(1.0),
        "m.c.weight": torch.ones(3, 3, dtype=torch.bfloat16, device="cpu"),
        "m.norm.weight": float8(1, 8).reshape(8),
        "m.conv.weight": float8(4, 18).reshape(4, 2, 3, 3),
        "m.conv.scale_weight": one(3.0),
        "scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn, device="cpu"),
    }


def test_old_files(made: Callable[..., dict[str, Any]]) -> None:
    tensors = old_file()
    source = TensorsSource(tensors)
    assert readers.recognize({}, source) == COMFY
    found = readers.scan(COMFY, source)
    weights = made(found, source)
    assert found.format == "ComfyUI, float8"
    assert found.weights["m.conv.weight"].text == "qfloat8_e4m3fn 4x2x3x3"
    for name, scale in (("m.a.weight", 0.5), ("m.b.weight", 2.0), ("m.conv.weight", 3.0)):
        assert torch.equal(weights[name].dequantize(), tensors[name].float() * scale)
    assert torch.equal(weights["m.norm.weight"], tensors["m.norm.weight"].to(torch.bfloat16))
    assert source.keys() - found.consumed == {"m.c.weight"}
    # a scale of 1 is one that nobody measured
    assert {name: (made.type, float(made.build(source))) for name, made in found.activations.items()} == {
        "m.a": ("qfloat8_e4m3fn", 0.25)
    }
    # a marker of two elements: matrices are multiplied in full precision
    tensors["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn, device="cpu")
    assert not readers.scan(COMFY, TensorsSource(tensors)).activations


def test_inspect_tells_what_a_single_file_holds(tmp_path: Path) -> None:
    save_file(old_file(), tmp_path / "model.safetensors")
    report = inspect_directory(tmp_path / "model.safetensors")
    assert "ComfyUI" in report.format
    kinds = {weight.name: weight.dtype for weight in report.weights}
    assert kinds["m.a.weight"] == "float8"
    assert kinds["m.c.weight"] == "bfloat16"
    assert "m.a.scale_weight" not in kinds
    save_file({"a.weight": torch.ones(2, 2, dtype=torch.float32, device="cpu")}, tmp_path / "float.safetensors")
    with pytest.raises(CheckpointError, match=r"float\.safetensors holds no weights that can be told to be quantized"):
        inspect_directory(tmp_path / "float.safetensors")
    with pytest.raises(ValueError, match=r"single file.*from_single_file"):
        convert_checkpoint(tmp_path / "model.safetensors", tmp_path / "out")


def test_marks_in_the_header() -> None:
    tensors = {
        "p.q.a.weight": float8(),
        "p.q.a.weight_scale": one(0.5),
        "b.weight": float8(),
        "b.weight_scale": one(0.5),
    }
    conf = {"format_version": "1.0", "layers": {"q.a": {"format": "float8_e4m3fn"}, "b": "float8_e4m3fn"}}

    def scan(**changes: Any) -> Any:
        return readers.scan(COMFY, TensorsSource(tensors, {"_quantization_metadata": json.dumps({**conf, **changes})}))

    assert set(scan().weights) == {"p.q.a.weight", "b.weight"}
    with pytest.raises(CheckpointError, match=r"format_version '2\.0'; Requanto reads 1\.0"):
        scan(format_version="2.0")
    with pytest.raises(CheckpointError, match=r"describes 'q\.x', of which no weights are in the file"):
        scan(layers={"q.x": {"format": "float8_e4m3fn"}})
    with pytest.raises(CheckpointError, match="layers in _quantization_metadata is 3"):
        scan(layers=3)
    with pytest.raises(CheckpointError, match=r"p\.q\.a\.weight is float8_e4m3fn \(4, 8\), expected float8_e5m2"):
        scan(layers={"q.a": {"format": "float8_e5m2"}})


@pytest.mark.parametrize(
    ("conf", "message"),
    [
        (mark(format="asym_w4a8_int8"), "format 'asym_w4a8_int8', which Requanto does not read: its codes have scales"),
        (mark(format=["x"]), r"has the format \['x'\]"),
        (mark(), "has the format None"),
        (torch.tensor([123], dtype=torch.uint8, device="cpu"), "a.comfy_quant holds '{', expected a JSON object"),
        (torch.zeros(3, dtype=torch.int32, device="cpu"), "a.comfy_quant is torch.int32"),
        (
            mark(format="int8_tensorwise", convrot=True, convrot_groupsize=32),
            "convrot_groupsize is 32, expected a power of 4",
        ),
        (
            mark(format="int8_tensorwise", convrot=True, convrot_groupsize="x"),
            "convrot_groupsize is 'x', expected a positive",
        ),
        (mark(format="nvfp4"), r"a\.weight is int8 \(24, 64\), expected a matrix of uint8"),
    ],
)
def test_layers_that_are_not_read(conf: torch.Tensor, message: str) -> None:
    source = opened()
    tensors = {"a.weight": source["int8.weight"], "a.weight_scale": source["int8.weight_scale"], "a.comfy_quant": conf}
    with pytest.raises(CheckpointError, match=message):
        readers.scan(COMFY, TensorsSource(tensors))


@pytest.mark.parametrize("module", sorted(LINES))
def test_every_tensor_is_needed_and_checked(module: str) -> None:
    tensors = {name: value for name, value in of(opened(), module).items() if not name.endswith(".bias")}
    for name in tensors:
        if name.endswith(".comfy_quant"):
            continue
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            readers.scan(COMFY, TensorsSource({key: value for key, value in tensors.items() if key != name}))
        wrong = torch.zeros(7, dtype=tensors[name].dtype, device="cpu")
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            readers.scan(COMFY, TensorsSource({**tensors, name: wrong}))
    scale = f"{module}.weight_scale"
    broken = tensors[scale].clone()
    broken.reshape(-1).view(torch.uint8).fill_(0xFF)  # NaN in each of their dtypes
    source = TensorsSource({**tensors, scale: broken})
    foreign = readers.scan(COMFY, source).weights[f"{module}.weight"]
    with pytest.raises(CheckpointError, match="NaN"):
        rebuild(f"{module}.weight", foreign.text, foreign.build(source), torch.float32)


def test_casts_are_not_guessed() -> None:
    tensors = {"a.weight": float8(), "b.weight": float8(), "b.bias": float8(1, 4).reshape(4)}
    source = TensorsSource(tensors)
    assert is_cast(source)
    assert readers.recognize({}, source) is None, "a program that casts them is right"
    with pytest.raises(CheckpointError, match=r"a\.weight is float8, and the file has no scales.*float8_cast"):
        readers.scan(COMFY, source)
    with pytest.raises(
        CheckpointError, match=r"b\.weight is float8 and has no scale \(b\.weight_scale or b\.scale_weight\)"
    ):
        readers.scan(COMFY, TensorsSource({**tensors, "a.scale_weight": one(1.0)}))
    found = readers.scan({**COMFY, "float8_cast": True}, source)
    foreign = found.weights["a.weight"]
    weight = rebuild("a.weight", foreign.text, foreign.build(source), torch.float32)
    assert torch.equal(weight.dequantize(), tensors["a.weight"].float())
    assert found.floats["b.bias"].dtype == torch.bfloat16
    with pytest.raises(CheckpointError, match="holds int8 codes, and no comfy_quant describes c"):
        readers.scan(
            COMFY, TensorsSource({**old_file(), "c.weight": torch.zeros(2, 2, dtype=torch.int8, device="cpu")})
        )


def test_float8_with_scales_and_no_mark() -> None:
    tensors = {"a.weight": float8(), "a.weight_scale": one(0.5), "a.input_scale": one(0.1)}
    assert readers.recognize({}, TensorsSource(tensors)) == COMFY
    assert recognize({"hf_quant_config": {"quantization": {}}}, TensorsSource(tensors)) is None
    assert set(readers.scan(COMFY, TensorsSource(tensors)).weights) == {"a.weight"}
    with pytest.raises(
        CheckpointError, match=r"a\.weight_scale is float32 \(4, 2\), expected one float, or one for each"
    ):
        readers.scan(
            COMFY, TensorsSource({**tensors, "a.weight_scale": torch.ones(4, 2, dtype=torch.float32, device="cpu")})
        )
