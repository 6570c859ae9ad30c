"""One block of a chain: its runs on the samples, float and quantized, and the quantization of its layers."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from requanto.methods.chains import Chain, Record
from requanto.methods.fold import find_folds
from requanto.methods.gptq import Rounded
from requanto.methods.grid import Grid
from requanto.methods.layers import Layer
from requanto.methods.method import Method
from requanto.methods.moments import Inputs, Moments
from requanto.methods.samples import Stop
from requanto.methods.stages import Stage, find_stages

logger = logging.getLogger(__name__)

#: The float block's inputs of all layers are kept up to this many bytes; beyond, the float block runs again for each stage.
KEEP_BYTES = 2 * 2**30

#: For each record the leaves that a block puts out and the next one takes, on the CPU, with the device they belong on.
Carried = list[list[Any]]


class Block:
    """One block, between the inputs that the blocks before it give and what it gives the next.

    Args:
        chain, index: which block.
        records: the samples' runs (`requanto.methods.chains`).
        carried: what the quantized block before gives, for each record.
        wanted: what the float block before gives; used where the method is ``paired``.
        method: how weights are rounded.
    """

    def __init__(
        self, chain: Chain, index: int, records: list[Record], carried: Carried, wanted: Carried, method: Method
    ) -> None:
        self.chain, self.index, self.records, self.method = chain, index, records, method
        self.carried, self.wanted = carried, wanted
        self.module = chain.blocks[index]
        #: the block as it was; the same object where nobody will ask
        self.float_module = copy.deepcopy(self.module) if method.paired else self.module
        self._twins = dict(zip(self.module.modules(), self.float_module.modules(), strict=True))
        self._float_inputs: list[dict[nn.Module, torch.Tensor]] | None = None
        self._float_outputs: list[list[Any]] | None = None
        self._kept: dict[Layer, tuple[Grid, Rounded, torch.Tensor]] = {}

    # ------------------------------------------------------------------ runs

    def run(self, number: int) -> list[Any]:
        """Runs the block on a record; the leaves of its output, [] where a hook ended it."""
        return self._run(self.module, number, self.carried)

    def _run(self, module: nn.Module, number: int, carried: Carried) -> list[Any]:
        args, kwargs = self.chain.inputs(self.records[number], self.index, carried[number])
        try:
            return pytree.tree_leaves(module(*args, **kwargs))
        except Stop:
            return []

    def outputs(self) -> Carried:
        """What the next block is given."""
        return [self._passed(number, self.run(number)) for number in range(len(self.records))]

    def float_outputs(self) -> Carried:
        """What the next float block is given."""
        if self._float_outputs is None:
            return [
                self._passed(number, self._run(self.float_module, number, self.wanted))
                for number in range(len(self.records))
            ]
        return [self._passed(number, leaves) for number, leaves in enumerate(self._float_outputs)]

    def _passed(self, number: int, leaves: list[Any]) -> list[Any]:
        wanted = self.chain.wanted(self.records[number], self.index)
        return [(leaf.cpu(), leaf.device) if i in wanted else None for i, leaf in enumerate(leaves)]

    # ------------------------------------------------------------------ quantizing

    def quantize(self, layers: list[Layer]) -> None:
        """Quantizes layers of the block; their float values stand in it until `Layer.finish`."""
        stages, missing = find_stages(layers, lambda: self.run(0), self.method.in_turn)
        if missing and len(self.records) > 1:  # experts that the first sample does not choose
            sources = [[layer] for layer in missing]
            stages = [Stage([*stages[0].sources, *sources])] if len(stages) == 1 else [*stages, Stage(sources)]
        leaders = [module for stage in stages for source in stage.sources for module in source[0].modules]
        if self.method.paired:
            self._run_float(leaders)
        for stage in stages:
            moments = self.gather(stage)
            if self.method.folds:
                self.fold(stage, moments, layers)
            for source in stage.sources:
                for layer in source:
                    found = layer.round(moments[source[0]], self.method)
                    if found is not None and self.method.tunes:
                        self._kept[layer] = found
        if self.method.tunes:
            self.tune()
        self._float_inputs = None

    def _run_float(self, leaders: list[nn.Module]) -> None:
        """Runs the float block on everything, once, and keeps what its layers are given and what it puts out."""
        back = {self._twins[module]: module for module in leaders}
        inputs: list[dict[nn.Module, torch.Tensor]] = []
        outputs: list[list[Any]] = []
        for number in range(len(self.records)):
            seen: dict[nn.Module, torch.Tensor] = {}
            with Inputs(back, lambda m, x: seen.__setitem__(back[m], x.detach().cpu())):  # noqa: B023
                leaves = self._run(self.float_module, number, self.wanted)
            if not number and sum(x.nbytes for x in seen.values()) * len(self.records) > KEEP_BYTES:
                return
            inputs.append(seen)
            outputs.append([leaf.cpu() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves])
        self._float_inputs, self._float_outputs = inputs, outputs

    def gather(self, stage: Stage) -> dict[Layer, Moments]:
        """Second moments of the stage's inputs, by the first layer of each source."""
        moments = {
            source[0]: Moments(source[0].columns, source[0].parameter.device, self.method.full, self.method.paired)
            for source in stage.sources
        }
        leaders = {module: source[0] for source in stage.sources for module in source[0].modules}
        for number in range(len(self.records)):
            ideal = self._ideal(leaders, number) if self.method.paired else {}
            tokens = self._tokens(number)

            def take(module: nn.Module, given: torch.Tensor) -> None:
                moments[leaders[module]].add(given, _pair(ideal.get(module), tokens))  # noqa: B023

            with Inputs(leaders, take, stop=True):
                self.run(number)
        return moments

    def _ideal(self, leaders: dict[nn.Module, Layer], number: int) -> dict[nn.Module, torch.Tensor]:
        """What the float block's layers are given."""
        if self._float_inputs is not None:
            return self._float_inputs[number]
        back = {self._twins[module]: module for module in leaders}
        seen: dict[nn.Module, torch.Tensor] = {}
        with Inputs(back, lambda m, x: seen.__setitem__(back[m], x), stop=True):
            self._run(self.float_module, number, self.wanted)
        return seen

    def _tokens(self, number: int) -> int:
        """Tokens that go through the block: rows of its first tensor input."""
        inputs = self.chain.inputs(self.records[number], self.index, self.carried[number])
        first = next(t for t in pytree.tree_leaves(inputs) if isinstance(t, torch.Tensor))
        return first.numel() // max(1, first.shape[-1])

    def fold(self, stage: Stage, moments: dict[Layer, Moments], layers: list[Layer]) -> None:
        """Scales the input channels of the layers, where the inverse can be folded away."""
        left = []
        folds = find_folds(self.module, stage.sources, layers, lambda: self.run(0))
        for source, fold in zip(stage.sources, folds, strict=True):
            seen = moments[source[0]]
            if fold is None or not seen.rows:
                left += source
                continue
            scales = self.method.scales(source, seen)
            if scales is not None:
                moments[source[0]] = seen.scaled(fold.apply(scales))
        if left:
            names = ", ".join(layer.name for layer in left)
            logger.info("%s: no exact place for the inverse of input scales; rounded without them", names)

    def tune(self) -> None:
        """Lets the method improve the layers together, on the float block's outputs."""
        targets = []
        for number, record in enumerate(self.records):
            known = self._float_outputs
            leaves = known[number] if known is not None else self._run(self.float_module, number, self.wanted)
            passed = self.chain.wanted(record, self.index) or range(len(leaves))  # of the last block, all
            floats = {i: leaf for i, leaf in enumerate(leaves) if torch.is_tensor(leaf) and leaf.is_floating_point()}
            targets.append({i: leaf.cpu() for i, leaf in floats.items() if i in passed})
        work = [(layer, *start) for layer, start in self._kept.items()]
        self._kept = {}
        found = self.method.tune(work, self.run, targets) if work else None
        for (layer, grid, _, _), rounded in zip(work, found or (), strict=False):
            layer.take(rounded, grid)


def _pair(ideal: torch.Tensor | None, tokens: int) -> torch.Tensor | None:
    """The float model's inputs, where they stand in the order of the quantized one's: a layer that sees every token."""
    if ideal is None or (ideal.dim() < 3 and ideal.numel() // max(1, ideal.shape[-1]) != tokens):
        return None
    return ideal
