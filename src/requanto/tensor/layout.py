"""Layouts: the orders in which a weight's codes can lie in memory.

``"plain"`` is the stored form that files hold. A kernel may want another order (oneDNN's blocks, the GPU kernels' words);
each is a `Layout` with a name that converts both ways, bit for bit. The codes of a packed weight are ordinary tensors under
the same name, ``qdata``, and take the place of the stored ones: memory is paid once.

Back ends register their layouts here; this module knows none of them.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping

import torch

from requanto.dtypes.bit_packing import unpack
from requanto.runtime.tracing import is_fake
from requanto.tensor.spec import WeightSpec

__all__ = ["LOCK", "PLAIN", "Layout", "is_fake", "layout_named", "register_layout"]

#: Held while a weight's parts are replaced: threads may meet in one layer. Never held while a kernel is compiled.
LOCK = threading.RLock()


def _new_lock_in_child() -> None:
    # The thread that held it does not exist in a forked child, which would wait for it for ever.
    global LOCK
    LOCK._at_fork_reinit()  # type: ignore[attr-defined]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock_in_child)

Parts = Mapping[str, torch.Tensor]


class Layout:
    """The stored form, and the base of all others.

    Attributes:
        name: as ``QTensor.layout`` and `requanto.explain` show it.
        extra: names of parts that this layout has beside those of the stored form.
        rows_are_views: rows (and experts) of the codes can be cut out as views.
    """

    name = "plain"
    extra: tuple[str, ...] = ()
    rows_are_views = True

    def pack(self, spec: WeightSpec, parts: Parts) -> dict[str, torch.Tensor]:
        """``qdata`` and `extra` in this layout, from a plain weight's parts."""
        return {"qdata": parts["qdata"]}

    def unpack(self, spec: WeightSpec, parts: Parts) -> torch.Tensor:
        """The stored codes, bit for bit: the very tensor of a plain weight, else a new one."""
        return parts["qdata"]

    def codes(self, spec: WeightSpec, parts: Parts, start: int, stop: int) -> torch.Tensor:
        """Codes of rows ``start .. stop`` of the stored matrix, one an element: ``[stop - start, K]``."""
        rows = self._rows(spec, parts)[start:stop]
        return unpack(rows, spec.qtype.bits, spec.row_length) if spec.qtype.is_packed else rows

    def gather(self, spec: WeightSpec, parts: Parts, index: torch.Tensor) -> torch.Tensor:
        """Codes of some rows of the stored matrix, one an element: ``[len(index), K]``.

        Raises:
            IndexError: an index is out of range.
        """
        stored = self._rows(spec, parts)
        if stored.dtype.itemsize == 1:  # torch copies bytes row by row, and knows no index_select of float8
            rows = torch.index_select(stored.view(torch.uint8), 0, index).view(stored.dtype)
        else:
            rows = torch.index_select(stored, 0, index)
        return unpack(rows, spec.qtype.bits, spec.row_length) if spec.qtype.is_packed else rows

    @staticmethod
    def _rows(spec: WeightSpec, parts: Parts) -> torch.Tensor:
        codes = parts["qdata"]
        return codes.reshape(spec.matrix_shape[0], codes.shape[spec.axis + 1 :].numel())

    def write(self, spec: WeightSpec, parts: Parts, stored: Parts) -> None:
        """Takes other codes, given as a plain weight's parts, into the same memory."""
        for name, part in self.pack(spec, stored).items():
            parts[name].copy_(part)

    def check_unpack(self, parts: Parts) -> None:
        """Raises RuntimeError where the memory must stay as it is."""

    def clone(self, spec: WeightSpec, parts: Parts) -> dict[str, torch.Tensor]:
        """A copy of ``qdata`` and `extra`."""
        return {name: parts[name].clone() for name in ("qdata", *self.extra)}

    def codes_form(self, spec: WeightSpec) -> tuple[torch.Size, torch.dtype]:
        """Shape and dtype of ``qdata`` in this layout."""
        return spec.codes_shape, spec.qtype.storage_dtype

    def extra_forms(self, spec: WeightSpec) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Shape and dtype of each part of `extra`."""
        return {}

    def check(self, spec: WeightSpec, parts: Parts) -> None:
        """Refuses parts that are not those of the record in this layout.

        Raises:
            ValueError: see `WeightSpec.check`.
        """
        if not self.extra:
            spec.check(parts, self.codes_form(spec))
            return
        spec.check({name: part for name, part in parts.items() if name not in self.extra}, self.codes_form(spec))
        for name, (shape, dtype) in self.extra_forms(spec).items():
            part = parts.get(name)
            if part is None or part.shape != shape or part.dtype != dtype or part.device != parts["qdata"].device:
                found = "none" if part is None else f"{part.dtype} {tuple(part.shape)} on {part.device}"
                raise ValueError(
                    f"{spec.text()} in layout {self.name!r}: {name} is {found}, expected {dtype} {tuple(shape)}"
                )

    def names(self, spec: WeightSpec) -> list[str]:
        """Names, in order, of the parts that operators are given: all but the low-rank factors."""
        return [*spec.expected, *self.extra]


PLAIN = Layout()
_layouts: dict[str, Layout] = {PLAIN.name: PLAIN}


def register_layout(layout: Layout) -> Layout:
    """Makes a layout known by its name.

    Raises:
        ValueError: the name is taken.
    """
    if layout.name in _layouts:
        raise ValueError(f"a layout named {layout.name!r} is registered already")
    _layouts[layout.name] = layout
    return layout


def layout_named(name: str) -> Layout:
    """The layout of that name.

    Raises:
        ValueError: this machine does not know it.
    """
    found = _layouts.get(name)
    if found is None:
        raise ValueError(
            f"a quantized weight lies in layout {name!r}, which this machine does not know (it knows "
            f"{', '.join(_layouts)}): it was packed for another kind of processor. Save, export or copy the model before it "
            f"is packed, or after requanto.unpack(model)."
        )
    return found
