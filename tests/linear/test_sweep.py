"""The sweep of sweep.py, here and on lesser instruction sets, in a process of its own each."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from requanto.linear.cpu import onednn_bf16, onednn_int8
from requanto.linear.cpu.aot import cache

#: Types with paths of their own; what others take is the same on every processor, compiled kernels or not.
OWN = ["int8", "int4", "int3", "int2", "float8", "nf4"]
COMPILED = ["cpu-compiled-int4", "cpu-compiled-int8", "cpu-compiled-int8-int8", "cpu-compiled-float8"]


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"REQUANTO_COMPILE": "0"},
        {
            "ATEN_CPU_CAPABILITY": "avx2",
            "ONEDNN_MAX_CPU_ISA": "AVX2",
            "REQUANTO_COMPILE": "0",
        },  # kernels: test_compiled.py
        {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},  # int8 products without VNNI saturate: they must not be used
        {"ATEN_CPU_CAPABILITY": "default", "REQUANTO_COMPILE": "0"},
    ],
    ids=["native", "eager", "avx2", "avx512-without-vnni", "scalar"],
)
def test_every_type_and_shape(limits):
    script = Path(__file__).with_name("sweep.py")
    # Two threads here; beside other tests a second one waits more than it works.
    environment = {**os.environ, **limits, "OMP_NUM_THREADS": "1" if limits else "2"}
    command = [sys.executable, str(script), *(OWN if limits else ())]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "cpu-dequantize" in done.stdout
    if not limits:
        assert "FAIL" not in done.stdout
    compiled = [path for path in COMPILED if path in done.stdout]
    if not limits and cache.compiler() is not None and onednn_bf16.works() and onednn_int8.works():
        assert compiled == COMPILED
    if limits.get("REQUANTO_COMPILE") == "0":
        assert not compiled
