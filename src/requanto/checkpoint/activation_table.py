"""Saving and restoring modules that hold static activation scales.

The scales are tensors of the checkpoint (``M.input_scale``, ``M.output_scale``). The type of the activations is in
config.json, ``quantization_config.activation_modules``: module name -> type. Before weights are loaded, each module listed
there is replaced by its quantized counterpart (QLinear, QLayerNorm ...).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

from requanto.checkpoint.digests import check_scales
from requanto.checkpoint.files import stored_keys
from requanto.checkpoint.format import CheckpointError, parse_spec
from requanto.dtypes.qtypes import resolve_qtype
from requanto.nn.mixin import QModuleMixin
from requanto.nn.registry import modules as registry
from requanto.nn.swap import quantize_in_place

SCALES = ("input_scale", "output_scale")


def activation_table(model: nn.Module) -> dict[str, str]:
    """Maps the name of every module that holds activation scales to the type of its activations.

    Raises:
        ValueError: a module was prepared for quantization, but its weight is still float.
    """
    table = {}
    for name, module in model.named_modules():
        if not isinstance(module, QModuleMixin):
            continue
        if module.weight_qtype is not None and module.weight is not None and not module.frozen:
            raise ValueError(
                f"{name or type(module).__name__} is under quantization but still float: call requanto.freeze(model) "
                f"before save_pretrained"
            )
        if module.activation_qtype is not None:
            table[name] = module.activation_qtype.name
    return table


def add_activation_modules(
    model: nn.Module,
    table: Mapping[str, str],
    tensors: Mapping[str, str],
    files: Iterable[str | Path] = (),
    local: Callable[[str], Iterable[str]] = lambda name: (name,),
    digests: Mapping[str, str] | None = None,
) -> None:
    """Replaces the modules of ``table`` by their quantized counterparts, on the model's device (meta before loading).

    Args:
        model: the float model.
        table: the result of :func:`activation_table` for the saved model.
        tensors: name -> description of the quantized weights.
        files: safetensors files that the scales will be read from; they are checked against the table.
        digests: ``quantization_config.digests``.
        local: maps a module name of the checkpoint to the names it may have in this model.

    Raises:
        CheckpointError: table, model and files do not match.
    """
    found = dict(model.named_modules())
    for name, kind in table.items():
        here = next((candidate for candidate in local(name) if candidate in found), None)
        if here is None:
            continue  # this model lacks the module, e.g. the head of the saved model
        text = tensors.get(f"{name}.weight")
        weights = None if text is None else parse_spec(text, f"{name}.weight")["qtype"]
        try:
            made = quantize_in_place(found[here], weights, resolve_qtype(kind), None, "default", None, here, registry)
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"quantization_config.activation_modules[{name!r}] is {kind!r}: {error}") from error
        if not made:
            raise CheckpointError(
                f"quantization_config.activation_modules names {name!r}, a {type(found[here]).__name__}, which has no "
                f"quantized counterpart: register one with requanto.register_qmodule before loading"
            )
    if table and not any(candidate in found for name in table for candidate in local(name)):
        raise CheckpointError(
            f"the model has none of the {len(table)} modules of quantization_config.activation_modules, e.g. "
            f"{next(iter(table))!r}"
        )
    stored = [file for file in files if str(file).endswith(".safetensors")]
    _check_files(model, table, stored)
    check_scales(table, digests or {}, stored)


def _check_files(model: nn.Module, table: Mapping[str, str], files: list[str | Path]) -> None:
    """Raises CheckpointError if the files hold fewer or more scales than the table describes.

    The library may rename tensors on loading, so differing names alone are accepted; only their number is compared.
    """
    if not files:
        return
    own = set(model.state_dict())  # the model may have tensors of its own with such a name
    wanted = {f"{name}.{scale}" for name in table for scale in SCALES}
    stored = {key for key in stored_keys(files) if key.rpartition(".")[2] in SCALES}
    lost, extra = sorted(wanted - stored), sorted(stored - wanted - own)
    if lost and len(lost) > len(extra):
        raise CheckpointError(
            f"{lost[0]} is not in the files, and quantization_config.activation_modules names its module "
            f"({len(lost) - len(extra)} scales are missing): a shard is missing, or the files belong to another checkpoint"
        )
    # A module of the model whose scales the files hold under its own name: nothing was renamed, its line was lost.
    modules = {name for name, module in model.named_modules() if not isinstance(module, QModuleMixin)}
    plain = [key for key in extra if key.rpartition(".")[0] in modules]
    if plain:
        raise CheckpointError(
            f"the files hold {plain[0]}, which quantization_config.activation_modules does not describe; restore "
            "the config.json "
            f"that was saved with these files"
        )
    if extra and len(extra) > len(lost):
        raise CheckpointError(
            f"the files hold {extra[0]} ({len(extra) - len(lost)} such scales), which quantization_config."
            f"activation_modules does not describe; restore the config.json that was saved with these files"
        )


def apply_loaded_scales(model: nn.Module) -> None:
    """Checks the loaded activation scales, then sets from them which modules are calibrated and which outputs stay float."""
    for name, module in model.named_modules():
        if isinstance(module, QModuleMixin) and module.activation_qtype is not None:
            for scale in (module.input_scale, module.output_scale):
                if scale.is_meta:
                    raise CheckpointError(f"the activation scales of {name} were not loaded: they are not in the files")
                if not bool(torch.isfinite(scale) & (scale > 0)):
                    raise CheckpointError(
                        f"an activation scale of {name} is {float(scale)}: the checkpoint is damaged, download or save "
                        f"it again"
                    )
            module.refresh_calibrated()
