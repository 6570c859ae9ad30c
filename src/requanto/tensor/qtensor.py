"""QTensor: a quantized weight as a tensor subclass.

It replaces the float weight of an unmodified ``nn.Linear``, ``nn.Conv2d``, ``nn.Embedding`` or fused-expert parameter, and
shows the shape, dtype and device of that weight. A `WeightSpec` describes it (`requanto.tensor.spec`), and a
`WeightStorage` holds its parts, which are ordinary tensors (`requanto.tensor.storage`):

    qdata  codes, ``[*lead, K]`` (8 bits; conv weights keep their shape) or packed bytes ``[*lead, ceil(K * bits / 8)]``
    scale  ``[*lead, K / group]``
    shift  like scale, only for affine weights
    row_scale  ``[*lead, 1]``, only with ``scale_bits``. The parts scale and shift then hold codes of ``scale_bits`` bits,
        packed along the groups, and the attributes of those names compute the floats (`requanto.scales.compact`)
    codebook  value of each code, ``[2^bits]``, only for learned types (``codebook4``)
    up, down  ``[*lead, r]`` and ``[*lead[:-1], r, K]``: factors of the low-rank term

``W = dequant(qdata, scale, shift) + up @ down``. An adapter that is merged into a quantized weight becomes its low-rank
term, since rounding the sum to few bits would lose most of the adapter (`requanto.tensor.lowrank`). With ``rotation`` the
codes are those of rotated rows (`requanto.tensor.rotation`), and ``W = rotated(dequant(...)) + up @ down``.

``lead`` is ``shape[: axis + 1]`` (rows; experts x rows for 3D weights with ``axis=1``) and K the product of the other sizes.
A ``transposed`` tensor shows its last two axes swapped; its stored tensors are the same. GPT-2's ``Conv1D``, with a weight
[in, out], is stored so.

`requanto.tensor.ops` lists the supported operators; any other aten operator raises. Reading changes nothing. A change
through one alias (``.data``, ``.detach()``, ``.t()``, an entry of a state dict) changes all aliases.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

from requanto.dtypes.qtypes import qtype, qtypes, resolve_qtype
from requanto.runtime.tracing import in_jit_trace, is_tracing, jit_trace_paused, runs_eagerly, without_autocast
from requanto.scales import default_group_size, fit_group_size, quantize_weight_data
from requanto.scales.codebook import values_of
from requanto.scales.compact import check_scale_bits, expand_scale, expand_shift, pack_codes, unpack_codes
from requanto.scales.correction import check_low_rank, corrected
from requanto.scales.search import ScaleSearch
from requanto.tensor import dispatch
from requanto.tensor.layout import PLAIN, Layout, layout_named
from requanto.tensor.rotation import check_rotation, fit_rotation, rotate
from requanto.tensor.spec import PART_NAMES, WeightSpec, swapped
from requanto.tensor.storage import SlicedStorage, WeightStorage


class QTensor(torch.Tensor):
    """A quantized weight. Make one with :meth:`quantize`, read it with :meth:`dequantize`.

    Args:
        qdata, scale, shift, up, down, codebook, row_scale: the parts (see the module's docstring).
        qtype, shape, dtype, axis, group_size, transposed, activation, scale_bits, rotation: see `WeightSpec`; ``shape`` is
            the one that the tensor shows.

    Raises:
        ValueError: a shape, dtype or device of the parts does not fit the description.
    """

    #: Names of the parts, in the order of the constructor.
    tensor_data_names = PART_NAMES

    _spec: WeightSpec
    _storage: WeightStorage

    @staticmethod
    def __new__(
        cls,
        qdata: torch.Tensor,
        scale: torch.Tensor | None = None,
        shift: torch.Tensor | None = None,
        *,
        qtype: qtype | None = None,
        shape: torch.Size | tuple[int, ...] | None = None,
        dtype: torch.dtype | None = None,
        axis: int = 0,
        group_size: int | None = None,
        transposed: bool = False,
        activation: qtype | None = None,
        up: torch.Tensor | None = None,
        down: torch.Tensor | None = None,
        codebook: torch.Tensor | None = None,
        row_scale: torch.Tensor | None = None,
        scale_bits: int | None = None,
        rotation: int | None = None,
        requires_grad: bool = False,
    ) -> QTensor:
        if isinstance(qdata, QTensor) and scale is None:
            # accelerate rebuilds a moved parameter as type(old)(moved, requires_grad=...).
            return qdata.detach()
        if scale is None or qtype is None or shape is None or dtype is None:
            raise TypeError(
                "QTensor(qdata, scale, shift, qtype=, shape=, dtype=) needs all of them; see QTensor.quantize"
            )
        if requires_grad:
            raise RuntimeError(NO_GRADIENT)
        spec = WeightSpec(
            qtype=qtype,
            shape=swapped(shape) if transposed else torch.Size(shape),
            dtype=dtype,
            axis=axis,
            group_size=group_size,
            affine=shift is not None,
            transposed=transposed,
            activation=activation,
            scale_bits=scale_bits,
            rotation=rotation,
        )
        given = zip(PART_NAMES, (qdata, scale, shift, up, down, codebook, row_scale))
        return cls._of(spec, {name: part for name, part in given if part is not None})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: ``__new__`` does all, and torch.Tensor's initializer takes no arguments."""

    @classmethod
    def _of(cls, spec: WeightSpec, parts: dict[str, torch.Tensor], layout: Layout = PLAIN) -> QTensor:
        """The weight of this spec and these parts.

        Raises:
            ValueError: the parts do not fit the spec.
        """
        layout.check(spec, parts)
        return cls._over(spec, WeightStorage(parts, layout, spec))

    @classmethod
    def _over(cls, spec: WeightSpec, storage: WeightStorage) -> QTensor:
        """A view of a storage whose parts were already checked."""
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            spec.seen_shape,
            strides=spec.strides,
            dtype=spec.dtype,
            device=storage.parts["qdata"].device,
            requires_grad=False,
        )
        self._spec, self._storage = spec, storage
        return self

    # ------------------------------------------------------------------ quantization

    @classmethod
    def quantize(
        cls,
        weight: torch.Tensor,
        kind: str | qtype,
        *,
        group_size: int | str | None = "default",
        symmetric: bool | None = None,
        axis: int | None = None,
        transposed: bool = False,
        search: str | ScaleSearch | None = None,
        scale_bits: int | None = None,
        rotation: bool | str | int | None = None,
        low_rank: int | None = None,
        name: str = "weight",
    ) -> QTensor:
        """Quantizes a float weight.

        Args:
            weight: float tensor of 2 axes (Linear, Embedding), 3 (experts ``[E, N, K]``) or more (convolutions).
            kind: ``"int8"``, ``"int4"``, ``"nf4"``, ``"float8"`` ... or a qtype (docs/types.md).
            group_size: number of adjacent weights of a row that share a scale; None: one scale per row; ``"default"``: 64
                for 4 to 7 bits, 32 below, one scale per row for 8 bits. A size that does not divide K: see `scales.groups`.
            symmetric: codes around zero without a shift; None: integers below 8 bits and unsigned ones have a shift,
                int8, float8 and codebooks have none.
            axis: 0 or 1, see `WeightSpec`; None: 1 for 3D weights, else 0.
            transposed: the weight is ``[..., K, N]``: quantize along the second-to-last axis.
            search: how scale and shift are chosen: ``"minmax"``, ``"mse"``, ``"weighted"``, ``"aligned"``, ``"hqq"``, or a
                function (`requanto.scales.search`); None: the type's default.
            scale_bits: 4 to 8: bits in which a group's scale and shift are stored (`scales.compact`); None or 16: as
                floats. No effect on a weight with one scale per row, which stays float32.
            rotation: True, ``"hadamard"`` or the largest block: quantize the rotated rows (`tensor.rotation`).
            low_rank: rank of a low-rank term that corrects rounding errors (`scales.correction`).
            name: name of the weight in messages.

        Raises:
            ValueError: the type is unknown or does not support ``symmetric``; or the weight is not float, has fewer than
                two axes, or contains NaN or Inf.
        """
        kind = resolve_qtype(kind)
        if isinstance(weight, QTensor):
            raise ValueError(f"{name} is quantized already ({weight.qtype.name}); call .dequantize() on it first")
        if weight.dim() < 2:
            raise ValueError(f"{name}: a weight to quantize needs two axes or more, found shape {tuple(weight.shape)}")
        if not weight.is_floating_point() or weight.dtype.itemsize < 2:
            raise ValueError(f"{name}: only float weights can be quantized, found {weight.dtype}")
        weight = weight.detach()
        canonical = weight.transpose(-1, -2) if transposed else weight
        if axis is None:
            axis = 1 if canonical.dim() == 3 else 0
        if not 0 <= axis < canonical.dim() - 1:
            raise ValueError(f"{name}: axis must lie in 0..{canonical.dim() - 2}, found {axis}")
        length = canonical.shape[axis + 1 :].numel()
        wanted = default_group_size(kind) if group_size == "default" else group_size
        group = fit_group_size(wanted, length, name)
        affine = kind.affine(symmetric, name)
        scale_bits = check_scale_bits(scale_bits, f"{name}: scale_bits")
        if group is None:
            scale_bits = None
        block = fit_rotation(check_rotation(rotation, f"{name}: rotation"), length, name)
        rank = check_low_rank(low_rank, f"{name}: low_rank")
        rows = canonical.reshape(*canonical.shape[: axis + 1], length)
        spec = WeightSpec(
            qtype=kind,
            shape=canonical.shape,
            dtype=weight.dtype,
            axis=axis,
            group_size=group,
            affine=affine,
            transposed=transposed,
            scale_bits=scale_bits,
            rotation=block,
        )

        def rounded(values: torch.Tensor) -> QTensor:
            data = quantize_weight_data(values, kind, group, affine, search, name, scale_bits, block, weight.dtype)
            parts = {
                "qdata": data.qdata.view(spec.codes_shape),
                "scale": data.scale,
                "shift": data.shift,
                "codebook": data.codebook,
                "row_scale": data.row_scale,
            }
            return cls._of(spec, {part: tensor for part, tensor in parts.items() if tensor is not None})

        return rounded(rows) if rank is None or not weight.numel() else corrected(rows, rank, rounded)

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
        """Float scales ``[*lead, G]``; with ``scale_bits`` computed from their codes, and not to be changed in place."""
        parts = self._storage.parts
        if self._spec.scale_bits is None:
            return parts["scale"]
        with _read_only():
            return float_scale(self._spec, parts)

    @scale.setter
    def scale(self, value: torch.Tensor) -> None:
        self._set_float("scale", value)

    @property
    def shift(self) -> torch.Tensor | None:
        """Float shifts ``[*lead, G]``, or None; with ``scale_bits`` as `scale`."""
        parts = self._storage.parts
        if self._spec.scale_bits is None or "shift" not in parts:
            return parts.get("shift")
        with _read_only():
            return float_shift(self._spec, parts)

    @shift.setter
    def shift(self, value: torch.Tensor) -> None:
        self._set_float("shift", value)

    def _set_float(self, name: str, value: torch.Tensor) -> None:
        if self.scale_bits is not None:
            raise AttributeError(
                f"a {name} that is stored in {self.scale_bits} bits cannot be set; set the stored parts with set_inner()"
            )
        layout, parts = self._storage.state
        parts = {**parts, name: value}
        layout.check(self._spec, parts)
        self._storage.set(parts, layout)

    @property
    def row_scale(self) -> torch.Tensor | None:
        """One scale per row for weights with ``scale_bits``, else None."""
        return self._storage.parts.get("row_scale")

    @property
    def codebook(self) -> torch.Tensor | None:
        """Value of each code for learned types, else None."""
        return self._storage.parts.get("codebook")

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
        spec = self._spec.replace(**changes, affine="shift" in parts)
        return type(self)._of(spec, parts)

    def view_of_storage(self, **changes: Any) -> QTensor:
        """A view of this weight's storage, which sees its changes and the other way round.

        Args:
            changes: fields of the spec to change: dtype, activation, shape, axis or transposed; the last three only if the
                stored rows stay the same.
        """
        spec = self._spec.replace(**changes) if changes else self._spec
        return type(self)._over(spec, self._storage)

    def as_matrix(self) -> QTensor:
        """The weight as its stored matrix ``[N, K]``, a view of the same storage."""
        if len(self._spec.shape) == 2 and not self._spec.transposed:
            return self
        return self.view_of_storage(shape=torch.Size(self._spec.matrix_shape), axis=0, transposed=False)

    def shared_along(self, axis: int) -> frozenset[str]:
        """Names of the parts that do not have the stored ``axis``: slices along it share them."""
        return frozenset(("codebook", "down") if axis == self.axis else ("codebook",))

    def scale_codes(self) -> dict[str, torch.Tensor]:
        """The stored scale and shift ``[*lead, G]``; with ``scale_bits`` as unpacked codes, one per byte."""
        parts, bits = self._storage.parts, self._spec.scale_bits
        stored = {name: parts[name] for name in ("scale", "shift") if name in parts}
        if bits is None:
            return stored
        return {name: unpack_codes(part, bits, self._spec.groups) for name, part in stored.items()}

    def scales(self, change: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
        """The stored scale and shift after ``change``, which gets them (or their unpacked codes) as ``[*lead, G]``."""
        bits, codes = self.scale_bits, self.scale_codes()
        if bits is None:
            return {name: change(part) for name, part in codes.items()}
        return {name: pack_codes(change(part).contiguous(), bits) for name, part in codes.items()}

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

    # ------------------------------------------------------------------ dequantization

    def codes(self) -> torch.Tensor:
        """Unpacked codes ``[*lead, K]``: uint8 (0 .. 2^bits-1) below 8 bits, else uint8, int8 or float8."""
        spec = self._spec
        layout, parts = self._storage.state
        if layout is not PLAIN and is_tracing():
            layout, parts = PLAIN, {"qdata": self._traced_codes()}
        return layout.codes(spec, parts, 0, spec.matrix_shape[0]).reshape(*spec.lead, spec.row_length)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The float weight in ``dtype`` (default: its own), computed in float32."""
        if in_jit_trace():
            with jit_trace_paused():
                return self.dequantize(dtype)
        with without_autocast(self.device):  # autocast would round the factors of the low-rank term
            values = self.values_without_lowrank()
            if self.up is not None and self.down is not None:
                values = values + self.up.to(torch.float32) @ self.down.to(torch.float32)
        values = values.to(dtype or self.dtype).reshape(self.canonical_shape)
        return values.transpose(-1, -2) if self.transposed else values

    def values_without_lowrank(self) -> torch.Tensor:
        """float32 ``[*lead, K]``: the dequantized codes, rotated back if the weight is rotated, without low-rank term."""
        values = self.stored_values()
        return values if self.rotation is None else rotate(values, self.rotation)

    def stored_values(self) -> torch.Tensor:
        """float32 ``[*lead, K]``: the dequantized codes, of a rotated weight in the rotated basis."""
        if in_jit_trace():
            with jit_trace_paused():
                return self.stored_values()
        return scaled_values(self._code_values(), self.qtype, self.scale, self.shift, self.row_length)

    def _code_values(self) -> torch.Tensor:
        """float32 ``[*lead, K]``: the codes as numbers, or their values in the codebook."""
        codes = self.codes()
        if not self.qtype.is_codebook:
            return codes.to(torch.float32)
        table = self.codebook.float() if self.codebook is not None else values_of(self.qtype, codes)
        return torch.index_select(table, 0, codes.flatten().to(torch.int32)).view(codes.shape)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        groups = "row" if self.group_size is None else f"group {self.group_size}"
        kind = "affine" if self.affine else "symmetric"
        if self.scale_bits is not None:
            kind += f", scales in {self.scale_bits} bits"
        if self.rotation is not None:
            kind += f", rotated in blocks of {self.rotation}"
        packed = f", packed for {self.layout_name}" if self.is_packed else ""
        return (
            f"QTensor({self.qtype.name}, shape={tuple(self.shape)}, dtype={self.dtype}, {groups}, {kind}{packed}, "
            f"{f'rank {self.rank} beside, ' if self.rank else ''}device={self.device}, "
            f"{self.bits_per_weight:.2f} bits a weight)"
        )

    # ------------------------------------------------------------------ flattening, pickling, copying

    def __tensor_flatten__(self) -> tuple[list[str], tuple]:
        layout, parts = self._storage.state
        return [f"_{name}" for name in parts], (self._spec.words, self._spec.dtype, layout.name)

    @classmethod
    def __tensor_unflatten__(
        cls, inner: dict[str, torch.Tensor], context: tuple, outer_size: Any, _stride: Any
    ) -> QTensor:
        words, dtype, layout = context
        shape = swapped(outer_size) if "transposed" in words.split() else torch.Size(outer_size)
        parts = {name[1:]: part for name, part in inner.items()}
        return cls._of(WeightSpec.from_words(words, shape, dtype), parts, layout_named(layout))

    def _stable_hash_for_caching(self) -> str:
        """Key of torch's on-disk cache of compiled graphs. Weights are graph inputs, so their values are not part of it."""
        parts = self._storage.parts.items()
        inner = [(name, tuple(part.shape), part.stride(), part.dtype, part.device) for name, part in parts]
        return repr((self.__tensor_flatten__()[1], tuple(self.shape), inner, self.requires_grad))

    def __reduce_ex__(self, protocol: Any) -> tuple:
        parts = dict(self.inner_tensors())
        if self.is_packed:  # a copy throughout: with the codes copied and the scales shared a write would corrupt both
            parts = {name: part if name == "qdata" else part.clone() for name, part in parts.items()}
        if self.qtype.is_floating_point:  # pickle does not support float8 (only torch.save does): pickle the bytes
            parts["qdata"] = parts["qdata"].view(torch.uint8)
        is_parameter = bool(getattr(self, "_is_param", False))
        return _rebuild, (self._spec.words, tuple(self._spec.shape), self.dtype, parts, is_parameter)

    def __copy__(self) -> QTensor:
        """Another view of the same storage, as ``copy.copy`` of a float tensor shares its memory."""
        copy = self.view_of_storage()
        if getattr(self, "_is_param", False):
            copy._is_param = True
        return copy

    def __deepcopy__(self, memo: dict) -> QTensor:
        if id(self) not in memo:
            copy = self.clone()
            if getattr(self, "_is_param", False):
                copy._is_param = True
            memo[id(self)] = copy
        return memo[id(self)]

    # ------------------------------------------------------------------ dispatch

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return dispatch.torch_function(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return dispatch.torch_dispatch(func, types, args, kwargs or {})


def float_scale(spec: WeightSpec, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Float scales ``[*lead, G]`` from a weight's parts."""
    if spec.scale_bits is None:
        return parts["scale"]
    return expand_scale(unpack_codes(parts["scale"], spec.scale_bits, spec.groups), parts["row_scale"])


def float_shift(spec: WeightSpec, parts: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """Float shifts ``[*lead, G]`` from a weight's parts; None if it is symmetric."""
    bits, shift = spec.scale_bits, parts.get("shift")
    if bits is None or shift is None:
        return shift
    return expand_shift(unpack_codes(shift, bits, spec.groups), float_scale(spec, parts), spec.qtype, bits)


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
    setattr(QTensor, f"_{_name}", _part(_name))


def scaled_values(
    values: torch.Tensor, kind: qtype, scale: torch.Tensor, shift: torch.Tensor | None, length: int
) -> torch.Tensor:
    """Applies scale and shift to codes: float32 ``[..., K]``.

    Args:
        values: the codes as numbers, float32 ``[..., K]``.
        kind: type of the codes.
        scale, shift: ``[..., G]``.
        length: K as an int; under tracing ``values.shape[-1]`` may be symbolic.
    """
    if shift is None and kind.is_packed:
        values = values - kind.zero_code
    groups = values.unflatten(-1, (scale.shape[-1], -1)) if length else values.unsqueeze(-1)
    groups = groups * scale.to(torch.float32).unsqueeze(-1)
    if shift is not None:
        groups = groups - shift.to(torch.float32).unsqueeze(-1)
    return groups.reshape(values.shape)


NO_GRADIENT = (
    "a quantized weight cannot require a gradient: its codes are integers. Train an adapter on top of it (LoRA), or "
    "train before freezing with requanto.quantize(model, ...) and requanto.freeze(model)."
)


@torch.library.custom_op("requanto::stored_codes", mutates_args=())
def _stored_codes(parts: list[torch.Tensor], words: str, shape: list[int]) -> torch.Tensor:
    """The plain codes of a prepacked weight, as an operator for traced graphs."""
    spec, layout, named = operator_weight(parts, words, shape, torch.float32)
    layout.check(spec, named)
    codes = layout.unpack(spec, named).view(spec.codes_shape)
    return codes.clone() if layout is PLAIN else codes


@_stored_codes.register_fake
def _(parts: list[torch.Tensor], words: str, shape: list[int]) -> torch.Tensor:
    spec = WeightSpec.from_words(words.partition(" layout=")[0], shape, torch.float32)
    return parts[0].new_empty(spec.codes_shape, dtype=spec.qtype.storage_dtype)


def operator_weight(
    parts: list[torch.Tensor], words: str, shape: Any, dtype: torch.dtype
) -> tuple[WeightSpec, Layout, dict[str, torch.Tensor]]:
    """Spec, layout and parts by name from the arguments of a custom operator; not checked yet.

    Args:
        parts: in the order of `Layout.names`.
        words: `WeightSpec.words`, followed by ``layout=NAME``.
        shape: the stored shape.
        dtype: dtype that the weight shows.

    Raises:
        ValueError: the number of parts does not fit the spec.
    """
    plain, _, name = words.partition(" layout=")
    spec, layout = WeightSpec.from_words(plain, shape, dtype), layout_named(name or PLAIN.name)
    names = layout.names(spec)
    if len(names) != len(parts):
        raise ValueError(f"{spec.text()}: found {len(parts)} tensors, expected {', '.join(names)}")
    return spec, layout, dict(zip(names, parts))


def _rebuild(
    words: str, shape: tuple[int, ...], dtype: torch.dtype, parts: dict[str, torch.Tensor], is_parameter: bool
) -> QTensor:
    """Unpickles a QTensor. Its device is that of the codes, so ``map_location`` works."""
    spec = WeightSpec.from_words(words, shape, dtype)
    codes = parts["qdata"]
    tensor = QTensor._of(spec, {**parts, "qdata": codes.view(spec.qtype.storage_dtype)})
    if is_parameter:
        tensor._is_param = True
    return tensor


def _rebuild_qtensor(
    qdata: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor | None,
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    axis: int,
    group_size: int | None,
    transposed: bool,
    is_param: bool,
    activation: str | None = None,
    up: torch.Tensor | None = None,
    down: torch.Tensor | None = None,
    later: dict[str, Any] | None = None,
) -> QTensor:
    """Unpickles a QTensor that was written by version 0.1 before November 2026."""
    tensor = QTensor(
        qdata.view(qtypes[name].storage_dtype),
        scale,
        shift,
        qtype=qtypes[name],
        shape=shape,
        dtype=dtype,
        axis=axis,
        group_size=group_size,
        transposed=transposed,
        activation=None if activation is None else qtypes[activation],
        up=up,
        down=down,
        **(later or {}),
    )
    if is_param:
        tensor._is_param = True
    return tensor


# Pickles refer to these functions by module and name, so the module name must not change when files move.
_rebuild.__module__ = _rebuild_qtensor.__module__ = "requanto.qtensor"
# torch.load(weights_only=True) only calls registered functions; these build tensors and have no side effects.
torch.serialization.add_safe_globals([_rebuild, _rebuild_qtensor, (QTensor, "requanto.qtensor.QTensor"), QTensor])
