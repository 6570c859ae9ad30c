"""Registers the CPU implementations. All conditions were measured (`requanto.linear.cpu.conditions`).

In order of preference:

    cpu-coded       integers, packed, int8 activations: int8 times the codes, with exact int32 sums
    cpu-integer     up to 5 bits, packed: x in int8, one scale for each block of 32 columns
    cpu-integer-16  6 to 8 bits, packed: the same with x in 16 bits
    cpu-float       packed: float8, groups that are no multiples of 32, many rows of 6 to 8 bits in bfloat16; with
                    ``cpu_arithmetic="float"`` all types: codes become floats in registers or in the cache
    cpu-dequantize  everything else: dequantized block by block into a scratch buffer, then torch's GEMM

The first four are kernels of the C library (`requanto.linear.cpu.library`); without it the last one runs.
"""

from __future__ import annotations

from requanto.linear.cpu import coded, conditions, experts, gemm, multiply
from requanto.linear.registry import Implementation, register

for _implementation in (
    Implementation(
        name="cpu-coded",
        run=coded.run,
        make_plan=coded.make_plan,
        plans_operators=True,
        supports=conditions.takes_coded,
        reason="x in int8 times the packed codes, exact int32 sums",
    ),
    Implementation(
        name="cpu-integer",
        run=gemm.run,
        run_grouped=experts.run_grouped,
        make_plan=gemm.make_plan,
        plans_operators=True,
        supports=lambda p: conditions.takes(p, gemm.BLOCKS8),
        reason="x rounded to int8 in blocks of 32 columns, times the packed codes as integers",
    ),
    Implementation(
        name="cpu-integer-16",
        run=gemm.run,
        run_grouped=experts.run_grouped,
        make_plan=gemm.make_plan,
        plans_operators=True,
        supports=lambda p: conditions.takes(p, gemm.BLOCKS16),
        reason="x rounded to 16 bits in blocks of 32 columns, times the packed codes as integers",
    ),
    Implementation(
        name="cpu-float",
        run=gemm.run,
        run_grouped=experts.run_grouped,
        make_plan=gemm.make_plan,
        plans_operators=True,
        supports=lambda p: conditions.takes(p, gemm.FLOAT, gemm.PARTS),
        details=conditions.rounding_of_x,
        reason="packed codes are dequantized in registers and in the cache, products are floats",
    ),
    Implementation(
        name="cpu-dequantize",
        run=multiply.run,
        make_plan=multiply.make_plan,
        plans_operators=True,
        supports=conditions.on_cpu,
        run_grouped=experts.run_grouped,
        reason="dequantized block by block into a scratch buffer, then torch's GEMM; x is not rounded",
    ),
):
    register(_implementation, before="reference")
