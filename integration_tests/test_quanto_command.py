"""`optimum-cli quanto quantize`: its arguments, what it writes, and, where optimum is installed, the command itself."""

import argparse
import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from tiny_models import TINY, output, save_tiny

from requanto.integrations.optimum_quanto.command import parse_args, run
from requanto.integrations.optimum_quanto.models import QuantizedModelForCausalLM


def test_it_writes_a_directory_that_the_wrapper_loads(tmp_path):
    source = save_tiny("llama", tmp_path / "float")
    parser = argparse.ArgumentParser()
    parse_args(parser)
    run(parser.parse_args([str(tmp_path / "out"), "-m", str(source), "--weights", "int8", "--task", "text-generation"]))
    loaded = QuantizedModelForCausalLM.from_pretrained(tmp_path / "out")
    wanted = output(TINY["llama"].build(), TINY["llama"].inputs())
    found = output(loaded._wrapped, TINY["llama"].inputs())
    assert 1e-5 < float((found - wanted).norm() / wanted.norm()) < 0.1
    assert loaded.model.layers[0].mlp.up_proj.weight.qtype.name == "qint8"
    assert torch.isfinite(found).all()


def test_a_type_it_does_not_know(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    parse_args(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["out", "-m", "model", "--weights", "int3"])
    assert "invalid choice" in capsys.readouterr().err


def test_optimum_finds_the_command_in_its_name_space(tmp_path):
    if importlib.util.find_spec("optimum") is None or importlib.util.find_spec("optimum.commands") is None:
        pytest.skip("optimum is not installed")
    place = tmp_path / "optimum" / "commands" / "register"
    place.mkdir(parents=True)
    line = "from requanto.integrations.optimum_quanto.command import REGISTER_COMMANDS\n"
    (place / "register_requanto.py").write_text(line)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", "from optimum.commands.optimum_cli import main; main()", "quanto", "quantize", "--help"],
        capture_output=True, text=True, timeout=120, env=environment,
    )  # fmt: skip
    assert "--trust_remote_code" in done.stdout, done.stderr[-2000:]
