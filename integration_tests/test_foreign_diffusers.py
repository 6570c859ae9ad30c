"""Checkpoints of other libraries in Diffusers' from_pretrained: who opens them, and what works on them afterwards."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel
from foreign_diffusers import FLUX
from foreign_files import edit_config
from safetensors.torch import load_file, save_file

import requanto
from requanto import QTensor, QuantoConfig
from requanto.checkpoint.format import CheckpointError
from requanto.integrations.diffusers_foreign import quantizer_for

HERE = Path(__file__).parent
FILE = "diffusion_pytorch_model.safetensors"
#: what the libraries dequantize in
DTYPES = {"torchao": torch.bfloat16, "sdnq": torch.float32, "bitsandbytes": torch.bfloat16}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories that the libraries wrote, in a process that has them."""
    out = tmp_path_factory.mktemp("foreign")
    path = os.pathsep.join([str(Path(sys.prefix) / "formats"), str(HERE)])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "REQUANTO_AUTOLOAD": "0"}
    command = [sys.executable, str(HERE / "foreign_diffusers.py"), str(out)]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, f"{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    return out


@pytest.fixture
def who(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Sets ``requanto.settings.foreign`` for one test."""
    return lambda value: monkeypatch.setattr(requanto.settings, "foreign", value)


def load(directory: Path, **options: Any) -> Any:
    return FluxTransformer2DModel.from_pretrained(directory, **{"torch_dtype": torch.float32, **options})


def quantized(model: Any) -> set[str]:
    return {name for name, weight in model.named_parameters() if isinstance(weight, QTensor)}


def values(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.dequantize() if isinstance(p, QTensor) else p.detach() for n, p in model.named_parameters()}


def different(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> list[str]:
    return [name for name in found if not torch.equal(found[name], wanted[name].to(found[name].dtype))]


@pytest.mark.parametrize("kind", DTYPES)
def test_weights_are_those_of_the_library(written, kind, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "requanto"):
        model = load(written / kind, torch_dtype=DTYPES[kind])
    assert f"another library ({kind}), which does not open it here: " in caplog.text
    assert f"{len(quantized(model))} weights stay quantized" in caplog.text
    assert len(quantized(model)) >= 8
    wanted = load_file(written / f"{kind}.safetensors")
    found = values(model)
    assert found.keys() <= wanted.keys()
    if kind == "sdnq":  # it multiplies and adds in one rounding
        assert max(float((found[name] - wanted[name]).abs().max()) for name in found) < 1e-7
    else:
        assert not different(found, wanted)
    model.save_pretrained(tmp_path)
    again = load(tmp_path, torch_dtype=DTYPES[kind])
    assert not different(values(again), found)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == "quanto"
    assert again.get_memory_footprint() == model.get_memory_footprint()


def test_who_opens_it(written, who, caplog):
    with caplog.at_level(logging.WARNING, "requanto"):
        assert quantized(load(written / "sdnq", quantization_config=QuantoConfig(weights="int4")))
    assert "does not open it here" not in caplog.text
    assert "weights='int4' of quantization_config is not used" in caplog.text
    who("never")
    with pytest.raises(ImportError):
        load(written / "sdnq")
    with pytest.raises((ImportError, ValueError)):
        load(written / "bitsandbytes")
    assert quantized(load(written / "sdnq", quantization_config=QuantoConfig()))
    who("always")
    caplog.clear()
    with caplog.at_level(logging.WARNING, "requanto"):
        assert quantized(load(written / "bitsandbytes"))
    assert "does not open it here" not in caplog.text


def test_in_a_pipeline(written, tmp_path):
    """A component that another library quantized, beside one of Diffusers."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    shutil.copytree(written / "torchao", tmp_path / "transformer")
    FlowMatchEulerDiscreteScheduler().save_pretrained(tmp_path / "scheduler")
    others = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae"))
    parts = {
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
    }
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline", **parts}))
    pipe = DiffusionPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16, **others)
    assert quantized(pipe.transformer)
    assert not different(values(pipe.transformer), load_file(written / "torchao.safetensors"))


def test_pieces_of_a_weight_in_several_files(written, tmp_path):
    shutil.copytree(written / "bitsandbytes", tmp_path / "x")
    tensors = load_file(tmp_path / "x" / FILE)
    (tmp_path / "x" / FILE).unlink()
    names, shards = sorted(tensors), [FILE.replace(".", f"-0000{i + 1}-of-00002.") for i in range(2)]
    for i, shard in enumerate(shards):
        save_file({name: tensors[name] for name in names[i::2]}, tmp_path / "x" / shard, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: shards[i % 2] for i, name in enumerate(names)}}
    (tmp_path / "x" / f"{FILE}.index.json").write_text(json.dumps(index))
    assert not different(values(load(tmp_path / "x")), values(load(written / "bitsandbytes")))


def test_unknown_methods(written, tmp_path):
    shutil.copytree(written / "sdnq", tmp_path / "x")
    edit_config(tmp_path / "x", quantization_config={"quant_method": "exl3"})
    with pytest.raises(CheckpointError, match="What reads it: exllamav3, with a GPU"):
        load(tmp_path / "x", quantization_config=QuantoConfig())
    edit_config(tmp_path / "x", quantization_config={"quant_method": "new"})
    with pytest.raises(ValueError, match="Unknown quantization type, got new"):
        load(tmp_path / "x")
    with pytest.raises(ValueError, match="quantized by 'new', a format that Requanto does not read"):
        load(tmp_path / "x", quantization_config=QuantoConfig())


def test_damaged_files(written, tmp_path):
    shutil.copytree(written / "torchao", tmp_path / "a")
    shard = next((tmp_path / "a").glob("*-00002-*"))
    tensors = load_file(shard)
    name = next(name for name in tensors if name.endswith("_weight_scale"))
    tensors[name][0] = float("nan")
    from safetensors import safe_open

    with safe_open(shard, framework="pt") as opened:
        metadata = opened.metadata()
    save_file(tensors, shard, metadata=metadata)
    with pytest.raises(CheckpointError, match="_scale holds NaN"):
        load(tmp_path / "a")
    del tensors[name]
    save_file(tensors, shard, metadata=metadata)
    with pytest.raises(CheckpointError, match="needs the tensor"):
        load(tmp_path / "a")
    shutil.copytree(written / "sdnq", tmp_path / "b")
    whole = load_file(tmp_path / "b" / FILE)
    torch.save(whole, tmp_path / "b" / "diffusion_pytorch_model.bin")
    (tmp_path / "b" / FILE).unlink()
    with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model\.bin is a pickle"):
        load(tmp_path / "b")


# ---------------------------------------------------------------------- files that say so themselves


def scaled(written: Path, directory: Path, casts: bool = False) -> dict[str, torch.Tensor]:
    """A directory of float8 weights with ComfyUI's scales, under the names of Diffusers; its float weights."""
    directory.mkdir()
    shutil.copy(written / "float" / "config.json", directory)
    tensors, floats = {}, {}
    for name, value in load_file(written / "float" / FILE).items():
        tensors[name], floats[name] = value, value.float()
        module = name.removesuffix(".weight")
        if value.dim() == 2 and "transformer_blocks" in name:
            scale = torch.tensor(1.0 if casts else float(value.abs().max()) / 448, dtype=torch.float32)
            tensors[name] = (value.float() / scale).to(torch.float8_e4m3fn)
            floats[name] = tensors[name].float() * scale
            if not casts:
                tensors |= {f"{module}.weight_scale": scale, f"{module}.input_scale": torch.tensor(0.05)}
                tensors[f"{module}.comfy_quant"] = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    save_file(tensors, directory / FILE, metadata={"format": "pt"})
    return floats


def test_files_whose_config_does_not_say_it(written, tmp_path, who, caplog):
    floats = scaled(written, tmp_path / "fp8")
    with caplog.at_level(logging.WARNING, "requanto"):
        model = load(tmp_path / "fp8")
    assert "another library (comfyui), which does not open it here: config.json does not name the format" in caplog.text
    assert not different(values(model), floats)
    assert model.single_transformer_blocks[0].attn.to_q.activation_qtype.name == "qfloat8_e4m3fn"
    assert float(model.single_transformer_blocks[0].attn.to_q.input_scale) == pytest.approx(0.05)
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert not different(values(again), floats)
    assert float(again.single_transformer_blocks[0].attn.to_q.input_scale) == pytest.approx(0.05)
    asked = load(tmp_path / "fp8", quantization_config=QuantoConfig(weights="int4"))
    assert not different(values(asked), floats)
    with pytest.raises(CheckpointError, match="low_cpu_mem_usage=True only"):
        load(tmp_path / "fp8", low_cpu_mem_usage=False)
    with pytest.raises(CheckpointError, match="only float weights among ranks"):
        quantizer_for([tmp_path / "fp8" / FILE], {"tp_shard_specs": {}})
    who("never")
    assert different(values(load(tmp_path / "fp8")), floats), "Diffusers takes codes for weights"


def test_casts_to_float8(written, tmp_path):
    floats = scaled(written, tmp_path / "fp8", casts=True)
    model = load(tmp_path / "fp8")
    assert not quantized(model)
    assert not different(values(model), floats)
    model = load(
        tmp_path / "fp8", quantization_config=QuantoConfig(weights="int8", modules_to_not_convert=["proj_mlp"])
    )
    name = "single_transformer_blocks.0.proj_mlp.weight"
    assert name not in quantized(model)
    assert quantized(model)
    assert torch.equal(values(model)[name], floats[name])
    assert not any(weight.dtype == torch.float8_e4m3fn for weight in model.parameters())


def test_nunchaku_lite(written, tmp_path):
    """Codes at random: the reader's tests compare values; here all of the layers are found and run."""
    shutil.copytree(written / "float", tmp_path / "x")
    config = {**FLUX, "attention_head_dim": 64}
    model = FluxTransformer2DModel(
        **config,
    ).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "x")
    tensors = load_file(tmp_path / "x" / FILE)
    modules = [f"single_transformer_blocks.0.attn.to_{x}" for x in "qkv"]
    for module in modules:
        rows, length = tensors.pop(f"{module}.weight").shape
        tensors |= {
            f"{module}.qweight": torch.randint(-128, 128, (rows, length // 2), dtype=torch.int8),
            f"{module}.wscales": torch.rand(length // 64, rows).to(torch.bfloat16),
            f"{module}.proj_down": torch.randn(length, 16).to(torch.bfloat16),
            f"{module}.proj_up": torch.randn(rows, 16).to(torch.bfloat16),
            f"{module}.smooth_factor": (torch.rand(length) + 0.5).to(torch.bfloat16),
        }
    save_file(tensors, tmp_path / "x" / FILE, metadata={"format": "pt"})
    section = {"precision": "int4", "rank": 16, "targets": modules}
    edit_config(tmp_path / "x", quantization_config={"quant_method": "nunchaku_lite", "svdq_w4a4": section})
    loaded = load(tmp_path / "x")
    assert quantized(loaded) == {f"{module}.weight" for module in modules}
    assert loaded.config["quantization_config"].tensors[f"{modules[0]}.weight"].endswith("group=64 rank=16 columns")
