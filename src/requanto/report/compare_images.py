"""Compares pipelines, and models that a function runs, with the same seeds: PSNR between their outputs."""

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

#: Pairs of images returned for the plot; the PSNR is over all images.
MOST_IMAGES = 16


def pipeline_call(pipeline: type, prompts: Sequence[str], steps: int | None) -> Callable[[Any, int], Any]:
    """Returns a function (pipeline, seed) that generates images for all prompts, for pipelines of a class.

    Raises:
        ValueError: the pipeline takes prompts and none is given, or the reverse.
    """
    known = inspect.signature(pipeline.__call__).parameters
    if "prompt" in known and not prompts:
        raise ValueError(
            f"{pipeline.__name__} needs a prompt, but none is given: prompts=['a red bicycle'], or "
            f"--prompt 'a red bicycle' on the command line"
        )
    if "prompt" not in known and prompts:
        raise ValueError(
            f"{pipeline.__name__} takes no prompt; its arguments: {', '.join(k for k in known if k != 'self')}"
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
            f"{pipeline.__name__} also needs {', '.join(missing)}: pass run=, a function (pipeline, seed) -> images"
        )
    options: dict[str, Any] = {} if steps is None else {"num_inference_steps": steps}
    if "output_type" in known:
        options["output_type"] = "np"

    def call(pipe: Any, seed: int) -> Any:
        pipe.set_progress_bar_config(disable=True)  # both pipelines run at once; our own bar counts seeds
        found = []
        for prompt in prompts or (None,):
            prompt_argument = {} if prompt is None else {"prompt": prompt}
            output = pipe(**prompt_argument, **options, generator=torch.Generator().manual_seed(seed))
            found.extend(as_arrays(output))
        return found

    return call


def run_both(
    a: Any, b: Any, run: Callable[[Any, int], Any], seeds: int, errors: Any, progress: bool
) -> tuple[dict[str, float | int], list[tuple[Any, Any]]]:
    """Runs both models with seeds 0, 1, ...; returns (results, pairs of images). Layer outputs are passed to ``errors``.

    Raises:
        ValueError: the outputs of the two models differ in number or shape.
    """
    lockstep = Lockstep(errors.pairs, errors.observe)
    psnrs: list[float] = []
    same: list[bool] = []
    images: list[tuple[Any, Any]] = []
    for seed in tqdm(range(seeds), desc="comparing", unit="seed", disable=not progress, leave=False):
        found = lockstep.run(lambda seed=seed: run(a, seed), lambda seed=seed: run(b, seed))
        ones, others = (as_arrays(output) for output in found)
        if [x.shape for x in ones] != [x.shape for x in others]:
            raise ValueError(
                f"with the same seed, the first model returns {len(ones)} outputs of shape {_shape(ones)} and the second "
                f"{len(others)} of shape {_shape(others)}"
            )
        low, high = value_range(ones)
        for one, other in zip(ones, others):
            psnrs.append(psnr(one, other, peak=high - low))
            if one.ndim == 1 and one.size > 1:  # scores of classes
                same.append(bool(one.argmax() == other.argmax()))
            if len(images) < MOST_IMAGES and one.ndim == 3:
                images.append((_to_unit_range(one, low, high), _to_unit_range(other, low, high)))
    results: dict[str, float | int] = {
        "psnr_mean": sum(psnrs) / len(psnrs),
        "psnr_min": min(psnrs),
        "images": len(psnrs),
        "seeds": seeds,
    }
    if same:
        share = sum(same) / len(same)
        results |= {"top1_agreement": share, "top1_error": math.sqrt(share * (1 - share) / len(same))}
    return results, images


def _shape(arrays: Sequence[np.ndarray]) -> list[int] | None:
    return list(arrays[0].shape) if arrays else None


def value_range(items: Sequence[np.ndarray]) -> tuple[float, float]:
    """Returns the value range of images: the first of 0 .. 1, -1 .. 1, 0 .. 255 that contains them, else min .. max."""
    low, high = min(float(x.min()) for x in items), max(float(x.max()) for x in items)
    for lowest, highest in ((0.0, 1.0), (-1.0, 1.0), (0.0, 255.0)):
        if lowest <= low and high <= highest:
            return lowest, highest
    return low, high


def psnr(reference: np.ndarray, found: np.ndarray, peak: float) -> float:
    """Returns the peak signal to noise ratio in dB, ``10 log10(peak^2 / mean((a - b)^2))``; infinite for equal images."""
    error = float(np.mean((reference.astype(np.float64) - found.astype(np.float64)) ** 2))
    if error == 0:
        return math.inf
    return 10 * math.log10(peak**2 / error) if peak else -math.inf


def as_arrays(output: Any) -> list[np.ndarray]:
    """Converts the output of a run to float32 arrays, one per item; images become ``[height, width, channels]``.

    Raises:
        ValueError: the output is of a type that cannot be compared.
    """
    for name in ("images", "frames", "sample", "logits", "last_hidden_state"):
        if getattr(output, name, None) is not None and not isinstance(output, (Tensor, np.ndarray)):
            output = getattr(output, name)
            break
    if isinstance(output, Tensor):
        values = output.detach().float().cpu().numpy()
        # Tensors have channels first; arrays and PIL images have them last.
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
    return as_arrays(one[None] if isinstance(one, Tensor) and one.ndim < 4 else one)


def _to_unit_range(image: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.clip((image - low) / (high - low or 1.0), 0, 1)
