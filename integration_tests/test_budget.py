"""weights="auto" in both libraries and on the command line: exact bytes of memory and files, saving, loading, explaining."""

import json

import diffusers
import pytest
import torch
from safetensors import safe_open
from tiny_diffusers import TINY as TINY_DIFFUSERS
from tiny_diffusers import relative_error
from tiny_models import TINY, output, save_tiny, tiny_tokenizer
from typer.testing import CliRunner

import requanto
from requanto import QTensor, QuantoConfig
from requanto.cli.app import app


def stored_bytes(directory):
    """Bytes of all tensors in a directory's files."""
    total = 0
    for file in directory.glob("*.safetensors"):
        with safe_open(str(file), framework="pt") as opened:
            total += sum(opened.get_tensor(key).nbytes for key in opened.keys())  # noqa: SIM118
    return total


def kinds(model):
    return {n: (p.qtype.name, p.group_size) for n, p in model.named_parameters() if isinstance(p, QTensor)}


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "mixtral", "t5"])
def test_transformers_loads_within_the_budget_and_reloads_the_same(name, tmp_path):
    source = save_tiny(name, tmp_path / "float")
    plain = TINY[name].auto.from_pretrained(source)
    full = plain.get_memory_footprint()
    uniform = TINY[name].auto.from_pretrained(source, quantization_config=QuantoConfig(weights="int8"))
    limit = (uniform.get_memory_footprint() + full) // 2
    model = TINY[name].auto.from_pretrained(source, quantization_config=QuantoConfig(weights="auto", max_memory=limit))
    # All experts of a layer are one choice, so of two layers of them the budget is used in big steps.
    assert (0.5 if name == "mixtral" else 0.9) * limit < model.get_memory_footprint() <= limit
    config = model.hf_quantizer.quantization_config
    assert config.budget["asked"] == {"max_memory": limit}
    assert config.budget["measured"] == "weights"
    assert config.weights != "auto"
    expected = output(model.eval(), TINY[name].inputs())
    assert relative_error(expected, output(plain.eval(), TINY[name].inputs())) < 0.2

    model.save_pretrained(tmp_path / "auto")
    stored = json.loads((tmp_path / "auto" / "config.json").read_text())["quantization_config"]
    assert "max_memory" not in stored
    again = TINY[name].auto.from_pretrained(tmp_path / "auto").eval()
    assert kinds(again) == kinds(model)
    assert torch.equal(output(again, TINY[name].inputs()), expected)
    buffers = sum(b.nbytes for b in model.buffers())
    assert stored_bytes(tmp_path / "auto") <= limit
    assert stored_bytes(tmp_path / "auto") >= model.get_memory_footprint() - buffers


def test_bits_are_those_of_the_files(tmp_path):
    source = save_tiny("llama", tmp_path / "float")
    config = QuantoConfig(weights="auto", bits=5.5)
    model = TINY["llama"].auto.from_pretrained(source, quantization_config=config)
    assert config.weights == "auto"  # the user's own object serves for other models too
    chosen = model.hf_quantizer.quantization_config
    linear = {n: p for n, p in model.named_parameters() if n.rpartition(".")[0] in chosen.budget["layers"]}
    taken = sum(p.nbytes if isinstance(p, QTensor) else p.numel() * p.element_size() for p in linear.values())
    assert taken == chosen.budget["bytes"]
    assert taken * 8 <= 5.5 * sum(p.numel() for p in linear.values())
    # The choices alone, without the budget, make the same model again.
    same = QuantoConfig(weights=chosen.weights, modules=chosen.modules)
    assert kinds(TINY["llama"].auto.from_pretrained(source, quantization_config=same)) == kinds(model)


@pytest.mark.parametrize(
    ("budget", "message"), [({"bits": 1}, "need bits="), ({"max_memory": "1kB"}, "need max_memory=")]
)
def test_transformers_refuses_what_is_not_possible(budget, message, tmp_path):
    source = save_tiny("llama", tmp_path / "float")
    with pytest.raises(ValueError, match=message):
        TINY["llama"].auto.from_pretrained(source, quantization_config=QuantoConfig(weights="auto", **budget))


def test_a_tied_head_counts_once(tmp_path):
    model = TINY["llama"].build()
    config = model.config
    config.tie_word_embeddings = True
    tied = TINY["llama"].auto.from_config(config)
    tied.save_pretrained(tmp_path / "tied")
    limit = tied.get_memory_footprint() * 2 // 3
    loaded = TINY["llama"].auto.from_pretrained(
        tmp_path / "tied", quantization_config=QuantoConfig(weights="auto", max_memory=limit)
    )
    assert 0.9 * limit < loaded.get_memory_footprint() <= limit


@pytest.mark.parametrize("name", ["flux", "unet"])
def test_diffusers_loads_within_the_budget_and_reloads_the_same(name, tmp_path):
    plain = TINY_DIFFUSERS[name].make(torch.float32)
    plain.save_pretrained(tmp_path / "float")
    cls = type(plain)
    int8 = cls.from_pretrained(tmp_path / "float", quantization_config=QuantoConfig(weights="int8"))
    limit = (int8.get_memory_footprint() + plain.get_memory_footprint()) // 2
    model = cls.from_pretrained(
        tmp_path / "float",
        quantization_config=QuantoConfig(weights="auto", max_memory=limit),
        torch_dtype=torch.float32,
    )
    assert 0.8 * limit < model.get_memory_footprint() <= limit
    model.save_pretrained(tmp_path / "auto")
    assert stored_bytes(tmp_path / "auto") <= limit
    again = cls.from_pretrained(tmp_path / "auto")
    assert kinds(again) == kinds(model)
    assert kinds(model)
    for (left, one), (right, other) in zip(again.state_dict().items(), model.state_dict().items()):
        assert left == right
        if isinstance(one, QTensor):
            one, other = one.dequantize(), other.dequantize()
        assert torch.equal(one, other)
    assert again.hf_quantizer.quantization_config.budget["asked"] == {"max_memory": limit}


def test_quantize_on_samples_saves_its_reasons(tmp_path):
    model = TINY_DIFFUSERS["flux"].make(torch.float32)
    requanto.quantize(model, weights="auto", bits=6, progress=False)
    requanto.freeze(model)
    model.save_pretrained(tmp_path / "auto")
    again = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path / "auto")
    assert again.hf_quantizer.quantization_config.budget["asked"] == {"bits": 6.0}


def test_a_transformers_model_quantized_in_place_saves_its_reasons(tmp_path):
    """save_pretrained attaches a quantizer without being told how the model was quantized: the record goes along."""
    model = TINY["llama"].auto.from_pretrained(save_tiny("llama", tmp_path / "float"))
    requanto.quantize(model, weights="auto", bits=5.5, exclude="lm_head")
    requanto.freeze(model)
    record = requanto.budget.budget_of(model)
    assert record["asked"] == {"bits": 5.5}
    model.save_pretrained(tmp_path / "auto")
    assert json.loads((tmp_path / "auto" / "config.json").read_text())["quantization_config"]["budget"] == record
    again = TINY["llama"].auto.from_pretrained(tmp_path / "auto")
    assert again.hf_quantizer.quantization_config.budget == record
    assert kinds(again) == kinds(model)


def test_language_model_on_samples():
    model = TINY["llama"].build()
    samples = [TINY["llama"].inputs() for _ in range(2)]
    requanto.quantize(model, weights="auto", bits=6, calibration=samples, progress=False)
    record = requanto.budget.budget_of(model)
    assert record["measured"] == "samples"
    assert kinds(model)
    assert output(model, TINY["llama"].inputs()).isfinite().all()


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_command_line_quantizes_explains_and_draws(tmp_path):
    source = save_tiny("llama", tmp_path / "float")
    tiny_tokenizer().save_pretrained(source)
    done = run("quantize", source, tmp_path / "auto", "--weights", "auto", "--bits", 6)
    assert done.exit_code == 0, done.output
    shown = run("inspect", tmp_path / "auto", "--plot", tmp_path / "plot.png")
    assert shown.exit_code == 0, shown.output
    assert "Types chosen for bits=6.0" in " ".join(shown.stdout.split())
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads(run("inspect", tmp_path / "auto", "--json").stdout)
    errors = [w["error"] for w in report["weights"] if w["error"] is not None]
    assert len(errors) == 14
    assert all(0 <= e < 0.6 for e in errors)
    wrong = run("quantize", source, tmp_path / "no", "--weights", "auto", "--max-memory", "1kB")
    assert wrong.exit_code == 1
    assert "need max_memory=" in " ".join(wrong.stderr.split())
    assert not (tmp_path / "no").exists()
    refused = run("inspect", source, "--plot", tmp_path / "plot.png")
    assert refused.exit_code == 1
    assert "weights='auto'" in " ".join(refused.stderr.split())
