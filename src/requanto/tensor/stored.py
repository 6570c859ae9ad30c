"""What a QTensor keeps: its stored tensors, plain or packed, and how it is taken apart and put together again.

The half of `qtensor.QTensor` that knows no arithmetic: every copy, file, process and compiled graph goes through
the few methods here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from requanto.dtypes.qtypes import qtype, qtypes
from requanto.runtime.tracing import unwatched
from requanto.scales.compact import expand_scale, expand_shift, pack_codes, unpack_codes
from requanto.tensor.layout import LOCK, Packed, find, is_fake, is_handle

if TYPE_CHECKING:
    from requanto.tensor.qtensor import QTensor

#: attribute that holds a stored tensor, where it is not called as the tensor is
_ATTRIBUTES = {"qdata": "_qdata", "scale": "_scale", "shift": "_shift"}


class Stored:
    """Base of QTensor, which makes it a tensor and describes the attributes."""

    #: Inner tensors, in the order of the constructor; a part that a tensor does not have is None.
    tensor_data_names = ("qdata", "scale", "shift", "up", "down", "codebook", "row_scale")

    _qdata: torch.Tensor
    _packed: Packed | None
    _scale: torch.Tensor
    _shift: torch.Tensor | None
    row_scale: torch.Tensor | None
    up: torch.Tensor | None
    down: torch.Tensor | None
    codebook: torch.Tensor | None
    qtype: qtype
    axis: int
    group_size: int | None
    transposed: bool
    activation: qtype | None
    scale_bits: int | None
    rotation: int | None
    shape: torch.Size
    dtype: torch.dtype

    # ------------------------------------------------------------------ plain and packed form (requanto.tensor.layout)

    @property
    def qdata(self) -> torch.Tensor:
        """The stored codes. Reading them makes a packed tensor plain again."""
        codes = self._qdata
        if self._packed is None and (not is_handle(codes) or is_fake(codes)):
            return codes
        with LOCK:  # another thread may be packing it, or have made it plain
            packed = self._packed
            if packed is None:
                return self._qdata
            with unwatched():
                codes = packed.plain().view(self.stored_shape)
            if not packed.pinned:
                self.qdata = codes
            return codes

    @qdata.setter
    def qdata(self, value: torch.Tensor) -> None:
        with LOCK:
            self._qdata, self._packed = value, None
        self.__dict__.pop("_bound", None)  # products made ready hold the packed form's memory

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """N and K of the matrix that the codes are stored as."""
        return self.lead.numel(), self.row_length  # type: ignore[attr-defined]

    @property
    def stored_shape(self) -> torch.Size:
        """The shape of the stored codes: those of 8 bits keep that of a convolution."""
        if not self.qtype.is_packed:
            return self.canonical_shape  # type: ignore[attr-defined, no-any-return]
        return torch.Size([*self.lead, -(-self.row_length * self.qtype.bits // 8)])  # type: ignore[attr-defined]

    def traced_codes(self) -> torch.Tensor:
        """`qdata`; while torch.compile traces a packed tensor, of which it sees the handle, an operator that gives them."""
        codes = self.qdata
        if not is_handle(codes):
            return codes
        return torch.ops.requanto.stored_codes(codes, self.qtype.name, list(self.stored_shape))  # type: ignore[no-any-return]

    @property
    def operand(self) -> torch.Tensor:
        """What operators get for the codes: the packed form where they take it, else the stored one."""
        return self._qdata if self._packed is not None and self._packed.travels else self.qdata

    @property
    def packed(self) -> Packed | None:
        """The form a kernel runs on, where it replaces the stored codes."""
        return self._packed

    def pack(self, packed: Packed) -> None:
        """Replaces the stored codes by their packed form."""
        # Readers look at _packed first: it must not name a form whose handle is not there yet, nor the reverse.
        with LOCK:
            self._qdata, self._packed = packed.handle, packed

    @property
    def nbytes(self) -> int:
        """Bytes that are really held."""
        codes = self._qdata if self._packed is None else self._packed
        return codes.nbytes + sum(t.nbytes for name, t in self.beside().items())

    @property
    def bits_per_weight(self) -> float:
        """Bits a weight costs, scales and shifts counted."""
        return self.nbytes * 8 / max(1, self.shape.numel())

    # ------------------------------------------------------------------ scales, stored as floats or in few bits

    @property
    def groups(self) -> int:
        """Scales in a row."""
        return self._scale.shape[-1] if self.scale_bits is None else self.row_length // self.group_size  # type: ignore[attr-defined]

    @property
    def affine(self) -> bool:
        """True where the weight has a shift."""
        return self._shift is not None

    @property
    def scale(self) -> torch.Tensor:
        """Scales ``[*lead, G]``, float; computed from their codes where they are stored in few bits."""
        if self.scale_bits is None:
            return self._scale
        assert self.row_scale is not None
        return expand_scale(unpack_codes(self._scale, self.scale_bits, self.groups), self.row_scale)

    @scale.setter
    def scale(self, value: torch.Tensor) -> None:
        self._require_floats("scale")
        self._scale = value

    @property
    def shift(self) -> torch.Tensor | None:
        """Shifts as ``scale``, or None."""
        if self.scale_bits is None or self._shift is None:
            return self._shift
        zeros = unpack_codes(self._shift, self.scale_bits, self.groups)
        return expand_shift(zeros, self.scale, self.qtype, self.scale_bits)

    @shift.setter
    def shift(self, value: torch.Tensor | None) -> None:
        self._require_floats("shift")
        self._shift = value

    def _require_floats(self, name: str) -> None:
        if self.scale_bits is not None:
            raise AttributeError(
                f"a {name} that is stored in {self.scale_bits} bits cannot be set; take() sets its parts"
            )

    def scales(self, change: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
        """The stored scale and shift with ``change`` applied along their groups, the last axis of what it is given."""
        bits, codes = self.scale_bits, self.scale_codes()
        if bits is None:
            return {name: change(t) for name, t in codes.items()}
        return {name: pack_codes(change(t).contiguous(), bits) for name, t in codes.items()}

    def scale_codes(self) -> dict[str, torch.Tensor]:
        """The stored scale and, if there is one, shift: as they are, or, in few bits, as one code a byte ``[*lead, G]``."""
        stored = {name: t for name, t in (("scale", self._scale), ("shift", self._shift)) if t is not None}
        if self.scale_bits is None:
            return stored
        return {name: unpack_codes(t, self.scale_bits, self.groups) for name, t in stored.items()}

    # ------------------------------------------------------------------ inner tensors

    def beside(self) -> dict[str, torch.Tensor]:
        """The stored tensors but the codes, by name; no shift where there is none."""
        found = {name: getattr(self, _ATTRIBUTES.get(name, name)) for name in self.tensor_data_names[1:]}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def inner_tensors(self) -> dict[str, torch.Tensor]:
        """The stored tensors by name; no shift where there is none."""
        return {"qdata": self.qdata, **self.beside()}

    def take(self, inner: Mapping[str, torch.Tensor | None]) -> None:
        """Puts these stored tensors, and no others, in the place of the tensor's own."""
        for name in self.tensor_data_names:
            setattr(self, name if name == "qdata" else _ATTRIBUTES.get(name, name), inner.get(name))

    def shared_along(self, axis: int) -> frozenset[str]:
        """Inner tensors that do not grow with the stored form's ``axis``: cutting or joining along it leaves them whole."""
        return frozenset(("codebook", "down") if axis == self.axis else ("codebook",))

    def with_inner(
        self,
        inner: Mapping[str, torch.Tensor | None],
        *,
        shape: torch.Size | tuple[int, ...] | list[int] | None = None,
        dtype: torch.dtype | None = None,
        axis: int | None = None,
        group_size: int | str | None = "same",
        transposed: bool | None = None,
    ) -> Any:
        """The same kind of tensor around these inner tensors, and no others; attributes stay unless given."""
        return type(self)(  # type: ignore[call-arg]
            **inner,
            qtype=self.qtype,
            shape=self.shape if shape is None else shape,
            dtype=dtype or self.dtype,
            axis=self.axis if axis is None else axis,
            group_size=self.group_size if group_size == "same" else group_size,
            transposed=self.transposed if transposed is None else transposed,
            activation=self.activation,
            scale_bits=self.scale_bits,
            rotation=self.rotation,
        )

    def replace(
        self,
        qdata: torch.Tensor,
        *,
        shape: torch.Size | tuple[int, ...] | list[int] | None = None,
        dtype: torch.dtype | None = None,
        axis: int | None = None,
        group_size: int | str | None = "same",
        transposed: bool | None = None,
        **others: torch.Tensor | None,
    ) -> QTensor:
        """The same kind of tensor around other codes; the other stored tensors stay unless given."""
        inner = {"qdata": qdata, **self.beside(), **others}
        return self.with_inner(inner, shape=shape, dtype=dtype, axis=axis, group_size=group_size, transposed=transposed)

    # ------------------------------------------------------------------ the low-rank term

    @property
    def rank(self) -> int:
        """Rank of the low-rank term; 0: there is none."""
        return 0 if self.up is None else self.up.shape[-1]

    def set_lowrank(self, up: torch.Tensor | None, down: torch.Tensor | None) -> None:
        """Replaces the low-rank term, in place: every module that shares the weight sees it.

        Raises:
            ValueError: one of the two is missing, or their shapes do not fit the weight.
        """
        if (up is None) != (down is None):
            raise ValueError("a low-rank term is up and down together; one of them is None")
        if up is not None and down is not None:
            wanted = (*self.lead, up.shape[-1]), (*self.lead[:-1], up.shape[-1], self.row_length)
            if (tuple(up.shape), tuple(down.shape)) != wanted:
                raise ValueError(
                    f"a low-rank term of up {tuple(up.shape)} and down {tuple(down.shape)} does not fit a quantized "
                    f"weight of shape {tuple(self.shape)}; expected up {wanted[0]}, down {wanted[1]}"
                )
        self.up, self.down = up, down

    def without_lowrank(self) -> QTensor:
        """The same codes without the low-rank term."""
        return self.replace(self.operand, up=None, down=None) if self.rank else self

    # ------------------------------------------------------------------ taking apart

    def spec(self) -> dict[str, Any]:
        """Everything but the tensors that rebuilding needs, as JSON holds it (`requanto.checkpoint.format`)."""
        return {
            "qtype": self.qtype.name,
            "shape": list(self.shape),
            "axis": self.axis,
            "group_size": self.group_size,
            "affine": self.affine,
            "transposed": self.transposed,
            "activation": None if self.activation is None else self.activation.name,
            "rank": self.rank,
            "scale_bits": self.scale_bits,
            "rotation": self.rotation,
        }

    def __tensor_flatten__(self) -> tuple[list[str], tuple]:
        activation = None if self.activation is None else self.activation.name
        context = (
            self.qtype.name,
            self.axis,
            self.group_size,
            self.transposed,
            self.dtype,
            activation,
            self.scale_bits,
            self.rotation,
        )
        # The raw codes: torch.compile takes packed forms by their handles.
        return ["_qdata", *(_ATTRIBUTES.get(name, name) for name in self.beside())], context

    @classmethod
    def __tensor_unflatten__(
        cls, inner: dict[str, torch.Tensor], context: tuple, outer_size: Any, _stride: Any
    ) -> QTensor:
        name, axis, group_size, transposed, dtype, activation, scale_bits, rotation = context
        return cls(  # type: ignore[call-arg, return-value]
            **{part.removeprefix("_"): tensor for part, tensor in inner.items()},
            qtype=qtypes[name],
            shape=outer_size,
            dtype=dtype,
            axis=axis,
            group_size=group_size,
            transposed=transposed,
            activation=None if activation is None else qtypes[activation],
            scale_bits=scale_bits,
            rotation=rotation,
        )

    def _stable_hash_for_caching(self) -> str:
        """What a compiled graph depends on: torch keeps graphs on disk under it. Weights are inputs of the graph."""
        inner = [(n, tuple(t.shape), t.stride(), t.dtype, t.device) for n, t in self.inner_tensors().items()]
        return repr((self.__tensor_flatten__()[1], tuple(self.shape), inner, self.requires_grad))  # type: ignore[attr-defined]

    def __reduce_ex__(self, protocol: Any) -> tuple:
        from requanto.tensor.qtensor import _rebuild_qtensor

        # torch cannot pickle float8 (only torch.save can): its bytes go.
        qdata = self.qdata.view(torch.uint8) if self.qtype.is_floating_point else self.qdata
        arguments = (
            qdata,
            self._scale,
            self._shift,
            self.qtype.name,
            tuple(self.shape),
            self.dtype,
            self.axis,
            self.group_size,
            self.transposed,
            bool(getattr(self, "_is_param", False)),
            None if self.activation is None else self.activation.name,
            self.up,
            self.down,
        )
        # What came later travels by name, and only where it is: other pickles stay as they were.
        later = {name: getattr(self, name) for name in (*self.tensor_data_names[5:], "scale_bits", "rotation")}
        later = {name: value for name, value in later.items() if value is not None}
        return _rebuild_qtensor, (*arguments, later) if later else arguments

    def __deepcopy__(self, memo: dict) -> QTensor:
        if id(self) not in memo:
            copy = self.clone()  # type: ignore[attr-defined]
            if getattr(self, "_is_param", False):
                copy._is_param = True
            memo[id(self)] = copy
        return memo[id(self)]


@torch.library.custom_op("requanto::stored_codes", mutates_args=())
def _stored_codes(handle: torch.Tensor, name: str, shape: list[int]) -> torch.Tensor:
    """The stored codes behind a packed form's handle."""
    return find(handle, qtypes[name].bits).plain().view(shape)


@_stored_codes.register_fake
def _(handle: torch.Tensor, name: str, shape: list[int]) -> torch.Tensor:
    return handle.new_empty(shape, dtype=qtypes[name].storage_dtype)
