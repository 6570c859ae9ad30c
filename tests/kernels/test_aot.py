"""The kept tables of ahead-of-time compilations, and a selection that is compiled anew."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
from requanto_kernels.config import TRITONS

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
TABLES = BENCHMARKS / "results" / "kernel_aot"
#: Most instructions for each weight with one row of x, on sm_90: at 950 G warp instructions a second, an H200 reads the
#: weights from memory in about the same time.
TARGETS = {
    "wq_gemm int4row M=1": 2.6,
    "wq_gemm int4g128 M=1": 2.6,
    "wq_gemm int4g64a M=1": 3.4,
}


def rows_of(version: str) -> list[dict]:
    content = json.loads((TABLES / f"{version}.json").read_text())
    assert content["triton"].startswith(version)
    return [dict(zip(content["columns"], row, strict=True)) for row in content["rows"]]


def test_the_kept_tables_hold_every_program_as_it_is_now():
    # All of them take half an hour to compile: a change of a kernel or a tile asks for that here, by name.
    command = [sys.executable, str(BENCHMARKS / "kernel_aot.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    help = "\nto compile what changed: python benchmarks/kernel_aot.py --stale, with each version of Triton"
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:] + help


@pytest.mark.parametrize("version", TRITONS)
def test_instructions_a_weight(version):
    found = {name: row["per_weight"] for row in rows_of(version) if row["arch"] == "sm_90" for name in row["launches"]
             if row["program"].startswith("wq_gemm")}  # fmt: skip
    for name, most in TARGETS.items():
        assert 1 < found[name] <= most, (
            f"Triton {version}: {name} takes {found[name]} instructions a weight, at most {most}"
        )


@pytest.mark.slow
def test_shipped_families_compile(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(BENCHMARKS / "kernel_aot.py"), "--quick"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "0 with problems" in done.stdout
