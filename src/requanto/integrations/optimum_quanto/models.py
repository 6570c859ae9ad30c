"""QuantizedTransformersModel, QuantizedModelForCausalLM, QuantizedDiffusersModel, QuantizedPixArtTransformer2DModel.

They read and write directories in optimum-quanto's own format: ``config.json``, safetensors, ``quanto_qmap.json``. This
module is imported only if Transformers or Diffusers is installed.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from requanto.checkpoint.commit import finish_interrupted
from requanto.checkpoint.directory import replaced_directory
from requanto.checkpoint.foreign.quanto_files import checked_map, from_qtensor
from requanto.checkpoint.format import CheckpointError
from requanto.checkpoint.opening import read_json
from requanto.checkpoint.shards import SafetensorsFiles, save_shards
from requanto.checkpoint.weight_files import MAP_NAME
from requanto.dtypes.qtypes import qtype, resolve_qtype
from requanto.model.quantize import freeze, quantization_map
from requanto.model.quantize import quantize as quantize_native
from requanto.nn.mixin import QModuleMixin
from requanto.scales.optimizers import Optimizer, default_optimizer
from requanto.tensor.qtensor import QTensor


def core_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the model's tensors with optimum-quanto's keys.

    Raises:
        CheckpointError: optimum-quanto's format cannot hold a weight or an activation setting exactly.
    """
    for name, module in model.named_modules():
        if isinstance(module, QModuleMixin) and module.activation_qtype is not None:
            _check_activations(name, module)
    state: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, QTensor):
            state[name] = value
            continue
        state |= {name + part: tensor for part, tensor in from_qtensor(value, name).items()}
        module = name.removesuffix(".weight")
        for scale in ("input_scale", "output_scale"):
            state.setdefault(f"{module}.{scale}", torch.ones((), dtype=value.dtype, device=value.device))
    return state


def _check_activations(name: str, module: QModuleMixin) -> None:
    """Raises unless inputs and outputs have static scales: optimum-quanto always quantizes both, with stored scales."""
    if not module.calibrated:
        raise CheckpointError(
            f"{name}: optimum-quanto's format has no activations quantized on the fly: run samples through the model inside "
            f"requanto.Calibration(streamline=False) first, or exclude this layer"
        )
    if not module.quantizes_output:
        raise CheckpointError(
            f"{name}: optimum-quanto's format cannot say that its output stays float (a result of streamline=True). "
            f"Calibrate with streamline=False, or call save_pretrained of the wrapped model to write Requanto's format"
        )


def core_map(model: nn.Module) -> dict[str, dict[str, str]]:
    """Returns the quantization map with the keys that optimum-quanto has."""
    return {
        name: {"weights": entry["weights"], "activations": entry["activations"]}
        for name, entry in quantization_map(model).items()
    }


def _untie(model: nn.Module) -> None:
    """Unties weights that quantized layers share with an embedding: the format has no quantized embeddings."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for module in model.modules():
        if (
            isinstance(module, QModuleMixin)
            and not isinstance(module, nn.Embedding)
            and id(module.weight) in embeddings
        ):
            module.weight = nn.Parameter(module.weight.detach())


class _Wrapper:
    """Wraps a quantized model to save and load optimum-quanto's format; other attributes are the model's."""

    stem = "model"

    def __init__(self, model: nn.Module) -> None:
        self._require(model)
        if not self._map(model):
            raise ValueError(
                f"{type(self).__name__} wraps a quantized model: use {type(self).__name__}.quantize(model)"
            )
        self._wrapped = model

    @classmethod
    def _require(cls, model: Any) -> None:
        raise NotImplementedError

    # Overridden by integrations.optimum_quanto.wrappers.
    @classmethod
    def _quantize(cls, model: nn.Module, kind: qtype | None, activations: Any, optimizer: Any, **patterns: Any) -> None:
        optimizer = optimizer or (None if kind is None else default_optimizer(kind))
        quantize_native(model, kind, activations, optimizer, **patterns)
        _untie(model)
        freeze(model)

    @classmethod
    def _map(cls, model: nn.Module) -> dict[str, dict[str, str]]:
        return core_map(model)

    @classmethod
    def _state(cls, model: nn.Module) -> dict[str, torch.Tensor]:
        return core_state(model)

    @classmethod
    def _load(cls, model: nn.Module, state: Any, qmap: dict) -> None:
        from requanto.model.requantize import requantize

        requantize(model, state, qmap)

    def __getattr__(self, name: str) -> Any:
        if name == "_wrapped":
            raise AttributeError(name)
        return getattr(self._wrapped, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._wrapped(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._wrapped.forward(*args, **kwargs)

    def __repr__(self) -> str:
        return repr(self._wrapped)

    @classmethod
    def quantize(
        cls,
        model: Any,
        weights: str | qtype | None = None,
        activations: str | qtype | None = None,
        optimizer: Optimizer | None = None,
        include: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
    ) -> Any:
        """Quantizes and freezes a model in place with optimum-quanto's defaults; returns it wrapped.

        Args: see `requanto.quantize`.
        """
        cls._require(model)
        kind = None if weights is None else resolve_qtype(weights)
        cls._quantize(model, kind, activations, optimizer, include=include, exclude=exclude)
        return cls(model)

    def save_pretrained(self, save_directory: str | os.PathLike, *, max_shard_size: str = "5GB") -> None:
        """Writes a directory that optimum-quanto 0.2.7 can load.

        Raises:
            CheckpointError: the format cannot hold a weight exactly.
        """
        model = self._wrapped
        state, qmap = self._state(model), self._map(model)
        with replaced_directory(save_directory) as directory:
            self._save_config(model, directory)
            (directory / MAP_NAME).write_text(json.dumps(qmap, indent=4), encoding="utf-8")
            save_shards(state, directory, self.stem, max_shard_size)

    @classmethod
    def _save_config(cls, model: Any, directory: Path) -> None:
        raise NotImplementedError

    @classmethod
    def _skeleton(cls, directory: Path, **kwargs: Any) -> nn.Module:
        raise NotImplementedError

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """Loads a directory in optimum-quanto's format, one tensor at a time; returns the wrapped model in eval mode.

        Args:
            pretrained_model_name_or_path: a directory, or a name on the hub.
            kwargs: passed to the download and to the config.

        Raises:
            ValueError: no quanto_qmap.json, or this class has no model class.
            CheckpointError: quanto_qmap.json, tensors and model disagree.
        """
        directory = Path(pretrained_model_name_or_path)
        if not directory.is_dir():
            from huggingface_hub import snapshot_download

            directory = Path(snapshot_download(str(pretrained_model_name_or_path), **kwargs))
        finish_interrupted(directory)
        map_file = directory / MAP_NAME
        if not map_file.is_file():
            raise ValueError(f"{directory} holds no {MAP_NAME}: it is not a model saved in optimum-quanto's format")
        qmap = read_json(map_file)
        checked_map(qmap, map_file)
        model = cls._skeleton(directory, **kwargs)
        cls._load(model, SafetensorsFiles(directory, cls.stem), qmap)
        if hasattr(model, "tie_weights") and getattr(model.config, "tie_word_embeddings", False):
            model.tie_weights()
        return cls(model.eval())


class QuantizedTransformersModel(_Wrapper):
    """A quantized Transformers model; subclasses set ``auto_class``."""

    auto_class: Any = None

    @classmethod
    def _require(cls, model: Any) -> None:
        from transformers import PreTrainedModel

        if not isinstance(model, PreTrainedModel):
            raise ValueError(f"{cls.__name__} takes a Transformers model, found {type(model).__name__}")

    @classmethod
    def _save_config(cls, model: Any, directory: Path) -> None:
        embeddings = [model.get_input_embeddings(), model.get_output_embeddings()]
        weights = [getattr(module, "weight", None) for module in embeddings]
        if None not in weights and weights[0] is not weights[1]:
            model.config.tie_word_embeddings = False  # only the output embeddings are quantized: no longer tied
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(directory)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(directory)

    @classmethod
    def _skeleton(cls, directory: Path, **kwargs: Any) -> nn.Module:
        if cls.auto_class is None:
            raise ValueError(
                f"{cls.__name__} has no auto_class: use QuantizedModelForCausalLM, or a subclass that sets it"
            )
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(directory, **kwargs)
        return _empty(lambda: cls.auto_class.from_config(config))


class QuantizedDiffusersModel(_Wrapper):
    """A quantized Diffusers model; subclasses set ``base_class``."""

    stem = "diffusion_pytorch_model"
    base_class: Any = None

    @classmethod
    def _require(cls, model: Any) -> None:
        from diffusers import ModelMixin

        if not isinstance(model, ModelMixin):
            raise ValueError(f"{cls.__name__} takes a Diffusers model, found {type(model).__name__}")

    @classmethod
    def _save_config(cls, model: Any, directory: Path) -> None:
        model.save_config(directory)

    @classmethod
    def _skeleton(cls, directory: Path, **kwargs: Any) -> nn.Module:
        if cls.base_class is None:
            raise ValueError(
                f"{cls.__name__} has no base_class: use a subclass that sets it, such as QuantizedPixArtTransformer2DModel"
            )
        config_file = directory / "config.json"
        if not config_file.is_file():
            raise ValueError(f"{directory} holds no config.json")
        named = read_json(config_file).get("_class_name")
        if named != cls.base_class.__name__:
            raise ValueError(f"{cls.__name__} loads a {cls.base_class.__name__}, the directory holds a {named}")
        config = cls.base_class.load_config(directory, **kwargs)
        return _empty(lambda: cls.base_class.from_config(config))


def _empty(make: Any) -> nn.Module:
    """Calls ``make`` with parameters on the meta device; buffers hold their values."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        return make()


def __getattr__(name: str) -> Any:
    # These classes need a model class of another library, so they are created on access.
    if name == "QuantizedModelForCausalLM":
        from transformers import AutoModelForCausalLM

        made = type(name, (QuantizedTransformersModel,), {"auto_class": AutoModelForCausalLM, "__module__": __name__})
    elif name == "QuantizedPixArtTransformer2DModel":
        from diffusers import PixArtTransformer2DModel

        made = type(name, (QuantizedDiffusersModel,), {"base_class": PixArtTransformer2DModel, "__module__": __name__})
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = made
    return made
