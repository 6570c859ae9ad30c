"""`linear` and `times`: they check arguments, pick an implementation and support gradients and torch.compile.

A call runs the plan that the weight has cached for x's shape (`requanto.linear.registry.find_plan`), else the implementation
that the registry selects. Under torch.compile the GEMM is one custom operator, and with a gradient one
`autograd.Function` (both in `requanto.linear.custom_ops`).
"""

from __future__ import annotations

import torch

from requanto.linear import reference  # isort: skip  (registered first: the others are inserted before it)
from requanto.dtypes.qtypes import qtype, qtypes
from requanto.linear import custom_ops
from requanto.linear.columns import as_shown, as_stored, scale_columns
from requanto.linear.cpu import paths as cpu
from requanto.linear.gpu import eight_bit, humming
from requanto.linear.gpu import paths as gpu
from requanto.linear.prepack import pack_on_first_use
from requanto.linear.registry import find_plan, remember_plan
from requanto.runtime import onnx_nodes
from requanto.runtime.tracing import (
    in_functorch_transform,
    in_jit_trace,
    is_tracing,
    is_wrapper,
    needs_gradient,
    runs_eagerly,
)
from requanto.scales.rotation import rotate
from requanto.tensor import lowrank
from requanto.tensor.qtensor import QTensor

__all__ = ["cpu", "eight_bit", "gpu", "humming", "linear", "packed_gemm", "reference", "times"]

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def linear(
    x: torch.Tensor,
    weight: QTensor,
    bias: torch.Tensor | None = None,
    *,
    activation: qtype | None = None,
    input_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes ``x @ weight.T + bias``.

    Args:
        x: float ``[..., K]``.
        weight: quantized ``[N, K]``.
        bias: float ``[N]``.
        activation: type that x is quantized to (``qint8``, float8); None: ``weight.activation``, by default no
            quantization.
        input_scale: static scale of quantized activations, one element; None: one scale per token. It belongs to what is
            quantized: of a weight with a column scale, to ``x * weight.column``.

    Returns:
        ``[..., N]`` in x's dtype, or autocast's if autocast is enabled.

    Raises:
        ValueError: x is not a float tensor of 16 bits or more, or shapes or devices do not match, or ``input_scale`` is
            given without an activation type or for a rotated weight.
    """
    return _gemm(x, weight, bias, activation, input_scale, flip=False)


def times(
    x: torch.Tensor,
    weight: QTensor,
    bias: torch.Tensor | None = None,
    *,
    activation: qtype | None = None,
    input_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes ``x @ weight + bias``, as GPT-2's ``Conv1D`` does; such a weight is best stored as ``[N, K]``.

    Args:
        x: float ``[..., K]``.
        weight: quantized ``[K, N]``.
        bias, activation, input_scale: as in `linear`.

    Returns, Raises:
        As `linear` with the transposed weight.
    """
    return _gemm(x, weight, bias, activation, input_scale, flip=True)


def packed_gemm(x: torch.Tensor, weight: QTensor, bias: torch.Tensor | None) -> torch.Tensor | None:
    """`linear` with a convolution's weight as its stored matrix ``[N, K]``; prepacks the parameter if it is not yet.

    Returns:
        None if the weight cannot be prepacked, a gradient is needed, the call is traced, or x has no memory.
    """
    if needs_gradient(x, bias) or not runs_eagerly() or is_wrapper(x) or is_wrapper(bias):
        return None
    gemm = find_plan(x, weight, bias)
    if gemm is not None:
        return gemm(x, weight, bias)
    with torch._C.DisableTorchFunctionSubclass():
        pack_on_first_use(weight, x.dtype, None)
        if not weight.is_packed:
            return None
        out = _checked(x, weight.as_matrix(), bias, None, None)
        remember_plan(x, weight)
        return out


def _gemm(
    x: torch.Tensor,
    weight: QTensor,
    bias: torch.Tensor | None,
    activation: qtype | None,
    input_scale: torch.Tensor | None,
    *,
    flip: bool,
) -> torch.Tensor:
    """``x @ weight.T``, or ``x @ weight`` if ``flip``."""
    if torch.compiler.is_compiling():  # first, so that torch.compile traces nothing else
        name = "" if activation is None else activation.name
        return torch.ops.requanto.linear_weight(x, weight, bias, name, input_scale, flip)
    spec = weight._spec
    cacheable = (
        type(x) in _PLAIN
        and not is_wrapper(bias)
        and spec.transposed is flip  # x @ stored.T: the only case that plans and packed layouts cover
        and input_scale is None
        and (activation is None or activation is spec.activation)
    )
    if cacheable:
        gemm = find_plan(x, weight, bias)
        if gemm is not None:
            return gemm(x, weight, bias)
    # Otherwise each access to a QTensor's shape or device is a Python call: half of a small layer's time.
    with torch._C.DisableTorchFunctionSubclass():
        # Training leaves a plain weight plain: its backward reads the codes row by row, which is fastest in that layout.
        if spec.transposed is flip and runs_eagerly() and not needs_gradient(x, bias):
            dtype = torch.get_autocast_dtype(x.device.type) if _autocast(x) else x.dtype
            pack_on_first_use(weight, dtype, activation or spec.activation)
        seen = weight if not flip else weight.view_of_storage(transposed=not spec.transposed)
        out = _checked(x, seen, bias, activation, input_scale)
        if cacheable and not _autocast(x) and not needs_gradient(x, bias):
            remember_plan(x, weight)
        return out


def _traced(
    x: torch.Tensor,
    weight: QTensor,
    bias: torch.Tensor | None,
    activation: str,
    input_scale: torch.Tensor | None,
    flip: bool,
) -> torch.Tensor:
    """The operator that torch.compile puts into its graph; autograd and AOTAutograd decompose it."""
    seen = weight.t() if flip else weight
    return _checked(x, seen, bias, qtypes[activation] if activation else None, input_scale)


_library = torch.library.Library("requanto", "FRAGMENT")
_library.define(
    "linear_weight(Tensor x, Tensor weight, Tensor? bias, str activation, Tensor? input_scale, bool flip) -> Tensor"
)
_library.impl("linear_weight", _traced, "CompositeImplicitAutograd")


def _autocast(x: torch.Tensor) -> bool:
    # As in torch.nn.functional.linear, autocast does not change float64.
    return x.device.type != "meta" and x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type)


def _checked(
    x: torch.Tensor,
    weight: QTensor,
    bias: torch.Tensor | None,
    activation: qtype | None,
    input_scale: torch.Tensor | None,
) -> torch.Tensor:
    if not x.is_floating_point() or x.dtype.itemsize < 2:
        raise ValueError(f"linear: x must be a float tensor, found {x.dtype}; expected 16 bits or more")
    if _autocast(x):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    shape = weight._spec.seen_shape
    if len(shape) != 2 or not x.dim() or x.shape[-1] != shape[1]:
        raise ValueError(
            f"linear: x of shape {tuple(x.shape)} does not fit a weight of shape {tuple(shape)}; x's last axis must be "
            f"{shape[-1]}"
        )
    if x.device != weight.device:
        raise ValueError(f"linear: x is on {x.device}, the weight on {weight.device}; move one of them")
    if activation is None:
        activation = weight.activation
    if input_scale is not None and activation is None:
        raise ValueError(
            "linear: input_scale needs an activation type, and neither the call nor the weight has one; pass "
            "activation=..."
        )
    # Implementations handle only the codes; the low-rank term, the rotation, the column scale and the order of columns are
    # applied here.
    block, column = weight.rotation, weight.column
    if block is None and column is None and weight.order is None:
        out = _codes_gemm(x, weight, bias, activation, input_scale)
    elif block is not None and input_scale is not None:
        raise ValueError(
            f"linear: a static input_scale belongs to the unrotated x, but this weight needs x rotated in blocks of "
            f"{block}. Use dynamic activation quantization (one scale per token), or a weight without rotation."
        )
    elif weight.transposed:
        # Divided by a small column scale, a result may leave float16's range.
        wide = x.float() if column is not None and x.dtype == torch.float16 else x
        out = _codes_gemm(wide, weight, None, activation, input_scale)
        out = out if block is None else rotate(out, block)
        out = as_shown(scale_columns(out, weight), weight).to(x.dtype)
        out = out if bias is None else out + bias.to(out.dtype)
    else:
        scaled = scale_columns(as_stored(x, weight), weight)
        scaled = scaled if block is None else rotate(scaled, block)
        out = _codes_gemm(scaled, weight, bias, activation, input_scale)
    return out if weight.up is None else out + lowrank.lowrank_matmul(x, weight)


def _codes_gemm(
    x: torch.Tensor,
    weight: QTensor,
    bias: torch.Tensor | None,
    activation: qtype | None,
    input_scale: torch.Tensor | None,
) -> torch.Tensor:
    """``x @ codes.T + bias``."""
    out_features, in_features = weight._spec.seen_shape
    rows = x.reshape(-1, in_features) if in_features else x.reshape(x.shape[:-1].numel(), 0)
    tracing, needs_grad = is_tracing(), needs_gradient(x, bias)
    if tracing and onnx_nodes.exporting():
        out = custom_ops.onnx_linear(rows, bias, weight, activation, input_scale)
    elif in_jit_trace() or (
        not tracing and (in_functorch_transform() or (rows.is_cpu and not needs_grad and not runs_eagerly()))
    ):
        # torch.func, torch.jit.trace and fake tensors support only regular torch operators.
        out = reference.run(rows, weight, bias, activation, input_scale)
    elif needs_grad and not tracing and runs_eagerly():
        out = custom_ops.EagerLinear.apply(rows, bias, weight, activation, input_scale)
    elif needs_grad or tracing:
        onnx_nodes.check_wrapped()
        # The reshapes stay outside the operator: if its result were a view, autograd would forbid in-place changes to it.
        out = torch.ops.requanto.linear(rows, bias, *custom_ops.arguments(weight, activation), input_scale)
    else:
        out = custom_ops.run(rows, weight, bias, activation, input_scale)
    return out.view(*x.shape[:-1], out_features)
