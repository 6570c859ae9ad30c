"""When the GPU kernels are right, and from how many rows on another way is expected to be faster.

Conditions about correctness are exact: each repeats what the kernel's own checks would refuse. Conditions about speed are
data in one place, `DEQUANTIZE_ROWS`, and not measured yet.
"""

from __future__ import annotations

import functools
import logging

import torch

from requanto.dtypes.qtypes import (
    qfloat8_e4m3fn,
    qfloat8_e4m3fnuz,
    qfloat8_e5m2,
    qint2,
    qint4,
    qint8,
    quint2,
    quint4,
)
from requanto.linear.registry import Problem

logger = logging.getLogger(__name__)

#: Device types that Triton serves; ROCm calls its devices "cuda".
DEVICES = ("cuda", "xpu")
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
#: Types that the kernels decode. (quint2 and quint4 are stored as the affine form of qint2 and qint4 is.)
KINDS = (qint2, quint2, qint4, quint4, qint8, qfloat8_e4m3fn, qfloat8_e4m3fnuz, qfloat8_e5m2)
#: K up to which a sum of products of int8 codes (-128 .. 127 times -127 .. 127) fits into int32.
LONGEST_INT8 = 2**17

#: (least compute capability, rows): from so many rows on, the weight is rebuilt once and multiplied by the vendor's library.
#: The first row that a GPU reaches counts. (1, 1): what cannot `multiplies`; (0, ...): ROCm and XPU.
#:
#: NOT MEASURED. Rebuilding writes and reads 2 bytes a weight: about 1 ps a weight on an H200, while a product takes 2.6 ps a
#: weight at 1024 rows. A fused kernel at 0.75 of the library's speed loses more than that from 1024 .. 1600 rows on.
DEQUANTIZE_ROWS: tuple[tuple[int, int], ...] = ((90, 1024), (80, 512), (1, 1), (0, 1024))
#: The same for `x @ W` with W stored row by row (gradients, transposed weights): that kernel is simpler and does not split.
DEQUANTIZE_ROWS_TRANSPOSED: tuple[tuple[int, int], ...] = ((90, 512), (80, 256), (1, 1), (0, 512))


@functools.cache
def available() -> bool:
    """True where the kernels can be imported and Triton has a driver; says why not, once, in one line."""
    try:
        import triton

        import requanto_kernels  # noqa: F401

        if not triton.knobs.runtime.interpret:
            triton.runtime.driver.active.get_current_target()
    except Exception as error:  # an ImportError, or whatever a Triton without a driver raises
        logger.warning(
            "GPU kernels are off, quantized layers dequantize at each product: %s: %s. Install the Triton that belongs "
            "to this PyTorch.",
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
    """Compute capability of the current device, 90 for sm_90; 0 for anything that is not from NVIDIA."""
    return _capability(kind, torch.cuda.current_device() if kind == "cuda" else 0)


def multiplies(kind: str) -> bool:
    """True where Triton (3.7) emits matrix instructions.

    Below sm_80 it does not: products there run on the ordinary units, out of spilled registers, or do not compile at all.
    What is left is to decode, and the vendor's library (`benchmarks/kernel_aot.py` compiles the decoders for sm_75).
    """
    found = capability(kind)
    return found == 0 or found >= 80


def served(problem: Problem) -> bool:
    """The device, the dtype and the type of the codes have kernels that decode."""
    if problem.device not in DEVICES or problem.dtype not in FLOATS or problem.qtype not in KINDS:
        return False
    if not problem.in_features or problem.layout not in ("plain", "exec") or not available():
        return False
    found = capability(problem.device)
    return found == 0 or found >= 75


def undecoded(problem: Problem) -> bool:
    """A GPU, and codes that no kernel reads: other widths than 2, 4 and 8 bits, codebooks, quint8."""
    return problem.device in DEVICES and problem.qtype not in KINDS


def weight_only(problem: Problem) -> bool:
    """`wq_gemm`, or `wq_gemm_dx` for a transposed weight: every type, group and layout."""
    return problem.activation is None and served(problem) and multiplies(problem.device)


def dequantized(problem: Problem) -> bool:
    """So many rows that the vendor's library is expected to win, the rebuilding of the weight included."""
    if problem.activation is not None or not served(problem):
        return False
    return problem.rows >= dequantize_from(problem.device, problem.transposed)


def dequantize_from(device: str, transposed: bool) -> int:
    """Rows from which on `dequantized` holds on the current device."""
    found = capability(device)
    table = DEQUANTIZE_ROWS_TRANSPOSED if transposed else DEQUANTIZE_ROWS
    return next(rows for least, rows in table if found >= least)


def both_8_bit(problem: Problem) -> bool:
    """`scaled_mm`: int8 times int8 or float8 times float8, one scale a row of the weight."""
    activation, kind = problem.activation, problem.qtype
    if activation not in KINDS or activation.bits != 8 or kind.bits != 8:
        return False
    if not served(problem) or not multiplies(problem.device):
        return False
    if activation.is_floating_point != kind.is_floating_point:
        return False
    if problem.affine or problem.transposed or problem.group_size not in (None, problem.in_features):
        return False
    return kind.is_floating_point or problem.in_features <= LONGEST_INT8


def int8_activations(problem: Problem) -> bool:
    """`w4a8_gemm`: integer weights in groups that are powers of two of at least 32, or per row."""
    if problem.activation != qint8 or problem.qtype.is_floating_point or problem.transposed:
        return False
    if not served(problem) or not multiplies(problem.device):
        return False
    group = problem.group_size
    if group in (None, problem.in_features):
        return problem.in_features <= LONGEST_INT8
    if group < 32 or group & (group - 1):
        return False
    return problem.layout == "plain" or group % exec_block(problem.qtype.bits) == 0


def rounded_activations(problem: Problem) -> bool:
    """Quantized activations that no integer or float8 product takes: rounded to their codes, multiplied as floats."""
    return problem.activation in KINDS and problem.activation.bits == 8 and served(problem)


def exec_block(bits: int) -> int:
    """Codes along K in one block of the execution layout."""
    return 512 // bits
