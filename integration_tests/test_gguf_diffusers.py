"""GGUF files in Diffusers: weights stay quantized through its conversion of names, which splits and joins some."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import gguf_files as files
import pytest
import torch
from diffusers import GGUFQuantizationConfig, ZImageTransformer2DModel

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


class Case:
    """A tiny model, its config in a folder, and a file of it under the original names.

    Attributes:
        floats: the file's tensors, dequantized by the package gguf.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        torch.manual_seed(0)
        model = ZImageTransformer2DModel(
            **{"all_patch_size": (2,), "all_f_patch_size": (1,), "in_channels": 16, "dim": 256, "n_layers": 1},
            **{"n_refiner_layers": 1, "n_heads": 8, "n_kv_heads": 8, "cap_feat_dim": 64},
            **{"axes_dims": [8, 12, 12], "axes_lens": [64, 64, 64]},
        )
        model.save_pretrained(folder / "config")
        self.config, self.path = str(folder / "config"), folder / f"{kind}.gguf"
        found = {}
        for name, value in model.state_dict().items():
            for new, old in _NAMES.items():
                name = name.replace(new, old)
            if name.endswith(("to_k.weight", "to_v.weight")):
                continue
            if name.endswith("to_q.weight"):  # one tensor for queries, keys and values
                name, value = name.replace("to_q", "qkv"), torch.cat([value] * 3)
            found[name] = value
        kinds = {
            n: kind if v.dim() > 1 and v.shape[-1] % 256 == 0 and "pad" not in n else "F32" for n, v in found.items()
        }
        # A table that is no layer's weight
        kinds["x_pad_token"] = "Q8_0"
        tensors = {name: (kinds[name], tuple(value.shape)) for name, value in found.items()}
        data = {
            name: files.blocks(kinds[name], tuple(value.shape), seed)
            for seed, (name, value) in enumerate(found.items())
        }
        files.write(self.path, "lumina2", {}, tensors, data)
        self.floats = {name: files.values(data[name], kinds[name]).view(tensors[name][1]) for name in found}

    def load(self, source: Any = None, **options: Any) -> Any:
        options = {"config": self.config, "torch_dtype": torch.float32, **options}
        return ZImageTransformer2DModel.from_single_file(source or str(self.path), **options)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("zimage"), "Q4_K")


def values(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.dequantize() if isinstance(p, QTensor) else p for n, p in model.named_parameters()}


def assert_same(found: Any, expected: Any) -> None:
    a, b = values(found), values(expected)
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different


def test_equal_to_the_dequantized_file(case, caplog):
    with caplog.at_level(logging.WARNING, "requanto"):
        model = case.load()
    assert "with quantization_config=GGUFQuantizationConfig(...) only. Requanto opens it" in caplog.text
    assert "1 weights are dequantized, e.g. x_pad_token: they are not those of layers" in caplog.text
    assert "stay quantized in" not in caplog.text
    assert_same(model, case.load(dict(case.floats)))
    table = model.config["quantization_config"].tensors
    assert table["layers.0.attention.to_k.weight"] == "qint4 256x256 group=32 affine scales=6 block=256"
    assert len(table) == sum(isinstance(weight, QTensor) for weight in model.parameters()) == 24
    assert "x_pad_token" not in table


def test_saved_and_loaded(case, tmp_path):
    model = case.load(torch_dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    again = ZImageTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert_same(again, model)
    assert again.get_memory_footprint() == model.get_memory_footprint()


def test_who_opens_it(case, monkeypatch):
    theirs = case.load(quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32))
    assert not any(isinstance(weight, QTensor) for weight in theirs.parameters())
    assert isinstance(case.load(quantization_config=QuantoConfig()).layers[0].attention.to_q.weight, QTensor)
    monkeypatch.setattr(requanto.settings, "foreign", "never")
    assert isinstance(case.load(quantization_config=QuantoConfig()).layers[0].attention.to_q.weight, QTensor)
    with pytest.raises(ValueError, match="shape"):  # Diffusers takes the bytes for weights
        case.load()


def test_floats_are_quantized_on_request(tmp_path):
    case = Case(tmp_path, "BF16")
    files.write(
        case.path,
        "lumina2",
        {},
        {name: ("F32", tuple(value.shape)) for name, value in case.floats.items()},
        {name: value.numpy() for name, value in case.floats.items()},
    )
    assert not any(isinstance(weight, QTensor) for weight in case.load().parameters())
    model = case.load(quantization_config=QuantoConfig(weights="int8"))
    assert model.layers[0].attention.to_q.weight.qtype.name == "qint8"


def test_damaged_files(case, tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(case.path.read_bytes()[:-100_000])
    with pytest.raises(CheckpointError, match=r"has \d+ bytes, but \S+ \(\S+ \([\d, ]+\)\) goes on to byte"):
        case.load(str(path))
