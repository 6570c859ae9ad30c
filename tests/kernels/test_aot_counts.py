"""How `benchmarks/kernel_aot.py` records launches and finds a kernel's main loop."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def loops():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import aot_loops

        return aot_loops
    finally:
        sys.path.remove(str(BENCHMARKS))


def code(text: str) -> list[str]:
    return [line.strip() for line in text.strip().splitlines()]


def test_a_loop_without_what_only_some_turns_execute(loops):
    # A spin behind the exit, and stores that a turn may branch over: neither is part of every turn.
    lines = code("""
        MOV R1 ;
        .L_x_1:
        HGMMA.64x16x16.F32.BF16 R4 ;
        @!P1 BRA `(.L_x_9) ;
        .L_x_2:
        @P0 BRA `(.L_x_3) ;
        STG.E [R2] ;
        STG.E [R3] ;
        .L_x_3:
        IADD3 R1 ;
        @P2 BRA `(.L_x_1) ;
        EXIT ;
        .L_x_9:
        NOP ;
        @!P1 BRA `(.L_x_9) ;
        BRA `(.L_x_2) ;
    """)
    turn, sometimes = loops.main_loop(lines, lambda line: "HGMMA" in line)
    assert [line.split()[0] for line in turn] == ["HGMMA.64x16x16.F32.BF16", "@!P1", "@P0", "IADD3", "@P2"]
    assert sum("STG" in line for line in sometimes) == 2
    assert len(sometimes) == 5


def test_the_inner_loop_is_the_main_one(loops):
    lines = code("""
        .L_x_0:
        MOV R1 ;
        .L_x_1:
        HMMA.16816.F32 R4 ;
        @P0 BRA `(.L_x_1) ;
        STG.E [R2] ;
        @P1 BRA `(.L_x_0) ;
        EXIT ;
    """)
    turn, sometimes = loops.main_loop(lines, lambda line: "HMMA" in line)
    assert (len(turn), sometimes) == (2, [])
    assert loops.main_loop(lines, lambda line: False) == ([], [])


RECORDED = """
import sys
sys.path.insert(0, sys.argv[1])
from aot_cases import Case, call_of
from aot_programs import record

first, *_ = record("sm_90", call_of(Case("wq_gemm", "int4g64a", 1)))
assert first.arch == "sm_90" and first.signature["s_ptr"] == first.signature["z_ptr"] == "*bf16", first
assert first.constant("M") == 1 and first.constant("GROUP") == 64 and first.constant("AFFINE")
again, *_ = record("sm_90", call_of(Case("wq_gemm", "int4g64a", 1, k=7168)))
assert first.key() == again.key(), "sizes that Triton does not specialize on make no other program"
many, *_ = record("sm_90", call_of(Case("wq_gemm", "int4g64a", 16)))
assert first.key() != many.key()
# Triton 3.10 turns it off where it is not asked for.
assert first.options["enable_fp_fusion"] is True, first.options
"""


def test_launches_are_recorded_without_a_device():
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", RECORDED, str(BENCHMARKS)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
