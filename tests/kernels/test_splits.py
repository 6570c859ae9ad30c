"""The order of memory in splits of K, read from machine code: nothing else shows that a fence is there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

COMPILED = """
import re, sys
sys.path.insert(0, sys.argv[1])
from aot_cases import Case, call_of
from aot_counts import disassemble
from aot_programs import record

(program,) = record("sm_90", call_of(Case("wq_gemm", "int4g64a", 1)))
assert program.constant("SPLIT"), "one launch, which shares K"
lines, _ = disassemble(program.compile(), "sm_90")
found = " ".join(re.sub(r"^@!?U?P\\d+ ", "", line).split()[0] for line in lines)
# All parts are stored; a barrier; one thread publishes them, counts and empties its L1 cache; a barrier; parts are read.
order = ("STG.E", "BAR.SYNC", "MEMBAR.ALL.GPU", "ATOMG.E.CAS.64.STRONG.GPU CCTL.IVALL", "BAR.SYNC", "LDG.E.STRONG.GPU")
order = ".*? ".join(re.escape(step) for step in order)
assert re.search(order, found), found[-4000:]
assert len(re.findall("ATOMG", found)) == 2 == len(re.findall(r"MEMBAR\\.\\w+\\.GPU", found))
"""


def test_the_last_program_sees_all_parts(tmp_path):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", COMPILED, str(BENCHMARKS)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
