"""What a reader finds in a foreign checkpoint: for each quantized weight a line of our format, and what makes its parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch

from requanto.checkpoint.foreign.source import Source
from requanto.checkpoint.format import read_spec
from requanto.tensor.spec import swapped

Parts = dict[str, torch.Tensor]


@dataclass(frozen=True)
class ForeignWeight:
    """A quantized weight that stays quantized.

    Attributes:
        text: its line in our table, such as ``"qint4 1536x576 group=128 zeros affine"`` (docs/format.md).
        sources: names of the stored tensors that it is made of.
        build: reads them and returns the parts of the plain layout by name (``qdata``, ``scale`` ...).
        note: what differs from how the format's own library runs it; empty if nothing does. Logged once for each text.
    """

    text: str
    sources: tuple[str, ...]
    build: Callable[[Source], Parts]
    note: str = ""


@dataclass(frozen=True)
class ForeignFloat:
    """A weight that our format cannot hold: it is dequantized when it is loaded.

    Attributes:
        shape, dtype: of the float weight.
        sources: names of the stored tensors that it is made of.
        build: reads them and returns the float weight.
        reason: why it cannot stay quantized, for the log; empty for a stored float that only needs another name or dtype.
    """

    shape: torch.Size
    dtype: torch.dtype
    sources: tuple[str, ...]
    build: Callable[[Source], torch.Tensor]
    reason: str = ""


@dataclass(frozen=True)
class ForeignActivation:
    """A module whose inputs are quantized with a scale that the checkpoint stores.

    Attributes:
        type: name of our type, such as ``"qint8"`` or ``"qfloat8_e4m3fn"``.
        sources: names of the stored tensors.
        build: reads them and returns the input scale, a float32 scalar: input = scale * code.
    """

    type: str
    sources: tuple[str, ...]
    build: Callable[[Source], torch.Tensor]


@dataclass
class ForeignCheckpoint:
    """All that a reader found. Tensors that are in none of its fields are loaded as they are.

    Attributes:
        format: the format in a user's words, such as ``"GPTQ, 4 bits, group size 128, act-order"``.
        weights: name of the weight (of the float checkpoint: ``"model.layers.0.mlp.up_proj.weight"``) -> what it becomes.
        floats: name -> a weight that is dequantized.
        activations: name of the module -> its static input scale.
        dropped: stored tensors that nothing is made of, such as a ``g_idx`` in order, or ``weight_shape``.
    """

    format: str
    weights: dict[str, ForeignWeight] = field(default_factory=dict)
    floats: dict[str, ForeignFloat] = field(default_factory=dict)
    activations: dict[str, ForeignActivation] = field(default_factory=dict)
    dropped: set[str] = field(default_factory=set)

    @property
    def table(self) -> Mapping[str, str]:
        """Name of each quantized weight -> its line."""
        return {name: weight.text for name, weight in self.weights.items()}

    @property
    def consumed(self) -> set[str]:
        """Names of the stored tensors that are not loaded under their own names."""
        made = (*self.weights.values(), *self.floats.values(), *self.activations.values())
        return self.dropped | {name for one in made for name in one.sources}


def transpose_conv1d(found: ForeignCheckpoint, is_conv1d: Callable[[str], bool]) -> None:
    """Marks the weights of Conv1D layers (GPT-2), in place. Models have them as ``[in, out]``.

    Libraries put a linear layer of their own in the place of a Conv1D, so their files hold ``[out, in]``.

    Args:
        is_conv1d: whether the weight of that name belongs to a Conv1D.
    """
    for name, weight in found.weights.items():
        spec, rank = read_spec(weight.text, name)
        if is_conv1d(name) and not spec.transposed and len(spec.shape) == 2:
            found.weights[name] = replace(weight, text=spec.replace(transposed=True).text(rank))
    for name, one in found.floats.items():
        if is_conv1d(name) and one.reason and len(one.shape) == 2:
            found.floats[name] = replace(
                one, shape=swapped(one.shape), build=lambda source, build=one.build: build(source).t().contiguous()
            )
