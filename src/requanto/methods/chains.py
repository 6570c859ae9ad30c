"""Chains of blocks, which can be run one block at a time on stored inputs.

A chain is a ``ModuleList`` (or ``Sequential``) whose members run one after another, each on outputs of the one before. One
run of the model shows, by tensor identity, which inputs of a block are outputs of the block before and which come from
elsewhere (masks, position embeddings, a time embedding). A `Record` stores the inputs of the first block and all inputs that
come from elsewhere; the rest of the model is then not needed.

If a block takes no output of the block before, as in a U-Net, there is no chain, and the engine runs the whole model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from requanto.methods.samples import Samples, Stop


@dataclass(frozen=True)
class _Output:
    """A block's input that is a leaf of the output of the block before."""

    index: int


@dataclass(frozen=True)
class _Stored:
    """A block's input that is stored in the record."""

    index: int


@dataclass
class Record:
    """The inputs of all blocks in one run through a chain.

    Attributes:
        calls: for each block, its arguments as leaves (`_Output`, `_Stored` or plain values) and their tree.
        stored: inputs that are not outputs of the block before: (tensor on the CPU, device to run on).
    """

    calls: list[tuple[list[Any], Any]] = field(default_factory=list)
    stored: list[tuple[torch.Tensor, torch.device]] = field(default_factory=list)

    def nbytes(self) -> int:
        """Returns the bytes of the stored tensors."""
        return sum(t.nbytes for t, _ in self.stored)


class Chain:
    """Blocks of one list that run one after another."""

    def __init__(self, name: str, blocks: list[nn.Module]) -> None:
        self.name, self.blocks = name, blocks

    def capture(self, model: nn.Module, samples: Samples) -> list[Record] | None:
        """Runs the model on all samples and records the blocks' inputs; None if the blocks are not a chain."""
        recorder = _Recorder(self.blocks, samples.may_stop)
        try:
            for _ in samples.run(model):
                recorder.finish()
                if recorder.broken:
                    return None
        finally:
            recorder.close()
        return None if recorder.broken or not recorder.records else recorder.records

    def inputs(self, record: Record, index: int, carried: list[Any]) -> tuple[tuple, dict[str, Any]]:
        """Returns the arguments of a block."""
        leaves, tree = record.calls[index]
        return pytree.tree_unflatten([_resolve(leaf, record, carried) for leaf in leaves], tree)

    def used_outputs(self, record: Record, index: int) -> set[int]:
        """Returns the indices of the output leaves of block ``index`` that the next block takes."""
        if index + 1 >= len(self.blocks):
            return set()
        return {leaf.index for leaf in record.calls[index + 1][0] if isinstance(leaf, _Output)}


def _resolve(leaf: Any, record: Record, carried: list[Any]) -> Any:
    if isinstance(leaf, (_Output, _Stored)):
        tensor, device = (carried if isinstance(leaf, _Output) else record.stored)[leaf.index]
        return tensor.to(device, copy=True)  # blocks may write into their inputs
    return leaf


class _Recorder:
    """Hooks on the blocks of one list that record their inputs."""

    def __init__(self, blocks: list[nn.Module], may_stop: bool) -> None:
        self.blocks, self.may_stop = blocks, may_stop
        self.records: list[Record] = []
        self.broken = False
        self._template: Record | None = None
        self._record: Record | None = None
        #: the original tensors of ``Record.stored``, in its order
        self._seen: list[Any] = []
        self._outputs: list[Any] = []
        self._hooks = []
        for index, block in enumerate(blocks):
            self._hooks.append(block.register_forward_pre_hook(self._before(index), with_kwargs=True))
            self._hooks.append(block.register_forward_hook(self._after))

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def finish(self) -> None:
        """Stores the record of a run that has ended; marks the chain as broken if it did not reach the last block."""
        record, self._record = self._record, None
        self._seen, self._outputs = [], []
        if record is None:
            return
        if len(record.calls) != len(self.blocks):
            self.broken = True
            return
        self.records.append(record)
        # If later blocks take no stored tensor that the first one does not take, other runs can stop at the first block.
        first = {leaf.index for leaf in record.calls[0][0] if isinstance(leaf, _Stored)}
        later = {leaf.index for leaves, _ in record.calls[1:] for leaf in leaves if isinstance(leaf, _Stored)}
        if self.may_stop and later <= first:
            self._template = record

    def _before(self, index: int) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if self.broken:
                return
            if index == 0:
                self.finish()
                self._record = Record()
            record = self._record
            if record is None or len(record.calls) != index:
                self.broken = True
                return
            leaves, tree = pytree.tree_flatten((args, kwargs))
            if any("Cache" in type(leaf).__name__ for leaf in leaves):
                self.broken = True  # a cache grows with every call, so a block cannot run twice
                return
            found = [self._reference(record, leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
            if index and not any(isinstance(leaf, _Output) for leaf in found):
                self.broken = True
                return
            record.calls.append((found, tree))
            template = self._template
            if index == 0 and template is not None and _alike(template.calls[0], record.calls[0]):
                record.calls = list(template.calls)
                self.finish_early(record)
                raise Stop

        return hook

    def finish_early(self, record: Record) -> None:
        """Stores a record whose later blocks have the same calls as the template."""
        self.records.append(record)
        self._record, self._seen, self._outputs = None, [], []

    def _reference(self, record: Record, tensor: torch.Tensor) -> Any:
        for index, output in enumerate(self._outputs):
            if output is tensor:
                return _Output(index)
        for index, seen in enumerate(self._seen):
            if seen is tensor:
                return _Stored(index)
        self._seen.append(tensor)
        record.stored.append((tensor.detach().to("cpu", copy=True), tensor.device))
        return _Stored(len(self._seen) - 1)

    def _after(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._outputs = pytree.tree_leaves(output)


def _alike(one: tuple[list[Any], Any], two: tuple[list[Any], Any]) -> bool:
    if one[1] != two[1] or len(one[0]) != len(two[0]):
        return False
    same = zip(one[0], two[0], strict=True)
    return all(type(a) is type(b) and (a is b or (isinstance(a, _Stored) and a == b) or _equal(a, b)) for a, b in same)


def _equal(a: Any, b: Any) -> bool:
    return isinstance(a, (bool, int, float, str)) and a == b


def find_lists(model: nn.Module, holds: set[nn.Module]) -> Iterator[tuple[str, list[nn.Module]]]:
    """Yields (dotted name, all members) of the outermost lists most of whose members contain modules of ``holds``.

    Args:
        model: any model.
        holds: modules to be quantized.
    """

    def search(name: str, module: nn.Module) -> Iterator[tuple[str, list[nn.Module]]]:
        members = list(module.children())
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and members:
            holding = [m for m in members if any(inner in holds for inner in m.modules())]
            if holding and not any(m in holds for m in holding) and len(holding) * 2 > len(members):
                yield name, members
                return
        for child, inner in module.named_children():
            if inner not in holds:
                yield from search(f"{name}.{child}" if name else child, inner)

    yield from search("", model)
