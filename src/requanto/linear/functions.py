"""torch functions on QTensor: linear, embedding, matmul and convolution, which run through `requanto.linear`.

Shapes, broadcasting and error types are those of torch, with one exception. The GEMM runs in the dtype of x, any float
dtype, where torch requires both operands to have the same. Where a quantized weight is not the weight of the function (it
is the input, or the tensor to add), and with ``out=`` or ``out_dtype=``, it is dequantized (`requanto.tensor.values`).

The aten operators of the products are registered too: torch's own composite functions, such as
``F.multi_head_attention_forward``, multiply below the torch functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from requanto.linear import embedding, linear, times
from requanto.linear.convolution import as_autocast, convolution
from requanto.linear.embedding import quick_lookup
from requanto.linear.registry import find_plan
from requanto.runtime.tracing import in_functorch_transform, is_tracing
from requanto.tensor.dispatch import implements_aten, implements_function
from requanto.tensor.qtensor import QTensor
from requanto.tensor.values import run_on_values, values_of

#: classes of a bias that brings no behaviour of its own
_NO_SUBCLASS = (type(None), torch.nn.Parameter, torch.Tensor)


@implements_function(F.linear)
def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    # A token's GEMM takes a few microseconds, as long as the checks below and those of `linear`: a plan needs none of them.
    if type(input) is torch.Tensor and type(weight) is QTensor and type(bias) in _NO_SUBCLASS and not input.is_nested:
        gemm = None if weight._spec.transposed or torch.compiler.is_compiling() else find_plan(input, weight, bias)
        if gemm is not None:
            return gemm(input, weight, bias)
    if isinstance(input, QTensor):
        input = values_of(input, "linear")
    if isinstance(bias, QTensor):
        bias = values_of(bias, "linear")
    if input.is_nested and isinstance(weight, QTensor):
        weight = values_of(weight, "linear of a nested tensor")
    return linear(input, weight, bias) if isinstance(weight, QTensor) else F.linear(input, weight, bias)


@implements_function(F.embedding)
def _embedding(
    input: torch.Tensor,
    weight: torch.Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> torch.Tensor:
    # padding_idx, scale_grad_by_freq and sparse only affect the table's gradient; a quantized table has none.
    if type(input) is torch.Tensor and type(weight) is QTensor and max_norm is None:
        rows = weight._spec.shape[0]
        valid = padding_idx is None or -rows <= padding_idx < rows
        found = quick_lookup(input, weight) if valid and not torch.compiler.is_compiling() else None
        if found is not None:
            return found
    if isinstance(input, QTensor) or not isinstance(weight, QTensor):
        raise NotImplementedError("F.embedding with quantized indices: expected int32 or int64 indices")
    if max_norm is not None:
        raise NotImplementedError("max_norm rewrites the embedding table, which a quantized table does not support")
    if weight.dim() == 2 and (weight.transposed or weight.axis != 0):
        return run_on_values(F.embedding, input, weight, padding_idx)
    if weight.dim() != 2:
        raise RuntimeError(f"embedding: the table must have two axes, found shape {tuple(weight.shape)}")
    if input.dtype not in (torch.int32, torch.int64):
        raise RuntimeError(f"embedding: indices must be int32 or int64, found {input.dtype}")
    if padding_idx is not None and not -weight.shape[0] <= padding_idx < weight.shape[0]:
        raise AssertionError(
            f"embedding: padding_idx {padding_idx} is out of range for a table of {weight.shape[0]} rows"
        )
    return embedding(input, weight)


# ---------------------------------------------------------------------- matmul, mm, bmm, mv, addmm ...


def _multiply(name: str, a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``a @ b`` by the rules of torch.matmul, where one of the two is quantized.

    Args:
        name: name of the torch function, for messages.
        bias: float ``[N]``, only with a quantized ``b`` of two axes.
    """
    if isinstance(a, QTensor) and isinstance(b, QTensor):
        a = values_of(a, name)
    weight, x = (a, b) if isinstance(a, QTensor) else (b, a)
    if not isinstance(weight, QTensor):  # only the tensor to add was quantized
        out = torch.matmul(a, b)
        return out if bias is None else out + bias
    if not x.is_floating_point() or x.dtype.itemsize < 2:
        raise RuntimeError(f"{name}: expected a float tensor with a quantized weight, found {x.dtype}")
    if x.dim() == 0:
        raise RuntimeError(f"{name}: {_shapes(a, b)}; both need at least one axis")
    if a.shape[-1] != b.shape[max(0, b.dim() - 2)]:
        raise RuntimeError(
            f"{name}: {_shapes(a, b)} do not fit: the last axis of the first, {a.shape[-1]}, must equal the "
            f"{'second-to-last' if b.dim() > 1 else 'only'} axis of the second, {b.shape[max(0, b.dim() - 2)]}"
        )
    for one, two in zip(reversed(a.shape[:-2]), reversed(b.shape[:-2])):
        if one != two and one != 1 and two != 1:
            raise RuntimeError(f"{name}: {_shapes(a, b)} do not fit: batches of {one} and {two} do not broadcast")
    if weight.dim() != weight.axis + 2:  # a convolution's: a scale is shared by several of its last axes
        return run_on_values(torch.matmul, a, b)
    if 0 in weight.shape:
        values = x.new_empty(weight.shape)
        out = torch.matmul(x, values) if weight is b else torch.matmul(values, x)
        return out if bias is None else out + bias
    if weight is b and weight.dim() == 2:
        # `times` transposes the weight, and torch.func's transforms would wrap that view.
        return linear(x, _view(weight, lambda w: w.t()), bias) if in_functorch_transform() else times(x, weight, bias)
    rows = x.unsqueeze(0) if x.dim() == 1 else x if weight is b else x.transpose(-1, -2)
    # W @ x = (x^T @ W^T)^T: both cases need the weight as [..., N, K].
    out = _batched_matmul(rows, _view(weight, lambda w: w.transpose(-1, -2)) if weight is b else weight)
    if x.dim() == 1:
        return out.squeeze(-2)
    return out if weight is b else out.transpose(-1, -2).contiguous()


def _batched_matmul(x: torch.Tensor, weight: QTensor) -> torch.Tensor:
    """``x @ weight.mT`` of x ``[..., M, K]`` and weight ``[..., N, K]``: one GEMM for each matrix of the weight."""
    if weight.dim() == 2:
        return linear(x, weight)
    while x.dim() < weight.dim():
        x = x.unsqueeze(0)
    dim, count = x.dim() - weight.dim(), weight.shape[0]
    if count == 1:  # one GEMM for all rows of x
        return _batched_matmul(x, _view(weight, lambda w: w[0]))
    shared = x.shape[dim] == 1
    experts = [_view(weight, lambda w, i=i: w[i]) for i in range(count)]
    parts = [_batched_matmul(x.select(dim, 0 if shared else i), expert) for i, expert in enumerate(experts)]
    return torch.stack(parts, dim)


def _view(weight: QTensor, view: Callable[[QTensor], QTensor]) -> QTensor:
    """``view(weight)``, outside torch.func's transforms, which would wrap the result."""
    if is_tracing() or not in_functorch_transform():
        return view(weight)
    with temporarily_clear_interpreter_stack():
        return view(weight)


def _shapes(a: torch.Tensor, b: torch.Tensor) -> str:
    return f"shapes {tuple(a.shape)} and {tuple(b.shape)}"


def _check_axes(name: str, a: torch.Tensor, b: torch.Tensor, axes: tuple[int, int]) -> None:
    """Checks the number of axes and the batch size for functions that do not broadcast."""
    if (a.dim(), b.dim()) != axes:
        raise RuntimeError(f"{name}: {_shapes(a, b)}; expected {axes[0]} and {axes[1]} axes")
    if axes == (3, 3) and a.shape[0] != b.shape[0]:
        raise RuntimeError(f"{name}: {_shapes(a, b)} do not fit: batches of {a.shape[0]} and {b.shape[0]}")


def _given(out: torch.Tensor | None, out_dtype: torch.dtype | None = None) -> dict[str, Any]:
    """The keywords for a result's place and dtype, which only torch's own functions take."""
    return {k: v for k, v in {"out": out, "out_dtype": out_dtype}.items() if v is not None}


@implements_function(torch.matmul, torch.linalg.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)
def _matmul(input: torch.Tensor, other: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    if out is not None:
        return run_on_values(torch.matmul, input, other, out=out)
    return _multiply("matmul", input, other)


@implements_function(torch.Tensor.__rmatmul__)
def _rmatmul(self: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return _multiply("matmul", other, self)


@implements_function(torch.mm, torch.Tensor.mm)
def _mm(
    input: torch.Tensor,
    mat2: torch.Tensor,
    out_dtype: torch.dtype | None = None,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    if given := _given(out, out_dtype):
        return run_on_values(torch.mm, input, mat2, **given)
    _check_axes("mm", input, mat2, (2, 2))
    return _multiply("mm", input, mat2)


@implements_function(torch.bmm, torch.Tensor.bmm)
def _bmm(
    input: torch.Tensor,
    mat2: torch.Tensor,
    out_dtype: torch.dtype | None = None,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    if given := _given(out, out_dtype):
        return run_on_values(torch.bmm, input, mat2, **given)
    _check_axes("bmm", input, mat2, (3, 3))
    return _multiply("bmm", input, mat2)


@implements_function(torch.mv, torch.Tensor.mv)
def _mv(input: torch.Tensor, vec: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    if out is not None:
        return run_on_values(torch.mv, input, vec, out=out)
    _check_axes("mv", input, vec, (2, 1))
    return _multiply("mv", input, vec)


def _add_matmul(
    name: str,
    input: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    axes: tuple[int, int],
    *,
    batches_add: bool = False,
    beta: float = 1,
    alpha: float = 1,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """``beta * input + alpha * (a @ b)``.

    Args:
        axes: expected number of axes of a and of b.
        batches_add: sum over the batch axis (addbmm).
    """
    if given := _given(out, out_dtype):
        return run_on_values(getattr(torch, name), input, a, b, beta=beta, alpha=alpha, **given)
    if isinstance(input, QTensor):
        input = values_of(input, name)
    _check_axes(name, a, b, axes)
    shape = (*a.shape[1 if batches_add else 0 : -1], *b.shape[1:][-1:])
    if input.dim() > len(shape) or any(n not in (1, m) for n, m in zip(reversed(input.shape), reversed(shape))):
        raise RuntimeError(f"{name}: a tensor of shape {tuple(input.shape)} does not broadcast to the result's {shape}")
    if isinstance(b, QTensor):
        x = a = as_autocast(a)
    else:
        x = b = as_autocast(b)
    input = as_autocast(input)
    if input.dtype != x.dtype:
        raise RuntimeError(
            f"{name}: the tensor to add and the one multiplied with the quantized weight must have the same dtype, found "
            f"{input.dtype} and {x.dtype}"
        )
    if axes == (2, 2) and isinstance(b, QTensor) and alpha == 1 and beta == 1 and input.shape == shape[1:]:
        return _multiply(name, a, b, input)  # GPT-2's Conv1D: a bias
    result = _multiply(name, a, b)
    result = result.sum(0) if batches_add else result
    result = result if alpha == 1 else result * alpha
    # For beta=0 torch does not read the input, which may hold NaN.
    return result if beta == 0 else torch.add(result, input, alpha=beta)


@implements_function(torch.addmm, torch.Tensor.addmm)
def _addmm(input: torch.Tensor, mat1: torch.Tensor, mat2: torch.Tensor, **how: Any) -> torch.Tensor:
    return _add_matmul("addmm", input, mat1, mat2, (2, 2), **how)


@implements_function(torch.baddbmm, torch.Tensor.baddbmm)
def _baddbmm(input: torch.Tensor, batch1: torch.Tensor, batch2: torch.Tensor, **how: Any) -> torch.Tensor:
    return _add_matmul("baddbmm", input, batch1, batch2, (3, 3), **how)


@implements_function(torch.addbmm, torch.Tensor.addbmm)
def _addbmm(input: torch.Tensor, batch1: torch.Tensor, batch2: torch.Tensor, **how: Any) -> torch.Tensor:
    return _add_matmul("addbmm", input, batch1, batch2, (3, 3), batches_add=True, **how)


@implements_function(torch.addmv, torch.Tensor.addmv)
def _addmv(input: torch.Tensor, mat: torch.Tensor, vec: torch.Tensor, **how: Any) -> torch.Tensor:
    return _add_matmul("addmv", input, mat, vec, (2, 1), **how)


def _grouped_mm(
    input: torch.Tensor,
    mat2: torch.Tensor,
    offs: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Rows sorted by expert times each expert's weight ``[E, K, N]``; ``offs`` holds the end row of each expert."""
    if isinstance(input, QTensor) or offs is None or bias is not None or mat2.dim() == 2:
        return run_on_values(F.grouped_mm, input, mat2, offs=offs, bias=bias, out_dtype=out_dtype)
    if input.dim() != 2 or mat2.dim() != 3 or input.shape[1] != mat2.shape[1]:
        raise RuntimeError(f"grouped_mm: {_shapes(input, mat2)} do not fit: expected [rows, K] and [experts, K, N]")
    if offs.shape != mat2.shape[:1]:
        raise RuntimeError(
            f"grouped_mm: offs must have one end row for each of {mat2.shape[0]} experts, found {tuple(offs.shape)}"
        )
    if not input.is_floating_point() or (out_dtype is not None and not out_dtype.is_floating_point):
        raise RuntimeError(f"grouped_mm: expected float tensors, found {input.dtype} and out_dtype={out_dtype}")
    from requanto.linear import grouped_linear

    out = grouped_linear(input, mat2.transpose(-1, -2), offs)
    return out if out_dtype is None else out.to(out_dtype)


for _name in ("grouped_mm", "_grouped_mm"):
    for _place in (torch, F):
        if hasattr(_place, _name):
            implements_function(getattr(_place, _name))(_grouped_mm)


def _convolution(function: Any) -> Any:
    def run(input: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if isinstance(input, QTensor) or not isinstance(weight, QTensor):
            return run_on_values(function, input, weight, *args, **kwargs)
        return convolution(function, input, weight, *args, **kwargs)

    return run


for _function in (F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d):
    implements_function(_function)(_convolution(_function))


@implements_function(torch.Tensor.dequantize, torch.dequantize)
def _dequantize(self: QTensor) -> torch.Tensor:
    return self.dequantize()


# ---------------------------------------------------------------------- the same below the torch functions

aten = torch.ops.aten
_PRODUCTS = {
    aten.mm.default: _mm,
    aten.bmm.default: _bmm,
    aten.mv.default: _mv,
    aten.addmm.default: _addmm,
    aten.baddbmm.default: _baddbmm,
    aten.addbmm.default: _addbmm,
    aten.addmv.default: _addmv,
}


def _below_autograd(func: Any, args: tuple, kwargs: dict) -> torch.Tensor:
    # Autograd has recorded the operator already, with the derivative of torch's own.
    with torch.no_grad():
        return _PRODUCTS[func](*args, **kwargs)


implements_aten(*_PRODUCTS)(_below_autograd)
