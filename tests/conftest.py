"""Every test computes on one thread: the machines that run them are small, and several workers share one.

The library of CPU kernels is built once and kept beside pytest's cache.
"""

import contextlib
import importlib
import os
from pathlib import Path

os.environ.setdefault("REQUANTO_CACHE", str(Path(__file__).parents[1] / ".pytest_cache" / "requanto"))

import pytest
import torch
from cpu_levels import Levels

import requanto_cpu

torch.set_num_threads(1)


def pytest_configure(config):
    config.pluginmanager.register(Levels())


def pytest_sessionstart(session):
    """Builds all levels of the CPU kernels: at a first use only the level of the processor is built."""
    if session.config.option.markexpr != "gpu":
        with contextlib.suppress(requanto_cpu.LibraryUnavailable):  # the closing line says so
            requanto_cpu.build_all()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Also in a process that has run integration tests before, with two: forks do not have the threads of their parent."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


try:
    from hypothesis import settings
except ImportError:  # `make gpu-test` installs nothing, and its tests do without
    pass
else:
    # Shared machines stall: a slow example is no failure. The same examples on every run.
    settings.register_profile("requanto", deadline=None, max_examples=40, derandomize=True)
    settings.load_profile("requanto")


@pytest.fixture
def part(monkeypatch):
    """Imports a module of benchmarks/gpu_check by name."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
    return lambda name: importlib.import_module(f"gpu_check.{name}")


@pytest.fixture
def float_arithmetic(monkeypatch):
    """x is not rounded in GEMMs on a CPU, so that results can be compared closely."""
    from requanto import settings

    monkeypatch.setattr(settings, "cpu_arithmetic", "float")


@pytest.fixture
def exact(float_arithmetic, monkeypatch):
    """Besides, weights stay plain until a test packs them: packed, sums have another order."""
    from requanto import settings

    monkeypatch.setattr(settings, "pack_on_first_use", False)
