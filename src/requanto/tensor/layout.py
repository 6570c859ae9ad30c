"""Layouts: the orders in which a weight's codes can be stored in memory.

``"plain"`` is the layout of checkpoints. A kernel may need another one (the CPU's strips, the GPU kernels' words): a named
`Layout` that converts from and to the plain one, bit for bit. The codes of a prepacked weight are an ordinary tensor, also
called ``qdata``, which replaces the plain one, so that the memory is needed only once.

Backends register their layouts here.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

import torch

from requanto.dtypes.bit_packing import unpack
from requanto.runtime.fork import new_in_child
from requanto.runtime.tracing import is_fake
from requanto.tensor.spec import WeightSpec

__all__ = ["LOCK", "PLAIN", "Layout", "is_fake", "layout_named", "register_layout"]

#: Held while a weight's parts are replaced, since several threads may run one layer. Not held while a kernel is compiled.
LOCK = new_in_child(threading.RLock())

Parts = Mapping[str, torch.Tensor]


class Layout:
    """The plain layout, and the base class of all others.

    Attributes:
        name: shown by ``QTensor.layout_name`` and `requanto.explain`.
        extra: names of parts that this layout has in addition to those of the plain layout.
        rows_are_views: rows (and experts) of the codes can be sliced as views.
        experts_are_views: experts can, whether or not rows can.
    """

    name = "plain"
    extra: tuple[str, ...] = ()
    rows_are_views = True
    experts_are_views = False

    def pack(self, spec: WeightSpec, parts: Parts) -> dict[str, torch.Tensor]:
        """``qdata`` and `extra` in this layout, from the parts of the plain layout."""
        return {"qdata": parts["qdata"]}

    def unpack(self, spec: WeightSpec, parts: Parts) -> torch.Tensor:
        """The plain codes, bit for bit: the same tensor for the plain layout, else a new one."""
        return parts["qdata"]

    def plain(self, spec: WeightSpec, parts: Parts) -> dict[str, torch.Tensor]:
        """All other parts in the plain layout: all but ``qdata`` and `extra`."""
        return {name: part for name, part in parts.items() if name not in ("qdata", *self.extra)}

    def order(self, spec: WeightSpec) -> str:
        """The order of the codes, by which implementations are selected: the layout's name, or ``"plain"``."""
        return self.name

    def arranged(self, spec: WeightSpec, name: str, part: torch.Tensor) -> torch.Tensor:
        """A float scale or shift of the plain layout as this layout stores it."""
        return part

    def codes(self, spec: WeightSpec, parts: Parts, start: int, stop: int) -> torch.Tensor:
        """Unpacked codes of rows ``start .. stop`` of the stored matrix: ``[stop - start, K]``, one code per element."""
        rows = self._rows(spec, parts)[start:stop]
        return unpack(rows, spec.qtype.bits, spec.row_length) if spec.qtype.is_packed else rows

    def gather(self, spec: WeightSpec, parts: Parts, index: torch.Tensor) -> torch.Tensor:
        """Unpacked codes of the rows ``index`` of the stored matrix: ``[len(index), K]``, one code per element.

        Raises:
            IndexError: an index is out of range.
        """
        stored = self._rows(spec, parts)
        if stored.dtype.itemsize == 1:  # index_select does not support float8, and copies uint8 row by row
            rows = torch.index_select(stored.view(torch.uint8), 0, index).view(stored.dtype)
        else:
            rows = torch.index_select(stored, 0, index)
        return unpack(rows, spec.qtype.bits, spec.row_length) if spec.qtype.is_packed else rows

    @staticmethod
    def _rows(spec: WeightSpec, parts: Parts) -> torch.Tensor:
        codes = parts["qdata"]
        return codes.reshape(spec.matrix_shape[0], codes.shape[spec.axis + 1 :].numel())

    def write(self, spec: WeightSpec, parts: Parts, stored: Parts) -> None:
        """Overwrites the codes in place.

        Args:
            stored: parts of the plain layout.
        """
        for name, part in self.pack(spec, stored).items():
            parts[name].copy_(part)

    def check_unpack(self, parts: Parts) -> None:
        """Raises RuntimeError if the memory must not change (see `QTensor.unpack`)."""

    def clone(self, spec: WeightSpec, parts: Parts) -> dict[str, torch.Tensor]:
        """A copy of ``qdata`` and `extra`."""
        return {name: parts[name].clone() for name in ("qdata", *self.extra)}

    def codes_shape_dtype(self, spec: WeightSpec) -> tuple[torch.Size, torch.dtype]:
        """Shape and dtype of ``qdata`` in this layout."""
        return spec.codes_shape, spec.qtype.storage_dtype

    def extra_shapes_dtypes(self, spec: WeightSpec) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Shape and dtype of each part of `extra`."""
        return {}

    def check(self, spec: WeightSpec, parts: Parts) -> None:
        """Checks that parts in this layout fit the spec.

        Raises:
            ValueError: see `WeightSpec.check`.
        """
        if not self.accepts(spec):
            raise ValueError(f"layout {self.name!r} is not for {spec.text()}")
        for name, part in parts.items():
            if part is not None and part.layout is not torch.strided:
                raise ValueError(f"{spec.text()}: {name} is a {part.layout} tensor, expected a strided one")
        if self.name != "plain" and not all(self.is_readable(parts[n]) for n in ("qdata", *self.extra) if n in parts):
            raise ValueError(f"{spec.text()} in layout {self.name!r}: the codes are not contiguous")
        if not self.extra:
            spec.check(parts, self.codes_shape_dtype(spec))
            return
        spec.check({name: part for name, part in parts.items() if name not in self.extra}, self.codes_shape_dtype(spec))
        for name, (shape, dtype) in self.extra_shapes_dtypes(spec).items():
            part = parts.get(name)
            if part is None or part.shape != shape or part.dtype != dtype or part.device != parts["qdata"].device:
                found = "none" if part is None else f"{part.dtype} {tuple(part.shape)} on {part.device}"
                raise ValueError(
                    f"{spec.text()} in layout {self.name!r}: {name} is {found}, expected {dtype} {tuple(shape)}"
                )

    def accepts(self, spec: WeightSpec) -> bool:
        """True if weights of that type can be in this layout."""
        return True

    def is_readable(self, codes: torch.Tensor) -> bool:
        """True if kernels can read codes with these strides."""
        return codes.is_contiguous()

    def names(self, spec: WeightSpec) -> list[str]:
        """Names, in order, of the parts that are arguments of custom operators: all except the low-rank factors."""
        return [*spec.expected, *self.extra]


PLAIN = Layout()
_layouts: dict[str, Layout] = {PLAIN.name: PLAIN}


def register_layout(layout: Layout) -> Layout:
    """Registers a layout under its name.

    Raises:
        ValueError: the name is already registered.
    """
    if layout.name in _layouts:
        raise ValueError(f"a layout named {layout.name!r} is registered already")
    _layouts[layout.name] = layout
    return layout


def layout_named(name: str) -> Layout:
    """The layout of that name.

    Raises:
        ValueError: no layout of that name is registered.
    """
    found = _layouts.get(name)
    if found is None:
        raise ValueError(
            f"a quantized weight has layout {name!r}, which this machine does not know (known: "
            f"{', '.join(_layouts)}): it was prepacked for another kind of processor. Save, export or copy the model before "
            f"it is prepacked, or after requanto.unpack(model)."
        )
    return found
