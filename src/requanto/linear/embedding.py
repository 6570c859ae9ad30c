"""Embedding lookups in a quantized weight."""

from __future__ import annotations

import torch

from requanto.dtypes.bit_packing import pack
from requanto.linear import custom_ops
from requanto.linear.columns import as_shown
from requanto.linear.cpu import rows as cpu
from requanto.linear.cpu.dequantize import codes_to_float
from requanto.linear.gpu import dequantize as gpu
from requanto.linear.prepack import EMBEDDING_WEIGHT
from requanto.runtime import onnx_nodes
from requanto.runtime.tracing import in_jit_trace, is_fake, is_tracing, runs_eagerly, without_autocast
from requanto.scales.rotation import rotate
from requanto.tensor.layout import PLAIN
from requanto.tensor.qtensor import QTensor, scaled_values


def embedding(indices: torch.Tensor, weight: QTensor) -> torch.Tensor:
    """Looks up rows of a quantized weight, dequantizing only these rows.

    Args:
        indices: integer, any shape.
        weight: quantized ``[entries, features]``.

    Returns:
        ``[*indices.shape, features]`` in the weight's dtype.

    Raises:
        NotImplementedError: the weight is transposed, or not quantized along axis 0.
        ValueError: the indices are no integers.
        IndexError: an index is out of range.
    """
    if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
        raise ValueError(f"embedding: indices must be integers, found {indices.dtype}")
    if weight.transposed or weight.axis != 0:
        raise NotImplementedError("embedding needs a weight quantized along its rows; call .dequantize() first")
    storage = weight._storage
    # A CPU looks up rows of packed weights as fast as of plain ones, so a table that is multiplied too is packed for that.
    if storage.layout is PLAIN and storage.stays_plain != EMBEDDING_WEIGHT and not storage.parts["qdata"].is_cpu:
        storage.stays_plain = EMBEDDING_WEIGHT
    with torch._C.DisableTorchFunctionSubclass():  # else each access to a QTensor's shape is a Python call
        if in_jit_trace():
            return torch.nn.functional.embedding(indices, weight.dequantize())
        flat = indices.reshape(-1)
        if is_tracing() and onnx_nodes.exporting():
            rows = _onnx_rows(weight, flat)
        elif weight.is_packed and is_tracing():
            rows = weight.dequantize()[flat] if weight.dim() > 2 else _traced_rows(weight, flat)
        elif weight.dim() == 2 and gpu.by_kernel(weight):
            rows = gpu.gathered_rows(weight, flat)
        else:
            found = _by_library(weight, flat) if storage.parts["qdata"].is_cpu and runs_eagerly() else None
            if found is not None:
                rows = found
            elif _simple(weight):
                rows = _values(weight, flat)
            else:
                rows = _picked(weight, flat).dequantize()
        return rows.view(*indices.shape, *weight._spec.shape[1:])


def _by_library(weight: QTensor, indices: torch.Tensor) -> torch.Tensor | None:
    """These rows by the C library of CPU kernels; None if it cannot read the weight."""
    parts, rotation = weight._storage.parts, weight._spec.rotation
    if rotation is None and not any(name in parts for name in ("column", "order", "up")):
        return cpu.gather(weight, indices, weight._spec.dtype)
    values = cpu.gather(weight, indices, torch.float32)
    return None if values is None else _finished(weight, values, indices)


def _traced_rows(weight: QTensor, indices: torch.Tensor) -> torch.Tensor:
    """These rows of a packed weight, of which the codes are looked up by an operator of the graph."""
    values = torch.ops.requanto.stored_rows(indices, *custom_ops.arguments(weight))
    return _finished(weight, values, indices)


def _finished(weight: QTensor, values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Rows in the weight's dtype from their dequantized codes, float32."""
    up = None if weight.up is None else torch.index_select(weight.up, 0, indices)
    with without_autocast(weight.device):
        return gpu.finished(values, weight, 0, up).to(weight.dtype)


def quick_lookup(indices: torch.Tensor, weight: QTensor) -> torch.Tensor | None:
    """`embedding` of a matrix on the CPU in one call of the library; None where more is to be done or checked."""
    spec, parts = weight._spec, weight._storage.parts
    if spec.axis or spec.transposed or spec.rotation is not None or spec.column or spec.order or len(spec.shape) != 2:
        return None
    if not indices.is_cpu or indices.dtype not in _INDICES or not runs_eagerly() or "up" in parts:
        return None
    found = cpu.lookup(weight, spec.dtype) if parts["qdata"].is_cpu and not is_fake(parts["qdata"]) else None
    return None if found is None else found(indices)


_INDICES = (torch.int32, torch.int64)


def _onnx_rows(weight: QTensor, indices: torch.Tensor) -> torch.Tensor:
    """These rows, dequantized, of which the codes are looked up by a node of an ONNX graph."""
    parts, attributes = weight.onnx_inputs()
    shape = (indices.shape[0], weight.row_length)
    values = onnx_nodes.node("Rows", [indices, *parts], attributes, parts[0], shape, torch.float32)
    values = values if weight.rotation is None else rotate(values, weight.rotation)
    values = as_shown(values if weight.column is None else values * weight.column.float(), weight)
    if weight.up is not None and weight.down is not None:
        values = values + torch.index_select(weight.up, 0, indices).float() @ weight.down.float()
    return values.to(weight.dtype)


def stored_rows(weight: QTensor, indices: torch.Tensor) -> torch.Tensor:
    """Rows ``[len(indices), K]`` of the dequantized codes in float32, without what belongs to the weight besides."""
    found = cpu.gather(weight, indices, torch.float32) if indices.is_cpu else None
    return _picked(weight, indices).stored_values() if found is None else found


def _picked(weight: QTensor, indices: torch.Tensor) -> QTensor:
    """These rows as a new weight in the plain layout."""
    spec, whole = weight._spec, weight.shared_along(0)
    layout, parts = weight._storage.state
    picked = {n: p if n in whole else _rows(p, indices) for n, p in parts.items() if n not in ("qdata", *layout.extra)}
    if layout is PLAIN:
        picked["qdata"] = _rows(parts["qdata"], indices)
    else:
        codes = layout.gather(spec, parts, indices)
        picked["qdata"] = pack(codes, spec.qtype.bits) if spec.qtype.is_packed else codes
    return weight.with_inner(picked, shape=(indices.numel(), *weight.shape[1:]))


def _simple(weight: QTensor) -> bool:
    """True if a weight has only codes, scale and shift, so that rows can be dequantized without a new QTensor."""
    return (
        weight.rotation is None
        and weight.order is None
        and weight.up is None
        and not weight._spec.code_bits
        and not weight.qtype.is_codebook
        and weight.dim() == 2
        and weight.numel() > 0
    )


def _values(weight: QTensor, indices: torch.Tensor) -> torch.Tensor:
    """These rows, dequantized to the same values as by `QTensor.dequantize` but without a new QTensor."""
    kind = weight.qtype
    layout, parts = weight._storage.state
    codes, scale = layout.gather(weight._spec, parts, indices), _rows(parts["scale"], indices)
    if kind.is_floating_point and codes.is_cpu and runs_eagerly():
        values = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
        codes_to_float(codes, kind, values)
    else:
        values = codes.to(torch.float32)
    shift = _rows(parts["shift"], indices) if "shift" in parts else None
    values = scaled_values(values, kind, scale, shift, weight.row_length)
    return (values * parts["column"].float() if "column" in parts else values).to(weight.dtype)


def _rows(part: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    # index_select of bytes copies whole rows; like F.embedding, it raises an error for an index out of range.
    if part.dtype.itemsize > 1:
        return torch.index_select(part, 0, indices)
    return torch.index_select(part.view(torch.uint8), 0, indices).view(part.dtype)
