"""Patches for other libraries (Transformers, Diffusers, accelerate, PEFT, safetensors, torch), one module per library.

`install()` imports none of them: a library module that is already imported is patched at once, any other when it is first
imported.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from types import ModuleType

#: module of a library -> (our module, function to call after the library's module is imported)
HOOKS: dict[str, tuple[str, str]] = {
    "transformers.quantizers.auto": ("requanto.integrations.transformers", "register"),
    "transformers.utils.quantization_config": ("requanto.integrations.builtin_configs", "register_transformers"),
    "transformers.cache_utils": ("requanto.integrations.transformers_cache_names", "register"),
    "transformers.configuration_utils": ("requanto.integrations.gguf_reader", "register"),
    "transformers.modeling_utils": ("requanto.integrations.transformers_model", "register"),
    "diffusers.quantizers.auto": ("requanto.integrations.diffusers", "register"),
    "diffusers.quantizers.quantization_config": ("requanto.integrations.builtin_configs", "register_diffusers"),
    "diffusers.quantizers.pipe_quant_config": ("requanto.integrations.diffusers_pipeline", "register"),
    "diffusers.pipelines.pipeline_utils": ("requanto.integrations.diffusers_pipeline", "register_pipelines"),
    "diffusers.modular_pipelines.modular_pipeline": ("requanto.integrations.diffusers_pipeline", "register_modular"),
    "diffusers.models.modeling_utils": ("requanto.integrations.diffusers_model", "register"),
    "diffusers.models.attention": ("requanto.integrations.diffusers_made_from", "register_attention"),
    "diffusers.models.attention_processor": (
        "requanto.integrations.diffusers_made_from",
        "register_attention_processor",
    ),
    "diffusers.training_utils": ("requanto.integrations.diffusers_made_from", "register_training"),
    "diffusers.loaders.single_file_model": ("requanto.integrations.diffusers_model", "register_single_file"),
    "diffusers.loaders.single_file": ("requanto.integrations.diffusers_single_files", "register_pipelines"),
    "diffusers.loaders.lora_pipeline": ("requanto.integrations.diffusers_hooks", "register_lora_expansion"),
    "diffusers.hooks.group_offloading": ("requanto.integrations.diffusers_hooks", "register_group_offloading"),
    "diffusers.hooks.layerwise_casting": ("requanto.integrations.diffusers_hooks", "register_layerwise_casting"),
    "accelerate": ("requanto.integrations.accelerate", "register"),
    "safetensors.torch": ("requanto.integrations.safetensors", "register"),
    "peft": ("requanto.integrations.peft", "register"),
    "torch.onnx": ("requanto.integrations.onnx", "register"),
    "peft.tuners.lora.corda": ("requanto.integrations.peft", "register_corda"),
    "diffusers.loaders.peft": ("requanto.integrations.diffusers_fusing", "register_models"),
    "diffusers.loaders.lora_base": ("requanto.integrations.diffusers_fusing", "register_pipelines"),
}


#: our module -> functions to call once its import has finished: it was imported first and is importing its library
_pending: dict[str, list[str]] = {}
_OUR_MODULES = frozenset(ours for ours, _ in HOOKS.values())


class _AfterImport(importlib.abc.MetaPathFinder):
    """Import finder for the modules in HOOKS and our own: loads them as usual, then calls their hooks."""

    def find_spec(self, fullname: str, path: object = None, target: ModuleType | None = None):  # type: ignore[no-untyped-def]
        if fullname not in HOOKS and fullname not in _OUR_MODULES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)  # type: ignore[arg-type]
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)  # type: ignore[assignment]
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, inner: importlib.abc.Loader) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> object:  # get_source, get_filename ...
        return getattr(self._inner, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._inner.exec_module(module)
        if module.__name__ in HOOKS:
            _run(module.__name__)
        for function in _pending.pop(module.__name__, ()):
            getattr(module, function)()


def _run(library_module: str) -> None:
    ours, function = HOOKS[library_module]
    module = importlib.import_module(ours)
    if hasattr(module, function):
        getattr(module, function)()
    else:  # our module is only partly imported: it is the one that imports the library
        _pending.setdefault(ours, []).append(function)


def install() -> None:
    """Installs the import hooks; a second call does nothing."""
    if any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        return
    from requanto.integrations import torch_modules

    torch_modules.register()
    sys.meta_path.insert(0, _AfterImport())
    for name in HOOKS:
        if sys.modules.get(name) is not None:  # None: importing the module is blocked
            _run(name)
