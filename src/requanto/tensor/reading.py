"""A block in which code that knows nothing of quantized weights may read them as float tensors, and write what is exact.

Adapter libraries initialize some adapters from the values of a weight (an SVD, a norm, the largest entries), and some use
the values in every forward. Inside `as_floats` such code works unchanged:

- a layer's own GEMM (``F.linear``, convolutions, ``F.embedding``) runs on the codes, as everywhere;
- shape, dtype, device, ``.data`` and ``.detach()`` are those of the weight;
- any other function gets the dequantized weight;
- a change in place (``weight.data = new``, ``copy_``, ``add_``, ``mul_`` ...) is stored exactly, or refused
  (`requanto.tensor.exact`).

A block belongs to the thread that opened it. Outside of it a model's own code can read values too
(`requanto.tensor.values`), but not write them.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils._pytree import tree_any, tree_map

from requanto.runtime.fork import new_in_child
from requanto.tensor import dispatch, exact
from requanto.tensor.qtensor import QTensor

logger = logging.getLogger(__name__)

_GEMMS = frozenset({F.linear, F.embedding, F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d})
#: a GEMM on the codes if the weight is the last operand: GPT-2's Conv1D
_ADDMM = frozenset({torch.addmm, torch.Tensor.addmm})
_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]
_AS_THEY_ARE = frozenset(
    {
        torch.Tensor.data.__get__,  # type: ignore[attr-defined]
        torch.Tensor.detach,
        torch.detach,
        torch.Tensor.dim,
        torch.Tensor.ndimension,
        torch.Tensor.size,
        torch.Tensor.stride,
        torch.Tensor.numel,
        torch.Tensor.nelement,
        torch.Tensor.element_size,
        torch.Tensor.get_device,
        torch.Tensor.is_floating_point,
        torch.is_floating_point,
        torch.Tensor.is_complex,
        torch.is_complex,
        torch.Tensor.is_contiguous,
        torch.Tensor.is_inference,
        torch.Tensor.data_ptr,
        torch.Tensor.is_shared,
        torch.Tensor.requires_grad_,
        torch.Tensor.dequantize,
        torch.dequantize,
        torch.Tensor.__hash__,
        torch.Tensor.__len__,
    }
)
#: casts and moves: those that change the dtype give floats, a move gives the moved weight
_CASTS = frozenset({getattr(torch.Tensor, n) for n in ("to", "cpu", "cuda", "float", "half", "bfloat16", "double")})
#: properties that are computed from the weight's values
_VALUES = frozenset({"T", "mT", "H", "mH", "real", "imag"})
_IN_PLACE = frozenset({"__iadd__", "__isub__", "__imul__", "__itruediv__", "__idiv__", "__ipow__", "__setitem__"})

#: who has been told of in the log
_told: set[str] = set()
#: thread -> its open blocks, innermost last: whose code runs, or None where a function runs as outside of them
_blocks: dict[int, list[str | None]] = {}
_LOCK = new_in_child(threading.Lock())


@contextmanager
def as_floats(who: str) -> Iterator[None]:
    """Inside the block, quantized weights can be read as floats.

    Args:
        who: whose code runs in the block, for the log: one line at the first weight that is dequantized.
    """
    thread = threading.get_ident()
    with _LOCK:
        _blocks.setdefault(thread, []).append(who)
        dispatch.reader = _read
    try:
        yield
    finally:
        with _LOCK:
            _blocks[thread].pop()
            if not _blocks[thread]:
                del _blocks[thread]
            if not _blocks:
                dispatch.reader = None


def _read(func: Any, args: tuple, kwargs: dict) -> Any:
    own = _blocks.get(threading.get_ident())
    if not own or own[-1] is None:  # another thread's block
        return dispatch.run_function(func, args, kwargs)
    who = own[-1]
    is_gemm = func in _GEMMS or (func in _ADDMM and len(args) == 3 and not _holds_weight((args[:2], kwargs)))
    if is_gemm or func in _AS_THEY_ARE or _is_property(func):
        return _run_plain(func, args, kwargs)
    if func in _CASTS and isinstance(args[0], QTensor):
        cast = _run_plain(func, args, kwargs)
        return cast if cast.dtype == args[0].dtype else cast.dequantize()
    name = getattr(func, "__name__", "")
    changes = func == _SET_DATA or name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
    target = args[0] if args else None
    if not (changes and isinstance(target, QTensor)):
        if who not in _told and _holds_weight((args, kwargs)):
            _told.add(who)
            logger.info("%s needs the values of quantized weights (%s): they are dequantized there", who, name)
        return func(*_floats(args), **_floats(kwargs))
    if func == _SET_DATA:
        if isinstance(args[1], QTensor):
            return _run_plain(func, args, kwargs)
        exact.assign(target, args[1])
        return None
    value = target.dequantize()
    func(value, *_floats(args[1:]), **_floats(kwargs))
    exact.assign(target, value)
    return target


def _run_plain(func: Any, args: tuple, kwargs: dict) -> Any:
    """Runs a function as outside of the block."""
    own = _blocks[threading.get_ident()]
    own.append(None)
    try:
        return dispatch.run_function(func, args, kwargs)
    finally:
        own.pop()


def _is_property(func: Any) -> bool:
    """True for access to a tensor's properties (``weight.shape``), not to its values (``weight.T``, ``weight.data =``)."""
    name = getattr(func, "__name__", "")
    if name in ("__set__", "__delete__"):
        return func != _SET_DATA
    return name == "__get__" and getattr(getattr(func, "__self__", None), "__name__", "") not in _VALUES


def _holds_weight(tree: Any) -> bool:
    return tree_any(lambda leaf: isinstance(leaf, QTensor), tree)


def _floats(tree: Any) -> Any:
    return tree_map(lambda leaf: leaf.dequantize() if isinstance(leaf, QTensor) else leaf, tree)
