"""Nunchaku's files, made lane by lane from its packers (writers/nunchaku_files.py): layers give what Nunchaku's compute.

No published file was at hand, and Nunchaku runs on GPUs only.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from requanto.checkpoint.foreign import readers
from requanto.checkpoint.foreign.found import ForeignCheckpoint
from requanto.checkpoint.foreign.nunchaku import recognize
from requanto.checkpoint.foreign.source import FilesSource, TensorsSource
from requanto.checkpoint.format import CheckpointError, rebuild

D, MLP = 128, 512
BOTH, ONE = "transformer_blocks.0.", "single_transformer_blocks.0."
#: layer of Diffusers -> Nunchaku's, and in V2; which of how many parts of its rows
FLUX = {
    **{f"{BOTH}attn.to_{x}": (f"{BOTH}qkv_proj", f"{BOTH}attn.to_qkv", i, 3) for i, x in enumerate("qkv")},
    **{
        f"{BOTH}attn.add_{x}_proj": (f"{BOTH}qkv_proj_context", f"{BOTH}attn.add_qkv_proj", i, 3)
        for i, x in enumerate("qkv")
    },
    f"{BOTH}attn.to_out.0": (f"{BOTH}out_proj", f"{BOTH}attn.to_out.0", 0, 1),
    f"{BOTH}attn.to_add_out": (f"{BOTH}out_proj_context", f"{BOTH}attn.to_add_out", 0, 1),
    f"{BOTH}ff.net.0.proj": (f"{BOTH}mlp_fc1", f"{BOTH}ff.net.0.proj", 0, 1),
    f"{BOTH}ff.net.2": (f"{BOTH}mlp_fc2", f"{BOTH}ff.net.2", 0, 1),
    f"{BOTH}ff_context.net.0.proj": (f"{BOTH}mlp_context_fc1", f"{BOTH}ff_context.net.0.proj", 0, 1),
    f"{BOTH}ff_context.net.2": (f"{BOTH}mlp_context_fc2", f"{BOTH}ff_context.net.2", 0, 1),
    **{f"{ONE}attn.to_{x}": (f"{ONE}qkv_proj", f"{ONE}attn.to_qkv", i, 3) for i, x in enumerate("qkv")},
    f"{ONE}proj_mlp": (f"{ONE}mlp_fc1", f"{ONE}mlp_fc1", 0, 1),
}
MODULATIONS = {f"{BOTH}norm1.linear": 6, f"{BOTH}norm1_context.linear": 6, f"{ONE}norm.linear": 3}


@pytest.fixture(scope="module")
def files(written: Callable[..., Path]) -> Path:
    return written("nunchaku_files")


def opened(files: Path, case: str) -> tuple[ForeignCheckpoint, FilesSource, FilesSource]:
    source = FilesSource([files / f"{case}.safetensors"])
    config = recognize({}, source)
    assert config is not None
    return readers.scan(config, source), source, FilesSource([files / f"{case}_results.safetensors"])


def result(found: ForeignCheckpoint, source: FilesSource, module: str, x: torch.Tensor) -> torch.Tensor:
    """What a layer of Diffusers computes with the weight and bias that were found."""
    name = f"{module}.weight"
    weight = rebuild(name, found.weights[name].text, found.weights[name].build(source), torch.float32)
    bias = found.floats.get(f"{module}.bias")
    value = source[f"{module}.bias"] if bias is None else bias.build(source)
    if bias is not None:
        assert (value.shape, value.dtype) == (bias.shape, bias.dtype)
    return F.linear(x.float(), weight.dequantize(), value.float())


def check(computed: torch.Tensor, wanted: torch.Tensor, bias_was_rounded: bool = False) -> None:
    """Equal to float32; a bias that had to be changed is rounded to bfloat16 once more."""
    size = float(wanted.abs().max())
    assert float((computed - wanted.float()).abs().max()) <= (0.004 if bias_was_rounded else 2e-5) * max(size, 1)


@pytest.mark.parametrize("case", ["flux_int4", "flux_nvfp4", "flux2_int4", "flux2_nvfp4"])
def test_layers_of_flux(files: Path, case: str) -> None:
    found, source, results = opened(files, case)
    for name, (first, second, which, count) in FLUX.items():
        stored = second if case.startswith("flux2") else first
        wanted = results[f"{stored}.y"].chunk(count, dim=-1)[which]
        shifted = name.endswith("net.2") and "int4" in case
        check(result(found, source, name, results[f"{stored}.x"]), wanted, shifted)
    kind = "qint4 128x128 group=64" if "int4" in case else "qnvfp4 128x128 group=16"
    assert found.weights[f"{BOTH}attn.to_q.weight"].text == f"{kind} rank=16 columns"
    assert found.weights[f"{BOTH}attn.to_out.0.weight"].text == f"{kind} rank=16"  # its smoothing is 1 everywhere
    assert found.weights[f"{BOTH}attn.to_q.weight"].note.startswith("Nunchaku rounds the inputs")


@pytest.mark.parametrize("case", ["flux_int4", "flux_nvfp4", "flux2_int4", "flux2_nvfp4"])
def test_the_two_halves_of_a_single_block(files: Path, case: str) -> None:
    found, source, results = opened(files, case)
    left = f"{ONE}attn.to_out" if case.startswith("flux2") else f"{ONE}out_proj"
    both = torch.cat((results[f"{left}.x"], results[f"{ONE}mlp_fc2.x"]), dim=-1)
    wanted = results[f"{left}.y"] + results[f"{ONE}mlp_fc2.y"]
    check(result(found, source, f"{ONE}proj_out", both), wanted, bias_was_rounded=True)
    lines = {
        "flux_int4": "qint4 128x640 group=64 rank=32 columns",
        "flux2_int4": "qint4 128x640 group=64 rank=32 columns",
        "flux_nvfp4": "qnvfp4 128x640 group=16 rank=32 columns",
        "flux2_nvfp4": "qfp4_e2m1 128x640 group=16 rank=32 columns",
    }
    assert found.weights[f"{ONE}proj_out.weight"].text == lines[case]


@pytest.mark.parametrize(("module", "count"), MODULATIONS.items())
def test_modulations(files: Path, module: str, count: int) -> None:
    found, source, results = opened(files, "flux_int4")
    assert found.weights[f"{module}.weight"].text == f"qint4 {count * D}x128 group=64 affine"
    computed = result(found, source, module, results[f"{module}.x"]).chunk(count, dim=-1)
    # Nunchaku's rows alternate, and its scales contain the 1 that Diffusers adds.
    stored = results[f"{module}.y"].unflatten(-1, (-1, count)).unbind(-1)
    for which, (ours, theirs) in enumerate(zip(computed, stored, strict=True)):
        check(ours + (which in {1, count - 2}), theirs, bias_was_rounded=True)


def test_names_of_floats(files: Path) -> None:
    found, source, _ = opened(files, "flux_int4")
    left = source.keys() - found.consumed
    assert left == {"x_embedder.weight"}
    for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
        assert torch.equal(found.floats[f"{BOTH}attn.{name}.weight"].build(source), source[f"{BOTH}{name}.weight"])
    found, source, _ = opened(files, "flux2_int4")
    assert f"{BOTH}attn.norm_q.weight" in source.keys() - found.consumed


def test_qwen_image(files: Path) -> None:
    found, source, results = opened(files, "qwen_int4")
    for which, name in enumerate(("to_q", "to_k", "to_v")):
        wanted = results[f"{BOTH}attn.to_qkv.y"].chunk(3, dim=-1)[which]
        check(result(found, source, f"{BOTH}attn.{name}", results[f"{BOTH}attn.to_qkv.x"]), wanted)
    name = f"{BOTH}img_mlp.net.2"
    check(result(found, source, name, results[f"{name}.x"]), results[f"{name}.y"], bias_was_rounded=True)
    assert found.weights[f"{BOTH}img_mod.1.weight"].text == "qint4 768x128 group=64 affine"


def lite(kind: str, **changes: Any) -> dict[str, Any]:
    """A quantization_config of Diffusers."""
    svdq = {"precision": kind, "rank": 16, "targets": ["blocks.0.to_q", "blocks.0.net.2"]}
    awq = {"precision": "int4", "group_size": 64, "targets": ["blocks.0.mod"]}
    return {"quant_method": "nunchaku_lite", "svdq_w4a4": svdq, "awq_w4a16": awq, **changes}


@pytest.mark.parametrize("kind", ["int4", "nvfp4"])
def test_nunchaku_lite(files: Path, kind: str) -> None:
    source = FilesSource([files / f"lite_{kind}.safetensors"])
    results = FilesSource([files / f"lite_{kind}_results.safetensors"])
    found = readers.scan(lite(kind), source)
    for name in ("to_q", "net.2", "mod"):
        check(result(found, source, f"blocks.0.{name}", results[f"blocks.0.{name}.x"]), results[f"blocks.0.{name}.y"])
    assert source.keys() - found.consumed == {"blocks.0.mod.bias"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"svdq_w4a4": {"precision": "nvfp4", "targets": ["blocks.0.to_q", "blocks.0.net.2"]}}, "has int4 codes"),
        ({"svdq_w4a4": {"precision": "int3", "targets": []}}, "svdq_w4a4 is .*expected precision int4 or nvfp4"),
        (
            {"svdq_w4a4": {"precision": "int4", "targets": ["blocks.0.to_q"]}},
            "blocks.0.net.2 is quantized in the files",
        ),
        ({"awq_w4a16": {"precision": "int4", "targets": ["blocks.0.mod", "x"]}}, "x is listed in quantization_config"),
        ({"awq_w4a16": None, "svdq_w4a4": {"precision": "int4", "rank": 32, "targets": ["blocks.0.to_q"]}}, "rank 16"),
        ({"patches": [{"type": "split_linear"}]}, "quantization_config.patches"),
    ],
)
def test_a_config_that_differs(files: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        readers.scan(lite("int4", **changes), FilesSource([files / "lite_int4.safetensors"]))


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("wscales", None, "blocks.0.to_q needs the tensor blocks.0.to_q.wscales"),
        ("wscales", torch.ones(1, 128, dtype=torch.bfloat16), r"\(1, 128\), expected .* \(2, 128\)"),
        ("proj_up", None, "needs the tensor blocks.0.to_q.proj_up"),
        ("proj_down", torch.ones(128, 8, dtype=torch.bfloat16), r"proj_down .* expected .* \(128, 16\)"),
        ("smooth_factor", torch.ones(64, dtype=torch.bfloat16), r"smooth_factor .* expected .* \(128,\)"),
        ("qweight", torch.zeros(100, 64, dtype=torch.int8), r"qweight .* expected int8 \(128, 64\)"),
        ("wtscale", torch.ones(1, dtype=torch.bfloat16), "int4 layers of Nunchaku have none"),
    ],
)
def test_damaged_layers(files: Path, part: str, value: torch.Tensor | None, message: str) -> None:
    source = FilesSource([files / "lite_int4.safetensors"])
    tensors = {key: source[key] for key in source} | {f"blocks.0.to_q.{part}": value}
    with pytest.raises(CheckpointError, match=message):
        readers.scan(lite("int4"), TensorsSource({key: one for key, one in tensors.items() if one is not None}))


def test_damaged_values(files: Path) -> None:
    source = FilesSource([files / "lite_int4.safetensors"])
    for part, message in (("wscales", "_scale holds NaN"), ("smooth_factor", "_column holds NaN or Inf")):
        tensors = {key: source[key].clone() for key in source}
        tensors[f"blocks.0.to_q.{part}"].view(-1)[5] = float("nan") if part == "wscales" else 0
        broken = TensorsSource(tensors)
        foreign = readers.scan(lite("int4"), broken).weights["blocks.0.to_q.weight"]
        with pytest.raises(CheckpointError, match=message):
            rebuild("w", foreign.text, foreign.build(broken), torch.float32)


def test_other_models_are_refused(files: Path) -> None:
    source = FilesSource([files / "lite_int4.safetensors"])
    config = recognize({"_class_name": "NunchakuSanaTransformer2DModel"}, source)
    assert config is not None
    with pytest.raises(
        CheckpointError, match=r"blocks\.0\.mod is a quantized layer of Nunchaku's NunchakuSana.*known are Flux"
    ):
        readers.scan(config, source)
    assert recognize({}, TensorsSource({"a.weight": torch.ones(2, 2)})) is None


def test_half_a_layer_is_refused(files: Path) -> None:
    source = FilesSource([files / "flux_int4.safetensors"])
    part = TensorsSource({key: source[key] for key in source if "single" not in key or "out_proj" not in key})
    with pytest.raises(CheckpointError, match=r"proj_out is made of single_transformer_blocks\.0\.mlp_fc2; expected"):
        readers.scan({"quant_method": "nunchaku"}, part)
    with pytest.raises(CheckpointError, match="has int4 codes, the config says fp4_e2m1_all"):
        readers.scan({"quant_method": "nunchaku", "weight": {"dtype": "fp4_e2m1_all"}}, source)
