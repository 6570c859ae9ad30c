"""QTensor: a quantized weight that is a tensor.

It sits where the float weight sat, in an unmodified ``nn.Linear``, ``nn.Conv2d``, ``nn.Embedding`` or fused-expert
parameter, and answers to shape, dtype and device as that weight did. Inside are plain tensors:

    qdata  codes, ``[*lead, K]`` (8 bits; conv weights keep their shape) or packed bytes ``[*lead, ceil(K * bits / 8)]``
    scale  ``[*lead, K / group]``
    shift  as scale, or None
    row_scale  ``[*lead, 1]``, only with ``scale_bits``: scale and shift are codes of so many bits then, packed along the
        groups, and the attributes of those names compute the floats (`requanto.scales.compact`)
    codebook  what each code stands for, ``[2^bits]``; only of learned types (``codebook4``), else None
    up, down  ``[*lead, r]`` and ``[*lead[:-1], r, K]``, or both None: a low-rank term beside the codes

``W = dequant(qdata, scale, shift) + up @ down``: an adapter merged into a quantized weight is kept as it is, since
rounding the sum back to few bits would erase most of it (`lowrank`). With ``rotation`` the codes are those of
rotated rows (`requanto.tensor.rotation`), and ``W = rotated(dequant(...)) + up @ down``.

``lead`` is ``shape[: axis + 1]`` (rows; experts x rows for 3D weights with ``axis=1``) and K the product of the rest. A
``transposed`` tensor is seen with its last two axes swapped, the stored form being the same; GPT-2's ``Conv1D``, whose
weight is [in, out], is stored so.

How it is kept, copied and pickled is `requanto.tensor.stored`. What may be done with a QTensor is what `requanto.tensor.ops`
implements; any other aten operator raises and names itself.
"""

from __future__ import annotations

from typing import Any

import torch

from requanto.dtypes.bit_packing import unpack
from requanto.dtypes.qtypes import qtype, qtypes, resolve_qtype
from requanto.scales import default_group_size, fit_group_size, quantize_weight_data
from requanto.scales.codebook import values_of
from requanto.scales.compact import check_scale_bits
from requanto.scales.correction import check_low_rank, corrected
from requanto.scales.search import ScaleSearch
from requanto.tensor import dispatch
from requanto.tensor.layout import find, is_fake, is_handle
from requanto.tensor.rotation import check_rotation, fit_rotation, rotate
from requanto.tensor.stored import Stored


class QTensor(Stored, torch.Tensor):
    """A quantized weight. Make one with :meth:`quantize`, read it with :meth:`dequantize`.

    Attributes:
        qdata, scale, shift, up, down, codebook: the stored tensors (see the module's text).
        qtype: type of the codes.
        axis: last of the leading axes that keep their own scales: 0, or 1 for experts.
        group_size: weights that share a scale; None: one scale a row.
        transposed: the last two axes are seen swapped.
        rotation: block in which rows were rotated before they were rounded, a power of two; None: they were not.
        scale_bits: bits in which scales and shifts are stored; None: they are stored as floats.
        activation: type that inputs are quantized to, per token, on the way into a product; None: they stay float.
    """

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
        shape = torch.Size(shape)
        strides = _strides(shape, transposed)
        self = torch.Tensor._make_wrapper_subclass(
            cls, shape, strides=strides, dtype=dtype, device=qdata.device, requires_grad=False
        )
        if requires_grad:
            raise RuntimeError(NO_GRADIENT)
        if is_handle(qdata):
            self._qdata, self._packed = qdata, None if is_fake(qdata) else find(qdata, qtype.bits)
        else:
            self.qdata = qdata
        if (scale_bits is None) != (row_scale is None):
            raise ValueError(
                f"scales in few bits need scale_bits and row_scale; found scale_bits={scale_bits} and "
                f"{'no' if row_scale is None else 'a'} row_scale"
            )
        self._scale, self._shift, self.row_scale, self.scale_bits = scale, shift, row_scale, scale_bits
        self.qtype, self.axis, self.group_size, self.transposed = qtype, axis, group_size, transposed
        self.activation, self.rotation = activation, rotation
        if (codebook is not None) != qtype.is_learned:
            raise ValueError(
                f"a {qtype.name} weight {'needs its' if qtype.is_learned else 'has no'} codebook of its own; found "
                f"{None if codebook is None else tuple(codebook.shape)}"
            )
        if qtype.is_unsigned or qtype.is_codebook:
            qtype.affine(shift is None)
        self.codebook = codebook
        self.set_lowrank(up, down)
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """All is done in ``__new__``; torch.Tensor's own initializer takes no arguments."""

    # ------------------------------------------------------------------ making and reading

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
            group_size: neighbouring weights of a row that share a scale; None: one scale a row; ``"default"``: 64 for
                4 to 7 bits, 32 below, a row for 8 bits. One that does not divide K follows `scales.groups`.
            symmetric: codes around zero without a shift; None: integers below 8 bits and unsigned ones have a shift,
                int8, float8 and codebooks have none.
            axis: 0 or 1, see the class; None: 1 for 3D weights, else 0.
            transposed: quantize along the last-but-one axis: ``[..., K, N]`` weights.
            search: how scale and shift are chosen: ``"minmax"``, ``"mse"``, ``"weighted"``, ``"aligned"``, ``"hqq"``, or a
                function of one's own (`requanto.scales.search`); None: the type's default.
            scale_bits: 4 to 8: bits in which a group's scale and shift are stored (`scales.compact`); None or 16: as
                floats. Without effect on a weight with one scale a row, which stays float32.
            rotation: True, ``"hadamard"`` or the largest block: codes are those of the rotated rows (`rotation`).
            low_rank: rank of a correction beside the codes, found in turns with them (`scales.correction`).
            name: what to call the weight in messages.

        Raises:
            ValueError: unknown type, no float weight, fewer than two axes, NaN or Inf in the weight, a form (symmetric
                or not) that the type does not have.
        """
        kind = resolve_qtype(kind)
        if isinstance(weight, QTensor):
            raise ValueError(f"{name} is quantized already ({weight.qtype.name}); call .dequantize() on it first")
        if weight.dim() < 2:
            raise ValueError(f"{name}: a weight to quantize has two axes or more, found shape {tuple(weight.shape)}")
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

        def rounded(values: torch.Tensor) -> QTensor:
            data = quantize_weight_data(values, kind, group, affine, search, name, scale_bits, block, weight.dtype)
            return cls(
                data.qdata if kind.is_packed else data.qdata.view(canonical.shape),
                data.scale,
                data.shift,
                qtype=kind,
                shape=weight.shape,
                dtype=weight.dtype,
                axis=axis,
                group_size=group,
                transposed=transposed,
                codebook=data.codebook,
                row_scale=data.row_scale,
                scale_bits=scale_bits,
                rotation=block,
            )

        return rounded(rows) if rank is None or not weight.numel() else corrected(rows, rank, rounded)

    @property
    def canonical_shape(self) -> torch.Size:
        """The shape of the stored form: that of the tensor, last two axes swapped back where ``transposed``."""
        shape = list(self.shape)
        if self.transposed:
            shape[-1], shape[-2] = shape[-2], shape[-1]
        return torch.Size(shape)

    @property
    def lead(self) -> torch.Size:
        """Leading axes with scales of their own."""
        return self.canonical_shape[: self.axis + 1]

    @property
    def row_length(self) -> int:
        """K: weights in a row."""
        return self.canonical_shape[self.axis + 1 :].numel()

    def codes(self) -> torch.Tensor:
        """Unpacked codes ``[*lead, K]``: uint8 (0 .. 2^bits-1) below 8 bits, else uint8, int8 or float8."""
        stored = self.traced_codes()
        if self.qtype.is_packed:
            return unpack(stored, self.qtype.bits, self.row_length)
        return stored.reshape(*self.lead, self.row_length)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The float weight that all stored tensors stand for, in ``dtype`` (default: its own), computed in float32."""
        values = self.own_values()
        if self.up is not None and self.down is not None:
            values = values + self.up.to(torch.float32) @ self.down.to(torch.float32)
        values = values.to(dtype or self.dtype).reshape(self.canonical_shape)
        return values.transpose(-1, -2) if self.transposed else values

    def own_values(self) -> torch.Tensor:
        """float32 ``[*lead, K]``: what the codes stand for in the weight's own basis, the low-rank term left out."""
        values = self.stored_values()
        return values if self.rotation is None else rotate(values, self.rotation)

    def stored_values(self) -> torch.Tensor:
        """float32 ``[*lead, K]``: what the codes stand for as they are stored, rotated where the weight is."""
        return scaled_values(self._code_values(), self.qtype, self.scale, self.shift, self.row_length)

    def _code_values(self) -> torch.Tensor:
        """float32 ``[*lead, K]``: codes as numbers, or what they stand for in a codebook."""
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
        return (
            f"QTensor({self.qtype.name}, shape={tuple(self.shape)}, dtype={self.dtype}, {groups}, {kind}, "
            f"{f'rank {self.rank} beside, ' if self.rank else ''}device={self.device}, "
            f"{self.bits_per_weight:.2f} bits a weight)"
        )

    # ------------------------------------------------------------------ dispatch

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return dispatch.torch_function(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return dispatch.torch_dispatch(func, types, args, kwargs or {})


def scaled_values(
    values: torch.Tensor, kind: qtype, scale: torch.Tensor, shift: torch.Tensor | None, length: int
) -> torch.Tensor:
    """What codes stand for: float32 ``[..., K]``.

    Args:
        values: the codes as numbers, float32 ``[..., K]``.
        scale, shift: ``[..., G]``.
        length: K, which a tracer would not take for a number from the shape.
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


def _strides(shape: torch.Size, transposed: bool) -> tuple[int, ...]:
    """Strides that a float tensor of this shape and orientation would have."""
    sizes = list(shape)
    if transposed:
        sizes[-1], sizes[-2] = sizes[-2], sizes[-1]
    strides, step = [], 1
    for size in reversed(sizes):
        strides.insert(0, step)
        step *= max(size, 1)
    if transposed:
        strides[-1], strides[-2] = strides[-2], strides[-1]
    return tuple(strides)


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
    """Unpickles a QTensor; its device is that of the codes, so ``map_location`` is followed."""
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


# torch.load(weights_only=True) runs only what is listed; these two build tensors and nothing else.
torch.serialization.add_safe_globals([_rebuild_qtensor, QTensor])
