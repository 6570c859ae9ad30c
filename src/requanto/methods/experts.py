"""Fused experts with samples: every expert is rounded with the tokens that the router sends to it.

The experts of a layer are one parameter ``[experts, N, K]``, and their module calls no layer whose inputs a hook could see.
So the model runs with the library's eager implementation, one GEMM an expert, and a `TorchFunctionMode` sees the inputs of
the GEMMs whose weight is a slice of the parameter.

An expert that sees few tokens has a second moment that says little about other texts. It is mixed with that of all experts'
tokens, which counts as `PRIOR` tokens for each input channel.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from requanto.methods.layers import Layer, needs_full, scale_inputs
from requanto.methods.method import Method
from requanto.methods.moments import Moments
from requanto.scales.codebook import fit_codebook
from requanto.tensor.qtensor import QTensor

logger = logging.getLogger(__name__)

#: Tokens that the second moment of all experts' tokens counts as, for each input channel.
PRIOR = 0.5
#: The second moments of so many experts are computed at once that they take up to this many bytes; more cost more runs.
MOST_BYTES = 2 * 2**30

_GEMMS = frozenset({"linear", "matmul", "__matmul__", "mm", "bmm"})


class ExpertInputs(TorchFunctionMode):
    """Inside the block, GEMMs with a slice of one of the parameters are seen.

    Args:
        layers: layers whose parameter is ``[experts, N, K]`` or, transposed, ``[experts, K, N]``.
        take: called with (layer, index of the expert, its input ``[tokens, K]``).
    """

    def __init__(self, layers: Iterable[Layer], take: Callable[[Layer, int, torch.Tensor], None]) -> None:
        super().__init__()
        self._layers = {layer.parameter.untyped_storage().data_ptr(): layer for layer in layers}
        self._take = take

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Other tensor types, quantized weights among them, need not have a storage.
        if getattr(func, "__name__", "") in _GEMMS and len(args) > 1 and type(args[1]) in (torch.Tensor, nn.Parameter):
            given, weight = args[:2]
            layer = self._layers.get(weight.untyped_storage().data_ptr())
            if layer is not None:
                self._see(layer, given.detach(), weight)
        return func(*args, **(kwargs or {}))

    def _see(self, layer: Layer, given: torch.Tensor, weight: torch.Tensor) -> None:
        if weight.dim() == 3:  # all experts at once; tokens of other experts are rows of zeros
            for expert, rows in enumerate(given):
                self._take(layer, expert, rows[rows.any(-1)])
        else:
            whole = layer.parameter
            first = weight.storage_offset() - whole.storage_offset()
            self._take(layer, first // whole.stride(0), given)


@contextlib.contextmanager
def eager_experts(layers: Iterable[Layer]) -> Iterator[None]:
    """Inside the block, the experts' modules run the implementation with one GEMM an expert."""
    changed: list[tuple[Any, Any]] = []
    for layer in layers:
        config = getattr(layer.places[0][0], "config", None)
        found = getattr(config, "_experts_implementation", None)
        if found not in (None, "eager") and not any(config is other for other, _ in changed):
            changed.append((config, found))
            config._experts_implementation = "eager"  # type: ignore[union-attr]
    try:
        yield
    finally:
        for config, found in changed:
            config._experts_implementation = found


def quantize_experts(layers: list[Layer], run: Callable[[], object], method: Method) -> None:
    """Rounds fused experts, parameter by parameter in the order of their calls; afterwards the model holds their values.

    Args:
        layers: the fused weights.
        run: runs the block (or the model) on all samples.
        method: how weights are rounded. Errors of earlier blocks are not corrected in experts.
    """
    with eager_experts(layers):
        called: dict[Layer, None] = {}
        with ExpertInputs(layers, lambda layer, expert, given: called.setdefault(layer)):
            run()
        for layer in called:
            _quantize(layer, run, method)
    for layer in layers:
        if layer not in called:
            logger.warning("%s never saw an input: quantized without samples", layer.name)
            layer.quantized = layer.planned.quantize(layer.parameter, layer.name)


def _quantize(layer: Layer, run: Callable[[], object], method: Method) -> None:
    whole = layer.parameter
    parts = [_single(layer, expert) for expert in range(len(whole))]
    columns, device, full = parts[0].columns, whole.device, method.full or needs_full(layer)
    kind, group = layer.planned.options.qtype, parts[0].group_size
    values = None
    if kind.is_learned:  # the experts share the values of their codes
        rows = torch.cat([part.find_basis(part.weight()).rows(part.weight()) for part in parts])
        values = fit_codebook(rows, kind, group or columns)
    at_once = max(1, MOST_BYTES // (4 * columns**2)) if full else len(parts)
    counts, shared = [0] * len(parts), Moments(columns, device, full, paired=False)
    done: list[QTensor] = []
    for start in range(0, len(parts), at_once):
        moments = {
            e: Moments(columns, device, full, paired=False) for e in range(start, min(start + at_once, len(parts)))
        }

        def take(_: Layer, expert: int, given: torch.Tensor) -> None:
            if not start:  # noqa: B023
                counts[expert] += given.shape[:-1].numel()
                shared.add(given)
            if expert in moments:  # noqa: B023
                moments[expert].add(given)  # noqa: B023

        with ExpertInputs([layer], take):
            run()
        if not start:
            _log(layer, counts, columns)
        for expert, seen in moments.items():
            part, mixed = parts[expert], seen.mixed(shared, PRIOR * columns)
            part.codebook = values
            if method.folds:
                scale_inputs([part], mixed, method)
            part.round(mixed, method)
            assert part.quantized is not None
            done.append(part.quantized)
        # Only now, so that other experts of the run have the same inputs however many fit at once.
        for expert in moments:
            whole.data[expert].copy_(parts[expert].parameter)
    layer.quantized = _joined(layer, done)


def _single(layer: Layer, expert: int) -> Layer:
    """Returns one expert's weight as a layer of its own."""
    holder = nn.Module()
    holder._parameters["weight"] = nn.Parameter(layer.parameter.detach()[expert], requires_grad=False)
    planned = replace(layer.planned, axis=0, kind="linear")
    return Layer(f"{layer.name}[{expert}]", planned, [(holder, "weight")])


def _joined(layer: Layer, experts: list[QTensor]) -> QTensor:
    """Returns the experts' weights as one."""
    first, found = experts[0], {}
    tables = [expert.inner_tensors() for expert in experts]
    if any("column" in table for table in tables):  # experts that are better without input scales
        ones = next(torch.ones_like(table["column"]) for table in tables if "column" in table)
        tables = [{"column": ones, **table} for table in tables]
    for name in tables[0]:
        found[name] = tables[0][name] if name == "codebook" else torch.stack([table[name] for table in tables])
    tensor = QTensor(
        **found,
        qtype=first.qtype,
        shape=layer.parameter.shape,
        dtype=layer.parameter.dtype,
        axis=layer.planned.axis,
        group_size=first.group_size,
        transposed=first.transposed,
        scale_bits=first.scale_bits,
        zeros=first.zeros,
        rotation=first.rotation,
    )
    tensor.activation = layer.planned.options.activations
    return tensor


def _log(layer: Layer, counts: list[int], columns: int) -> None:
    few = [count for count in counts if count < columns]
    if few:
        logger.warning(
            "%s: %d of %d experts saw fewer than %d tokens (the fewest: %d); their second moments are mixed with that of "
            "all experts' tokens. More samples make them more accurate.",
            *(layer.name, len(few), len(counts), columns, min(few)),
        )
