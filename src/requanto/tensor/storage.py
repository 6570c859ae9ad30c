"""The storage that all aliases of one quantized weight share: its tensors, their layout, and caches derived from them.

A QTensor is a view of a `WeightStorage`. ``w.detach()``, ``w.data``, ``w.t()`` and ``state_dict()["w"]`` are other views of
the same storage, so all of them see a change of values or of the layout.

The storage also owns the caches that depend on the tensors: plans of GEMMs, and scales in a kernel's dtype. Code that
changes the tensors must call `changed`, which clears the caches.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch

from requanto.runtime.tracing import outside_tracing
from requanto.tensor.layout import LOCK, PLAIN, Layout
from requanto.tensor.spec import WeightSpec

Parts = Mapping[str, torch.Tensor]


#: Storages of prepacked weights by the address of their codes, which is unique while the storage exists.
_packed: weakref.WeakValueDictionary[int, WeightStorage] = weakref.WeakValueDictionary()


class WeightStorage:
    """The tensors of one weight.

    Attributes:
        state: ``(layout, parts)``, replaced together, so that other threads never see a partial change.
        plans: cached plans of GEMMs (`requanto.linear.registry`).
        derived: other tensors that kernels derived from the parts, by name.
        version: number of changes.
        stays_plain: the reason why this weight is never prepacked, or None.
        declined: the conditions under which prepacking was last found not to help (`requanto.linear.prepack`), or None.
    """

    __slots__ = ("__weakref__", "declined", "derived", "plans", "state", "stays_plain", "version")

    state: tuple[Layout, dict[str, torch.Tensor]]

    def __init__(self, parts: dict[str, torch.Tensor], layout: Layout = PLAIN) -> None:
        self.state = layout, parts
        self.plans: dict[Any, Any] = {}
        self.derived: dict[Any, Any] = {}
        self.version = 0
        self.stays_plain: str | None = None
        self.declined: Any = None

    @property
    def layout(self) -> Layout:
        """The layout of the codes."""
        return self.state[0]

    @property
    def parts(self) -> dict[str, torch.Tensor]:
        """The tensors in the current layout, by name."""
        return self.state[1]

    @property
    def base(self) -> WeightStorage | None:
        """The storage of the prepacked weight of which this is a slice; None if there is none or it was freed."""
        return None

    def stored(self, spec: WeightSpec) -> dict[str, torch.Tensor]:
        """The parts in the plain layout; the codes of a prepacked weight are a copy."""
        layout, parts = self.state
        if layout is PLAIN:
            return parts
        with outside_tracing():
            codes = layout.unpack(spec, parts)
        return {"qdata": codes, **{name: part for name, part in parts.items() if name not in ("qdata", *layout.extra)}}

    def set(self, parts: Parts, layout: Layout = PLAIN) -> None:
        """Replaces all tensors and the layout; parts that are None are omitted."""
        with LOCK:
            self.state = layout, {name: part for name, part in parts.items() if part is not None}
            self.changed()
            self.register()

    def register(self) -> None:
        """Makes `storage_of` find this storage: custom operators only receive the tensors."""
        layout, parts = self.state
        if layout is not PLAIN:
            _packed[parts["qdata"].data_ptr()] = self

    def changed(self) -> None:
        """Clears the caches; to be called after any change of the tensors."""
        self.version += 1
        self.plans.clear()
        self.derived.clear()

    def write(self, spec: WeightSpec, source: Parts) -> None:
        """Copies the values of another weight of the same spec into this memory.

        Args:
            spec: spec of both weights.
            source: parts in the plain layout.
        """
        layout, parts = self.state
        for name, part in parts.items():
            if name != "qdata" and name not in layout.extra:
                part.copy_(source[name])
        if layout is PLAIN:
            parts["qdata"].copy_(source["qdata"])
        else:
            layout.write(spec, parts, {**source, "qdata": source["qdata"].to(parts["qdata"].device)})
        self.changed()

    def pack(self, spec: WeightSpec, layout: Layout) -> None:
        """Converts the codes from the plain layout to another one. The plain codes are freed."""
        with LOCK:
            if self.layout is not PLAIN:
                return
            with outside_tracing():
                # Inference tensors have no version counter, so caches derived from them could not detect changes.
                parts = {name: part.clone() if part.is_inference() else part for name, part in self.parts.items()}
                packed = layout.pack(spec, parts)
            self.set({**parts, **packed}, layout)

    def unpack(self, spec: WeightSpec) -> None:
        """Converts the codes back to the plain layout.

        Raises:
            RuntimeError: a captured CUDA graph reads the codes by their address.
        """
        with LOCK:
            if self.layout is not PLAIN:
                self.layout.check_unpack(self.parts)
                self.set(self.stored(spec))

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors and of those derived from them."""
        return sum(tensor.nbytes for tensor in (*self.parts.values(), *self.derived.values()))


def storage_of(parts: Parts, layout: Layout) -> WeightStorage | None:
    """The storage of the prepacked weight that owns exactly these tensors, or None."""
    found = _packed.get(parts["qdata"].data_ptr())
    if found is None or found.layout is not layout:
        return None
    own = found.parts
    same = all(name in own and own[name].data_ptr() == part.data_ptr() for name, part in parts.items())
    return found if same and own["qdata"].shape == parts["qdata"].shape else None


_STATE = WeightStorage.__dict__["state"]  # the slot descriptor, which `SlicedStorage.state` overrides


class SlicedStorage(WeightStorage):
    """Storage of a slice of a prepacked weight. Its codes are a plain copy, which is renewed after the base has changed.

    A slice of a plain weight is an ordinary `WeightStorage` of views.

    Args:
        base: storage of the sliced weight.
        spec: spec of the sliced weight.
        slice_parts: maps plain parts of the base to those of the slice, as views.
    """

    __slots__ = ("_base", "_base_version", "slice_parts", "spec")

    def __init__(
        self, base: WeightStorage, spec: WeightSpec, slice_parts: Callable[[Parts], dict[str, torch.Tensor]]
    ) -> None:
        self._base, self.spec, self.slice_parts, self._base_version = weakref.ref(base), spec, slice_parts, base.version
        super().__init__(slice_parts(base.stored(spec)))

    @property
    def base(self) -> WeightStorage | None:
        return self._base()

    @property
    def state(self) -> tuple[Layout, dict[str, torch.Tensor]]:  # type: ignore[override]
        base = self._base()
        if base is not None and base.version != self._base_version:
            self._base_version = base.version
            self.set(self.slice_parts(base.stored(self.spec)))
        return _STATE.__get__(self)

    @state.setter
    def state(self, value: tuple[Layout, dict[str, torch.Tensor]]) -> None:
        _STATE.__set__(self, value)

    def write(self, spec: WeightSpec, source: Parts) -> None:
        base = self._base()
        if base is None:
            super().write(spec, source)
            return
        with LOCK:
            stored = dict(base.stored(self.spec))
            for name, part in self.slice_parts(stored).items():
                part.copy_(source[name])
            base.write(self.spec, stored)
