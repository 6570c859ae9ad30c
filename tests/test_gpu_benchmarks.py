"""`make gpu-check` without a GPU: its scripts run to the end on tiny shapes, and its timed steps read nothing back."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("transformers")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a benchmark by name; they import each other as scripts do."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


def test_products(tmp_path):
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {
        "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths,
    }  # fmt: skip
    out = tmp_path / "matmul.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "matmul.py"), "--dry", "--out", str(out)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads(out.read_text())
    assert result["skipped"] == []
    assert {row["m"] for row in result["rows"]} == {1, 17}
    assert len({row["op"] for row in result["rows"]}) == 9
    assert len(result["goals"]) == 10
    assert "dry run" in result["gpu"]
    assert "| wq4 |" in out.with_suffix(".md").read_text()
    assert out.with_suffix(".png").exists() or "no matmul.png" in done.stdout


def test_models(tmp_path, benchmark, monkeypatch):
    model = benchmark("model")
    out = tmp_path / "models.json"
    arguments = ["--shapes", "tiny", "flux-tiny", "--repeats", "1", "--prompt", "8", "--only", "int4", "int8 x int8"]
    monkeypatch.setattr(sys, "argv", ["benchmarks/model.py", *arguments, "--out", str(out)])
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert model.main() == 0
    found = json.loads(out.read_text())["models"]
    assert list(found) == ["tiny", "flux-tiny"]
    for shape, keys in (("tiny", ("prefill_ms", "decode_ms")), ("flux-tiny", ("step_ms",))):
        assert list(found[shape]) == ["bf16", "int4", "int8 x int8"]
        for figures in found[shape].values():
            assert all(figures[key] > 0 and figures[key.replace("_ms", "_vs_bf16")] > 0 for key in keys)
    assert out.with_suffix(".md").read_text().count("| int8 x int8 |") == 2


@pytest.mark.parametrize("shape", ["tiny", "flux-tiny"])
def test_a_step_reads_nothing_from_the_device(shape, benchmark, monkeypatch):
    # On the meta device there is nothing to read: what asks for a number raises, as it would break a capture.
    from transformers import masking_utils

    monkeypatch.setattr(masking_utils, "is_tracing", lambda *tensors: True)  # as it answers during a capture
    model = benchmark("model")
    with torch.inference_mode():
        module = model.build(shape, "meta")
        for call in model.steps_of(module, shape, 8, "meta").values():
            assert call().is_meta
            call()


def test_goals_are_judged(benchmark):
    judge = benchmark("matmul").judge
    rows = [{"op": "wq4", "n": 4096, "k": 14336, "m": 1, "us": 9.0, "ratio": 3.0, "share": 0.75}]
    lines = judge([*rows, {**rows[0], "op": "gemlite: wq4", "us": 8.0}])
    assert lines[0].startswith("reached ")
    assert lines[1].startswith("not measured")
    assert lines[-1].startswith("NOT reached")
    assert "0.89" in lines[-1]
