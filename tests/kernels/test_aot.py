"""A selection of the ahead-of-time compilations; `python benchmarks/kernel_aot.py` does all of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]


def test_the_kept_table_holds_every_case_as_it_is_now():
    # All of it takes a quarter of an hour to compile: a change of a kernel or a tile asks for that here, by name.
    command = [sys.executable, str(ROOT / "benchmarks" / "kernel_aot.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    help = "\nto compile what changed: python benchmarks/kernel_aot.py --stale"
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:] + help


@pytest.mark.slow
def test_shipped_families_compile(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(ROOT / "benchmarks" / "kernel_aot.py"), "--quick"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "0 with problems" in done.stdout
