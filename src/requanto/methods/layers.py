"""The weights that the engine quantizes: the modules that hold them, and their conversion to QTensors."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from requanto.config.plan import PlannedWeight
from requanto.dtypes.bit_packing import pack
from requanto.methods.basis import Basis, with_low_rank
from requanto.methods.gptq import Rounded
from requanto.methods.grid import Grid
from requanto.methods.inputs import CONVOLUTIONS
from requanto.methods.moments import Moments
from requanto.runtime.tracing import without_autocast
from requanto.scales import default_group_size, fit_group_size
from requanto.scales.blocks import nearest_scale, tensor_scale
from requanto.scales.codebook import fit_codebook
from requanto.scales.columns import SMALLEST, default_of_weight, fit_column
from requanto.scales.compact import pack_codes, whole_zeros, zero_step
from requanto.scales.rotation import fit_rotation
from requanto.scales.weights import encode, scale_dtype
from requanto.tensor.qtensor import QTensor

if TYPE_CHECKING:
    from requanto.methods.method import Method

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Layer:
    """One weight, with all modules that share it.

    Attributes:
        name: full dotted name of the parameter.
        planned: how it is to be quantized.
        places: (module, leaf name of the parameter) of all modules that hold it; the first belongs to ``name``.
        quantized: the quantized weight, while the model still holds its dequantized values.
        columns_scale, rows_scale: factors of the weight's columns and rows (`requanto.methods.fold`).
        input_scale: ``[K]``, by which inputs should be divided and columns multiplied, where that cannot be folded into an
            earlier module: it becomes part of the column scale.
        basis: what is undone after the codes are dequantized; set by :meth:`round`.
        codebook: values ``[2^bits]`` of a learned type; None: they are fitted to the weight.
    """

    name: str
    planned: PlannedWeight
    places: list[tuple[nn.Module, str]] = field(default_factory=list)
    quantized: QTensor | None = None
    columns_scale: torch.Tensor | None = None
    rows_scale: torch.Tensor | None = None
    input_scale: torch.Tensor | None = None
    basis: Basis = field(default_factory=Basis)
    codebook: tuple[float, ...] | None = None

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that the model holds now."""
        module, leaf = self.places[0]
        return module._parameters[leaf]  # type: ignore[return-value]

    @property
    def modules(self) -> list[nn.Module]:
        """The Linear layers, Conv1D or convolutions with this weight, without an embedding that it is tied to."""
        return [m for m, leaf in self.places if leaf == "weight" and not isinstance(m, nn.Embedding)]

    @property
    def owners(self) -> list[nn.Module]:
        """The modules that hold this weight."""
        return [module for module, _ in self.places]

    def set_parameter(self, tensor: torch.Tensor) -> None:
        """Sets the weight of all modules that share it."""
        parameter = nn.Parameter(tensor.detach(), requires_grad=False)
        for module, leaf in self.places:
            module._parameters[leaf] = parameter

    def weight(self) -> torch.Tensor:
        """Returns the float weight as float32 ``[N, K]``, with ``columns_scale`` and ``rows_scale`` applied."""
        weight = self.parameter.detach().float()
        weight = weight.t().contiguous() if self.planned.transposed else weight.flatten(1)
        if self.columns_scale is not None:
            weight = weight * self.columns_scale
        return weight if self.rows_scale is None else weight * self.rows_scale[:, None]

    def scale_columns(self, factors: torch.Tensor) -> None:
        """Multiplies the columns of :meth:`weight` by ``[K]``; the parameter is unchanged."""
        self.columns_scale = factors if self.columns_scale is None else self.columns_scale * factors

    def scale_rows(self, factors: torch.Tensor) -> None:
        """Multiplies the rows of :meth:`weight` by ``[N]``, and the module's bias in place."""
        self.rows_scale = factors if self.rows_scale is None else self.rows_scale * factors
        bias = self.places[0][0]._parameters.get("bias")
        if bias is not None:
            bias.data.copy_(bias.detach().float() * factors)

    def restore(self, parameter: nn.Parameter) -> None:
        """Sets a float parameter and resets ``columns_scale`` and ``rows_scale``."""
        self.columns_scale = self.rows_scale = None
        for module, leaf in self.places:
            module._parameters[leaf] = parameter

    def round(self, moments: Moments, method: Method) -> tuple[Grid, Rounded, torch.Tensor] | None:
        """Rounds the weight; returns (grid, result, rounded rows), or None if no input was seen."""
        if not moments.rows:
            logger.warning("%s never saw an input: quantized without samples", self.name)
            self.quantized = self.planned.quantize(self.parameter, self.name)
            return None
        weight, rank = self.weight(), self.planned.options.low_rank
        with without_autocast(weight.device):
            self.basis = self.find_basis(weight)
            weight, moments = method.target(weight, moments, self.name), moments.without_cross()
            inner = self.basis.moments(moments)
            grid = self.grid(self.basis.rows(weight))

            def rounded(left: torch.Tensor) -> tuple[Rounded, torch.Tensor]:
                found = method.round(self.basis.rows(left), inner, grid, self.group_size, self.name)
                return found, self.basis.values(found.values)

            if rank is None:
                found, left = rounded(weight)[0], weight
            else:
                assert moments.hessian is not None  # `needs_full`
                hessian = moments.hessian / moments.rows
                found, up, down = with_low_rank(weight, hessian, rank, self.parameter.dtype, rounded, self.name)
                left = weight - up.float() @ down.float()
            rows = self.basis.rows(left)
            if rank is not None:
                self.basis = replace(self.basis, up=up, down=down)
        self.set_rounded(found, grid)
        return grid, found, rows

    def find_basis(self, weight: torch.Tensor) -> Basis:
        """Returns the basis without low-rank term: the column scale, of the weight and ``input_scale``, and the rotation."""
        options, dtype = self.planned.options, self.parameter.dtype
        block = fit_rotation(options.rotation, self.columns, self.name)
        kind = self.default_column(weight) if options.column_scale is None else options.column_scale
        if self.input_scale is None:
            return Basis(fit_column(kind, weight, options.qtype, dtype, self.name, self.scale_bits), block)
        scaled, column = weight * self.input_scale, 1 / self.input_scale
        own = fit_column(kind, scaled, options.qtype, torch.float32, self.name, self.scale_bits)
        if own is not None:
            column = column * own
        least = column.max() * 1.01 * SMALLEST
        if bool((column < least).any()):
            count = int((column < least).sum())
            logger.info("%s: %d column scales are limited to %.2g of the largest", self.name, count, SMALLEST)
        return Basis(fit_column(column.clamp(min=least), weight, options.qtype, dtype, self.name), block)

    def default_column(self, weight: torch.Tensor) -> str | None:
        """Returns the kind of column scale that the weight gets if none is asked for, as without samples."""
        kind, group = self.planned.options.qtype, self.group_size
        plain = functools.partial(
            QTensor.quantize, kind=kind, group_size=group, symmetric=self.planned.options.symmetric
        )
        return default_of_weight(weight, plain, self.name, kind, group, self.scale_bits)

    @property
    def scale_bits(self) -> int | None:
        """Bits of the scales of groups; None: they are floats, or there is one a row."""
        return self.planned.options.scale_bits if self.group_size is not None else None

    def set_rounded(self, rounded: Rounded, grid: Grid) -> None:
        """Sets a result; until :meth:`finish` the model holds its dequantized values."""
        self.quantized = self.tensor(rounded, grid)
        self.set_values(self.basis.values(rounded.values))

    def finish(self) -> None:
        """Sets the quantized weight on its modules."""
        if self.quantized is not None:
            self.set_parameter(self.quantized)
        self.quantized = None

    def set_values(self, values: torch.Tensor) -> None:
        """Sets float values ``[N, K]`` that already include the scales, and resets the scales."""
        old = self.parameter
        self.columns_scale = self.rows_scale = self.input_scale = None
        values = values.t() if self.planned.transposed else values.reshape(old.shape)
        self.set_parameter(values.to(old.dtype).contiguous())

    @property
    def columns(self) -> int:
        """K: input channels; of a convolution, weights of an output channel."""
        return self.parameter.shape[0] if self.planned.transposed else self.parameter.shape[1:].numel()

    @property
    def rows(self) -> int:
        """N: output channels."""
        return self.parameter.shape[1 if self.planned.transposed else 0]

    @property
    def stored_shape(self) -> torch.Size:
        """The shape that the codes are stored in: that of the parameter, of a Conv1D the other way round."""
        shape = self.parameter.shape
        return torch.Size(reversed(shape)) if self.planned.transposed else shape

    @property
    def geometry(self) -> tuple[Any, ...] | None:
        """Which patches of its input a convolution sees; None for other layers. Equal ones have equal moments."""
        module = self.modules[0]
        if not isinstance(module, CONVOLUTIONS):
            return None
        padding = tuple(module._reversed_padding_repeated_twice), module.padding_mode
        return module.kernel_size, module.stride, module.dilation, module.groups, padding

    @cached_property
    def group_size(self) -> int | None:
        """Number of weights that share a scale; None: one scale per row."""
        options = self.planned.options
        wanted = default_group_size(options.qtype) if options.group_size == "default" else options.group_size
        return fit_group_size(wanted, self.columns, self.name)

    def grid(self, rows: torch.Tensor | None = None) -> Grid:
        """Returns the grid to round rows ``[N, K]`` to; None: the weight."""
        options, group = self.planned.options, self.group_size
        kind, affine = options.qtype, options.qtype.affine(options.symmetric, self.name)
        if kind.is_learned and self.codebook is not None:
            kind = kind.with_values(self.codebook)
        elif kind.is_learned:
            kind = kind.with_values(fit_codebook(self.weight() if rows is None else rows, kind, group or self.columns))
        grouped = group is not None and group < self.columns
        bits = self.scale_bits
        unit = None
        if kind.blocks is not None and kind.blocks.scale == "e4m3":
            unit = tensor_scale((self.weight() if rows is None else rows).abs().max().view(1, 1), kind, searched=True)
        zeros = options.zero_point is not None
        return Grid(kind, affine, scale_dtype(self.parameter.dtype, grouped), bits, unit, zeros)

    def tensor(self, rounded: Rounded, grid: Grid) -> QTensor:
        """Returns the QTensor whose dequantized codes are ``rounded.values``, with the basis."""
        kind = grid.kind
        groups = rounded.values.view(len(rounded.values), rounded.scale.shape[1], -1)
        codes = encode(groups, rounded.scale, rounded.shift, kind).contiguous()  # the values may be column by column
        scale, shift = self._stored_scales(rounded, grid)
        tensor = QTensor(
            pack(codes, kind.bits) if kind.is_packed else codes.view(self.stored_shape),
            scale,
            shift,
            qtype=self.planned.options.qtype,
            shape=self.parameter.shape,
            dtype=self.parameter.dtype,
            axis=self.planned.axis,
            group_size=self.group_size,
            transposed=self.planned.transposed,
            codebook=torch.tensor(kind.values, dtype=torch.float32, device=codes.device) if kind.is_learned else None,
            row_scale=rounded.row_scale if grid.unit is None else grid.unit.repeat(len(scale), 1),
            scale_bits=grid.scale_bits,
            zeros=grid.zeros,
            rotation=self.basis.rotation,
            column=self.basis.column,
            up=self.basis.up,
            down=self.basis.down,
        )
        tensor.activation = self.planned.options.activations
        return tensor

    def _stored_scales(self, rounded: Rounded, grid: Grid) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns scale and shift as they are stored: floats, or codes relative to the row's scale."""
        scale, shift, row, bits = rounded.scale, rounded.shift, rounded.row_scale, grid.scale_bits
        if grid.kind.blocks is not None:
            return nearest_scale(scale.float(), grid.unit, grid.kind.blocks.scale), None
        if grid.zeros and shift is not None:
            found = whole_zeros(scale.masked_fill(scale == 0, 1.0), shift, grid.kind)
            shift = pack_codes(found, grid.kind.bits)
        if bits is None or row is None:
            return scale.to(grid.stored), shift if shift is None or grid.zeros else shift.to(grid.stored)
        codes = (scale / row.float()).round().to(torch.uint8)
        if shift is None:
            return pack_codes(codes, bits), None
        if grid.zeros:
            return pack_codes(codes, bits), shift
        zeros = (shift / (scale * zero_step(grid.kind, bits))).round().to(torch.uint8)
        return pack_codes(codes, bits), pack_codes(zeros, bits)


def needs_full(layer: Layer) -> bool:
    """Whether a layer's options need the second moments of all pairs of its input channels, whatever the method needs."""
    return layer.planned.options.rotation is not None or layer.planned.options.low_rank is not None


def scale_inputs(layers: list[Layer], moments: Moments, method: Method) -> None:
    """Chooses the input scales of layers that share an input, for their column scales; they apply when a layer is rounded.

    Layers with ``column_scale=False`` are left unscaled, which is logged.
    """
    refused = [layer.name for layer in layers if layer.planned.options.column_scale is False]
    if refused:
        logger.info("%s: rounded without input scales, as column_scale=False asks", ", ".join(refused))
    layers = [layer for layer in layers if layer.planned.options.column_scale is not False]
    scales = method.scales(layers, moments) if layers else None
    for layer in layers:
        layer.input_scale = scales
