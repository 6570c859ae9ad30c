"""The execution layout of the GPU kernels in place of the stored codes, and what CUDA graphs mean for it.

The layout is the stored bytes permuted, seen as 16-bit words. That dtype says which form it is (codes are never int16), so
operators take the words themselves: forward, backward and compiled graphs read them, and nothing crosses to the host.

A captured CUDA graph knows addresses only. Codes that were read during a capture are *pinned*: they are neither packed nor
unpacked any more, and whoever asks for the stored form gets a copy.
"""

from __future__ import annotations

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from requanto.dtypes.qtypes import qint8, qtype
from requanto.linear.gpu import conditions as rules
from requanto.tensor.layout import Packed, register_form
from requanto.tensor.qtensor import QTensor

LAYOUT = "exec"

_pinned: dict[int, StorageWeakRef] = {}


class Words(Packed):
    """Codes of 2 or 4 bits in execution layout: int16 ``[..., N, K * bits / 16]``."""

    layout = LAYOUT
    travels = True

    def __init__(self, words: torch.Tensor, bits: int) -> None:
        self.handle, self.bits = words, bits

    @property
    def bytes(self) -> torch.Tensor:
        """The same memory as the kernels take it."""
        return self.handle.view(torch.uint8)

    def plain(self) -> torch.Tensor:
        from requanto_kernels import from_exec_layout

        return from_exec_layout(self.bytes, self.bits)

    def write(self, codes: torch.Tensor) -> None:
        from requanto_kernels import to_exec_layout

        self.bytes.copy_(to_exec_layout(codes.to(self.handle.device), self.bits))

    @property
    def pinned(self) -> bool:
        return is_pinned(self.handle)

    @property
    def nbytes(self) -> int:
        return self.handle.nbytes


register_form(torch.int16, Words)


def pack(weight: QTensor) -> Words:
    """The execution form of a plain weight; one temporary tensor as large as its codes."""
    from requanto_kernels import to_exec_layout

    return Words(to_exec_layout(weight.qdata, weight.qtype.bits).view(torch.int16), weight.qtype.bits)


def fits(weight: QTensor, activation: qtype | None = None) -> bool:
    """True for weights whose kernels read the execution layout, and lose nothing by it."""
    kind, length = weight.qtype, weight.row_length
    if weight.device.type not in rules.DEVICES or kind not in rules.KINDS or not kind.is_packed:
        return False
    block = rules.exec_block(kind.bits)
    if weight.dim() - weight.axis != 2 or length % block or capturing(weight.device) or not rules.available():
        return False
    if not rules.multiplies(weight.device.type):
        return False  # weights are only ever rebuilt there, which gains nothing by the layout
    grouped_int8 = (activation or weight.activation) == qint8 and weight.group_size not in (None, length)
    if grouped_int8 and weight.group_size % block:
        return False  # integer sums end with each group: that kernel cannot read blocks that span several
    return not is_pinned(weight.qdata)


def codes_of(weight: QTensor) -> tuple[torch.Tensor, str]:
    """(codes, layout) as the kernels take them; pins them during a capture."""
    packed = weight.packed
    # Looked at once: another thread may read the stored form at any time.
    codes, layout = (packed.bytes, LAYOUT) if isinstance(packed, Words) else (weight.qdata, "plain")
    if capturing(codes.device):
        pin(codes)
    return codes, layout


def capturing(device: torch.device) -> bool:
    """True while the current stream of the device records a graph."""
    module = getattr(torch, device.type, None)
    ask = getattr(module, "is_current_stream_capturing", None)
    return ask is not None and device.type in rules.DEVICES and bool(ask())


def pin(codes: torch.Tensor) -> None:
    """A graph reads this memory from now on."""
    for known in [key for key, storage in _pinned.items() if storage.expired()]:
        del _pinned[known]
    storage = codes.untyped_storage()
    if storage._cdata not in _pinned:
        _pinned[storage._cdata] = StorageWeakRef(storage)


def is_pinned(codes: torch.Tensor) -> bool:
    """True for memory that a captured graph reads."""
    found = _pinned.get(codes.untyped_storage()._cdata) if _pinned else None
    return found is not None and not found.expired()
