"""llama.cpp's matrix multiplication of one weight, by ctypes: a graph of one node on its CPU backend.

Needs the libraries of llama-cpp-python (`llama_cpp/lib`). Codes are in the order in which llama.cpp has those of a model:
its CPU backend repacks a weight when that is copied into one of its extra buffer types, if the type has such an order.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from ctypes import c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

#: ggml_type
TYPES = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 8, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12}
F32 = 0
CPU_DEVICE = 0  # ggml_backend_dev_type


class _InitParameters(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


@functools.cache
def _library() -> Any:
    """Functions of ggml, by name, with their types."""
    spec = find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise ImportError("llama.cpp: this interpreter has no llama-cpp-python")
    folder = Path(spec.origin).parent / "lib"
    opened = [
        ctypes.CDLL(str(folder / f"lib{name}.so"), ctypes.RTLD_GLOBAL) for name in ("ggml-base", "ggml-cpu", "ggml")
    ]
    types: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "ggml_init": (c_void_p, (_InitParameters,)),
        "ggml_new_tensor_2d": (c_void_p, (c_void_p, c_int, c_int64, c_int64)),
        "ggml_mul_mat": (c_void_p, (c_void_p, c_void_p, c_void_p)),
        "ggml_new_graph": (c_void_p, (c_void_p,)),
        "ggml_build_forward_expand": (None, (c_void_p, c_void_p)),
        "ggml_row_size": (c_size_t, (c_int, c_int64)),
        "ggml_quantize_chunk": (c_size_t, (c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p)),
        "ggml_backend_dev_by_type": (c_void_p, (c_int,)),
        "ggml_backend_dev_init": (c_void_p, (c_void_p, c_char_p)),
        "ggml_backend_dev_backend_reg": (c_void_p, (c_void_p,)),
        "ggml_backend_dev_buffer_type": (c_void_p, (c_void_p,)),
        "ggml_backend_dev_supports_op": (c_bool, (c_void_p, c_void_p)),
        "ggml_backend_reg_get_proc_address": (c_void_p, (c_void_p, c_char_p)),
        "ggml_backend_cpu_set_n_threads": (None, (c_void_p, c_int)),
        "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, (c_void_p, c_void_p)),
        "ggml_backend_tensor_set": (None, (c_void_p, c_void_p, c_size_t, c_size_t)),
        "ggml_backend_tensor_get": (None, (c_void_p, c_void_p, c_size_t, c_size_t)),
        "ggml_backend_graph_compute": (c_int, (c_void_p, c_void_p)),
        "ggml_backend_buft_name": (c_char_p, (c_void_p,)),
    }
    found = SimpleNamespace()
    for name, (result, arguments) in types.items():
        function = next(getattr(library, name) for library in opened if hasattr(library, name))
        function.restype, function.argtypes = result, arguments
        setattr(found, name, function)
    return found


@functools.cache
def _backend(threads: int) -> tuple[c_void_p, c_void_p, list[c_void_p]]:
    """Backend, device, and the device's buffer types with orders of their own."""
    ggml = _library()
    device = ggml.ggml_backend_dev_by_type(CPU_DEVICE)
    backend = ggml.ggml_backend_dev_init(device, None)
    ggml.ggml_backend_cpu_set_n_threads(backend, threads)
    address = ggml.ggml_backend_reg_get_proc_address(
        ggml.ggml_backend_dev_backend_reg(device), b"ggml_backend_dev_get_extra_bufts"
    )
    extra: list[c_void_p] = []
    if address:
        types = ctypes.CFUNCTYPE(ctypes.POINTER(c_void_p), c_void_p)(address)(device)
        index = 0
        while types and types[index]:
            extra.append(types[index])
            index += 1
    return backend, device, extra


def _context() -> c_void_p:
    return _library().ggml_init(_InitParameters(2**20, None, True))


class Product:
    """x @ weight.T for a weight [N, K] in one of ggml's types.

    Attributes:
        nbytes: bytes of the codes and scales.
        order: name of the buffer type that holds them.
    """

    def __init__(self, whole: torch.Tensor, kind: str, threads: int) -> None:
        ggml, (backend, device, extra) = _library(), _backend(threads)
        rows, length = whole.shape
        if length % (256 if kind.endswith("K") else 32):
            raise ValueError(f"{kind} needs rows of whole blocks, K is {length}")
        self._backend, self._shape, self._kind = backend, (rows, length), TYPES[kind]
        size = ggml.ggml_row_size(self._kind, length)
        self.nbytes = rows * size
        codes = ctypes.create_string_buffer(self.nbytes)
        floats = whole.float().contiguous()
        ggml.ggml_quantize_chunk(self._kind, floats.data_ptr(), codes, 0, rows, length, None)
        default = ggml.ggml_backend_dev_buffer_type(device)
        for buffer_type in (*extra, default):
            self._keep = _context()
            self._weight = ggml.ggml_new_tensor_2d(self._keep, self._kind, length, rows)
            # A type is used as llama.cpp does: if a tensor of it multiplies here.
            if buffer_type is not default and not self._multiplies(device, buffer_type):
                continue
            if ggml.ggml_backend_alloc_ctx_tensors_from_buft(self._keep, buffer_type):
                break
        self.order = ggml.ggml_backend_buft_name(buffer_type).decode()
        ggml.ggml_backend_tensor_set(self._weight, codes, 0, self.nbytes)
        self._default = default

    def _multiplies(self, device: c_void_p, buffer_type: c_void_p) -> bool:
        """Whether a weight in a buffer of this type could be multiplied."""
        ggml = _library()
        trial = _context()
        weight = ggml.ggml_new_tensor_2d(trial, self._kind, self._shape[1], self._shape[0])
        if not ggml.ggml_backend_alloc_ctx_tensors_from_buft(trial, buffer_type):
            return False
        other = _context()
        x = ggml.ggml_new_tensor_2d(other, F32, self._shape[1], 512)
        return bool(ggml.ggml_backend_dev_supports_op(device, ggml.ggml_mul_mat(other, weight, x)))

    def bound(self, x: torch.Tensor) -> Callable[[], None]:
        """A function that computes the product with this x (float32, as llama.cpp's activations are)."""
        ggml = _library()
        context = _context()
        own = ggml.ggml_new_tensor_2d(context, F32, x.shape[1], x.shape[0])
        out = ggml.ggml_mul_mat(context, self._weight, own)
        graph = ggml.ggml_new_graph(context)
        ggml.ggml_build_forward_expand(graph, out)
        ggml.ggml_backend_alloc_ctx_tensors_from_buft(context, self._default)
        numbers = x.float().contiguous()
        ggml.ggml_backend_tensor_set(own, numbers.data_ptr(), 0, 4 * numbers.numel())
        compute, backend = ggml.ggml_backend_graph_compute, self._backend

        def run() -> None:
            if compute(backend, graph):
                raise RuntimeError("llama.cpp failed to compute a product")

        def result() -> torch.Tensor:
            found = torch.empty(x.shape[0], self._shape[0], dtype=torch.float32, device="cpu")
            ggml.ggml_backend_tensor_get(out, found.data_ptr(), 0, 4 * found.numel())
            return found

        run.result = result  # type: ignore[attr-defined]
        return run
