"""Runs `interpreted/check_*.py` in a process of its own with TRITON_INTERPRET=1.

Triton decides at import whether kernels are compiled or interpreted, so the choice must not leak into, or depend on,
what other tests of this process import.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "kernels"


def test_interpreted():
    paths = [str(HERE), str(KERNELS), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {
        "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:xdist", "-o", "python_files=check_*.py"]
    command.append(str(HERE / "interpreted"))
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
