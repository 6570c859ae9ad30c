"""A quantized model is saved with the tokenizer of its own model, and nobody else's files are lost."""

import json

import pytest

from requanto.report.companions import RECORD, save_with_companions

A = {"tokenizer.json": '{"of": "A"}', "vocab.txt": "A", "chat_template.jinja": "A", "code.py": "A = 1"}
B = {"tokenizer.json": '{"of": "B"}', "merges.txt": "B"}


class Model:
    def save_pretrained(self, directory):
        (directory / "config.json").write_text('{"model": "new"}')
        (directory / "model.safetensors").write_text("weights")
        (directory / "README.md").write_text(
            "<!-- Written anew at every save: delete this line to keep a text of your own. -->"
        )


class Generating(Model):
    def save_pretrained(self, directory):
        super().save_pretrained(directory)
        (directory / "generation_config.json").write_text('{"max_length": 7}')


@pytest.fixture
def source(tmp_path):
    def make(name, files):
        directory = tmp_path / name
        directory.mkdir(exist_ok=True)
        for file, text in {**files, "config.json": "{}", "model.safetensors.index.json": "{}"}.items():
            (directory / file).write_text(text)
        (directory / "model.safetensors").write_text("float")
        return directory

    return make


def contents(out):
    left = ("config.json", "model.safetensors", "README.md", RECORD)
    return {p.name: p.read_text() for p in out.iterdir() if p.name not in left}


def test_another_model_replaces_the_companions_and_leaves_other_files(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    mine = {"notes.txt": "mine", "run.py": "mine", "settings.json": "{}", "adapter_config.json": "{}"}
    for name, text in mine.items():
        (out / name).write_text(text)
    save_with_companions(Generating(), source("a", A), out)
    assert contents(out) == {**A, **mine, "generation_config.json": '{"max_length": 7}'}
    save_with_companions(Model(), source("b", B), out)
    assert contents(out) == {**B, **mine}
    save_with_companions(Model(), source("b", B), out)
    assert contents(out) == {**B, **mine}


@pytest.mark.parametrize("left", ["", '{"of": ', '{"of": "A'])
def test_a_damaged_companion_is_replaced(source, tmp_path, left):
    out = tmp_path / "out"
    for _ in range(2):
        save_with_companions(Model(), source("a", A), out)
        assert contents(out) == A
        (out / "tokenizer.json").write_text(left)
        (out / "vocab.txt").write_text("")
    (out / RECORD).unlink()
    save_with_companions(Model(), source("a", A), out)
    assert contents(out) == A


def test_an_edited_companion_of_the_same_model_stays(source, tmp_path, caplog):
    out = tmp_path / "out"
    save_with_companions(Model(), source("a", A), out)
    (out / "chat_template.jinja").write_text("edited")
    for _ in range(2):
        save_with_companions(Model(), source("a", A), out)
        assert contents(out) == {**A, "chat_template.jinja": "edited"}
    assert "was edited after it had been copied, and stays" in caplog.text


def test_an_edited_companion_of_another_model_is_kept_under_another_name(source, tmp_path, caplog):
    out = tmp_path / "out"
    save_with_companions(Model(), source("a", A), out)
    (out / "chat_template.jinja").write_text("edited")
    (out / "tokenizer.json").write_text('{"of": "me"}')
    (out / "tokenizer.json.bak").write_text("older")
    save_with_companions(Model(), source("b", B), out)
    kept = {"chat_template.jinja.bak": "edited", "tokenizer.json.bak2": '{"of": "me"}', "tokenizer.json.bak": "older"}
    assert contents(out) == {**B, **kept}
    assert "is kept as tokenizer.json.bak2" in caplog.text


def test_a_directory_of_an_earlier_version_has_no_record(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "tokenizer.json").write_text('{"of": "A"}')
    (out / "vocab.txt").write_text("perhaps the user's")
    save_with_companions(Model(), source("b", B), out)
    assert contents(out) == {**B, "tokenizer.json.bak": '{"of": "A"}', "vocab.txt": "perhaps the user's"}


@pytest.mark.parametrize("text", ["", "[]", "3", '{"../victim.txt": "x", "/etc/passwd": "x", "README.md": "x"}'])
def test_a_damaged_or_foreign_record_deletes_nothing(source, tmp_path, text):
    (tmp_path / "victim.txt").write_text("outside")
    out = tmp_path / "out"
    out.mkdir()
    (out / RECORD).write_text(text)
    (out / "README.md").write_text("my own text")
    save_with_companions(Model(), source("b", B), out)
    assert (tmp_path / "victim.txt").read_text() == "outside"
    assert (out / "README.md").read_text() == "my own text"
    assert json.loads((out / RECORD).read_text()).keys() == {*B, "config.json"}


def test_a_failed_save_leaves_the_old_companions(source, tmp_path):
    class Failing(Model):
        def save_pretrained(self, directory):
            super().save_pretrained(directory)
            raise OSError(28, "No space left on device")

    out = tmp_path / "out"
    save_with_companions(Model(), source("a", A), out)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(OSError, match="does not fit"):
        save_with_companions(Failing(), source("b", B), out)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
