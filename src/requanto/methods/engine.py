"""Quantization with samples: a block at a time, each on the inputs that the quantized blocks before it give.

For every chain of blocks (`requanto.methods.chains`) the inputs of the first block are kept; then, block by block, moments
of the layers' inputs are gathered, the layers are quantized, and the block runs once more to make the inputs of the next.
Layers outside of chains are quantized on runs of the whole model. Beside the model, memory holds the samples' hidden states
(twice, float and quantized, where errors of earlier blocks are corrected), a copy of one block, and its moments.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from requanto.methods.chains import Chain, Record, find_lists
from requanto.methods.fold import find_folds
from requanto.methods.gptq import Rounded
from requanto.methods.grid import Grid
from requanto.methods.layers import Layer, find_layers
from requanto.methods.method import Method
from requanto.methods.moments import Inputs, Moments
from requanto.methods.resume import Resume
from requanto.methods.samples import Samples, Stop
from requanto.methods.stages import Stage, find_stages
from requanto.plan import PlannedWeight

logger = logging.getLogger(__name__)

#: Layers outside of chains are quantized in at most this many groups: each costs runs of the whole model.
MOST_GROUPS = 32


def quantize_planned(
    model: nn.Module,
    planned: Mapping[str, PlannedWeight],
    samples: Samples,
    method: Method,
    *,
    resume: Resume | None = None,
    progress: bool = True,
) -> None:
    """Quantizes the planned weights of a model in place.

    Args:
        model: any model; it runs on the device it is on.
        planned: full parameter name -> how (`requanto.plan`).
        samples: what to run it on.
        method: how weights are rounded.
        resume: where finished blocks are kept.
        progress: show a progress bar.

    Raises:
        ValueError: the samples reach no layer; a type that the method cannot make; NaN in inputs.
    """
    layers, others = find_layers(model, planned)
    for layer in layers:
        method.check(layer)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            _Engine(model, layers, samples, method, resume, progress).run()
            for layer in others:
                layer.put(layer.planned.quantize(layer.parameter, layer.name))
    finally:
        model.train(was_training)


class _Engine:
    def __init__(
        self,
        model: nn.Module,
        layers: list[Layer],
        samples: Samples,
        method: Method,
        resume: Resume | None,
        progress: bool,
    ) -> None:
        self.model, self.layers, self.samples, self.method = model, layers, samples, method
        self.resume, self.progress = resume, progress
        self.bar: Any = None
        #: (grid, start, float weight) of the layers that the method will tune
        self.kept: dict[Layer, tuple[Grid, Rounded, torch.Tensor]] = {}

    def run(self) -> None:
        holding = {module for layer in self.layers for module in layer.modules}
        lists = list(find_lists(self.model, holding))
        order, missing = self.order()
        if not order:
            raise ValueError(
                f"the samples reached none of the {len(self.layers)} layers to quantize (e.g. {self.layers[0].name}): does "
                f"calibration run this model, with all its parts?"
            )
        home = {}
        for name, blocks in lists:
            inside = {module for block in blocks for module in block.modules()}
            home |= {layer: name for layer in order if any(m in inside for m in layer.modules)}
        blocks_of = dict(lists)
        work: list[tuple[str | None, list[Layer]]] = []
        for layer in order:
            name = home.get(layer)
            if name is None:
                work.append((None, [layer]))
            elif name not in [done for done, _ in work]:
                work.append((name, [other for other in order if home.get(other) == name]))
        work = self.merged(work)
        total = sum(len(blocks_of[name]) if name is not None else 1 for name, _ in work)
        with tqdm(total=total, desc=self.method.name, unit="block", disable=not self.progress) as self.bar:
            for name, inside in work:
                if name is None:
                    self.whole_model(inside)
                    self.bar.update()
                else:
                    self.chain(Chain(name, blocks_of[name]), inside)
        for layer in missing:
            logger.warning("%s never saw an input: quantized without samples", layer.name)
            layer.put(layer.planned.quantize(layer.parameter, layer.name))

    def order(self) -> tuple[list[Layer], list[Layer]]:
        """(layers in the order of their first call on the first sample, layers that no sample reaches)."""
        owner = {module: layer for layer in self.layers for module in layer.modules}
        called: dict[Layer, None] = {}
        with Inputs(owner, lambda module, given: called.setdefault(owner[module])):
            for _ in self.samples.run(self.model):
                if len(called) == len(self.layers):
                    break
        return list(called), [layer for layer in self.layers if layer not in called]

    def merged(self, work: list[tuple[str | None, list[Layer]]]) -> list[tuple[str | None, list[Layer]]]:
        """Neighbouring single layers in groups, so that there are no more than MOST_GROUPS of them."""
        singles = sum(name is None for name, _ in work)
        size = -(-singles // MOST_GROUPS)
        grouped: list[tuple[str | None, list[Layer]]] = []
        for name, layers in work:
            if name is None and grouped and grouped[-1][0] is None and len(grouped[-1][1]) < size:
                grouped[-1][1].extend(layers)
            else:
                grouped.append((name, list(layers)))
        return grouped

    # ------------------------------------------------------------------ outside of chains

    def whole_model(self, layers: list[Layer]) -> None:
        """Quantizes layers on runs of the whole model."""
        key = layers[0].name
        if self.resume is not None and self.resume.restore(key, layers):
            return
        sources = [[layer] for layer in layers]
        moments = self.empty(sources, paired=False)
        owner = {module: layer for layer in layers for module in layer.modules}
        with Inputs(owner, lambda m, x: moments[owner[m]].add(x), stop=False):
            for _ in self.samples.run(self.model):
                pass
        logger.info("%s: quantized on a run of the whole model", ", ".join(layer.name for layer in layers))
        for layer in layers:
            self.quantize(layer, moments[layer])
        self.finish(key, layers)

    # ------------------------------------------------------------------ chains

    def chain(self, chain: Chain, layers: list[Layer]) -> None:
        """Quantizes the layers of a chain, a block at a time."""
        records = chain.capture(self.model, self.samples)
        if records is None:
            logger.info("%s: blocks do not feed one another; each is quantized on a run of the whole model", chain.name)
            for block in chain.blocks:
                inside = set(block.modules())
                self.whole_model_if_any([layer for layer in layers if any(m in inside for m in layer.modules)])
                self.bar.update()
            return
        logger.info(
            "%s: %d runs through %d blocks are kept, %.1f MB",
            chain.name,
            len(records),
            len(chain.blocks),
            sum(r.nbytes() for r in records) / 2**20,
        )
        carried: list[list[Any]] = [[] for _ in records]
        wanted: list[list[Any]] = [[] for _ in records]
        for index, block in enumerate(chain.blocks):
            inside = set(block.modules())
            mine = [layer for layer in layers if any(m in inside for m in layer.modules)]
            reference = copy.deepcopy(block) if self.method.paired else block
            key = f"{chain.name}.{index}"
            if mine and not (self.resume is not None and self.resume.restore(key, mine, block)):
                self.block(chain, index, records, carried, wanted, reference, mine)
                self.finish(key, mine, block)
            if index + 1 < len(chain.blocks):
                carried = [self.onward(chain, r, index, c) for r, c in zip(records, carried, strict=True)]
                if self.method.paired:
                    wanted = [self.onward(chain, r, index, w, reference) for r, w in zip(records, wanted, strict=True)]
            self.bar.update()

    def whole_model_if_any(self, layers: list[Layer]) -> None:
        if layers:
            self.whole_model(layers)

    def block(
        self,
        chain: Chain,
        index: int,
        records: list[Record],
        carried: list[list[Any]],
        wanted: list[list[Any]],
        reference: nn.Module,
        layers: list[Layer],
    ) -> None:
        """Quantizes the layers of one block."""
        block = chain.blocks[index]

        def run_first() -> list[Any]:
            return self.run_block(block, chain, records[0], index, carried[0])

        stages, missing = find_stages(layers, run_first, self.method.in_turn)
        twin = dict(zip(block.modules(), reference.modules(), strict=True))
        if missing and len(records) > 1:  # experts that the first sample does not choose
            stages = (
                [Stage([*stages[0].sources, *([layer] for layer in missing)])]
                if len(stages) == 1
                else [
                    *stages,
                    Stage([[layer] for layer in missing]),
                ]
            )
        for stage in stages:
            moments = self.empty(stage.sources, self.method.paired)
            leaders = {module: source[0] for source in stage.sources for module in source[0].modules}
            for record, mine, theirs in zip(records, carried, wanted, strict=True):
                ideal: dict[nn.Module, torch.Tensor] = {}
                if self.method.paired:
                    back = {twin[module]: module for module in leaders}
                    with Inputs(back, lambda m, x: ideal.__setitem__(back[m], x), stop=True):  # noqa: B023
                        self.run_block(reference, chain, record, index, theirs)
                tokens = _rows(chain, record, index, mine)
                with Inputs(leaders, lambda m, x: moments[leaders[m]].add(x, _pair(ideal.get(m), tokens)), stop=True):  # noqa: B023
                    self.run_block(block, chain, record, index, mine)
            if self.method.folds:
                self.fold(block, stage, moments, layers, run_first)
            for source in stage.sources:
                for layer in source:
                    self.quantize(layer, moments[source[0]], in_block=True)

        if self.method.tunes:
            self.tune(
                chain, index, records, carried, wanted, reference, [layer for layer in layers if layer in self.kept]
            )

    def tune(
        self,
        chain: Chain,
        index: int,
        records: list[Record],
        carried: list[list[Any]],
        wanted: list[list[Any]],
        reference: nn.Module,
        layers: list[Layer],
    ) -> None:
        """Lets the method improve the layers of a block together, on the float block's outputs."""
        targets = []
        for record, given in zip(records, wanted, strict=True):
            leaves = self.run_block(reference, chain, record, index, given)
            passed = chain.wanted(record, index) or range(len(leaves))  # of the last block, whatever it puts out
            floats = {i: leaf for i, leaf in enumerate(leaves) if torch.is_tensor(leaf) and leaf.is_floating_point()}
            targets.append({i: leaf.cpu() for i, leaf in floats.items() if i in passed})
        work = [(layer, *self.kept.pop(layer)) for layer in layers]
        found = self.method.tune(
            work,
            lambda number: self.run_block(chain.blocks[index], chain, records[number], index, carried[number]),
            targets,
        )
        for (layer, grid, _, _), rounded in zip(work, found or (), strict=False):
            layer.quantized = layer.tensor(rounded, grid)
            layer.show(rounded.values)

    def fold(
        self,
        block: nn.Module,
        stage: Stage,
        moments: dict[Layer, Moments],
        layers: list[Layer],
        run: Callable[[], list[Any]],
    ) -> None:
        """Scales the input channels of a block's layers, where the inverse can be folded away."""
        left = []
        for source, fold in zip(stage.sources, find_folds(block, stage.sources, layers, run), strict=True):
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

    def run_block(self, block: nn.Module, chain: Chain, record: Record, index: int, carried: list[Any]) -> list[Any]:
        """Runs a block, or its float twin; [] where a hook ended it."""
        args, kwargs = chain.inputs(record, index, carried)
        try:
            return torch.utils._pytree.tree_leaves(block(*args, **kwargs))
        except Stop:
            return []

    def onward(
        self, chain: Chain, record: Record, index: int, carried: list[Any], block: nn.Module | None = None
    ) -> list[Any]:
        """What the next block is given by this one."""
        leaves = self.run_block(block or chain.blocks[index], chain, record, index, carried)
        wanted = chain.wanted(record, index)
        return [(leaf.cpu(), leaf.device) if i in wanted else None for i, leaf in enumerate(leaves)]

    # ------------------------------------------------------------------ layers

    def empty(self, sources: list[list[Layer]], paired: bool) -> dict[Layer, Moments]:
        return {
            source[0]: Moments(source[0].columns, source[0].parameter.device, self.method.full, paired)
            for source in sources
        }

    def quantize(self, layer: Layer, moments: Moments, in_block: bool = False) -> None:
        """Rounds one layer; its float values stand in the model until the block is finished."""
        if not moments.rows:
            logger.warning("%s never saw an input: quantized without samples", layer.name)
            layer.quantized = layer.planned.quantize(layer.parameter, layer.name)
            return
        grid = layer.grid()
        weight = layer.weight()
        rounded = self.method.round(weight, moments, grid, layer.group_size, layer.name)
        if self.method.tunes and in_block:
            self.kept[layer] = (grid, rounded, weight)
        layer.quantized = layer.tensor(rounded, grid)
        layer.show(rounded.values)

    def finish(self, key: str, layers: list[Layer], block: nn.Module | None = None) -> None:
        """Puts the quantized weights in their places, and on disk."""
        for layer in layers:
            if layer.quantized is not None:
                layer.put(layer.quantized)
            layer.quantized = None
        if self.resume is not None:
            self.resume.keep(key, layers, block)


def _rows(chain: Chain, record: Record, index: int, carried: list[Any]) -> int:
    """Tokens that go through a block: rows of its first tensor input."""
    args, kwargs = chain.inputs(record, index, carried)
    first = next(t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor))
    return first.numel() // max(1, first.shape[-1])


def _pair(ideal: torch.Tensor | None, tokens: int) -> torch.Tensor | None:
    """The float model's inputs, where they stand in the order of the quantized one's: a layer that sees every token."""
    if ideal is None or (ideal.dim() < 3 and ideal.numel() // max(1, ideal.shape[-1]) != tokens):
        return None
    return ideal
