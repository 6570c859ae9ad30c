"""`make gpu-check`'s children: what a crash, a hang, an error or no time left costs, and how they share the time."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")
pytest.importorskip("transformers")
ROOT = Path(__file__).resolve().parents[1]


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


#: Stands for `gpu_check.child`: does what the case's op says.
STANDIN = """
import json, os, signal, sys, time
setup = json.loads(sys.stdin.readline())
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    case = json.loads(line)
    print("working on", case["op"], file=sys.stderr, flush=True)
    if case["op"] == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif case["op"] == "hang":
        time.sleep(60)
    elif case["op"] == "exit":
        sys.exit("illegal memory access")
    elif case["op"] == "broken":
        print(json.dumps({"fault": "illegal", "broken": True, "s": 0}), flush=True)
        time.sleep(60)
    else:
        print(json.dumps({"us": 1.0, "pid": os.getpid(), "compiling": setup["compiling"], "s": 0}), flush=True)
"""


@pytest.fixture
def standin(tmp_path, part):
    """run(ops, ...): runs cases of these names in stand-ins of children; returns the rows, and how many were started."""

    def run(ops, budget=60.0, compile_with=0, stage="goals", **more):
        count = []

        def start(setup):
            count.append(setup)
            return part("serve").Child(setup, dict(os.environ), sys.stderr, (sys.executable, "-c", STANDIN))

        case, words = part("cases").Case, [op.split() for op in ops]
        cases = [
            case(stage, family, "product", op, "", 8, 8, 1 + i, {}, 1.0 if op == "hang" else 60.0)
            for i, (op, family) in enumerate(words)
        ]
        file = tmp_path / "rows.jsonl"
        runner = part("parent").Run(file, budget, start, show=lambda line: None, **more)
        if compile_with:
            runner.compile(cases, compile_with)
        runner.measure(cases)
        return read(file) if file.exists() else [], count, runner

    return run


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("crash", "SIGSEGV); last line of stderr: working on crash"),
        ("exit", "exit code 1); last line of stderr: illegal memory access"),
        ("hang", "took longer than 1 s"),
        ("broken", "illegal"),
    ],
)
def test_a_fault_costs_its_own_row(standin, how, said):
    rows, started, _ = standin(["ok a", f"{how} a", "ok a", "ok b"])
    assert [bool(row.get("fault")) for row in rows] == [False, True, False, False]
    assert said in rows[1]["fault"]
    assert len({row["pid"] for row in rows if "pid" in row}) == 3  # before, after, and the other family
    assert len(started) == 3


def test_a_family_that_always_dies_ends(standin):
    rows, started, _ = standin(["crash a"] * 5 + ["ok b"])
    assert [row["fault"][:7] for row in rows if "fault" in row] == ["the pro"] * 3 + ["not run"] * 2
    assert "us" in rows[-1]
    assert len(started) == 4


def test_no_time_left(standin):
    rows, started, run = standin(["ok a", "ok b"], budget=0.0)
    assert rows == started == []
    assert run.left_out == {"goals": 2}


def test_stages_share_the_time(tmp_path, part):
    run = part("parent").Run(tmp_path / "rows.jsonl", 100.0, start=None)
    all_of_it = run.shares({"ceilings", "goals", "questions", "models", "peers", "tune"})
    assert [all_of_it["ceilings"], all_of_it["tune"]] == pytest.approx([100, 100])
    assert all_of_it["goals"] == pytest.approx(31, abs=0.1)
    assert run.shares({"goals", "peers"}) == {"goals": pytest.approx(60, abs=0.1), "peers": pytest.approx(100)}


def test_peers_have_equal_shares(standin, part, monkeypatch):
    rows, _, run = standin(["ok a", "ok b", "ok c"], stage="peers", budget=40.0)
    assert [row["family"] for row in rows] == ["a", "b", "c"]
    assert run.late["peers"] > run.ends["peers"] - 0.1  # the last one has what is left
    # By a clock that only the row of "hang" moves: more than the share of a, less than all there is.
    clock = [0.0]
    monkeypatch.setattr(part("parent"), "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def after(row):
        clock[0] += 25.0 * (row["op"] == "hang")

    rows, _, run = standin(["hang a", "ok a", "ok b"], stage="peers", budget=40.0, began=0.0, after=after)
    assert [row["family"] for row in rows[3:]] == ["a", "b"]
    assert run.left_out == {"peers": 1}


def test_compiling_in_many_processes(standin):
    rows, _, _ = standin(["ok a", "crash b", "ok c", "ok d"], compile_with=2)
    compiled = [row for row in rows if row["stage"] == "compile"]
    assert len(compiled) == 4
    assert sum("fault" in row for row in compiled) == 1
    assert all(row["compiling"] for row in compiled if "us" in row)
    (total,) = [row for row in rows if row["stage"] == "compiled"]
    assert (total["op"], total["left"], total["processes"]) == ("4 cases", 0, 2)
    assert sum("us" in row for row in rows if row["stage"] == "goals") == 3


def test_what_is_compiled_ahead(part):
    cases, parent = part("cases").every_case(), part("parent")
    chosen = parent.to_compile(cases)
    assert {case.do for case in chosen} == {"model", "product", "host"}
    assert chosen[0].do == "model"
    assert all(case.op.endswith("compiled") for case in chosen if case.do == "model")
    peers = parent.to_compile([case for case in cases if case.stage == "peers"])
    assert {case.family for case in peers} == set(parent.KEPT)


def test_rows_that_are_right_are_not_made_again(tmp_path, part, capsys):
    file = tmp_path / "rows.jsonl"
    rows = [
        {"case": "a", "stage": "goals"},
        {"case": "b", "stage": "goals", "fault": "x"},
        {"case": "c", "stage": "compile"},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"case": "d", "sta')
    assert part("rows").done(file) == {"a"}
    assert "line 4 is not JSON" in capsys.readouterr().err
