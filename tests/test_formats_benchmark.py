"""benchmarks/formats.py: its rows, packing of words, what counts as opened, and its tables."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch):
    """A module of the benchmark by its name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    names = [name for name in sys.modules if name.split(".")[0].startswith("formats")]
    for name in names:
        monkeypatch.delitem(sys.modules, name)

    def module(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield module
    for name in [name for name in sys.modules if name.split(".")[0].startswith("formats")]:
        del sys.modules[name]


def test_rows_are_unique_and_name_what_there_is(bench):
    rows, peers = bench("formats_rows").ROWS, bench("formats_peer")
    assert len({row.name for row in rows}) == len(rows)
    assert len({row.format for row in rows}) >= 15
    known = {*peers.OPENERS, *peers.WHOLE}
    bases = bench("formats_bases").BASES
    for row in rows:
        module, function = row.writer.split(".")
        text = (ROOT / "benchmarks" / "formats_writers" / f"{module}.py").read_text(encoding="utf-8")
        assert f"def {function}(" in text, row.name
        assert set(row.peers) <= known, row.name
        assert row.base in bases, row.name


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_words_hold_one_stream_of_bits(bench, bits):
    codes = torch.randint(0, 2**bits, (5, 64), dtype=torch.int64, device="cpu")
    words = bench("formats_writers.words").packed(codes, bits)
    for row, word in zip(codes.tolist(), words.tolist(), strict=True):
        stream = sum((number & 0xFFFFFFFF) << (32 * at) for at, number in enumerate(word))
        assert [(stream >> (bits * at)) & (2**bits - 1) for at in range(64)] == row


def a_row(**own):
    found = {
        "opens": True,
        "packed": 1.0,
        "exact": False,
        "rounds": True,
        "ulps": 0.5,
        "relative": 1e-3,
        "output_difference": 1e-6,
        "tokens_equal": 16,
        "saves": True,
        "lora_adapters": 3,
        "lora_changed": 3,
        "merge_finite": True,
        "merge_difference": 0.0,
        "peak": 50,
        "bound": 300,
        "bytes_after": 44,
        "token_seconds": 0.1,
        "failed": {},
    }
    sizes = {"file": 100, "embeddings": 60, "quantized": 40}
    return {
        "format": "GPTQ",
        "label": "4 bits",
        "written": {"dtype": "float16", "sizes": sizes},
        "requanto": found | own,
        "peers": {
            "packs": {"opens": True, "held": 104, "held_but_embeddings": 44, "token_seconds": 0.2},
            "floats": {"opens": True, "held": 220, "held_but_embeddings": 160, "token_seconds": 0.2},
            "noise": {"opens": False, "held": 104, "held_but_embeddings": 44, "token_seconds": 0.2},
            "refuses": {"opens": False, "error": "ImportError: no | GPU"},
        },
    }


def test_tables(bench, tmp_path):
    report = bench("formats_report")
    rows = {"good": a_row(), "bad": a_row(saves=False, rounds=False, ulps=9.0, packed=0.5, peak=400)}
    assert all(report.verdicts(rows["good"]).values())
    assert [step for step, holds in report.verdicts(rows["bad"]).items() if not holds] == ["packed", "equal", "saves"]
    text = report.tables({"rows": rows})
    assert "one rounding (float16)" in text
    assert "50% packed" in text
    assert "**above**" in text
    assert "packs: opens" in text
    assert "floats: turns it into floats" in text
    assert "noise: wrong outputs" in text
    assert "refuses: refuses (ImportError: no / GPU)" in text
    assert "| packs | 2 | 1 |" in text
    assert "| floats | 0 | 0 |" in text
    document = tmp_path / "formats.md"
    document.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.into(document, {"rows": rows})
    assert "old" not in document.read_text()
    assert document.read_text().startswith("before\n")
    assert document.read_text().endswith("after\n")


def test_a_failed_process_leaves_its_last_line(bench, tmp_path):
    formats = bench("formats")
    script = tmp_path / "child.py"
    script.write_text("import sys\nprint('first')\nsys.exit('the reason')\n")
    found = formats.answer([sys.executable, str(script)], False, tmp_path / "log")
    assert not found["opens"]
    assert found["error"] == "ended with 1: the reason"
    script.write_text("import json, sys\njson.dump({'opens': True}, open(sys.argv[1], 'w'))\n")
    assert formats.answer([sys.executable, str(script)], False, tmp_path / "log") == {"opens": True}


def test_results_are_kept_row_by_row(bench, tmp_path, monkeypatch):
    formats = bench("formats")
    monkeypatch.setattr(formats, "OUT", tmp_path / "formats.json")
    monkeypatch.setattr(sys, "argv", [str(ROOT / "benchmarks" / "formats.py"), "--peer-python", "all=/x/bin/python3"])
    second, first = formats.ROWS[1], formats.ROWS[0]
    formats.keep(second, requanto={"opens": True})
    formats.keep(first, requanto={"opens": False})
    formats.keep(second, peers={})
    stored = json.loads((tmp_path / "formats.json").read_text())
    assert list(stored["rows"]) == [first.name, second.name]
    assert stored["rows"][second.name]["requanto"] == {"opens": True}
    assert stored["commands"] == ["python benchmarks/formats.py --peer-python all=PYTHON"]
