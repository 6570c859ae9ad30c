"""Values of an ONNX graph that are known when it is exported."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch

#: Operators that move elements, by which the parts of a slice or a view of a weight are computed.
_MOVES = {"Identity", "Reshape", "Slice", "Squeeze", "Unsqueeze", "Transpose", "Gather"}


def constant(value: ir.Value | None, user: str) -> torch.Tensor:
    """The tensor of an initializer or a constant, or of a view of one.

    Args:
        user: name of the node that reads it, for the message.

    Raises:
        ValueError: the value depends on the model's inputs.
    """
    if value is None:
        raise ValueError(f"torch.onnx.export: {user} lacks a part of its quantized weight")
    found = value.const_value
    if found is not None:
        raw = getattr(found, "raw", None)
        return raw.detach() if isinstance(raw, torch.Tensor) else _of_array(found.numpy())
    node = value.producer()
    if node is None or node.domain or (node.op_type not in _MOVES and node.op_type != "Constant"):
        made_by = "an input of the model" if node is None else f"the result of {node.op_type}"
        raise ValueError(
            f"torch.onnx.export: the codes or scales of a quantized weight that {user} reads are {made_by}, but they must "
            f"be constant. Dequantize this weight (QTensor.dequantize) before exporting."
        )
    if node.op_type == "Constant":
        return _of_array(node.attributes["value"].as_tensor().numpy())
    data, *rest = [None if v is None else constant(v, user) for v in node.inputs]
    assert data is not None
    return _moved(node, data, [None if v is None else v.tolist() for v in rest])


def _of_array(array: np.ndarray) -> torch.Tensor:
    if array.dtype.kind == "V" or array.dtype.name.startswith(("float8", "bfloat16")):  # types of ml_dtypes
        bits = torch.from_numpy(array.view(np.uint8 if array.dtype.itemsize == 1 else np.uint16).copy())
        return bits.view(getattr(torch, array.dtype.name))
    return torch.from_numpy(np.array(array))


def _moved(node: ir.Node, data: torch.Tensor, rest: list) -> torch.Tensor:
    kind = node.op_type
    if kind == "Identity":
        return data
    if kind == "Reshape":
        return data.reshape([data.shape[i] if size == 0 else size for i, size in enumerate(rest[0])])
    if kind == "Squeeze":
        axes = rest[0] if rest else [i for i, size in enumerate(data.shape) if size == 1]
        return data.squeeze(tuple(axes))
    if kind == "Unsqueeze":
        for axis in sorted(axis % (data.dim() + len(rest[0])) for axis in rest[0]):
            data = data.unsqueeze(axis)
        return data
    if kind == "Transpose":
        return data.permute(node.attributes["perm"].as_ints() if "perm" in node.attributes else range(data.dim())[::-1])
    if kind == "Gather":
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
        index = torch.tensor(rest[0], dtype=torch.int64, device="cpu")
        bytes_ = data.view(torch.uint8) if data.dtype.itemsize == 1 else data
        found = bytes_.index_select(axis, index.reshape(-1) % data.shape[axis]).view(data.dtype)
        return found.reshape(*data.shape[:axis], *index.shape, *data.shape[axis + 1 :])
    starts, ends, axes, steps = (*rest, *[None] * 4)[:4]
    for i, (start, end) in enumerate(zip(starts, ends)):
        axis, step = (axes[i] if axes else i), (steps[i] if steps else 1)
        data = data[(*[slice(None)] * (axis % data.dim()), slice(start, end, step))]
    return data
