"""The execution layout of the GPU kernels, and its handling during CUDA graph capture.

The layout permutes the bytes of the plain layout within blocks along K, so rows and experts can still be sliced as views.

A captured CUDA graph reads tensors by address. So codes that were read during a capture are *pinned*: they are no longer
packed or unpacked, and new codes are written into the same memory.
"""

from __future__ import annotations

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from requanto.dtypes.bit_packing import unpack
from requanto.dtypes.qtypes import qint8, qtype
from requanto.linear.gpu import conditions as rules
from requanto.tensor.layout import Layout, Parts, register_layout
from requanto.tensor.qtensor import QTensor
from requanto.tensor.spec import WeightSpec

_pinned: dict[int, StorageWeakRef] = {}


class ExecLayout(Layout):
    """Codes of 2, 3 or 4 bits in the execution layout, uint8 of the plain layout's shape."""

    name = "exec"

    def accepts(self, spec: WeightSpec) -> bool:
        return spec.qtype in rules.KINDS and spec.qtype.bits in rules.EXEC_BLOCKS and len(spec.shape) - spec.axis == 2

    def pack(self, spec: WeightSpec, parts: Parts) -> dict[str, torch.Tensor]:
        from requanto_kernels import to_exec_layout

        return {"qdata": to_exec_layout(parts["qdata"], spec.qtype.bits)}

    def unpack(self, spec: WeightSpec, parts: Parts) -> torch.Tensor:
        from requanto_kernels import from_exec_layout

        return from_exec_layout(parts["qdata"], spec.qtype.bits)

    def codes(self, spec: WeightSpec, parts: Parts, start: int, stop: int) -> torch.Tensor:
        return self._unpacked(spec, parts["qdata"].reshape(spec.matrix_shape[0], -1)[start:stop])

    def gather(self, spec: WeightSpec, parts: Parts, index: torch.Tensor) -> torch.Tensor:
        return self._unpacked(spec, torch.index_select(parts["qdata"].reshape(spec.matrix_shape[0], -1), 0, index))

    def is_readable(self, codes: torch.Tensor) -> bool:
        return not codes.numel() or codes.stride(-1) == 1 or codes.shape[-1] == 1

    def check_unpack(self, parts: Parts) -> None:
        if is_pinned(parts["qdata"]):
            raise RuntimeError(
                "a captured CUDA graph reads this packed weight by its address: delete the graph before unpacking it, or "
                "change its values in place with copy_"
            )

    def _unpacked(self, spec: WeightSpec, rows: torch.Tensor) -> torch.Tensor:
        from requanto_kernels import from_exec_layout

        return unpack(from_exec_layout(rows.contiguous(), spec.qtype.bits), spec.qtype.bits, spec.row_length)


EXEC = register_layout(ExecLayout())


def fits(weight: QTensor, activation: qtype | None = None) -> bool:
    """True for weights whose kernels can read the execution layout at full speed."""
    kind, length = weight.qtype, weight.row_length
    if weight.device.type not in rules.DEVICES or kind not in rules.KINDS or kind.bits not in rules.EXEC_BLOCKS:
        return False
    block = rules.EXEC_BLOCKS[kind.bits]
    if weight.dim() - weight.axis != 2 or length % block or capturing(weight.device) or not rules.available():
        return False
    if not rules.has_matrix_instructions(weight.device.type):
        return False  # weights are only dequantized there, which is not faster in this layout
    grouped_int8 = (activation or weight.activation) == qint8 and weight.group_size not in (None, length)
    if grouped_int8 and weight.group_size % block:
        return False  # this kernel sums integers within a group, and cannot read blocks that span several groups
    return not is_pinned(weight._qdata)


def codes_of(weight: QTensor) -> tuple[torch.Tensor, str]:
    """Codes and the name of their layout, as the kernels take them; pins the codes during a capture."""
    layout, parts = weight._storage.state
    codes = parts["qdata"]
    if capturing(codes.device):
        pin(codes)
    return codes, layout.name


def capturing(device: torch.device) -> bool:
    """True while the device's current stream captures a graph."""
    module = getattr(torch, device.type, None)
    ask = getattr(module, "is_current_stream_capturing", None)
    return ask is not None and device.type in rules.DEVICES and bool(ask())


def pin(codes: torch.Tensor) -> None:
    """Marks memory as read by a captured graph."""
    for known in [key for key, storage in _pinned.items() if storage.expired()]:
        del _pinned[known]
    storage = codes.untyped_storage()
    if storage._cdata not in _pinned:
        _pinned[storage._cdata] = StorageWeakRef(storage)


def is_pinned(codes: torch.Tensor) -> bool:
    """True for memory that a captured graph reads."""
    found = _pinned.get(codes.untyped_storage()._cdata) if _pinned else None
    return found is not None and not found.expired()
