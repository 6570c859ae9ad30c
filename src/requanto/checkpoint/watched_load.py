"""Makes ``from_pretrained`` finish an interrupted save first, and refuse what was loaded while another process saved."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

from requanto.checkpoint.format import CheckpointError
from requanto.checkpoint.save_id import Watched


def watch_from_pretrained(model_class: type, stem: str) -> None:
    """Patches ``from_pretrained`` of PreTrainedModel or ModelMixin; only local directories are watched.

    Args:
        model_class: the class.
        stem: start of the names of its weight files.
    """
    original = model_class.from_pretrained.__func__  # type: ignore[attr-defined]
    if hasattr(original, "_watched"):
        return

    @functools.wraps(original)
    def from_pretrained(cls: type, pretrained_model_name_or_path: Any = None, *args: Any, **kwargs: Any) -> Any:
        path = pretrained_model_name_or_path
        where = Path(path, kwargs.get("subfolder") or "") if path and isinstance(path, (str, os.PathLike)) else None
        if where is None or not where.is_dir():
            return original(cls, path, *args, **kwargs)
        watched = Watched.start(where, kwargs.get("variant"), stem)
        try:
            loaded = original(cls, path, *args, **kwargs)
        except Exception as error:
            if (message := watched.changed()) is not None:
                raise CheckpointError(message) from error
            raise
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        ours = type(getattr(model, "hf_quantizer", None)).__module__.startswith("requanto.")
        if ours and (message := watched.changed()) is not None:
            raise CheckpointError(message)
        return loaded

    from_pretrained._watched = True  # type: ignore[attr-defined]
    model_class.from_pretrained = classmethod(from_pretrained)  # type: ignore[attr-defined]
