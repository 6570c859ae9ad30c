"""benchmarks/accuracy.py on a tiny model: what a row runs, what it stores when a library fails, and its tables."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("diffusers")
pytest.importorskip("sklearn")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a benchmark by name; they import each other as scripts do."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


def tiny() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).bfloat16().eval()


def test_a_row_gives_weights_of_every_layer_and_their_bits(benchmark: Any) -> None:
    child, rows = benchmark("accuracy_child"), benchmark("accuracy_rows")
    material = {"samples": [{"input_ids": torch.randint(64, (1, 32))} for _ in range(4)]}
    for row in (rows.ours("int4", 64, method="minmax"), rows.sampled("int4", 64, 8), rows.ours("nf4")):
        model = tiny()
        before = {name: value.detach().clone() for name, value in model.named_parameters()}
        job = {"library": row.library, "setting": dict(row.setting)}
        done, cost = child.quantize(job, model, ["lm_head"], material)
        assert {f"{name}.weight" for name in child.layers(tiny(), ["lm_head"])} <= set(done)
        assert "lm_head.weight" not in done
        assert 4.1 < cost["bits"] < 5  # rows of 64 have one more scale each
        for name, value in done.items():
            assert value.dtype == torch.bfloat16
            error = (value.double() - before[name].double()).norm() / before[name].double().norm()
            assert 0 < error < 0.15, (row.name, name)


def test_a_library_that_changes_nothing_is_an_error(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    child = benchmark("accuracy_child")
    monkeypatch.setitem(child.LIBRARIES, "nothing", child.LIBRARIES["float"])
    with pytest.raises(RuntimeError, match="nothing changed no weight"):
        child.quantize({"library": "nothing", "setting": {}}, tiny(), ["lm_head"], {})


def test_a_python_without_the_library_is_a_row_with_the_reason(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    accuracy, rows = benchmark("accuracy"), benchmark("accuracy_rows")
    tiny().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(accuracy, "MAKERS", {"causal": lambda: tmp_path / "model"})
    monkeypatch.setattr(accuracy, "samples", lambda name: [])
    monkeypatch.setattr(accuracy, "OUT", tmp_path / "accuracy.json")
    missing = rows.Row("no_such_library", "4 bit")
    answers = list(accuracy.children([(rows.ROWS[0], "causal"), (missing, "causal")], sys.executable, tmp_path))
    assert [answer["row"] for answer in answers] == ["float/bfloat16", "no_such_library/4 bit"]
    assert answers[0]["bits"] == 16.0
    assert "no_such_library" in answers[1]["failed"]
    answers = list(accuracy.children([(missing, "causal")], str(tmp_path / "python"), tmp_path))
    assert answers[0]["failed"].startswith("no such Python")
    accuracy.keep(rows.ROWS[0], "causal", {"bits": 16.0, "kl": 0.0, "version": "1"}, {})
    accuracy.keep(rows.ROWS[1], "causal", {"failed": "reason"}, {})
    found = json.loads((tmp_path / "accuracy.json").read_text())["rows"]
    assert list(found) == [rows.ROWS[0].name, rows.ROWS[1].name]
    assert not accuracy.wanted(rows.ROWS[0], "causal", named=True, again=False)
    assert accuracy.wanted(rows.ROWS[0], "causal", named=True, again=True)


def test_the_row_names_are_unique_and_rows_with_samples_say_so(benchmark: Any) -> None:
    rows = benchmark("accuracy_rows").ROWS
    assert len({row.name for row in rows}) == len(rows)
    assert all(row.samples for row in rows if row.library in ("autoround", "gptqmodel"))
    assert all(row.samples == bool(row.setting.get("calibration")) for row in rows if row.library == "requanto")


def test_tables_sort_by_loss_and_name_what_failed(benchmark: Any) -> None:
    report = benchmark("accuracy_report")

    def row(library: str, label: str, bits: float, kl: float, perplexity: float, **more: Any) -> dict[str, Any]:
        gemma = {
            "bits": bits,
            "stored_bits": bits,
            "kl": kl,
            "perplexity_numpy": perplexity,
            "perplexity_aptitude": 20.0,
        }
        return {
            "library": library,
            "label": label,
            "version": "1",
            "samples": False,
            "models": {"gemma": gemma},
            **more,
        }

    rows = {
        "float/bfloat16": row("float", "bfloat16", 16.0, 0.0, 10.0),
        "worse": row("one", "4 bit", 4.5, 0.4, 15.0),
        "better": row("two", "4 bit", 4.5, 0.2, 12.0),
        "broken": {"library": "three", "label": "4 bit", "samples": False, "models": {"gemma": {"failed": "no CPU"}}},
    }
    text = report.tables({"rows": rows})
    assert text.index("| two 1 | 4 bit | 4.50 | 120.0 % |") < text.index("| one 1 | 4 bit | 4.50 | 150.0 % |")
    assert "- three 4 bit: no CPU" in text
