"""The C interface (csrc/requanto_cpu.h) for ctypes: the same structs, constants and functions, in the same order."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char_p, c_float, c_int, c_int32, c_int64, c_uint8, c_void_p

#: Version of the interface; a library of another one is not used.
ABI = 3

#: Rows of a strip, columns of a unit.
ROWS, COLUMNS = 16, 32

# RqDtype
NONE, F32, F16, BF16, U8 = range(5)
# RqCode
INTEGER, TABLE, E4M3, E5M2, E4M3FNUZ = range(5)
# RqScaleKind
NO_SHIFT, PLAIN, CODES, E8M0, E4M3S = range(5)
# RqArithmetic
BLOCKS8, BLOCKS16, FLOAT, CODED, PARTS = range(5)
# RqError
E_LEVEL, E_MISSING, E_ARGUMENT, E_SCRATCH, E_MEMORY, E_INDEX = range(-1, -7, -1)


class RqWeight(ctypes.Structure):
    """A quantized weight [N, K]; pointers are addresses, which the caller keeps alive."""

    _fields_ = [
        ("codes", c_void_p),
        ("rows", c_int64),
        ("length", c_int64),
        ("group", c_int64),
        ("groups", c_int64),
        ("bits", c_int32),
        ("code", c_int32),
        ("zero_code", c_int32),
        ("block", c_int32),
        ("table", c_void_p),
        ("levels", c_void_p),
        ("level_scale", c_float),
        ("scale_kind", c_int32),
        ("scale_dtype", c_int32),
        ("shift_kind", c_int32),
        ("shift_dtype", c_int32),
        ("scale", c_void_p),
        ("shift", c_void_p),
        ("scale_stride_n", c_int64),
        ("scale_stride_g", c_int64),
        ("shift_stride_n", c_int64),
        ("shift_stride_g", c_int64),
        ("row_scale", c_void_p),
        ("row_shift", c_void_p),
        ("row_dtype", c_int32),
        ("scale_bits", c_int32),
        ("shift_bits", c_int32),
        ("scale_groups", c_int64),
        ("scale_zero", c_int32),
        ("shift_factor", c_float),
    ]


class RqGemm(ctypes.Structure):
    """One GEMM, ``out = x @ weight.T + bias``."""

    _fields_ = [
        ("weight", POINTER(RqWeight)),
        ("rows", c_int64),
        ("x_stride", c_int64),
        ("out_stride", c_int64),
        ("x_dtype", c_int32),
        ("out_dtype", c_int32),
        ("arithmetic", c_int32),
        ("bias_dtype", c_int32),
        ("bias", c_void_p),
        ("steps", c_void_p),
        ("scratch_bytes", c_int64),
        ("column", c_void_p),
        ("column_dtype", c_int32),
    ]


_WEIGHT, _GEMM = POINTER(RqWeight), POINTER(RqGemm)
_FUNCTIONS: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "rq_levels": (c_char_p, ()),
    "rq_built": (c_char_p, ()),
    "rq_set_level": (c_int, (c_char_p,)),
    "rq_level": (c_char_p, ()),
    "rq_error": (c_char_p, (c_int,)),
    "rq_abi": (c_int, ()),
    "rq_set_parallel": (None, (c_void_p, c_void_p)),
    "rq_forked": (c_int, ()),
    "rq_gemm_scratch": (c_int64, (_GEMM, c_int64)),
    "rq_gemm_least_scratch": (c_int64, (_GEMM,)),
    "rq_gemm": (c_int, (_GEMM, c_void_p, c_void_p, c_void_p)),
    "rq_dequantize": (c_int, (_WEIGHT, c_int64, c_int64, c_void_p, c_void_p, c_int32, c_int64)),
    "rq_dequantize_plain": (c_int, (_WEIGHT, c_int32, c_int64, c_int64, c_void_p, c_void_p, c_int32, c_int64)),
    "rq_pack": (c_int, (c_void_p, c_int32, c_int64, c_int64, c_uint8, c_void_p)),
    "rq_unpack": (c_int, (c_void_p, c_int32, c_int64, c_int64, c_uint8, c_int64, c_int64, c_void_p)),
    "rq_codes": (c_int, (c_void_p, c_int32, c_int64, c_int64, c_uint8, c_int64, c_int64, c_void_p, c_void_p)),
    "rq_rows_to_int8": (c_int, (c_void_p, c_int32, c_int64, c_int64, c_int64, c_void_p, c_void_p, c_void_p)),
    "rq_float_linear": (
        c_int,
        (c_void_p, c_int32, c_int64, c_int64, c_int64, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_int64),
    ),
}


def declare(library: ctypes.CDLL) -> None:
    """Sets the types of all functions.

    Raises:
        AttributeError: the library lacks one of them.
    """
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
