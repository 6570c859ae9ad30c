"""`optimum-cli quanto quantize`: its arguments, what it writes, and how it gets into optimum's command line."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import TINY, output, save_tiny

import requanto
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


# What optimum's command line does with its folder `register`, in optimum's names: enough to run a command that it loads.
BASE = """
class CommandInfo:
    def __init__(self, name, help="", subcommand_class=None):
        self.name, self.help, self.subcommand_class = name, help, subcommand_class

class BaseOptimumCLICommand:
    COMMAND, SUBCOMMANDS = None, ()

    def __init__(self, args=None):
        self.args = args
"""
CLI = """
import argparse, importlib, importlib.util, pathlib, sys
from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

class Theirs(BaseOptimumCLICommand):
    COMMAND = CommandInfo("quanto")

_OPTIMUM_CLI_SUBCOMMANDS = [(Theirs, None)] if OCCUPIED else []

def load():
    found = []
    spec = importlib.util.find_spec("optimum.commands.register")
    for place in spec.submodule_search_locations if spec else ():
        for file in pathlib.Path(place).glob("*.py"):
            module = importlib.import_module("optimum.commands.register." + file.stem)
            found += [(command, None) for command in getattr(module, "REGISTER_COMMANDS", [])]
    return found

def main():
    groups = argparse.ArgumentParser().add_subparsers()
    for group, _ in _OPTIMUM_CLI_SUBCOMMANDS + load():
        inner = groups.add_parser(group.COMMAND.name).add_subparsers()
        for info in group.SUBCOMMANDS:
            parser = inner.add_parser(info.name)
            info.subcommand_class.parse_args(parser)
            parser.set_defaults(command=info.subcommand_class)
    args = groups.choices[sys.argv[1]].parse_args(sys.argv[2:])
    args.command(args).run()
"""


@pytest.fixture
def optimum(tmp_path):
    """Runs `requanto` or `optimum-cli` in a process that finds an optimum; returns what it did."""
    commands = tmp_path / "site" / "optimum" / "commands"
    commands.mkdir(parents=True)
    (commands / "base.py").write_text(BASE)
    (commands / "optimum_cli.py").write_text(CLI.replace("OCCUPIED", "False"))

    def start(program, *arguments):
        code = {
            "requanto": "from requanto.cli import main; main()",
            "optimum-cli": "from optimum.commands.optimum_cli import main; main()",
        }[program]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), *sys.path])}
        return subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=120, env=environment
        )  # fmt: skip

    start.commands = commands
    return start


def test_registered_once_the_command_quantizes(optimum, tmp_path):
    first, second = optimum("requanto", "register-optimum-cli"), optimum("requanto", "register-optimum-cli")
    file = optimum.commands / "register" / "register_requanto.py"
    assert file.is_file(), first.stderr[-2000:]
    assert str(file) in first.stdout
    assert (first.returncode, first.stdout) == (second.returncode, second.stdout) == (0, first.stdout)
    source = save_tiny("llama", tmp_path / "float")
    done = optimum("optimum-cli", "quanto", "quantize", tmp_path / "out", "-m", source, "--weights", "int4")
    assert done.returncode == 0, done.stderr[-2000:]
    loaded = QuantizedModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.model.layers[0].mlp.up_proj.weight.qtype.name == "qint4"


def test_it_is_removed_without_a_trace(optimum):
    optimum("requanto", "register-optimum-cli")
    assert optimum("optimum-cli", "quanto", "quantize", "--help").returncode == 0
    assert "deleted" in optimum("requanto", "register-optimum-cli", "--remove").stdout
    assert {path.name for path in optimum.commands.iterdir()} - {"__pycache__"} == {"base.py", "optimum_cli.py"}
    assert "KeyError: 'quanto'" in optimum("optimum-cli", "quanto", "quantize", "--help").stderr
    assert "nothing to remove" in optimum("requanto", "register-optimum-cli", "--remove").stdout


def test_it_takes_the_place_of_the_command_that_optimum_quanto_registers(optimum):
    optimum("requanto", "register-optimum-cli")
    (optimum.commands / "optimum_cli.py").write_text(CLI.replace("OCCUPIED", "True"))
    done = optimum("optimum-cli", "quanto", "quantize", "--help")
    assert "--trust_remote_code" in done.stdout, done.stderr[-2000:]
    assert "replacing the command of optimum.commands.optimum_cli by Requanto's" in done.stderr


def test_optimum_works_on_when_requanto_is_gone(optimum):
    optimum("requanto", "register-optimum-cli")
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"""
import sys; sys.path.insert(0, {str(optimum.commands.parent.parent)!r})
from optimum.commands.optimum_cli import load
print(load())
"""], capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stdout.strip() == "[]", done.stderr
    assert "requanto is not installed any more: delete" in done.stderr


def test_without_optimum_it_says_what_is_missing(optimum):
    (optimum.commands / "optimum_cli.py").unlink()  # as where only packages that extend optimum are installed
    done = optimum("requanto", "register-optimum-cli")
    assert done.returncode == 1
    assert "pip install optimum" in " ".join(done.stderr.split())
    assert not (optimum.commands / "register").exists()


def test_the_package_itself_brings_no_optimum():
    """A folder of that name is what Transformers, PEFT and Diffusers take for an installed optimum."""
    source = Path(requanto.__file__).parent.parent
    assert not any(path.name.startswith("optimum") for path in source.iterdir())
