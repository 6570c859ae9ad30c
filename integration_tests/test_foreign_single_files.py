"""Single files of other libraries in Diffusers' from_single_file: ComfyUI's scaled float8, and Nunchaku's."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, ZImageTransformer2DModel
from diffusers.loaders import single_file
from foreign_diffusers import FLUX
from safetensors.torch import load_file, save_file

import requanto
from requanto import QTensor, QuantoConfig
from requanto.checkpoint.format import CheckpointError

#: names of Diffusers -> those of the original model
_NAMES = {
    "all_final_layer.2-1.": "final_layer.",
    "all_x_embedder.2-1.": "x_embedder.",
    ".attention.to_out.0.weight": ".attention.out.weight",
    ".attention.norm_k.weight": ".attention.k_norm.weight",
    ".attention.norm_q.weight": ".attention.q_norm.weight",
}
PREFIX = "model.diffusion_model."


class Case:
    """A tiny model, its config in a folder, and files of it under the original names.

    Attributes:
        scaled: a file of float8 weights with scales.
        casts: a file of float8 weights without.
        floats: the first one's weights, with scales applied.
    """

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        model = ZImageTransformer2DModel(
            **{"all_patch_size": (2,), "all_f_patch_size": (1,), "in_channels": 16, "dim": 64, "n_layers": 1},
            **{"n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 32},
            **{"axes_dims": [8, 12, 12], "axes_lens": [64, 64, 64]},
        )
        model.save_pretrained(folder / "config")
        self.config = str(folder / "config")
        scaled, casts, self.floats = {}, {}, {}
        for name, value in model.state_dict().items():
            for new, old in _NAMES.items():
                name = name.replace(new, old)
            if name.endswith(("to_k.weight", "to_v.weight")):
                continue
            if name.endswith("to_q.weight"):  # one tensor for queries, keys and values
                name, value = name.replace("to_q", "qkv"), torch.cat([value, -value, 2 * value])
            name = PREFIX + name
            scaled[name] = casts[name] = self.floats[name] = value
            if value.dim() == 2 and "pad_token" not in name:
                scale = value.abs().max() / 448
                scaled[name], casts[name] = (value / scale).to(torch.float8_e4m3fn), value.to(torch.float8_e4m3fn)
                scaled[name.replace(".weight", ".scale_weight")] = scale
                scaled[name.replace(".weight", ".scale_input")] = torch.tensor(0.1)
                self.floats[name] = scaled[name].float() * scale
        scaled["scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
        self.scaled, self.casts = str(folder / "scaled.safetensors"), str(folder / "casts.safetensors")
        save_file(scaled, self.scaled)
        save_file(casts, self.casts)

    def load(self, source: Any, **options: Any) -> Any:
        options = {"config": self.config, "torch_dtype": torch.float32, **options}
        return ZImageTransformer2DModel.from_single_file(source, **options)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("zimage"))


def values(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.dequantize() if isinstance(p, QTensor) else p.detach() for n, p in model.named_parameters()}


def assert_same(found: Any, expected: Any) -> None:
    a, b = values(found), values(expected)
    assert a.keys() == b.keys()
    assert not [name for name in a if not torch.equal(a[name], b[name])]


def quantized(model: Any) -> list[str]:
    return [name for name, weight in model.named_parameters() if isinstance(weight, QTensor)]


def test_scaled_float8(case, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "requanto"):
        model = case.load(case.scaled)
    assert (
        "another library (comfyui), which does not open it here: Diffusers takes the codes for the weights"
        in caplog.text
    )
    assert "scaled.safetensors: the inputs of 23 layers stay float" in caplog.text
    assert_same(model, case.load(dict(case.floats)))
    assert model.layers[0].attention.to_k.weight.qtype.name == "qfloat8_e4m3fn"
    model.save_pretrained(tmp_path)
    assert_same(ZImageTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.float32), model)
    half = case.load(case.scaled, torch_dtype=torch.bfloat16)
    assert half.layers[0].attention.to_k.weight.dtype == torch.bfloat16
    assert len(quantized(half)) == len(quantized(model)) > 20


def test_who_opens_it(case, monkeypatch):
    assert quantized(case.load(load_file(case.scaled)))
    assert quantized(case.load(case.scaled, quantization_config=QuantoConfig(weights="int4")))
    with pytest.raises(CheckpointError, match="low_cpu_mem_usage=True only"):
        case.load(case.scaled, low_cpu_mem_usage=False)
    monkeypatch.setattr(requanto.settings, "foreign", "never")
    assert not quantized(case.load(case.scaled))
    assert quantized(case.load(case.scaled, quantization_config=QuantoConfig()))


def test_casts_stay_diffusers_business(case):
    floats = {name: value.float() for name, value in load_file(case.casts).items()}
    plain = case.load(case.casts)
    assert not quantized(plain)
    assert_same(plain, case.load(dict(floats)))
    kept = case.load(case.casts, quantization_config=QuantoConfig(weights="float8"))
    assert kept.layers[0].attention.to_k.weight.qtype.name == "qfloat8_e4m3fn"
    assert_same(kept, plain)
    assert bool((kept.layers[0].attention.to_k.weight.inner_tensors()["scale"] == 1).all())
    other = case.load(case.casts, quantization_config=QuantoConfig(weights="int8"))
    assert other.layers[0].attention.to_k.weight.qtype.name == "qint8"
    assert not any(weight.dtype == torch.float8_e4m3fn for weight in other.parameters())


def test_damaged_files(case, tmp_path):
    tensors = load_file(case.scaled)
    name = next(name for name in tensors if name.endswith("w1.scale_weight"))
    save_file({**tensors, name: torch.tensor(float("nan"))}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="_scale holds NaN"):
        case.load(str(tmp_path / "x.safetensors"))
    del tensors[name]
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"is float8 and has no scale .* the file is incomplete"):
        case.load(str(tmp_path / "x.safetensors"))


def test_file_of_a_pipeline(case, tmp_path, caplog):
    """A pipeline opens its file once, and passes all tensors to each component."""
    tensors = load_file(case.scaled)
    codes, scale = torch.randn(4, 4).to(torch.float8_e4m3fn), torch.tensor(0.5)
    tensors |= {"text_encoders.t5.a.weight": codes, "text_encoders.t5.a.scale_weight": scale}
    save_file(tensors, tmp_path / "all.safetensors")
    with caplog.at_level(logging.WARNING, "requanto"):
        state = single_file.load_single_file_checkpoint(str(tmp_path / "all.safetensors"))
    assert "1 weights of text encoders are dequantized, e.g. text_encoders.t5.a.weight" in caplog.text
    assert torch.equal(state["text_encoders.t5.a.weight"].float(), codes.float() * 0.5)
    assert_same(case.load(state), case.load(case.scaled))
    encoder = state[f"{PREFIX}layers.0.attention.qkv.weight"]
    rest = case.load({**case.floats, "text_encoders.t5.b.weight": encoder})
    assert not quantized(rest)
    assert "quantization_config" not in rest.config
    assert set(single_file.load_single_file_checkpoint(case.casts)) == set(load_file(case.casts))


def test_nunchaku(tmp_path):
    """Codes at random: the reader's tests compare values; here names and the config in the header."""
    config = {**FLUX, "attention_head_dim": 64}
    state = FluxTransformer2DModel(**config).to(torch.bfloat16).state_dict()
    block, layer = "single_transformer_blocks.0.", "single_transformer_blocks.0.qkv_proj"
    for name in "qkv":
        del state[f"{block}attn.to_{name}.weight"], state[f"{block}attn.to_{name}.bias"]
    state |= {
        f"{layer}.qweight": torch.randint(-128, 128, (384, 64), dtype=torch.int8),
        f"{layer}.wscales": torch.rand(2, 384).to(torch.bfloat16),
        f"{layer}.bias": torch.rand(384).to(torch.bfloat16),
        f"{layer}.proj_down": torch.randn(128, 16).to(torch.bfloat16),
        f"{layer}.proj_up": torch.randn(384, 16).to(torch.bfloat16),
        f"{layer}.smooth_factor": (torch.rand(128) + 0.5).to(torch.bfloat16),
    }
    header = {
        "model_class": "NunchakuFluxTransformer2dModel",
        "config": json.dumps({"_class_name": "NunchakuFluxTransformer2dModel", **config}),
        "quantization_config": json.dumps({"method": "svdquant", "weight": {"dtype": "int4"}}),
    }
    save_file(state, tmp_path / "svdq.safetensors", metadata=header)
    model = FluxTransformer2DModel.from_single_file(str(tmp_path / "svdq.safetensors"), torch_dtype=torch.bfloat16)
    assert quantized(model) == [f"{block}attn.to_{name}.weight" for name in "qkv"]
    assert model.config["quantization_config"].tensors[f"{block}attn.to_q.weight"] == (
        "qint4 128x128 group=64 rank=16 columns"
    )
    assert torch.equal(model.proj_out.weight, state["proj_out.weight"])
