"""The form a kernel runs on, held *in place of* the stored codes: memory is paid once.

A QTensor is plain (its codes are a tensor) or packed (a `Packed` holds them, reordered for one kernel). A packed tensor
turns plain again, bit for bit, as soon as anyone reads ``qdata``: whatever saves, copies, moves, slices or dequantizes sees
the stored form and knows nothing of packing. Products, which would only lose by that, ask for ``packed`` first.

Operators take tensors, and a packed form may be none that torch.compile can trace. So a packed QTensor shows operators a
*handle*: an int64 tensor with one number, under which `find` knows the packed form. Handles are never used twice. A form
that is one tensor needs no number: it is its own handle, known by a dtype that codes never have (`register_form`).
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

#: Packing and unpacking happen under this lock: threads may meet in one layer.
LOCK = threading.RLock()

_numbers = itertools.count(1)
_held: WeakValueDictionary[int, Packed] = WeakValueDictionary()
_forms: dict[torch.dtype, Callable[[torch.Tensor, int], Packed]] = {}


P = TypeVar("P", bound="Packed")


class Packed:
    """Codes in the form of one kernel.

    Attributes:
        layout: name of the form, a field of `requanto.linear.Problem`.
        handle: what operators get in place of the codes.
        row_scales: buffers of `row_scale`, by length.
        travels: True where forward and backward take the handle outside of torch.compile too; else they take the codes.
    """

    layout: str
    travels: bool = False

    def __init__(self) -> None:
        self.row_scales: dict[int, torch.Tensor] = {}
        number = next(_numbers)
        self.handle = torch.tensor([number], dtype=torch.int64)
        _held[number] = self

    def row_scale(self, weight: Any, rows: int) -> torch.Tensor:
        """The scales of the rows as kernels read them: float32 ``[rows]``, zeros behind the weight's own.

        The weight's own memory where it is that; else a buffer that is kept with this form and written anew at each call, so
        that whoever holds it sees a changed scale.
        """
        scale = weight.scale.reshape(-1)
        if scale.dtype == torch.float32 and scale.is_contiguous() and len(scale) == rows:
            return scale
        held = self.row_scales.get(rows)
        if held is None:
            with torch.inference_mode(False):
                held = self.row_scales[rows] = torch.zeros(rows, dtype=torch.float32, device=scale.device)
        with torch.no_grad():
            held[: len(scale)].copy_(scale)
        return held

    def plain(self) -> torch.Tensor:
        """The stored codes, bit for bit."""
        raise NotImplementedError

    @property
    def pinned(self) -> bool:
        """True where the memory must stay as it is (a captured graph reads it): readers of the codes get a copy."""
        return False

    def write(self, codes: torch.Tensor) -> None:
        """Takes new stored codes, in place; only forms that can be `pinned` need it."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Bytes that the packed codes take."""
        raise NotImplementedError


def packed_as(weight: Any, form: type[P], pack: Callable[[Any], P]) -> P:
    """The weight's packed form; packed anew where another thread has read the stored codes since the table was asked."""
    packed = weight.packed
    return packed if isinstance(packed, form) else pack(weight)


def is_handle(qdata: torch.Tensor) -> bool:
    """True for the handle of a packed form; codes are never int64."""
    return qdata.dtype == torch.int64 or qdata.dtype in _forms


def register_form(dtype: torch.dtype, make: Callable[[torch.Tensor, int], Packed]) -> None:
    """Names the dtype by which a form that is its own handle is known; ``make(handle, bits)`` wraps one."""
    _forms[dtype] = make


def is_fake(tensor: torch.Tensor) -> bool:
    """True while torch.compile traces: such a tensor has no numbers to read."""
    return is_traceable_wrapper_subclass(tensor) or type(tensor) not in (torch.Tensor, torch.nn.Parameter)


def find(handle: torch.Tensor, bits: int = 8) -> Packed:
    """The packed form behind a handle. bits: of the codes; forms that are their own handle need it.

    Raises:
        RuntimeError: it is gone: the weight was freed, or made plain, after the handle was read.
    """
    if handle.dtype in _forms:
        return _forms[handle.dtype](handle, bits)
    packed = _held.get(int(handle))
    if packed is None:
        raise RuntimeError(
            "the packed form of a quantized weight is gone: its layer was freed, moved or changed after the model was "
            "compiled. Compile the model again."
        )
    return packed
