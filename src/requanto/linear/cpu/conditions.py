"""Which CPU implementation takes which GEMM. All numbers were measured: `python benchmarks/cpu_paths.py`, docs/cpu.md."""

from __future__ import annotations

import torch

from requanto.dtypes.qtypes import qint8
from requanto.linear.cpu import coded, library
from requanto.linear.cpu.gemm import BLOCKS8, BLOCKS16, FLOAT, PARTS, arithmetic, is_narrowed
from requanto.linear.cpu.strips import STRIPS
from requanto.linear.cpu.weights import fixed_table
from requanto.linear.registry import Problem

#: Every number of rows.
ANY = 2**62
#: Most rows of bfloat16 for the library's GEMM, by arithmetic, where torch's multiplies with AMX and the library was built
#: by a compiler that does not know it. (Level "bf16" on such a processor, 4096 x 4096.)
ROWS_WITHOUT_AMX = {BLOCKS8: 256, BLOCKS16: 64, FLOAT: 32, PARTS: ANY}


def on_cpu(problem: Problem) -> bool:
    """GEMMs of any weight on a CPU."""
    return problem.device == "cpu" and problem.dtype in library.FLOATS


def in_strips(problem: Problem) -> bool:
    """GEMMs with a packed weight as it is stored, for which there is the library."""
    return on_cpu(problem) and problem.layout == STRIPS.name and not problem.transposed and library.find() is not None


def gemm_rows(how: int, dtype: torch.dtype) -> int:
    """Most rows of x that the library's GEMM takes; more are multiplied by torch's, with a dequantized weight."""
    used = library.find()
    limited = dtype == torch.bfloat16 and used is not None and used.level == "bf16" and used.lacks_amx
    return ROWS_WITHOUT_AMX[how] if limited else ANY


def how_of(problem: Problem) -> int:
    """The arithmetic for a weight; a learned codebook is taken for one whose values integers stand for well."""
    kind = problem.qtype
    fixed = kind.is_codebook and not kind.is_learned
    error = fixed_table(kind).error if fixed else 0.0
    group = None if problem.group_size == problem.in_features else problem.group_size
    return arithmetic(kind, group, problem.rows, problem.dtype, error, problem.affine)


def takes(problem: Problem, *hows: int) -> bool:
    """GEMMs of float x with one of these arithmetics."""
    return (
        problem.activation is None
        and in_strips(problem)
        and (how := how_of(problem)) in hows
        and problem.rows <= gemm_rows(how, problem.dtype)
    )


def rounding_of_x(problem: Problem) -> str:
    """How `cpu-float` rounds x, for `explain`; "" if it does not."""
    if how_of(problem) == PARTS:
        return "; x as the sum of two bfloat16 numbers"
    return "; x rounded to bfloat16" if is_narrowed(problem.qtype, problem.rows, problem.dtype, FLOAT) else ""


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
