"""ONNX nodes of GEMMs, lookups and dequantization with a quantized weight.

Each function takes the builder, the node that it replaces and the weight, and returns the value that replaces the node's
output and the name of what it is.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
import torch

from requanto.dtypes.qtypes import qint8, qtype, resolve_qtype
from requanto.integrations.onnx.builder import Builder
from requanto.integrations.onnx.weights import Weight
from requanto.linear.activations import TINY

FLOAT = ir.DataType.FLOAT


def linear(to: Builder, node: ir.Node, weight: Weight) -> tuple[ir.Value, str]:
    """x ``[rows, K]``, bias or None, static scale of x or None, parts -> ``[rows, N]``."""
    x, bias, input_scale, *_ = node.inputs
    assert x is not None
    word = next((w for w in node.attributes["words"].as_string().split() if w.startswith("activation=")), None)
    activation = None if word is None else resolve_qtype(word.partition("=")[2])
    dtype, transposed = node.outputs[0].dtype, weight.spec.transposed
    if activation is None:
        return _float_gemm(to, x, weight, bias, dtype, transposed)
    if activation.blocks is not None:
        raise ValueError(
            f"torch.onnx.export: {weight.name} rounds its inputs to {activation.name} in blocks, which has no form in ONNX. "
            f"Set its activation to None, or use int8 or float8 activations"
        )
    codes, scale = _quantized(to, to.cast(x, FLOAT), activation, input_scale)
    if activation is qint8 and _is_int8(weight) and not transposed:
        name = f"{weight.name}_qdata_columns"  # MatMulInteger takes [K, N]
        stored = to.initializer(name, weight.parts["qdata"].reshape(weight.spec.matrix_shape).T)
        sums = to.op("MatMulInteger", to.cast(codes, ir.DataType.INT8), stored)
        row = to.initializer(f"{weight.name}_scale", weight.scale.reshape(-1))
        out, what = to.op("Mul", to.cast(sums, FLOAT), row), "MatMulInteger"
    else:
        out, what = _float_gemm(to, codes, weight, None, FLOAT, transposed)
    out = to.cast(to.op("Mul", out, scale), dtype)
    return (out if bias is None else to.op("Add", out, to.cast(bias, dtype))), what


def _is_int8(weight: Weight) -> bool:
    return weight.spec.qtype is qint8 and weight.spec.groups == 1 and weight.shift is None


def _float_gemm(
    to: Builder, x: ir.Value, weight: Weight, bias: ir.Value | None, dtype: ir.DataType, transposed: bool
) -> tuple[ir.Value, str]:
    """``x @ weight.T + bias`` in ``dtype``."""
    if weight.block is not None and not transposed and dtype != ir.DataType.DOUBLE:
        out = to.cast(weight.times(to, to.cast(x, FLOAT)), dtype)
        return (out if bias is None else to.op("Add", out, to.cast(bias, dtype))), "MatMulNBits"
    values = weight.values(to)
    what = "DequantizeLinear" if values_are_dequantized_linearly(values) else "unpacking"
    inputs = [x, to.cast(values, dtype)] + ([] if bias is None else [to.cast(bias, dtype)])
    return to.op("Gemm", *inputs, transB=0 if transposed else 1), what


def values_are_dequantized_linearly(values: ir.Value) -> bool:
    """True if a value comes from DequantizeLinear."""
    producer = values.producer()
    while producer is not None and producer.op_type == "Reshape":
        producer = producer.inputs[0].producer()  # type: ignore[union-attr]
    return producer is not None and producer.op_type == "DequantizeLinear"


def _quantized(to: Builder, x: ir.Value, kind: qtype, input_scale: ir.Value | None) -> tuple[ir.Value, ir.Value]:
    """Codes of x as float32 and their scale, as `requanto.linear.activations.quantize_activations` computes them."""
    if input_scale is None:
        largest = to.op("ReduceMax", to.op("Abs", x), to.ints([1]), keepdims=1)
        scale = to.op("Div", to.op("Max", largest, to.number(TINY)), to.number(kind.qmax))
        inverse = to.op("Reciprocal", scale)
        bad = to.op("Mul", x, to.number(0.0))  # NaN where x is not finite
    else:
        scale = to.reshape(to.cast(input_scale, FLOAT), 1, 1)
        inverse = to.op("Reciprocal", scale)
        inverse = to.op("Where", to.op("IsInf", inverse), to.number(0.0), inverse)
        bad = to.op("Where", to.op("IsNaN", x), x, to.number(0.0))
    # Such a row becomes NaN by its scale: its codes may be integers, which have no NaN.
    scale = to.op("Add", scale, to.op("ReduceSum", bad, to.ints([1]), keepdims=1))
    codes = to.op("Mul", x, inverse)
    if kind.is_floating_point:
        codes = to.op("Clip", codes, to.number(kind.qmin), to.number(kind.qmax))
        return to.cast(to.cast(codes, _FLOAT8[kind.dtype]), FLOAT), scale
    codes = to.op("Round", codes)
    return (codes if input_scale is None else to.op("Clip", codes, to.number(kind.qmin), to.number(kind.qmax))), scale


_FLOAT8 = {
    torch.float8_e4m3fn: ir.DataType.FLOAT8E4M3FN,
    torch.float8_e4m3fnuz: ir.DataType.FLOAT8E4M3FNUZ,
    torch.float8_e5m2: ir.DataType.FLOAT8E5M2,
}


def grouped_linear(to: Builder, node: ir.Node, weight: Weight) -> tuple[ir.Value, str]:
    """x ``[rows, K]`` sorted by expert, end rows of experts, parts -> ``[rows, N]``; rows after the last end are zeros."""
    x, offsets, *_ = node.inputs
    assert x is not None
    assert offsets is not None
    experts, dtype, transposed = weight.spec.shape[0], node.outputs[0].dtype, weight.spec.transposed
    columns = weight.spec.seen_shape[1]
    ends = to.op("Concat", to.ints([0]), to.cast(offsets, ir.DataType.INT64), axis=0)
    outs, what = [], ""

    def rows(value: ir.Value, start: int) -> ir.Value:
        bounds = [
            to.op("Slice", ends, to.ints([place]), to.ints([place + 1]), to.ints([0])) for place in (start, start + 1)
        ]
        return to.op("Slice", value, *bounds, to.ints([0]))

    for index in range(experts):
        out, what = _float_gemm(to, rows(x, index), weight.expert(index), None, dtype, transposed)
        outs.append(out)
    count = to.op("Shape", x, start=0, end=1)
    last = to.op("Slice", ends, to.ints([experts]), to.ints([experts + 1]), to.ints([0]))
    shape = to.op("Concat", to.op("Sub", count, last), to.ints([columns]), axis=0)
    outs.append(to.cast(to.op("Expand", to.number(0.0), shape), dtype))
    return to.op("Concat", *outs, axis=0), what


def rows(to: Builder, node: ir.Node, weight: Weight) -> tuple[ir.Value, str]:
    """Indices ``[rows]``, parts -> float32 ``[rows, K]``."""
    assert node.inputs[0] is not None
    return weight.rows(to, node.inputs[0]), "Gather"


def values(to: Builder, node: ir.Node, weight: Weight) -> tuple[ir.Value, str]:
    """Parts -> float32 ``[*lead, K]``."""
    out = weight.values(to)
    what = "DequantizeLinear" if values_are_dequantized_linearly(out) else "unpacking"
    return (out if len(weight.spec.lead) == 1 else to.reshape(out, *weight.spec.lead, weight.spec.row_length)), what


NODES: dict[str, Callable[[Builder, ir.Node, Weight], tuple[ir.Value, str]]] = {
    "Linear": linear,
    "GroupedLinear": grouped_linear,
    "Rows": rows,
    "Values": values,
}
