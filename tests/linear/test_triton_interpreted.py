"""Runs `interpreted/check_*.py` in a process of its own: Triton decides at import whether kernels are interpreted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def test_interpreted():
    paths = [
        str(ROOT / "tests" / "kernels"),
        str(ROOT / "kernels"),
        str(ROOT / "src"),
        os.environ.get("PYTHONPATH", ""),
    ]
    env = os.environ | {
        "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:xdist", "-o", "python_files=check_*.py"]
    command.append(str(HERE / "interpreted"))
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
