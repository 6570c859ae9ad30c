"""`requanto quantize --method` with a method that uses samples: from model directory to quantized directory."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from requanto.budget.models import resolve_on_samples
from requanto.config.config import QuantoConfig
from requanto.config.plan import PlannedWeight, plan
from requanto.data import calibration_text
from requanto.methods import find_method, quantize_with_samples, text_samples
from requanto.report.companions import save_with_companions
from requanto.report.convert import checked_source, class_of, load_model
from requanto.transforms import fold_planned

logger = logging.getLogger(__name__)


def calibrate_directory(
    model: str | Path,
    out: Path,
    config: QuantoConfig,
    method: str,
    *,
    text: Path | None = None,
    samples: int = 128,
    length: int = 512,
    method_options: Mapping[str, Any] | None = None,
    resume: Path | None = None,
    dtype: str = "auto",
    device: str | None = None,
    progress: bool = True,
) -> None:
    """Loads a float language model, quantizes it with samples of a text, and saves it with its tokenizer etc.

    Args:
        model, out, config, dtype, device: as in `quantize_directory`.
        method, method_options, resume: as in `requanto.quantize`.
        text: text file to take samples from; None: the text that ships with the package.
        samples: number of samples.
        length: tokens per sample.
        progress: show a progress bar.

    Raises:
        FileNotFoundError: no such model or text.
        ValueError: the model takes no text, is already quantized, or its class is unknown.
    """
    from transformers import AutoTokenizer

    chosen = find_method(method, method_options)
    source, description = checked_source(model, out)
    if "_class_name" in description:
        raise ValueError(
            f"{model} is a Diffusers model, which cannot be calibrated with text. In Python, call requanto.quantize("
            f"pipe.transformer, weights=..., method={method!r}, calibration=lambda model: pipe(...)), then save_pretrained"
        )
    content = calibration_text() if text is None else Path(text).read_text(encoding="utf-8")
    pieces = text_samples(AutoTokenizer.from_pretrained(source), content, samples, length)
    loaded = load_model(class_of(source, description), source, None, dtype, device)
    planned = planned_for(loaded, config)
    fold_planned(loaded, config, planned, pieces)
    planned = resolve_on_samples(loaded, config, planned, pieces, progress, chosen)
    quantize_with_samples(loaded, planned, pieces, chosen, resume=resume, progress=progress)
    from requanto.integrations.transformers import attach_quantizer

    attach_quantizer(loaded, config)
    save_with_companions(loaded, source, out)


def planned_for(model: Any, config: QuantoConfig) -> dict[str, PlannedWeight]:
    """Returns the weights of a Transformers model that `from_pretrained` would quantize."""
    from transformers.quantizers.base import get_keys_to_not_convert

    return plan(
        model,
        config,
        default_skips=get_keys_to_not_convert(model),
        output_embeddings=model.get_output_embeddings(),
        always_float=model._keep_in_fp32_modules or (),
        tied=model.all_tied_weights_keys,
    )
