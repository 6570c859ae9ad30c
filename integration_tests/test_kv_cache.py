"""Quantized KV caches in Transformers: the tokens of a float cache, in every mode of generate, for every kind of layer."""

import copy
import logging
import subprocess
import sys

import pytest
import torch
import transformers as tf
from shrunk_models import Case
from tiny_models import TINY, token_ids
from transformers import DynamicCache, EncoderDecoderCache, StaticCache, cache_utils

import requanto
from requanto import QuantizedCache, StaticQuantizedCache

pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values.*deprecated")

# So small that a few tokens fill several blocks.
SMALL = {"window": 4, "block": 4}
PROMPT, NEW = 21, 14
GREEDY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "disable_compile": True}

#: Kinds of layers: full, sliding window, sinks, many heads, linear attention beside or between, shared keys, compressed
#: keys with other sizes than values, an indexer.
OTHERS = {
    "falcon_h1": "FalconH1ForCausalLM",
    "lfm2": "Lfm2ForCausalLM",
    "gemma4": "Gemma4ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "glm_moe_dsa": "GlmMoeDsaForCausalLM",
}
NAMES = ["llama", "gemma3", "gpt-oss", "gpt2", *OTHERS]


def made(name: str) -> torch.nn.Module:
    if name in TINY:
        return TINY[name].build()
    torch.manual_seed(0)
    model = Case(name, OTHERS[name]).build().eval()
    for parameter in model.parameters():  # larger than initialized: a wrong cache must show
        if parameter.dim() == 2:
            parameter.data.mul_(2)
    return model


@pytest.fixture(scope="module")
def llama():
    return TINY["llama"].build()


@pytest.fixture(scope="module")
def gemma():
    return TINY["gemma3"].build()


def written(model, cache, ids=None, **options):
    """New tokens; the cache's name as an argument differs between versions of Transformers."""
    ids = token_ids(2, PROMPT) if ids is None else ids
    return model.generate(ids, past_key_values=cache, **(GREEDY | options))[:, ids.shape[1] :]


def read(model, cache, ids):
    """Logits of a text that is read a few tokens at a time."""
    with torch.inference_mode():
        return torch.cat([model(part, past_key_values=cache).logits for part in ids.split(3, 1)], 1).float()


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_layer(name):
    model, length = made(name), PROMPT + NEW
    caches = {
        "growing": lambda **kinds: QuantizedCache(model, **SMALL, **kinds),
        "static": lambda **kinds: StaticQuantizedCache(model, length, **SMALL, **kinds),
    }
    wanted = {
        "growing": written(model, DynamicCache(config=model.config)),
        "static": written(model, StaticCache(config=model.config, max_cache_len=length)),
    }
    # Token by token where keys and values stay float: nothing but their rounding differs from the library's caches.
    for kind, make in caches.items():
        assert torch.equal(written(model, make(keys=None, values=None)), wanted[kind])
        if name in TINY:  # models whose tokens are clear
            assert torch.equal(written(model, make()), wanted[kind])
    text = torch.cat([token_ids(2, PROMPT), wanted["growing"]], 1)
    whole = read(model, DynamicCache(config=model.config), text)
    cache = caches["growing"]()
    assert 0 < (read(model, cache, text) - whole).norm() < 0.05 * whole.norm()
    layers = [layer for layer in cache.layers if hasattr(layer, "_stores")]
    assert layers
    assert any(store.quantized > 0 for layer in layers for store in layer._stores or ())


def test_sliding_windows_are_quantized_and_forget():
    config = TINY["gemma3"].config()
    config.sliding_window = 12
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    wanted = written(model, DynamicCache(config=config), max_new_tokens=40, min_new_tokens=40)
    cache = QuantizedCache(config, window=2, block=4)
    assert torch.equal(written(model, cache, max_new_tokens=40, min_new_tokens=40), wanted)
    sliding, full = cache.layers
    assert sliding._stores[0].quantized > 0
    assert sliding._stores[0].length == 11
    assert full._stores[0].length == sliding.get_seq_length() == PROMPT + 39
    static = StaticQuantizedCache(config, PROMPT + 40, window=2, block=4)
    assert torch.equal(written(model, static, max_new_tokens=40, min_new_tokens=40), wanted)
    for new, old in zip(static.layers, cache.layers):
        assert new.get_seq_length() == old.get_seq_length()


MODES = {
    "beams": {"num_beams": 3},
    "sampled beams": {"num_beams": 2, "do_sample": True},
    "sampling": {"do_sample": True, "temperature": 0.8},
    "chunks of the prompt": {"prefill_chunk_size": 5},
    "several texts": {"do_sample": True, "num_return_sequences": 3},
}


@pytest.mark.parametrize(
    ("name", "mode"), [*(("llama", mode) for mode in MODES), ("gemma3", "beams"), ("gemma3", "chunks of the prompt")]
)
def test_modes_of_generate(name, mode, llama, gemma):
    model = llama if name == "llama" else gemma
    found = []
    # Beams are close to each other, so what is compared with is the float cache of the same code, and, where the tokens are
    # clear, int8.
    for options in ({"keys": None, "values": None}, {}):
        caches = [DynamicCache(config=model.config), QuantizedCache(model.config, **SMALL, **options)]
        caches.append(StaticQuantizedCache(model.config, PROMPT + NEW, **SMALL, **options))
        for cache in caches:
            torch.manual_seed(7)
            found.append(written(model, cache, **MODES[mode]))
    assert all(torch.equal(each, found[0]) for each in found[1:3])
    if mode in ("chunks of the prompt", "sampling"):
        assert all(torch.equal(each, found[0]) for each in found[4:])
    else:
        assert all((each == found[0]).float().mean() > 0.3 for each in found[4:])


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_assisted_generation_crops_the_cache(name, llama, gemma):
    model = llama if name == "llama" else gemma
    ids = token_ids(1, PROMPT)
    wanted = written(model, DynamicCache(config=model.config), ids)
    for options in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": TINY[name].build()}):
        assert torch.equal(written(model, QuantizedCache(model.config, **SMALL), ids, **options), wanted)


def test_padding_on_the_left(llama):
    """A short text beside a long one goes on as it does alone."""
    long, short = token_ids(1, PROMPT), token_ids(1, 8)
    padded = torch.cat([torch.zeros(1, PROMPT - 8, dtype=torch.long), short], 1)
    mask = torch.ones(2, PROMPT, dtype=torch.long)
    mask[1, : PROMPT - 8] = 0
    together = torch.cat([long, padded])
    for cache in (QuantizedCache(llama.config, **SMALL), StaticQuantizedCache(llama.config, PROMPT + NEW, **SMALL)):
        found = written(llama, cache, together, attention_mask=mask)
        assert torch.equal(found[:1], written(llama, None, long))
        assert torch.equal(found[1:], written(llama, None, short))


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("name", ["t5", "whisper"])
def test_encoder_decoder(name, beams):
    model = TINY[name].build()
    inputs = {key: value for key, value in TINY[name].inputs().items() if key != "decoder_input_ids"}
    options = {"max_new_tokens": 12, "do_sample": False, "num_beams": beams, "disable_compile": True}
    wanted = model.generate(**inputs, **options)
    encoded = 11 if name == "t5" else 30
    for make in (
        lambda tokens: QuantizedCache(model.config, window=2, block=4),
        lambda tokens: StaticQuantizedCache(model.config, tokens, window=2, block=4),
    ):
        cache = EncoderDecoderCache(make(20), make(encoded))
        assert torch.equal(model.generate(**inputs, **options, past_key_values=cache), wanted)
        assert cache.cross_attention_cache.layers[0].keys.shape[2] == encoded
        assert cache.cross_attention_cache.nbytes > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("kind", "limit"), [("int8", 0.02), ("float8", 0.1), ("int4", 0.2)])
def test_logits(kind, limit, dtype, llama):
    model, ids = copy.deepcopy(llama).to(dtype), token_ids(2, 60)
    found = {
        "float": read(model, DynamicCache(config=model.config), ids),
        "growing": read(model, QuantizedCache(model.config, kind, kind, **SMALL), ids),
        "static": read(model, StaticQuantizedCache(model.config, 64, kind, kind, **SMALL), ids),
    }
    for name in ("growing", "static"):
        assert (found[name] - found["float"]).norm() < (limit + 0.02) * found["float"].norm()
    assert (found["static"] - found["growing"]).norm() < 0.02 * found["float"].norm()


def test_a_prompt_is_read_once_and_used_twice(llama):
    prompt, ends = token_ids(1, 30), [token_ids(1, 4), token_ids(1, 4).flip(1)]
    cache = QuantizedCache(llama.config, **SMALL)
    with torch.no_grad():
        llama(prompt, past_key_values=cache)
        for end in ends:
            whole = torch.cat([prompt, end], 1)
            assert torch.equal(written(llama, copy.deepcopy(cache), whole), written(llama, None, whole))
    assert cache.get_seq_length() == 30
    cache.reset()
    assert (cache.get_seq_length(), cache.nbytes) == (0, 0)


def test_batches_of_a_cache(llama):
    cache = QuantizedCache(llama.config, **SMALL)
    with torch.no_grad():
        llama(token_ids(3, 20), past_key_values=cache)
    keys = cache.layers[1].keys
    cache.batch_select_indices(torch.tensor([2, 0]))
    assert torch.equal(cache.layers[1].keys, keys[[2, 0]])
    cache.batch_select_indices(torch.tensor([False, True]))
    cache.batch_repeat_interleave(3)
    assert torch.equal(cache.layers[1].keys, keys[[0, 0, 0]])
    cache.crop(-7)
    assert torch.equal(cache.layers[1].keys, keys[[0, 0, 0], :, :13])
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    assert torch.equal(cache.layers[1].keys, keys[[0, 0, 0], :, :13])


def test_a_step_of_a_static_cache_is_compiled_once(gemma):
    """One layer with a sliding window, one with full attention."""
    from torch._dynamo.testing import CompileCounter

    model, ids = gemma, token_ids(1, 40)
    with torch.no_grad():
        wanted = model(ids).logits[:, 10:]
    cache, counter = StaticQuantizedCache(model.config, 64, window=2, block=4), CompileCounter()
    torch._dynamo.reset()
    step = torch.compile(model, backend=counter, fullgraph=True)
    found = []
    with torch.no_grad():
        model(ids[:, :10], past_key_values=cache)
        for token in range(10, 40):
            position = torch.tensor([[token]])
            found.append(step(ids[:, token : token + 1], past_key_values=cache, position_ids=position).logits)
    assert (torch.cat(found, 1) - wanted).norm() < 0.02 * wanted.norm()
    assert counter.frame_count == 1


def test_generate_with_quantized_caches_by_name(llama, gemma, monkeypatch, caplog):
    """`cache_implementation="quantized"` needs no other package, and takes models with sliding windows."""
    monkeypatch.setattr(cache_utils, "is_optimum_quanto_available", lambda: False)
    monkeypatch.setattr(cache_utils, "is_hqq_available", lambda: False)
    configs = [
        {"backend": "quanto", "nbits": 8, "q_group_size": 4, "residual_length": 8},
        {"backend": "quanto", "nbits": 4, "axis_key": 0, "axis_value": 0, "q_group_size": 64, "residual_length": 128},
        {"backend": "hqq", "nbits": 8, "axis_key": 1, "axis_value": 1},
        {"backend": "requanto", "keys": "int8", "values": "int8", **SMALL},
        {},
    ]
    caplog.set_level(logging.INFO, "requanto")
    for model in (llama, gemma):
        wanted = written(model, None)
        for config in configs:
            options = {
                "cache_implementation": "quantized",
                "cache_config": dict(config),
                "return_dict_in_generate": True,
            }
            found = model.generate(token_ids(2, PROMPT), **GREEDY, **options)
            assert torch.equal(found.sequences[:, PROMPT:], wanted), config
            assert isinstance(found.past_key_values, cache_utils.QuantizedCache)
            assert type(found.past_key_values.layers[-1]).__module__.startswith("requanto.")
    assert "axis_key and axis_value are not used" in caplog.text
    assert "hqq is not installed" in caplog.text
    for bad, words in [
        ({"backend": "quanto", "nbits": 3}, "nbits of a quantized cache can be 2, 4 or 8, found 3"),
        (
            {"backend": "quanto", "residual_length": -1},
            "residual_length must be a number of tokens, 0 or more, found -1",
        ),
        ({"backend": "quanto", "q_group_size": 0}, "q_group_size must be a positive number of channels, found 0"),
        ({"backend": "requanto", "keys": "int9"}, "unknown quantized type 'int9'"),
        ({"backend": "other"}, "Unknown quantization backend `other`"),
    ]:
        with pytest.raises(ValueError) as found:
            cache_utils.QuantizedCache(config=llama.config, **bad)
        assert words in str(found.value)
    with pytest.raises(TypeError, match="nbit"):
        cache_utils.QuantizedCache("quanto", llama.config, nbit=4)


def test_wrong_caches_are_named(llama, gemma):
    other = tf.AutoModelForCausalLM.from_config(tf.LlamaConfig(**{**llama.config.to_dict(), "num_hidden_layers": 3}))
    wide = tf.AutoModelForCausalLM.from_config(tf.LlamaConfig(**{**llama.config.to_dict(), "num_key_value_heads": 4}))
    ids = token_ids(2, 6)
    for make in (lambda: QuantizedCache(llama), lambda: StaticQuantizedCache(llama, 20)):
        with torch.no_grad():
            with pytest.raises(ValueError, match="made for a model of 2 layers, found keys of layer 2"):
                other(ids, past_key_values=make())
            cache = make()
            llama(ids, past_key_values=cache)
            with pytest.raises(
                ValueError, match=r"holds keys of shape \[2, 2, tokens, 16\].*found new ones of shape \[2, 4, 6, 16\]"
            ):
                wide(ids, past_key_values=cache)
            with pytest.raises(ValueError, match=r"found new ones of shape \[1, 2, 1, 16\]"):
                cache.update(torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1, 16), 0)
            with pytest.raises(ValueError, match="float16"):
                cache.update(torch.zeros(2, 2, 1, 16).half(), torch.zeros(2, 2, 1, 16).half(), 0)
    with torch.no_grad():
        cache = StaticQuantizedCache(llama, 8)
        llama(ids, past_key_values=cache)
        with pytest.raises(ValueError, match="max_cache_len=8 tokens is given 12 tokens"):
            llama(ids, past_key_values=cache)
    with pytest.raises(TypeError, match="give its config or the model, found str"):
        QuantizedCache("llama")
    with pytest.raises(TypeError, match=r"max_cache_len is a number of tokens, found 2\.5"):
        StaticQuantizedCache(llama.config, 2.5)
    with pytest.raises(ValueError, match="window of a KV cache must be 0 or more, found -3"):
        QuantizedCache(llama.config, window=-3)
    with pytest.raises(AttributeError, match="read only"):
        cache.layers[0].keys = torch.zeros(1)


def test_layers_that_are_not_known_are_refused():
    config = Case("deepseek_v4", "DeepseekV4ForCausalLM").build().config
    with pytest.raises(ValueError, match=r"layers \[0, 1\] of this model have caches that cannot be quantized"):
        QuantizedCache(config)
    with pytest.raises(ValueError, match="Transformers has no layer of a StaticCache"):
        StaticQuantizedCache(config, 30)


def test_crop_of_static_caches(llama, gemma):
    cache = StaticQuantizedCache(llama, 40, window=6, block=4)
    with torch.no_grad():
        llama(token_ids(1, 30), past_key_values=cache)
        before = cache.layers[0].keys.clone()
        cache.crop(-5)
        assert cache.get_seq_length() == 25
        llama(token_ids(1, 30)[:, 25:], past_key_values=cache)
        torch.testing.assert_close(cache.layers[0].keys[:, :, :30], before[:, :, :30], rtol=1e-4, atol=1e-4)
        with pytest.raises(ValueError, match="can remove its float tokens, now 6, found 9"):
            cache.crop(-9)
        cache = StaticQuantizedCache(gemma, 40, window=2, block=4)
        gemma(token_ids(1, 30), past_key_values=cache)
        with pytest.raises(ValueError, match="sliding window of 8 after more tokens than that"):
            cache.crop(-1)


def test_requanto_names():
    assert requanto.QuantizedCache is QuantizedCache
    assert issubclass(QuantizedCache, DynamicCache)
    assert issubclass(StaticQuantizedCache, StaticCache)
    assert {"QuantizedCache", "StaticQuantizedCache"} <= set(dir(requanto))


@pytest.mark.parametrize("first", ["transformers_cache_layers", "transformers_cache_names"])
def test_a_module_of_the_caches_may_be_imported_first(first):
    """Importing Transformers' caches imports one of ours, which must not need the module that is being imported."""
    code = f"import requanto.integrations.{first}, requanto; from transformers import cache_utils as c; "
    code += "print(requanto.QuantizedCache.__name__, hasattr(c.QuantizedCache.__init__, '_requanto'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=400)
    assert done.stdout.split() == ["QuantizedCache", "True"], done.stderr
