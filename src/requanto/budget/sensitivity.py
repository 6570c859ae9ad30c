"""How much each layer's errors change a model's answer, measured on samples with one backward pass each.

An error ``E`` of a Linear layer's weight changes its outputs by ``E x`` and the model's answer, to second order, by
``1/2 sum_t (g_t^T E x_t)^2``: ``g_t`` is the gradient at the layer's output for token t. Taken as independent, outputs
and inputs give ``1/2 sum_ij E_ij^2 s_i h_j`` with ``s_i = sum_t g_ti^2`` and ``h_j = mean_t x_tj^2``: two vectors a
layer, whatever its size (the diagonal of K-FAC, Martens and Grosse 2015, arXiv:1503.05671). Weights that are used in
other ways (convolutions, experts, tables) keep the squares of their own gradients.

Of a model with logits the gradient is that of the log-likelihood of tokens drawn from its own predictions, whose mean
square is the Fisher information: the sum above is then the expected Kullback-Leibler divergence in nats. Of any other
model it is that of the output along a random direction, and the sum is the expected squared change of the output,
relative to the output.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from tqdm import tqdm

from requanto.budget.measure import Importance
from requanto.config.plan import PlannedWeight
from requanto.methods.samples import Samples, Stop, no_cache

logger = logging.getLogger(__name__)

#: Samples that are run; of more, those spread evenly. Importances need far fewer than rounding does.
MOST_SAMPLES = 16

_HOOKED = ("linear", "conv1d")


def importances(
    model: nn.Module, planned: Mapping[str, PlannedWeight], calibration: Any, progress: bool = True, seed: int = 0
) -> dict[str, Importance]:
    """The importance of each planned weight, by its name.

    Memory: the activations of one sample for its backward pass, two vectors a Linear layer, and for other kinds of weights
    their gradients and as much again.

    Args:
        model: float, on the device it is to run on.
        planned: full parameter name -> how it is to be quantized.
        calibration: samples, as `requanto.methods.samples.Samples` takes them.
        seed: of the random directions.

    Raises:
        ValueError: no sample reaches a layer, or nothing that the model returns can be differentiated.
    """
    samples = Samples(calibration)
    calls = _calls(model, samples)
    gatherer = _Gatherer(model, planned)
    was_training, wanted = model.training, {p: p.requires_grad for p in model.parameters()}
    generator = torch.Generator().manual_seed(seed)
    model.eval()
    scale = 0.0
    try:
        for parameter in model.parameters():
            parameter.requires_grad_(any(parameter is other for other in gatherer.others.values()))
        with gatherer, no_cache(model), torch.enable_grad():
            for args, kwargs in tqdm(calls, desc="sensitivity", unit="sample", disable=not progress):
                loss, size = _probe(model(*args, **kwargs), generator)
                if not loss.requires_grad:
                    raise ValueError(
                        f"the answer of {type(model).__name__} does not depend on the {len(planned)} weights to quantize "
                        f"(e.g. {next(iter(planned))}): do the samples reach them?"
                    )
                loss.backward()
                gatherer.after_backward()
                scale += size
    finally:
        model.train(was_training)
        for parameter, needed in wanted.items():
            parameter.requires_grad_(needed)
            if parameter.grad is not None and not needed:
                parameter.grad = None
    return gatherer.found(0.5 / max(scale, 1e-30))


def _calls(model: nn.Module, samples: Samples) -> list[tuple[tuple, dict[str, Any]]]:
    """The arguments of the model's own calls: given, or caught while a function runs it."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    found = samples.inputs
    if samples.function is not None:
        found = []

        def catch(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            found.append(pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), (args, dict(kwargs))))

        hook = model.register_forward_pre_hook(catch, with_kwargs=True)
        try:
            with torch.no_grad():
                samples.function(model)
        except Stop:
            pass
        finally:
            hook.remove()
        if not found:
            raise ValueError(f"the calibration function never called the {type(model).__name__}")
    if len(found) > MOST_SAMPLES:
        logger.info("of %d samples, %d spread evenly are used to choose types", len(found), MOST_SAMPLES)
        found = [found[round(i * (len(found) - 1) / (MOST_SAMPLES - 1))] for i in range(MOST_SAMPLES)]
    return [pytree.tree_map_only(Tensor, lambda t: t.to(device), call) for call in found]


def _probe(output: Any, generator: torch.Generator) -> tuple[Tensor, float]:
    """(what to differentiate, what its squares are measured in): see the module's text."""
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor) and logits.is_floating_point():
        rows = logits.reshape(-1, logits.shape[-1]).float()
        drawn = torch.rand(len(rows), 1, generator=generator, dtype=torch.float32, device="cpu").to(rows.device)
        with torch.no_grad():
            labels = (rows.softmax(-1).cumsum(-1) < drawn).sum(-1).clamp(max=rows.shape[-1] - 1)
        return F.cross_entropy(rows, labels, reduction="sum"), float(len(rows))
    tensor = next((t for t in _tensors(output) if t.is_floating_point() and t.requires_grad), None)
    if tensor is None:
        tensor = next((t for t in _tensors(output) if t.is_floating_point()), None)
    if tensor is None:
        raise ValueError(
            f"the model returned no float tensor ({type(output).__name__}), so no error can be traced to it"
        )
    direction = torch.randn(tensor.shape, generator=generator, dtype=torch.float32, device="cpu").to(tensor.device)
    return (tensor.float() * direction).sum(), tensor.detach().float().square().sum().item()


def _tensors(output: Any) -> list[Tensor]:
    values = list(output.values()) if isinstance(output, Mapping) else pytree.tree_leaves(output)
    return [t for t in pytree.tree_leaves(values) if isinstance(t, Tensor)]


class _Gatherer:
    """Hooks that sum squares of inputs and of output gradients, for the length of a ``with`` block."""

    def __init__(self, model: nn.Module, planned: Mapping[str, PlannedWeight]) -> None:
        modules = dict(model.named_modules())
        self.layers: dict[str, nn.Module] = {}
        self.others: dict[str, nn.Parameter] = {}
        for name, choice in planned.items():
            module, leaf = modules[name.rpartition(".")[0]], name.rpartition(".")[2]
            if choice.kind in _HOOKED:
                self.layers[name] = module
            else:
                self.others[name] = module._parameters[leaf]  # type: ignore[assignment]
        self.rows: dict[str, Tensor] = {}
        self.columns: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = {}
        self._planned = planned
        self._hooks: list[Any] = []

    def __enter__(self) -> _Gatherer:
        for name, module in self.layers.items():
            self._hooks.append(module.register_forward_hook(self._hook(name), with_kwargs=True))
        return self

    def __exit__(self, *exception: Any) -> None:
        for hook in self._hooks:
            hook.remove()

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor:
            given = args[0] if args else kwargs.get("input", kwargs.get("x"))
            if not output.requires_grad:
                # Nothing before this layer needs a gradient: the graph begins here.
                output = output.detach().requires_grad_()
            columns = given.detach().reshape(-1, given.shape[-1]).float().square().sum(0)

            def gradient(value: Tensor) -> None:
                # Once for each use: inputs count only where errors matter.
                rows = value.detach().reshape(-1, value.shape[-1]).float().square().sum(0)
                _add(self.rows, name, rows)
                _add(self.columns, name, columns)
                self.tokens[name] = self.tokens.get(name, 0) + value.numel() // value.shape[-1]

            output.register_hook(gradient)
            return output

        return hook

    def after_backward(self) -> None:
        """Takes the gradients of one sample."""
        for name, parameter in self.others.items():
            if parameter.grad is not None:
                _add(self.weights, name, parameter.grad.detach().float().square())
                parameter.grad = None

    def found(self, scale: float) -> dict[str, Importance]:
        """What was gathered.

        Raises:
            ValueError: no layer was reached.
        """
        if not self.rows and not self.weights:
            raise ValueError("the samples reached none of the layers to quantize")
        result: dict[str, Importance] = {}
        for name in self.layers:
            if name in self.rows:
                result[name] = Importance(self.rows[name] * scale, self.columns[name] / self.tokens[name])
        for name, squares in self.weights.items():
            planned = self._planned[name]
            canonical = squares.transpose(-1, -2) if planned.transposed else squares
            length = canonical.shape[planned.axis + 1 :].numel()
            result[name] = Importance(weights=canonical.reshape(-1, length) * scale)
        for name in self._planned:
            if name not in result:
                logger.warning("%s was reached by no sample: it counts by its weights alone", name)
        return result


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    sums[name] = sums[name] + value if name in sums else value
