"""What a QTensor keeps: its stored tensors, plain or packed, and how it is taken apart and put together again.

The half of `requanto.qtensor.QTensor` that knows no arithmetic: every copy, file, process and compiled graph goes through
the few methods here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from requanto.layout import LOCK, Packed
from requanto.qtypes import qtype, qtypes

if TYPE_CHECKING:
    from requanto.qtensor import QTensor


class Stored:
    """Base of QTensor, which makes it a tensor and describes the attributes."""

    #: Inner tensors, in the order of the constructor; a part that a tensor does not have is None.
    tensor_data_names = ("qdata", "scale", "shift", "up", "down", "codebook")

    _qdata: torch.Tensor
    _packed: Packed | None
    scale: torch.Tensor
    shift: torch.Tensor | None
    up: torch.Tensor | None
    down: torch.Tensor | None
    codebook: torch.Tensor | None
    qtype: qtype
    axis: int
    group_size: int | None
    transposed: bool
    activation: qtype | None
    shape: torch.Size
    dtype: torch.dtype

    # ------------------------------------------------------------------ plain and packed form (requanto.layout)

    @property
    def qdata(self) -> torch.Tensor:
        """The stored codes. Reading them makes a packed tensor plain again."""
        if self._packed is not None:
            with LOCK:
                if self._packed is not None:
                    if self._packed.pinned:
                        return self._packed.plain()
                    self.qdata = self._packed.plain()
        return self._qdata

    @qdata.setter
    def qdata(self, value: torch.Tensor) -> None:
        self._qdata, self._packed = value, None

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
        others = (getattr(self, name) for name in self.tensor_data_names[1:])
        return codes.nbytes + sum(t.nbytes for t in others if t is not None)

    @property
    def bits_per_weight(self) -> float:
        """Bits a weight costs, scales and shifts counted."""
        return self.nbytes * 8 / max(1, self.shape.numel())

    # ------------------------------------------------------------------ inner tensors

    def inner_tensors(self) -> dict[str, torch.Tensor]:
        """The stored tensors by name; no shift where there is none."""
        found = {name: getattr(self, name) for name in self.tensor_data_names}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

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
        )

    def replace(
        self,
        qdata: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor | None,
        *,
        shape: torch.Size | tuple[int, ...] | list[int] | None = None,
        dtype: torch.dtype | None = None,
        axis: int | None = None,
        group_size: int | str | None = "same",
        transposed: bool | None = None,
        **others: torch.Tensor | None,
    ) -> QTensor:
        """The same kind of tensor around other inner tensors; the ``others`` (up, down, codebook) stay unless given."""
        kept = {name: getattr(self, name) for name in self.tensor_data_names[3:]}
        inner = {"qdata": qdata, "scale": scale, "shift": shift, **kept, **others}
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
        return self.replace(self.operand, self.scale, self.shift, up=None, down=None) if self.rank else self

    # ------------------------------------------------------------------ taking apart

    def spec(self) -> dict[str, Any]:
        """Everything but the tensors that rebuilding needs, as JSON holds it (`requanto.checkpoint.format`)."""
        return {
            "qtype": self.qtype.name,
            "shape": list(self.shape),
            "axis": self.axis,
            "group_size": self.group_size,
            "affine": self.shift is not None,
            "transposed": self.transposed,
            "activation": None if self.activation is None else self.activation.name,
            "rank": 0 if self.up is None else self.up.shape[-1],
        }

    def __tensor_flatten__(self) -> tuple[list[str], tuple]:
        activation = None if self.activation is None else self.activation.name
        context = (self.qtype.name, self.axis, self.group_size, self.transposed, self.dtype, activation)
        # The raw codes: torch.compile takes packed forms by their handles.
        held = [name for name in self.tensor_data_names[1:] if getattr(self, name) is not None]
        return ["_qdata", *held], context

    @classmethod
    def __tensor_unflatten__(
        cls, inner: dict[str, torch.Tensor], context: tuple, outer_size: Any, _stride: Any
    ) -> QTensor:
        name, axis, group_size, transposed, dtype, activation = context
        return cls(  # type: ignore[call-arg, return-value]
            inner["_qdata"],
            **{part: tensor for part, tensor in inner.items() if part != "_qdata"},
            qtype=qtypes[name],
            shape=outer_size,
            dtype=dtype,
            axis=axis,
            group_size=group_size,
            transposed=transposed,
            activation=None if activation is None else qtypes[activation],
        )

    def _stable_hash_for_caching(self) -> str:
        """What a compiled graph depends on: torch keeps graphs on disk under it. Weights are inputs of the graph."""
        inner = [(n, tuple(t.shape), t.stride(), t.dtype, t.device) for n, t in self.inner_tensors().items()]
        return repr((self.__tensor_flatten__()[1], tuple(self.shape), inner, self.requires_grad))  # type: ignore[attr-defined]

    def __reduce_ex__(self, protocol: Any) -> tuple:
        from requanto.qtensor import _rebuild_qtensor

        # torch cannot pickle float8 (only torch.save can): its bytes go.
        qdata = self.qdata.view(torch.uint8) if self.qtype.is_floating_point else self.qdata
        arguments = (
            qdata,
            self.scale,
            self.shift,
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
        # Parts that came later travel by name, and only where they are: other pickles stay as they were.
        later = {name: getattr(self, name) for name in self.tensor_data_names[5:]}
        later = {name: tensor for name, tensor in later.items() if tensor is not None}
        return _rebuild_qtensor, (*arguments, later) if later else arguments

    def __deepcopy__(self, memo: dict) -> QTensor:
        if id(self) not in memo:
            copy = self.clone()  # type: ignore[attr-defined]
            if getattr(self, "_is_param", False):
                copy._is_param = True
            memo[id(self)] = copy
        return memo[id(self)]
