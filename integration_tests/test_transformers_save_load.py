"""Saving and loading: shards, dtypes, device maps, heads, tied tables, other processes, and life without the plugin."""

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from tiny_models import TINY, output, save_tiny

from requanto import QTensor, QuantoConfig

KINDS = ["int8", "float8", "int4", "int2", "nf4", "codebook3"]


@pytest.fixture(scope="module")
def float_dir(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("float"))


@pytest.fixture(scope="module")
def tied_dir(tmp_path_factory):
    return save_tiny("llama-tied", tmp_path_factory.mktemp("tied"))


def load(directory, **options):
    return tf.AutoModelForCausalLM.from_pretrained(directory, **options).eval()


def answer(model):
    return output(model, TINY["llama"].inputs())


def stored(directory):
    return {k: v for file in directory.glob("*.safetensors") for k, v in load_file(file).items()}


def python(code, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("kind", KINDS)
def test_shards_in_and_out(kind, tmp_path):
    source = save_tiny("llama", tmp_path / "float", max_shard_size="100KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    model = load(source, quantization_config=QuantoConfig(weights=kind))
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "whole").glob("*.safetensors"))) == 1
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    one, two = stored(tmp_path / "whole"), stored(tmp_path / "shards")
    assert one.keys() == two.keys()
    for directory in ("whole", "shards"):
        assert torch.equal(answer(load(tmp_path / directory)), answer(model))


def test_a_smaller_save_leaves_no_old_shards(float_dir, tmp_path):
    model = load(float_dir, quantization_config=QuantoConfig(weights="int4"))
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    (tmp_path / "tokenizer.json").write_text("{}")
    model.save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]
    assert (tmp_path / "tokenizer.json").read_text() == "{}"
    assert torch.equal(answer(load(tmp_path)), answer(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_dtype_on_the_way_in(float_dir, tmp_path, kind, dtype):
    model = load(float_dir, quantization_config=QuantoConfig(weights=kind), dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.dtype == dtype
    assert torch.equal(answer(again), answer(model))
    cast = load(tmp_path, dtype=torch.float32)
    assert {p.dtype for p in cast.parameters()} == {torch.float32}
    weight, other = model.model.layers[0].mlp.up_proj.weight, cast.model.layers[0].mlp.up_proj.weight
    assert torch.equal(weight.qdata.view(torch.uint8), other.qdata.view(torch.uint8))


@pytest.mark.parametrize("device_map", [None, "auto", "cpu", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}])
def test_device_maps(float_dir, tmp_path, device_map):
    model = load(float_dir, quantization_config=QuantoConfig(weights="int4"), device_map=device_map)
    wanted = answer(load(float_dir, quantization_config=QuantoConfig(weights="int4")))
    assert torch.equal(answer(model), wanted)
    model.save_pretrained(tmp_path)
    assert torch.equal(answer(load(tmp_path, device_map=device_map)), wanted)


def test_base_model_and_head_load_each_other(float_dir, tmp_path):
    whole = load(float_dir, quantization_config=QuantoConfig(weights="int4"))
    whole.save_pretrained(tmp_path / "whole")
    base = tf.AutoModel.from_pretrained(tmp_path / "whole").eval()
    inputs = TINY["llama"].inputs()
    with torch.no_grad():
        wanted = whole.model(**inputs).last_hidden_state
        assert torch.equal(base(**inputs).last_hidden_state, wanted)
    base.save_pretrained(tmp_path / "base")
    head = load(tmp_path / "base")
    with torch.no_grad():
        assert torch.equal(head.model(**inputs).last_hidden_state, wanted)
    assert isinstance(head.model.layers[0].mlp.up_proj.weight, QTensor)


@pytest.mark.parametrize("options", [{}, {"embeddings": True}, {"lm_head": True}, {"modules": {"lm_head": "int8"}}])
def test_tied_embeddings_stay_tied(tied_dir, tmp_path, options):
    model = load(tied_dir, quantization_config=QuantoConfig(weights="int8", **options))
    for found in (model, load_again(model, tmp_path)):
        assert found.lm_head.weight is found.model.embed_tokens.weight
        assert isinstance(found.lm_head.weight, QTensor) == bool(options)
        assert torch.equal(answer(found), answer(model))
    keys = stored(tmp_path)
    assert not [k for k in keys if k.startswith("lm_head")]
    assert ("model.embed_tokens.weight_qdata" in keys) == bool(options)


def load_again(model, directory):
    model.save_pretrained(directory)
    return load(directory)


RELOAD = """
import sys, torch, transformers as tf, requanto
torch.set_num_threads(2)
model = tf.AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
inputs = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    torch.save(model(**inputs).logits, sys.argv[3])
model.save_pretrained(sys.argv[4])
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int4", "float8"])
def test_another_process_computes_and_saves_the_same_bits(float_dir, tmp_path, kind):
    model = load(float_dir, quantization_config=QuantoConfig(weights=kind))
    model.save_pretrained(tmp_path / "one")
    torch.save(TINY["llama"].inputs(), tmp_path / "inputs.pt")
    python(RELOAD, tmp_path / "one", tmp_path / "inputs.pt", tmp_path / "logits.pt", tmp_path / "two")
    assert torch.equal(torch.load(tmp_path / "logits.pt"), answer(model))
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name


PLAIN = """
import sys, torch, transformers as tf
torch.set_num_threads(2)
model = tf.AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    torch.save(model(**torch.load(sys.argv[2], weights_only=True)).logits, sys.argv[3])
assert 'requanto' not in sys.modules
"""


@pytest.mark.slow
def test_a_dequantized_model_saves_and_loads_without_the_plugin(float_dir, tmp_path, exact):
    model = load_again(load(float_dir, quantization_config=QuantoConfig(weights="int4")), tmp_path / "int4")
    before = answer(model)
    model.dequantize()
    assert not any(isinstance(p, QTensor) for p in model.parameters())
    torch.testing.assert_close(answer(model), before, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    torch.save(TINY["llama"].inputs(), tmp_path / "inputs.pt")
    python(PLAIN, tmp_path / "plain", tmp_path / "inputs.pt", tmp_path / "logits.pt")
    assert torch.equal(torch.load(tmp_path / "logits.pt"), answer(model))


@pytest.mark.slow
def test_dequantize_keeps_ties_and_takes_a_dtype(tied_dir):
    model = load(tied_dir, quantization_config=QuantoConfig(weights="int8", lm_head=True))
    model.dequantize()
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_built_in_config_runs_on_our_quantizer(float_dir, tmp_path):
    ours = load(float_dir, quantization_config=QuantoConfig(weights="int4"))
    built_in = load(float_dir, quantization_config=tf.QuantoConfig(weights="int4"))
    assert isinstance(built_in.model.layers[0].mlp.up_proj.weight, QTensor)
    assert torch.equal(answer(built_in), answer(ours))
    assert torch.equal(answer(load_again(built_in, tmp_path)), answer(ours))


@pytest.mark.slow
def test_the_built_in_config_needs_no_optimum_quanto(float_dir):
    code = (
        "import sys; sys.modules['optimum'] = sys.modules['optimum.quanto'] = None\n"
        "import requanto, transformers as tf\n"
        "model = tf.AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=tf.QuantoConfig(weights='int8'))\n"
        "print(type(model.model.layers[0].mlp.up_proj.weight).__name__)"
    )
    assert python(code, float_dir).strip() == "QTensor"


@pytest.mark.parametrize("kind", KINDS)
def test_the_memory_footprint_is_what_is_held(float_dir, tmp_path, kind):
    model = load(float_dir, quantization_config=QuantoConfig(weights=kind))
    held = sum(
        sum(t.nbytes for t in p.inner_tensors().values()) if isinstance(p, QTensor) else p.numel() * p.element_size()
        for p in model.parameters()
    ) + sum(b.numel() * b.element_size() for b in model.buffers())
    assert model.get_memory_footprint() == held
    assert held < load(float_dir).get_memory_footprint() * 0.6
    model.save_pretrained(tmp_path)
    in_file = sum(t.nbytes for t in stored(tmp_path).values())
    assert model.get_memory_footprint(return_buffers=False) == in_file


def test_the_readme_says_how_to_load_it(float_dir, tmp_path):
    model = load(float_dir, quantization_config=QuantoConfig(weights="int4"))
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "14 weights in int4" in text
    code = text.split("```python\n")[1].split("```")[0].replace("path/to/this/directory", str(tmp_path))
    found = {}
    exec(code, found)
    assert torch.equal(answer(found["model"].eval()), answer(model))
    (tmp_path / "README.md").write_text("my own")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "my own"


def test_a_stored_config_is_what_was_asked_for(float_dir, tmp_path):
    config = QuantoConfig(weights="int4", group_size=32, modules={"*.mlp.*": "int8"}, modules_to_not_convert=["q_proj"])
    model = load(float_dir, quantization_config=config)
    model.save_pretrained(tmp_path)
    found = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (found["quant_method"], found["format"], found["format_version"]) == ("quanto", "requanto", 1)
    assert QuantoConfig.from_dict(found) == load(tmp_path).config.quantization_config
    tensors = found["tensors"]
    assert tensors["model.layers.0.mlp.up_proj.weight"] == "qint8 128x64 group=32"
    assert tensors["model.layers.0.self_attn.k_proj.weight"] == "qint4 32x64 group=32 affine"
    assert not [name for name in tensors if "q_proj" in name or "lm_head" in name or "embed" in name]
    assert not [k for k in stored(tmp_path) if k in tensors]  # never the bare name
