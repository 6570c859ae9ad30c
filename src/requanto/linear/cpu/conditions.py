"""Which CPU implementation takes which GEMM. All numbers were measured: `python benchmarks/cpu_paths.py`, docs/cpu.md."""

from __future__ import annotations

import torch

from requanto.dtypes.qtypes import qint8, qtype
from requanto.linear.cpu import coded, library
from requanto.linear.cpu.gemm import BLOCKS8, BLOCKS16, FLOAT, arithmetic
from requanto.linear.cpu.strips import STRIPS
from requanto.linear.cpu.weights import fixed_table
from requanto.linear.registry import Problem

#: dtypes of x that these implementations take.
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
#: Most rows for which the library's GEMM is at least as fast as dequantizing the weight and torch's GEMM, by arithmetic:
#: any number, but for 16 bits of x on processors that multiply bfloat16. There two int8 products take as long as one of
#: bfloat16, and a few per cent for their sums (1024 x 1024, 512 rows: 0.91 of bfloat16; dequantizing takes as long).
ANY = 2**62
ROWS = {BLOCKS8: ANY, BLOCKS16: ANY, FLOAT: ANY}
ROWS_BFLOAT16 = {BLOCKS8: ANY, BLOCKS16: 512, FLOAT: ANY}
#: With AMX, which torch's bfloat16 GEMM uses and the library does not. Computed, since no such processor was at hand:
#: dequantizing takes as long as 30 to 60 rows of the library's GEMM, and AMX multiplies eight times as fast as that.
ROWS_AMX = {BLOCKS8: 64, BLOCKS16: 32, FLOAT: 32}


def on_cpu(problem: Problem) -> bool:
    """GEMMs of any weight on a CPU."""
    return problem.device == "cpu" and problem.dtype in FLOATS


def in_strips(problem: Problem) -> bool:
    """GEMMs with a packed weight as it is stored, for which there is the library."""
    return on_cpu(problem) and problem.layout == STRIPS.name and not problem.transposed and library.find() is not None


def gemm_rows(kind: qtype, how: int, dtype: torch.dtype) -> int:
    """Most rows of x that the library's GEMM takes."""
    used = library.find()
    if dtype != torch.bfloat16 or used is None or not used.has_bfloat16:
        return ROWS[how]
    return (ROWS_AMX if used.level == "amx" else ROWS_BFLOAT16)[how]


def how_of(kind: qtype) -> int:
    """The arithmetic for a type; a learned codebook is taken for one whose values integers stand for well."""
    fixed = kind.is_codebook and not kind.is_learned
    return arithmetic(kind, fixed_table(kind).error if fixed else 0.0)


def takes(problem: Problem, how: int) -> bool:
    """GEMMs of float x with that arithmetic."""
    return (
        problem.activation is None
        and in_strips(problem)
        and how_of(problem.qtype) == how
        and problem.rows <= gemm_rows(problem.qtype, how, problem.dtype)
    )


def takes_coded(problem: Problem) -> bool:
    """GEMMs of x in int8 and integer weights."""
    kind = problem.qtype
    return (
        problem.activation == qint8
        and in_strips(problem)
        and not kind.is_codebook
        and not kind.is_floating_point
        and (problem.group_size is not None or problem.in_features <= coded.MAX_K)
    )
