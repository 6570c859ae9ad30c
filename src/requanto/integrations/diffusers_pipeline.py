"""Patches of Diffusers' PipelineQuantizationConfig: converts built-in QuantoConfigs, checks component names and classes."""

from __future__ import annotations

import copy
import functools
import importlib
import logging
import os
from pathlib import Path
from typing import Any

from torch import nn

from requanto.checkpoint.commit import finish_interrupted
from requanto.checkpoint.directory import replaced_directory
from requanto.config.config import QuantoConfig
from requanto.integrations.conversion import as_config, has_quantized

logger = logging.getLogger(__name__)

_LIBRARIES = ("diffusers", "transformers")


def register() -> None:
    """Patches the validation and the lookup of a component's config."""
    from diffusers.quantizers.pipe_quant_config import PipelineQuantizationConfig as Config

    if hasattr(Config._resolve_quant_config, "_requanto"):
        return
    Config._validate_quant_mapping_args = _wrap_validate(Config._validate_quant_mapping_args)
    Config._resolve_quant_config = _wrap_resolve(Config._resolve_quant_config)


def register_pipelines() -> None:
    """Makes an unknown component name an error if the config contains a QuantoConfig; Diffusers only warns.

    Saving a pipeline with quantized components replaces all of its files or none.
    """
    from diffusers.pipelines import pipeline_utils

    pipeline = pipeline_utils.DiffusionPipeline
    if not hasattr(pipeline.save_pretrained, "_requanto"):
        pipeline.save_pretrained = _wrap_save_pretrained(pipeline.save_pretrained)
        pipeline.from_pretrained = classmethod(_wrap_from_pretrained(pipeline.from_pretrained.__func__))
    original = pipeline_utils._maybe_warn_for_wrong_component_in_quant_config
    if hasattr(original, "_requanto"):
        return

    @functools.wraps(original)
    def check(pipe_init_dict: dict[str, Any], quant_config: Any) -> None:
        if is_ours(quant_config):
            components = {k: v for k, v in pipe_init_dict.items() if isinstance(v, (list, tuple))}
            named = check_names(quant_config, list(components))
            _check_models({name: components[name] for name in named})
        original(pipe_init_dict, quant_config)

    check._requanto = True
    pipeline_utils._maybe_warn_for_wrong_component_in_quant_config = check


def _wrap_save_pretrained(original: Any) -> Any:
    @functools.wraps(original)
    def save_pretrained(self: Any, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        named = (name for name, value in self.config.items() if isinstance(value, (list, tuple)))
        components = [getattr(self, name, None) for name in named]
        if not any(isinstance(component, nn.Module) and has_quantized(component) for component in components):
            return original(self, save_directory, *args, **kwargs)
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", Path(os.path.abspath(save_directory)).name)
        with replaced_directory(save_directory) as scratch:
            return original(self, str(scratch), *args, **kwargs)

    save_pretrained._requanto = True
    return save_pretrained


def _wrap_from_pretrained(original: Any) -> Any:
    @functools.wraps(original)
    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        if os.path.isdir(pretrained_model_name_or_path or ""):
            finish_interrupted(pretrained_model_name_or_path)
        return original(cls, pretrained_model_name_or_path, *args, **kwargs)

    return from_pretrained


def register_modular() -> None:
    """Makes ``ModularPipeline.load_components`` accept ``quantization_config=PipelineQuantizationConfig(...)``."""
    from diffusers.modular_pipelines.modular_pipeline import ModularPipeline

    original = ModularPipeline.load_components
    if hasattr(original, "_requanto"):
        return

    @functools.wraps(original)
    def load_components(self: Any, names: Any = None, *args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("quantization_config")
        if hasattr(config, "_resolve_quant_config") or isinstance(config, dict):
            check_names(config, list(self._component_specs))
        if hasattr(config, "_resolve_quant_config"):
            kwargs["quantization_config"] = _by_component(self, config)
        return original(self, names, *args, **kwargs)

    load_components._requanto = True
    ModularPipeline.load_components = load_components


def is_ours(config: Any) -> bool:
    """Whether a PipelineQuantizationConfig uses Requanto for any component."""
    if config is None:
        return False
    mapped = (config.quant_mapping or {}).values()
    return config.quant_backend == "quanto" or any(isinstance(c, QuantoConfig) for c in mapped)


def check_names(config: Any, components: list[str]) -> list[str]:
    """Returns the component names in the config.

    Raises:
        ValueError: a name is not among ``components``.
    """
    if isinstance(config, dict):
        where, named = "quantization_config", [name for name in config if name != "default"]
    elif config.quant_mapping:
        where, named = "quant_mapping", list(config.quant_mapping)
    else:
        where, named = "components_to_quantize", list(config.components_to_quantize or ())
    unknown = sorted(set(named) - set(components))
    if unknown:
        raise ValueError(
            f"{where} names {', '.join(map(repr, unknown))}, which the pipeline does not have. Its components: "
            f"{', '.join(sorted(components))}."
        )
    return named


def _check_models(components: dict[str, Any]) -> None:
    """Raises for components without weights, such as a scheduler; Diffusers would ignore them without a warning."""
    import torch

    for name, (library, class_name) in components.items():
        found = getattr(importlib.import_module(library), class_name, None) if library in _LIBRARIES else None
        if isinstance(found, type) and not issubclass(found, torch.nn.Module):
            raise ValueError(f"{name} is a {class_name}, which has no weights to quantize; leave it out")


def _by_component(pipeline: Any, config: Any) -> dict[str, Any]:
    import torch
    from diffusers import ModelMixin

    found = {}
    for name, spec in pipeline._component_specs.items():
        hint = spec.type_hint
        if isinstance(hint, type) and issubclass(hint, torch.nn.Module):
            chosen = config._resolve_quant_config(is_diffusers=issubclass(hint, ModelMixin), module_name=name)
            if chosen is not None:
                found[name] = chosen
    return found


def _is_quanto(config: Any) -> bool:
    method = getattr(config, "quant_method", None)
    return getattr(method, "value", method) == "quanto"


def _wrap_validate(original: Any) -> Any:
    """Converts built-in QuantoConfigs to ours before validation: Diffusers no longer has the built-in ones registered."""

    @functools.wraps(original)
    def _validate_quant_mapping_args(self: Any) -> None:
        self.quant_mapping = {
            name: as_config(config) if _is_quanto(config) else config for name, config in self.quant_mapping.items()
        }
        original(self)

    return _validate_quant_mapping_args


def _wrap_resolve(original: Any) -> Any:
    @functools.wraps(original)
    def _resolve_quant_config(self: Any, is_diffusers: bool = True, module_name: str | None = None) -> Any:
        config = original(self, is_diffusers=is_diffusers, module_name=module_name)
        if isinstance(config, QuantoConfig):
            # Each component records its weights in its own copy.
            config = copy.deepcopy(config)
            config.shared = not self.is_granular
            self.config_mapping[module_name] = config
        elif config is not None and is_ours(self):
            _check_library(config, is_diffusers, module_name)
        return config

    _resolve_quant_config._requanto = True
    return _resolve_quant_config


def _check_library(config: Any, is_diffusers: bool, name: str | None) -> None:
    library = type(config).__module__.partition(".")[0]
    wanted = "diffusers" if is_diffusers else "transformers"
    if library in _LIBRARIES and library != wanted:
        raise TypeError(
            f"quant_mapping[{name!r}] is a {library}.{type(config).__name__}, and {name} is a model of {wanted}: use "
            f"{wanted}.{type(config).__name__}, or requanto.QuantoConfig, which works for both."
        )
