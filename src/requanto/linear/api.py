"""`linear` and `times`: checks, shapes, gradients; the registry's choice does the work.

The way of a call: here, the plan that the weight keeps for x's shape (`requanto.linear.registry.find_plan`) or the
registry's choice, the back end, the kernel. Under torch.compile, and where a gradient is wanted, the GEMM is one operator
(`requanto.linear.custom_ops`).
"""

from __future__ import annotations

import torch

from requanto.linear import reference  # isort: skip  (closes the registry, before the others enter it)
from requanto.dtypes.qtypes import qtype, qtypes
from requanto.linear import custom_ops
from requanto.linear.cpu import paths as cpu
from requanto.linear.gpu import paths as gpu
from requanto.linear.prepack import pack_on_first_use
from requanto.linear.registry import find_plan, remember_plan
from requanto.runtime.tracing import has_numbers, is_recorded, is_tracing, transformed, wants_gradient
from requanto.tensor import lowrank
from requanto.tensor.qtensor import QTensor
from requanto.tensor.rotation import rotate

__all__ = ["cpu", "gpu", "linear", "packed_product", "reference", "times"]

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def linear(
    x: torch.Tensor,
    weight: QTensor,
    bias: torch.Tensor | None = None,
    *,
    activation: qtype | None = None,
    input_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x @ weight.T + bias``.

    Args:
        x: float ``[..., K]``.
        weight: quantized ``[N, K]``.
        bias: float ``[N]``.
        activation: type that x is quantized to on the way in (``qint8``, float8); None: the weight's own choice
            (``weight.activation``), by default to leave x as it is.
        input_scale: with an activation type, a static scale, one number; None: a scale for each token.

    Returns:
        ``[..., N]`` in x's dtype (autocast's, inside autocast).

    Raises:
        ValueError: shapes or devices that do not fit.
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
    """``x @ weight + bias``: that of GPT-2's ``Conv1D``, whose weight ``[K, N]`` is stored as one of ``[N, K]``.

    Args:
        x: float ``[..., K]``.
        weight: quantized ``[K, N]``.
        bias, activation, input_scale: as in `linear`.

    Returns, Raises:
        As `linear` of the transpose.
    """
    return _gemm(x, weight, bias, activation, input_scale, flip=True)


def packed_product(x: torch.Tensor, weight: QTensor, bias: torch.Tensor | None) -> torch.Tensor | None:
    """`linear` of the matrix ``[N, K]`` that the weight of a convolution is stored as; the parameter is packed for it.

    Returns:
        None where it is not packed: a gradient is wanted, or something traces, or it has no such layout.
    """
    if wants_gradient(x, bias) or not has_numbers():
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
    """``x @ weight.T``, or ``x @ weight`` where ``flip``."""
    if torch.compiler.is_compiling():  # first: a compiler that reads this needs no more
        name = "" if activation is None else activation.name
        return torch.ops.requanto.linear_weight(x, weight, bias, name, input_scale, flip)
    spec = weight._spec
    usual = (
        type(x) in _PLAIN
        and spec.transposed is flip  # x @ stored.T, which plans and packed layouts are for
        and input_scale is None
        and (activation is None or activation is spec.activation)
    )
    if usual:
        gemm = find_plan(x, weight, bias)
        if gemm is not None:
            return gemm(x, weight, bias)
    # Every look at a QTensor's shape or device would be a function call of its own: half of a small layer's time.
    with torch._C.DisableTorchFunctionSubclass():
        if spec.transposed is flip and has_numbers():
            dtype = torch.get_autocast_dtype(x.device.type) if _autocast(x) else x.dtype
            pack_on_first_use(weight, dtype, activation or spec.activation)
        seen = weight if not flip else weight.over_same_storage(transposed=not spec.transposed)
        out = _checked(x, seen, bias, activation, input_scale)
        if usual and not _autocast(x) and not wants_gradient(x, bias):
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
    """What torch.compile puts into its graph as a node, without reading this module; autograd and AOT take it apart."""
    seen = weight.t() if flip else weight
    return _checked(x, seen, bias, qtypes[activation] if activation else None, input_scale)


_library = torch.library.Library("requanto", "FRAGMENT")
_library.define(
    "linear_weight(Tensor x, Tensor weight, Tensor? bias, str activation, Tensor? input_scale, bool flip) -> Tensor"
)
_library.impl("linear_weight", _traced, "CompositeImplicitAutograd")


def _autocast(x: torch.Tensor) -> bool:
    # Autocast leaves float64 as it is, as it does in torch's own linear.
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
        raise ValueError("linear: input_scale is the scale of quantized activations; name their type as well")
    # Back ends multiply with the codes as they are stored; the low-rank term and the rotation are done here.
    block = weight.rotation
    if block is None:
        out = _codes_gemm(x, weight, bias, activation, input_scale)
    elif input_scale is not None:
        raise ValueError(
            f"linear: a static input_scale is that of x as it comes, and this weight is multiplied with x rotated in blocks "
            f"of {block}. Use activations without calibration (a scale for each token), or no rotation."
        )
    elif weight.transposed:
        out = rotate(_codes_gemm(x, weight, None, activation, None), block)
        out = out if bias is None else out + bias.to(out.dtype)
    else:
        out = _codes_gemm(rotate(x, block), weight, bias, activation, None)
    return out if weight.up is None else out + lowrank.product(x, weight)


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
    tracing, needs_grad = is_tracing(), wants_gradient(x, bias)
    if is_recorded() or (not tracing and (transformed() or (rows.is_cpu and not needs_grad and not has_numbers()))):
        # For torch.func, other tracers and fake tensors: operators that all of them know.
        out = reference.run(rows, weight, bias, activation, input_scale)
    elif needs_grad or tracing:
        # Rows in, rows out: the result of an operator with a backward of its own must be no view, or users could not
        # change it in place.
        out = torch.ops.requanto.linear(rows, bias, *custom_ops.arguments(weight, activation), input_scale)
    else:
        out = custom_ops.run(rows, weight, bias, activation, input_scale)
    return out.view(*x.shape[:-1], out_features)
