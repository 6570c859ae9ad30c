"""The harness itself, and a few seeds of it. `make fuzz` runs many more."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("transformers")
pytest.importorskip("diffusers")

import fuzz_child
import fuzz_mutations
import run
from fuzz_checkpoints import CASES, build_all


def load_of(outcome):
    """A load that ends so."""

    def load(directory):
        if outcome == "hang":
            time.sleep(60)
        elif outcome == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        elif outcome == "memory":
            bytearray(fuzz_child.BYTES + 1)
        elif outcome == "code_run":
            os.system("true")
        elif outcome == "obscure":
            {}["key"]
        elif outcome == "clear":
            raise OSError(f"{directory} holds no such file")
        return {
            "right": {"q:w": "1"},
            "wrong": {"q:w": "2"},
            "code_run": {"q:w": "1"},
            "float_bits": {"q:w": "1", "f:b": "2"},
        }[outcome]

    return load


@pytest.mark.parametrize(
    "outcome", ["right", "wrong", "float_bits", "clear", "obscure", "crash", "memory", "hang", "code_run"]
)
def test_each_outcome_is_recognized(outcome, tmp_path, monkeypatch):
    if outcome == "hang":
        monkeypatch.setattr(fuzz_child, "SECONDS", 1)
    (tmp_path / "model").mkdir()
    wanted = {"q:w": "1"} | ({"f:b": "1"} if outcome == "float_bits" else {})
    found = fuzz_child.run(load_of(outcome), tmp_path / "model", wanted)
    assert found.kind == outcome, found


def test_a_seed_draws_the_same_change_again(tmp_path):
    build_all(tmp_path / "base", ["int4"])
    told = []
    for again in ("a", "b"):
        for seed in range(20):
            fuzz_mutations.copy_checkpoint(tmp_path / "base" / "int4" / "model", tmp_path / again / str(seed))
            told.append(fuzz_mutations.mutate(tmp_path / again / str(seed), random.Random(seed)))
    assert told[:20] == told[20:]
    for seed in range(20):
        first, second = (sorted((tmp_path / again / str(seed)).rglob("*")) for again in ("a", "b"))
        assert [p.name for p in first] == [p.name for p in second]
        assert all(a.read_bytes() == b.read_bytes() for a, b in zip(first, second) if a.is_file())


def test_every_kind_of_change_is_possible(tmp_path):
    build_all(tmp_path / "base", ["shards", "quanto-int8", "pickle"])
    done = set()
    for name in ("shards", "quanto-int8", "pickle"):
        for kind, (change, _) in fuzz_mutations.KINDS.items():
            place = tmp_path / f"{name}-{kind}"
            fuzz_mutations.copy_checkpoint(tmp_path / "base" / name / "model", place)
            try:
                change(place, random.Random(1))
                done.add(kind)
            except (fuzz_mutations.NotPossible, FileNotFoundError):
                pass
    assert done == set(fuzz_mutations.KINDS)


#: Small enough for every run of the tests; together they have every form of a file.
FEW = ("int4", "shards", "static", "scale-bits", "low-rank", "codebook4", "sd3-shards", "quanto-int4", "map")


def test_damaged_checkpoints_are_right_or_refused(tmp_path):
    """In a process of its own: children of this one would lack the threads that torch has used in other tests."""
    out, environment = tmp_path / "summary.json", {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, run.__file__, "--count", "50", "--out", str(out), "--checkpoints", *FEW]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert found["loads"] == 50
    assert set(found["checkpoints"]) == set(FEW)


def test_the_summary_names_the_seeds_of_faults():
    result = {
        "seed": 3,
        "checkpoint": "a",
        "mutation": "m",
        "changed": "",
        "place": "x.py:1",
        "text": "",
        "seconds": 0.5,
    }
    found = run.summary([{**result, "outcome": "obscure"}, {**result, "outcome": "right"}], 0)
    assert found["outcomes"] == {"obscure": 1, "right": 1}
    assert found["seeds"] == {"obscure": [3]}
    assert found["obscure_places"] == {"x.py:1": 1}


def test_all_checkpoints_have_a_name_for_the_seeds():
    assert len(CASES) >= 30
