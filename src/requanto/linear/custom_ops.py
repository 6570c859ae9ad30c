"""The GEMM for autograd and torch.compile: `EagerLinear` outside of graphs, custom operators in them.

Each operator is one node of a graph. It takes the weight as ``parts``, its tensors in the order of `Layout.names`;
``words``, its description (`WeightSpec.words` and the layout's name); and ``shape``, its stored shape. So one graph serves
all layers of a shape, and a new property of weights changes no signature. The low-rank term is not part of the operators,
because its factors may be trained. No argument has a default, because autograd leaves out arguments that have their default
value.

The backward is a GEMM with the same codes, transposed; no dequantized weight is saved for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from requanto.dtypes.qtypes import qtype
from requanto.linear import reference
from requanto.linear.activations import rounded_in_blocks
from requanto.linear.registry import choose, operator_plan, problem_of, run_chosen
from requanto.runtime import onnx_nodes
from requanto.runtime.tracing import is_wrapper
from requanto.tensor.layout import PLAIN, Layout
from requanto.tensor.qtensor import QTensor
from requanto.tensor.rebuild import operator_weight
from requanto.tensor.spec import WeightSpec, swapped
from requanto.tensor.storage import WeightStorage, storage_of


def run(
    x: torch.Tensor,
    weight: QTensor,
    bias: torch.Tensor | None,
    activation: qtype | None = None,
    input_scale: torch.Tensor | None = None,
    *,
    lasts: bool = False,
) -> torch.Tensor:
    """``[rows, K] -> [rows, N]`` with the implementation that the registry selects.

    Args:
        lasts: whether the weight's storage outlives the call, and can cache a plan.
    """
    rows, features = x.shape
    out_features = weight._spec.seen_shape[-2]  # `weight.shape` is a Python call
    if not rows or not features or not out_features:
        out = x.new_zeros(rows, out_features)
        return out if bias is None else out.add_(bias)
    if is_wrapper(x) or is_wrapper(bias):  # kernels would read their addresses
        return reference.run(x, weight, bias, activation, input_scale)
    if activation is not None and activation.blocks is not None:
        x, activation = rounded_in_blocks(x, activation, input_scale), None
    gemm = operator_plan(x, weight, activation) if lasts and input_scale is None else None
    if gemm is not None:
        return gemm(x, weight, bias)
    return run_chosen(x, weight, bias, activation, input_scale)


class EagerLinear(torch.autograd.Function):
    """`run` with a gradient for x and bias, outside of graphs: it costs half of what the operator costs there."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        weight: QTensor,
        activation: qtype | None,
        input_scale: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.spec, (ctx.layout, parts) = weight._spec, weight._storage.state
        ctx.names = ctx.layout.names(ctx.spec)
        ctx.save_for_backward(*(parts[name] for name in ctx.names))  # autograd raises if they are overwritten meanwhile
        ctx.bias_dtype = None if bias is None else bias.dtype
        out = run(x, weight, bias, activation, input_scale, lasts=weight._storage.base is None)
        return out if out._base is None else out.clone()  # autograd forbids in-place changes of a view made here

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:  # type: ignore[override]
        grad_x = None
        if ctx.needs_input_grad[0]:
            parts = dict(zip(ctx.names, ctx.saved_tensors))
            spec = ctx.spec.replace(transposed=not ctx.spec.transposed, activation=None)
            weight = _prepacked(spec, parts, ctx.layout)
            lasts = weight is not None
            if weight is None:
                weight = QTensor._over(spec, WeightStorage(parts, ctx.layout))
            if torch.is_grad_enabled():  # create_graph=True: a gradient penalty differentiates this product too
                grad_x = EagerLinear.apply(grad, None, weight, None, None)
            else:
                grad_x = run(grad, weight, None, lasts=lasts)
        return grad_x, _bias_gradient(ctx, grad), None, None, None


def _bias_gradient(ctx: Any, grad: torch.Tensor) -> torch.Tensor | None:
    if ctx.bias_dtype is None or not ctx.needs_input_grad[1]:
        return None
    return grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)


def _prepacked(spec: WeightSpec, parts: dict[str, torch.Tensor], layout: Layout) -> QTensor | None:
    """The weight over the storage that owns these packed codes, with its cached plans; None if there is none."""
    found = None if layout is PLAIN else storage_of(parts, layout, spec)
    return None if found is None else QTensor._over(spec, found)


def arguments(weight: QTensor, activation: qtype | None = None) -> tuple[list[torch.Tensor], str, list[int]]:
    """``parts``, ``words`` and ``shape`` of a weight, as the operators take them."""
    spec = weight._spec
    if activation is not spec.activation:
        spec = spec.replace(activation=activation)
    layout, parts = weight._storage.state
    return [parts[name] for name in layout.names(spec)], f"{spec.words} layout={layout.name}", list(spec.shape)


def onnx_linear(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    weight: QTensor,
    activation: qtype | None,
    input_scale: torch.Tensor | None,
) -> torch.Tensor:
    """`run` as a node of an ONNX graph."""
    parts, words, shape = arguments(weight, activation)
    inputs, out_features = [x, bias, input_scale, *parts], weight._spec.seen_shape[0]
    return onnx_nodes.node("Linear", inputs, {"words": words, "shape": shape}, x, (x.shape[0], out_features))


def _weight(
    parts: list[torch.Tensor], words: str, shape: list[int], dtype: torch.dtype, *, flip: bool = False
) -> QTensor:
    return _lasting(parts, words, shape, dtype, flip=flip)[0]


def _lasting(
    parts: list[torch.Tensor], words: str, shape: list[int], dtype: torch.dtype, *, flip: bool = False
) -> tuple[QTensor, bool]:
    """The weight of an operator's arguments, and whether its storage outlives the call."""
    spec, layout, named = operator_weight(parts, words, shape, dtype)
    if flip:
        spec = spec.replace(transposed=not spec.transposed)
    found = _prepacked(spec, named, layout)
    return (QTensor._of(spec, named, layout), False) if found is None else (found, True)


def _seen(words: str, shape: Any) -> Any:
    return swapped(shape) if "transposed" in words.split() else shape


def _operator(name: str) -> Callable[[Callable[..., torch.Tensor]], torch.library.CustomOpDef]:
    """Registers a custom operator whose kernel is called by torch's dispatcher itself on devices of layers.

    `torch.library.custom_op` calls it through Python that checks at each call whether a result is an argument; no operator
    here returns one.
    """

    def register(function: Callable[..., torch.Tensor]) -> torch.library.CustomOpDef:
        operator = torch.library.custom_op(f"requanto::{name}", function, mutates_args=())
        for key in ("CPU", "CUDA", "XPU", "MPS"):
            _kernels.impl(name, function, key)
        return operator

    return register


_kernels = torch.library.Library("requanto", "FRAGMENT")


@_operator("linear")
def _linear(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    parts: list[torch.Tensor],
    words: str,
    shape: list[int],
    input_scale: torch.Tensor | None,
) -> torch.Tensor:
    weight, lasts = _lasting(parts, words, shape, x.dtype)
    return run(x, weight, bias, weight._spec.activation, input_scale, lasts=lasts)


@_linear.register_fake
def _(x, bias, parts, words, shape, input_scale):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], _seen(words, shape)[-2])


@_operator("linear_backward")
def _linear_backward(grad: torch.Tensor, parts: list[torch.Tensor], words: str, shape: list[int]) -> torch.Tensor:
    # The gradient with respect to x is grad @ W (straight-through estimator if activations are quantized).
    weight, lasts = _lasting(parts, words, shape, grad.dtype, flip=True)
    return run(grad, weight, None, lasts=lasts)


@_linear_backward.register_fake
def _(grad, parts, words, shape):  # type: ignore[no-untyped-def]
    return grad.new_empty(*grad.shape[:-1], _seen(words, shape)[-1])


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _x, bias, parts, ctx.words, ctx.shape, _input_scale = inputs
    ctx.save_for_backward(*parts)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    grad_x = None
    parts = list(ctx.saved_tensors)
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.requanto.linear_backward(grad, parts, ctx.words, ctx.shape)
    return grad_x, _bias_gradient(ctx, grad), [None] * len(parts), None, None, None


_linear.register_autograd(_backward, setup_context=_setup)


@_operator("stored_rows")
def _stored_rows(index: torch.Tensor, parts: list[torch.Tensor], words: str, shape: list[int]) -> torch.Tensor:
    from requanto.linear.embedding import stored_rows

    return stored_rows(_weight(parts, words, shape, torch.float32), index)


@_stored_rows.register_fake
def _(index, parts, words, shape):  # type: ignore[no-untyped-def]
    return parts[0].new_empty((index.shape[0], shape[-1]), dtype=torch.float32)


@_operator("grouped_linear")
def _grouped(
    x: torch.Tensor, offsets: torch.Tensor, parts: list[torch.Tensor], words: str, shape: list[int], flip: bool
) -> torch.Tensor:
    weight = _weight(parts, words, shape, x.dtype, flip=flip)
    found = choose(problem_of(weight, x.dtype, x.shape[0]), grouped=True).implementation
    assert found.run_grouped is not None
    return found.run_grouped(x, weight, offsets)


@_grouped.register_fake
def _(x, offsets, parts, words, shape, flip):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], _seen(words, shape)[-1 if flip else -2])


def _grouped_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _x, offsets, parts, ctx.words, ctx.shape, ctx.flip = inputs
    ctx.save_for_backward(offsets, *parts)


def _grouped_backward(ctx, grad):  # type: ignore[no-untyped-def]
    offsets, *parts = ctx.saved_tensors
    grad_x = torch.ops.requanto.grouped_linear(grad.contiguous(), offsets, parts, ctx.words, ctx.shape, not ctx.flip)
    return grad_x, None, [None] * len(parts), None, None, None


_grouped.register_autograd(_grouped_backward, setup_context=_grouped_setup)
