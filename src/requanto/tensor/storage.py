"""The storage that all aliases of one quantized weight share: its tensors, their layout, and caches derived from them.

A QTensor is a view of a `WeightStorage`. ``w.detach()``, ``w.data``, ``w.t()`` and ``state_dict()["w"]`` are other views of
the same storage, so all of them see a change of values or of the layout.

The storage also owns the caches that depend on the tensors: plans of GEMMs, and scales in a kernel's dtype. Code that
changes the tensors must call `changed`, which clears the caches.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch

from requanto.runtime.tracing import is_fake, outside_tracing, runs_eagerly
from requanto.tensor.layout import LOCK, PLAIN, Layout
from requanto.tensor.spec import WeightSpec

Parts = Mapping[str, torch.Tensor]


#: Numbers beyond all addresses of processes, with the alignment of torch's memory.
_identities = itertools.count(2**62, 64)
#: Storages of prepacked weights by the address of their codes, which is unique while the storage exists.
_packed: weakref.WeakValueDictionary[int, WeightStorage] = weakref.WeakValueDictionary()


class WeightStorage:
    """The tensors of one weight.

    Attributes:
        state: ``(layout, parts)``, replaced together, so that other threads never see a partial change.
        plans: cached plans of GEMMs (`requanto.linear.registry`).
        quick: the last of them in a form that takes fewer steps to call (`requanto.linear.registry.quick_gemm`), or None.
        misses: how many calls found another shape there.
        derived: other tensors that kernels derived from the parts, by name; one with ``is_read_by_graph`` survives changes.
        version: number of changes.
        stays_plain: the reason why this weight is never prepacked, or None.
        declined: the conditions under which prepacking was last found not to help (`requanto.linear.prepack`), or None.
        packed_as: `WeightSpec.key` of the codes in a layout other than the plain one; None if they are plain.
        name: name of the weight in log lines; "" if it was never told.
        read_logged: True once it was logged that an operator reads the values (`requanto.tensor.values`).
    """

    __slots__ = (
        "__weakref__",
        "_identity",
        "_unpacked",
        "declined",
        "derived",
        "misses",
        "name",
        "packed_as",
        "plans",
        "quick",
        "read_logged",
        "state",
        "stays_plain",
        "version",
    )

    state: tuple[Layout, dict[str, torch.Tensor]]

    def __init__(self, parts: Parts, layout: Layout = PLAIN, spec: WeightSpec | None = None) -> None:
        self.state = layout, _owned(parts, layout)
        self.plans: dict[Any, Any] = {}
        self.quick: Any = None
        self.misses = 0
        self.derived: dict[Any, Any] = {}
        self.version = 0
        self.stays_plain: str | None = None
        self.declined: Any = None
        self.packed_as: WeightSpec | None = None
        self.name, self.read_logged = "", False
        self._identity = 0
        self._unpacked: weakref.ref[torch.Tensor] | None = None
        if layout is not PLAIN and spec is not None:
            self.register(spec)

    @property
    def layout(self) -> Layout:
        """The layout of the codes."""
        return self.state[0]

    @property
    def parts(self) -> dict[str, torch.Tensor]:
        """The tensors in the current layout, by name."""
        return self.state[1]

    @property
    def identity(self) -> int:
        """What `QTensor.data_ptr` returns: no other storage has it, now or later, and no tensor has such an address."""
        if not self._identity:
            with LOCK:
                self._identity = self._identity or next(_identities)
        return self._identity

    @property
    def base(self) -> WeightStorage | None:
        """The storage of which this is a slice; None if it is none."""
        return None

    def stored(self, spec: WeightSpec) -> dict[str, torch.Tensor]:
        """The parts in the plain layout; the codes of a prepacked weight are a copy."""
        version, held = self.version, self._unpacked  # before the tensors: they may be changed meanwhile
        layout, parts = self.state
        if layout is PLAIN:
            return parts
        codes = None if held is None else held()  # one copy for all who hold one
        if codes is None:
            with outside_tracing():
                codes = layout.unpack(spec, parts)
            with LOCK:
                if self.version == version:  # else another thread has changed the weight meanwhile
                    self._unpacked = weakref.ref(codes)
        with outside_tracing():
            return {"qdata": codes, **layout.plain(spec, parts)}

    def set(self, parts: Parts, layout: Layout = PLAIN, spec: WeightSpec | None = None) -> None:
        """Replaces all tensors and the layout; parts that are None are omitted."""
        with LOCK:
            self.state = layout, _owned(parts, layout)
            self.changed()
            if layout is PLAIN:
                self.packed_as = None
            elif spec is not None or self.packed_as is not None:
                self.register(spec or self.packed_as)  # type: ignore[arg-type]

    def register(self, spec: WeightSpec) -> None:
        """Makes `storage_of` find this storage: custom operators only receive the tensors."""
        codes = self.parts["qdata"]
        if runs_eagerly() and not is_fake(codes):
            self.packed_as = spec.key
            _packed[codes.data_ptr()] = self

    def changed(self) -> None:
        """Drops the caches; to be called after any change of the tensors."""
        self.version += 1
        # A captured CUDA graph goes on reading the memory of some, which get the new values at once.
        # The dictionary is copied, as other threads add to it meanwhile.
        derived = _DERIVED.__get__(self)  # not `derived`, which a slice renews by this function
        read = {name: one for name, one in derived.copy().items() if getattr(one, "is_read_by_graph", False)}
        parts = _STATE.__get__(self)[1] if read else {}
        # New dictionaries: another thread may be about to put something into the old ones, which nobody reads any more.
        self.derived = {name: one for name, one in read.items() if one.renew(parts)}
        self.plans, self.quick, self._unpacked = {}, None, None

    def write(self, spec: WeightSpec, source: Parts) -> None:
        """Copies the values of another weight of the same spec into this memory.

        Args:
            spec: spec of both weights.
            source: parts in the plain layout.
        """
        with LOCK:
            layout, parts = self.state
            for name, part in parts.items():
                if name != "qdata" and name not in layout.extra:
                    part.copy_(source[name])
            if layout is PLAIN:
                parts["qdata"].copy_(source["qdata"])
            else:
                layout.write(spec, parts, {**source, "qdata": source["qdata"].to(parts["qdata"].device)})
            # Autograd refuses a backward through values that were overwritten. Below the dispatcher copy_ counts nothing.
            torch.autograd.graph.increment_version([part for part in parts.values() if not part.is_inference()])
            self.changed()

    def pack(self, spec: WeightSpec, layout: Layout) -> None:
        """Converts the codes from the plain layout to another one. The plain codes are freed."""
        with LOCK:
            if self.layout is not PLAIN:
                return
            with outside_tracing():
                packed = layout.pack(spec, self.parts)
                if runs_eagerly() and not is_fake(self.parts["qdata"]):
                    _wait_for(self.parts["qdata"].device)
            self.set({**self.parts, **packed}, layout, spec)

    def unpack(self, spec: WeightSpec) -> None:
        """Converts the codes back to the plain layout.

        Raises:
            RuntimeError: a captured CUDA graph reads the codes by their address.
        """
        with LOCK:
            if self.layout is not PLAIN:
                self.layout.check_unpack(self.parts)
                self.set(self.stored(spec))

    def snapshot(self) -> WeightStorage:
        """A storage of the tensors that this one has now; both use the same derived tensors.

        Another thread may pack or unpack the weight at any time. A GEMM for which an implementation is selected by the
        layout must read the codes in that layout: it takes a snapshot, and both from there.
        """
        found = WeightStorage.__new__(WeightStorage)
        with LOCK:
            found.state = self.state  # first: a slice renews its tensors, and drops what was derived from the old ones
            found.plans, found.derived, found.version = {}, self.derived, self.version
            found.quick, found.misses = None, 0
            found.stays_plain, found.declined, found.packed_as = self.stays_plain, self.declined, self.packed_as
            found.name, found.read_logged, found._identity = self.name, self.read_logged, self._identity
            found._unpacked = self._unpacked
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors and of those derived from them."""
        return sum(tensor.nbytes for tensor in (*self.parts.values(), *self.derived.copy().values()))


def _wait_for(device: torch.device) -> None:
    """Waits for what was computed on the current stream: threads that run on other streams may read it at once."""
    if device.type in ("cuda", "xpu"):
        getattr(torch, device.type).current_stream(device).synchronize()


def _owned(parts: Parts, layout: Layout) -> dict[str, torch.Tensor]:
    """The parts as a storage holds them.

    The codes become a tensor of the storage's own over the same memory, so that holders of the original can be counted
    before the memory is replaced (`requanto.linear.prepack`). Inference tensors have no version counter, so caches derived
    from them could not detect changes: a prepacked weight gets copies.
    """
    owned = {name: part for name, part in parts.items() if part is not None}
    owned["qdata"] = owned["qdata"].detach()
    if layout is not PLAIN and runs_eagerly() and any(part.is_inference() for part in owned.values()):
        with outside_tracing():
            copies = {n: p.clone() for n, p in owned.items() if n not in ("qdata", *layout.extra) and p.is_inference()}
        owned |= copies
    return owned


def storage_of(parts: Parts, layout: Layout, spec: WeightSpec) -> WeightStorage | None:
    """The storage of the prepacked weight that owns exactly these tensors and is what the spec says, or None."""
    found = _packed.get(parts["qdata"].data_ptr())
    if found is None or found.layout is not layout or found.packed_as != spec.key:
        return None
    own = found.parts
    for name, part in parts.items():
        mine = own.get(name)
        if mine is part:  # as in graphs, which get the tensors themselves
            continue
        if mine is None or mine.data_ptr() != part.data_ptr() or mine.dtype != part.dtype:
            return None
        if mine.shape != part.shape or mine.stride() != part.stride():
            return None
    return found


#: The slot descriptors that properties of `SlicedStorage` override.
_STATE, _PLANS, _DERIVED = (WeightStorage.__dict__[name] for name in ("state", "plans", "derived"))


class SlicedStorage(WeightStorage):
    """Storage of a part of a weight: rows, columns, experts, or the codes without the low-rank term.

    Its tensors are views of the base's where the base's layout allows it, otherwise a plain copy. Both are renewed after the
    base has changed, and a write goes through to the base.

    Args:
        base: storage of the whole weight.
        spec: spec of the whole weight.
        slice_parts: maps parts of the base to those of the slice, as views; parts that it returns unchanged are shared with
            the rest of the weight.
        viewable: ``viewable(layout)`` is True if ``slice_parts`` can be applied to the parts in that layout.
        read_only: why nothing can be written into the slice; None if it can.
    """

    __slots__ = ("_base", "_base_version", "read_only", "shared", "slice_parts", "spec", "viewable")

    def __init__(
        self,
        base: WeightStorage,
        spec: WeightSpec,
        slice_parts: Callable[[Parts], dict[str, torch.Tensor]],
        viewable: Callable[[Layout], bool],
        read_only: str | None = None,
    ) -> None:
        self._base: WeightStorage | None = base
        self.spec, self.slice_parts, self.viewable, self.read_only = spec, slice_parts, viewable, read_only
        layout, parts = base.state
        self._base_version = base.version
        views, layout = self._slice(base)
        self.shared = [name for name, part in views.items() if part is parts.get(name)]
        super().__init__(views, layout)

    def _slice(self, base: WeightStorage) -> tuple[dict[str, torch.Tensor], Layout]:
        if self.viewable(base.layout):
            return self.slice_parts(base.parts), base.layout
        parts = self.slice_parts(base.stored(self.spec))
        return {**parts, "qdata": parts["qdata"].clone()}, PLAIN  # the clone lets go of the whole unpacked copy

    @property
    def base(self) -> WeightStorage | None:
        return self._base

    @property
    def state(self) -> tuple[Layout, dict[str, torch.Tensor]]:  # type: ignore[override]
        base = self._base
        if base is not None:
            _ = base.state  # a slice itself, perhaps: it renews itself first
            if base.version != self._base_version:
                with LOCK:
                    version = base.version
                    views, layout = self._slice(base)
                    _STATE.__set__(self, (layout, _owned(views, layout)))
                    super().changed()
                    self._base_version = version
        return _STATE.__get__(self)

    @state.setter
    def state(self, value: tuple[Layout, dict[str, torch.Tensor]]) -> None:
        _STATE.__set__(self, value)

    @property
    def plans(self) -> dict[Any, Any]:  # type: ignore[override]
        _ = self.state  # a plan of the base's former tensors must not run
        return _PLANS.__get__(self)  # type: ignore[no-any-return]

    @plans.setter
    def plans(self, value: dict[Any, Any]) -> None:
        _PLANS.__set__(self, value)

    @property
    def derived(self) -> dict[Any, Any]:  # type: ignore[override]
        _ = self.state
        return _DERIVED.__get__(self)  # type: ignore[no-any-return]

    @derived.setter
    def derived(self, value: dict[Any, Any]) -> None:
        _DERIVED.__set__(self, value)

    def set(self, parts: Parts, layout: Layout = PLAIN, spec: WeightSpec | None = None) -> None:
        """Other tensors make the slice a weight of its own."""
        with LOCK:
            self._base = None
            super().set(parts, layout, spec)

    def write(self, spec: WeightSpec, source: Parts) -> None:
        base = self._base
        if base is None:
            super().write(spec, source)
            return
        if self.read_only is not None:
            raise NotImplementedError(self.read_only)
        with LOCK:
            _, parts = self.state
            for name in self.shared:
                if not torch.equal(parts[name], source[name].to(parts[name])):
                    raise ValueError(
                        f"copy_ into a part of a quantized weight: its {name} is shared with the rest of the weight, and "
                        f"the source has another one. Write the whole weight instead."
                    )
            if self.viewable(base.layout):
                super().write(spec, source)
                while base is not None:
                    base.changed()
                    base = base.base
                return
            stored = dict(base.stored(self.spec))
            for name, part in self.slice_parts(stored).items():
                part.copy_(source[name])
            base.write(self.spec, stored)
