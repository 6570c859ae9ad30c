"""Triton kernels for low-bit matrix multiplication. Arguments and results are plain tensors; needs only torch and triton."""

from .config import Config
from .expert_bounds import expert_bounds
from .int_mm import int_mm
from .layout import from_exec_layout, group_major, has_exec_layout, to_exec_layout
from .quant_rows import quant_rows, round_rows
from .scaled_mm import scaled_mm
from .tune import tune
from .w4a8_gemm import w4a8_gemm
from .wq_dequant import wq_dequant
from .wq_gemm import wq_gemm
from .wq_gemm_dx import wq_gemm_dx
from .wq_gemm_grouped import wq_gemm_grouped
from .wq_gemm_many import wq_gemm_many

__all__ = [
    "Config",
    "expert_bounds",
    "from_exec_layout",
    "group_major",
    "has_exec_layout",
    "int_mm",
    "quant_rows",
    "round_rows",
    "scaled_mm",
    "to_exec_layout",
    "tune",
    "w4a8_gemm",
    "wq_dequant",
    "wq_gemm",
    "wq_gemm_dx",
    "wq_gemm_grouped",
    "wq_gemm_many",
]
