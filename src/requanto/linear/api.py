"""`linear` and `times`: checks, shapes, gradients; the work is done by the table's choice.

Under torch.compile, and where a gradient is wanted, the product is the operator ``requanto::linear`` on the plain inner
tensors: one node without a graph break, one graph for all layers of a shape, and a backward that dequantizes again
instead of keeping the float weight.
"""

from __future__ import annotations

import torch

from requanto.tensor import lowrank
from requanto.tensor.layout import LOCK

from requanto.linear import reference  # isort: skip  (closes the table, before the others enter it)
from requanto.dtypes.qtypes import qtype, qtypes
from requanto.linear import plan_cache
from requanto.linear.cpu import paths as cpu
from requanto.linear.gpu import paths as triton
from requanto.linear.prepack import pack_on_first_use
from requanto.linear.registry import choose, problem_of
from requanto.runtime.settings import choices
from requanto.runtime.tracing import has_numbers, is_tracing, transformed, wants_gradient
from requanto.tensor.qtensor import QTensor
from requanto.tensor.rotation import rotate

__all__ = ["cpu", "linear", "packed_product", "reference", "times", "triton"]

#: Choices remembered per weight: one for each number of rows it met lately.
REMEMBERED = 64


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
    if type(x) is torch.Tensor:
        usual = (
            input_scale is None and (activation is None or activation is weight.activation) and not weight.transposed
        )
        product = plan_cache.find(x, weight, bias) if usual else None
        if product is not None:
            return product(x, weight, bias)
        # Every look at a QTensor's shape or device would be a function call of its own: half of a small layer's time.
        with torch._C.DisableTorchFunctionSubclass():
            out = _checked(x, weight, bias, activation, input_scale)
            if usual:
                plan_cache.remember(x, weight)
            return out
    return _checked(x, weight, bias, activation, input_scale)


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
        As `linear` of the transpose. A layer's weight is packed for it, and its products are made ready, as there.
    """
    out = None
    plain = not torch.compiler.is_compiling() and type(x) in (torch.Tensor, torch.nn.Parameter)
    if plain and weight.transposed and x.is_cpu:
        out = packed_product(x, weight, bias, activation=activation, input_scale=input_scale)
    return linear(x, weight.t(), bias, activation=activation, input_scale=input_scale) if out is None else out


def packed_product(
    x: torch.Tensor,
    weight: QTensor,
    bias: torch.Tensor | None,
    *,
    activation: qtype | None = None,
    input_scale: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """`linear` of the matrix ``[N, K]`` that a weight of another shape is stored as: a transposed one, or that of a
    convolution. The parameter itself is packed for it.

    Returns:
        None where it is not to be packed: a gradient is wanted, or something traces, or it has no such form.
    """
    usual = input_scale is None and (activation is None or activation is weight.activation)
    product = plan_cache.find(x, weight, bias) if usual else None
    if product is not None:
        return product(x, weight, bias)
    asked = wants_gradient(x, bias)
    with torch._C.DisableTorchFunctionSubclass():
        if asked or not has_numbers():
            _ = weight.operand  # once for all steps, where the weight has to be plain
            if has_numbers() or is_tracing():
                return None
            # torch.func takes no transpose of a tensor that has parts; the matrix is made of these.
            return _checked(x, plan_cache.matrix(weight), bias, activation, input_scale)
        pack_on_first_use(weight, torch.get_autocast_dtype("cpu") if _autocast(x) else x.dtype, activation)
        view = plan_cache.matrix(weight)
        packed = view.packed
        if packed is None:
            return None
        out = _checked(x, view, bias, activation, input_scale)
        if view.packed is not packed:
            with LOCK:  # this product read the stored codes: they are not to be made anew each time
                if weight.packed is packed:
                    weight.qdata = view.qdata.view(weight.stored_shape)
        if usual and not _autocast(x):
            plan_cache.remember(x, weight)
        return out


def _autocast(x: torch.Tensor) -> bool:
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def _checked(
    x: torch.Tensor,
    weight: QTensor,
    bias: torch.Tensor | None,
    activation: qtype | None,
    input_scale: torch.Tensor | None,
) -> torch.Tensor:
    if _autocast(x):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"linear: x of shape {tuple(x.shape)} does not fit a weight of shape {tuple(weight.shape)}; x's last axis "
            f"must be {weight.shape[-1]}"
        )
    if not x.is_floating_point():
        raise ValueError(f"linear: x must be a float tensor, found {x.dtype}")
    if x.device != weight.device:
        raise ValueError(f"linear: x is on {x.device}, the weight on {weight.device}; move one of them")
    if activation is None:
        activation = weight.activation
    if input_scale is not None and activation is None:
        raise ValueError("linear: input_scale is the scale of quantized activations; name their type as well")
    # Implementations multiply with the codes as they are stored; what stands beside them, and their rotation, is done here.
    block = weight.rotation
    if block is None:
        out = _product(x, weight, bias, activation, input_scale)
    elif input_scale is not None:
        raise ValueError(
            f"linear: a static input_scale is that of x as it comes, and this weight is multiplied with x rotated in blocks "
            f"of {block}. Use activations without calibration (a scale for each token), or no rotation."
        )
    elif weight.transposed:
        out = rotate(_product(x, weight, None, activation, None), block)
        out = out if bias is None else out + bias.to(out.dtype)
    else:
        out = _product(rotate(x, block), weight, bias, activation, None)
    return out if weight.up is None else out + lowrank.product(x, weight)


def _product(
    x: torch.Tensor,
    weight: QTensor,
    bias: torch.Tensor | None,
    activation: qtype | None,
    input_scale: torch.Tensor | None,
) -> torch.Tensor:
    """``x @ codes.T + bias``."""
    rows = x.reshape(-1, x.shape[-1])
    compiling = is_tracing()
    needs_grad = wants_gradient(x, bias)
    if not compiling and (transformed() or (rows.is_cpu and not needs_grad and not has_numbers())):
        # For torch.func, other tracers and fake tensors: operators that all of them know.
        out = reference.run(rows, weight, bias, activation, input_scale)
    elif needs_grad or compiling:
        # Rows in, rows out: the result of an operator with a backward of its own must be no view, or users could not
        # change it in place. A backward reads the stored codes; compiled inference takes packed ones by their handle.
        out = torch.ops.requanto.linear(
            rows,
            weight._qdata if compiling else weight.operand,
            weight._scale,
            weight._shift,
            bias,
            weight.qtype.name,
            weight.group_size or 0,
            list(weight.canonical_shape),
            weight.transposed,
            "" if activation is None else activation.name,
            input_scale,
            weight.codebook,
            weight.row_scale,
            weight.scale_bits or 0,
        )
    else:
        if not weight.transposed:
            pack_on_first_use(weight, x.dtype, activation)
        out = _run(rows, weight, bias, activation, input_scale)
    return out.view(*x.shape[:-1], weight.shape[0])


def _run(
    x: torch.Tensor,
    weight: QTensor,
    bias: torch.Tensor | None,
    activation: qtype | None = None,
    input_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """``[rows, K] -> [rows, N]`` by the table's choice."""
    if x.shape[0] == 0:
        return x.new_empty(0, weight.shape[0])
    # The choice is remembered with the weight: asking the table anew costs more than a small layer's product.
    known = weight.__dict__.setdefault("_choices", {})
    static = input_scale is not None
    key = (x.shape[0], x.dtype, activation, static, weight.packed is None, choices.version)
    run = known.get(key)
    if run is None:
        run = choose(problem_of(weight, x.dtype, x.shape[0], activation, static=static)).implementation.run
        if len(known) >= REMEMBERED:
            known.clear()
        known[key] = run
    return run(x, weight, bias, activation, input_scale)


def weight_of(
    qdata: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor | None,
    name: str,
    group: int,
    canonical: list[int],
    transposed: bool,
    dtype: torch.dtype,
    codebook: torch.Tensor | None = None,
    row_scale: torch.Tensor | None = None,
    scale_bits: int = 0,
) -> QTensor:
    """The weight that an operator was given in parts."""
    shape = canonical[:-2] + [canonical[-1], canonical[-2]] if transposed else canonical
    return QTensor(
        qdata,
        scale,
        shift,
        qtype=qtypes[name],
        shape=shape,
        dtype=dtype,
        axis=len(canonical) - 2,
        group_size=group or None,
        transposed=transposed,
        codebook=codebook,
        row_scale=row_scale,
        scale_bits=scale_bits or None,
    )


@torch.library.custom_op("requanto::linear", mutates_args=())
def _linear_op(
    x: torch.Tensor,
    qdata: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor | None,
    bias: torch.Tensor | None,
    name: str,
    group: int,
    canonical: list[int],
    transposed: bool,
    activation: str = "",
    input_scale: torch.Tensor | None = None,
    codebook: torch.Tensor | None = None,
    row_scale: torch.Tensor | None = None,
    scale_bits: int = 0,
) -> torch.Tensor:
    weight = weight_of(
        qdata, scale, shift, name, group, canonical, transposed, x.dtype, codebook, row_scale, scale_bits
    )
    return _run(x, weight, bias, qtypes[activation] if activation else None, input_scale)


@_linear_op.register_fake
def _(  # type: ignore[no-untyped-def]
    x,
    qdata,
    scale,
    shift,
    bias,
    name,
    group,
    canonical,
    transposed,
    activation="",
    input_scale=None,
    codebook=None,
    row_scale=None,
    scale_bits=0,
):
    return x.new_empty(*x.shape[:-1], canonical[-1] if transposed else canonical[-2])


@torch.library.custom_op("requanto::linear_backward", mutates_args=())
def _linear_backward_op(
    grad: torch.Tensor,
    qdata: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor | None,
    name: str,
    group: int,
    canonical: list[int],
    transposed: bool,
    codebook: torch.Tensor | None = None,
    row_scale: torch.Tensor | None = None,
    scale_bits: int = 0,
) -> torch.Tensor:
    # The gradient with respect to x is grad @ W: the same product with the weight seen transposed. (Quantized activations
    # pass it straight through.)
    weight = weight_of(
        qdata, scale, shift, name, group, canonical, not transposed, grad.dtype, codebook, row_scale, scale_bits
    )
    return _run(grad, weight, None)


@_linear_backward_op.register_fake
def _(grad, qdata, scale, shift, name, group, canonical, transposed, codebook=None, row_scale=None, scale_bits=0):  # type: ignore[no-untyped-def]
    return grad.new_empty(*grad.shape[:-1], canonical[-2] if transposed else canonical[-1])


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _x, qdata, scale, shift, bias, name, group, canonical, transposed, _activation, _input_scale, *stored = inputs
    codebook, row_scale, scale_bits = stored
    ctx.save_for_backward(qdata, scale, shift, codebook, row_scale)
    ctx.has_bias = bias is not None
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.rest, ctx.scale_bits = (name, group, canonical, transposed), scale_bits


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    qdata, scale, shift, *stored = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.requanto.linear_backward(grad, qdata, scale, shift, *ctx.rest, *stored, ctx.scale_bits)
    if ctx.has_bias and ctx.needs_input_grad[4]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
    return grad_x, None, None, None, grad_bias, *(None,) * 9


_linear_op.register_autograd(_backward, setup_context=_setup_context)
