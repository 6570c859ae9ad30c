"""What the aliases of one quantized weight share: its tensors, the layout they are in, and what was derived from them.

A QTensor is a view of a `WeightStorage`. ``w.detach()``, ``w.data``, ``w.t()`` and ``state_dict()["w"]`` are other views of
the same one, so a change through any of them (other numbers, another layout) is there for all.

The storage also owns everything that is kept because of these tensors: cached plans of GEMMs, copies of scales in a kernel's
dtype. Whoever changes the tensors calls `changed` and all of it is dropped.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch

from requanto.runtime.tracing import unwatched
from requanto.tensor.layout import LOCK, PLAIN, Layout
from requanto.tensor.spec import WeightSpec

Parts = Mapping[str, torch.Tensor]


#: Storages of packed weights by the address of their codes. It is theirs for as long as they live.
_packed: weakref.WeakValueDictionary[int, WeightStorage] = weakref.WeakValueDictionary()


class WeightStorage:
    """The tensors of one weight.

    Attributes:
        state: ``(layout, parts)``, replaced as one, so that a reader in another thread never sees half of a change.
        plans: cached plans of GEMMs (`requanto.linear.registry`).
        derived: what else kernels made from the parts, by name.
        version: counts changes.
        stays_plain: why this weight is never packed, or None.
        declined: under which circumstances packing was last found not to pay (`requanto.linear.prepack`), or None.
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
        """The order in which the codes lie."""
        return self.state[0]

    @property
    def parts(self) -> dict[str, torch.Tensor]:
        """The tensors as they lie in memory, by name."""
        return self.state[1]

    @property
    def base(self) -> WeightStorage | None:
        """The packed weight that this is a part of, while that lives."""
        return None

    def stored(self, spec: WeightSpec) -> dict[str, torch.Tensor]:
        """The parts of the stored form; the codes of a packed weight are a copy."""
        layout, parts = self.state
        if layout is PLAIN:
            return parts
        with unwatched():
            codes = layout.unpack(spec, parts)
        return {"qdata": codes, **{name: part for name, part in parts.items() if name not in ("qdata", *layout.extra)}}

    def set(self, parts: Parts, layout: Layout = PLAIN) -> None:
        """Other tensors in place of all of these; parts that are None are left out."""
        with LOCK:
            self.state = layout, {name: part for name, part in parts.items() if part is not None}
            self.changed()
            self.register()

    def register(self) -> None:
        """Lets operators, which get the tensors alone, find this storage and what it keeps (`storage_of`)."""
        layout, parts = self.state
        if layout is not PLAIN:
            _packed[parts["qdata"].data_ptr()] = self

    def changed(self) -> None:
        """Drops what was derived: the numbers are, or may be, other ones."""
        self.version += 1
        self.plans.clear()
        self.derived.clear()

    def write(self, spec: WeightSpec, source: Parts) -> None:
        """Copies the stored parts of an equal weight into this one's memory."""
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
        """Puts the codes into another layout; the plain ones are freed."""
        with LOCK:
            if self.layout is not PLAIN:
                return
            with unwatched():
                # Changes of a tensor that was made in inference mode cannot be noticed by what is derived from it.
                parts = {name: part.clone() if part.is_inference() else part for name, part in self.parts.items()}
                packed = layout.pack(spec, parts)
            self.set({**parts, **packed}, layout)

    def unpack(self, spec: WeightSpec) -> None:
        """Puts the codes back into the stored form.

        Raises:
            RuntimeError: a captured graph reads these bytes by their address.
        """
        with LOCK:
            if self.layout is not PLAIN:
                self.layout.check_unpack(self.parts)
                self.set(self.stored(spec))

    @property
    def nbytes(self) -> int:
        """Bytes that are held: the tensors, and what was derived from them."""
        return sum(held.nbytes for held in (*self.parts.values(), *self.derived.values()))


def storage_of(parts: Parts, layout: Layout) -> WeightStorage | None:
    """The storage of a packed weight whose very tensors these are; None: there is none."""
    found = _packed.get(parts["qdata"].data_ptr())
    if found is None or found.layout is not layout:
        return None
    own = found.parts
    same = all(name in own and own[name].data_ptr() == part.data_ptr() for name, part in parts.items())
    return found if same and own["qdata"].shape == parts["qdata"].shape else None


_STATE = WeightStorage.__dict__["state"]  # the slot itself


class SlicedStorage(WeightStorage):
    """A part of a packed weight: its codes are a copy, taken again when the whole has changed.

    A slice of a plain weight needs none of this: its tensors are views of the whole's.

    Args:
        base: the whole, and its record.
        cut: gives the part's stored tensors from the whole's, as views.
    """

    __slots__ = ("_base", "_taken", "cut", "spec")

    def __init__(self, base: WeightStorage, spec: WeightSpec, cut: Callable[[Parts], dict[str, torch.Tensor]]) -> None:
        self._base, self.spec, self.cut, self._taken = weakref.ref(base), spec, cut, base.version
        super().__init__(cut(base.stored(spec)))

    @property
    def base(self) -> WeightStorage | None:
        return self._base()

    @property
    def state(self) -> tuple[Layout, dict[str, torch.Tensor]]:  # type: ignore[override]
        whole = self._base()
        if whole is not None and whole.version != self._taken:
            self._taken = whole.version
            self.set(self.cut(whole.stored(self.spec)))
        return _STATE.__get__(self)

    @state.setter
    def state(self, value: tuple[Layout, dict[str, torch.Tensor]]) -> None:
        _STATE.__set__(self, value)

    def write(self, spec: WeightSpec, source: Parts) -> None:
        whole = self._base()
        if whole is None:
            super().write(spec, source)
            return
        with LOCK:
            stored = dict(whole.stored(self.spec))
            for name, part in self.cut(stored).items():
                part.copy_(source[name])
            whole.write(self.spec, stored)
