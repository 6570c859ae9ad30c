"""Conditions for the GPU implementations: correctness, and the number of rows from which dequantizing is faster.

Conditions for correctness are exact: they repeat the kernels' own checks. Those for speed are the tables `DEQUANTIZE_ROWS`,
which are not measured yet. Those for activations of 8 bits: `requanto.linear.gpu.eight_bit_conditions`.
"""

from __future__ import annotations

import functools
import logging

import torch

from requanto.dtypes.qtypes import qtype, qtypes
from requanto.linear.registry import Problem

logger = logging.getLogger(__name__)

#: Device types that Triton supports; ROCm devices are "cuda" as well.
DEVICES = ("cuda", "xpu")
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
#: Types that the kernels decode: integers, float8, small floats, and codebooks of fewer than 8 bits.
KINDS = frozenset(kind for kind in qtypes.values() if kind.bits < 8 or not kind.is_codebook)

#: (minimum compute capability, rows): from so many rows on, the weight is dequantized once and multiplied by the vendor's
#: library. The first entry that fits the GPU is used; (1, 1) is for GPUs without `has_matrix_instructions`, (0, ...) for
#: ROCm and XPU.
#:
#: NOT MEASURED. Dequantizing writes and reads 2 bytes per weight, about 1 ps per weight on an H200; a GEMM takes 2.6 ps per
#: weight with 1024 rows. A fused kernel at 0.75 of the library's speed loses more than that from 1024 .. 1600 rows on.
DEQUANTIZE_ROWS: tuple[tuple[int, int], ...] = ((90, 1024), (80, 512), (1, 1), (0, 1024))
#: The same for `x @ W` (gradients, transposed weights), whose kernel is simpler and has no split along the reduction axis.
DEQUANTIZE_ROWS_TRANSPOSED: tuple[tuple[int, int], ...] = ((90, 512), (80, 256), (1, 1), (0, 512))


@functools.cache
def available() -> bool:
    """True if the kernels can be imported and Triton has a driver; else logs one line, once."""
    try:
        import triton

        import requanto_kernels  # noqa: F401

        if not triton.knobs.runtime.interpret:
            triton.runtime.driver.active.get_current_target()
    except Exception as error:  # ImportError, or any error of Triton without a driver
        logger.warning(
            "GPU kernels are not available, quantized layers dequantize their weight in each GEMM: %s: %s. Install the "
            "version of Triton that this PyTorch needs.",
            type(error).__name__,
            str(error).splitlines()[0] if str(error) else "no message",
        )
        return False
    return True


@functools.cache
def _capability(kind: str, index: int) -> int:
    if kind != "cuda" or torch.version.hip:
        return 0
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def capability(kind: str) -> int:
    """Compute capability of the current device, e.g. 90 for sm_90; 0 for devices that are not from NVIDIA."""
    return _capability(kind, torch.cuda.current_device() if kind == "cuda" else 0)


def has_matrix_instructions(kind: str) -> bool:
    """True if Triton (3.7) generates matrix instructions (tensor cores) for the current device.

    Below sm_80 it does not: GEMM kernels run on the ordinary units with spilled registers, or do not compile. There, kernels
    only dequantize, and the vendor's library multiplies (`benchmarks/kernel_aot.py` compiles these kernels for sm_75).
    """
    found = capability(kind)
    return found == 0 or found >= 80


def has_decoder(problem: Problem) -> bool:
    """True if there are kernels that decode this type of codes on this device, for x of this dtype."""
    if problem.dtype not in FLOATS or not problem.in_features:
        return False
    return decodes(problem.device, problem.qtype, problem.layout)


def decodes(device: str, kind: qtype, layout: str) -> bool:
    """True if a kernel reads weights of a type and layout on the current device: on every GPU that Triton compiles for."""
    if device not in DEVICES or kind not in KINDS or layout not in ("plain", "exec") or not available():
        return False
    found = capability(device)
    return found == 0 or found >= 75


def without_kernel(problem: Problem) -> bool:
    """True on a GPU for what no GEMM kernel takes: without Triton or its driver, below sm_75; some cases of float64."""
    return problem.device in DEVICES and problem.layout == "plain" and not has_decoder(problem)


def weight_only(problem: Problem) -> bool:
    """True for `wq_gemm`, or `wq_gemm_dx` if the weight is transposed: every type, group size and layout."""
    return problem.activation is None and has_decoder(problem) and has_matrix_instructions(problem.device)


def dequantized(problem: Problem) -> bool:
    """True for so many rows that dequantizing and the vendor's library are expected to be faster than a fused kernel.

    Also for float64, which no GEMM kernel takes: weights are dequantized in float32.
    """
    if problem.dtype == torch.float64 and problem.activation is None and problem.in_features:
        return decodes(problem.device, problem.qtype, problem.layout)
    if problem.activation is not None or not has_decoder(problem):
        return False
    return problem.rows >= dequantize_from(problem.device, problem.transposed)


def dequantize_from(device: str, transposed: bool) -> int:
    """Number of rows from which `dequantized` is True on the current device."""
    return rows_for(DEQUANTIZE_ROWS_TRANSPOSED if transposed else DEQUANTIZE_ROWS, device)


def rows_for(table: tuple[tuple[int, int], ...], device: str) -> int:
    """The number of rows in a table of (minimum compute capability, rows): its first entry that fits the current device."""
    found = capability(device)
    return next(rows for least, rows in table if found >= least)
