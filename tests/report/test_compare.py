"""requanto.report.compare on tiny models: figures against their definitions, every kind of model, every refusal."""

import copy
import json
import math
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import requanto
from requanto.cli import compare as cli_compare
from requanto.cli.app import app
from requanto.report import compare
from requanto.report.compare_images import as_arrays, psnr
from requanto.report.compare_load import Compared
from requanto.report.lockstep import Lockstep

pytest.importorskip("transformers")
sys.path.append(str(Path(__file__).parents[2] / "integration_tests"))

from tiny_models import TINY, save_tiny, tiny_tokenizer

TEXT = "The quick brown fox jumps over the lazy dog, and then does it again. " * 6


def small(kind="int4"):
    """(float, quantized) of one random net."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 64))
    other = requanto.quantize(copy.deepcopy(model), weights=kind)
    requanto.freeze(other)
    return model, other


def noise(model, seed):
    return model(torch.randn(3, 64, generator=torch.Generator().manual_seed(seed)))


def test_weight_and_output_errors_are_what_their_definition_says():
    a, b = small()
    found = compare(a, b, run=noise, seeds=2, progress=False)
    assert [layer.name for layer in found.layers] == ["0.weight", "2.weight"]
    for layer, index in zip(found.layers, (0, 2)):
        w, q = a[index].weight.double(), b[index].weight.dequantize(torch.float32).double()
        assert layer.weight_error == pytest.approx(((w - q).norm() / w.norm()).item(), rel=1e-5)
        assert layer.bytes_b == b[index].weight.nbytes < layer.bytes_a == w.numel() * 4
        assert (layer.type_a, layer.type_b) == ("float32", "int4")  # one group is a whole row of 64 and of 32
    x = torch.cat([torch.randn(3, 64, generator=torch.Generator().manual_seed(s)) for s in (0, 1)])
    for layer, upto in zip(found.layers, (1, 3)):
        ya, yb = a[:upto](x), b[:upto](x)
        assert layer.output_error == pytest.approx(((ya - yb).norm() / ya.norm()).item(), rel=1e-4)
    assert found.summary["seeds"] == 2
    assert found.summary["bytes_b"] < found.summary["bytes_a"]


def test_a_model_and_its_copy_have_no_error_and_their_json_is_valid():
    a, _ = small()
    found = compare(a, copy.deepcopy(a), run=noise, progress=False)
    assert {layer.weight_error for layer in found.layers} == {layer.output_error for layer in found.layers} == {0.0}
    assert found.summary["psnr_min"] == math.inf
    assert json.loads(found.to_json())["summary"]["psnr_min"] is None


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(float, int4) directories of a causal model with its tokenizer."""
    source = save_tiny("llama", tmp_path_factory.mktemp("compare") / "float")
    tiny_tokenizer().save_pretrained(source)
    requanto.report.convert.quantize_directory(source, source.parent / "int4", requanto.QuantoConfig(weights="int4"))
    return source, source.parent / "int4"


def test_language_models_by_directory(pair):
    found = compare(*pair, text=TEXT, window=64, max_tokens=200, progress=False)
    assert found.kind == "causal_lm"
    load = TINY["llama"].auto.from_pretrained
    a, b = (load(directory).eval() for directory in pair)
    tokenizer = tiny_tokenizer()
    for model, key in ((a, "perplexity_a"), (b, "perplexity_b")):
        expected = requanto.report.perplexity(model, tokenizer, TEXT, window=64, max_tokens=200, progress=False)
        assert found.summary[key] == pytest.approx(expected.perplexity, rel=1e-4)
    kl = same = count = 0
    ids = tokenizer(TEXT)["input_ids"][:200]
    with torch.no_grad():
        for start in range(0, 200, 64):
            logs = [
                m(input_ids=torch.tensor([ids[start : start + 64]])).logits[0].double().log_softmax(-1) for m in (a, b)
            ]
            kl += (logs[0].exp() * (logs[0] - logs[1])).sum().item()
            same += (logs[0].argmax(-1) == logs[1].argmax(-1)).sum().item()
            count += len(logs[0])
    assert found.summary["kl"] == pytest.approx(kl / count, rel=1e-3)
    assert found.summary["top1_agreement"] == same / count
    assert found.summary["tokens"] == count == 200
    quantized = [layer for layer in found.layers if layer.type_b.startswith("int4")]
    assert len(quantized) == 14
    assert all(layer.weight_error > 0 and layer.output_error > 0 for layer in quantized)


def test_encoders_are_compared_by_cosine():
    a = TINY["bert"].build()
    b = requanto.quantize(copy.deepcopy(a), weights="int8")
    requanto.freeze(b)
    found = compare(a, b, text=TEXT, tokenizer=tiny_tokenizer(), window=32, max_tokens=100, progress=False)
    logits = hasattr(a(**TINY["bert"].inputs()), "logits")
    assert found.kind == ("masked_lm" if logits else "encoder")
    if not logits:
        assert 0.99 < found.summary["cosine_min"] <= found.summary["cosine_mean"] < 1


def test_weights_only_runs_nothing():
    a, b = small("int8")
    for model in (a, b):
        model.register_forward_hook(lambda *_: pytest.fail("it ran"))
    found = compare(a, b, weights_only=True, progress=False)
    assert found.kind == "weights"
    assert all(layer.output_error is None and layer.weight_error > 0 for layer in found.layers)


class Other(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layer = nn.Linear(8, width)


class Differing:
    """A tokenizer of its own."""

    bos_token_id = None

    def __call__(self, text, **options):
        return {"input_ids": [5] * len(text)}


@pytest.mark.parametrize(
    ("a", "b", "options", "message"),
    [
        (
            Other(4),
            Other(5),
            {},
            r"different architectures \(Other and Other\): A holds layer.weight of shape \[4, 8\], B",
        ),
        (Other(4), nn.Linear(8, 4), {}, "different architectures .*: A holds layer.weight .* does not"),
        (Other(4), Other(4), {}, "neither A nor B has a tokenizer"),
        (Other(4), 3, {}, "expected a model or a Diffusers pipeline to compare, found builtins.int"),
        (Other(4), Other(4), {"run": noise, "seeds": 0}, "seeds must be at least 1 and"),
    ],
)
def test_refusals(a, b, options, message):
    with pytest.raises(ValueError, match=message):
        compare(a, b, progress=False, **options)


def test_one_model_twice_no_text_and_tokenizers_that_differ(pair, monkeypatch):
    model = Other(4)
    with pytest.raises(ValueError, match="the same model object"):
        compare(model, model)
    with pytest.raises(ValueError, match="a text of at least 2 tokens, found 0"):
        compare(*pair, text="", progress=False)
    from requanto.report import compare_text

    with pytest.raises(ValueError, match="the tokenizers of x and y differ"):
        compare_text.common_tokenizer(tiny_tokenizer(), Differing(), ("x", "y"))


def test_lockstep_holds_one_output_of_each_and_passes_errors_on():
    a, b = small()
    seen, pairs = [], {"0": (a[0], b[0]), "2": (a[2], b[2])}
    lockstep = Lockstep(pairs, lambda name, one, other: seen.append((name, one.shape == other.shape)))
    x = torch.ones(1, 64)
    lockstep.run(lambda: [a(x) for _ in range(3)], lambda: [b(x) for _ in range(3)])
    assert seen == [("0", True), ("2", True)] * 3

    def failing():
        a[0](x)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="disk is gone"):
        lockstep.run(failing, lambda: b(x))
    with pytest.raises(OSError, match="disk is gone"):
        lockstep.run(lambda: a(x), failing)
    with pytest.raises(ValueError, match="the first one has finished, but the second one is at 0"):
        lockstep.run(lambda: a(x), lambda: [b(x), b(x)])
    with pytest.raises(ValueError, match="the first one is at 0, but the second one has finished"):
        lockstep.run(lambda: [a(x), a(x)], lambda: b(x))
    with pytest.raises(ValueError, match="do not run the same layers"):
        lockstep.run(lambda: a(x), lambda: b[2](b[1](b[0](x.repeat(2, 1)))))
    assert not [t for t in threading.enumerate() if t.name == "requanto-lockstep"]
    assert not a[0]._forward_hooks
    assert not b[0]._forward_hooks


def test_psnr_and_what_counts_as_pictures():
    assert psnr(np.zeros((2, 2)), np.full((2, 2), 0.1), 1.0) == pytest.approx(20)
    assert as_arrays(torch.zeros(2, 3, 4, 5))[0].shape == (4, 5, 3)
    assert as_arrays(SimpleNamespace(images=np.zeros((2, 4, 5, 3))))[1].shape == (4, 5, 3)
    assert len(as_arrays([torch.zeros(3, 4, 4), torch.zeros(3, 4, 4)])) == 2
    with pytest.raises(ValueError, match="found NoneType"):
        as_arrays(None)


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_command_line_writes_picture_table_and_json(pair, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    done = run(
        "compare", *pair, "--text", text, "--window", 64, "--max-tokens", 100, "--out", tmp_path / "out", "--json"
    )
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["kind"] == "causal_lm"
    assert found == json.loads((tmp_path / "out" / "compare.json").read_text())
    assert (tmp_path / "out" / "compare.png").read_bytes().startswith(b"\x89PNG")
    shown = run("compare", *pair, "--weights-only", "--layers", 3)
    assert "Shown: the 3 of 16 weights with the largest errors" in " ".join(shown.stdout.split())


@pytest.fixture
def without_matplotlib(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)


def test_without_matplotlib_the_json_is_written_and_said_first(pair, tmp_path, without_matplotlib, monkeypatch):
    said = []

    def compared(*arguments, **options):
        said.append("running")
        return compare(*arguments, **options)

    monkeypatch.setattr(requanto.report, "compare", compared)
    monkeypatch.setattr(cli_compare.errors, "print", lambda *lines, **options: said.append(lines[0]))
    done = run("compare", *pair, "--weights-only", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "without compare.png: plots need matplotlib" in said[0]
    assert 'pip install "requanto[plot]"' in said[0]
    assert said[1:] == ["running"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["compare.json"]
    assert json.loads((tmp_path / "out" / "compare.json").read_text())["kind"] == "weights"


def test_a_plot_that_fails_leaves_the_json(pair, tmp_path, monkeypatch):
    def fails(self, path):
        raise RuntimeError("no font")

    monkeypatch.setattr(requanto.report.Comparison, "plot", fails)
    done = run("compare", *pair, "--weights-only", "--out", tmp_path)
    assert done.exit_code == 1
    assert json.loads((tmp_path / "compare.json").read_text())["layers"]


def test_what_is_lacking_is_said_before_anything_is_loaded(pair, tmp_path, without_matplotlib, monkeypatch):
    def loaded(*arguments):
        raise AssertionError("loaded")

    monkeypatch.setattr(Compared, "load", loaded)
    monkeypatch.setattr("requanto.report.inspect.inspect_directory", loaded)
    (tmp_path / "file").write_text("")
    for arguments, message in (
        (["compare", *pair, "--out", tmp_path / "file"], "is a file, expected a directory"),
        (["compare", *pair, "--seeds", 0], "seeds must be at least 1 and"),
        (["compare", pair[1], pair[1].parent / "bare"], "tokenizer"),
        (["inspect", pair[1], "--plot", tmp_path / "x.png"], "plots need matplotlib, which cannot be imported"),
    ):
        if "bare" in str(arguments):
            for directory in ("bare", "bare2"):
                save_tiny("llama", pair[1].parent / directory)
            arguments[1] = pair[1].parent / "bare2"
        done = run(*arguments)
        assert done.exit_code == 1
        assert message in " ".join(done.stderr.split())


def test_a_package_that_is_not_installed_is_named_with_its_extra(pair, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "diffusers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    folder = pair[0].parent / "pipeline"
    folder.mkdir(exist_ok=True)
    (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    done = run("compare", folder, folder)
    assert done.exit_code == 1
    assert 'pip install "requanto[diffusers]"' in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{float}", "./nowhere"], "./nowhere is not a directory"),
        (["{float}", "{int4}", "--text", "./no.txt"], "no.txt"),
        (["{float}", "{int4}", "--run", "file.py"], "--run takes FILE.py:FUNCTION"),
        (["{float}", "{int4}", "--run", "file.py:f"], "file.py does not exist"),
        (["{float}", "{int4}", "--max-tokens", "1"], "a text of at least 2 tokens"),
    ],
)
def test_command_line_errors(pair, arguments, message):
    done = run("compare", *[a.format(float=pair[0], int4=pair[1]) for a in arguments])
    assert (done.exit_code, done.stdout) == (1, "")
    assert message in " ".join(done.stderr.split())
