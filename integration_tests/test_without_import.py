"""Checkpoints opened by path, in processes that never say `import requanto`: loaded where Requanto is installed, and refused
with the name of the package where it is not.
"""

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from tiny_diffusers import tiny_pipeline
from tiny_models import TINY, save_tiny
from without_import import diffusers_model, own_class, pipeline, text_tower

import requanto

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
NEEDED = "pip install requanto"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("saved")
    config = requanto.QuantoConfig(weights="int8")
    for name in ("llama", "clip"):
        source = save_tiny(name, folder / f"{name}-float")
        TINY[name].auto.from_pretrained(source, quantization_config=config).save_pretrained(folder / name)
    pipe = tiny_pipeline()
    requanto.quantize(pipe.transformer, weights="int8")
    requanto.quantize(pipe.text_encoder, weights="int8")
    requanto.freeze(pipe.transformer)
    requanto.freeze(pipe.text_encoder)
    pipe.save_pretrained(folder / "pipe")
    paths = {name: str(folder / name) for name in ("llama", "clip", "llama-float", "pipe")}
    return paths | {"transformer": str(folder / "pipe" / "transformer")}


def run(site: object, library: str, steps: Iterable[str], **variables: str) -> dict[str, dict]:
    program = Path(__file__).with_name("without_import.py")
    keep = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "REQUANTO_AUTOLOAD")}
    # The environment of the tests may have Requanto installed with its .pth: off, but for `site`, which is processed later.
    code = f"import os, runpy; del os.environ['REQUANTO_AUTOLOAD']; os.environ.update({variables!r}); "
    code += f"runpy.run_path({str(program)!r}, run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code, str(site), library, *steps],
        capture_output=True,
        text=True,
        timeout=300,
        env=keep | {"REQUANTO_AUTOLOAD": "0", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return {found["step"]: found for found in map(json.loads, done.stdout.splitlines())}


def value_of(step, path):
    name, answer = step(path)
    return name, pytest.approx(float(answer.double().abs().sum()), rel=1e-5)


@pytest.mark.parametrize(
    ("library", "steps"),
    [("as-it-is", ["text_tower", "transformers_model"]), ("no-quanto", ["config_by_hand", "own_class"])],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_loads_where_it_is_installed(library, steps, saved):
    model = dict.fromkeys(steps, "llama") | {"text_tower": "clip"}  # CLIP's text model out of the whole CLIP
    before = [f"float_model={saved['llama-float']}"]
    before += [f"requantized={saved['llama-float']}"] if library == "as-it-is" else []
    found = run(SOURCE, library, [*before, *(f"{step}={saved[model[step]]}" for step in steps)])
    # Nothing changes before a checkpoint of Requanto is opened: not for float models, not for optimum-quanto.
    assert (found["float_model"]["class"], found["float_model"]["imported"]) == ("Parameter", False)
    if library == "as-it-is":
        assert (found["requantized"]["class"], found["requantized"]["imported"]) == ("QuantoHfQuantizer", False)
    for step in steps:
        wanted = value_of(text_tower, saved["clip"]) if step == "text_tower" else value_of(own_class, saved["llama"])
        assert (found[step].get("class"), found[step].get("sum"), found[step]["imported"]) == (*wanted, True), found


@pytest.mark.parametrize("step", ["plain_config", "files_of_accelerate"])
def test_files_without_their_description_are_refused(step, saved):
    found = run(SOURCE, "as-it-is", [f"float_model={saved['llama-float']}", f"{step}={saved['llama']}"])
    assert found["float_model"]["imported"] is False
    assert "CheckpointError" in found[step].get("error", ""), found
    assert "quantized weight" in found[step]["error"]


@pytest.mark.parametrize("steps", [["pipeline"], ["single_file", "diffusers_model"]], ids=lambda steps: steps[0])
def test_loads_in_diffusers(steps, saved):
    paths = {"pipeline": saved["pipe"], "single_file": saved["transformer"], "diffusers_model": saved["transformer"]}
    for step, found in run(SOURCE, "as-it-is", [f"{step}={paths[step]}" for step in steps]).items():
        wanted = (
            value_of(pipeline, saved["pipe"]) if step == "pipeline" else value_of(diffusers_model, saved["transformer"])
        )
        assert (found.get("class"), found.get("sum"), found["imported"]) == (*wanted, True), found


@pytest.mark.parametrize("library", ["as-it-is", "no-quanto"])
def test_stops_without_it_and_names_the_package(library, saved):
    steps = [f"{step}={saved['llama']}" for step in ("transformers_model", "own_class", "config_by_hand")]
    steps += [f"diffusers_model={saved['transformer']}", f"pipeline={saved['pipe']}"]
    steps += [f"text_tower={saved['clip']}"]
    quanto = [f"of_optimum_quanto={saved['llama']}"] if library == "as-it-is" else []
    found = run("-", library, steps + quanto)
    if quanto:  # its own loader
        assert "quantization map" in found.pop("of_optimum_quanto")["error"]
    for step in found.values():
        assert NEEDED in step["error"], step
        assert "optimum" not in step["error"]
    assert len(found) == 6


def test_config_in_memory_is_plain_and_old_files_load(saved, tmp_path):
    model = TINY["llama"].auto.from_pretrained(saved["llama"])
    config = model.config.quantization_config
    assert (config.weights, config.weights_dtype) == ("int8", "int8")
    assert requanto.QuantoConfig.from_dict(config.to_dict()) == config
    assert requanto.QuantoConfig(weights="int4").to_dict()["weights"] == "int4"
    assert "stored by" not in repr(config)
    old = tmp_path / "old"
    old.mkdir()
    for file in Path(saved["llama"]).iterdir():
        (old / file.name).write_bytes(file.read_bytes())
    stored = json.loads((old / "config.json").read_text())
    assert NEEDED in stored["quantization_config"]["weights"] == stored["quantization_config"].pop("weights_dtype")
    stored["quantization_config"]["weights"] = "int8"  # as versions before this one wrote it
    (old / "config.json").write_text(json.dumps(stored))
    again = TINY["llama"].auto.from_pretrained(old)
    for (name, a), (_, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        parts = a.inner_tensors() if isinstance(a, requanto.QTensor) else {"": a}
        for part, value in parts.items():
            assert torch.equal(value, b.inner_tensors()[part] if part else b), name
    assert again.config.quantization_config == config


def _start(site: Path, code: str = "pass", *flags: str, **variables: str) -> str:
    start = f"import site; site.addsitedir({str(site)!r}); {code}"
    keep = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "REQUANTO_AUTOLOAD")}
    done = subprocess.run(
        [sys.executable, "-S", *flags, "-c", start], capture_output=True, text=True, timeout=60, env=keep | variables
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_start_up_is_never_disturbed(tmp_path):
    shown = "import sys; print(*(m for m in sys.modules if m.startswith(('requanto', 'torch', 'logging'))))"
    assert _start(SOURCE, shown).split() == ["requanto_autoload"]
    assert _start(SOURCE, shown, "-I").split() == ["requanto_autoload"]
    assert _start(SOURCE, shown, REQUANTO_AUTOLOAD="0") == "\n"
    # What may be left of a package that was not removed properly.
    (tmp_path / "requanto_autoload.pth").write_text((SOURCE / "requanto_autoload.pth").read_text())
    assert _start(tmp_path) == ""
    module = (SOURCE / "requanto_autoload.py").read_text()
    (tmp_path / "requanto_autoload.py").write_text(module)
    fake = tmp_path / "transformers"
    fake.mkdir()
    (fake / "__init__.py").touch()
    (fake / "configuration_utils.py").write_text("class Other: pass")
    reported = _start(tmp_path, "import transformers.configuration_utils as c; print(c.Other)")
    assert "not patched" in reported  # one line, and the library works
    assert "Other" in reported
    (tmp_path / "requanto_autoload.py").write_text(module + "\nraise RuntimeError")
    assert _start(tmp_path) == ""
    (tmp_path / "requanto_autoload.py").write_text("no python")
    assert _start(tmp_path) == ""


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_pip_installs_the_file_that_starts_it(kind, tmp_path):
    pytest.importorskip("setuptools")
    copy = tmp_path / "tree"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (copy / name).symlink_to(ROOT / name)
    # What setuptools and setup.py write goes into folders of the copy. A link to setup.py would write beside its target.
    (copy / "setup.py").write_bytes((ROOT / "setup.py").read_bytes())
    for folder in ("src", "kernels", "kernels/requanto_cpu"):
        (copy / folder).mkdir()
        for path in (ROOT / folder).iterdir():
            if path.name not in ("__pycache__", "requanto_cpu", "built") and not path.name.endswith(".egg-info"):
                (copy / folder / path.name).symlink_to(path)
    code = f"from setuptools import build_meta as b; print(b.build_{kind}({str(tmp_path)!r}))"
    without_kernels = {**os.environ, "CXX": "/nonexistent"}  # tests/test_imports.py has a wheel with them
    before = sorted((ROOT / "kernels" / "requanto_cpu").rglob("*"))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=copy, env=without_kernels, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert sorted((ROOT / "kernels" / "requanto_cpu").rglob("*")) == before
    (file,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(file) as wheel:
        names = wheel.namelist()
        record = next(wheel.read(name).decode() for name in names if name.endswith("RECORD"))
        assert wheel.read("requanto_autoload.pth") == (SOURCE / "requanto_autoload.pth").read_bytes()
        wheel.extractall(tmp_path / "site")
    assert "requanto_autoload.pth," in record  # so that pip uninstall removes it
    shown = "import sys; print('requanto_autoload' in sys.modules, 'requanto' in sys.modules)"
    assert _start(tmp_path / "site", shown) == "True False\n"
