"""Quantization with samples, one block at a time, each on the outputs of the quantized blocks before it.

For every chain of blocks (`requanto.methods.chains`) the inputs of the first block are stored. Then, block by block, moments
of the layers' inputs are computed, the layers are quantized, and the block runs again to compute the inputs of the next.
Layers outside of chains are quantized with runs of the whole model. Memory in addition to the model: the samples' hidden
states (float and quantized ones if errors of earlier blocks are corrected), a copy of one block, and its moments.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from requanto.config.plan import PlannedWeight
from requanto.methods.block import Block, Carried
from requanto.methods.chains import Chain, find_lists
from requanto.methods.experts import quantize_experts
from requanto.methods.layers import Layer, needs_full, scale_inputs
from requanto.methods.method import Method
from requanto.methods.moments import InputHooks, Moments
from requanto.methods.resume import Resume
from requanto.methods.samples import Samples
from requanto.methods.selection import find_layers

logger = logging.getLogger(__name__)

#: Layers outside of chains are quantized in at most this many groups, because each group needs runs of the whole model.
MOST_GROUPS = 32
#: A group's second moments take at most this many bytes, which may cost more groups: those of convolutions are large.
MOST_BYTES = 2 * 2**30


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
        model: any model; it runs on its current device.
        planned: full parameter name -> how to quantize it (`requanto.config.plan.plan`).
        samples: calibration samples.
        method: how weights are rounded.
        resume: where finished blocks are stored.
        progress: show a progress bar.

    Raises:
        ValueError: the samples reach no layer, the method does not support a type, or inputs hold NaN.
    """
    layers, experts, others = find_layers(model, planned)
    if not layers and not experts:
        raise ValueError(
            f"none of the {len(planned)} weights to quantize (e.g. {next(iter(planned), 'none')}) belongs to a Linear "
            f"layer, a Conv1D, a convolution or fused experts, and samples are used only for these: leave calibration= out"
        )
    for layer in (*layers, *experts):
        method.check(layer)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            _Engine(model, layers, experts, samples, method, resume, progress).run()
            for layer in others:
                layer.set_parameter(layer.planned.quantize(layer.parameter, layer.name))
    finally:
        model.train(was_training)


class _Engine:
    def __init__(
        self,
        model: nn.Module,
        layers: list[Layer],
        experts: list[Layer],
        samples: Samples,
        method: Method,
        resume: Resume | None,
        progress: bool,
    ) -> None:
        self.model, self.layers, self.samples, self.method = model, layers, samples, method
        self.experts, self.resume, self.progress = experts, resume, progress
        self.bar: Any = None

    def run(self) -> None:
        holding = {module for layer in self.layers for module in layer.modules}
        holding |= {module for layer in self.experts for module in layer.owners}
        lists = list(find_lists(self.model, holding))
        order, missing = self.order()
        if not order and not self.experts:
            raise ValueError(
                f"the samples reached none of the {len(self.layers)} layers to quantize (e.g. {self.layers[0].name}): "
                f"calibration must run this model"
            )
        home = {}
        for name, blocks in lists:
            inside = {module for block in blocks for module in block.modules()}
            home |= {layer: name for layer in order if any(m in inside for m in layer.modules)}
            home |= {layer: name for layer in self.experts if any(m in inside for m in layer.owners)}
        blocks_of = dict(lists)
        work: list[tuple[str | None, list[Layer]]] = []
        for layer in order:
            name = home.get(layer)
            if name is None:
                work.append((None, [layer]))
            elif name not in [done for done, _ in work]:
                work.append((name, [other for other in order if home.get(other) == name]))
        names = [name for name, _ in work]
        work += [
            (name, []) for name in dict.fromkeys(home.values()) if name not in names
        ]  # blocks with nothing but experts
        work = self.merged(work)
        alone = [layer for layer in self.experts if layer not in home]
        total = sum(len(blocks_of[name]) if name is not None else 1 for name, _ in work)
        with tqdm(total=total, desc=self.method.name, unit="block", disable=not self.progress) as self.bar:
            for name, inside in work:
                if name is None:
                    self.whole_model(inside)
                    self.bar.update()
                else:
                    self.chain(Chain(name, blocks_of[name]), inside)
            if alone:
                self.whole_model_experts(alone)
        for layer in missing:
            logger.warning("%s never saw an input: quantized without samples", layer.name)
            layer.set_parameter(layer.planned.quantize(layer.parameter, layer.name))

    def order(self) -> tuple[list[Layer], list[Layer]]:
        """Returns (layers in the order of their first call, layers that no sample reaches)."""
        owner = {module: layer for layer in self.layers for module in layer.modules}
        called: dict[Layer, None] = {}
        with InputHooks(owner, lambda module, given: called.setdefault(owner[module])):
            for _ in self.samples.run(self.model):
                if len(called) == len(self.layers):
                    break
        return list(called), [layer for layer in self.layers if layer not in called]

    def merged(self, work: list[tuple[str | None, list[Layer]]]) -> list[tuple[str | None, list[Layer]]]:
        """Merges consecutive layers outside of chains into about MOST_GROUPS groups, whose moments fit into MOST_BYTES."""
        singles = sum(name is None for name, _ in work)
        size = -(-singles // MOST_GROUPS)
        grouped: list[tuple[str | None, list[Layer]]] = []

        def fits(more: list[Layer]) -> bool:
            name, held = grouped[-1] if grouped else ("", [])
            squares = sum(layer.columns**2 for layer in (*held, *more))
            return name is None and len(held) < size and 4 * squares <= MOST_BYTES

        for name, layers in work:
            if name is None and fits(layers):
                grouped[-1][1].extend(layers)
            else:
                grouped.append((name, list(layers)))
        return grouped

    # ------------------------------------------------------------------ outside of chains

    def whole_model(self, layers: list[Layer]) -> None:
        """Quantizes layers with a run of the whole model on all samples."""
        key = layers[0].name
        if self.resume is not None and self.resume.restore(key, layers):
            return
        moments = {
            layer: Moments(layer.columns, layer.parameter.device, self.method.full or needs_full(layer), paired=False)
            for layer in layers
        }
        owner = {module: layer for layer in layers for module in layer.modules}
        with InputHooks(owner, lambda m, x: moments[owner[m]].add_inputs(m, x)):
            for _ in self.samples.run(self.model):
                pass
        logger.info("%s: quantized with a run of the whole model", ", ".join(layer.name for layer in layers))
        for layer in layers:
            if self.method.folds and moments[layer].rows:
                scale_inputs([layer], moments[layer], self.method)
            layer.round(moments[layer], self.method)
        self.finish(key, layers)

    def whole_model_experts(self, experts: list[Layer]) -> None:
        """Quantizes fused experts with runs of the whole model."""
        key = f"{experts[0].name}.experts"
        if self.resume is not None and self.resume.restore(key, experts):
            return
        logger.info("%s: quantized with runs of the whole model", ", ".join(layer.name for layer in experts))
        quantize_experts(experts, lambda: list(self.samples.run(self.model)), self.method)
        self.finish(key, experts)

    # ------------------------------------------------------------------ chains

    def chain(self, chain: Chain, layers: list[Layer]) -> None:
        """Quantizes the layers of a chain, one block at a time."""
        records = chain.capture(self.model, self.samples)
        if records is None:
            logger.info(
                "%s: blocks do not run on each other's outputs; each is quantized with a run of the whole model",
                chain.name,
            )
            for block in chain.blocks:
                inside = set(block.modules())
                self.whole_model_if_any([layer for layer in layers if any(m in inside for m in layer.modules)])
                experts = [layer for layer in self.experts if any(m in inside for m in layer.owners)]
                if experts:
                    self.whole_model_experts(experts)
                self.bar.update()
            return
        logger.info(
            "%s: stored the inputs of %d runs through %d blocks, %.1f MB",
            chain.name,
            len(records),
            len(chain.blocks),
            sum(r.nbytes() for r in records) / 2**20,
        )
        carried: Carried = [[] for _ in records]
        float_carried: Carried = [[] for _ in records]
        for index, module in enumerate(chain.blocks):
            block = Block(chain, index, records, carried, float_carried, self.method)
            inside = set(module.modules())
            block_layers = [layer for layer in layers if any(m in inside for m in layer.modules)]
            experts = [layer for layer in self.experts if any(m in inside for m in layer.owners)]
            key, both = f"{chain.name}.{index}", block_layers + experts
            if both and not (self.resume is not None and self.resume.restore(key, both, module)):
                if block_layers:
                    block.quantize(block_layers)
                if experts:
                    quantize_experts(experts, block.run_all, self.method)
                self.finish(key, both, module)
            if index + 1 < len(chain.blocks):
                carried = block.outputs()
                if self.method.paired:
                    float_carried = block.float_outputs()
            self.bar.update()

    def whole_model_if_any(self, layers: list[Layer]) -> None:
        if layers:
            self.whole_model(layers)

    # ------------------------------------------------------------------ layers

    def finish(self, key: str, layers: list[Layer], block: nn.Module | None = None) -> None:
        """Sets the quantized weights on their modules, and writes them to disk if ``resume`` is given."""
        for layer in layers:
            layer.finish()
        if self.resume is not None:
            self.resume.save(key, layers, block)
