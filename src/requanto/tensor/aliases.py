"""torch functions for ``.data``, ``data_ptr``, shared memory and ``requires_grad`` of a QTensor."""

from __future__ import annotations

import torch

from requanto.runtime.tracing import is_fake
from requanto.tensor import float_targets
from requanto.tensor.dispatch import implements_function
from requanto.tensor.qtensor import NO_GRADIENT, QTensor


@implements_function(torch.Tensor.requires_grad_)
def _requires_grad_(self: QTensor, requires_grad: bool = True) -> QTensor:
    if requires_grad and not float_targets.assigning():
        raise RuntimeError(NO_GRADIENT)
    return self


@implements_function(torch.Tensor.requires_grad.__set__)  # type: ignore[attr-defined]
def _set_requires_grad(self: QTensor, requires_grad: bool) -> None:
    if requires_grad:
        raise RuntimeError(NO_GRADIENT)


@implements_function(torch.Tensor.data.__set__)  # type: ignore[attr-defined]
def _set_data(self: torch.Tensor, value: torch.Tensor) -> None:
    """``weight.data = other``, as offloading does. Torch's own setter would change the wrapper, not the codes."""
    if not isinstance(self, QTensor) or not isinstance(value, QTensor):
        raise NotImplementedError(
            f"`.data = ...` of a {type(self).__name__} with a {type(value).__name__}: only another quantized weight can be "
            f"assigned to a quantized weight. Call .dequantize() on it, or assign module.weight = torch.nn.Parameter(..., "
            f"requires_grad=False)."
        )
    with torch._C.DisableTorchFunctionSubclass():
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
    self._spec, self._storage = value._spec, value._storage


@implements_function(torch.Tensor.data_ptr)
def _data_ptr(self: QTensor) -> int:
    """A number that stands for the weight as long as it lives, and for no other one later; 0 on the meta device.

    It is no address: the wrapper has no memory. Accelerate keeps the addresses of tied weights and recognizes them by
    these. The address of the codes would not do: packing frees their memory, and another weight that is loaded there would
    be taken for this one.
    """
    codes = self._storage.parts["qdata"]
    has_memory = codes.device.type != "meta" and not is_fake(codes) and codes.numel()
    return self._storage.identity if has_memory else codes.data_ptr()


@implements_function(torch.Tensor.share_memory_)
def _share_memory_(self: QTensor) -> QTensor:
    """Moves the parts, in the plain layout, to shared memory. Torch's own function crashes: the wrapper has no memory."""
    self.unpack()
    for inner in self._storage.parts.values():
        inner.share_memory_()
    self._storage.changed()
    return self


@implements_function(torch.Tensor.is_shared)
def _is_shared(self: QTensor) -> bool:
    return all(inner.is_shared() for inner in self._storage.parts.values())
