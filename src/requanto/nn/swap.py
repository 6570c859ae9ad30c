"""Turns a float module into its quantized counterpart and back, in place.

Only the class of the module object changes. So a root module can be quantized, and references to a module, its hooks and
attributes that a user set stay valid.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

from torch import nn

from requanto.dtypes.qtypes import qtype
from requanto.nn.mixin import QModuleMixin
from requanto.nn.registry import Registry, modules
from requanto.scales.optimizers import Optimizer

_FLOAT = "_requanto_float"


def quantize_in_place(
    module: nn.Module,
    weights: qtype | None,
    activations: qtype | None,
    optimizer: Optimizer | None,
    group_size: int | str | None,
    symmetric: bool | None,
    name: str,
    registry: Registry = modules,
    options: Mapping[str, Any] | None = None,
) -> bool:
    """Turns ``module`` into its quantized counterpart; returns False if there is none.

    Args:
        options: further keywords of `QTensor.quantize`.
    """
    qmodule_cls = registry.find(module, name)
    if qmodule_cls is None:
        return False
    qmodule = qmodule_cls.from_module(module, weights=weights, activations=activations, optimizer=optimizer)
    if qmodule is None:
        return False
    qmodule.weight_group_size, qmodule.weight_symmetric = group_size, symmetric
    qmodule.weight_options = dict(options or {})
    for hooks in ("_forward_hooks", "_forward_pre_hooks"):
        merged = getattr(module, hooks)
        merged.update(getattr(qmodule, hooks))
        qmodule.__dict__[hooks] = merged
    for handle in getattr(qmodule, "_quantize_hooks", {}).values():
        _point_at(handle, qmodule)
    before = dict(module.__dict__)
    state = {**module.__dict__, **qmodule.__dict__}
    module.__dict__[_FLOAT] = (type(module), set(before))
    state[_FLOAT] = module.__dict__[_FLOAT]
    module.__class__ = type(qmodule)
    module.__dict__.update(state)
    module.name = name
    return True


def _point_at(handle: object, module: nn.Module) -> None:
    """Makes a hook's handle refer to the module's merged hooks, so that it can remove the hook."""
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        if handle.id in hooks:  # type: ignore[attr-defined]
            handle.hooks_dict_ref = weakref.ref(hooks)  # type: ignore[attr-defined]


def restore_float_class(module: QModuleMixin) -> bool:
    """Undoes :func:`quantize_in_place`, except for the weight, which may be a QTensor by now.

    Returns False if the module was constructed as a quantized one.
    """
    made_from = module.__dict__.get(_FLOAT)
    if made_from is None:
        return False
    for handle in getattr(module, "_quantize_hooks", {}).values():
        handle.remove()
    for scale in ("input_scale", "output_scale"):
        module._buffers.pop(scale, None)
    float_cls, attributes = made_from
    for attribute in set(module.__dict__) - attributes:
        del module.__dict__[attribute]
    module.__class__ = float_cls
    return True
