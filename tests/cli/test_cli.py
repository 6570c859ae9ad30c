"""The command line, in this process and once in one of its own: output, exit codes, JSON."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("transformers")
sys.path.append(str(Path(__file__).parents[2] / "integration_tests"))

from tiny_models import TINY, output, save_tiny, tiny_tokenizer

from requanto.cli.app import app


@pytest.fixture(scope="module")
def float_dir(tmp_path_factory):
    directory = save_tiny("llama", tmp_path_factory.mktemp("cli") / "float")
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def int4_dir(float_dir):
    out = float_dir.parent / "int4"
    assert run("quantize", float_dir, out, "--weights", "int4").exit_code == 0
    return out


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_quantize_saves_a_model_that_loads_with_its_tokenizer(int4_dir):
    model = TINY["llama"].auto.from_pretrained(int4_dir).eval()
    assert model.model.layers[0].mlp.up_proj.weight.qtype.name == "qint4"
    assert output(model, TINY["llama"].inputs()).isfinite().all()
    assert {"tokenizer.json", "tokenizer_config.json", "README.md", "config.json"} <= {
        p.name for p in int4_dir.iterdir()
    }


def test_quantize_takes_the_options_of_the_config(float_dir, tmp_path):
    options = ["--weights", "int8", "--module", "*.mlp.*=int4", "--module", "*.down_proj=float", "--lm-head"]
    options += [
        "--rotation",
        "32",
        "--low-rank",
        "2",
        "--scale-bits",
        "8",
        "--column-scale",
        "std",
        "--modules-to-not-convert",
        "q_proj",
        "--modules-to-not-convert",
        "k_proj",
        "--dtype",
        "bfloat16",
    ]
    done = run("quantize", float_dir, tmp_path / "out", *options, "--device", "cpu", "--json")
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout)
    assert printed["out"] == str(tmp_path / "out")
    assert printed["total_bytes"] > 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    tensors = config["quantization_config"]["tensors"]
    assert tensors["model.layers.0.mlp.up_proj.weight"].startswith("qint4")
    given = ("scale_bits", "rotation", "low_rank", "column_scale")
    assert [config["quantization_config"][k] for k in given] == [8, 32, 2, "std"]
    assert tensors["model.layers.0.mlp.up_proj.weight"].endswith("columns")
    assert tensors["model.layers.0.self_attn.v_proj.weight"].startswith("qint8")
    assert tensors["lm_head.weight"].startswith("qint8")
    assert not [name for name in tensors if "q_proj" in name or "k_proj" in name]


def test_the_column_scale_takes_true_and_false_and_refuses_other_words(float_dir, tmp_path):
    for word, stored in (("true", True), ("false", False)):
        done = run("quantize", float_dir, tmp_path / word, "--weights", "int4", "--column-scale", word, "--json")
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["config"]["column_scale"] == stored
        config = json.loads((tmp_path / word / "config.json").read_text())["quantization_config"]
        assert all(line.endswith("columns") == bool(stored) for line in config["tensors"].values())
    done = run("quantize", float_dir, tmp_path / "out", "--column-scale", "yes")
    assert done.exit_code == 1
    assert "column_scale must be 'mean', 'std', 'root', True, False or None, found 'yes'" in done.output.replace(
        "\n", " "
    )


def test_inspect_counts_the_bytes_of_the_files(int4_dir):
    done = run("inspect", int4_dir, "--json")
    assert done.exit_code == 0
    report = json.loads(done.stdout)
    weights = {w["name"]: w for w in report["weights"]}
    one = weights["model.layers.0.mlp.up_proj.weight"]
    # K = 64 is one group: 32 bytes of codes and two float32 a row, and a float32 for each column
    assert (one["dtype"], one["shape"], one["bytes"]) == ("int4", [128, 64], 128 * (32 + 8) + 64 * 4)
    from safetensors.torch import load_file

    in_file = sum(t.nbytes for t in load_file(int4_dir / "model.safetensors").values())
    assert report["total_bytes"] == in_file == sum(w["bytes"] for w in report["weights"])
    assert report["quantized_bytes"] + report["float_bytes"] == in_file


def test_inspect_of_a_float_model_says_what_each_type_would_save(float_dir, tmp_path):
    report = json.loads(run("inspect", float_dir, "--json").stdout)
    assert report["quantized_bytes"] == 0
    for kind in ("int8", "float8", "int4", "int2"):
        assert run("quantize", float_dir, tmp_path / kind, "--weights", kind).exit_code == 0
        truth = json.loads(run("inspect", tmp_path / kind, "--json").stdout)["total_bytes"]
        assert report["would_take"][kind] == pytest.approx(truth, rel=0.01), kind
    text = run("inspect", float_dir).stdout
    assert "it would take" in text
    assert "int2" in text


def test_inspect_prints_a_table(int4_dir):
    text = run("inspect", int4_dir).stdout
    assert "Total" in text
    assert "int4" in text
    assert "128 x 64" in text


def test_eval_measures(int4_dir, float_dir, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 10)
    done = run("eval", int4_dir, "--text", text, "--window", 64, "--max-tokens", 300, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["perplexity"] > 1
    assert 290 <= found["tokens"] <= 300  # each window of 64 is given its first
    assert found["tokens_per_second"] == pytest.approx(found["tokens"] / found["seconds"])
    assert found["bytes"] == json.loads(run("inspect", int4_dir, "--json").stdout)["total_bytes"]
    shown = run("eval", float_dir, "--text", text, "--window", 64, "--max-tokens", 100)
    assert shown.exit_code == 0
    assert "perplexity" in shown.stdout
    assert "tokens/s" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantize", "{float}", "{new}", "--weights", "int9"], "unknown quantized type 'int9'"),
        (["quantize", "./nowhere", "{new}"], "./nowhere is not a directory"),
        (["quantize", "{float}", "{float}"], "OUT is the model's own directory"),
        (["quantize", "{float}", "{float}/config.json"], "cannot save to {float}/config.json: it is a file"),
        (["quantize", "{float}", "{float}/config.json/new"], "{float}/config.json is a file, expected a directory"),
        (["quantize", "{int4}", "{new}"], "is already quantized (quanto)"),
        (["quantize", "{float}", "{new}", "--module", "int4"], "--module takes PATTERN=TYPE, found 'int4'"),
        (["quantize", "{float}", "{new}", "--dtype", "int8"], "or float32, found 'int8'"),
        (["quantize", "{float}", "{new}", "--modules-to-not-convert", "q_prok"], "Close names: q_proj"),
        (["inspect", "./nowhere"], "nowhere is not a directory"),
        (["inspect", "{empty}"], "holds no .safetensors file; found nothing"),
        (["eval", "{int4}", "--text", "./nothing.txt"], "nothing.txt"),
        (["eval", "{int4}", "--window", "4096"], "takes at most 128"),
        (["eval", "./nowhere"], "./nowhere is not a directory"),
    ],
)
def test_what_cannot_be_done_is_said_on_stderr_with_exit_code_1(float_dir, int4_dir, tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    places = {"float": float_dir, "int4": int4_dir, "new": tmp_path / "new", "empty": tmp_path / "empty"}
    done = run(*[a.format(**places) for a in arguments])
    assert done.exit_code == 1
    assert done.stdout == ""
    assert message.format(**places).replace(" ", "") in "".join(done.stderr.split())  # long paths are wrapped
    assert "Traceback" not in done.output
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("where", ["a file", "no permission"])
def test_a_target_that_cannot_be_written_is_found_before_the_model_is_loaded(where, float_dir, tmp_path, monkeypatch):
    out = tmp_path / "out"
    if where == "a file":
        out.write_text("notes")
    else:
        out.mkdir()
        monkeypatch.setattr(
            os, "access", lambda path, mode: Path(path) != out or not mode & os.W_OK
        )  # root may write anywhere
    monkeypatch.setattr("requanto.report.convert.load_model", lambda *args: pytest.fail("the model was loaded"))
    done = run("quantize", float_dir, out)
    assert done.exit_code == 1
    assert "cannot save to" in done.stderr
    assert where == "a file" or "change the permissions" in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    "arguments", [["quantize"], ["quantise", "a", "b"], ["inspect", "a", "--colour"], ["eval", "a", "--window", "many"]]
)
def test_wrong_use_is_exit_code_2(arguments):
    done = run(*arguments)
    assert done.exit_code == 2
    assert "Usage" in done.output


def test_help():
    for command in ("quantize", "inspect", "eval"):
        assert run(command, "--help").exit_code == 0
    assert "quantize" in run("--help").stdout


@pytest.mark.slow
def test_a_process_of_its_own_prints_clean_json(float_dir, tmp_path):
    program = Path(sys.executable).with_name("requanto")
    command = [str(program), "quantize", str(float_dir), str(tmp_path / "out"), "--weights", "float8", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["config"]["weights"] == "float8"
    failed = subprocess.run(
        [str(program), "inspect", "./nowhere", "--json"], capture_output=True, text=True, timeout=100
    )
    assert (failed.returncode, failed.stdout) == (1, "")
    assert "error:" in failed.stderr
    assert torch.equal(
        *(output(TINY["llama"].auto.from_pretrained(tmp_path / "out").eval(), TINY["llama"].inputs()) for _ in range(2))
    )


def test_quantize_with_samples_from_a_text(float_dir, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, 12345 times. " * 40)
    sizes = ["--weights", "int4", "--method", "gptq", "--calibration", text, "--samples", 4, "--sequence-length", 32]
    done = run("quantize", float_dir, tmp_path / "out", *sizes, "--option", "rounds=1", "--resume", tmp_path / "kept")
    assert done.exit_code == 0, done.output
    assert len(list((tmp_path / "kept").glob("*.safetensors"))) == 2  # a file a block
    model = TINY["llama"].auto.from_pretrained(tmp_path / "out").eval()
    assert model.model.layers[0].mlp.up_proj.weight.qtype.name == "qint4"
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["weights"].startswith("int4 (stored by Requanto;")
    assert config["quant_method"] == "quanto"
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    plain = TINY["llama"].auto.from_pretrained(float_dir).eval()
    again = run("quantize", float_dir, tmp_path / "nearest", "--weights", "int4")
    assert again.exit_code == 0
    rounded = TINY["llama"].auto.from_pretrained(tmp_path / "nearest").eval()
    ids = torch.tensor([tiny_tokenizer()(text.read_text()[:60])["input_ids"]])
    expected = output(plain, {"input_ids": ids})
    errors = [(output(m, {"input_ids": ids}) - expected).norm() for m in (model, rounded)]
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "gpqt"], "unknown method 'gpqt'"),
        (["--option", "damping=1"], "belong to a --method"),
        (["--method", "gptq", "--option", "damping"], "takes NAME=VALUE"),
        (["--method", "gptq", "--option", "dampign=1"], "did you mean 'damping'"),
        (["--method", "gptq", "--calibration", "nowhere.txt"], "nowhere.txt"),
        (["--method", "smoothquant", "--samples", "2", "--sequence-length", "8"], "give activations='int8'"),
    ],
)
def test_quantize_with_samples_refuses_what_cannot_work(float_dir, tmp_path, options, message):
    done = run("quantize", float_dir, tmp_path / "out", "--weights", "int4", *options)
    assert done.exit_code == 1
    assert message in " ".join(done.output.split())
    assert not (tmp_path / "out").exists()
