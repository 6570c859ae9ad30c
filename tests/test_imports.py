"""What importing costs and needs: no library before a user imports it, no circle, and a wheel that holds everything."""

import os
import pkgutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import requanto
import requanto_cpu
import requanto_kernels
from requanto_cpu import build

ROOT = Path(__file__).parents[1]


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, timeout=400
    )


def test_importing_requanto_imports_no_library():
    done = python(
        "import sys, requanto\n"
        "names = ('transformers', 'diffusers', 'peft', 'accelerate', 'triton', 'onnx', 'onnxscript', 'requanto_kernels', "
        "'requanto_cpu')\n"
        "print([m for m in names if m in sys.modules])"
    )
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "[]", "")


# None in sys.modules makes an import fail as for a package that is not installed.
HIDE = (
    "import sys, torch\n"
    "for m in ('transformers', 'diffusers', 'peft', 'accelerate', 'triton', 'optimum'): sys.modules[m] = None\n"
)


def test_the_core_works_without_any_library_and_without_triton():
    done = python(
        HIDE + "import requanto\n"
        "q = requanto.QTensor.quantize(torch.ones(2, 64), 'int4')\n"
        "print(torch.nn.functional.linear(torch.ones(1, 64), q).tolist())"
    )
    assert (done.stdout.strip(), done.stderr) == ("[[64.0, 64.0]]", "")


def test_kernels_import_no_model_library_and_not_requanto():
    code = (
        "import sys, pkgutil, importlib, requanto_kernels, requanto_cpu\n"
        "for k in (requanto_kernels, requanto_cpu):\n"
        "    for m in pkgutil.walk_packages(k.__path__, k.__name__ + '.'): importlib.import_module(m.name)\n"
        "print(sorted(m for m in ('requanto', 'transformers', 'diffusers', 'peft') if m in sys.modules))"
    )
    done = python(code)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


@pytest.mark.parametrize(
    ("edge", "check"),
    [
        ("transformers", "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as m; print(m['quanto'])"),
        ("diffusers", "from diffusers.quantizers.auto import AUTO_QUANTIZER_MAPPING as m; print(m['quanto'])"),
    ],
)
def test_an_edge_that_is_imported_before_its_library_still_registers(edge, check):
    done = python(f"import requanto.integrations.{edge}\n{check}")
    assert done.returncode == 0, done.stderr
    assert f"requanto.integrations.{edge}" in done.stdout


MODULES = sorted(
    info.name
    for package in (requanto, requanto_cpu, requanto_kernels)
    for info in pkgutil.walk_packages(package.__path__, package.__name__ + ".")
)


@pytest.mark.slow
def test_every_module_can_be_imported_first():
    """A circle of imports shows only in some orders: each module comes first once, in a process forked before any other.

    Whichever it is, its package comes before it: those that the packages import themselves have one order only.
    """
    code = (
        "import os, sys, importlib\n"
        "import requanto, requanto_cpu, requanto_kernels\n"
        f"left = [name for name in {MODULES!r} if name not in sys.modules]\n"
        "assert len(left) > 10, left\n"
        "for name in left:\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        try:\n"
        "            importlib.import_module(name)\n"
        "        except BaseException as error:\n"
        "            print(name, type(error).__name__, error, flush=True)\n"
        "            os._exit(1)\n"
        "        os._exit(0)\n"
        "    os.waitpid(child, 0)\n"
    )
    # What is heavy was imported before the fork.
    done = python("import transformers, diffusers.models, peft\n" + code)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def checkout(folder: Path) -> list[str]:
    """Copies the tracked files that a wheel is made from; returns the names of all tracked files."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    listed = done.stdout.splitlines()
    for name in listed:
        if (name.startswith(("src/", "kernels/")) or "/" not in name) and (ROOT / name).is_file():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    return listed


def built_wheel(source: Path, folder: Path, **environment: str) -> Path:
    command = [
        sys.executable,
        *["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w"],
        str(folder),
        str(source),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=300, env={**os.environ, **environment})
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.mark.slow
def test_the_wheel_holds_all_packages_their_types_and_their_data(tmp_path):
    listed = checkout(tmp_path / "source")
    wheel = built_wheel(tmp_path / "source", tmp_path)
    names = set(zipfile.ZipFile(wheel).namelist())
    for package in ("requanto", "requanto_cpu", "requanto_kernels"):
        assert {f"{package}/__init__.py", f"{package}/py.typed"} <= names
    assert {"requanto/data/eval_text.txt", "requanto/cli/app.py", "requanto_cpu/csrc/pack.cpp"} <= names
    assert any(name.startswith("requanto_kernels/tables/") and name.endswith(".json") for name in names)
    shipped = {f"{m.replace('.', '/')}" for m in MODULES}
    assert not [m for m in shipped if f"{m}.py" not in names and f"{m}/__init__.py" not in names and tracked(m, listed)]
    metadata = zipfile.ZipFile(wheel).read(next(n for n in names if n.endswith(".dist-info/METADATA"))).decode()
    assert "License-Expression: Apache-2.0 AND PSF-2.0" in metadata
    hard = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert not [line for line in hard if any(word in line for word in ("triton", "transformers", "diffusers"))]
    beside = {n for n in names if not n.startswith(("requanto/", "requanto_cpu/", "requanto_kernels/", "requanto-"))}
    assert beside == {"requanto_autoload.pth", "requanto_autoload.py"}  # run when Python starts


@pytest.mark.slow
def test_the_wheel_has_the_cpu_kernels_where_there_is_a_compiler(tmp_path):
    """One for all versions of Python and torch; without a compiler one for all platforms, without them."""
    try:
        build.compilers()
    except build.BuildError as error:
        pytest.skip(f"not run: {error}")
    checkout(tmp_path / "source")
    wheel = built_wheel(tmp_path / "source", tmp_path / "with")
    assert "-py3-none-" in wheel.name
    assert not wheel.name.endswith("-any.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    # From the wheel, with a cache that cannot be written and no compiler.
    done = python(
        "import requanto_cpu; print(requanto_cpu.path(), requanto_cpu.level())",
        PYTHONPATH=str(tmp_path / "installed"),
        REQUANTO_CACHE="/dev/null/none",
        CXX="/nonexistent",
    )
    assert done.stdout.startswith(str(tmp_path / "installed" / "requanto_cpu" / "built")), done.stderr
    # build/ of the first one is still there.
    pure = built_wheel(tmp_path / "source", tmp_path / "without", CXX="/nonexistent")
    assert pure.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(pure).namelist() if name.startswith("requanto_cpu/built")]


def tracked(module: str, listed: list[str]) -> bool:
    return any(
        f"{root}{module}{end}" in listed
        for root in ("src/", "kernels/", "kernels/torch-ext/")
        for end in (".py", "/__init__.py")
    )
