"""from_pretrained with fewer than 4 bits: a warning when a float model is quantized, none when it is loaded again."""

import logging

import pytest
import transformers
from tiny_diffusers import TINY as DIFFUSERS
from tiny_models import save_tiny
from typer.testing import CliRunner

import requanto
from requanto.cli.app import app
from requanto.config import few_bits


@pytest.fixture(autouse=True)
def said(monkeypatch):
    monkeypatch.setattr(few_bits, "_said", set())


def warned(caplog):
    return [r.getMessage() for r in caplog.records if r.name == few_bits.__name__ and r.levelno == logging.WARNING]


@pytest.mark.parametrize("library", ["transformers", "diffusers"])
def test_loading(library, tmp_path, caplog):
    if library == "transformers":
        save_tiny("llama", tmp_path / "float")
        load = transformers.AutoModelForCausalLM.from_pretrained
    else:
        DIFFUSERS["sd3"].make().save_pretrained(tmp_path / "float")
        load = DIFFUSERS["sd3"].cls.from_pretrained
    load(tmp_path / "float", quantization_config=requanto.QuantoConfig(weights="int4"))
    assert not warned(caplog)
    for _ in range(2):
        model = load(tmp_path / "float", quantization_config=requanto.QuantoConfig(weights="int3"))
    (line,) = warned(caplog)
    assert line.startswith("int3 weights without samples: ")
    model.save_pretrained(tmp_path / "int3")
    caplog.clear()
    few_bits._said.clear()
    load(tmp_path / "int3")
    assert not warned(caplog)


def test_command_line(tmp_path, caplog):
    source = save_tiny("llama", tmp_path / "float")
    done = CliRunner().invoke(app, ["quantize", str(source), str(tmp_path / "int2"), "--weights", "int2"])
    assert done.exit_code == 0
    assert "requanto quantize --weights int2 --method gptq" in warned(caplog)[0]
