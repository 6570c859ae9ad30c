"""Conditions for the GPU implementations with activations of 8 bits: correctness, and which of two is faster.

Conditions for correctness are exact: they repeat the checks of the kernels and of torch's operators (2.11 to 2.13). Those
for speed are the tables `TORCH_FLOAT8_ROWS` and `TORCH_INT8_ROWS`, which are not measured yet. There is no least number of
rows for quantizing activations: a token gets the same codes, and the same sums of integers, in a batch of any size.
"""

from __future__ import annotations

import functools

import torch

from requanto.dtypes.qtypes import qfloat8_e4m3fn, qfloat8_e4m3fnuz, qint8, qtype
from requanto.linear.gpu import conditions as rules
from requanto.linear.registry import Problem

#: Largest K for which a sum of products of int8 codes (-128 .. 127) fits into int32.
LONGEST_INT8 = 2**17 - 1
#: More rows than a tensor has.
NEVER = 2**62

#: (least compute capability, rows): from so many rows on, float8 times float8 is `torch._scaled_mm`: cuBLAS, or CUTLASS
#: kernels of torch, and hipBLASLt on ROCm, whose entry is (0, ...). The first entry that fits the GPU is used.
#:
#: NOT MEASURED. On sm_90 cuBLAS reaches about 1.6 of its bf16, ours 1.25 .. 1.4, since a tile's end is not overlapped. With
#: fewer rows the weight's bytes bound both, and ours has tiles for few rows. See benchmarks/NOTES.md.
TORCH_FLOAT8_ROWS: tuple[tuple[int, int], ...] = ((100, 64), (89, 256), (0, 256))
#: The same for int8 times int8 and `torch._int_mm`. NOT MEASURED. Its int32 result is written, read and scaled by another
#: launch: 8 bytes for each element, as long as a third of the GEMM at 4096 x 4096 x 4096 on an H200. On sm_75 there is no
#: other integer GEMM.
TORCH_INT8_ROWS: tuple[tuple[int, int], ...] = ((80, NEVER), (75, 1), (0, NEVER))


@functools.cache
def _rocm_arch(index: int) -> str:
    return str(torch.cuda.get_device_properties(index).gcnArchName).split(":")[0]


def rocm_arch(kind: str) -> str:
    """Architecture of the current device if it is one of AMD's, e.g. ``"gfx942"``; else empty."""
    return _rocm_arch(torch.cuda.current_device()) if kind == "cuda" and torch.version.hip else ""


def float8_instructions(device: str, *kinds: qtype) -> bool:
    """True if the matrix units of the current device multiply these float8 types."""
    arch, fnuz = rocm_arch(device), [kind == qfloat8_e4m3fnuz for kind in kinds]
    if arch.startswith("gfx94"):
        return all(fnuz)
    return not any(fnuz) and (rules.capability(device) >= 89 or arch.startswith("gfx95"))


def _rounded_to(activation: qtype | None) -> bool:
    """True for types of activations whose codes kernels compute: int8 and float8."""
    return activation is not None and activation in rules.KINDS and activation.bits == 8 and not activation.is_unsigned


def _pair_of_8_bits(problem: Problem) -> bool:
    """True for int8 times int8 and float8 times float8, in the plain layout, with one scale per row of the weight."""
    activation, kind = problem.activation, problem.qtype
    if activation is None or not _rounded_to(activation) or kind.bits != 8 or kind.is_unsigned:
        return False
    if activation.is_floating_point != kind.is_floating_point or problem.layout != "plain":
        return False
    if not rules.has_decoder(problem) or problem.affine or problem.transposed:
        return False
    if problem.group_size not in (None, problem.in_features):
        return False
    return kind.is_floating_point or problem.in_features <= LONGEST_INT8


def both_8_bit(problem: Problem) -> bool:
    """True for `scaled_mm`: where the matrix units multiply the codes. For other float8 codes, each program would have to
    convert both operands, with 23 instructions a weight and more, so they are rounded."""
    if not _pair_of_8_bits(problem) or not rules.has_matrix_instructions(problem.device):
        return False
    assert problem.activation is not None
    return not problem.qtype.is_floating_point or float8_instructions(problem.device, problem.qtype, problem.activation)


def torch_float8(problem: Problem) -> bool:
    """True for `torch._scaled_mm` with scales of rows: e4m3 times e4m3 (fnuz on gfx94x), bfloat16, N and K multiples of 16,
    on sm_89, sm_90, sm_100, sm_103, gfx94x and gfx95x (cuBLAS has none for sm_120)."""
    kind = qfloat8_e4m3fnuz if rocm_arch(problem.device).startswith("gfx94") else qfloat8_e4m3fn
    if problem.qtype != kind or problem.activation != kind or not _pair_of_8_bits(problem):
        return False
    if problem.dtype != torch.bfloat16 or problem.out_features % 16 or problem.in_features % 16:
        return False
    if problem.in_features < 32 or problem.device == "xpu" or rules.capability(problem.device) >= 110:
        return False
    return float8_instructions(problem.device, kind) and problem.rows >= rules.rows_for(
        TORCH_FLOAT8_ROWS, problem.device
    )


def torch_int8(problem: Problem) -> bool:
    """True for `torch._int_mm`: NVIDIA GPUs, more than 16 rows, N and K multiples of 8."""
    if problem.qtype != qint8 or problem.activation != qint8 or not _pair_of_8_bits(problem):
        return False
    if (
        problem.rows <= 16
        or problem.out_features % 8
        or problem.in_features % 8
        or not rules.capability(problem.device)
    ):
        return False
    return problem.rows >= rules.rows_for(TORCH_INT8_ROWS, problem.device)


def int8_activations(problem: Problem) -> bool:
    """True for `w4a8_gemm`, on devices that run it."""
    if problem.transposed or (problem.qtype.bits == 8 and problem.layout != "plain"):
        return False
    if not integer_gemm(problem.qtype, problem.activation, problem.group_size, problem.in_features):
        return False
    return rules.has_decoder(problem) and rules.has_matrix_instructions(problem.device)


def integer_gemm(kind: qtype, activation: qtype | None, group_size: int | None, in_features: int) -> bool:
    """True for int8 activations and integer weights in groups that are powers of two of at least 32, or by row.

    Unsigned codes of 8 bits do not fit into int8.

    Args:
        group_size: None or K: one scale per row.
        in_features: K.
    """
    if activation != qint8 or kind.is_floating_point or kind.is_codebook or (kind.bits == 8 and kind.is_unsigned):
        return False
    if group_size is None or group_size == in_features:
        return in_features <= LONGEST_INT8
    return group_size >= 32 and not group_size & (group_size - 1)


def rounded_activations(problem: Problem) -> bool:
    """True for quantized activations without a GEMM of these codes: they are rounded, then multiplied as floats."""
    return _rounded_to(problem.activation) and rules.has_decoder(problem)
