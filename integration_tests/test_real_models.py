"""Two real models: perplexity near bf16, embeddings near float, and the same after a reload."""

import pytest
import torch
import torch.nn.functional as F
import transformers as tf

from requanto import QuantoConfig
from requanto.data import eval_text
from requanto.report import perplexity

TOKENS = 4096


@pytest.fixture(scope="module", autouse=True)
def _one_thread(two_threads):
    """Small products in two threads wait for each other where other processes compute: minutes instead of seconds."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(2)


@pytest.fixture(scope="module")
def tokenizer(smollm2_dir):
    return tf.AutoTokenizer.from_pretrained(smollm2_dir)


def measured(model, tokenizer):
    return perplexity(model.eval(), tokenizer, eval_text(), window=1024, max_tokens=TOKENS, progress=False).perplexity


@pytest.fixture(scope="module")
def bf16(smollm2_dir, tokenizer):
    return measured(tf.AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.bfloat16), tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "allowed"), [("int8", 0.015), ("float8", 0.015), ("int4", 0.35)])
def test_perplexity_near_bf16(smollm2_dir, tokenizer, bf16, kind, allowed):
    model = tf.AutoModelForCausalLM.from_pretrained(
        smollm2_dir, quantization_config=QuantoConfig(weights=kind), dtype=torch.bfloat16
    )
    found = measured(model, tokenizer)
    assert found == pytest.approx(bf16, rel=allowed)


@pytest.mark.slow
def test_a_reloaded_model_answers_the_same(smollm2_dir, tokenizer, tmp_path):
    model = tf.AutoModelForCausalLM.from_pretrained(smollm2_dir, quantization_config=QuantoConfig(weights="int4"))
    ids = tokenizer("The three primary colours are", return_tensors="pt")["input_ids"]
    written = model.generate(ids, max_new_tokens=6, do_sample=False)
    model.save_pretrained(tmp_path)
    size = sum(p.stat().st_size for p in tmp_path.glob("*.safetensors"))
    assert size < 0.55 * sum(p.stat().st_size for p in smollm2_dir.glob("*.safetensors"))
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.generate(ids, max_new_tokens=6, do_sample=False), written)


@pytest.mark.parametrize(("kind", "least"), [("int8", 0.999), ("float8", 0.995), ("int4", 0.94)])
def test_sentence_embeddings_near_float(minilm_dir, kind, least):
    tokenizer = tf.AutoTokenizer.from_pretrained(minilm_dir)
    texts = [line for line in eval_text().splitlines() if 60 < len(line) < 200][:16]
    batch = tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")

    def embed(**options):
        model = tf.AutoModel.from_pretrained(minilm_dir, **options).eval()
        with torch.no_grad():
            hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        return (hidden * mask).sum(1) / mask.sum(1)

    cosine = F.cosine_similarity(embed(), embed(quantization_config=QuantoConfig(weights=kind)))
    assert cosine.min() >= least
