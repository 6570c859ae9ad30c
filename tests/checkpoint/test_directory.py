"""A saved directory is the old one or the new one, whatever happens in between."""

import os

import pytest

from requanto.checkpoint import directory as module
from requanto.checkpoint.directory import replaced_directory


@pytest.fixture
def target(tmp_path):
    made = tmp_path / "model"
    made.mkdir()
    for name in ("config.json", "model.safetensors", "model-00001-of-00002.safetensors", "tokenizer.json"):
        (made / name).write_text(f"old {name}")
    return made


def contents(directory):
    return {p.name: p.read_text() for p in directory.iterdir()}


def save(target):
    with replaced_directory(target) as scratch:
        (scratch / "config.json").write_text("new")
        (scratch / "model.safetensors").write_text("new")


NEW = {"config.json": "new", "model.safetensors": "new"}


def test_a_new_directory_appears_when_it_is_whole(tmp_path):
    target = tmp_path / "a" / "b"
    with replaced_directory(target) as scratch:
        (scratch / "config.json").write_text("new")
        assert not target.exists()
        assert scratch.parent == target.parent  # one file system, so that a rename is possible
    assert contents(target) == {"config.json": "new"}
    assert [p.name for p in target.parent.iterdir()] == ["b"]
    assert target.stat().st_mode & 0o777 == 0o777 & ~module._umask()


def test_old_weights_go_other_files_stay(target):
    save(target)
    assert contents(target) == {**NEW, "tokenizer.json": "old tokenizer.json"}
    assert [p.name for p in target.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("bad")])
def test_an_interrupted_save_leaves_all_as_it_was(target, error):
    before = contents(target)

    def interrupted():
        with replaced_directory(target) as scratch:
            (scratch / "model.safetensors").write_text("half")
            raise error

    with pytest.raises(type(error)):
        interrupted()
    assert contents(target) == before
    assert [p.name for p in target.parent.iterdir()] == ["model"]


def test_a_rename_that_fails_brings_the_old_directory_back(target, monkeypatch):
    before, real = contents(target), os.rename

    def rename(source, destination):
        if "saving" in str(source):
            raise OSError(5, "Input/output error")
        real(source, destination)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match="Input/output error"):
        save(target)
    assert contents(target) == before


def test_a_directory_that_cannot_be_moved_is_replaced_file_by_file(target, monkeypatch, caplog):
    real = os.rename

    def rename(source, destination):
        if str(source) == str(target):  # a mount point
            raise OSError(16, "Device or resource busy")
        real(source, destination)

    monkeypatch.setattr(os, "rename", rename)
    save(target)
    assert contents(target) == {**NEW, "tokenizer.json": "old tokenizer.json"}
    assert "its files are replaced one by one" in caplog.text
    assert [p.name for p in target.parent.iterdir()] == ["model"]


def test_a_file_is_no_directory(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match="it is a file, expected a directory"):
        save(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
