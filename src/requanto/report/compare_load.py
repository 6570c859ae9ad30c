"""Loads the models or pipelines for `compare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from requanto.report._inputs import Tokenizer
from requanto.report.convert import class_of, description_of, float_dtype, local_directory


def load_compared(model: Any, dtype: str, device: str | None, with_tokenizer: bool) -> tuple[Any, Tokenizer | None]:
    """Returns (model or pipeline, its tokenizer or None); a model object is returned unchanged.

    Raises:
        FileNotFoundError: no such directory or name.
        ValueError: the class of the directory's model is unknown.
    """
    if not isinstance(model, (str, Path)):
        return model, None
    source = local_directory(model)
    if (source / "model_index.json").is_file():
        return _pipeline(source, dtype, device), None
    description = description_of(source)
    if "_class_name" in description:
        return _diffusers_model(source, description, dtype, device), None
    loaded = class_of(source, description).from_pretrained(source, dtype=float_dtype(dtype), device_map=device)
    return loaded, _tokenizer(source) if with_tokenizer else None


def _pipeline(source: Path, dtype: str, device: str | None) -> Any:
    import diffusers

    index = json.loads((source / "model_index.json").read_text(encoding="utf-8"))
    name = index.get("_class_name")
    if not isinstance(name, str) or not hasattr(diffusers, name):
        raise ValueError(f"{source}/model_index.json names the pipeline {name!r}, which diffusers does not have")
    options = {} if dtype == "auto" else {"torch_dtype": float_dtype(dtype)}
    pipeline = getattr(diffusers, name).from_pretrained(source, **options)
    return pipeline if device is None else pipeline.to(device)


def _diffusers_model(source: Path, description: dict[str, Any], dtype: str, device: str | None) -> Any:
    options = {} if dtype == "auto" else {"torch_dtype": float_dtype(dtype)}
    loaded = class_of(source, description).from_pretrained(source, **options)
    return loaded if device is None else loaded.to(device)


def _tokenizer(source: Path) -> Tokenizer | None:
    from transformers import AutoTokenizer

    if not any((source / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json", "vocab.txt")):
        return None
    return AutoTokenizer.from_pretrained(source)
