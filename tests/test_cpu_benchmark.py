"""benchmarks/cpu.py: ratios belong to the best float of the same cell, cells of parts are merged, goals are judged."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "benchmarks")]

import cpu_child  # noqa: E402
from cpu import CLASSES, merge  # noqa: E402
from cpu_child import Cell, measured  # noqa: E402
from cpu_tables import below, markdown, speeds  # noqa: E402


def spin(milliseconds):
    def call():
        clock = Cell(1).clock
        end = clock() + milliseconds / 1e3
        while clock() < end:
            pass

    return [call]


def test_the_faster_float_is_one_and_slow_calls_are_timed_once(monkeypatch):
    monkeypatch.setattr(cpu_child, "SLOW", 0.0)
    calls = {"bf16": spin(2), "f32": spin(1), "half": spin(2), "slow": spin(20)}
    found = Cell(1).run(calls, ["bf16", "f32"], 0.01)
    assert found["f32"]["ratio"] == 1
    assert found["half"]["ratio"] == pytest.approx(0.5, rel=0.3)
    assert found["slow"]["ratio"] == pytest.approx(0.05, rel=0.3)
    assert found["slow"]["rounds"] == 1
    assert found["half"]["rounds"] >= 3


def test_every_type_of_a_small_weight_is_measured_in_each_dtype():
    kinds = ["int4", "nf4", "int8 x int8"]
    orders = {"library": "requanto", "threads": torch.get_num_threads(), "seconds": 0.0, "shapes": [[48, 64]]}
    rows = list(measured(orders | {"dtypes": ["bf16", "f32"], "rows": [1, 3], "kinds": kinds}))
    cells = [row for row in rows if "results" in row]
    assert [(row["dtype"], row["rows"]) for row in cells] == [("bf16", 1), ("bf16", 3), ("f32", 1), ("f32", 3)]
    for row in cells:
        assert set(row["results"]) == {"bf16", "f32", *kinds}
        assert all(figures["ms"] > 0 for figures in row["results"].values())
    assert [set(row["bytes"]) for row in rows if "bytes" in row] == [set(kinds)] * 2


def figures(ratio):
    return {"ms": 1.0 / ratio, "best_ms": 1.0 / ratio, "ratio": ratio, "best_ratio": ratio, "rounds": 3}


def stored(rows, kind="avx2"):
    return {"parts": {kind: {"library": "requanto", "class": kind, "threads": 1, "rows": rows}}}


def test_cells_below_the_goal_are_listed_slowest_first_and_tables_have_a_column_for_each_class():
    found = {"bf16": figures(1.0), "int4": figures(2.0), "int8": figures(0.5), "nf4": figures(0.7)}
    row = {"shape": [64, 64], "dtype": "bf16", "rows": 1, "results": found}
    document = stored([row, {"shape": [64, 64], "dtype": "bf16", "bytes": {"int4": 2048}}])
    document["parts"] |= stored([row], "vnni")["parts"]
    lines = below(document)
    assert [line.split()[2] for line in lines[:-1]] == ["int8:", "int8:", "nf4:", "nf4:"]
    assert lines[-1].startswith("4 of 6 cells")
    assert "| int4 | 1 | 2.00 | 2.00 |" in markdown(document)
    assert "int4 0.0" in speeds(document)[0]


def test_a_part_that_is_measured_again_keeps_the_other_cells():
    def row(rows, **ratios):
        results = {name: figures(ratio) for name, ratio in ratios.items()}
        return {"shape": [64, 64], "dtype": "bf16", "rows": rows, "results": results}

    old = [row(1, int4=1.0, int8=1.0), row(4, int4=1.0), {"failed": "longer than 5 s"}]
    new = merge(old, [row(1, int4=3.0), row(16, int4=2.0)])
    assert [r["rows"] for r in new] == [1, 4, 16]
    assert new[0]["results"]["int4"]["ratio"] == 3.0
    assert new[0]["results"]["int8"]["ratio"] == 1.0


def test_each_class_caps_torch_and_the_library_alike():
    for name, (flag, caps) in CLASSES.items():
        assert caps.get("REQUANTO_CPU", "native") == name
        assert bool(flag) == bool(caps)
