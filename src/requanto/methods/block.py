"""One block of a chain: runs it on the samples, float and quantized, and quantizes its layers."""

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
from requanto.methods.layers import Layer, needs_full, scale_inputs
from requanto.methods.method import Method
from requanto.methods.moments import InputHooks, Moments
from requanto.methods.samples import Stop
from requanto.methods.stages import Stage, find_stages

logger = logging.getLogger(__name__)

#: The inputs of the float block's layers are stored up to this many bytes; above, the float block runs again for each stage.
STORED_BYTES = 2 * 2**30

#: For each record, the output leaves of a block that the next one takes: (tensor on the CPU, device to run on).
Carried = list[list[Any]]


class Block:
    """One block of a chain, with its inputs.

    Args:
        chain, index: which block.
        records: recorded runs of the samples (`requanto.methods.chains`).
        carried: outputs of the quantized block before, for each record.
        float_carried: outputs of the float block before; used if the method is ``paired``.
        method: how weights are rounded.
    """

    def __init__(
        self, chain: Chain, index: int, records: list[Record], carried: Carried, float_carried: Carried, method: Method
    ) -> None:
        self.chain, self.index, self.records, self.method = chain, index, records, method
        self.carried, self.float_carried = carried, float_carried
        self.module = chain.blocks[index]
        #: copy of the float block; ``module`` itself if the method does not need it
        self.float_module = copy.deepcopy(self.module) if method.paired else self.module
        self._twins = dict(zip(self.module.modules(), self.float_module.modules(), strict=True))
        self._float_inputs: list[dict[nn.Module, torch.Tensor]] | None = None
        self._float_outputs: list[list[Any]] | None = None
        self._to_tune: dict[Layer, tuple[Grid, Rounded, torch.Tensor]] = {}

    # ------------------------------------------------------------------ runs

    def run(self, number: int) -> list[Any]:
        """Runs the block on a record; returns the leaves of its output, [] if a hook stopped the run."""
        return self._run(self.module, number, self.carried)

    def _run(self, module: nn.Module, number: int, carried: Carried) -> list[Any]:
        args, kwargs = self.chain.inputs(self.records[number], self.index, carried[number])
        try:
            return pytree.tree_leaves(module(*args, **kwargs))
        except Stop:
            return []

    def run_all(self) -> None:
        """Runs the block on all records."""
        for number in range(len(self.records)):
            self.run(number)

    def outputs(self) -> Carried:
        """Runs the block on all records; returns the inputs of the next block."""
        return [self._to_carry(number, self.run(number)) for number in range(len(self.records))]

    def float_outputs(self) -> Carried:
        """Returns the inputs of the next float block."""
        if self._float_outputs is None:
            return [
                self._to_carry(number, self._run(self.float_module, number, self.float_carried))
                for number in range(len(self.records))
            ]
        return [self._to_carry(number, leaves) for number, leaves in enumerate(self._float_outputs)]

    def _to_carry(self, number: int, leaves: list[Any]) -> list[Any]:
        used = self.chain.used_outputs(self.records[number], self.index)
        return [(leaf.cpu(), leaf.device) if i in used else None for i, leaf in enumerate(leaves)]

    # ------------------------------------------------------------------ quantizing

    def quantize(self, layers: list[Layer]) -> None:
        """Quantizes layers of the block; until `Layer.finish` the block holds their dequantized values."""
        stages, missing = find_stages(layers, lambda: self.run(0), self.method.in_turn)
        if missing and len(self.records) > 1:  # experts that the first sample does not use
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
                        self._to_tune[layer] = found
        if self.method.tunes:
            self.tune()
        self._float_inputs = None

    def _run_float(self, leaders: list[nn.Module]) -> None:
        """Runs the float block on all records and stores its layers' inputs and its outputs, if they are small enough."""
        back = {self._twins[module]: module for module in leaders}
        inputs: list[dict[nn.Module, torch.Tensor]] = []
        outputs: list[list[Any]] = []
        for number in range(len(self.records)):
            seen: dict[nn.Module, torch.Tensor] = {}
            with InputHooks(back, lambda m, x: seen.__setitem__(back[m], x.detach().cpu())):  # noqa: B023
                leaves = self._run(self.float_module, number, self.float_carried)
            if not number and sum(x.nbytes for x in seen.values()) * len(self.records) > STORED_BYTES:
                return
            inputs.append(seen)
            outputs.append([leaf.cpu() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves])
        self._float_inputs, self._float_outputs = inputs, outputs

    def gather(self, stage: Stage) -> dict[Layer, Moments]:
        """Returns the second moments of the stage's inputs, by the first layer of each source."""
        moments = {
            source[0]: Moments(
                source[0].columns,
                source[0].parameter.device,
                self.method.full or any(needs_full(layer) for layer in source),
                self.method.paired,
            )
            for source in stage.sources
        }
        leaders = {module: source[0] for source in stage.sources for module in source[0].modules}
        for number in range(len(self.records)):
            float_inputs = self._layer_float_inputs(leaders, number) if self.method.paired else {}
            tokens = self._tokens(number)

            def take(module: nn.Module, given: torch.Tensor) -> None:
                moments[leaders[module]].add_inputs(module, given, _pairable(float_inputs.get(module), tokens))  # noqa: B023

            with InputHooks(leaders, take, stop=True):
                self.run(number)
        return moments

    def _layer_float_inputs(self, leaders: dict[nn.Module, Layer], number: int) -> dict[nn.Module, torch.Tensor]:
        """Returns the inputs of the float block's layers, by the quantized block's modules."""
        if self._float_inputs is not None:
            return self._float_inputs[number]
        back = {self._twins[module]: module for module in leaders}
        seen: dict[nn.Module, torch.Tensor] = {}
        with InputHooks(back, lambda m, x: seen.__setitem__(back[m], x), stop=True):
            self._run(self.float_module, number, self.float_carried)
        return seen

    def _tokens(self, number: int) -> int:
        """Returns the number of tokens in the block's input: rows of its first tensor input."""
        inputs = self.chain.inputs(self.records[number], self.index, self.carried[number])
        first = next(t for t in pytree.tree_leaves(inputs) if isinstance(t, torch.Tensor))
        return first.numel() // max(1, first.shape[-1])

    def fold(self, stage: Stage, moments: dict[Layer, Moments], layers: list[Layer]) -> None:
        """Scales the input channels of the layers.

        The inverse is folded into an earlier module where that is exact; else it becomes part of the layers' column scales.
        """
        left = []
        folds = find_folds(self.module, stage.sources, layers, lambda: self.run(0))
        for source, fold in zip(stage.sources, folds, strict=True):
            seen = moments[source[0]]
            if not seen.rows:
                continue
            if fold is None:
                left += [layer.name for layer in source]
                scale_inputs(source, seen, self.method)
                continue
            scales = self.method.scales(source, seen)
            if scales is not None:
                moments[source[0]] = seen.scaled(fold.apply(scales))
        if left:
            logger.info("%s: the inverse of input scales cannot be folded away exactly", ", ".join(left))

    def tune(self) -> None:
        """Tunes the layers together, towards the float block's outputs."""
        targets = []
        for number, record in enumerate(self.records):
            known = self._float_outputs
            leaves = known[number] if known is not None else self._run(self.float_module, number, self.float_carried)
            used = self.chain.used_outputs(record, self.index) or range(len(leaves))  # all outputs of the last block
            floats = {i: leaf for i, leaf in enumerate(leaves) if torch.is_tensor(leaf) and leaf.is_floating_point()}
            targets.append({i: leaf.cpu() for i, leaf in floats.items() if i in used})
        work = [(layer, *start) for layer, start in self._to_tune.items()]
        self._to_tune = {}
        found = self.method.tune(work, self.run, targets) if work else None
        for (layer, grid, _, _), rounded in zip(work, found or (), strict=False):
            layer.set_rounded(rounded, grid)


def _pairable(float_inputs: torch.Tensor | None, tokens: int) -> torch.Tensor | None:
    """Returns the float inputs if their rows match the quantized model's: the layer sees every token. Else None."""
    if float_inputs is None:
        return None
    rows = float_inputs.numel() // max(1, float_inputs.shape[-1])
    return None if float_inputs.dim() < 3 and rows != tokens else float_inputs
