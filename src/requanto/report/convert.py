"""From one directory to another: what the command line does with models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from requanto.config.config import QuantoConfig

# Files that belong to a model but are neither weights nor written by save_pretrained: tokenizer, processor, templates.
_COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken")


def local_directory(model: str | Path) -> Path:
    """The directory itself, or the hub's snapshot of that name.

    Raises:
        FileNotFoundError: it is neither.
    """
    path = Path(model)
    if path.is_dir():
        return path
    if path.exists() or str(model).count("/") > 1 or str(model).startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"{model} is no directory; expected one that save_pretrained wrote, or a name on the hub"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(model), ignore_patterns=["*.bin", "*.gguf", "*.h5", "*.msgpack", "*.onnx"]))
    except Exception as error:
        raise FileNotFoundError(
            f"{model} is no directory here, and the hub did not give it ({type(error).__name__}: {error})"
        ) from error


def quantize_directory(
    model: str | Path, out: Path, config: QuantoConfig, *, dtype: str = "auto", device: str | None = None
) -> None:
    """Loads a float model quantized and saves it, companions (tokenizer ...) included.

    Raises:
        FileNotFoundError: no such model.
        ValueError: it is quantized already, or not a kind that is known.
    """
    source, description = checked_source(model, out)
    loaded = load_model(class_of(source, description), source, config, dtype, device)
    loaded.save_pretrained(out)
    copy_companions(source, out)


def checked_source(model: str | Path, out: Path) -> tuple[Path, dict[str, Any]]:
    """(directory of a float model, its config.json).

    Raises:
        FileNotFoundError: no such model.
        ValueError: it is quantized already, or ``out`` is its own directory.
    """
    source = local_directory(model)
    description = description_of(source)
    if description.get("quantization_config"):
        method = description["quantization_config"].get("quant_method")
        raise ValueError(f"{model} is quantized already ({method}); start from the float model")
    if Path(out).resolve() == source.resolve():
        raise ValueError(f"OUT is the model's own directory {source}; choose another, the float weights would be lost")
    return source, description


def copy_companions(source: Path, out: Path) -> None:
    """Copies tokenizer, processor and templates where the save did not write them."""
    for pattern in _COMPANIONS:
        for file in source.glob(pattern):
            if not (out / file.name).exists() and not file.name.endswith(".index.json"):
                shutil.copy2(file, out / file.name)


def load_causal_lm(directory: str | Path, *, dtype: str = "auto", device: str | None = None) -> tuple[Any, Any]:
    """(model, tokenizer) of a causal language model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = local_directory(directory)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=float_dtype(dtype), device_map=device)
    return model.eval(), AutoTokenizer.from_pretrained(source)


def meta_model(model: str | Path) -> tuple[Any, QuantoConfig | None]:
    """(the model on the meta device, its quantization config): shapes without weights.

    Args:
        model: a directory, or ``"8B"``, ``"70B"``, ``"405B"``: a Llama of that size.

    Raises:
        ValueError: a Diffusers model, which Transformers' tensor parallelism does not know.
    """
    import torch

    from requanto.report.parallel import LLAMA_SHAPES, llama

    if str(model) in LLAMA_SHAPES:
        return llama(str(model)), None
    source = local_directory(model)
    description = description_of(source)
    if "_class_name" in description:
        raise ValueError(f"{model} is a Diffusers model; --parallel is computed for Transformers models")
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source)
    stored = getattr(config, "quantization_config", None)
    if stored is not None:
        del config.quantization_config
    with torch.device("meta"):
        built = class_of(source, description)._from_config(config, dtype=getattr(config, "dtype", None))
    return built, QuantoConfig.from_dict(stored) if stored is not None else None


def description_of(source: Path) -> dict[str, Any]:
    """A model directory's config.json."""
    path = source / "config.json"
    if not path.is_file():
        if (source / "model_index.json").is_file():
            raise ValueError(f"{source} is a Diffusers pipeline; quantize its parts, e.g. {source}/transformer")
        raise FileNotFoundError(f"{source} holds no config.json; expected a directory that save_pretrained wrote")
    return json.loads(path.read_text(encoding="utf-8"))


def class_of(source: Path, description: dict[str, Any]) -> Any:
    """The library's class that a config.json names."""
    if "_class_name" in description:
        import diffusers

        return getattr(diffusers, description["_class_name"])
    import transformers

    names = description.get("architectures") or []
    for name in names:
        if hasattr(transformers, name):
            return getattr(transformers, name)
    if "model_type" not in description:
        raise ValueError(f"{source}/config.json names neither architectures nor a model_type; it is no model's config")
    return transformers.AutoModel


def load_model(model_class: Any, source: Path, config: QuantoConfig | None, dtype: str, device: str | None) -> Any:
    """``from_pretrained``, quantized by a config where there is one."""
    key = "torch_dtype" if model_class.__module__.startswith("diffusers") else "dtype"
    options: dict[str, Any] = {} if config is None else {"quantization_config": config}
    wanted = float_dtype(dtype)
    if key == "dtype" or wanted != "auto":
        options[key] = wanted
    if device is not None:
        options["device_map"] = device
    return model_class.from_pretrained(source, **options)


def float_dtype(name: str) -> Any:
    """The torch dtype of that name, or "auto" as it is."""
    import torch

    if name == "auto":
        return name
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point or found.itemsize < 2:
        raise ValueError(f"dtype {name!r} is none of auto, bfloat16, float16, float32")
    return found
