"""Importance of weights: how much their errors change the model's output, from one backward pass per sample.

An error ``E`` of a Linear layer's weight changes its outputs by ``E x`` and the model's output, to second order, by
``1/2 sum_t (g_t^T E x_t)^2``, where ``g_t`` is the gradient at the layer's output for token t. If gradients and inputs are
independent, this is ``1/2 sum_ij E_ij^2 s_i h_j`` with ``s_i = sum_t g_ti^2`` and ``h_j = mean_t x_tj^2``: two vectors per
layer (the diagonal of K-FAC, Martens and Grosse 2015, arXiv:1503.05671). For other weights (convolutions, experts,
embeddings) the squared gradients of all elements are stored.

For a model with logits, the gradient is that of the log-likelihood of tokens sampled from its own predictions, whose mean
square is the Fisher information; the sum above is then the expected Kullback-Leibler divergence in nats. For any other
model it is the gradient of the output along a random direction, and the sum is the expected squared change of the output,
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

#: Maximum number of samples that are run, evenly spaced. Importances need far fewer samples than rounding.
MOST_SAMPLES = 16

_HOOKED = ("linear", "conv1d")


def importances(
    model: nn.Module, planned: Mapping[str, PlannedWeight], calibration: Any, progress: bool = True, seed: int = 0
) -> dict[str, Importance]:
    """Computes the importance of each planned weight, by name.

    Memory: the activations of one sample for its backward pass, two vectors per Linear layer, and twice the gradients of
    other weights.

    Args:
        model: the float model, on the device to run on.
        planned: full parameter name -> how it is to be quantized.
        calibration: samples (`requanto.methods.samples.Samples`).
        seed: seed of the random directions.

    Raises:
        ValueError: no sample reaches a layer, or the model's output cannot be differentiated.
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
                        f"the output of {type(model).__name__} does not depend on the {len(planned)} weights to quantize "
                        f"(e.g. {next(iter(planned))}): the samples must reach them"
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
    """Returns the arguments of the model's calls: the samples, or those captured while a function runs the model."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    found = samples.inputs
    if samples.function is not None:
        found = []

        def capture(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            found.append(pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), (args, dict(kwargs))))

        hook = model.register_forward_pre_hook(capture, with_kwargs=True)
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
        logger.info("%d evenly spaced ones of %d samples are used to choose types", MOST_SAMPLES, len(found))
        found = [found[round(i * (len(found) - 1) / (MOST_SAMPLES - 1))] for i in range(MOST_SAMPLES)]
    return [pytree.tree_map_only(Tensor, lambda t: t.to(device), call) for call in found]


def _probe(output: Any, generator: torch.Generator) -> tuple[Tensor, float]:
    """Returns (scalar to differentiate, normalization of its squared gradients); see the module's docstring."""
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
            f"the model returned no float tensor (found {type(output).__name__}), so the effect of errors cannot be measured"
        )
    direction = torch.randn(tensor.shape, generator=generator, dtype=torch.float32, device="cpu").to(tensor.device)
    return (tensor.float() * direction).sum(), tensor.detach().float().square().sum().item()


def _tensors(output: Any) -> list[Tensor]:
    values = list(output.values()) if isinstance(output, Mapping) else pytree.tree_leaves(output)
    return [t for t in pytree.tree_leaves(values) if isinstance(t, Tensor)]


class _Gatherer:
    """Context manager with hooks that sum the squares of inputs and of output gradients."""

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
                # No earlier layer needs a gradient: the graph starts here.
                output = output.detach().requires_grad_()
            columns = given.detach().reshape(-1, given.shape[-1]).float().square().sum(0)

            def gradient(value: Tensor) -> None:
                # Called once per use of the layer; inputs are added only if a gradient reaches the output.
                rows = value.detach().reshape(-1, value.shape[-1]).float().square().sum(0)
                _add(self.rows, name, rows)
                _add(self.columns, name, columns)
                self.tokens[name] = self.tokens.get(name, 0) + value.numel() // value.shape[-1]

            output.register_hook(gradient)
            return output

        return hook

    def after_backward(self) -> None:
        """Adds the squared parameter gradients of one sample and resets the gradients."""
        for name, parameter in self.others.items():
            if parameter.grad is not None:
                _add(self.weights, name, parameter.grad.detach().float().square())
                parameter.grad = None

    def found(self, scale: float) -> dict[str, Importance]:
        """Returns the importances by name, multiplied by ``scale``.

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
                logger.warning("no sample reached %s: its importance is estimated from its weights only", name)
        return result


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    sums[name] = sums[name] + value if name in sums else value
