"""Registry of quantized module classes for float module classes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import nn

from requanto.config.own_forward import overrides_forward, unusual

logger = logging.getLogger(__name__)


class Registry:
    """Float module classes and their quantized counterparts.

    A float class can be registered by its full name, if importing it would add a dependency
    (``"transformers.pytorch_utils.Conv1D"``).
    """

    def __init__(self, parent: Registry | None = None) -> None:
        self._table: dict[type | str, type] = {}
        self._parent = parent

    def register(self, module_cls: type | str) -> Callable[[type], type]:
        """Decorator that registers a quantized class for ``module_cls``, and replaces an earlier one."""

        def add(qmodule_cls: type) -> type:
            self._table[module_cls] = qmodule_cls
            return qmodule_cls

        return add

    def find(self, module: nn.Module, name: str = "") -> type | None:
        """The quantized class for a module: that of the nearest registered base class.

        None, with a warning, for a subclass that overrides forward, which must be registered itself, and for a layer whose
        weight no quantized module can hold (`requanto.config.own_forward`).

        Args:
            name: the module's name in its model, for the warning.
        """
        shown = f"{name} ({type(module).__qualname__})" if name else type(module).__qualname__
        reason = unusual(module, module._parameters.get("weight"))
        if reason is not None:
            logger.warning("%s stays float: %s", shown, reason)
            return None
        for base in type(module).__mro__:
            found = self._table.get(base) or self._table.get(f"{base.__module__}.{base.__qualname__}")
            if found is None:
                continue
            if overrides_forward(module, base):
                logger.warning(
                    "%s derives from %s but overrides forward, so it stays float; register a quantized class for it with "
                    "requanto.register_qmodule",
                    shown,
                    base.__qualname__,
                )
                return None
            return found
        return self._parent.find(module, name) if self._parent is not None else None


#: the registry that requanto.quantize uses
modules = Registry()


def register_qmodule(module_cls: type) -> Callable[[Any], Any]:
    """Registers a quantized module: ``@register_qmodule(MyModule)`` above ``class QMyModule(QModuleMixin, MyModule)``.

    The class must define ``qcreate(cls, module, weights, activations, optimizer, device)`` (see `QModuleMixin.qcreate`), and
    ``forward``, which uses ``self.qweight`` in place of ``self.weight``.
    """
    return modules.register(module_cls)
