"""The sweep of sweep.py, without kernels and at lesser instruction sets, in a process of its own each."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import requanto_cpu

#: Types with paths of their own; what others take is the same on every processor.
OWN = ["int8", "int4", "int3", "float8", "nf4"]


def levels() -> list[str]:
    try:
        return requanto_cpu.levels()
    except requanto_cpu.LibraryUnavailable:
        return []


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"REQUANTO_CPU": "torch"},
        {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "REQUANTO_CPU": "avx2"},
        {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "REQUANTO_CPU": "avx512"},
        {"ATEN_CPU_CAPABILITY": "default", "REQUANTO_CPU": "torch"},
        {"REQUANTO_CPU_ARITHMETIC": "float"},
    ],
    ids=["native", "without kernels", "avx2", "avx512", "scalar", "float arithmetic"],
)
def test_every_type_and_shape(limits):
    wanted = limits.get("REQUANTO_CPU")
    if wanted not in (None, "torch", *levels()):
        pytest.skip(f"there is no level {wanted} here")
    script = Path(__file__).with_name("sweep.py")
    # Two threads here; beside other tests a second one waits more than it works.
    environment = {**os.environ, **limits, "OMP_NUM_THREADS": "1" if limits else "2"}
    command = [sys.executable, str(script), *(OWN if limits else ())]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "FAIL" not in done.stdout
    assert "cpu-dequantize" in done.stdout
    kernels = [name for name in ("cpu-integer", "cpu-float", "cpu-coded") if f" {name} " in done.stdout]
    if wanted == "torch" or not levels():
        assert not kernels
    elif "REQUANTO_CPU_ARITHMETIC" in limits:
        assert kernels == ["cpu-float", "cpu-coded"]
    else:
        assert kernels == ["cpu-integer", "cpu-float", "cpu-coded"]
