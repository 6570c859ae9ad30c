"""Shapes of a layer of SDNQ, from the tensors that are stored.

A weight [N, K] in groups is [N, K / g, g], its scale [N, K / g, 1]; a convolution [O, I / g, g, h, w] and
[O, I / g, 1, h, w]. With one scale a row the axis of groups is missing, with one a tensor all sizes of the scale are 1.
Packed codes have no shape in the file: that of the scale tells it. Codes that a quantized GEMM can use as they are, were
stored transposed, [K, N] with scale [1, N]; where the layer has such a GEMM at all, svd_up is [r, N] and svd_down [K, r].
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from requanto.checkpoint.foreign.sdnq_codes import packed_numel
from requanto.checkpoint.foreign.source import Source
from requanto.checkpoint.format import CheckpointError

if TYPE_CHECKING:
    from requanto.checkpoint.foreign.sdnq import Settings

#: tensors of a module beside its weight
PARTS = ("scale", "scale_2", "scale_zero_point", "zero_point", "zero_point_scale", "zero_point_2", "svd_up", "svd_down")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Shapes:
    """A quantized weight.

    Args:
        name: its name.
        settings: what the config says of it.
        tensors: name of each stored tensor by what it is: ``weight``, ``scale`` ...
        source: the stored tensors; of those only headers are read here.

    Attributes:
        grouped: shape of the codes beside that of the scales, with the axis of groups.
        axis: the axis of ``grouped`` along which weights share a scale; None: all of them do.
        shape: of the float weight.
        transposed: True if the codes are stored [K, N].
        rank: of the low-rank term; 0: there is none.

    Raises:
        CheckpointError: the tensors do not fit each other, or do not tell the shape.
    """

    def __init__(self, name: str, settings: Settings, tensors: dict[str, str], source: Source) -> None:
        self.name, self.settings, self._names = name, settings, tensors
        self._shapes = {part: source.header(stored).shape for part, stored in tensors.items()}
        self._dtypes = {part: source.header(stored).dtype for part, stored in tensors.items()}
        bias = name.removesuffix("weight") + "bias"
        self._bias = source.header(bias) if bias in source else None
        self._check_parts(source)
        self._find_shape()
        self._find_low_rank()

    # ------------------------------------------------------------------ what is stored

    def _check_parts(self, source: Source) -> None:
        kind, there = self.settings.kind, self._names
        needed = {"scale"} | ({"zero_point"} if kind.unsigned and not self.settings.codebook else set())
        needed |= {"scale_2"} if self.settings.scale is not None else set()
        needed |= {"zero_point_scale"} if self.settings.zero is not None and "zero_point" in needed else set()
        needed |= {"svd_up", "svd_down"} if there.keys() & {"svd_up", "svd_down"} else set()
        for part in sorted(needed - there.keys()):
            source.need(self.name.removesuffix("weight") + part, self.name)
        allowed = needed | {"weight"} | ({"scale_zero_point"} if "scale_2" in needed else set())
        allowed |= {"zero_point_2"} if "zero_point_scale" in needed else set()
        if surplus := sorted(there.keys() - allowed):
            raise CheckpointError(
                f"{there[surplus[0]]} is in the files, but {kind.name} codes as quantization_config describes them have "
                f"none: restore the config that was saved with these files"
            )
        coded = {"scale": self.settings.scale, "zero_point": self.settings.zero}
        for part in sorted(needed):
            stored = coded.get(part)
            expected = _FLOATS if stored is None else stored.stored
            if self._dtypes[part] not in expected:
                raise CheckpointError(
                    f"{there[part]} is {short(self._dtypes[part])}, expected {' or '.join(map(short, expected))}: it is "
                    f"damaged, or does not belong to this config"
                )
            if stored is not None and stored.is_packed:
                raise CheckpointError(
                    f"{there[part]} holds packed {stored.name} codes, whose shape is not in the file: it cannot be read "
                    f"without SDNQ's model. Save it with a scale_dtype of 8 bits"
                )

    def _wrong(self, what: str) -> CheckpointError:
        found = ", ".join(f"{part} {tuple(shape)}" for part, shape in self._shapes.items())
        return CheckpointError(
            f"{self.name}: {what} (found {found}, codes {self.settings.kind.name}): the files are damaged"
        )

    def _find_shape(self) -> None:
        kind, scale, stored = self.settings.kind, self._shapes["scale"], self._shapes["weight"]
        count = packed_numel(kind, stored.numel())
        if count is None:
            raise self._wrong("its codes do not fill whole runs of bytes")
        if self.settings.codebook:
            scale = self._codebook_shape(scale, stored)
        self.transposed = not kind.is_packed and len(stored) == 2 and self._is_transposed(stored, scale)
        if math.prod(scale) == 1:
            self.axis = None
            self.grouped = self._whole(count) if kind.is_packed else stored
        else:
            if self.transposed:
                scale = scale[::-1]
            ones = [axis for axis, size in enumerate(scale) if size == 1]
            if not ones:
                raise self._wrong("no axis of its scale has size 1")
            # An axis of length 1 behind the first one is that of a kernel of size 1.
            self.axis = ones[0]
            if self.axis == 0 and len(scale) == 2:
                raise self._wrong("a scale for each column")
            rest = math.prod(scale)
            if count % rest:
                raise self._wrong(f"{count} codes do not divide among {rest} scales")
            sizes = list(scale)
            sizes[self.axis] = count // rest
            self.grouped = torch.Size(sizes)
        if not kind.is_packed and (stored[::-1] if self.transposed else stored) != self.grouped:
            raise self._wrong(f"the scale belongs to codes of shape {tuple(self.grouped)}")
        zero = self._shapes.get("zero_point")
        if zero is not None and zero != self._shapes["scale"]:
            raise self._wrong("scale and zero point differ in shape")
        self.shape = self.grouped
        if self.axis == 2:
            rows, groups, size, *kernel = self.grouped
            self.shape = torch.Size([rows, groups * size, *kernel])

    def _codebook_shape(self, levels: torch.Size, stored: torch.Size) -> torch.Size:
        """The shape that scales would have where there are codebooks of 2^bits numbers."""
        size = 2**self.settings.kind.bits
        if levels == (size,):
            return torch.Size([1] * (2 if self.settings.kind.is_packed else len(stored)))
        axes = [axis for axis in range(1, len(levels)) if levels[axis] == size]
        if not axes:
            raise self._wrong(f"its scale is no codebook of {size} numbers")
        axis = axes[-1] if len(levels) <= 3 else axes[0]
        return torch.Size([1 if i == axis else length for i, length in enumerate(levels)])

    def _is_transposed(self, stored: torch.Size, scale: torch.Size) -> bool:
        if scale == (1, stored[1]) and stored[1] > 1:
            return True
        if scale != (1, 1):
            return False
        # One scale for the tensor: its shape does not tell.
        if self._bias is not None and stored[0] != stored[1]:
            return self._bias.shape[0] == stored[1]
        sizes = all(size >= 32 and size % 16 == 0 for size in stored)
        kind, codes = self.settings.kind, self.settings
        return codes.matmul and sizes and kind.bits == 8 and codes.scale is None and not codes.codebook

    def _whole(self, count: int) -> torch.Size:
        """Shape of packed codes with one scale in all: the number of rows is that of another tensor."""
        up = self._shapes.get("svd_up")
        rows = self._bias.shape[0] if self._bias is not None else max(up) if up is not None else None
        if rows is None or count % rows:
            raise CheckpointError(
                f"{self.name}: {count} packed {self.settings.kind.name} codes with one scale for all, and no bias: their "
                f"shape is not in the file, so they cannot be read without SDNQ's model"
            )
        return torch.Size([rows, count // rows])

    def _find_low_rank(self) -> None:
        self.rank, self._turned = 0, False
        if "svd_up" not in self._shapes:
            return
        up, down = self._shapes["svd_up"], self._shapes["svd_down"]
        rows, length = self.shape[0], self.shape[1:].numel()
        fits = [
            (rows, length, up[1]) == (up[0], down[1], down[0]),
            (rows, length, up[0]) == (up[1], down[0], down[1]),
        ] if len(up) == len(down) == 2 else [False, False]  # fmt: skip
        if not any(fits):
            raise self._wrong(f"its low-rank factors do not fit {rows} rows of {length}")
        self._turned = self.settings.matmul if all(fits) else fits[1]
        self.rank = up[0] if self._turned else up[1]


def short(dtype: torch.dtype) -> str:
    """Name of a dtype for messages."""
    return str(dtype).removeprefix("torch.")
