"""Quantization with samples: methods that use the inputs of a model's layers.

    requanto.quantize(model, weights="int4", calibration=samples, method="gptq")

They work for any model made of Linear layers; `requanto.methods.engine` describes the procedure.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import nn

from requanto.config.plan import PlannedWeight
from requanto.methods.engine import quantize_planned
from requanto.methods.method import Gptq, Method
from requanto.methods.resume import Resume, fingerprint
from requanto.methods.samples import Samples, text_samples
from requanto.methods.scaling import Awq, SmoothQuant
from requanto.methods.statistics import layer_moments
from requanto.methods.tuning import SignRound

__all__ = [
    "METHODS",
    "Awq",
    "Gptq",
    "Method",
    "SignRound",
    "SmoothQuant",
    "find_method",
    "layer_moments",
    "quantize_with_samples",
    "text_samples",
]

#: every method by its name
METHODS: dict[str, type[Method]] = {cls.name: cls for cls in (Gptq, Awq, SmoothQuant, SignRound)}


def quantize_with_samples(
    model: nn.Module,
    planned: Mapping[str, PlannedWeight],
    calibration: Any,
    method: str | Method = "gptq",
    *,
    method_options: Mapping[str, Any] | None = None,
    resume: str | os.PathLike | None = None,
    progress: bool = True,
) -> None:
    """Quantizes the planned weights of a model in place, with samples.

    Args:
        model: any float model, on the device to run on.
        planned: full parameter name -> how to quantize it (`requanto.config.plan.plan`).
        calibration: an iterable of inputs, or a function that runs the model (`requanto.methods.samples`).
        method: a name or a `Method`.
        method_options: options of a method given by name.
        resume: directory that stores finished blocks; an interrupted run continues from them.
        progress: show a progress bar.

    Raises:
        ValueError: an unknown method, no samples, samples that reach no layer, or a ``resume`` of another run.
        TypeError: an unknown option.
    """
    chosen = find_method(method, method_options)
    samples = Samples(calibration)
    stored = None if resume is None else Resume(resume, fingerprint(model, planned, samples, chosen))
    quantize_planned(model, planned, samples, chosen, resume=stored, progress=progress)


def find_method(method: str | Method, options: Mapping[str, Any] | None = None) -> Method:
    """Returns the method of that name, with these options.

    Raises:
        ValueError: an unknown name.
        TypeError: an unknown option, or options together with a `Method` object.
    """
    if isinstance(method, Method):
        if options:
            raise TypeError("method_options need a method given by name; a Method object holds its own options")
        return method
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; methods that use calibration= are {', '.join(METHODS)}")
    return METHODS[method].of(options)
