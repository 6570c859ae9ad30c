"""A save that was killed while it replaced files is finished by the next load, unless somebody has saved there since."""

import json
import os

import pytest

from requanto.checkpoint import commit as module
from requanto.checkpoint.commit import finish_interrupted
from requanto.checkpoint.directory import replaced_directory
from requanto.checkpoint.format import CheckpointError
from requanto.checkpoint.scratch import PLAN, PREFIX, folders_in

FILES = ("config.json", "model.safetensors", "model.safetensors.index.json")


def save(target):
    with replaced_directory(target) as scratch:
        for name in FILES:
            (scratch / name).write_text(f"new {name}")


@pytest.fixture
def killed(tmp_path, monkeypatch):
    """Returns a function that makes the state after a kill behind the n-th of the replaced files."""

    def make(after):
        target = tmp_path / "model"
        target.mkdir()
        for name in FILES[:2]:
            (target / name).write_text(f"old {name}")
        real, done = os.replace, []

        def replace(source, destination):
            if len(done) == after:
                raise SystemError("killed")
            done.append(destination)
            real(source, destination)

        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", replace)
            patched.setattr(module, "_back", lambda *args: None)
            patched.setattr("requanto.checkpoint.scratch.remove_folder", lambda folder: None)
            with pytest.raises(SystemError):
                save(target)
        return target

    return make


def state(target):
    return {p.name: p.read_text() for p in target.iterdir() if p.is_file()}


NEW = {name: f"new {name}" for name in FILES}
OLD = {name: f"old {name}" for name in FILES[:2]}


@pytest.mark.parametrize("after", [0, 1, 2])
def test_old_before_the_config_and_new_from_then_on(killed, after):
    target = killed(after)
    finish_interrupted(target)
    assert state(target) == (NEW if after else OLD)
    assert bool(folders_in(target)) == (after == 0)  # which the next save removes
    with replaced_directory(target) as scratch:
        (scratch / "config.json").write_text("next")
    assert not folders_in(target)


@pytest.mark.parametrize(
    ("names", "first"),
    [
        (["README.md", "config.json", "a.json"], "config.json"),
        (["model_index.json", "a/config.json"], "model_index.json"),
        (["__0_0.distcp", ".metadata"], ".metadata"),
        (["a/README.md", "a/config.json"], "a/config.json"),
    ],
)
def test_what_a_loader_reads_first_is_replaced_first(tmp_path, monkeypatch, names, first):
    real, replaced = os.replace, []
    monkeypatch.setattr(os, "replace", lambda source, place: (replaced.append(place), real(source, place)))
    with replaced_directory(tmp_path) as scratch:
        for name in names:
            (scratch / name).parent.mkdir(exist_ok=True)
            (scratch / name).write_text("new")
    assert replaced[0] == tmp_path / first


def test_a_part_of_a_pipeline_finishes_the_save_of_the_pipeline(tmp_path, killed):
    target = killed(1)
    (target / "model_index.json").write_text("{}")
    (target / "vae").mkdir()
    finish_interrupted(target / "vae")
    assert state(target).items() >= NEW.items()


@pytest.mark.parametrize("name", FILES)
def test_what_somebody_saved_since_is_not_overwritten(killed, name, caplog):
    target = killed(1)
    (target / name).write_text("somebody's")
    finish_interrupted(target)
    assert state(target)[name] == "somebody's"
    assert "was changed after a save" in caplog.text


def test_a_damaged_plan_is_not_carried_out(killed, caplog):
    target = killed(1)
    (folders_in(target)[0] / PLAN).write_text('{"install": [')
    finish_interrupted(target)
    assert state(target)["model.safetensors"] == "old model.safetensors"
    assert "is damaged" in caplog.text


def test_a_save_that_cannot_be_finished_is_an_error(killed, monkeypatch):
    target = killed(1)

    def refused(source, destination):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refused)
    with pytest.raises(CheckpointError, match=r"interrupted .* cannot be finished .* save it again"):
        finish_interrupted(target)


def test_the_plan_of_a_living_saver_is_left_to_it(tmp_path):
    with replaced_directory(tmp_path) as scratch:
        (scratch.parent / PLAN).write_text(json.dumps({"install": ["config.json"]}))
        finish_interrupted(tmp_path)
        assert (scratch.parent / PLAN).is_file()
        (scratch / "config.json").write_text("new")
    assert state(tmp_path) == {"config.json": "new"}


def test_folders_of_other_programs_are_no_scratch_folders(tmp_path):
    (tmp_path / ".saving").mkdir()
    (tmp_path / f"{PREFIX}file").write_text("a file of that name")
    assert folders_in(tmp_path) == []
