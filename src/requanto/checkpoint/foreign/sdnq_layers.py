"""A layer of SDNQ: its line of our format, and its parts or float values."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from requanto.checkpoint.foreign.found import Parts
from requanto.checkpoint.foreign.sdnq_codes import Kind, codes_of, numbers_of
from requanto.checkpoint.foreign.sdnq_shapes import Shapes
from requanto.checkpoint.foreign.source import Source
from requanto.checkpoint.format import CheckpointError
from requanto.dtypes.bit_packing import pack
from requanto.dtypes.qtypes import qnvfp4, qtype, qtypes
from requanto.scales.rotation import rotate
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
        )

    @property
    def _group(self) -> int | None:
        return self.grouped[2] if self.axis == 2 else None

    def _why_float(self) -> str:
        kind = self.settings.kind
        if self._type is None:
            groups = " with a codebook for each group" if self.settings.codebook else ""
            return f"{kind.name} codes{groups} have no type here"
        if self.axis == 0 or (len(self.shape) > 2 and self.axis is not None and self.shape[2:].numel() > 1):
            return "a scale for each place of a convolution's kernel"
        block = self._block
        if block is not None and (len(self.shape) > 2 or block.bit_length() % 2):
            return "its rotation is no Hadamard matrix of Sylvester's kind"
        if torch.float64 in self._dtypes.values():
            return "float64 scales"
        return ""

    def spec(self) -> WeightSpec:
        """The description of the weight in our format."""
        kind = self._type
        assert kind is not None
        affine = self.settings.kind.unsigned and not self.settings.codebook
        return WeightSpec(
            kind, self.shape, torch.float32, group_size=self._group, affine=affine, rotation=self._block
        )  # fmt: skip

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

    def parts(self, source: Source) -> Parts:
        """The parts of our format."""
        spec, kind = self.spec(), self.settings.kind
        rows, length = spec.matrix_shape
        stored = source[self._names["weight"]]
        if not spec.qtype.is_packed:
            qdata = (stored.t() if self.transposed else stored).reshape(self.shape).contiguous()
        elif kind.bits in (2, 4) and length * kind.bits % 8 == 0:
            qdata = stored.reshape(rows, -1)
        else:
            qdata = pack(codes_of(stored, kind).reshape(rows, length), kind.bits)
        parts = {"qdata": qdata}
        if spec.qtype is qnvfp4:
            parts["scale"] = source[self._names["scale"]].view(torch.uint8).reshape(rows, -1)
            parts["row_scale"] = source[self._names["scale_2"]].float().reshape(1, 1).expand(rows, 1).contiguous()
        elif self.settings.codebook:
            parts["scale"] = torch.ones(rows, 1, dtype=torch.float32, device=stored.device)
            parts["codebook"] = self._scales(source)[0].reshape(-1)
        else:
            scale, zero = (None if one is None else one.reshape(-1, spec.groups) for one in self._scales(source))
            parts["scale"] = scale.expand(rows, spec.groups).contiguous()
            if zero is not None:
                parts["shift"] = (-zero).expand(rows, spec.groups).contiguous()
            if spec.qtype.is_learned:
                parts["codebook"] = torch.tensor([0.0, 2.0, 0.0, -2.0], dtype=torch.float32, device=stored.device)
        if self.rank:
            up, down = self._low_rank(source)
            down = down if self._block is None else rotate(down.float(), self._block)
            parts |= {"up": up.contiguous(), "down": down.contiguous()}
        return parts

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
            turned = result.reshape(self.shape[0], -1, self._block) @ hadamard(self._block).to(result)
            result = turned.reshape(self.shape)
        if not bool(torch.isfinite(result).all()):
            raise CheckpointError(f"{self.name} holds NaN or Inf: the checkpoint is damaged, download it again")
        return result.to(self.float_dtype())


@functools.lru_cache(maxsize=16)
def hadamard(size: int) -> torch.Tensor:
    """SDNQ's orthonormal Hadamard matrix [size, size]: a power of a symmetric 4 x 4 matrix where that is possible."""
    by = 4 if size.bit_length() % 2 else 2
    small = [[1, 1], [1, -1]] if by == 2 else [[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]
    seed = torch.tensor(small, dtype=torch.float32, device="cpu")
    found = seed
    while found.shape[0] < size:
        found = torch.kron(found, seed)
    return found / math.sqrt(size)
