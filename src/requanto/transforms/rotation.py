"""Rotations folded into float weights: of the residual stream (R1) and of each head's values (R2), at no cost at run time.

QuaRot (Ashkboos et al. 2024, arXiv:2404.00456), SpinQuant (Liu et al. 2024, arXiv:2405.16406): all layers that write to the
residual stream write a rotated vector, all that read it rotate it back, and an RMSNorm without weights commutes with a
rotation. The norms' weights are first multiplied into the layers that read them. A LayerNorm commutes with a rotation that
leaves the vector of ones as it is. Which layers read and write is found by a run, and the rotated model must give the same
output, or nothing is changed.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import nn

from requanto.transforms.flows import Flow, Run, find_source, restore, saved, unchanged
from requanto.transforms.heads import head_sizes
from requanto.transforms.matrices import random_rotation
from requanto.transforms.twin import Inexact, Twin
from requanto.transforms.weights import FloatWeight, float_weights, norm_vector

logger = logging.getLogger(__name__)


@dataclass
class _Norm:
    """A norm of the residual stream: what it multiplies by, and whether it subtracts the mean."""

    module: nn.Module
    name: str
    offset: float
    centers: bool
    readers: list[FloatWeight]


def rotate_stream(twin: Twin, seed: int = 0) -> str:
    """Rotates the residual stream of the copy.

    Returns:
        What was done, for a log.

    Raises:
        Inexact: the model has no stream that can be rotated, with the reason; the copy may be half changed.
    """
    weights = list(float_weights(twin.model))
    tables = [w for w in weights if w.kind == "embedding"]
    if not tables:
        raise Inexact("the model has no embedding table that writes to a residual stream")
    width = tables[0].columns
    before = twin.run()
    layers = [w for w in weights if w.kind != "embedding"]
    owned = {w.module for w in weights}
    vectors = [m for m in twin.model.modules() if m not in owned and norm_vector(m) is not None]
    flow = Flow(twin.run, layers, [m for m in vectors if len(norm_vector(m)) == width])  # type: ignore[arg-type]
    norms = [_norm_of(twin, module, readers, width) for module, readers in flow.readers.items() if readers]
    unread = [twin.names[id(module)] for module, readers in flow.readers.items() if not readers]
    reason = (
        f"; {unread[0]} multiplies {width} channels by its weight and no layer reads the result: if that goes to the "
        f"residual stream, no rotation commutes with it"
        if unread
        else ""
    )
    if not norms:
        raise Inexact(f"no layer reads the output of a norm over {width} channels{reason}")
    reading = {id(w) for norm in norms for w in norm.readers}
    rotation = random_rotation(width, seed, keep_mean=any(norm.centers for norm in norms)).to(twin.device)
    for weight in layers:
        if weight.shared and id(weight) in reading:
            _untie(twin, weight)
    for norm in norms:
        _fold_norm(norm, rotation)
    writers = [w for w in layers if id(w) not in reading and w.rows == width]
    shared: set[int] = set()
    for weight in layers:
        if id(weight) in reading:
            weight.rotate_columns(rotation)
    for weight in (*writers, *(w for w in tables if w.columns == width)):
        if id(weight.parameter) in shared:
            continue
        shared.add(id(weight.parameter))
        if weight.kind == "embedding":  # its rows are what it writes
            weight.rotate_columns(rotation)
        else:
            weight.rotate_rows(rotation)
    what = f"rotating the residual stream ({len(reading)} layers read it, {len(writers)} write to it)"
    twin.check(before, what, reason)
    return f"{len(reading)} layers that read and {len(writers)} that write {width} channels"


def _norm_of(twin: Twin, module: nn.Module, readers: list[FloatWeight], width: int) -> _Norm:
    """What a norm computes, found by running it.

    Raises:
        Inexact: it is neither an RMSNorm nor a LayerNorm.
    """
    name = twin.names[id(module)]
    weight, bias = norm_vector(module), module._parameters.get("bias")
    assert weight is not None
    x = torch.randn(4, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu").to(
        twin.device, weight.dtype
    )
    with torch.no_grad():
        found = module(x).double()
    for centers in (False, True):
        centered = (x - x.mean(-1, keepdim=True) if centers else x).double()
        normed = centered / centered.square().mean(-1, keepdim=True).sqrt()
        for offset in (0.0, 1.0):
            expected = normed * (weight.double() + offset) + (0 if bias is None else bias.double())
            if float((found - expected).norm()) <= 1e-3 * float(expected.norm()):
                return _Norm(module, name, offset, centers, readers)
    raise Inexact(f"{name} ({type(module).__name__}) is neither an RMSNorm nor a LayerNorm")


def _fold_norm(norm: _Norm, rotation: torch.Tensor) -> None:
    """Multiplies a norm's weight into the layers that read it; its bias stays, in the rotated basis."""
    weight, bias = norm_vector(norm.module), norm.module._parameters.get("bias")
    assert weight is not None
    factors = weight.data.double() + norm.offset
    for reader in norm.readers:
        reader.scale_columns(factors)
    if bias is not None:
        if bool(((factors == 0) & (bias.data != 0)).any()):
            raise Inexact(
                f"{norm.name} has weights of 0 with a bias, so the weight cannot be multiplied into the layers"
            )
        divided = torch.where(factors == 0, torch.zeros_like(factors), bias.data.double() / factors)
        bias.data.copy_(divided @ rotation)
    weight.data.fill_(1 - norm.offset)


def _untie(twin: Twin, weight: FloatWeight) -> None:
    """Gives a layer that shares its weight with an embedding a weight of its own."""
    weight.module._parameters[weight.leaf] = nn.Parameter(weight.parameter.data.clone(), requires_grad=False)
    weight.shared = False
    twin.untied.add(weight.name)


def rotate_values(twin: Twin, seed: int = 0) -> list[str]:
    """Rotates the values of each attention head, and the columns of the layer that reads them, in the copy.

    Returns:
        The names of the layers whose columns were rotated; those where no trial is exact are left as they are.

    Raises:
        Inexact: the output changes although every rotation was exact in its block.
    """
    weights = [w for w in float_weights(twin.model) if w.kind in ("linear", "conv1d") and not w.shared]
    before, rotated, done = twin.run(), [], set[str]()
    for part in twin.parts({w.module for w in weights})[:-1]:
        inside = set(part.module.modules())
        here = [w for w in weights if w.module in inside and w.name not in done]
        done |= {w.name for w in here}
        sizes = head_sizes(part.module, twin.model)
        if here and sizes:
            norms = [m for m in inside if norm_vector(m) is not None]
            with twin.part(part) as run:
                rotated += _rotate_block(run, here, norms, sizes, seed)
    twin.check(before, "rotating the values of attention")
    return rotated


def _rotate_block(
    run: Run, weights: list[FloatWeight], norms: list[nn.Module], sizes: list[int], seed: int
) -> list[str]:
    flow, rotated = Flow(run, weights, norms), []
    normed = [group for group in flow.readers.values() if group]
    for number, group in enumerate(flow.groups):
        found = None if any(g is group for g in normed) else find_source(run, flow, number, sizes)
        if found is not None and _rotate_pair(run, flow.output, *found, group, sizes, seed):
            rotated += [w.name for w in group]
    return rotated


def _rotate_pair(
    run: Run,
    before: list[torch.Tensor],
    producer: FloatWeight,
    rows: torch.Tensor,
    source: torch.Tensor,
    group: list[FloatWeight],
    sizes: list[int],
    seed: int,
) -> bool:
    """Rotates heads of one layer's rows and the columns that come from them, if a trial is exact; else changes nothing."""
    for size in sizes:
        if len(rows) % size or len(source) % size:
            continue
        heads = source.view(-1, size)
        plain = heads[:, :1] + torch.arange(size, device=heads.device)
        if not torch.equal(heads, plain) or bool((heads[:, 0] % size).any()):
            continue
        old = saved(producer.parameter, producer.bias, *(w.parameter for w in group))
        rotation = random_rotation(size, seed).to(producer.matrix)
        values = producer.matrix[rows].unflatten(0, (-1, size))
        producer.matrix[rows] = (rotation.t() @ values).flatten(0, 1)
        if producer.bias is not None:
            producer.bias.data[rows] = (producer.bias.data[rows].view(-1, size) @ rotation).flatten()
        for consumer in group:
            consumer.matrix.copy_((consumer.matrix.unflatten(-1, (-1, size)) @ rotation).flatten(-2))
        if unchanged(run, before):
            return True
        restore(old)
    return False
