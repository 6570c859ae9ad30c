"""Compares two models of one architecture: each layer's weights and outputs, and the model's output.

    result = requanto.report.compare("model", "model-int4")          # directories, or models in memory
    print(result.summary["perplexity_b"], result.summary["kl"])
    result.plot("compare.png")

The weight error is ``|W_a - W_b| / |W_a|``, the output error ``|y_a - y_b| / |y_a|`` (Frobenius norms, over all inputs). The
output error of a layer includes the errors of the layers before it.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from requanto.report._inputs import Tokenizer
from requanto.report.compare_weights import LayerComparison, compare_weights, parameters_of, ratio, total_bytes
from requanto.transforms.fold import RECORD

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Comparison:
    """Result of `compare`.

    Attributes:
        a, b: names of the two models.
        kind: ``"causal_lm"``, ``"masked_lm"``, ``"encoder"``, ``"pipeline"``, ``"run"`` or ``"weights"``.
        layers: one for each weight of two or more axes, in the model's order.
        summary: results for the whole model, by name: ``bytes_a``, ``bytes_b`` and, depending on the kind,
            ``perplexity_a``, ``perplexity_b``, ``perplexity_ratio``, ``kl`` (mean KL(a, b) in nats per token),
            ``top1_agreement``, ``tokens``; ``choice_a``, ``choice_b`` (share of the multiple-choice ``questions`` answered
            rightly), ``choice_difference``; ``cosine_mean``, ``cosine_min`` (of mean-pooled embeddings), ``token_cosine``,
            ``rank_correlation`` (of the similarities of ``pairs`` of passages); ``psnr_mean``, ``psnr_min`` (dB),
            ``images``, and ``top1_agreement`` if the outputs are vectors (scores of classes). Names with ``_error`` are
            standard errors.
        images: pairs of images ``[height, width, channels]`` in 0 .. 1, of a and b; empty if there are none.
    """

    a: str
    b: str
    kind: str
    layers: list[LayerComparison]
    summary: dict[str, float | int]
    images: list[tuple[Any, Any]] = field(default_factory=list, repr=False)

    def to_json(self) -> str:
        """Returns the comparison as JSON without images; values that are not finite (PSNR of equal images) are null."""
        values = {"a": self.a, "b": self.b, "kind": self.kind, "summary": self.summary}
        values["layers"] = [asdict(layer) for layer in self.layers]
        return json.dumps(_finite(values), indent=2, allow_nan=False)

    def plot(self, path: str | Path) -> Path:
        """Plots errors by layer, and the images or the summary, into a PNG file."""
        from requanto.report.compare_plot import plot

        return plot(self, Path(path))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def compare(
    a: Any,
    b: Any,
    *,
    text: str | None = None,
    tokenizer: Tokenizer | None = None,
    run: Callable[[Any, int], Any] | None = None,
    prompts: Sequence[str] = (),
    seeds: int = 4,
    steps: int | None = None,
    window: int = 512,
    max_tokens: int | None = 4096,
    questions: int = 200,
    weights_only: bool = False,
    dtype: str = "auto",
    device: str | None = None,
    progress: bool = True,
) -> Comparison:
    """Compares two models: float and quantized, or two quantized ones.

    Memory: both models as loaded (float weights are memory-mapped), and one layer's output of each.

    Args:
        a, b: directories (of a model, or of a pipeline with model_index.json), names on the hub, models or pipelines.
            ``a`` is the reference.
        text: text for language models and encoders; None: the text that ships with the package.
        tokenizer: for models in memory; directories have their own.
        run: for any other model: ``run(model, seed)`` runs it and returns its output or images (a tensor
            ``[n, channels, height, width]``, arrays, PIL images, or an object with ``.images``). Both get the same seeds.
        prompts: prompts for pipelines that take one.
        seeds: number of seeds (0, 1, ...) for pipelines and ``run``.
        steps: denoising steps of a pipeline; None: its default.
        window: tokens per window.
        max_tokens: maximum number of tokens; None: the whole text.
        questions: multiple-choice questions made of the text for causal language models (`requanto.report.choice`), passages
            whose similarities are ranked for encoders; 0: none.
        weights_only: compare only weights; do not run the models.
        dtype, device: for models loaded from directories.
        progress: show progress bars.

    Raises:
        ValueError: architectures or tokenizers differ, the text is too short, or the models cannot be run.
        FileNotFoundError: no such model.
    """
    from requanto.report import compare_images, compare_text
    from requanto.report.compare_load import Compared

    labels = [str(x) if isinstance(x, (str, Path)) else name for x, name in ((a, "A"), (b, "B"))]
    if a is b and not isinstance(a, (str, Path)):
        raise ValueError("a and b are the same model object; pass the float model and the quantized one")
    if seeds < 1 or questions < 0:
        raise ValueError(f"seeds must be at least 1 and questions at least 0, found {seeds} and {questions}")
    both = Compared(a), Compared(b)
    in_memory = [model_parts(x.model) for x in both if x.source is None]
    if len(in_memory) == 2:
        check_same(*in_memory, labels)
    call, common = run, None
    if not weights_only and run is None:  # what is missing is found before anything is loaded
        if both[0].is_model:
            given = (tokenizer, tokenizer) if tokenizer is not None else [x.tokenizer() for x in both]
            common = compare_text.common_tokenizer(*given, labels)
        else:
            call = compare_images.pipeline_call(both[0].cls, prompts, steps)
    a, b = (x.load(dtype, device) for x in both)
    parts_a, parts_b = model_parts(a), model_parts(b)
    check_same(parts_a, parts_b, labels)
    warn_of_folds(parts_a, parts_b)
    kind, summary, images = "weights", {}, []
    errors = OutputErrors(layer_pairs(parts_a, parts_b))
    if not weights_only:
        for part in (*parts_a.values(), *parts_b.values()):
            part.eval()
        if call is not None:
            kind = "pipeline" if run is None else "run"
            summary, images = compare_images.run_both(a, b, call, seeds, errors, progress)
        else:
            assert common is not None
            kind, summary = compare_text.read_both(a, b, common, text, window, max_tokens, questions, errors, progress)
    layers = compare_weights(parts_a, parts_b, errors.of, progress)
    sizes = {"bytes_a": total_bytes(parts_a), "bytes_b": total_bytes(parts_b)}
    return Comparison(labels[0], labels[1], kind, layers, {**sizes, **summary}, images)


# ---------------------------------------------------------------------- the parts of a model


def model_parts(model: Any) -> dict[str, nn.Module]:
    """Returns {"": model}, or the models of a pipeline by component name.

    Raises:
        ValueError: neither a model nor a pipeline.
    """
    if isinstance(model, nn.Module):
        return {"": model}
    components = getattr(model, "components", None)
    parts = {n: c for n, c in components.items() if isinstance(c, nn.Module)} if isinstance(components, dict) else {}
    if not parts:
        raise ValueError(
            f"expected a model or a Diffusers pipeline to compare, found {type(model).__module__}.{type(model).__name__}"
        )
    return parts


def check_same(a: dict[str, nn.Module], b: dict[str, nn.Module], labels: Sequence[str]) -> None:
    """Raises for models whose weights differ in name or shape."""
    shapes = [_shapes(parts) for parts in (a, b)]
    for one, other, here, there in ((0, 1, labels[0], labels[1]), (1, 0, labels[1], labels[0])):
        for name, shape in shapes[one].items():
            found = shapes[other].get(name)
            if found != shape:
                raise ValueError(
                    f"the models are of different architectures ({_classes(a)} and {_classes(b)}): {here} holds {name} of "
                    f"shape {list(shape)}, {there} {'does not' if found is None else f'holds it of shape {list(found)}'}"
                )


def warn_of_folds(a: dict[str, nn.Module], b: dict[str, nn.Module]) -> None:
    """Warns of parts whose float weights were changed by a fold in one model and not in the other."""
    for name in a.keys() & b.keys():
        one, two = (getattr(getattr(part, "config", None), RECORD, None) or [] for part in (a[name], b[name]))
        if one != two:
            logger.warning(
                "%sfolded into the float weights are %s in A, %s in B: the weight and output errors of these layers contain "
                "the fold, not only rounding; look at the figures of the whole model",
                f"{name}: " if name else "",
                *(", ".join(folds) or "no folds" for folds in (one, two)),
            )


def _shapes(parts: dict[str, nn.Module]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in parameters_of(parts)}


def _classes(parts: dict[str, nn.Module]) -> str:
    return ", ".join(type(part).__name__ for part in parts.values())


def layer_pairs(a: dict[str, nn.Module], b: dict[str, nn.Module]) -> dict[str, tuple[nn.Module, nn.Module]]:
    """Returns the layers of both models, by name, that directly hold a weight of two or more axes."""
    pairs = {}
    for part, model in a.items():
        others = dict(b[part].named_modules())
        for name, module in model.named_modules():
            if any(p is not None and p.dim() > 1 for p in module._parameters.values()) and name in others:
                pairs[".".join(filter(None, (part, name)))] = (module, others[name])
    return pairs


class OutputErrors:
    """Accumulates squared norms of the layers' outputs and of their differences while `Lockstep` runs.

    Args:
        pairs: see `Lockstep`.
    """

    def __init__(self, pairs: dict[str, tuple[nn.Module, nn.Module]]) -> None:
        self.pairs = pairs
        self._sums: dict[str, tuple[float, float]] = {}

    def observe(self, name: str, a: Tensor, b: Tensor) -> None:
        """Adds one call of a layer."""
        reference = a.to(b.device).float()
        error, norm = self._sums.get(name, (0.0, 0.0))
        error += (b.float() - reference).square().sum(dtype=torch.float64).item()
        self._sums[name] = (error, norm + reference.square().sum(dtype=torch.float64).item())

    def of(self, name: str) -> float | None:
        """Returns the relative error of a layer's output; None if it never ran."""
        return ratio(*self._sums[name]) if name in self._sums else None
