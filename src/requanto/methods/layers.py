"""The weights that the engine quantizes: the modules that hold them, and their conversion to QTensors."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import nn

from requanto.config.plan import PlannedWeight, parameter_holders
from requanto.dtypes.bit_packing import pack
from requanto.methods.gptq import Rounded
from requanto.methods.grid import Grid
from requanto.methods.moments import Moments
from requanto.runtime.tracing import without_autocast
from requanto.scales import default_group_size, fit_group_size
from requanto.scales.blocks import nearest_scale, tensor_scale
from requanto.scales.codebook import fit_codebook
from requanto.scales.compact import pack_codes, zero_step
from requanto.scales.weights import encode, scale_dtype
from requanto.tensor.qtensor import QTensor

if TYPE_CHECKING:
    from requanto.methods.method import Method

logger = logging.getLogger(__name__)

#: kinds of `PlannedWeight` that compute a matmul as Linear does; the others are quantized without samples
CALIBRATED = ("linear", "conv1d")


@dataclass(eq=False)
class Layer:
    """One weight, with all modules that share it.

    Attributes:
        name: full dotted name of the parameter.
        planned: how it is to be quantized.
        places: (module, leaf name of the parameter) of all modules that hold it; the first belongs to ``name``.
        quantized: the quantized weight, while the model still holds its dequantized values.
        columns_scale, rows_scale: factors of the weight's columns and rows (`requanto.methods.fold`).
    """

    name: str
    planned: PlannedWeight
    places: list[tuple[nn.Module, str]] = field(default_factory=list)
    quantized: QTensor | None = None
    columns_scale: torch.Tensor | None = None
    rows_scale: torch.Tensor | None = None

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that the model holds now."""
        module, leaf = self.places[0]
        return module._parameters[leaf]  # type: ignore[return-value]

    @property
    def modules(self) -> list[nn.Module]:
        """The Linear layers (or Conv1D) with this weight, without an embedding that it is tied to."""
        return [m for m, leaf in self.places if leaf == "weight" and not isinstance(m, nn.Embedding)]

    def set_parameter(self, tensor: torch.Tensor) -> None:
        """Sets the weight of all modules that share it."""
        parameter = nn.Parameter(tensor.detach(), requires_grad=False)
        for module, leaf in self.places:
            module._parameters[leaf] = parameter

    def weight(self) -> torch.Tensor:
        """Returns the float weight as float32 ``[N, K]``, with ``columns_scale`` and ``rows_scale`` applied."""
        weight = self.parameter.detach().float()
        weight = weight.t().contiguous() if self.planned.transposed else weight
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
        """Rounds the weight; returns (grid, result, float weight), or None if no input was seen."""
        if not moments.rows:
            logger.warning("%s never saw an input: quantized without samples", self.name)
            self.quantized = self.planned.quantize(self.parameter, self.name)
            return None
        grid, weight = self.grid(), self.weight()
        with without_autocast(weight.device):
            rounded = method.round(weight, moments, grid, self.group_size, self.name)
        self.set_rounded(rounded, grid)
        return grid, rounded, weight

    def set_rounded(self, rounded: Rounded, grid: Grid) -> None:
        """Sets a result; until :meth:`finish` the model holds its dequantized values."""
        self.quantized = self.tensor(rounded, grid)
        self.set_values(rounded.values)

    def finish(self) -> None:
        """Sets the quantized weight on its modules."""
        if self.quantized is not None:
            self.set_parameter(self.quantized)
        self.quantized = None

    def set_values(self, values: torch.Tensor) -> None:
        """Sets float values ``[N, K]`` that already include the scales, and resets the scales."""
        old = self.parameter
        self.columns_scale = self.rows_scale = None
        self.set_parameter((values.t() if self.planned.transposed else values).to(old.dtype).contiguous())

    @property
    def columns(self) -> int:
        """K: input channels."""
        return self.parameter.shape[-2 if self.planned.transposed else -1]

    @property
    def rows(self) -> int:
        """N: output channels."""
        return self.parameter.shape[-1 if self.planned.transposed else -2]

    @cached_property
    def group_size(self) -> int | None:
        """Number of weights that share a scale; None: one scale per row."""
        options = self.planned.options
        wanted = default_group_size(options.qtype) if options.group_size == "default" else options.group_size
        return fit_group_size(wanted, self.columns, self.name)

    def grid(self) -> Grid:
        """Returns the grid to round the weight to."""
        options, group = self.planned.options, self.group_size
        kind, affine = options.qtype, options.qtype.affine(options.symmetric, self.name)
        if kind.is_learned:
            kind = kind.with_values(fit_codebook(self.weight(), kind, group or self.columns))
        grouped = group is not None and group < self.columns
        bits = options.scale_bits if group is not None else None
        unit = None
        if kind.blocks is not None and kind.blocks.scale == "e4m3":
            unit = tensor_scale(self.weight().abs().max().view(1, 1), kind, searched=True)
        return Grid(kind, affine, scale_dtype(self.parameter.dtype, grouped), bits, unit)

    def tensor(self, rounded: Rounded, grid: Grid) -> QTensor:
        """Returns the QTensor whose dequantized values are ``rounded.values``."""
        kind = grid.kind
        groups = rounded.values.view(len(rounded.values), rounded.scale.shape[1], -1)
        codes = encode(groups, rounded.scale, rounded.shift, kind)
        scale, shift = self._stored_scales(rounded, grid)
        tensor = QTensor(
            pack(codes, kind.bits) if kind.is_packed else codes,
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
        )
        tensor.activation = self.planned.options.activations
        return tensor

    def _stored_scales(self, rounded: Rounded, grid: Grid) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns scale and shift as they are stored: floats, or codes relative to the row's scale."""
        scale, shift, row, bits = rounded.scale, rounded.shift, rounded.row_scale, grid.scale_bits
        if grid.kind.blocks is not None:
            return nearest_scale(scale.float(), grid.unit, grid.kind.blocks.scale), None
        if bits is None or row is None:
            return scale.to(grid.stored), None if shift is None else shift.to(grid.stored)
        codes = (scale / row.float()).round().to(torch.uint8)
        if shift is None:
            return pack_codes(codes, bits), None
        zeros = (shift / (scale * zero_step(grid.kind, bits))).round().to(torch.uint8)
        return pack_codes(codes, bits), pack_codes(zeros, bits)


def find_layers(model: nn.Module, planned: Mapping[str, PlannedWeight]) -> tuple[list[Layer], list[Layer]]:
    """Returns (layers to calibrate, layers to quantize without samples: convolutions, embeddings, fused experts).

    A weight shared by several modules is one layer.

    Raises:
        ValueError: a shared weight is planned with two different configurations.
    """
    holders, modules = parameter_holders(model), dict(model.named_modules())
    found: dict[int, Layer] = {}
    for name, choice in planned.items():
        parent, _, leaf = name.rpartition(".")
        module = modules[parent]
        parameter = module._parameters[leaf]
        first = found.get(id(parameter))
        if first is None:
            others = [place for place in holders[id(parameter)] if place[0] is not module]
            found[id(parameter)] = Layer(name, choice, [(module, leaf), *others])
        elif vars(first.planned.options) != vars(choice.options):
            raise ValueError(
                f"one weight is shared by {first.name} ({first.planned.options!r}) and {name} ({choice.options!r}): "
                f"quantize both the same way, or exclude one"
            )
        elif first.planned.kind == "embedding":  # tied: calibrate the weight as that of the Linear layer
            first.planned = choice
    layers = list(found.values())
    calibrated = [layer for layer in layers if layer.planned.kind in CALIBRATED]
    others = [layer for layer in layers if layer.planned.kind not in CALIBRATED]
    if others:
        kinds = sorted({layer.planned.kind for layer in others})
        logger.warning(
            "%d weights (%s) are quantized without samples, which are used only for Linear and Conv1D layers: %s%s",
            len(others),
            ", ".join(kinds),
            ", ".join(layer.name for layer in others[:5]),
            " ..." if len(others) > 5 else "",
        )
    return calibrated, others
