"""QTensor: a quantized weight as a tensor subclass.

It replaces the float weight of an unmodified ``nn.Linear``, ``nn.Conv2d``, ``nn.Embedding`` or fused-expert parameter, and
shows the shape, dtype and device of that weight. A `WeightSpec` describes it (`requanto.tensor.spec`), and a
`WeightStorage` holds its parts, which are ordinary tensors (`requanto.tensor.storage`):

    qdata  codes, ``[*lead, K]`` (8 bits; conv weights keep their shape) or packed bytes ``[*lead, ceil(K * bits / 8)]``
    scale  ``[*lead, K / group]``
    shift  like scale, only for affine weights
    row_scale  ``[*lead, 1]``, only with ``scale_bits`` and of NVFP4. The parts scale and shift then hold codes, packed along
        the groups, and the attributes of those names compute the floats (`requanto.scales.compact`). NVFP4 and MX types
        have scales of 8 bits (`requanto.scales.blocks`)
    codebook  value of each code, ``[2^bits]``, only for learned types (``codebook4``)
    up, down  ``[*lead, r]`` and ``[*lead[:-1], r, K]``: factors of the low-rank term
    column  ``[*lead[:-1], K]``: the column scale (`requanto.scales.columns`)
    row_shift  ``[*lead, K / scale_block]``, what the codes of shifts are multiplied by; of affine weights with
        ``scale_block`` only. Their row_scale has this shape too: one number for each block (`requanto.scales.compact`)
    order  int32 ``[*lead[:-1], K]``: stored column j is column ``order[j]`` of the weight

``W = dequant(qdata, scale, shift) + up @ down``. An adapter that is merged into a quantized weight becomes its low-rank
term, since rounding the sum to few bits would lose most of the adapter (`requanto.tensor.lowrank`). With ``rotation`` the
codes are those of rotated rows (`requanto.scales.rotation`), and ``W = rotated(dequant(...)) + up @ down``. With a column
scale ``W = rotated(dequant(...)) * column + up @ down``. With an ``order`` the columns of all but ``up @ down`` are moved to
their places last: ``W[:, order] = rotated(dequant(...)) * column``, which GPTQ's ``desc_act`` needs.

``lead`` is ``shape[: axis + 1]`` (rows; experts x rows for 3D weights with ``axis=1``) and K the product of the other sizes.
A ``transposed`` tensor shows its last two axes swapped; its stored tensors are the same. GPT-2's ``Conv1D``, with a weight
[in, out], is stored so.

`requanto.tensor.ops` lists the operators that work on the codes. Any other aten operator reads the dequantized values, with
a log line (`requanto.tensor.values`), or raises if it writes. Reading changes nothing. A change through one alias
(``.data``, ``.detach()``, ``.t()``, an entry of a state dict) changes all aliases.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from requanto.dtypes.float8 import from_float8
from requanto.dtypes.qtypes import qtype, resolve_qtype
from requanto.runtime import onnx_nodes
from requanto.runtime.tracing import in_jit_trace, is_tracing, jit_trace_paused, without_autocast
from requanto.scales import default_group_size, fit_group_size, quantize_weight_data
from requanto.scales.codebook import values_of
from requanto.scales.columns import LEAST_ROWS, default_of_weight, fit_column
from requanto.scales.compact import check_scale_bits, check_zero_point
from requanto.scales.correction import check_low_rank, corrected
from requanto.scales.order import in_order, inverse
from requanto.scales.rotation import check_rotation, fit_rotation, rotate
from requanto.scales.search import ScaleSearch
from requanto.tensor import dispatch
from requanto.tensor.layout import PLAIN, Layout, layout_named
from requanto.tensor.parts import WeightParts
from requanto.tensor.spec import PART_NAMES, WeightSpec, swapped
from requanto.tensor.storage import WeightStorage

#: ``kernel(weight, dtype, as_stored=, low_rank=)`` by type of device: dequantizes a weight there, ``[*lead, K]``, or returns
#: None where it cannot. `requanto.linear.gpu.dequantize` and `requanto.linear.cpu.rows` add theirs.
value_kernels: dict[str, Callable[..., torch.Tensor | None]] = {}


def _by_kernel(weight: QTensor, dtype: torch.dtype, **how: bool) -> torch.Tensor | None:
    kernel = value_kernels.get(weight._storage.parts["qdata"].device.type)
    return None if kernel is None else kernel(weight, dtype, **how)


class QTensor(WeightParts, torch.Tensor):
    """A quantized weight. Make one with :meth:`quantize`, read it with :meth:`dequantize`.

    Args:
        qdata, scale, shift, up, down, codebook, row_scale, column, row_shift, order: the parts (see the module's docstring).
        qtype, shape, dtype, axis, group_size, transposed, activation, scale_bits, rotation, zeros, signed, scale_block: see
            `WeightSpec`; ``shape`` is the one that the tensor shows.

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
        column: torch.Tensor | None = None,
        zeros: bool = False,
        signed: bool = False,
        scale_block: int | None = None,
        row_shift: torch.Tensor | None = None,
        order: torch.Tensor | None = None,
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
            column=column is not None,
            zeros=zeros,
            signed=signed,
            scale_block=scale_block,
            order=order is not None,
        )
        given = zip(PART_NAMES, (qdata, scale, shift, up, down, codebook, row_scale, column, row_shift, order))
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
        codebook: torch.Tensor | None = None,
        column_scale: bool | str | torch.Tensor | None = None,
        zero_point: str | None = None,
        name: str = "weight",
    ) -> QTensor:
        """Quantizes a float weight.

        Args:
            weight: float tensor of 2 axes (Linear, Embedding), 3 (experts ``[E, N, K]``) or more (convolutions).
            kind: ``"int8"``, ``"int4"``, ``"nf4"``, ``"float8"`` ... or a qtype (docs/types.md).
            group_size: number of adjacent weights of a row that share a scale; None: one scale per row; ``"default"``: 64
                for 4 to 7 bits, 32 below, one scale per row for 8 bits, 16 for NVFP4, 32 for MX types. A size that does not
                divide K: see `scales.groups`.
            symmetric: codes around zero without a shift; None: integers below 8 bits and unsigned ones have a shift,
                int8, float8 and codebooks have none.
            axis: 0 or 1, see `WeightSpec`; None: 1 for 3D weights, else 0.
            transposed: the weight is ``[..., K, N]``: quantize along the second-to-last axis.
            search: how scale and shift are chosen: ``"minmax"``, ``"mse"``, ``"weighted"``, ``"aligned"``, ``"hqq"``, or a
                function (`requanto.scales.search`); None: the type's default.
            scale_bits: 4 to 8: bits in which a group's scale and shift are stored (`scales.compact`); None or 16: as
                floats. No effect on a weight with one scale per row, which stays float32.
            rotation: True, ``"hadamard"`` or the largest block: quantize the rotated rows (`scales.rotation`).
            low_rank: rank of a low-rank term that corrects rounding errors (`scales.correction`).
            codebook: values ``[2^bits]`` for a learned type (``"codebook4"``); None: they are fitted to the weight.
            column_scale: divide each column by a scale before rounding (`scales.columns`): ``"mean"``, ``"std"`` or
                ``"root"``, computed from the weight; True: the type's best one; ``"default"``: as in models, where a type
                may have none, and weights that are on the type's grid already have none; or float ``[K]``, ``[E, K]`` for
                experts, positive. None or False: none. With ``rotation`` the divided rows are rotated.
            zero_point: ``"integer"``: the shift of a group is stored as the code that stands for 0 (`scales.compact`), in as
                many bits as the weight's codes have; None or ``"float"``: as a float, or in ``scale_bits``.
            name: name of the weight in messages.

        Raises:
            ValueError: the type is unknown or does not support ``symmetric``; or the weight is not float, has fewer than
                two axes, or contains NaN or Inf; or a column scale does not fit (`scales.columns.fit_column`).
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
        scale_bits = check_scale_bits(scale_bits, f"{name}: scale_bits", kind)
        if group is None:
            scale_bits = None
        zeros = check_zero_point(zero_point, f"{name}: zero_point") is not None
        if zeros and not (affine and kind.bits > 1):
            raise ValueError(
                f"{name}: zero_point='integer' needs a type with a shift, such as 'int4' with symmetric=None, 'int3' or "
                f"'uint8'; found {kind.name}{'' if affine else ', symmetric'}"
            )
        block = fit_rotation(check_rotation(rotation, f"{name}: rotation"), length, name)
        rank = check_low_rank(low_rank, f"{name}: low_rank")
        rows = canonical.reshape(*canonical.shape[: axis + 1], length)
        if isinstance(column_scale, str) and column_scale == "default":
            plain = functools.partial(QTensor.quantize, kind=kind, group_size=group, symmetric=not affine)
            column_scale = default_of_weight(rows, plain, name, kind, group, scale_bits)
        column = fit_column(column_scale, rows, kind, weight.dtype, name, scale_bits)
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
            column=column is not None,
            zeros=zeros,
        )

        valued = kind
        if codebook is not None:
            if not kind.is_learned or codebook.shape != (2**kind.bits,):
                raise ValueError(
                    f"{name}: a codebook of shape {tuple(codebook.shape)} was given for {kind.name}; expected shape "
                    f"({2**kind.bits},) and a learned type such as codebook4"
                )
            valued = kind.with_values(tuple(codebook.float().tolist()))

        def rounded(values: torch.Tensor) -> QTensor:
            data = quantize_weight_data(
                values, valued, group, affine, search, name, scale_bits, block, weight.dtype, column, zeros
            )
            if column is not None:
                _require_finite_scales(data.scale, data.shift, name)
            parts = {
                "qdata": data.qdata.view(spec.codes_shape),
                "scale": data.scale,
                "shift": data.shift,
                "codebook": data.codebook,
                "row_scale": data.row_scale,
                "column": column,
            }
            return cls._of(spec, {part: tensor for part, tensor in parts.items() if tensor is not None})

        return rounded(rows) if rank is None or not weight.numel() else corrected(rows, rank, rounded)

    def _quantize_like(
        self,
        values: torch.Tensor,
        *,
        low_rank: int | None = None,
        same_codebook: bool = False,
        same_column: bool = True,
    ) -> QTensor:
        """Values with rows of this weight's length, quantized like it: type, groups, scales, rotation, order, orientation.

        Args:
            same_codebook: of a learned type, with this weight's codebook instead of one of their own.
            same_column: with this weight's column scale; False: with one of their own, if this weight has one (but with
                this weight's if it has too few rows for a computed one).

        Raises:
            NotImplementedError: this weight has scales in blocks, which are read from files but not computed.
        """
        if self.scale_block is not None:
            raise NotImplementedError(
                f"float values cannot be rounded to {self._spec.words!r}: scales in blocks of {self.scale_block} are read "
                f"from files of other programs, and not computed here. Call .dequantize() on the weight, or quantize it "
                f"anew: QTensor.quantize(values, {self.qtype.name.removeprefix('q')!r})"
            )
        if self.order is not None:
            return self._quantized_in_order(values, low_rank, same_codebook, same_column)
        own = not same_column and self._spec.lead[-1] >= LEAST_ROWS
        return QTensor.quantize(
            values,
            self.qtype,
            group_size=self.group_size,
            symmetric=not self.affine,
            scale_bits=self.scale_bits,
            zero_point="integer" if self.zeros else None,
            rotation=self.rotation,
            low_rank=low_rank,
            codebook=self.codebook if same_codebook else None,
            column_scale=self.column is not None if own else self.column,
            axis=self.axis,
            transposed=self.transposed,
        )._with_signs(self.signed)

    def _with_signs(self, signed: bool) -> QTensor:
        """This weight as one whose scales may be negative, or may not: the same parts."""
        return self if self.signed is signed else self.view_of_storage(signed=signed)

    def _quantized_in_order(
        self, values: torch.Tensor, low_rank: int | None, same_codebook: bool, same_column: bool
    ) -> QTensor:
        """`_quantize_like` of a weight with an order: the stored columns are quantized, and the low-rank term moved back."""
        order = self.order
        assert order is not None
        rows = values.mT if self.transposed else values
        stored = in_order(rows.reshape(*rows.shape[: self.axis + 1], -1), order).reshape(rows.shape)
        parts = self._storage.stored(self._spec)
        plain = self.with_inner({name: part for name, part in parts.items() if name != "order"})
        found = plain._quantize_like(
            stored.mT if self.transposed else stored,
            low_rank=low_rank,
            same_codebook=same_codebook,
            same_column=same_column,
        )
        inner = {**found.inner_tensors(), "order": order.clone()}
        if found.down is not None:
            inner["down"] = in_order(found.down, inverse(order))
        return found.with_inner(inner)

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
        dtype = dtype or self.dtype
        with without_autocast(self.device):  # autocast would round the factors of the low-rank term
            values = _by_kernel(self, dtype)
            if values is None:
                values = self.values_without_lowrank()
                if self.up is not None and self.down is not None:
                    values = values + self.up.to(torch.float32) @ self.down.to(torch.float32)
        values = values.to(dtype).reshape(self.canonical_shape)
        return values.transpose(-1, -2) if self.transposed else values

    def values_without_lowrank(self) -> torch.Tensor:
        """float32 ``[*lead, K]``: the dequantized codes, rotated back, times the column scale and in the weight's order of
        columns, without low-rank term."""
        found = _by_kernel(self, torch.float32, low_rank=False)
        if found is not None:
            return found
        values, column, order = self.stored_values(), self.column, self.order
        values = values if self.rotation is None else rotate(values, self.rotation)
        values = values if column is None else values * column.to(torch.float32).unsqueeze(-2)
        return values if order is None else in_order(values, inverse(order))

    def stored_values(self) -> torch.Tensor:
        """float32 ``[*lead, K]``: the dequantized codes, in the rotated basis, without the column scale and as stored."""
        if in_jit_trace():
            with jit_trace_paused():
                return self.stored_values()
        if is_tracing() and onnx_nodes.exporting():
            parts, attributes = self.onnx_inputs()
            shape = (*self.lead, self.row_length)
            return onnx_nodes.node("Values", parts, attributes, parts[0], shape, torch.float32)
        found = _by_kernel(self, torch.float32, as_stored=True)
        if found is not None:
            return found
        return scaled_values(self._code_values(), self.qtype, self.scale, self.shift, self.row_length)

    def _code_values(self) -> torch.Tensor:
        """float32 ``[*lead, K]``: the codes as numbers, or their values in the codebook."""
        codes = self.codes()
        if not self.qtype.is_codebook:
            return from_float8(codes, torch.float32)
        table = self.codebook.float() if self.codebook is not None else values_of(self.qtype, codes)
        return torch.index_select(table, 0, codes.flatten().to(torch.int32)).view(codes.shape)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        groups = "row" if self.group_size is None else f"group {self.group_size}"
        kind = ", ".join(["affine" if self.affine else "symmetric", *self._spec.features()])
        packed = f", packed for {self.layout_name}" if self.is_packed else ""
        return (
            f"QTensor({self.qtype.name}, shape={tuple(self.shape)}, dtype={self.dtype}, {groups}, {kind}{packed}, "
            f"{f'low-rank term of rank {self.rank}, ' if self.rank else ''}device={self.device}, "
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
        from requanto.tensor.rebuild import _rebuild

        return _rebuild, (self._spec.words, tuple(self._spec.shape), self.dtype, parts, is_parameter)

    def __copy__(self) -> QTensor:
        """Another view of the same storage, as ``copy.copy`` of a float tensor shares its memory."""
        copy = self.view_of_storage()
        if getattr(self, "_is_param", False):
            copy._is_param = True
        return copy

    def __deepcopy__(self, memo: dict) -> QTensor:
        if id(self) not in memo:
            if dispatch.reader is not None and not memo:  # a copy of this tensor alone, to compute with
                values = self.clone()
                if not isinstance(values, QTensor):
                    return values
            with torch._C.DisableTorchFunctionSubclass():  # quantized also where clones are floats (tensor.reading)
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


def _require_finite_scales(scale: torch.Tensor, shift: torch.Tensor | None, name: str) -> None:
    for part in (scale, shift):
        if part is None or not part.is_floating_point() or part.is_meta or isinstance(part, FakeTensor):
            continue
        if not bool(torch.isfinite(part).all()):
            raise ValueError(
                f"{name}: divided by the column scale the weight has groups that do not fit into {part.dtype}. Use a column "
                f"scale of a smaller range, column_scale=False, or a weight in float32 or bfloat16."
            )


NO_GRADIENT = (
    "a quantized weight cannot require a gradient: its codes are integers. Train an adapter on top of it (LoRA), or "
    "train before freezing with requanto.quantize(model, ...) and requanto.freeze(model). To train the float parameters of "
    "a quantized model, turn on those: for p in model.parameters(): p.requires_grad_(not isinstance(p, requanto.QTensor))."
)
