"""From one directory to another, with samples: `requanto quantize --method`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from requanto.budget.models import settle_on_samples
from requanto.config.config import QuantoConfig
from requanto.config.plan import PlannedWeight, plan
from requanto.data import calibration_text
from requanto.methods import find_method, quantize_with_samples, text_samples
from requanto.report.convert import checked_source, class_of, copy_companions, load_model

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
    """Loads a float model of text, quantizes it on pieces of a text, and saves it with its companions.

    Args:
        model, out, config, dtype, device: as in `quantize_directory`.
        method, method_options, resume: as in `requanto.quantize`.
        text: file to cut samples from; None: the fiction that ships with the package.
        samples, length: how many pieces, of how many tokens.
        progress: show a progress bar.

    Raises:
        FileNotFoundError: no such model or text.
        ValueError: the model takes no text, is quantized already, or is not a kind that is known.
    """
    from transformers import AutoTokenizer

    chosen = find_method(method, method_options)
    source, description = checked_source(model, out)
    if "_class_name" in description:
        raise ValueError(
            f"{model} is a Diffusers model, which no text runs. In Python: requanto.quantize(pipe.transformer, weights=..., "
            f"method={method!r}, calibration=lambda model: pipe(...)), then save_pretrained"
        )
    written = calibration_text() if text is None else Path(text).read_text(encoding="utf-8")
    pieces = text_samples(AutoTokenizer.from_pretrained(source), written, samples, length)
    loaded = load_model(class_of(source, description), source, None, dtype, device)
    planned = settle_on_samples(loaded, config, planned_for(loaded, config), pieces, progress)
    quantize_with_samples(loaded, planned, pieces, chosen, resume=resume, progress=progress)
    from requanto.integrations.transformers import attach_quantizer

    attach_quantizer(loaded, config)
    loaded.save_pretrained(out)
    copy_companions(source, out)


def planned_for(model: Any, config: QuantoConfig) -> dict[str, PlannedWeight]:
    """What `from_pretrained` would quantize of a Transformers model."""
    from transformers.quantizers.base import get_keys_to_not_convert

    return plan(
        model,
        config,
        default_skips=get_keys_to_not_convert(model),
        output_embeddings=model.get_output_embeddings(),
        always_float=model._keep_in_fp32_modules or (),
        tied=model.all_tied_weights_keys,
    )
