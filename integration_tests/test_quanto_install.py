"""install_as_optimum_quanto, each time in a process of its own: it changes what `import` finds."""

import subprocess
import sys
from pathlib import Path

import pytest
from quanto_process import quanto_python


def run(*arguments, python=sys.executable):
    return subprocess.run([python, *map(str, arguments)], capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def promises():
    done = run(Path(__file__).with_name("_installed_as_quanto.py"))
    return done


@pytest.mark.parametrize("promise", ["names", "available", "cache", "transformers wrapper", "diffusers wrapper"])
def test_after_installing(promises, promise):
    assert promise in promises.stdout.splitlines(), promises.stderr[-3000:]


def test_it_refuses_when_the_real_package_is_imported():
    source = Path(__file__).parent.parent / "src"
    code = f"""
import sys; sys.path[:0] = [{str(source)!r}, {str(source.parent / "kernels")!r}]
import optimum.quanto
from requanto.integrations.optimum_quanto.install import install_as_optimum_quanto
try:
    install_as_optimum_quanto()
except RuntimeError as error:
    print(error)
"""
    done = run("-c", code, python=quanto_python())
    assert "optimum-quanto is imported already" in done.stdout, done.stderr[-3000:]
    assert "before anything imports optimum.quanto" in done.stdout
