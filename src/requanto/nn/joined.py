"""Linear layers that read one tensor and are computed together: `requanto.join_layers` gives them these classes.

The first layer of a set that is called with a tensor computes the results of all of them (`requanto.linear.joint`);
the others return theirs when they are called with the same tensor. A result is used only if nothing has changed: the
same tensor object with the same version, the same weights and biases, the same modes (autograd, inference, autocast)
and stream. Results are dropped with the tensor that they were computed from, at the latest. Whatever does not fit
runs as without a set.
"""

from __future__ import annotations

import logging
import weakref
from typing import Any, NamedTuple

import torch
from torch import nn

from requanto.linear.joint import PLAIN, forget, in_one_launch, why_separate
from requanto.nn.direct_linear import DirectLinear
from requanto.nn.modules import QLinear
from requanto.runtime.tracing import needs_gradient
from requanto.tensor.qtensor import QTensor

logger = logging.getLogger(__name__)

#: So often may results be computed that a layer of the set does not ask for; then the set is separated.
MOST_UNUSED = 3


class _Results(NamedTuple):
    """What the first layer of a set has computed for the others.

    Attributes:
        x: the input; the entry ends with it.
        state: its version and the modes (`_state_of`).
        weights, biases: those of all layers.
        versions: of the storages of the weights, and of the biases.
        outs: results that were not asked for yet, by place.
    """

    x: weakref.ref[torch.Tensor]
    state: tuple
    weights: list[QTensor]
    biases: list[torch.Tensor | None]
    versions: list[tuple]
    outs: dict[int, torch.Tensor]


class JoinedSet:
    """Layers that read one tensor. Each holds the set, and the set knows them without keeping them alive.

    Attributes:
        layers: a reference to each layer, in the order in which they are called.
        off: why the layers are computed one by one from now on, or None.
        name: names of the layers in log lines.
    """

    def __init__(self, count: int, name: str) -> None:
        self.layers: list[weakref.ref[nn.Linear] | None] = [None] * count
        self.name, self.off = name, None
        self._results: dict[int, _Results] = {}
        self._unused = 0
        self._hooks: tuple | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Copied and unpickled layers enter their copy of the set themselves; results stay behind.
        return {"count": len(self.layers), "name": self.name, "off": self.off, "hooks": self._hooks}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["count"], state["name"])  # type: ignore[misc]
        self.off, self._hooks = state["off"], state["hooks"]

    def enter(self, place: int, layer: nn.Linear) -> None:
        """Makes a layer the one at this place."""
        self.layers[place] = weakref.ref(layer)

    def tensors(self) -> tuple[list[QTensor], list[torch.Tensor | None]] | None:
        """Weights and biases of the layers; None if one is gone, or no longer has a quantized weight."""
        weights, biases = [], []
        for one in self.layers:
            layer = None if one is None else one()
            if layer is None:
                return None
            parameters = layer._parameters
            weight = parameters.get("weight")
            if type(weight) is not QTensor:
                return None
            weights.append(weight)
            biases.append(parameters.get("bias"))
        return weights, biases

    def has(self, layer: Any) -> bool:
        """True if the layer is the one at its place, and no copy of it."""
        known = self.layers[layer._place]
        return known is not None and known() is layer

    def output(self, layer: Any, x: torch.Tensor) -> torch.Tensor | None:
        """The result of a layer of the set; None: it must compute it itself."""
        if type(x) not in PLAIN or not self.has(layer):
            return None
        found = self._results.get(id(x))
        if found is not None:
            out = self._take(found, layer, x)
            if out is not None or layer._place:
                return out
        return self._compute(x) if layer._place == 0 else None

    def _take(self, found: _Results, layer: Any, x: torch.Tensor) -> torch.Tensor | None:
        # A tracer's tensors are others than those of the eager call that computed this.
        if found.x() is not x or found.state != _state_of(x):
            return None
        place, parameters = layer._place, layer._parameters
        weight, bias = parameters.get("weight"), parameters.get("bias")
        if weight is not found.weights[place] or bias is not found.biases[place]:
            return None
        if found.versions[place] != _version(weight, bias) or needs_gradient(x, bias):
            return None
        out = found.outs.pop(place, None)  # each once: two callers must not get one tensor
        if not found.outs:
            self._results.pop(id(x), None)
            self._unused = 0
        return out

    def _compute(self, x: torch.Tensor) -> torch.Tensor | None:
        found = self.tensors()
        if found is None:
            self.turn_off("a layer was replaced")
            return None
        if x.is_inference() and self.hooks() != self._hooks:
            return None  # a hook that was added since may change x in place, which inference tensors do not tell
        weights, biases = found
        outs = in_one_launch(x, weights, biases)
        if outs is None:
            return None
        key = id(x)
        self._drop(key)
        versions = [_version(weight, bias) for weight, bias in zip(weights, biases)]
        ours = weakref.ref(self)

        def ended(_: object) -> None:
            it = ours()
            if it is not None:
                it._drop(key)

        results = dict(enumerate(outs))
        first = results.pop(0)
        self._results[key] = _Results(weakref.ref(x, ended), _state_of(x), weights, biases, versions, results)
        return first

    def _drop(self, key: int) -> None:
        found = self._results.pop(key, None)
        if found is None or not found.outs:
            return
        self._unused += 1
        if self._unused >= MOST_UNUSED:
            self.turn_off(f"{len(found.outs)} results were not asked for, {self._unused} times in a row")

    def hooks(self) -> tuple:
        """Ids of the hooks of the layers, which grow with each new one."""
        found = [None if one is None else one() for one in self.layers]
        return tuple((*layer._forward_pre_hooks, -1, *layer._forward_hooks) for layer in found if layer is not None)

    def checked(self) -> None:
        """Notes the hooks with which a trial has shown that layers read the same values."""
        self._hooks = self.hooks()

    def turn_off(self, why: str) -> None:
        """Computes the layers one by one from now on, and logs why."""
        if self.off is None:
            self.off = why
            logger.info("%s: computed one by one from now on: %s", self.name, why)
        self._results.clear()
        first = None if self.layers[0] is None else self.layers[0]()
        weight = None if first is None else first._parameters.get("weight")
        if isinstance(weight, QTensor):
            forget(weight)


def _state_of(x: torch.Tensor) -> tuple:
    """What must not change until results are taken: x's version (inference tensors have none), the modes, the stream."""
    stream = 0
    if x.is_cuda:
        stream = torch._C._cuda_getCurrentRawStream(x.get_device())  # type: ignore[attr-defined]
    elif x.is_xpu:
        stream = torch._C._xpu_getCurrentRawStream(x.get_device())  # type: ignore[attr-defined]
    version = None if x.is_inference() else x._version
    modes = torch.is_inference_mode_enabled(), torch.is_grad_enabled(), torch._C._is_any_autocast_enabled()  # type: ignore[attr-defined]
    return version, modes, stream


def _version(weight: Any, bias: torch.Tensor | None) -> tuple[int, int | None]:
    return weight._storage.version, None if bias is None or bias.is_inference() else bias._version


def _forward(layer: Any, input: torch.Tensor, alone: Any) -> torch.Tensor:
    joined = layer._joined
    if joined is None or joined.off is not None:
        return alone(layer, input)
    if torch.compiler.is_compiling():
        found = joined.tensors() if joined.has(layer) and not torch.compiler.is_exporting() else None
        if found is None:
            return alone(layer, input)
        return torch.ops.requanto.linear_of_set(input, found[0], found[1], layer._place)
    out = joined.output(layer, input)
    return alone(layer, input) if out is None else out


class _Joined:
    """What both classes have in common."""

    #: the set, and the layer's place in it
    _joined: JoinedSet | None = None
    _place: int = 0

    def others_in_one_launch(self, rows: int, dtype: torch.dtype) -> list[str]:
        """Last parts of the names of the layers that are computed together with this one, for so many rows of x."""
        joined = self._joined
        found = None if joined is None or joined.off is not None else joined.tensors()
        if joined is None or found is None or not joined.has(self):
            return []
        weight = found[0][0]
        if why_separate(found[0], rows, weight.shape[1], dtype, weight.device) is not None:
            return []
        names = [name.rpartition(".")[2] for name in joined.name.split(", ")]
        return names[: self._place] + names[self._place + 1 :]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        joined = self._joined
        if joined is not None and joined.layers[self._place] is None:
            joined.enter(self._place, self)  # type: ignore[arg-type]
        else:  # a shallow copy is no layer of the set
            self.__dict__.pop("_joined", None)


class JoinedLinear(_Joined, nn.Linear):
    """nn.Linear with a quantized weight, in a set of layers that are computed together."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _forward(self, input, nn.Linear.forward)


class JoinedDirectLinear(_Joined, DirectLinear):
    """DirectLinear in a set of layers that are computed together."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _forward(self, input, DirectLinear.forward)


class JoinedQLinear(_Joined, QLinear):
    """QLinear with a frozen weight and float activations, in a set of layers that are computed together."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _forward(self, input, QLinear.forward)


#: class of a layer -> its class in a set
JOINED: dict[type, type] = {nn.Linear: JoinedLinear, DirectLinear: JoinedDirectLinear, QLinear: JoinedQLinear}
