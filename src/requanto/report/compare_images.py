"""Pipelines, and any model that a function runs: the same seeds for both, PSNR between what they return."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from requanto.report.lockstep import Lockstep

#: Images kept for the grid; PSNR is taken over all of them.
KEPT = 16


def pipeline_call(pipeline: Any, prompts: Sequence[str], steps: int | None) -> Callable[[Any, int], Any]:
    """A function that draws all prompts with one seed.

    Raises:
        ValueError: the pipeline takes prompts and none is given, or the reverse.
    """
    known = inspect.signature(type(pipeline).__call__).parameters
    if "prompt" in known and not prompts:
        raise ValueError(
            f"{type(pipeline).__name__} draws what a prompt says, and none is given: prompts=['a red bicycle'], or "
            f"--prompt 'a red bicycle' on the command line"
        )
    if "prompt" not in known and prompts:
        raise ValueError(
            f"{type(pipeline).__name__} takes no prompt; it has {', '.join(k for k in known if k != 'self')}"
        )
    missing = [
        name
        for name, parameter in known.items()
        if name not in ("self", "prompt")
        and parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if missing:
        raise ValueError(
            f"{type(pipeline).__name__} also needs {', '.join(missing)}: pass run=, a function (pipeline, seed) -> images"
        )
    options: dict[str, Any] = {} if steps is None else {"num_inference_steps": steps}
    if "output_type" in known:
        options["output_type"] = "np"

    def call(pipe: Any, seed: int) -> Any:
        pipe.set_progress_bar_config(disable=True)  # two bars at once, in two threads; ours counts the seeds
        found = []
        for prompt in prompts or (None,):
            said = {} if prompt is None else {"prompt": prompt}
            found.extend(pictures(pipe(**said, **options, generator=torch.Generator().manual_seed(seed))))
        return found

    return call


def run_both(
    a: Any, b: Any, run: Callable[[Any, int], Any], seeds: int, errors: Any, progress: bool
) -> tuple[dict[str, float | int], list[tuple[Any, Any]]]:
    """(figures, pairs of images): ``run`` on both with seeds 0, 1, ...; the layers' outputs go to ``errors``.

    Raises:
        ValueError: ``seeds`` is below 1, or the two return different things.
    """
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, found {seeds}")
    lockstep = Lockstep(errors.pairs, errors.observe)
    psnrs: list[float] = []
    kept: list[tuple[Any, Any]] = []
    for seed in tqdm(range(seeds), desc="comparing", unit="seed", disable=not progress, leave=False):
        found = lockstep.run(lambda seed=seed: run(a, seed), lambda seed=seed: run(b, seed))
        ones, others = (pictures(output) for output in found)
        if [x.shape for x in ones] != [x.shape for x in others]:
            raise ValueError(
                f"the same seed gives {len(ones)} outputs of shape {_shape(ones)} of the first model and {len(others)} of "
                f"shape {_shape(others)} of the second"
            )
        low, high = value_range(ones)
        for one, other in zip(ones, others):
            psnrs.append(psnr(one, other, peak=high - low))
            if len(kept) < KEPT and one.ndim == 3:
                kept.append((_shown(one, low, high), _shown(other, low, high)))
    figures: dict[str, float | int] = {
        "psnr_mean": sum(psnrs) / len(psnrs),
        "psnr_min": min(psnrs),
        "images": len(psnrs),
        "seeds": seeds,
    }
    return figures, kept


def _shape(arrays: Sequence[np.ndarray]) -> list[int] | None:
    return list(arrays[0].shape) if arrays else None


def value_range(items: Sequence[np.ndarray]) -> tuple[float, float]:
    """The range images live in: 0 .. 1, -1 .. 1 or 0 .. 255 where they fit, else from the least value to the largest."""
    low, high = min(float(x.min()) for x in items), max(float(x.max()) for x in items)
    for lowest, highest in ((0.0, 1.0), (-1.0, 1.0), (0.0, 255.0)):
        if lowest <= low and high <= highest:
            return lowest, highest
    return low, high


def psnr(reference: np.ndarray, found: np.ndarray, peak: float) -> float:
    """Peak signal to noise ratio in dB: ``10 log10(peak^2 / mean((a - b)^2))``, infinite where they are equal."""
    error = float(np.mean((reference.astype(np.float64) - found.astype(np.float64)) ** 2))
    if error == 0:
        return math.inf
    return 10 * math.log10(peak**2 / error) if peak else -math.inf


def pictures(output: Any) -> list[np.ndarray]:
    """What a run returned as float arrays, one an item: images ``[height, width, channels]`` where they are images.

    Raises:
        ValueError: nothing that can be compared.
    """
    for name in ("images", "frames", "sample", "logits", "last_hidden_state"):
        if getattr(output, name, None) is not None and not isinstance(output, (Tensor, np.ndarray)):
            output = getattr(output, name)
            break
    if isinstance(output, Tensor):
        values = output.detach().float().cpu().numpy()
        # Tensors have their channels first, arrays and PIL images last.
        items = [np.moveaxis(x, 0, -1) if x.ndim == 3 else x for x in values] if values.ndim > 1 else [values]
    elif isinstance(output, np.ndarray):
        items = list(output) if output.ndim > 3 else [output]
    elif isinstance(output, (list, tuple)) and output:
        items = [x for one in output for x in _item(one)]
    else:
        raise ValueError(f"a run must return a tensor, arrays or images, found {type(output).__name__}")
    return [np.asarray(x, dtype=np.float32) for x in items]


def _item(one: Any) -> list[np.ndarray]:
    if hasattr(one, "convert") and hasattr(one, "size"):  # a PIL image
        values = np.asarray(one, dtype=np.float32)
        return [values[..., None] if values.ndim == 2 else values]
    if isinstance(one, (list, tuple)):  # the frames of a video
        return [x for frame in one for x in _item(frame)]
    if isinstance(one, np.ndarray):
        return [one]
    return pictures(one[None] if isinstance(one, Tensor) and one.ndim < 4 else one)


def _shown(image: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.clip((image - low) / (high - low or 1.0), 0, 1)
