"""Which quantized module stands for which float module."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import nn

logger = logging.getLogger(__name__)


class Registry:
    """Float module classes and their quantized counterparts.

    A class is given itself, or by its full name where importing it would cost a dependency
    (``"transformers.pytorch_utils.Conv1D"``).
    """

    def __init__(self, parent: Registry | None = None) -> None:
        self._table: dict[type | str, type] = {}
        self._parent = parent

    def register(self, module_cls: type | str) -> Callable[[type], type]:
        """Decorator: the class below it stands for ``module_cls``, in place of an earlier one."""

        def add(qmodule_cls: type) -> type:
            self._table[module_cls] = qmodule_cls
            return qmodule_cls

        return add

    def find(self, module: nn.Module) -> type | None:
        """The quantized class of a module: that of the nearest registered class it derives from.

        A subclass with a forward of its own is not its base class: it is left alone, with a warning, until it is
        registered itself.
        """
        for base in type(module).__mro__:
            found = self._table.get(base) or self._table.get(f"{base.__module__}.{base.__qualname__}")
            if found is None:
                continue
            if type(module).forward is not base.forward:
                logger.warning(
                    "%s derives from %s but has a forward of its own and stays float; register a quantized class for "
                    "it with requanto.register_qmodule",
                    type(module).__qualname__,
                    base.__qualname__,
                )
                return None
            return found
        return self._parent.find(module) if self._parent is not None else None


#: the modules that requanto.quantize knows
modules = Registry()


def register_qmodule(module_cls: type) -> Callable[[Any], Any]:
    """Registers a quantized module: ``@register_qmodule(MyModule)`` above ``class QMyModule(QModuleMixin, MyModule)``.

    It defines ``qcreate(cls, module, weights, activations, optimizer, device)``, which makes an empty quantized module
    like ``module``, and ``forward``, which computes with ``self.qweight`` in place of ``self.weight``.
    """
    return modules.register(module_cls)
