"""What a QTensor says about itself: the fields of its spec, its layout, and its stored tensors.

The half of `requanto.tensor.qtensor.QTensor` that does no arithmetic. Setting a part replaces it in the storage, for all
aliases of the weight.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from requanto.dtypes.qtypes import qtype, resolve_qtype
from requanto.runtime.tracing import is_tracing, runs_eagerly
from requanto.scales import blocks
from requanto.scales.compact import expand_blocks, expand_scale, expand_shift, pack_codes, unpack_codes
from requanto.tensor.layout import PLAIN, Layout
from requanto.tensor.spec import PART_NAMES, WeightSpec, swapped
from requanto.tensor.storage import SlicedStorage, WeightStorage

if TYPE_CHECKING:
    from requanto.tensor.qtensor import QTensor


class WeightParts:
    """Base of QTensor, which is a tensor over a `WeightStorage` that a `WeightSpec` describes."""

    _spec: WeightSpec
    _storage: WeightStorage

    # ------------------------------------------------------------------ fields of the spec

    @property
    def qtype(self) -> qtype:
        """Type of the codes."""
        return self._spec.qtype

    @property
    def axis(self) -> int:
        """Last of the leading axes that have separate scales."""
        return self._spec.axis

    @property
    def group_size(self) -> int | None:
        """Number of weights that share a scale; None: one scale per row."""
        return self._spec.group_size

    @property
    def affine(self) -> bool:
        """True if the weight has a shift."""
        return self._spec.affine

    @property
    def transposed(self) -> bool:
        """True if the tensor shows the last two axes swapped."""
        return self._spec.transposed

    @property
    def scale_bits(self) -> int | None:
        """Bits in which scales and shifts are stored; None: they are floats."""
        return self._spec.scale_bits

    @property
    def zeros(self) -> bool:
        """True if shifts are stored as whole zero points."""
        return self._spec.zeros

    @property
    def signed(self) -> bool:
        """True if scales may be negative."""
        return self._spec.signed

    @property
    def scale_block(self) -> int | None:
        """Number of weights that share a ``row_scale``; None: those of a row."""
        return self._spec.scale_block

    @property
    def rotation(self) -> int | None:
        """Size of the blocks in which rows were rotated before rounding; None: no rotation."""
        return self._spec.rotation

    @property
    def activation(self) -> qtype | None:
        """Type to which the inputs of a GEMM are quantized, per token; None: they stay float."""
        return self._spec.activation

    @activation.setter
    def activation(self, value: str | qtype | None) -> None:
        self._spec = self._spec.replace(activation=None if value is None else resolve_qtype(value))

    @property
    def canonical_shape(self) -> torch.Size:
        """The stored shape: that of the tensor, with the last two axes swapped back if ``transposed``."""
        return self._spec.shape

    @property
    def lead(self) -> torch.Size:
        """Sizes of the leading axes that have separate scales."""
        return self._spec.lead

    @property
    def row_length(self) -> int:
        """K: number of weights in a row."""
        return self._spec.row_length

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """N and K of the stored codes as a matrix."""
        return self._spec.matrix_shape

    @property
    def groups(self) -> int:
        """Number of scales per row."""
        return self._spec.groups

    def spec(self) -> dict[str, Any]:
        """A JSON description of the weight, without the tensors."""
        spec = self._spec
        return {
            "qtype": spec.qtype.name,
            "shape": list(spec.seen_shape),
            "axis": spec.axis,
            "group_size": spec.group_size,
            "affine": spec.affine,
            "transposed": spec.transposed,
            "activation": None if spec.activation is None else spec.activation.name,
            "rank": self.rank,
            "scale_bits": spec.scale_bits,
            "rotation": spec.rotation,
            "column": spec.column,
            "zeros": spec.zeros,
            "signed": spec.signed,
            "scale_block": spec.scale_block,
            "order": spec.order,
        }

    # ------------------------------------------------------------------ layout

    @property
    def layout_name(self) -> str:
        """Name of the layout of the codes: ``"plain"``, as in checkpoints, or that of a kernel."""
        return self._storage.layout.name

    @property
    def is_packed(self) -> bool:
        """True if the weight is prepacked: its codes are in a kernel's layout."""
        return self._storage.layout is not PLAIN

    def pack(self, layout: Layout) -> None:
        """Converts the codes to a layout, for this weight and all its aliases; `requanto.prepare` selects one."""
        self._storage.pack(self._spec, layout)

    def unpack(self) -> None:
        """Converts the codes to the plain layout, for this weight and all its aliases."""
        self._storage.unpack(self._spec)

    @property
    def nbytes(self) -> int:
        """Bytes in memory, including copies of scales for a kernel."""
        return self._storage.nbytes

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight in memory, including scales and shifts."""
        return self.nbytes * 8 / max(1, self.shape.numel())

    # ------------------------------------------------------------------ parts

    @property
    def qdata(self) -> torch.Tensor:
        """The codes in the plain layout; of a prepacked weight a copy, as inference tensor, so in-place changes raise."""
        layout, parts = self._storage.state
        if layout is PLAIN:
            # A new tensor over the same memory: while a caller holds it, the weight is not prepacked.
            return parts["qdata"].detach()
        if not runs_eagerly():
            return self.inner_tensors()["qdata"]
        with torch.inference_mode():
            return layout.unpack(self._spec, parts)

    @qdata.setter
    def qdata(self, value: torch.Tensor) -> None:
        self.set_inner({**self.inner_tensors(), "qdata": value})

    @property
    def scale(self) -> torch.Tensor:
        """Float scales ``[*lead, G]``; if they are stored as codes computed from these, and not to be changed in place."""
        parts = self._storage.parts
        if not self._spec.code_bits:
            return parts["scale"]
        with _read_only():
            return float_scale(self._spec, parts)

    @scale.setter
    def scale(self, value: torch.Tensor) -> None:
        self._set_float("scale", value)

    @property
    def shift(self) -> torch.Tensor | None:
        """Float shifts ``[*lead, G]``, or None; if they are stored as codes as `scale`."""
        parts = self._storage.parts
        if self._spec.shift_code_bits is None or "shift" not in parts:
            return parts.get("shift")
        with _read_only():
            return float_shift(self._spec, parts)

    @shift.setter
    def shift(self, value: torch.Tensor) -> None:
        self._set_float("shift", value)

    def _set_float(self, name: str, value: torch.Tensor) -> None:
        if name in self._spec.code_bits:
            raise AttributeError(
                f"a {name} that is stored in {self._spec.code_bits[name]} bits cannot be set; set the stored parts with "
                f"set_inner()"
            )
        layout, parts = self._storage.state
        parts = {**parts, name: layout.arranged(self._spec, name, value)}
        layout.check(self._spec, parts)
        self._storage.set(parts, layout)

    @property
    def row_scale(self) -> torch.Tensor | None:
        """One scale per row (with ``scale_block``: per block) for weights with ``scale_bits`` and NVFP4, else None."""
        return self._storage.parts.get("row_scale")

    @property
    def row_shift(self) -> torch.Tensor | None:
        """One number per block, by which the codes of shifts are multiplied, for affine weights with ``scale_block``."""
        return self._storage.parts.get("row_shift")

    @property
    def codebook(self) -> torch.Tensor | None:
        """Value of each code for learned types, else None."""
        return self._storage.parts.get("codebook")

    @property
    def column(self) -> torch.Tensor | None:
        """The column scale ``[*lead[:-1], K]``, or None (`requanto.scales.columns`)."""
        return self._storage.parts.get("column")

    @property
    def order(self) -> torch.Tensor | None:
        """int32 ``[*lead[:-1], K]``: the weight's column that each stored column is; None: the same."""
        return self._storage.parts.get("order")

    def inner_tensors(self) -> dict[str, torch.Tensor]:
        """The parts in the plain layout, by name; the codes of a prepacked weight are a copy."""
        layout, parts = self._storage.state
        if layout is PLAIN:
            codes = parts["qdata"].detach()  # its holder is counted: see `requanto.linear.prepack.shared`
            codes = codes if codes.shape == self._spec.codes_shape else codes.view(self._spec.codes_shape)
            return {**parts, "qdata": codes}
        if is_tracing():
            others = {name: part for name, part in parts.items() if name not in ("qdata", *layout.extra)}
            return {"qdata": self._traced_codes(), **others}
        return self._storage.stored(self._spec)

    def onnx_inputs(self) -> tuple[list[torch.Tensor], dict[str, Any]]:
        """The parts in the order of `Layout.names`, and the attributes of a node (`requanto.runtime.onnx_nodes`)."""
        layout, parts = self._storage.state
        words = f"{self._spec.words} layout={layout.name}"
        return [parts[name] for name in layout.names(self._spec)], {"words": words, "shape": list(self._spec.shape)}

    def _traced_codes(self) -> torch.Tensor:
        layout, parts = self._storage.state
        named = [parts[name] for name in layout.names(self._spec)]
        words = f"{self._spec.words} layout={layout.name}"
        return torch.ops.requanto.stored_codes(named, words, list(self._spec.shape))  # type: ignore[no-any-return]

    def set_inner(self, inner: Mapping[str, torch.Tensor | None]) -> None:
        """Replaces all parts of the weight, for all its aliases.

        Args:
            inner: parts in the plain layout.

        Raises:
            ValueError: they do not fit this weight's spec.
        """
        parts = {name: part for name, part in inner.items() if part is not None}
        PLAIN.check(self._spec, parts)
        self._storage.set(parts)

    def with_inner(self, inner: Mapping[str, torch.Tensor | None], **changes: Any) -> QTensor:
        """A new weight of the same spec with other parts.

        Args:
            inner: all parts, in the plain layout.
            changes: fields of the spec to change; ``shape`` is the one that the tensor shows.
        """
        transposed = changes.get("transposed", self._spec.transposed)
        if "shape" in changes:
            changes["shape"] = swapped(changes["shape"]) if transposed else torch.Size(changes["shape"])
        parts = {name: part for name, part in inner.items() if part is not None}
        spec = self._spec.replace(**changes, affine="shift" in parts, column="column" in parts, order="order" in parts)
        return type(self)._of(spec, parts)

    def view_of_storage(self, **changes: Any) -> QTensor:
        """A view of this weight's storage, which sees its changes and the other way round.

        Args:
            changes: fields of the spec to change: dtype, activation, shape, axis or transposed; the last three only if the
                stored rows stay the same.
        """
        spec = self._spec.replace(**changes) if changes else self._spec
        return type(self)._over(spec, self._storage)

    def snapshot(self) -> QTensor:
        """This weight as it is now: packing or unpacking it in another thread does not reach it. Only to be read."""
        return type(self)._over(self._spec, self._storage.snapshot())

    def as_matrix(self) -> QTensor:
        """The weight as its stored matrix ``[N, K]``, a view of the same storage."""
        if len(self._spec.shape) == 2 and not self._spec.transposed:
            return self
        return self.view_of_storage(shape=torch.Size(self._spec.matrix_shape), axis=0, transposed=False)

    def shared_along(self, axis: int) -> frozenset[str]:
        """Names of the parts that do not have the stored ``axis``: slices along it share them."""
        return frozenset(("codebook", "down", "column", "order") if axis == self.axis else ("codebook",))

    def scale_codes(self) -> dict[str, torch.Tensor]:
        """The stored scale and shift ``[*lead, G]``; those stored as codes unpacked, one per byte."""
        parts, bits = self._storage.parts, self._spec.code_bits
        stored = {name: parts[name] for name in ("scale", "shift") if name in parts}
        return {n: unpack_codes(t, bits[n], self._spec.groups) if n in bits else t for n, t in stored.items()}

    def scales(self, change: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
        """The stored scale and shift after ``change``, which gets them (or their unpacked codes) as ``[*lead, G]``."""
        changed = {name: change(part) for name, part in self.scale_codes().items()}
        return self.packed_scales(changed)

    def packed_scales(self, codes: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The reverse of `scale_codes`."""
        bits = self._spec.code_bits
        return {n: pack_codes(t.contiguous(), bits[n]) if n in bits else t for n, t in codes.items()}

    # ------------------------------------------------------------------ the low-rank term

    @property
    def up(self) -> torch.Tensor | None:
        """``[*lead, r]``, the left factor of the low-rank term, or None."""
        return self._storage.parts.get("up")

    @property
    def down(self) -> torch.Tensor | None:
        """``[*lead[:-1], r, K]``, the right factor of the low-rank term, or None."""
        return self._storage.parts.get("down")

    @property
    def rank(self) -> int:
        """Rank of the low-rank term, 0 without one."""
        up = self.up
        return 0 if up is None else up.shape[-1]

    def set_lowrank(self, up: torch.Tensor | None, down: torch.Tensor | None) -> None:
        """Replaces the low-rank term, in place, for all aliases and all modules that share the weight.

        Raises:
            ValueError: one of the two is missing, or their shapes do not fit the weight.
        """
        if up is not None or down is not None:
            self._spec.check_low_rank(up, down)
        layout, parts = self._storage.state
        self._storage.set({**parts, "up": up, "down": down}, layout)  # type: ignore[dict-item]

    def without_lowrank(self) -> QTensor:
        """The weight without its low-rank term."""
        if not self.rank:
            return self

        def without(parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {name: part for name, part in parts.items() if name not in ("up", "down")}

        return type(self)._over(self._spec, SlicedStorage(self._storage, self._spec, without, lambda layout: True))


def float_scale(spec: WeightSpec, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Float scales ``[*lead, G]`` from a weight's parts."""
    if spec.qtype.blocks is not None:
        return blocks.expand_scale(parts["scale"], parts.get("row_scale"), spec.qtype.blocks.scale)
    if spec.scale_bits is None:
        return parts["scale"].float() if spec.zeros else parts["scale"]  # in float32 the shift is exact
    codes = unpack_codes(parts["scale"], spec.scale_bits, spec.groups)
    if spec.scale_block is not None:
        return expand_blocks(codes, parts["row_scale"], 2 ** (spec.scale_bits - 1) if spec.signed else 0)
    return expand_scale(codes, parts["row_scale"])


def float_shift(spec: WeightSpec, parts: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """Float shifts ``[*lead, G]`` from a weight's parts; None if it is symmetric."""
    bits, shift = spec.shift_code_bits, parts.get("shift")
    if bits is None or shift is None:
        return shift
    if spec.scale_block is not None:
        return expand_blocks(unpack_codes(shift, bits, spec.groups), parts["row_shift"])
    return expand_shift(unpack_codes(shift, bits, spec.groups), float_scale(spec, parts), spec.qtype, bits)


def scales_of_rows(
    spec: WeightSpec, parts: Mapping[str, torch.Tensor], start: int, stop: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Float scales and shifts (None if symmetric) ``[stop - start, G]`` of rows ``start .. stop`` of the stored matrix."""
    names = [name for name in ("scale", "shift", "row_scale", "row_shift") if name in parts]
    rows = {name: parts[name].reshape(spec.matrix_shape[0], parts[name].shape[-1])[start:stop] for name in names}
    return float_scale(spec, rows), float_shift(spec, rows)


def _read_only() -> contextlib.AbstractContextManager:
    """For values computed from a weight's parts: torch refuses to change inference tensors in place, which would have no
    effect on the weight."""
    return torch.inference_mode() if runs_eagerly() else contextlib.nullcontext()


def _part(name: str) -> property:
    return property(
        lambda self: self._storage.parts.get(name), doc=f"The part {name!r} in the current layout, or None."
    )


# The attributes that `__tensor_flatten__` names: the parts in the current layout.
for _name in (*PART_NAMES, "flat"):
    setattr(WeightParts, f"_{_name}", _part(_name))
