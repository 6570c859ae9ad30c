"""GGUF files in Transformers: weights stay quantized, and equal those of Transformers' own load."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import gguf_files as files
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GgufConfig, T5EncoderModel

import requanto
from requanto import QTensor, QuantoConfig
from requanto.checkpoint.format import CheckpointError
from requanto.report.convert_foreign import convert_checkpoint

pytestmark = pytest.mark.usefixtures("exact")


def own(path: Path, **options: Any) -> Any:
    """The model as Transformers loads it: dequantized."""
    return load(path, quantization_config=GgufConfig(dequantize=True), **options)


def load(path: Path, cls: Any = AutoModelForCausalLM, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return cls.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype, **options)


def values(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.dequantize() if isinstance(p, QTensor) else p for n, p in model.named_parameters()}


def lines(model: Any) -> dict[str, str]:
    return model.config.quantization_config.tensors


def assert_same(found: Any, expected: Any) -> None:
    a, b = values(found), values(expected)
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(files.identifiers())[0]


CASES = {
    "llama of k-quants": (files.llama, files.mixed, 16),
    "llama of older types": (files.llama, files.legacy, 16),
    "gemma3": (files.gemma3, files.mixed, 15),
    "qwen3 with experts": (files.qwen3moe, files.mixed, 14),
    "gpt2, transposed": (files.gpt2, files.legacy, 10),
    "t5": (files.t5, files.mixed, 15),
    "lfm2, by conversions": (files.lfm2, files.mixed, 13),
    "qwen3.5, with columns in another order": (files.qwen35, files.mixed, 16),
    "bloom, of which queries, keys and values become floats": (files.bloom, files.mixed, 7),
}


@pytest.mark.parametrize("case", CASES)
def test_equal_to_transformers_own_load(case, tmp_path):
    write, kinds, count = CASES[case]
    path = write(tmp_path / "model.gguf", kinds)
    cls = T5EncoderModel if case == "t5" else AutoModelForCausalLM
    expected, model = own(path, cls=cls), load(path, cls)
    assert sum(isinstance(weight, QTensor) for weight in model.parameters()) == count
    assert_same(model, expected)
    assert torch.allclose(logits(model), logits(expected), atol=1e-5)
    assert type(model.hf_quantizer).__module__.startswith("requanto.")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return files.llama(tmp_path_factory.mktemp("llama") / "model.gguf", files.mixed, tied=True)


def test_lines_and_the_tied_table(llama):
    model = load(llama)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert lines(model)["model.embed_tokens.weight"] == "qint6 96x256 group=16 scales=8 signed block=256"
    assert lines(model)["model.layers.0.self_attn.q_proj.weight"] == "qint4 256x256 group=32 affine scales=6 block=256"
    assert "lm_head.weight" not in lines(model)
    stored = sum(one.nbytes for one in GGUF(llama).values())
    assert model.get_memory_footprint() < 1.01 * stored
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = own(llama).generate(files.identifiers(), **options)
    assert torch.equal(model.generate(files.identifiers(), **options), expected)


def GGUF(path: Path) -> dict[str, np.ndarray]:
    import gguf

    return {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}


def test_convert(llama, tmp_path, monkeypatch):
    folder = tmp_path / "Downloads"
    folder.mkdir()
    (folder / "model.gguf").symlink_to(llama)
    for name in ("generation_config.json", "notes.txt", "script.py", "config.json"):
        (folder / name).write_text("{}")
    monkeypatch.setattr(requanto.settings, "foreign", "never")
    result = convert_checkpoint(folder / "model.gguf", tmp_path / "ours")
    monkeypatch.setattr(requanto.settings, "foreign", "auto")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert lines(model) == lines(load(llama))
    assert result.parts[0].quantized == len(lines(model))
    names = {path.name for path in (tmp_path / "ours").iterdir()}
    assert {"generation_config.json", "config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not {"notes.txt", "script.py"} & names


def test_save_load_and_change(llama, tmp_path):
    model = load(llama, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert lines(again) == lines(model)
    assert_same(again, model)
    expected = values(model)
    floats = again.dequantize()
    assert all(torch.equal(weight, expected[name]) for name, weight in floats.named_parameters())
    requanto.quantize(floats, weights="int8")
    requanto.freeze(floats)
    assert floats.model.layers[0].mlp.up_proj.weight.qtype.name == "qint8"


def test_lora(llama):
    peft = pytest.importorskip("peft")
    model = load(llama)
    before = logits(model)
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    tuned(files.identifiers(), labels=files.identifiers()).loss.backward()
    assert all(p.grad is not None for n, p in tuned.named_parameters() if "lora_" in n)
    with tuned.disable_adapter():
        assert torch.allclose(logits(tuned), before)


def test_base_model_and_bfloat16(llama):
    model = load(llama, AutoModel, torch.bfloat16)
    assert model.embed_tokens.weight.dtype == torch.bfloat16
    assert_same(model, own(llama, cls=AutoModel, dtype=torch.bfloat16))
    assert torch.isfinite(model(files.identifiers()).last_hidden_state).all()


def test_who_opens_it(llama, monkeypatch, caplog):
    with caplog.at_level(logging.WARNING):
        load(llama)
    (told,) = [record.message for record in caplog.records if "Requanto opens it" in record.message]
    assert "turns all weights of llama models into floats" in told
    monkeypatch.setattr(requanto.settings, "foreign", "never")
    assert not any(isinstance(weight, QTensor) for weight in load(llama).parameters())
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        model = load(llama, quantization_config=QuantoConfig(weights="int4"))
    assert isinstance(model.lm_head.weight, QTensor)
    assert "weights='int4' of quantization_config is not used" in caplog.text
    monkeypatch.setattr(requanto.settings, "foreign", "always")
    assert not any(isinstance(weight, QTensor) for weight in own(llama).parameters())


def test_types_without_a_place_are_dequantized(tmp_path, caplog):
    def kinds(name: str) -> str:
        return "IQ3_S" if "ffn_up" in name else "IQ4_XS" if "ffn_gate" in name else "Q4_K"

    path = files.llama(tmp_path / "model.gguf", kinds)
    with caplog.at_level(logging.WARNING, "requanto"):
        model = load(path)
    (told,) = [record.message for record in caplog.records if "dequantized" in record.message]
    assert "2 weights are dequantized" in told
    assert "2 IQ3_S" in told
    assert "qcodebook4" in lines(model)["model.layers.0.mlp.gate_proj.weight"]
    assert_same(model, own(path))


def test_experts_of_two_types(tmp_path, caplog):
    path = files.qwen3moe(tmp_path / "model.gguf", lambda name: "Q5_K" if "ffn_up_exps" in name else "Q4_K")
    with caplog.at_level(logging.WARNING, "requanto"):
        model = load(path)
    assert "2 weights are dequantized" in caplog.text
    assert "it is one weight, of which the file has parts in Q4_K and Q5_K" in caplog.text
    assert isinstance(model.model.layers[0].mlp.experts.down_proj, QTensor)
    assert_same(model, own(path))


def test_files_of_floats(tmp_path):
    path = files.llama(tmp_path / "model.gguf", files.every("F16"))
    assert "requanto" not in type(getattr(load(path), "hf_quantizer", None)).__module__
    model = load(path, quantization_config=QuantoConfig(weights="int8"))
    expected = own(path)
    requanto.quantize(expected, weights="int8", exclude="lm_head")
    requanto.freeze(expected)
    assert_same(model, expected)
    assert lines(model)["model.layers.1.mlp.up_proj.weight"] == "qint8 512x256"


def test_split_files(llama, tmp_path):
    import gguf

    reader = gguf.GGUFReader(llama)
    names = [tensor.name for tensor in reader.tensors]
    sizes = {"split.count": 2, "split.tensors.count": len(names)}
    whole = GGUF(llama)
    kinds = {
        tensor.name: (tensor.tensor_type.name, tuple(reversed(tensor.shape.tolist()))) for tensor in reader.tensors
    }
    fields = {**files._sizes(**{"rope.dimension_count": 32})}
    for number, part in enumerate((names[:9], names[9:])):
        files.write(
            tmp_path / f"model-0000{number + 1}-of-00002.gguf",
            "llama",
            {**fields, **sizes, "split.no": number},
            {name: kinds[name] for name in part},
            whole,
        )
    # Transformers itself finds no output.weight in the first file, as in the whole one
    model = load(tmp_path / "model-00001-of-00002.gguf")
    assert_same(model, load(llama))
    (tmp_path / "model-00002-of-00002.gguf").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.gguf is missing"):
        load(tmp_path / "model-00001-of-00002.gguf")


def test_damaged_files(llama, tmp_path):
    path = tmp_path / "model.gguf"
    data = llama.read_bytes()
    path.write_bytes(data[:-100_000])
    with pytest.raises(CheckpointError, match=r"has \d+ bytes, but \S+ \(Q\d_K \(\d+, \d+\)\) goes on to byte"):
        load(path)
    whole = GGUF(llama)
    start = data.index(whole["blk.1.attn_v.weight"].tobytes())
    path.write_bytes(data[:start] + np.float16(np.inf).tobytes() + data[start + 2 :])
    with pytest.raises(CheckpointError, match=r"layers.1.self_attn.v_proj.weight_row_scale holds NaN or Inf"):
        load(path)


def test_another_shape(llama):
    config = AutoConfig.from_pretrained(llama.parent, gguf_file=llama.name)
    config.intermediate_size = 256
    with pytest.raises(
        CheckpointError, match=r"the checkpoint holds shape \(256, 512\), the model expects \(256, 256\)"
    ):
        load(llama, config=config)
