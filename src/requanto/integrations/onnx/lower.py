"""Replaces the nodes of `requanto.runtime.onnx_nodes` in an exported model by operators of ONNX and ONNX Runtime.

Linear         int1 to int4 in groups of 16 or more: MatMulNBits (com.microsoft); int8 and float8: DequantizeLinear and
               Gemm; other types: integer operators or a lookup in the codebook, and Gemm
GroupedLinear  the same for each expert's rows
Rows           Gather of codes and scales, then dequantization of these rows
Values         DequantizeLinear, or integer operators or a lookup
Rotate         two MatMuls with Hadamard matrices
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Sequence

import onnx_ir as ir
import torch

from requanto.integrations.onnx import gemm
from requanto.integrations.onnx.builder import Builder
from requanto.integrations.onnx.constants import constant
from requanto.integrations.onnx.weights import Weight
from requanto.runtime.onnx_nodes import DOMAIN
from requanto.scales.rotation import hadamard
from requanto.tensor.layout import PLAIN
from requanto.tensor.rebuild import operator_weight

logger = logging.getLogger(__name__)

#: Name of an initializer that torch.export made of one part of a tensor subclass.
_PART = re.compile(r"(?:(.*)\.)?parametrizations\.(.+)\.original\d+$")
#: Position of a weight's first part among the inputs of a node.
_FIRST_PART = {"Linear": 3, "GroupedLinear": 2, "Rows": 1, "Values": 0}


def lower(model: ir.Model) -> None:
    """Replaces all nodes of Requanto's domain, in place.

    Raises:
        ValueError: the parts of a weight are computed in the graph, so their values are not known.
    """
    builder = Builder(model)
    for function in model.functions.values():
        for node in function:
            if node.domain == DOMAIN:
                raise ValueError(
                    f"torch.onnx.export: a quantized weight is used inside of {function.name}, a branch or loop of the "
                    f"model. Dequantize the weights that are used there (QTensor.dequantize) before exporting."
                )
    nodes = [node for node in model.graph if node.domain == DOMAIN]
    parts = {v for node in nodes if node.op_type in _FIRST_PART for v in node.inputs[_FIRST_PART[node.op_type] :]}
    weights = _weights(nodes)
    used: Counter[str] = Counter()
    for node in nodes:
        used[_replace(model, builder, node, weights)] += 1
    _remove_unused(model, parts)
    model.opset_imports.pop(DOMAIN, None)
    if any(node.domain == "com.microsoft" for node in model.graph):
        model.opset_imports["com.microsoft"] = 1
    if used:
        logger.info("torch.onnx.export: quantized weights became %s", ", ".join(f"{n} {k}" for k, n in used.items()))
    if any(value.dtype == ir.DataType.BFLOAT16 for node in nodes for value in node.outputs):
        logger.warning(
            "torch.onnx.export: the model computes in bfloat16, for which ONNX Runtime has no CPU kernels. Load it with "
            "dtype=torch.float32 to run the file on a CPU."
        )


def _weights(nodes: list[ir.Node]) -> dict[ir.Node, Weight]:
    """The weight of each node; nodes of one weight, such as tied ones, share it."""
    found: dict[tuple, Weight] = {}
    by_node, names = {}, Counter()
    for node in nodes:
        first = _FIRST_PART.get(node.op_type)
        if first is None:
            continue
        values = [constant(value, node.name) for value in node.inputs[first:]]
        words = node.attributes["words"].as_string()
        plain = re.sub(r" activation=\S+", "", words)
        key = plain, tuple(value.data_ptr() for value in values), tuple(node.attributes["shape"].as_ints())
        if key not in found:
            spec, layout, parts = operator_weight(values, plain, list(key[2]), torch.float32)
            layout.check(spec, parts)
            if layout is not PLAIN:
                parts = {n: p for n, p in parts.items() if n not in layout.extra} | {
                    "qdata": layout.unpack(spec, parts)
                }
            name = _name(node.inputs[first:])
            names[name] += 1
            found[key] = Weight(name if names[name] == 1 else f"{name}.{names[name]}", spec, parts)
            if spec.column:
                _name_column(node.inputs[first + layout.names(spec).index("column")], found[key].name)
        found[key].looked_up |= node.op_type == "Rows"
        by_node[node] = found[key]
    return by_node


def _name(parts: Sequence[ir.Value | None]) -> str:
    """Name of a weight in the model, from its parts or what they were computed from."""
    names = []
    for value in parts:
        while value is not None and value.producer() is not None and value.producer().inputs:
            value = value.producer().inputs[0]
        names.append((value is not None and value.name) or "weight")
    matches = [match for name in names if (match := _PART.match(name))]
    return ".".join(part for part in matches[0].groups() if part) if matches else names[0]


def _name_column(part: ir.Value | None, name: str) -> None:
    """Names the column scale as in a checkpoint. It stays an initializer of the graph, which multiplies x by it."""
    if part is not None and part.is_initializer():
        part.name = f"{name}_column"


def _replace(model: ir.Model, builder: Builder, node: ir.Node, weights: dict[ir.Node, Weight]) -> str:
    """Replaces one node; returns what it was replaced by."""
    builder.start()
    if node.op_type == "Rotate":
        out, what = _rotate(builder, node), "rotation"
    else:
        out, what = gemm.NODES[node.op_type](builder, node, weights[node])
    old = node.outputs[0]
    out.type, out.shape, name = old.type, old.shape, old.name
    ir.convenience.replace_nodes_and_values(model.graph, node, [node], builder.nodes, [old], [out])
    out.name = name
    return what


def _rotate(to: Builder, node: ir.Node) -> ir.Value:
    x, block = node.inputs[0], node.attributes["block"].as_int()
    power = block.bit_length() - 1
    left, right = 2 ** ((power + 1) // 2), 2 ** (power // 2)
    wide = to.reshape(to.cast(x, ir.DataType.FLOAT), -1, left, right)

    def times(value: ir.Value, size: int) -> ir.Value:
        matrix = hadamard(size, torch.device("cpu"))
        return to.op("MatMul", value, to.initializer(f"requanto.hadamard{size}", matrix))

    wide = times(wide, right) if right > 1 else wide
    wide = to.op("Transpose", times(to.op("Transpose", wide, perm=[0, 2, 1]), left), perm=[0, 2, 1])
    return to.op("Reshape", to.cast(wide, node.outputs[0].dtype), to.op("Shape", x))


def _remove_unused(model: ir.Model, parts: set[ir.Value | None]) -> None:
    """Removes the initializers that held the parts, and what was computed from them."""
    left = list(parts)
    while left:
        value = left.pop()
        if value is None or value.uses() or value.is_graph_output():
            continue
        producer = value.producer()
        if producer is not None:
            if all(not output.uses() and not output.is_graph_output() for output in producer.outputs):
                left.extend(producer.inputs)
                model.graph.remove(producer, safe=True)
        elif value.name in model.graph.initializers and model.graph.initializers[value.name] is value:
            del model.graph.initializers[value.name]
