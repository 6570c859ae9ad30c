"""Random weights of each kind, several copies so that none stays in the L2 cache, and what they mean in float64."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

import requanto
import requanto_kernels as rk
from gpu_check.cases import KINDS
from requanto.dtypes.qtypes import resolve_qtype
from requanto.linear.gpu.layout import kernel_parts
from requanto.tensor.qtensor import QTensor


@dataclass(frozen=True)
class Place:
    """Where a child works. l2: bytes of the L2 cache; compiling: kernels are compiled for later, nothing is timed."""

    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    l2: int = 60 << 20
    compiling: bool = False

    @property
    def dry(self) -> bool:
        return self.device == "cpu"

    def copies(self, size: int) -> int:
        """How many weights of ``size`` bytes to rotate: together three times the cache, two at least."""
        return 1 if self.compiling or self.dry else max(2, min(64, -(-3 * self.l2 // max(1, size))))


def decoded(stored: QTensor) -> torch.Tensor:
    """The values ``[N, K]`` of a weight in the plain layout, in float64, by torch's operators and the format's definition.

    Not by `QTensor.dequantize`, which runs the kernels that are to be checked. Of codes of 4 and 8 bits.
    """
    kind, codes = stored.qtype, stored.qdata
    if kind.bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)  # low bits first
        if kind.is_codebook:
            table = torch.tensor(kind.values, dtype=torch.float64, device=codes.device)
            values = table[codes.int()]
        else:
            values = codes.double() - (0 if stored.shift is not None else 8)
    elif kind.bits == 8 and not kind.is_codebook:
        values = codes.float().double()  # there is no direct conversion of float8 everywhere
    else:
        raise ValueError(f"found {kind.name}, expected codes of 4 bits, or integers or floats of 8")
    groups = values.view(values.shape[0], stored.scale.shape[1], -1)
    groups = groups.mul_(stored.scale.double().unsqueeze(-1))
    if stored.shift is not None:
        groups = groups.sub_(stored.shift.double().unsqueeze(-1))
    return groups.view(values.shape)


class Weights:
    """One weight ``[n, k]`` of a kind: quantized layers as users have them, and its parts as the kernels take them."""

    def __init__(self, kind: str, n: int, k: int, place: Place) -> None:
        self.kind, self.n, self.k, self.place = kind, n, k, place
        self.what = KINDS.get(kind)
        self.dense = torch.randn(n, k, device=place.device, dtype=torch.float32).to(place.dtype)
        if self.what is not None:
            what = self.what
            group = what.group_size if what.group_size is not None else None
            self.stored = QTensor.quantize(
                self.dense, what.qtype, group_size=group, symmetric=what.symmetric, search="minmax"
            )
            self.stored.activation = None if what.activation is None else resolve_qtype(what.activation)
            del self.dense
            gc.collect()
        if place.device == "cuda":
            torch.cuda.empty_cache()

    @cached_property
    def exact(self) -> torch.Tensor:
        """W in float64; of ``"bf16"``, the dense weight."""
        return self.dense.double() if self.what is None else decoded(self.stored)

    @property
    def bytes(self) -> int:
        """Bytes that a GEMM reads of the weight."""
        parts = [self.dense] if self.what is None else self.stored.inner_tensors().values()
        return sum(part.numel() * part.element_size() for part in parts)

    @cached_property
    def layers(self) -> list[nn.Linear]:
        """Layers of the same weight at different addresses, prepacked as `from_pretrained` and the first GEMM leave them."""
        made = []
        for _ in range(self.place.copies(self.bytes)):
            layer = nn.Linear(self.k, self.n, bias=False, device="meta")
            data = self.dense.clone() if self.what is None else self.stored.clone()
            if self.what is not None:
                data.activation = self.stored.activation
            layer.weight = nn.Parameter(data, requires_grad=False)
            made.append(layer)
        requanto.prepare(nn.ModuleList(made), smallest=0)
        return made

    @cached_property
    def raw(self) -> list[dict[str, Any]]:
        """Arguments of `wq_gemm` and `wq_dequant` after x, as the registry gives them to the kernels; one dict a copy."""
        found = [kernel_parts(layer.weight, self.place.dtype) for layer in self.layers]
        return [{"qdata": one.codes, "scale": one.scale, "shift": one.shift, **one.how} for one in found]

    def seen(self, x: torch.Tensor) -> torch.Tensor:
        """x in float64 as the GEMM sees it: rounded to the codes of its activation type, one scale a row.

        As `quant_rows` does it, by a product with the inverse: 16-bit numbers often lie half-way between two codes.
        """
        activation = None if self.what is None else self.what.activation
        if activation is None:
            return x.double()
        wide = x.float()
        scale = wide.abs().amax(-1, keepdim=True).clamp_min(1e-30) / (127 if activation == "int8" else 448)
        ratio = wide * (1 / scale)
        codes = ratio.round().clamp(-127, 127) if activation == "int8" else ratio.to(torch.float8_e4m3fn)
        return codes.double() * scale.double()

    def expected(self, x: torch.Tensor) -> torch.Tensor:
        """x @ W^T in float64."""
        return self.seen(x) @ self.exact.t()


def shipped_config(weights: Weights, op: str, m: int) -> rk.Config:
    """The tile that the kernels choose themselves, which the variants start from."""
    from requanto_kernels._check import check_weight
    from requanto_kernels._device import arch_of
    from requanto_kernels.config import select
    from requanto_kernels.wq_gemm import config_for

    n, k, raw = weights.n, weights.k, dict(weights.raw[0])
    arch = arch_of(raw["qdata"].device)
    if op == "scaled_mm":
        return select(arch, op, 8, 0, m, n, k, "int8" if raw["qdata"].dtype == torch.int8 else "float8")
    return config_for(check_weight(k=k, **raw), m, arch, weights.place.dtype)
