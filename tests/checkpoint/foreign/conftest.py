"""Files of other libraries, written by those libraries themselves in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from requanto.checkpoint.format import rebuild

ROOT = Path(__file__).parents[3]
#: what `make test` installs from tests/formats.txt
LIBRARIES = Path(sys.prefix) / "formats"
WRITERS = Path(__file__).parent / "writers"


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``written("hqq")`` runs writers/hqq.py once in a session and returns the folder that it filled."""
    done: dict[tuple[str, ...], Path] = {}

    def run(name: str, *arguments: str) -> Path:
        key = (name, *arguments)
        if key not in done:
            if not LIBRARIES.is_dir():
                pytest.fail(f"{LIBRARIES} is missing: make test installs the libraries of tests/formats.txt there")
            out = tmp_path_factory.mktemp(name)
            # Requanto is on the path too, for helpers of the writers; importing it there is not needed.
            path = os.pathsep.join([str(LIBRARIES), str(WRITERS), str(ROOT / "src"), str(ROOT / "kernels")])
            env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            command = [sys.executable, str(WRITERS / f"{name}.py"), str(out), *arguments]
            result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
            assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
            done[key] = out
        return done[key]

    return run


@pytest.fixture(scope="session")
def made() -> Callable[..., dict[str, torch.Tensor]]:
    """``made(found, source)``: all weights that a reader found, each checked as when a checkpoint is loaded."""

    def build(found, source, dtype=torch.float32):
        weights = {
            name: rebuild(name, weight.text, weight.build(source), dtype) for name, weight in found.weights.items()
        }
        for name, weight in found.floats.items():
            weights[name] = weight.build(source)
            assert (weights[name].shape, weights[name].dtype) == (weight.shape, weight.dtype), name
        assert found.consumed <= set(source)
        return weights

    return build
