"""Makes the nodes and initializers that replace one node of an ONNX graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tape import Tape

_DTYPES = {
    torch.float8_e4m3fn: ir.DataType.FLOAT8E4M3FN,
    torch.float8_e4m3fnuz: ir.DataType.FLOAT8E4M3FNUZ,
    torch.float8_e5m2: ir.DataType.FLOAT8E5M2,
    torch.bfloat16: ir.DataType.BFLOAT16,
}


#: dtypes of results that differ from the first input's, and the inputs that other results get theirs from
_RESULT = {
    "Shape": ir.DataType.INT64,
    "MatMulInteger": ir.DataType.INT32,
    "IsInf": ir.DataType.BOOL,
    "IsNaN": ir.DataType.BOOL,
}
_TYPED_BY = {"DequantizeLinear": 1, "Where": 1}


class Builder:
    """Records nodes, in order; initializers go to the graph at once, each name once."""

    def __init__(self, model: ir.Model) -> None:
        self.model, self._tape = model, Tape()
        self._made: dict[tuple, ir.Value] = {}

    def start(self) -> None:
        """Begins a new list of nodes."""
        self._tape = Tape()

    @property
    def nodes(self) -> Sequence[ir.Node]:
        """The nodes since `start`."""
        return self._tape.nodes

    @property
    def opset(self) -> int:
        """Version of ONNX's own operators in the model."""
        return self.model.opset_imports[""]

    def op(self, name: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        """A node with one output."""
        version = self.opset if not domain else 1
        out = self._tape.op(name, list(inputs), attributes, domain=domain, version=version)
        out.dtype = _RESULT.get(name) or inputs[_TYPED_BY.get(name, 0)].dtype  # type: ignore[union-attr]
        return out

    def initializer(self, name: str, value: torch.Tensor) -> ir.Value:
        """The initializer of that name, shape and dtype, made of ``value`` when it is first asked for."""
        key = name, tuple(value.shape), value.dtype
        if key in self._made:
            return self._made[key]
        value = value.detach().cpu().contiguous()
        kind = _DTYPES.get(value.dtype)
        raw = value if kind is None else value.view(torch.uint8 if value.dtype.itemsize == 1 else torch.uint16)
        array = raw.numpy() if kind is None else raw.numpy().view(kind.numpy())
        free = name
        while free in self.model.graph.initializers:  # in another shape, or the model's own tensor
            free += "_"
        tensor = ir.Tensor(array, dtype=kind, name=free)
        made = ir.Value(name=free, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        self._made[key] = self.model.graph.initializers[free] = made
        return made

    def ints(self, values: int | Sequence[int]) -> ir.Value:
        """An int64 constant: a number, or an axis of them."""
        return self._constant(np.array(values, np.int64))

    def number(self, value: float, dtype: type = np.float32) -> ir.Value:
        """A constant number."""
        return self._constant(np.array(value, dtype))

    def numbers(self, values: Sequence[float], dtype: type = np.float32) -> ir.Value:
        """A constant axis of numbers."""
        return self._constant(np.array(values, dtype))

    def _constant(self, array: np.ndarray) -> ir.Value:
        tensor = ir.Tensor(array)
        out = self._tape.op("Constant", [], {"value": tensor}, version=self.opset)
        out.dtype = tensor.dtype
        return out

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """The value in another dtype."""
        if value.dtype == dtype:
            return value
        out = self.op("Cast", value, to=dtype.value)
        out.dtype = dtype
        return out

    def reshape(self, value: ir.Value, *shape: int) -> ir.Value:
        """The value in another shape; -1 and 0 as in ONNX."""
        return self.op("Reshape", value, self.ints(shape))
