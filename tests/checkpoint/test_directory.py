"""Saving to a directory: what is replaced, what stays, and what an interruption leaves."""

import contextlib
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from requanto.checkpoint import scratch as scratch_module
from requanto.checkpoint.directory import replace_file, replaced_directory

NEW = {"config.json": "new", "model.safetensors": "new"}


@pytest.fixture
def target(tmp_path):
    made = tmp_path / "model"
    made.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (made / name).write_text(f"old {name}")
    return made


def contents(directory):
    return {str(p.relative_to(directory)): p.read_text() for p in directory.rglob("*") if p.is_file()}


def save(target, files=NEW):
    with replaced_directory(target) as scratch:
        for name, text in files.items():
            (scratch / name).parent.mkdir(exist_ok=True)
            (scratch / name).write_text(text)


def test_a_new_directory_appears_when_it_is_whole(tmp_path):
    target = tmp_path / "a" / "b"
    with replaced_directory(target) as scratch:
        (scratch / "config.json").write_text("new")
        assert not target.exists()
    assert contents(target) == {"config.json": "new"}
    assert [p.name for p in target.parent.iterdir()] == ["b"]


def test_the_directory_stays_and_its_files_are_replaced(target):
    before = target.stat().st_ino
    save(target)
    assert contents(target) == {**NEW, "tokenizer.json": "old tokenizer.json"}
    assert [p.name for p in target.parent.iterdir()] == ["model"]
    assert target.stat().st_ino == before


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


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("I/O error: File too large (os error 27)")]
)
def test_no_space_says_what_to_do(target, error):
    with pytest.raises(OSError, match=r"does not fit .* free some, or save elsewhere"), replaced_directory(target):
        raise error


@pytest.mark.parametrize("when", ["rmtree", "unlink", "flock", "mkdir", "dumps"])
@pytest.mark.parametrize("call", [1, 2, 3])
def test_ctrl_c_while_the_folder_is_made_or_deleted(target, monkeypatch, when, call):
    """The next save of the same process deletes what was left."""
    where = {"rmtree": scratch_module.shutil, "flock": scratch_module.fcntl, "dumps": scratch_module.json}.get(when, os)
    real, calls = getattr(where, when), []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(where, when, interrupted)
        with contextlib.suppress(KeyboardInterrupt):
            save(target)
    save(target, {**NEW, "config.json": "newer"})
    assert [name for name in os.listdir(target) if name.startswith(".")] == []
    assert contents(target) == {**NEW, "config.json": "newer", "tokenizer.json": "old tokenizer.json"}


def test_a_directory_that_is_taken_away_is_named(target):
    def take_away_while_saving():
        with replaced_directory(target) as scratch:
            (scratch / "config.json").write_text("new")
            target.rename(target.with_name("elsewhere"))

    with pytest.raises(FileNotFoundError, match="was deleted, renamed or replaced while"):
        take_away_while_saving()
    assert not target.exists()


def test_a_file_is_no_directory(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match="it is a file, expected a directory"):
        save(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_stays_a_link(target, tmp_path, dangling):
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere" if dangling else target)
    save(link)
    assert link.is_symlink()
    assert contents(link.resolve()).items() >= NEW.items()


@pytest.mark.parametrize("name", [".", "absolute"])
def test_the_current_directory(target, monkeypatch, name):
    monkeypatch.chdir(target)
    before = os.stat(".").st_ino
    save(Path(".") if name == "." else target)
    assert os.stat(".").st_ino == before
    assert Path("config.json").read_text() == "new"


def test_names_of_255_bytes(tmp_path):
    target = tmp_path / ("ä" * 127 + "b")
    for _ in range(2):
        save(target, {**NEW, "m" * 250 + ".json": "long"})
    assert contents(target) == {**NEW, "m" * 250 + ".json": "long"}


def test_permissions_stay_and_new_files_follow_the_umask(target):
    target.chmod(0o2750)
    (target / "model.safetensors").chmod(0o640)
    before = os.umask(0o027)
    try:
        with replaced_directory(target) as scratch:
            for name in ("config.json", "model.safetensors", "new.json"):
                (scratch / name).write_text("new")
                (scratch / name).chmod(0o600)  # as safetensors leaves them
    finally:
        os.umask(before)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (target, *target.iterdir())}
    assert modes["model"] == 0o2750
    assert (modes["model.safetensors"], modes["config.json"], modes["new.json"]) == (0o640, 0o644, 0o640)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to a group it is not in")
def test_group_and_setgid_are_kept(target):
    os.chown(target, -1, 12345)
    target.chmod(0o2775)
    os.chown(target / "config.json", -1, 23456)
    save(target, {**NEW, "new.json": "new"})
    assert (target / "config.json").stat().st_gid == 23456
    assert (target / "new.json").stat().st_gid == 12345
    assert (target.stat().st_gid, stat.S_IMODE(target.stat().st_mode)) == (12345, 0o2775)


def test_the_umask_of_the_process_is_never_changed(target, monkeypatch):
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("umask is shared by all threads"))
    save(target)


def test_a_file_that_cannot_be_replaced_brings_the_old_ones_back(target, monkeypatch):
    before, real = contents(target), os.replace

    def replace(source, destination):
        if Path(destination).name == "model.safetensors" and "new" in Path(source).parts:
            raise OSError(16, "Device or resource busy")
        real(source, destination)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="resource busy"):
        save(target)
    assert contents(target) == before


def test_ctrl_c_between_two_files_finishes_the_save(target, monkeypatch):
    real, calls = os.replace, []

    def replace(source, destination):
        calls.append(destination)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(source, destination)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        save(target)
    assert contents(target) == {**NEW, "tokenizer.json": "old tokenizer.json"}


@pytest.mark.parametrize("name", ["config.json", "sub"])
def test_a_place_that_is_taken_is_found_before_anything_changes(target, name):
    (target / "config.json").unlink()
    (target / "config.json").mkdir()
    (target / "sub").write_text("a file")
    before = contents(target)
    with pytest.raises(OSError, match=f"{name} is a (directory|file) there"):
        save(target, NEW if name == "config.json" else {"sub/config.json": "new"})
    assert contents(target) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_may_not_be_written_fails_first(target):
    target.chmod(0o555)
    try:
        with (
            pytest.raises(PermissionError, match=r"cannot save to .* change the permissions"),
            replaced_directory(target),
        ):
            pytest.fail("nothing may be computed first")
    finally:
        target.chmod(0o755)


def test_no_permission_says_what_to_do(target, monkeypatch):
    def refused(*args):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "mkdir", refused)
    with pytest.raises(OSError, match=r"cannot save to .* save elsewhere"), replaced_directory(target):
        pytest.fail("nothing may be computed first")


def test_debris_of_a_dead_saver_goes_and_that_of_a_living_one_stays(target, tmp_path):
    (target / f"{scratch_module.PREFIX}dead").mkdir()
    (target / f"{scratch_module.PREFIX}dead" / "new").mkdir()
    with replaced_directory(target) as living:
        (living / "config.json").write_text("first")
        save(target, {"config.json": "second"})
        assert living.is_dir()
        assert not (target / f"{scratch_module.PREFIX}dead").exists()
    assert contents(target)["config.json"] == "first"
    assert not [p for p in target.iterdir() if p.name.startswith(scratch_module.PREFIX)]


def test_two_savers_of_a_new_directory(tmp_path):
    target = tmp_path / "model"
    with replaced_directory(target) as first:
        (first / "config.json").write_text("first")
        with replaced_directory(target) as second:
            (second / "config.json").write_text("second")
            (second / "tokenizer.json").write_text("second")
    assert contents(target) == {"config.json": "first", "tokenizer.json": "second"}
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_many_savers_at_once(target):
    def one(text):
        for _ in range(5):
            save(target, {"config.json": text, "model.safetensors": text})

    threads = [threading.Thread(target=one, args=(text,)) for text in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = contents(target)
    assert found["config.json"] == found["model.safetensors"] in "abcd"
    assert found["tokenizer.json"] == "old tokenizer.json"
    assert len(found) == 3


def test_one_file_is_replaced_when_it_is_complete(tmp_path):
    path = tmp_path / ("x" * 250 + ".json")
    replace_file(path, lambda part: part.write_text("one"))
    mode = path.stat().st_mode

    def failing(part):
        part.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        replace_file(path, failing)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.read_text() == "one"

    def private(part):
        part.unlink()
        part.touch(0o600)
        part.write_text("two")

    replace_file(path, private)
    assert (path.read_text(), path.stat().st_mode) == ("two", mode)


_MOUNTED = """
import os, subprocess, sys
from pathlib import Path
from requanto.checkpoint.directory import replaced_directory

def save(target, text, size=10):
    with replaced_directory(target) as scratch:
        (scratch / "config.json").write_text(text)
        (scratch / "model.safetensors").write_text(text * size)

def check(target, mount):
    subprocess.run([*mount, str(target)], check=True)
    assert str(target) in Path("/proc/self/mountinfo").read_text()
    save(target, "a")  # empty
    (target / "tokenizer.json").write_text("mine")
    save(target, "b")
    if "tmpfs" in mount:
        try:
            save(target, "c", 10**6)
        except OSError as error:
            assert "does not fit" in str(error), error
        else:
            raise SystemExit("it cannot fit")
    assert (target / "config.json").read_text() == "b" and (target / "model.safetensors").read_text() == "b" * 10
    assert sorted(os.listdir(target)) == ["config.json", "model.safetensors", "tokenizer.json"], os.listdir(target)

place = Path(sys.argv[1])
for name in ("volume", "bind", "tmpfs"):
    (place / name).mkdir()
check(place / "bind", ["mount", "--bind", str(place / "volume")])
check(place / "tmpfs", ["mount", "-t", "tmpfs", "-o", "size=256k", "none"])
print("right")
"""


def test_a_mount_point_also_empty_and_full(tmp_path):
    unshare = ["unshare", "--user", "--map-root-user", "--mount"]
    try:
        subprocess.run([*unshare, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no user namespaces here")
    run = [*unshare, sys.executable, "-c", _MOUNTED, str(tmp_path)]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.stdout == "right\n", done.stderr
