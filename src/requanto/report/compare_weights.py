"""Compares the weights of two models one by one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from requanto.dtypes.qtypes import short_name
from requanto.tensor.qtensor import QTensor

#: Float weights are compared in pieces of at most this many values: 64 MB of float32 each.
_PIECE = 16 * 1024 * 1024


@dataclass(frozen=True)
class LayerComparison:
    """One weight and the layer that holds it.

    Attributes:
        name: the weight's name.
        type_a, type_b: ``"int4"`` ... or the float dtype.
        bytes_a, bytes_b: size, including scales.
        weight_error: relative error of the weight; 0 if equal.
        output_error: relative error of the layer's output; None if it was not run.
    """

    name: str
    type_a: str
    type_b: str
    bytes_a: int
    bytes_b: int
    weight_error: float
    output_error: float | None = None


def compare_weights(
    a: dict[str, nn.Module], b: dict[str, nn.Module], output_error: Callable[[str], float | None], progress: bool
) -> list[LayerComparison]:
    """Compares all weights; at most two are dequantized at a time, and float weights are read in pieces."""
    others = dict(parameters_of(b))
    found = []
    for name, one in tqdm(parameters_of(a), desc="weights", unit="weight", disable=not progress, leave=False):
        if one.dim() < 2 or not one.is_floating_point():
            continue
        other = others[name]
        for weight in (one, other):
            if weight.device.type == "meta":
                raise ValueError(f"{name} is offloaded (on the meta device); load both models onto one device")
        found.append(
            LayerComparison(
                name,
                *(_type(w) for w in (one, other)),
                *(_bytes(w) for w in (one, other)),
                weight_error(one.detach(), other.detach()),
                output_error(name.rpartition(".")[0]),
            )
        )
    return found


@torch.no_grad()
def weight_error(a: Tensor, b: Tensor) -> float:
    """Returns ``|a - b| / |a|`` (Frobenius norms) of float or quantized weights of the same shape."""
    error = reference = 0.0
    for one, other in _pieces(a, b):
        one = one.float()
        error += (other.to(one.device).float() - one).square().sum(dtype=torch.float64).item()
        reference += one.square().sum(dtype=torch.float64).item()
    return ratio(error, reference)


def _pieces(a: Tensor, b: Tensor) -> list[tuple[Tensor, Tensor]] | zip[tuple[Tensor, Tensor]]:
    if isinstance(a, QTensor) or isinstance(b, QTensor):
        values = [w.dequantize(torch.float32) if isinstance(w, QTensor) else w for w in (a, b)]
        return [(values[0], values[1])]
    rows = max(1, _PIECE // max(1, a[0].numel())) if len(a) else 1
    return zip(a.split(rows), b.split(rows))


def _type(weight: Tensor) -> str:
    if isinstance(weight, QTensor):
        group = "" if weight.group_size is None else f" g{weight.group_size}"
        return f"{short_name(weight.qtype)}{group}"
    return str(weight.dtype).removeprefix("torch.")


def _bytes(weight: Tensor) -> int:
    return weight.nbytes if isinstance(weight, QTensor) else weight.numel() * weight.element_size()


def total_bytes(parts: dict[str, nn.Module]) -> int:
    """Returns the size of all parameters, scales included."""
    return sum(_bytes(weight) for _, weight in parameters_of(parts))


def ratio(error: float, reference: float) -> float:
    """Returns sqrt(error / reference): 0 if the error is 0, infinite if only the reference is 0."""
    if error == 0:
        return 0.0
    return math.sqrt(error / reference) if reference else math.inf


def parameters_of(parts: dict[str, nn.Module]) -> list[tuple[str, Tensor]]:
    """Returns (name, parameter) of all parts; a part's name comes before the parameter's."""
    return [(f"{p}.{n}" if p else n, w) for p, part in parts.items() for n, w in part.named_parameters()]
