"""Loading, quantizing and saving model directories for the command line."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from requanto.checkpoint.commit import finish_interrupted
from requanto.checkpoint.directory import check_target
from requanto.checkpoint.format import PARTS
from requanto.checkpoint.model_class import first_architecture, named_class
from requanto.checkpoint.opening import read_json
from requanto.checkpoint.weight_files import model_files
from requanto.config.config import QuantoConfig
from requanto.report.companions import save_with_companions

logger = logging.getLogger(__name__)

#: float dtypes by their names in safetensors files
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def local_directory(model: str | Path) -> Path:
    """Returns the directory itself, or the downloaded snapshot of a name on the hub.

    Raises:
        FileNotFoundError: neither a directory nor a name on the hub.
    """
    path = Path(model)
    if path.is_dir():
        finish_interrupted(path)
        return path
    if path.exists() or str(model).count("/") > 1 or str(model).startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"{model} is not a directory; expected a directory that save_pretrained wrote, or a name on the hub"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(model), ignore_patterns=["*.bin", "*.gguf", "*.h5", "*.msgpack", "*.onnx"]))
    except Exception as error:
        raise FileNotFoundError(
            f"{model} is not a directory, and downloading it from the hub failed ({type(error).__name__}: {error})"
        ) from error


def quantize_directory(
    model: str | Path, out: Path, config: QuantoConfig, *, dtype: str = "auto", device: str | None = None
) -> None:
    """Quantizes a float model and saves it with its tokenizer and other files.

    Raises:
        FileNotFoundError: no such model.
        ValueError: it is already quantized, or its class is unknown.
    """
    source, description = checked_source(model, out)
    save_with_companions(load_model(class_of(source, description), source, config, dtype, device), source, out)


def checked_source(model: str | Path, out: Path) -> tuple[Path, dict[str, Any]]:
    """Returns (directory of a float model, content of its config.json).

    Raises:
        FileNotFoundError: no such model.
        ValueError: it is already quantized, or ``out`` is its own directory.
        OSError: ``out`` is a file, or may not be written to.
    """
    source = local_directory(model)
    description = description_of(source)
    if description.get("quantization_config"):
        method = description["quantization_config"].get("quant_method")
        raise ValueError(
            f"{model} is already quantized ({method}); start from the float model, or keep its weights as they are: "
            f"requanto convert"
        )
    if Path(out).resolve() == source.resolve():
        raise ValueError(
            f"OUT is the model's own directory {source}, whose float weights would be lost; choose another directory"
        )
    check_target(out)
    return source, description


def load_causal_lm(directory: str | Path, *, dtype: str = "auto", device: str | None = None) -> tuple[Any, Any]:
    """Loads a causal language model; returns (model, tokenizer)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = local_directory(directory)
    tokenizer = AutoTokenizer.from_pretrained(source)  # first: it may need a package that is not installed
    model = AutoModelForCausalLM.from_pretrained(source, dtype=float_dtype(dtype), device_map=device)
    return model.eval(), tokenizer


def meta_model(model: str | Path) -> tuple[Any, QuantoConfig | None]:
    """Returns (model on the meta device, its quantization config or None); no weights are loaded.

    Args:
        model: a directory, or ``"8B"``, ``"70B"``, ``"405B"``: a Llama of that size.

    Raises:
        ValueError: a Diffusers model, which Transformers' tensor parallelism does not support.
    """
    from requanto.report.parallel import LLAMA_SHAPES, llama

    if str(model) in LLAMA_SHAPES:
        return llama(str(model)), None
    source = local_directory(model)
    description = description_of(source)
    if "_class_name" in description:
        raise ValueError(f"{model} is a Diffusers model; --parallel supports only Transformers models")
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source)
    stored = getattr(config, "quantization_config", None)
    if stored is not None:
        del config.quantization_config
    with torch.device("meta"):
        built = class_of(source, description)._from_config(config, dtype=getattr(config, "dtype", None))
    return built, QuantoConfig.from_dict(stored) if stored is not None else None


def description_of(source: Path) -> dict[str, Any]:
    """Returns the content of a model directory's config.json."""
    path = source / "config.json"
    if not path.is_file():
        if (source / "model_index.json").is_file():
            raise ValueError(f"{source} is a Diffusers pipeline; quantize one of its models, e.g. {source}/transformer")
        raise FileNotFoundError(f"{source} holds no config.json; expected a directory that save_pretrained wrote")
    return read_json(path)


def class_of(source: Path, description: dict[str, Any]) -> Any:
    """Returns the Transformers or Diffusers class that a config.json names."""
    where = f"{source}/config.json"
    if "_class_name" in description:
        found = named_class("diffusers", description["_class_name"], where)
        if found is None:
            raise ValueError(
                f"{where} names the model class {description['_class_name']!r}, which this Diffusers lacks"
            )
        return found
    import transformers

    first_architecture(description, where)
    for name in description.get("architectures") or []:
        found = named_class("transformers", name, where)
        if found is not None:
            return found
    if "model_type" not in description:
        raise ValueError(
            f"{source}/config.json has neither architectures nor a model_type; it is not the config of a model"
        )
    return transformers.AutoModel


def load_model(model_class: Any, source: Path, config: QuantoConfig | None, dtype: str, device: str | None) -> Any:
    """Calls ``from_pretrained``; quantizes the model if ``config`` is given."""
    key = "torch_dtype" if model_class.__module__.startswith("diffusers") else "dtype"
    options: dict[str, Any] = {} if config is None else {"quantization_config": config}
    wanted = float_dtype(dtype)
    if key == "dtype" or wanted != "auto":
        options[key] = wanted
    if device is not None:
        options["device_map"] = device
    return model_class.from_pretrained(source, **options)


def stored_dtype(directories: Iterable[Path]) -> torch.dtype | None:
    """Returns the float dtype of most bytes of the weights in the directories' safetensors files; None without any.

    Codes and scales of quantized weights do not count. Only headers are read.
    """
    sizes: Counter[torch.dtype] = Counter()
    for file in (file for directory in directories for file in model_files(directory)):
        with safe_open(str(file), framework="pt") as opened:
            keys = set(opened.keys())
            for key in keys:
                name, _, part = key.rpartition("_")
                dtype = _FLOATS.get(opened.get_slice(key).get_dtype())
                if dtype is not None and not (part in PARTS and f"{name}_qdata" in keys):
                    sizes[dtype] += dtype.itemsize * math.prod(opened.get_slice(key).get_shape())
    if len(sizes) > 1:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in sizes))
        logger.info("the files hold weights in %s: all are loaded in the dtype of most bytes", names)
    return max(sizes, key=lambda dtype: (sizes[dtype], str(dtype)), default=None)


def float_dtype(name: str) -> Any:
    """Returns the torch dtype of that name; "auto" is returned unchanged."""
    if name == "auto":
        return name
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point or found.itemsize < 2:
        raise ValueError(f"dtype must be auto, bfloat16, float16 or float32, found {name!r}")
    return found
