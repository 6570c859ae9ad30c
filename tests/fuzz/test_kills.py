"""A seeded part of `kills.py`: saves killed at a call to the file system, and calls that fail."""

import os

import kill_calls
import kills
import pytest
from kill_scenarios import scenarios


@pytest.fixture(scope="module")
def benches(tmp_path_factory):
    place = tmp_path_factory.mktemp("kills")
    made = scenarios(place / "shared")
    chosen = ("shards to one file", "the current directory", "requanto quantize", "a pipeline")
    return {name: kills.Bench(name, made[name], place / str(n) / "place") for n, name in enumerate(chosen)}


def test_a_kill_leaves_the_old_checkpoint_or_the_new_one(benches):
    found = kills.run(kills.choose(benches, 16, 0, seed=1), benches, 600)
    assert not found["faults"]
    assert found["done"] == 16
    assert min(found["killed"].get(state, 0) for state in ("old", "new")) > 0


@pytest.mark.parametrize("name", ["requanto quantize"])
def test_a_kill_between_the_first_and_the_last_rename(benches, name):
    """A seeded choice may not fall on the few calls between the two states."""
    bench = benches[name]
    found = [bench.one(at + 1) for at in bench.renames[-6:]]
    assert not [faults for _, faults in found if faults]
    assert [state for state, _ in found][-3:] == ["new"] * 3


def test_a_call_that_fails_leaves_the_old_checkpoint_and_says_so(benches):
    found = kills.run(kills.choose(benches, 0, 8, seed=2), benches, 600)
    assert not found["faults"]


def test_the_harness_sees_a_save_that_is_not_atomic(benches, tmp_path):
    """A save that writes into the target directly is found out."""

    def careless(place):
        for name in ("model_index.json", "unet/config.json"):
            (place / "target" / name).write_text("2")

    bench = benches["a pipeline"]
    save, bench.scenario.save = bench.scenario.save, careless
    try:
        assert any(bench.one(at)[1] for at in (1, 2, 3))
    finally:
        bench.scenario.save = save


def test_a_child_is_killed_at_the_call_asked_for(tmp_path):
    def three():
        for name in "abc":
            os.mkdir(tmp_path / name)

    assert kill_calls.run(three, at=3).killed
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]
    result = kill_calls.run(lambda: os.mkdir(tmp_path / "d"), at=1, fail=28)
    assert (result.killed, result.error) == (False, "OSError: [Errno 28] No space left on device")
