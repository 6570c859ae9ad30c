"""What integration tests share: two real models, and two threads as on the machines that run them."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

# Compiled kernels are made as they are for a user, but beside pytest's cache.
os.environ.setdefault("REQUANTO_CACHE", str(Path(__file__).parents[1] / ".pytest_cache" / "requanto"))

import pytest
import torch
from real_models import ModelNotAvailable
from real_models import minilm_dir as fetch_minilm
from real_models import smollm2_dir as fetch_smollm2
from real_models import smollm2_gguf as fetch_smollm2_gguf

import requanto


@pytest.fixture(scope="session", autouse=True)
def two_threads() -> Iterator[None]:
    """Sums are split by thread: with a fixed number, results are the same on every machine of one kind."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def same_compiler() -> Iterator[None]:
    """PEFT's BOFT leaves CXX=gcc behind where its CUDA code cannot be built: the CPU kernels would be built once more."""
    names = ("CC", "CXX")
    before = {name: os.environ[name] for name in names if name in os.environ}
    yield
    for name in names:
        os.environ.pop(name, None)
    os.environ.update(before)


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """SmolLM2-135M-Instruct, a bfloat16 checkpoint."""
    return _fetched(fetch_smollm2)


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as llama.cpp's file."""
    return _fetched(fetch_smollm2_gguf)


@pytest.fixture(scope="session")
def minilm_dir() -> Path:
    """all-MiniLM-L6-v2, a float32 checkpoint."""
    return _fetched(fetch_minilm)


def _fetched(fetch: Callable[[], Path]) -> Path:
    try:
        return fetch()
    except ModelNotAvailable as error:
        message = str(error)
    # A failure, never a skip: a run without the real models must not look like one that passed.
    pytest.fail(f"The real model is not to be had: {message}", pytrace=False)


@pytest.fixture
def float_arithmetic(monkeypatch):
    """x is not rounded in GEMMs on a CPU, so that results can be compared closely with those of float weights."""
    monkeypatch.setattr(requanto.settings, "cpu_arithmetic", "float")


@pytest.fixture(scope="module")
def float_in_processes():
    """The same in the processes that a test starts: FSDP's weights stay plain, those of one process are packed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(requanto.settings, "cpu_arithmetic", "float")
        patch.setenv("REQUANTO_CPU_ARITHMETIC", "float")
        yield


@pytest.fixture
def exact(float_arithmetic, monkeypatch):
    """Besides, weights stay plain, so that results can be compared bit by bit: packed, sums have another order."""
    monkeypatch.setattr(requanto.settings, "pack_on_first_use", False)
