"""A layer of SDNQ: its line of our format, and its parts or float values."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from requanto.checkpoint.foreign.found import Parts
from requanto.checkpoint.foreign.regular_hadamard import (
    column_order,
    column_signs,
    is_regular,
    negated,
    regular_matrix,
    sylvester_matrix,
)
from requanto.checkpoint.foreign.sdnq_codes import Kind, codes_of, numbers_of
from requanto.checkpoint.foreign.sdnq_shapes import Shapes
from requanto.checkpoint.foreign.source import Source
from requanto.checkpoint.format import CheckpointError
from requanto.dtypes.bit_packing import pack
from requanto.dtypes.qtypes import qnvfp4, qtype, qtypes
from requanto.tensor.spec import WeightSpec

if TYPE_CHECKING:
    from requanto.checkpoint.foreign.sdnq import Settings


class Layer(Shapes):
    """A quantized weight.

    Args:
        name, settings, tensors, source: those of `Shapes`.
        usual: what to call for the dtype of a float weight where nothing of the module tells it.

    Attributes:
        reason: why our format cannot hold it; empty if it can.

    Raises:
        CheckpointError: the tensors do not fit each other, or do not tell the shape.
    """

    def __init__(
        self, name: str, settings: Settings, tensors: dict[str, str], source: Source, usual: Callable[[], torch.dtype]
    ) -> None:
        super().__init__(name, settings, tensors, source)
        self._usual = usual
        self.reason = self._why_float()

    # ------------------------------------------------------------------ our line

    @functools.cached_property
    def _block(self) -> int | None:
        """Size of the blocks of the Hadamard matrix."""
        if self.settings.hadamard is None:
            return None
        channels = self.shape[1]
        block = 1 << (min(channels, self.settings.hadamard) - 1).bit_length()
        while channels % block:
            block //= 2
        return block if block >= 4 else None

    @property
    def _type(self) -> qtype | None:
        """Our type of the codes; None: we have none."""
        kind, bits = self.settings.kind, self.settings.kind.bits
        if self.settings.codebook:
            return qtypes.get(f"qcodebook{bits}") if self._shapes["scale"] == (2**bits,) else None
        if kind.name == "float2_e1m0fn":
            return qtypes["qcodebook2"]
        if self._is_nvfp4:
            return qnvfp4
        if kind.is_float:
            name = f"qfp{bits}_e{kind.exponent}m{kind.mantissa}" if kind.plain is None else f"q{kind.name}"
            return None if kind.unsigned else qtypes.get(name)
        return None if bits > 8 else qtypes[f"q{'u' if kind.unsigned and bits in (1, 8) else ''}int{bits}"]

    @property
    def _is_nvfp4(self) -> bool:
        scale = self.settings.scale
        return (
            self.settings.kind.name == "float4_e2m1fn"
            and scale is not None
            and scale.plain == torch.float8_e4m3fn
            and self._group == 16
            and self._shapes["scale_2"].numel() == 1
            and not self.settings.scale_codebook
            and not self._is_regular
        )

    @property
    def _group(self) -> int | None:
        return self.grouped[2] if self.axis == 2 else None

    def _why_float(self) -> str:
        kind = self.settings.kind
        if self._type is None:
            groups = " with a codebook for each group" if self.settings.codebook else ""
            return f"{kind.name} codes{groups} have no type here"
        if self.axis == 0:
            return "one scale for each column of a transposed convolution"
        if self._block is not None and len(self.shape) > 2:
            return "a rotated convolution"
        if self._is_regular and kind.unsigned:
            return "codes with a zero point, rotated by a Hadamard matrix that is not Sylvester's"
        if torch.float64 in self._dtypes.values():
            return "float64 scales"
        return ""

    @property
    def _is_regular(self) -> bool:
        """True if it is rotated by a matrix that is not Sylvester's."""
        return self._block is not None and is_regular(self._block)

    @property
    def _places(self) -> int:
        """Number of places of a convolution's kernel, each of which has scales of its own; 1 for other layers."""
        return 1 if self.axis is None else self.shape[2:].numel()

    def spec(self) -> WeightSpec:
        """The description of the weight in our format."""
        kind, group, turned = self._type, self._group, self._is_regular
        assert kind is not None
        if self._places > 1 and group is None:
            group = self.shape[1]
        return WeightSpec(
            *(kind, self.shape, torch.float32),
            group_size=group,
            affine=self.settings.kind.unsigned and not self.settings.codebook,
            rotation=self._block,
            column=turned,
            signed=turned,
            order=turned or self._places > 1,
        )

    def text(self) -> str:
        """Its line."""
        return self.spec().text(self.rank)

    def float_dtype(self) -> torch.dtype:
        """dtype of the float weight: that of the bias or the low-rank factors, else the usual one."""
        if self._bias is not None:
            return self._bias.dtype
        return self._dtypes["svd_up"] if "svd_up" in self._dtypes else self._usual()

    # ------------------------------------------------------------------ values

    def _scales(self, source: Source) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scale (of a codebook: its numbers) and zero point as floats, in the order of `grouped`."""
        scale = self._decoded(source, "scale", "scale_2", "scale_zero_point", self.settings.scale)
        zero = None
        if "zero_point" in self._names:
            zero = self._decoded(source, "zero_point", "zero_point_scale", "zero_point_2", self.settings.zero)
        if self.transposed and scale.dim() == 2:
            scale, zero = scale.t(), None if zero is None else zero.t()
        return scale, zero

    def _decoded(self, source: Source, part: str, factor: str, shift: str, kind: Kind | None) -> torch.Tensor:
        stored = source[self._names[part]]
        if kind is None:
            return stored
        by = source[self._names[factor]]
        if self.settings.scale_codebook:
            return by[stored.to(torch.int32)]
        codes = numbers_of(stored, kind, by.dtype)
        return torch.addcmul(source[self._names[shift]], codes, by) if shift in self._names else codes * by

    def _low_rank(self, source: Source) -> tuple[torch.Tensor, torch.Tensor]:
        up, down = source[self._names["svd_up"]], source[self._names["svd_down"]]
        return (up.t(), down.t()) if self._turned else (up, down)

    def _by_places(self, values: torch.Tensor) -> torch.Tensor:
        """Codes or scales of a convolution, place by place: ``[O, places * ...]``."""
        return values.reshape(self.shape[0], -1, self._places).transpose(1, 2).reshape(self.shape[0], -1)

    def _codes(self, source: Source, spec: WeightSpec) -> torch.Tensor:
        """``qdata``."""
        kind, stored = self.settings.kind, source[self._names["weight"]]
        rows, length = spec.matrix_shape
        if not spec.order and kind.bits in (2, 4) and length * kind.bits % 8 == 0:
            return stored.reshape(rows, -1)
        codes = codes_of(stored, kind) if spec.qtype.is_packed else stored.t() if self.transposed else stored
        codes = self._by_places(codes) if self._places > 1 else codes.reshape(rows, length)
        if self._is_regular:
            codes = self._with_signs(codes, column_signs(length, self._block or 1, codes.device))
        return pack(codes, kind.bits) if spec.qtype.is_packed else codes.reshape(self.shape).contiguous()

    def _with_signs(self, codes: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
        """Codes ``[N, K]`` whose columns with sign -1 are negated."""
        kind, name = self.settings.kind, self._names["weight"]
        if kind.is_float:
            flips = torch.where(signs < 0, 1 << (kind.bits - 1), 0).to(torch.uint8)
            return (codes.view(torch.uint8) ^ flips).view(codes.dtype)
        low = -(2 ** (kind.bits - 1))
        if kind.bits == 8:
            return negated(codes, signs, low, name)
        return (negated(codes.to(torch.int8) + low, signs, low, name) - low).to(torch.uint8)

    def parts(self, source: Source) -> Parts:
        """The parts of our format."""
        spec = self.spec()
        rows, length = spec.matrix_shape
        parts = {"qdata": self._codes(source, spec)}
        device = parts["qdata"].device

        def put(values: torch.Tensor) -> torch.Tensor:
            values = self._by_places(values) if self._places > 1 else values.reshape(-1, spec.groups)
            return values.expand(rows, spec.groups).contiguous()

        if spec.qtype is qnvfp4:
            parts["scale"] = put(source[self._names["scale"]].view(torch.uint8))
            parts["row_scale"] = source[self._names["scale_2"]].float().reshape(1, 1).expand(rows, 1).contiguous()
        elif self.settings.codebook:
            parts["scale"] = torch.ones(rows, 1, dtype=torch.float32, device=device)
            parts["codebook"] = self._scales(source)[0].reshape(-1)
        else:
            scale, zero = self._scales(source)
            parts["scale"] = put(scale)
            if zero is not None:
                parts["shift"] = put(-zero)
            if spec.qtype.is_learned:
                parts["codebook"] = torch.tensor([0.0, 2.0, 0.0, -2.0], dtype=torch.float32, device=device)
        if self._places > 1:
            columns = torch.arange(length, dtype=torch.int32, device=device)
            parts["order"] = columns.reshape(-1, self._places).t().reshape(-1).contiguous()
        elif self._is_regular:
            parts["column"] = column_signs(length, self._block or 1, device)
            parts["order"] = column_order(length, self._block or 1, device)
        if self.rank:
            up, down = self._low_rank(source)
            down = down if self._block is None else self._turned_back(down.float())
            parts |= {"up": up.contiguous(), "down": down.contiguous()}
        return parts

    def _turned_back(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows ``[..., K]`` times the blocks of SDNQ's Hadamard matrix."""
        block = self._block or 1
        matrix = regular_matrix(block) if self._is_regular else sylvester_matrix(block)
        return (rows.unflatten(-1, (-1, block)) @ matrix.to(rows)).flatten(-2)

    def values(self, source: Source) -> torch.Tensor:
        """The float weight."""
        scale, zero = self._scales(source)
        stored = source[self._names["weight"]]
        if self.settings.codebook:
            codes = codes_of(stored, self.settings.kind).long().reshape(self.grouped)
            result = scale[codes] if scale.dim() == 1 else scale.gather(self.axis or 0, codes)
        else:
            codes = numbers_of(stored, self.settings.kind, scale.dtype)
            codes = (codes.t() if self.transposed else codes).reshape(self.grouped)
            result = codes * scale if zero is None else torch.addcmul(zero, codes, scale)
        result = result.reshape(self.shape)
        if self.rank:
            up, down = self._low_rank(source)
            result = result + torch.mm(up.to(result.dtype), down.to(result.dtype)).reshape(self.shape)
        if self._block is not None:
            result = self._turned_back(result.flatten(1)).reshape(self.shape)
        if not bool(torch.isfinite(result).all()):
            raise CheckpointError(f"{self.name} holds NaN or Inf: the checkpoint is damaged, download it again")
        return result.to(self.float_dtype())
