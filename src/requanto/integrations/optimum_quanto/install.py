"""install_as_optimum_quanto: ``import optimum.quanto`` resolves to Requanto for the whole process."""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Submodule of optimum.quanto -> our modules that define its public names. Where a function and a submodule have the same
# name (optimum.quanto.quantize), the attribute is the function, as in optimum-quanto.
_HERE = "requanto.integrations.optimum_quanto"
_OPTIMIZERS = ("requanto.scales.optimizers",)
_TENSORS = (f"{_HERE}.base", f"{_HERE}.weights", f"{_HERE}.activations")
_LAYOUT: dict[str, tuple[str, ...]] = {
    "calibrate": (f"{_HERE}.modules", "requanto.scales.observers"),
    "quantize": (f"{_HERE}.quantize",),
    "nn": (f"{_HERE}.modules",),
    "nn.qmodule": (f"{_HERE}.modules",),
    "nn.qlinear": (f"{_HERE}.modules",),
    "nn.qconv2d": (f"{_HERE}.modules",),
    "nn.qlayernorm": (f"{_HERE}.modules",),
    "library": (f"{_HERE}.library",),
    "library.quantize": (f"{_HERE}.library",),
    "library.unpack": (f"{_HERE}.library",),
    "library.qbytes_mm": (f"{_HERE}.library",),
    "library.extensions": (f"{_HERE}.library",),
    "models": (f"{_HERE}.library", f"{_HERE}.wrappers"),
    "models.transformers_models": (f"{_HERE}.wrappers",),
    "models.diffusers_models": (f"{_HERE}.wrappers",),
    "tensor": (*_TENSORS, *_OPTIMIZERS, f"{_HERE}.library", "requanto.scales.quanto", "requanto.dtypes.qtypes"),
    "tensor.core": (f"{_HERE}.library",),
    "tensor.qtype": ("requanto.dtypes.qtypes",),
    "tensor.qtensor": (f"{_HERE}.base",),
    "tensor.qbytes": (f"{_HERE}.base",),
    "tensor.qbits": (f"{_HERE}.base",),
    "tensor.packed": (f"{_HERE}.base",),
    "tensor.grouped": ("requanto.scales.quanto",),
    "tensor.activations": (f"{_HERE}.activations",),
    "tensor.activations.qbytes": (f"{_HERE}.activations",),
    "tensor.activations.quantization": (f"{_HERE}.activations",),
    "tensor.weights": (f"{_HERE}.weights",),
    "tensor.weights.qbytes": (f"{_HERE}.weights",),
    "tensor.weights.qbits": (f"{_HERE}.weights",),
    "tensor.weights.quantization": (f"{_HERE}.weights",),
    "tensor.optimizers": _OPTIMIZERS,
    "tensor.optimizers.optimizer": _OPTIMIZERS,
    "tensor.optimizers.symmetric_optimizer": _OPTIMIZERS,
    "tensor.optimizers.affine_optimizer": _OPTIMIZERS,
    "tensor.optimizers.absmax_optimizer": _OPTIMIZERS,
    "tensor.optimizers.max_optimizer": _OPTIMIZERS,
    "tensor.optimizers.hqq_optimizer": _OPTIMIZERS,
}
_MARK = "__requanto__"


class _Alias(ModuleType):
    """A module that looks up its attributes in other modules on access."""

    def __init__(self, name: str, sources: tuple[str, ...]) -> None:
        super().__init__(name, f"Requanto under the name {name}.")
        self.__path__: list[str] = []
        self.__spec__ = ModuleSpec(name, None, origin="requanto", is_package=True)
        self.__spec__.submodule_search_locations = []
        self.__file__ = __file__
        self.__dict__[_MARK] = True
        self.__dict__["_sources"] = sources

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__version__":
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        for source in self.__dict__["_sources"]:
            try:
                value = getattr(importlib.import_module(source), name)
            except AttributeError:
                continue
            self.__dict__[name] = value
            return value
        raise AttributeError(
            f"module {self.__name__!r} has no attribute {name!r}: Requanto provides optimum-quanto 0.2.7's public names"
        )


def install_as_optimum_quanto() -> None:
    """Makes ``import optimum.quanto`` import Requanto in this process; a second call does nothing.

    Afterwards ``import optimum.quanto`` (and ``.nn``, ``.tensor.packed`` ...) returns Requanto whether or not optimum-quanto
    is installed. Transformers and Diffusers report it as available, and their features that need it use Requanto.

    Raises:
        RuntimeError: optimum-quanto itself is already imported; the two do not handle each other's tensors.
    """
    imported = sys.modules.get("optimum.quanto")
    if imported is not None and _MARK in imported.__dict__:
        return
    if imported is not None:
        raise RuntimeError(
            f"optimum-quanto is imported already (from {getattr(imported, '__file__', 'unknown')}): call "
            f"requanto.install_as_optimum_quanto() before anything imports optimum.quanto"
        )
    from requanto.integrations.optimum_quanto import __all__ as names
    from requanto.integrations.optimum_quanto import library

    library.define_operators()
    optimum = _optimum()
    top = _Alias("optimum.quanto", (_HERE,))
    top.__version__ = "0.2.7"
    top.__all__ = list(names)
    sys.modules["optimum.quanto"] = top
    optimum.quanto = top  # type: ignore[attr-defined]
    for path, sources in _LAYOUT.items():
        full = f"optimum.quanto.{path}"
        sys.modules[full] = _Alias(full, sources)
        parent, _, leaf = full.rpartition(".")
        if leaf not in ("quantize", "group"):  # the attribute is the function of this name
            setattr(sys.modules[parent], leaf, sys.modules[full])
    _reset_transformers()
    _reset_diffusers()


def _optimum() -> ModuleType:
    """Returns the installed package ``optimum``, or a new empty one."""
    try:
        return importlib.import_module("optimum")
    except ImportError:
        package = ModuleType("optimum", "Created by requanto.install_as_optimum_quanto.")
        package.__path__ = []  # type: ignore[attr-defined]
        package.__spec__ = ModuleSpec("optimum", None, is_package=True)
        sys.modules["optimum"] = package
        return package


def _reset_transformers() -> None:
    """Clears Transformers' cached results of whether optimum-quanto is installed."""
    utils = sys.modules.get("transformers.utils.import_utils")
    for name in ("is_optimum_available", "is_optimum_quanto_available", "is_quanto_greater"):
        clear = getattr(getattr(utils, name, None), "cache_clear", None)
        if clear is not None:
            clear()


def _reset_diffusers() -> None:
    """Corrects Diffusers' result of whether optimum-quanto is installed, now or once Diffusers is imported."""
    from requanto import integrations

    integrations.HOOKS["diffusers.utils.import_utils"] = (__name__, "mark_diffusers")
    if "diffusers.utils.import_utils" in sys.modules:
        mark_diffusers()


def mark_diffusers() -> None:
    """Marks optimum-quanto as available in ``diffusers.utils.import_utils``."""
    utils = sys.modules["diffusers.utils.import_utils"]
    utils._optimum_quanto_available = True  # type: ignore[attr-defined]
    utils._optimum_quanto_version = "0.2.7"  # type: ignore[attr-defined]
    clear = getattr(utils.is_optimum_quanto_version, "cache_clear", None)
    if clear is not None:
        clear()
