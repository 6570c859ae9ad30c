"""generate, beams, sampling, pipelines and padding: token for token as the float model with the same weights."""

import copy

import pytest
import torch
import transformers as tf
from tiny_models import TINY, save_tiny, tiny_tokenizer, token_ids

from requanto import QuantoConfig

pytestmark = pytest.mark.usefixtures("exact")

KINDS = ["int8", "float8", "int4", "int2", "nf4"]


@pytest.fixture(scope="module")
def float_dir(tmp_path_factory):
    directory = save_tiny("llama", tmp_path_factory.mktemp("float"))
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module", params=KINDS)
def pair(request, float_dir):
    """(quantized model, the float model of the same weights)"""
    model = tf.AutoModelForCausalLM.from_pretrained(
        float_dir, quantization_config=QuantoConfig(weights=request.param)
    ).eval()
    return model, copy.deepcopy(model).dequantize().eval()


WAYS = {
    "greedy": {"do_sample": False},
    "greedy without cache": {"do_sample": False, "use_cache": False},
    "beams": {"num_beams": 3, "do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "sampled beams": {"num_beams": 2, "do_sample": True},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
}


@pytest.mark.parametrize("way", WAYS)
def test_generate(pair, way):
    outputs = []
    for model in pair:
        torch.manual_seed(7)
        outputs.append(
            model.generate(token_ids(2, 6), max_new_tokens=12, min_new_tokens=12, disable_compile=True, **WAYS[way])
        )
    assert outputs[0].shape == (2, 18)
    assert torch.equal(*outputs)


def test_the_cache_gives_what_the_whole_text_gives(pair):
    model, ids = pair[0], token_ids(2, 9)
    with torch.no_grad():
        whole = model(ids).logits
        start = model(ids[:, :5], use_cache=True)
        rest = model(ids[:, 5:], past_key_values=start.past_key_values).logits
    torch.testing.assert_close(torch.cat([start.logits, rest], 1), whole, rtol=1e-4, atol=1e-4)


def test_padding_changes_nothing(pair):
    """A short text in a batch with a long one, padded on the left, goes on as it does alone."""
    model = pair[0]
    long, short = token_ids(1, 9), token_ids(1, 4)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), short], 1)
    batch, mask = torch.cat([long, padded]), torch.ones(2, 9, dtype=torch.long)
    mask[1, :5] = 0
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    together = model.generate(batch, attention_mask=mask, **options)[:, 9:]
    assert torch.equal(together[0], model.generate(long, **options)[0, 9:])
    assert torch.equal(together[1], model.generate(short, **options)[0, 4:])


def test_pipeline(float_dir, tmp_path):
    model = tf.AutoModelForCausalLM.from_pretrained(float_dir, quantization_config=QuantoConfig(weights="int4"))
    tokenizer = tf.AutoTokenizer.from_pretrained(float_dir, padding_side="left")
    options = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    written = tf.pipeline("text-generation", model=model, tokenizer=tokenizer)("Hello", **options)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = tf.pipeline("text-generation", model=str(tmp_path))
    assert loaded("Hello", **options) == written
    plain = copy.deepcopy(model).dequantize()
    assert tf.pipeline("text-generation", model=plain, tokenizer=tokenizer)("Hello", **options) == written
    batch = loaded(["Hello", "A longer text", "x"], batch_size=3, **options)
    assert batch[0] == written


@pytest.mark.parametrize("name", ["t5", "whisper", "llava", "gpt2", "mixtral", "gemma3"])
def test_other_families_generate_as_their_dequantized_selves(name, tmp_path):
    tiny = TINY[name]
    model = tiny.auto.from_pretrained(
        save_tiny(name, tmp_path), quantization_config=QuantoConfig(weights="int8")
    ).eval()
    plain = copy.deepcopy(model).dequantize().eval()
    inputs = {k: v for k, v in tiny.inputs().items() if k != "decoder_input_ids"}
    found, wanted = (m.generate(**inputs, max_new_tokens=6, num_beams=2, do_sample=False) for m in (model, plain))
    assert torch.equal(found, wanted)
