"""torch functions on QTensor: the products, which run on codes through `requanto.linear`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from requanto.linear import embedding, linear, times
from requanto.linear.convolution import convolution
from requanto.tensor.dispatch import implements_function
from requanto.tensor.qtensor import NO_GRADIENT, QTensor


@implements_function(F.linear)
def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    if isinstance(input, QTensor):
        raise NotImplementedError("F.linear with a quantized input: call .dequantize() on it first")
    if not isinstance(weight, QTensor):  # only the bias is a QTensor
        raise NotImplementedError("F.linear with a quantized bias: call .dequantize() on it first")
    return linear(input, weight, bias)


@implements_function(F.embedding)
def _embedding(
    input: torch.Tensor,
    weight: QTensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> torch.Tensor:
    if max_norm is not None:
        raise NotImplementedError("max_norm rewrites the embedding table; a quantized one is not rewritten")
    return embedding(input, weight)


def _matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a @ b`` with the QTensor on either side, 2D or batched (experts)."""
    if isinstance(a, QTensor) and isinstance(b, QTensor):
        raise NotImplementedError("a product of two quantized weights: call .dequantize() on one of them")
    if isinstance(b, QTensor):
        if b.dim() == 2:
            return times(a, b)
        return torch.stack([linear(a[i], b[i].t()) for i in range(b.shape[0])])
    if a.dim() == 2 and b.dim() == 2:  # (b^T @ a^T)^T
        return linear(b.t(), a).t()
    if a.dim() == 3 and b.dim() == 3:
        return torch.stack([linear(b[i].t(), a[i]).t() for i in range(a.shape[0])])
    raise NotImplementedError(
        f"product of a quantized {tuple(a.shape)} and a float {tuple(b.shape)}: 2D and batched 3D weights only; call "
        f".dequantize() first"
    )


@implements_function(torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.Tensor.mm)
def _matmul_function(input: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return _matmul(input, other)


@implements_function(torch.bmm, torch.Tensor.bmm)
def _bmm(input: torch.Tensor, mat2: torch.Tensor) -> torch.Tensor:
    return _matmul(input, mat2)


@implements_function(torch.Tensor.__rmatmul__)
def _rmatmul(self: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return _matmul(other, self)


@implements_function(torch.addmm, torch.Tensor.addmm)
def _addmm(
    input: torch.Tensor, mat1: torch.Tensor, mat2: torch.Tensor, *, beta: float = 1, alpha: float = 1
) -> torch.Tensor:
    """GPT-2's Conv1D: ``bias + x @ W``."""
    if alpha == 1 and beta == 1 and isinstance(mat2, QTensor) and input.dim() == 1:
        return times(mat1, mat2, input)
    return beta * input + alpha * _matmul(mat1, mat2)


@implements_function(torch.baddbmm, torch.Tensor.baddbmm)
def _baddbmm(
    input: torch.Tensor, batch1: torch.Tensor, batch2: torch.Tensor, *, beta: float = 1, alpha: float = 1
) -> torch.Tensor:
    return beta * input + alpha * _matmul(batch1, batch2)


def _grouped_mm(
    input: torch.Tensor,
    mat2: torch.Tensor,
    offs: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Rows sorted by expert times each expert's weight ``[E, K, N]``; ``offs`` holds the end row of each expert."""
    if not isinstance(mat2, QTensor) or offs is None or bias is not None:
        raise NotImplementedError(
            "grouped_mm on a quantized weight needs it as mat2 [E, K, N], with offs, without bias"
        )
    from requanto.linear import grouped_linear

    out = grouped_linear(input, mat2.transpose(-1, -2), offs)
    return out if out_dtype is None else out.to(out_dtype)


for _name in ("grouped_mm", "_grouped_mm"):
    for _place in (torch, F):
        if hasattr(_place, _name):
            implements_function(getattr(_place, _name))(_grouped_mm)


def _convolution(function: Any) -> Any:
    def run(input: torch.Tensor, weight: QTensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not isinstance(weight, QTensor):
            raise NotImplementedError("a convolution with a quantized input: call .dequantize() on it first")
        return convolution(function, input, weight, *args, **kwargs)

    return run


for _function in (F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d):
    implements_function(_function)(_convolution(_function))


@implements_function(torch.Tensor.requires_grad_)
def _requires_grad_(self: QTensor, requires_grad: bool = True) -> QTensor:
    if requires_grad:
        raise RuntimeError(NO_GRADIENT)
    return self


@implements_function(torch.Tensor.requires_grad.__set__)  # type: ignore[attr-defined]
def _set_requires_grad(self: QTensor, requires_grad: bool) -> None:
    if requires_grad:
        raise RuntimeError(NO_GRADIENT)


@implements_function(torch.Tensor.data.__set__)  # type: ignore[attr-defined]
def _set_data(self: torch.Tensor, value: torch.Tensor) -> None:
    """``weight.data = other``: what offloading does. Torch alone would change the wrapper and leave the codes."""
    if not isinstance(self, QTensor) or not isinstance(value, QTensor):
        raise NotImplementedError(
            f"`.data = ...` of a {type(self).__name__} with a {type(value).__name__}: a quantized weight takes another "
            f"quantized weight only. Call .dequantize() on it, or assign module.weight = torch.nn.Parameter(..., "
            f"requires_grad=False)."
        )
    with torch._C.DisableTorchFunctionSubclass():
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
    self.take(value.inner_tensors())
    self.qtype, self.axis, self.group_size = value.qtype, value.axis, value.group_size
    self.transposed, self.activation, self.scale_bits = value.transposed, value.activation, value.scale_bits
    self.rotation = value.rotation


@implements_function(torch.Tensor.data_ptr)
def _data_ptr(self: QTensor) -> int:
    """Address of the codes. A wrapper has none of its own, and accelerate tells tied weights apart by it."""
    return self.qdata.data_ptr()


@implements_function(torch.Tensor.share_memory_)
def _share_memory_(self: QTensor) -> QTensor:
    """For other processes; the wrapper has no memory of its own, and torch would crash looking for it."""
    for inner in self.inner_tensors().values():
        inner.share_memory_()
    return self


@implements_function(torch.Tensor.is_shared)
def _is_shared(self: QTensor) -> bool:
    return all(inner.is_shared() for inner in self.inner_tensors().values())


@implements_function(torch.Tensor.dequantize, torch.dequantize)
def _dequantize(self: QTensor) -> torch.Tensor:
    return self.dequantize()
