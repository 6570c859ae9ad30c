"""The execution layout of the GPU kernels, and its handling during CUDA graph capture.

The layout permutes the bytes of the plain layout within blocks along K, so rows and experts can still be sliced as views.

A captured CUDA graph reads tensors by address. So codes that were read during a capture are *pinned*: they are no longer
packed or unpacked, and new codes are written into the same memory.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from requanto.dtypes.bit_packing import unpack
from requanto.dtypes.codebooks import MINIFLOATS, minifloat
from requanto.dtypes.qtypes import qtype
from requanto.linear.gpu import conditions as rules
from requanto.runtime.devices import made_current
from requanto.runtime.tracing import outside_tracing, runs_eagerly
from requanto.scales.codebook import values_of
from requanto.tensor.layout import PLAIN, Layout, Parts, register_layout
from requanto.tensor.parts import float_scale, float_shift
from requanto.tensor.qtensor import QTensor
from requanto.tensor.spec import WeightSpec

_pinned: dict[int, StorageWeakRef] = {}
#: Parts of a weight from which float scales and shifts are expanded.
_STORED = ("scale", "shift", "row_scale", "row_shift")


class ExecLayout(Layout):
    """The kernels' order: codes as `requanto_kernels.to_exec_layout` puts them, float scales and shifts group-major.

    Codes have the plain layout's shape; for widths and rows that have no other order (`has_exec_layout`) they are the plain
    ones. Scales and shifts have their shape too, ``[*lead, G]``, with strides ``(1, N)`` in the last two axes, so that those
    of adjacent rows are loaded together.
    """

    name = "exec"

    def accepts(self, spec: WeightSpec) -> bool:
        return spec.qtype in rules.KINDS and len(spec.shape) - spec.axis == 2

    def pack(self, spec: WeightSpec, parts: Parts) -> dict[str, torch.Tensor]:
        from requanto_kernels import group_major, to_exec_layout

        scales = {name: group_major(parts[name]) for name in _ARRANGED if _is_arranged(spec, parts, name)}
        return {"qdata": to_exec_layout(parts["qdata"], spec.qtype.bits, spec.row_length), **scales}

    def unpack(self, spec: WeightSpec, parts: Parts) -> torch.Tensor:
        from requanto_kernels import from_exec_layout

        return from_exec_layout(parts["qdata"], spec.qtype.bits, spec.row_length)

    def plain(self, spec: WeightSpec, parts: Parts) -> dict[str, torch.Tensor]:
        return {
            name: part.contiguous() if name in _ARRANGED else part for name, part in super().plain(spec, parts).items()
        }

    def order(self, spec: WeightSpec) -> str:
        return self.name if _is_permuted(spec) else PLAIN.name

    def arranged(self, spec: WeightSpec, name: str, part: torch.Tensor) -> torch.Tensor:
        from requanto_kernels import group_major

        return group_major(part) if _is_arranged(spec, {name: part}, name) else part

    def codes(self, spec: WeightSpec, parts: Parts, start: int, stop: int) -> torch.Tensor:
        if not _is_permuted(spec):
            return super().codes(spec, parts, start, stop)
        return self._unpacked(spec, self._rows(spec, parts)[start:stop])

    def gather(self, spec: WeightSpec, parts: Parts, index: torch.Tensor) -> torch.Tensor:
        if not _is_permuted(spec):
            return super().gather(spec, parts, index)
        rows = self._rows(spec, parts)
        picked = torch.index_select(rows.view(torch.uint8), 0, index)  # float8 codes have no index_select
        return self._unpacked(spec, picked.view(rows.dtype))

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

        plain = from_exec_layout(rows.contiguous(), spec.qtype.bits, spec.row_length)
        return unpack(plain, spec.qtype.bits, spec.row_length) if spec.qtype.is_packed else plain


EXEC = register_layout(ExecLayout())

#: Parts that are stored group-major where they are floats.
_ARRANGED = ("scale", "shift")


def _is_arranged(spec: WeightSpec, parts: Parts, name: str) -> bool:
    """Whether that part is stored group-major: floats of several groups."""
    part = parts.get(name)
    return part is not None and name not in spec.code_bits and spec.qtype.blocks is None and part.shape[-1] > 1


def _is_permuted(spec: WeightSpec) -> bool:
    from requanto_kernels import has_exec_layout

    return has_exec_layout(spec.qtype.bits, spec.row_length)


def fits(weight: QTensor, activation: qtype | None = None) -> bool:
    """True for weights that kernels read in the execution layout at full speed.

    Where nothing is to be put in another order, the layout costs nothing; its storage is then found by operators, whose
    arguments are tensors, so that compiled graphs use its cached plans too.
    """
    spec = weight._spec
    kind, length = spec.qtype, spec.row_length
    if weight.device.type not in rules.DEVICES or not EXEC.accepts(spec) or not length or not rules.available():
        return False
    with made_current(weight.device.type, weight.device.index):
        if capturing(weight.device) or not rules.has_matrix_instructions(weight.device.type):
            return False  # before sm_80, weights are only dequantized, which is not faster in this layout
    activation = activation or spec.activation
    if kind.bits == 8 and activation is not None and _is_permuted(spec):
        return False  # GEMMs of two 8-bit codes read the plain layout
    return not is_pinned(weight._storage.parts["qdata"])


class KernelParts(NamedTuple):
    """A weight as kernels take it.

    Attributes:
        codes, layout: the codes, and the name of their layout.
        scale, shift: float ``[*lead, G]``, or None without a shift.
        how: the other arguments: ``bits``, ``group_size``, ``layout``, and ``small_float`` or ``codebook``.
        expanded: where scale and shift come from if they are stored in few bits; None if they are the stored ones.
        column: the column scale as it is stored, which only kernels that quantize x multiply by themselves; or None.
    """

    codes: torch.Tensor
    layout: str
    scale: torch.Tensor
    shift: torch.Tensor | None
    how: dict[str, Any]
    expanded: ExpandedScales | None = None
    column: torch.Tensor | None = None

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All tensors that a kernel reads."""
        found = (self.codes, self.scale, self.shift, self.how.get("codebook"), self.column)
        return [tensor for tensor in found if tensor is not None]


def kernel_parts(weight: QTensor, dtype: torch.dtype) -> KernelParts:
    """The weight as kernels take it for x of ``dtype``. During a capture, it pins what they read.

    Scales that are stored in few bits, in blocks or with whole zero points are expanded once and cached with the weight
    (`ExpandedScales`).
    """
    codes, how = described(weight)
    parts = weight._storage.parts
    column = parts.get("column")
    if not _expands(weight._spec):
        return KernelParts(codes, how["layout"], parts["scale"], parts.get("shift"), how, None, column)
    found = ExpandedScales.of(weight, dtype)
    return KernelParts(codes, how["layout"], found.scale, found.shift, how, found, column)


def described(weight: QTensor) -> tuple[torch.Tensor, dict[str, Any]]:
    """The codes, and what they are, as arguments of kernels; pins the codes during a capture."""
    codes, layout = codes_of(weight)
    kind = weight._spec.qtype
    how = {"bits": kind.bits, "group_size": weight._spec.group_size, "layout": layout}
    if kind.is_codebook:
        form = _small_float(kind)
        values = weight._storage.parts.get("codebook")
        values = _fixed_values(kind, codes.device) if values is None else values
        how |= {"small_float": form} if form else {"codebook": values}
    return codes, how


def _expands(spec: WeightSpec) -> bool:
    """Whether kernels cannot read the stored scales."""
    return bool(spec.code_bits) or spec.qtype.blocks is not None or spec.zeros


@functools.cache
def _small_float(kind: qtype) -> str:
    """The form of a codebook's values if they are those of small floats, ``"e2m1"``; else empty: kernels look them up."""
    forms = ((bits, e, m) for bits, e, m in MINIFLOATS if bits == kind.bits)
    return next((f"e{e}m{m}" for _, e, m in forms if minifloat(e, m) == kind.values), "")


@functools.cache
def _fixed_values(kind: qtype, device: torch.device) -> torch.Tensor:
    """The values of a fixed codebook; kept for good, since captured graphs read them."""
    from requanto_kernels._device import kept

    def values() -> torch.Tensor:
        with outside_tracing():
            return values_of(kind, torch.empty(0, dtype=torch.uint8, device=device))

    return kept(values, device)


class ExpandedScales:
    """Float scales and shifts of a weight that stores them in few bits, cached in the weight's storage.

    They are in x's dtype where that is bfloat16, whose range is that of float32, else in float32; group-major. After a
    change of the stored parts the values are computed anew in the same memory, since cached plans and captured graphs know
    the address. Changes through ``row_scale.data`` are not detected, because torch does not count them.

    Attributes:
        is_read_by_graph: whether a captured graph reads them. Then the storage keeps them after a change, and renews them at
            once.
        is_cached: whether the weight's storage has them.
    """

    def __init__(self, spec: WeightSpec, parts: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
        self._spec, self._dtype, self.is_read_by_graph, self.is_cached = spec, dtype, False, False
        self._names = [name for name in _STORED if name in parts]
        self._parts = {name: parts[name] for name in self._names}
        self.scale, self.shift = self._made()
        self._state = self._versions()

    @staticmethod
    def of(weight: QTensor, dtype: torch.dtype) -> ExpandedScales:
        """The cached object of a weight; a new one where nothing can be cached."""
        storage, spec = weight._storage, weight._spec
        derived = storage.derived  # before the parts: a change in another thread replaces this dictionary
        parts = storage.parts
        wide = dtype if dtype == torch.bfloat16 else torch.float32
        found: ExpandedScales | None = derived.get(("kernel scales", wide))
        captured = capturing(parts["scale"].device)
        if found is not None:
            if found.is_current():
                found.is_read_by_graph = found.is_read_by_graph or captured
                return found
            if not captured:
                found.renew()
                return found
        # In a capture the values would be computed when the graph runs. Inference tensors have no version to tell a change.
        stored = [parts[name] for name in _STORED if name in parts]
        if captured or not runs_eagerly() or any(part.is_inference() for part in stored):
            return ExpandedScales(spec, parts, wide)
        from requanto_kernels._device import kept

        found = kept(lambda: ExpandedScales(spec, parts, wide), parts["scale"].device)
        derived[("kernel scales", wide)], found.is_cached = found, True
        return found

    def is_current(self) -> bool:
        """Whether the stored parts are as they were when the values were computed."""
        return self._state == self._versions()

    def renew(self, parts: Mapping[str, torch.Tensor] | None = None) -> bool:
        """Computes the values anew, in the same memory; False if the parts are of other shapes."""
        if parts is not None:
            if any(name not in parts or parts[name].shape != self._parts[name].shape for name in self._names):
                return False
            self._parts = {name: parts[name] for name in self._names}
        state = self._versions()
        scale, shift = self._made()
        with outside_tracing():
            self.scale.copy_(scale)
            if self.shift is not None and shift is not None:
                self.shift.copy_(shift)
        self._state = state
        return True

    @property
    def nbytes(self) -> int:
        """Bytes of the cached tensors."""
        return self.scale.nbytes + (0 if self.shift is None else self.shift.nbytes)

    def _versions(self) -> list[tuple[int, int]]:
        parts = self._parts.values()
        return [(part.data_ptr(), 0 if part.is_inference() else part._version) for part in parts]

    def _made(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        from requanto_kernels import group_major

        with outside_tracing(), torch._C.DisableTorchFunctionSubclass():
            scale, shift = float_scale(self._spec, self._parts), float_shift(self._spec, self._parts)
            return group_major(scale.to(self._dtype)), None if shift is None else group_major(shift.to(self._dtype))


def codes_of(weight: QTensor) -> tuple[torch.Tensor, str]:
    """Codes and the name of their layout, as the kernels take them; pins the codes during a capture."""
    layout, parts = weight._storage.state
    codes = parts["qdata"]
    if capturing(codes.device):
        pin(codes)
    return codes, layout.order(weight._spec)


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
