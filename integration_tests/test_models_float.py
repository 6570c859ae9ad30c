"""What the other tests build on, unquantized: tiny models run, are seeded and survive saving; the real ones make sense."""

import pytest
import torch

pytest.importorskip("transformers")

from tiny_models import MIXTURES, TINY, output, save_tiny, tiny_tokenizer
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from requanto.data import eval_text
from requanto.report import perplexity


@pytest.mark.parametrize("name", TINY)
def test_tiny_model_runs_and_is_always_the_same(name):
    tiny = TINY[name]
    first = output(tiny.build(), tiny.inputs())
    assert first.isfinite().all()
    assert first.std() > 0.05
    assert torch.equal(first, output(tiny.build(), tiny.inputs()))


@pytest.mark.parametrize("name", TINY)
def test_tiny_model_looks_at_all_its_inputs(name):
    tiny = TINY[name]
    model, inputs = tiny.build(), tiny.inputs()
    expected = output(model, inputs)
    for key in inputs.keys() & {"pixel_values", "input_features", "input_ids", "decoder_input_ids"}:
        changed = inputs[key].flip(0)
        assert not torch.allclose(output(model, {**inputs, key: changed}), expected, atol=1e-3), key


@pytest.mark.parametrize("name", TINY)
def test_tiny_model_survives_saving(name, tmp_path):
    tiny = TINY[name]
    loaded = tiny.auto.from_pretrained(save_tiny(name, tmp_path)).eval()
    torch.testing.assert_close(output(loaded, tiny.inputs()), output(tiny.build(), tiny.inputs()))


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_are_fused(name):
    experts = [p for n, p in TINY[name].build().named_parameters() if "experts." in n and p.dim() == 3]
    assert experts
    assert all(p.shape[0] == 4 for p in experts)


def test_tiny_tokenizer_round_trip(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "Hello, world! 12 + 30 = 42\n"
    ids = tokenizer(text)["input_ids"]
    assert max(ids) < 160
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text


def test_smollm2_predicts_and_answers(smollm2_dir):
    model = AutoModelForCausalLM.from_pretrained(smollm2_dir)
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    assert model.dtype == torch.bfloat16
    assert not hasattr(model.config, "quantization_config")
    assert perplexity(model, tokenizer, eval_text(), max_tokens=2048, progress=False).perplexity < 20
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)


def test_minilm_embeds_by_meaning(minilm_dir):
    model = AutoModel.from_pretrained(minilm_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(minilm_dir)
    inputs = tokenizer(["A cat sits.", "A kitten is sitting.", "Stocks fell."], padding=True, return_tensors="pt")
    mask = inputs["attention_mask"].unsqueeze(-1)
    with torch.no_grad():
        embeddings = (model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)
    cat, kitten, stocks = torch.nn.functional.normalize(embeddings, dim=1)
    assert cat @ kitten > 0.6 > 0.3 > cat @ stocks
