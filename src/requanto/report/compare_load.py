"""Finds out what `compare` is given, and loads models, pipelines and tokenizers of directories."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from requanto.report._inputs import Tokenizer
from requanto.report.convert import class_of, description_of, float_dtype, load_model, local_directory, stored_dtype


class Compared:
    """One of the two models: an object in memory, or a directory that is loaded when `load` is called.

    Args:
        model: a directory, a name on the hub, a model or a pipeline.

    Raises:
        FileNotFoundError: no such directory or name.
        ValueError: the class of the directory's model or pipeline is unknown.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.source = local_directory(model) if isinstance(model, (str, Path)) else None
        #: the class of the model or pipeline
        self.cls: type = type(model)
        self.is_pipeline = self.source is not None and (self.source / "model_index.json").is_file()
        if self.is_pipeline:
            self.cls = _pipeline_class(self.source)
        elif self.source is not None:
            self.cls = class_of(self.source, description_of(self.source))

    @property
    def is_model(self) -> bool:
        """Whether it is a single model rather than a pipeline."""
        return not self.is_pipeline if self.source is not None else isinstance(self.model, nn.Module)

    def tokenizer(self) -> Tokenizer | None:
        """Returns the tokenizer in the directory, or None."""
        names = ("tokenizer_config.json", "tokenizer.json", "vocab.txt")
        if self.source is None or self.is_pipeline or not any((self.source / name).is_file() for name in names):
            return None
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.source)

    def load(self, dtype: str, device: str | None) -> Any:
        """Returns the model or pipeline; an object in memory is returned unchanged."""
        if self.source is None:
            return self.model
        if not self.is_pipeline:
            in_diffusers = self.cls.__module__.startswith("diffusers")
            loaded = load_model(self.cls, self.source, None, dtype, None if in_diffusers else device)
            return loaded.to(device) if in_diffusers and device is not None else loaded
        # Diffusers loads its own models in float32 by default, but text encoders in the dtype that they are stored in.
        folders = sorted(path for path in self.source.iterdir() if path.is_dir())
        wanted = stored_dtype(folders) if dtype == "auto" else float_dtype(dtype)
        options = {} if wanted is None else {"torch_dtype": wanted}
        pipeline = self.cls.from_pretrained(self.source, **options)  # type: ignore[attr-defined]
        return pipeline if device is None else pipeline.to(device)


def _pipeline_class(source: Path) -> type:
    import diffusers

    name = json.loads((source / "model_index.json").read_text(encoding="utf-8")).get("_class_name")
    if not isinstance(name, str) or not hasattr(diffusers, name):
        raise ValueError(f"{source}/model_index.json names the pipeline {name!r}, which diffusers does not have")
    return getattr(diffusers, name)
