"""Plans in a form that takes few steps to call: one for each weight, for few rows on a CPU.

`requanto.linear.registry.quick_gemm` calls them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from requanto.runtime.settings import registry_state
from requanto.tensor.layout import LOCK
from requanto.tensor.qtensor import QTensor
from requanto.tensor.spec import WeightSpec


class Quick(NamedTuple):
    """A plan as one tuple that `quick_gemm` unpacks: while a model decodes, what a call touches is no longer in the caches.

    Attributes:
        shape, dtype: of x.
        version: of the registry's state when it was made.
        spec: of the weight; a transposed alias, or one with another activation type, has another.
        like: a tensor like the result.
        function: ``function(address, x, out, scratch) -> code``, with addresses of memory.
        address, scratch_bytes: its first argument, and the size of the buffer that it needs.
        raise_for: raises the error of a code that is not 0.
        owner: what is to live during a call: the struct at the address, and the tensors that it points to.
    """

    shape: torch.Size
    dtype: torch.dtype
    version: int
    spec: WeightSpec
    like: torch.Tensor
    function: Callable[..., int]
    address: int
    scratch_bytes: int
    raise_for: Callable[[int], None]
    owner: object


class Before(NamedTuple):
    """What a plan belongs to, read before it is made or looked up: another thread may change each of them meanwhile.

    Attributes:
        spec: of the weight.
        version: of its storage.
        registry: `registry_state.version`.
    """

    spec: WeightSpec
    version: int
    registry: int

    @classmethod
    def of(cls, weight: QTensor) -> Before:
        """What it is now."""
        return cls(weight._spec, weight._storage.version, registry_state.version)


def note_quick(gemm: Any, x: torch.Tensor, weight: QTensor, before: Before) -> None:
    """Makes a plan the weight's quick one, if it can be called in few steps."""
    storage, make_quick = weight._storage, getattr(gemm, "quick", None)
    if make_quick is None or not x.is_cpu or storage.base is not None:  # a slice looks whether the whole has changed
        return
    if before.spec.transposed:  # a plan of ``x @ weight``, not of ``x @ weight.T``
        return
    quick = make_quick(x.shape, x.dtype, before.registry, before.spec)
    with LOCK:
        if quick is not None and before == (weight._spec, storage.version, registry_state.version):
            storage.quick = quick
