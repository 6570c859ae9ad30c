"""`kernels/` builds as a package of the Hugging Face kernels hub: what its builder and loader need, from one source.

The builder copies files of the named extensions from `torch-ext/<name>` and does not follow links; the loader imports the
copy under a unique name, without any path to it.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "kernels"
BUILD = tomllib.loads((KERNELS / "build.toml").read_text())
SOURCE = KERNELS / "torch-ext" / BUILD["general"]["name"].replace("-", "_")


def test_the_source_is_where_the_builder_looks_for_it():
    assert SOURCE.is_dir()
    assert not SOURCE.is_symlink(), "the builder takes no links"
    link = KERNELS / "requanto_kernels"
    assert link.is_symlink(), "kernels/ is on PYTHONPATH: it needs the package, as a link"
    assert not Path(os.readlink(link)).is_absolute()
    assert link.resolve() == SOURCE
    assert {path.name for path in KERNELS.iterdir()} >= {"CARD.md", "flake.nix", "tests"}


def test_the_description_agrees_with_the_project():
    general, project = BUILD["general"], tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert general["license"] in project["project"]["license"].split(" AND ")
    assert general["license"] == "Apache-2.0", (
        "the texts under another license are in src/requanto/data, not in kernels/"
    )
    assert general["edition"] == 5
    assert set(general["backends"]) == {"cuda", "rocm", "xpu"}
    assert project["tool"]["setuptools"]["package-dir"]["requanto_kernels"] == str(SOURCE.relative_to(ROOT))
    found = {path.suffix[1:] for path in SOURCE.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert found - set(BUILD["torch-noarch"]["pyext"]) <= {"typed"}, "build.toml: pyext must name every kind of file"


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: path.name)
def test_imports_are_relative_or_of_torch_and_triton(path):
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module]
        bad = [name for name in names if name.split(".")[0] not in allowed]
        assert not bad, f"{path.name}:{node.lineno} imports {bad}; a module that the hub loads may not"


def built(folder: Path) -> Path:
    """One variant, as the builder copies it."""
    variant = folder / "build" / "torch-cuda"
    for path in SOURCE.rglob("*"):
        if path.suffix[1:] in BUILD["torch-noarch"]["pyext"]:
            target = variant / path.relative_to(SOURCE)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target)
    name, version = SOURCE.name, BUILD["general"]["version"]
    metadata = {
        "id": f"_{name}_cuda_0123abc", "name": BUILD["general"]["name"], "version": version, "backend": {"type": "cuda"},
        "license": BUILD["general"]["license"], "python-depends": [],
    }  # fmt: skip
    (variant / "metadata.json").write_text(json.dumps(metadata))
    return variant


CHECK = """
import sys, pytest
code = pytest.main(["-q", "-p", "no:cacheprovider", "-o", "markers=kernels_ci: chosen by the hub's builder", sys.argv[1]])
named = [name for name in sys.modules if name.split(".")[0] in ("requanto", "requanto_kernels")]
assert not named, f"the package must not need these: {named}"
sys.exit(code)
"""


def test_it_runs_as_the_hub_loads_it(tmp_path):
    pytest.importorskip("triton")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"TRITON_INTERPRET": "1", "REQUANTO_KERNELS_BUILD": str(built(tmp_path)), "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1"}  # fmt: skip
    tests = shutil.copytree(KERNELS / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-P", "-c", CHECK, str(tests)]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "5 passed" in done.stdout, done.stdout[-2000:]
