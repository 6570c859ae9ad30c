"""A plan in a downloaded or shared directory: opening the directory changes nothing outside of it, and never fails by it."""

import json
import os
import tempfile
from pathlib import Path

import pytest

from requanto.checkpoint.commit import finish_interrupted
from requanto.checkpoint.directory import replaced_directory
from requanto.checkpoint.scratch import OWNER, PLAN, PREFIX


def stamp(path):
    found = path.lstat()
    return [found.st_size, found.st_mtime_ns]


class Place:
    """A checkpoint beside somebody's files, with a save that stopped after the config."""

    def __init__(self, directory):
        self.target = directory / "model"
        self.folder = self.target / f"{PREFIX}0a0b0c0d"
        self.home = directory / "home"
        (self.folder / "new").mkdir(parents=True)
        self.home.mkdir()
        (self.home / "key").write_text("secret")
        (self.target / "config.json").write_text("new")
        self.plan = {"install": [], "remove": [], "old": {}, "new": {}}
        self.add("config.json", old=None, new=stamp(self.target / "config.json"))

    def add(self, name, old=None, new=(1, 1)):
        self.plan["install"].append(name)
        self.plan["old"][name], self.plan["new"][name] = old, new

    def remove(self, name, path):
        self.plan["remove"].append(name)
        self.plan["old"][name] = stamp(path)

    def open(self):
        if not (self.folder / PLAN).exists():
            (self.folder / PLAN).write_text(json.dumps(self.plan))
        finish_interrupted(self.target)

    def outside(self):
        return {str(p.relative_to(self.home.parent)) for p in self.home.parent.rglob("*")}


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


def writes_above(place):
    (place.folder / "evil").write_text("evil")
    place.add("../evil")


def writes_above_a_folder(place):
    (place.folder / "new" / "a").mkdir()
    (place.folder / "evil").write_text("evil")
    place.add("a/../../evil")


def deletes_above(place):
    place.remove("../home/key", place.home / "key")


def deletes_an_absolute_name(place):
    place.remove(str(place.home / "key"), place.home / "key")


def takes_through_a_link(place):
    (place.folder / "new").rmdir()
    (place.folder / "new").symlink_to(place.home)
    place.add("key")


def takes_through_a_folder(place):
    (place.folder / "new" / "part").symlink_to(place.home)
    place.add("part/key")


def writes_through_a_folder(place):
    (place.target / "part").symlink_to(place.home)
    (place.folder / "new" / "part").mkdir()
    (place.folder / "new" / "part" / "evil").write_text("evil")
    place.add("part/evil")


def deletes_through_a_folder(place):
    (place.target / "part").symlink_to(place.home)
    place.remove("part/key", place.home / "key")


def moves_old_files_out(place):
    (place.folder / "old").symlink_to(place.home)
    (place.target / "notes").write_text("mine")
    place.remove("notes", place.target / "notes")


HOSTILE = [
    writes_above, writes_above_a_folder, deletes_above, deletes_an_absolute_name, takes_through_a_link,
    takes_through_a_folder, writes_through_a_folder, deletes_through_a_folder, moves_old_files_out,
]  # fmt: skip


@pytest.mark.parametrize("attack", HOSTILE)
def test_opening_changes_nothing_outside(place, attack, caplog):
    attack(place)
    (place.folder / PLAN).write_text(json.dumps(place.plan))
    before = place.outside()
    place.open()
    assert place.outside() == before
    assert (place.home / "key").read_text() == "secret"
    assert "not used" in caplog.text


@pytest.mark.parametrize("attack", HOSTILE)
def test_saving_changes_nothing_outside(place, attack):
    attack(place)
    (place.folder / PLAN).write_text(json.dumps(place.plan))
    with replaced_directory(place.target) as scratch:
        (scratch / "config.json").write_text("newer")
    assert [p.name for p in place.home.iterdir()] == ["key"]
    assert not place.folder.exists()
    assert not (place.target.parent / "evil").exists()
    assert (place.target / "config.json").read_text() == "newer"


@pytest.mark.parametrize(
    "text",
    [
        "[]", "3", "", "[" * 100_000, '{"install": 3}', '{"install": [3], "remove": [], "old": {}, "new": {}}',
        '{"install": ["a\\u0000b"], "remove": [], "old": {"a\\u0000b": null}, "new": {"a\\u0000b": null}}',
        '{"install": [], "remove": {"a": 1}, "old": {}, "new": {}}', b"\xff\xfe".decode("latin-1"),
        '{"install": ["a"], "remove": [], "old": {"a": "x"}, "new": {"a": null}}',
    ],
)  # fmt: skip
def test_what_is_no_plan_is_ignored(place, text):
    (place.folder / PLAN).write_text(text, encoding="latin-1")
    before = place.outside()
    place.open()
    assert place.outside() == before


def test_files_that_never_end_are_not_read(place):
    os.mkfifo(place.folder / PLAN)
    os.mkfifo(place.folder / OWNER)
    place.open()
    with replaced_directory(place.target) as scratch:
        (scratch / "config.json").write_text("newer")
    assert not place.folder.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("mode", [0o700, 0o755], ids=["unreadable", "readable"])
def test_the_folder_of_another_user_is_left_alone(mode):
    """A checkpoint that another user saves, or has put a plan into, opens; nothing is done with this user's rights."""
    with tempfile.TemporaryDirectory() as directory:  # pytest's own is closed to others
        os.chmod(directory, 0o755)
        check_folder_of_another_user(mode, Place(Path(directory)))


def check_folder_of_another_user(mode, place):
    (place.folder / "new" / "model.safetensors").write_text("evil")
    place.add("model.safetensors", new=stamp(place.folder / "new" / "model.safetensors"))
    (place.folder / PLAN).write_text(json.dumps(place.plan))
    place.folder.chmod(mode)
    os.chown(place.target, 65534, -1)
    reader = os.fork()
    if reader == 0:
        try:
            os.setuid(65534)
            os.stat(place.target / "config.json")
            finish_interrupted(place.target)
            with replaced_directory(place.target) as scratch:
                (scratch / "other.json").write_text("saved")
        except BaseException as error:
            print(repr(error))
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(reader, 0)[1]) == 0
    assert not (place.target / "model.safetensors").exists()
    assert (place.target / "other.json").read_text() == "saved"
    assert (place.target / "config.json").read_text() == "new"
