"""Runs a script in a process of its own with the real optimum-quanto."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest


def quanto_python():
    """A Python with the real package: REQUANTO_QUANTO_PYTHON names one where this one has not."""
    python = os.environ.get("REQUANTO_QUANTO_PYTHON")
    if python is None:
        try:
            importlib.metadata.version("optimum-quanto")
        except importlib.metadata.PackageNotFoundError:
            pytest.skip("optimum-quanto is not installed (pip install --no-deps optimum-quanto==0.2.7)")
        python = sys.executable
    return python


def run_oracle(script, *arguments):
    """Runs a script of this folder with it."""
    command = [quanto_python(), Path(__file__).with_name(script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
