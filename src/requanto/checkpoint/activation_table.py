"""Modules that hold activation scales, written into a checkpoint's config and made again from it.

Their scales are tensors of the checkpoint (``M.input_scale``, ``M.output_scale``); what they are scales of stands in
config.json, ``quantization_config.activation_modules``: module name -> type. A module there becomes its quantized
counterpart (QLinear, QLayerNorm ...) before weights are loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

from requanto.checkpoint.files import stored_keys
from requanto.checkpoint.format import CheckpointError, parse_spec
from requanto.dtypes.qtypes import resolve_qtype
from requanto.nn.mixin import QModuleMixin
from requanto.nn.registry import modules as registry
from requanto.nn.swap import quantize_in_place

SCALES = ("input_scale", "output_scale")


def activation_table(model: nn.Module) -> dict[str, str]:
    """Module name -> type of its activations, for every module that holds activation scales.

    Raises:
        ValueError: a weight is under quantization but still float; or the model itself is such a module, without a name.
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
) -> None:
    """Makes the modules of a table, on the device of the model (meta, before weights are loaded).

    Args:
        model: the float model.
        table: what :func:`activation_table` gave.
        tensors: name -> description of the quantized weights.
        files: safetensors files that the scales will be read from; they are checked against the table.
        local: names under which this model may know a module of the checkpoint.

    Raises:
        CheckpointError: table, model and files do not belong together.
    """
    found = dict(model.named_modules())
    for name, kind in table.items():
        here = next((candidate for candidate in local(name) if candidate in found), None)
        if here is None:
            continue  # a part that this model does not have, such as the head of the model that was saved
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
            f"quantization_config.activation_modules names {next(iter(table))!r} ..., no module of it is here"
        )
    _check_files(model, table, [file for file in files if str(file).endswith(".safetensors")])


def _check_files(model: nn.Module, table: Mapping[str, str], files: list[str | Path]) -> None:
    """Refuses files with fewer scales than the table describes, or more. A library may rename what it loads: where names
    differ, their number decides."""
    if not files:
        return
    own = set(model.state_dict())  # a model may have something of that name which is none of ours
    wanted = {f"{name}.{scale}" for name in table for scale in SCALES}
    stored = {key for key in stored_keys(files) if key.rpartition(".")[2] in SCALES}
    lost, extra = sorted(wanted - stored), sorted(stored - wanted - own)
    if lost and len(lost) > len(extra):
        raise CheckpointError(
            f"{lost[0]} is not in the files, and quantization_config.activation_modules names its module "
            f"({len(lost) - len(extra)} scales are missing): a shard is missing, or the files belong to another checkpoint"
        )
    if extra and len(extra) > len(lost):
        raise CheckpointError(
            f"the files hold {extra[0]} ({len(extra) - len(lost)} such scales), which quantization_config."
            f"activation_modules does not describe; restore the config.json that was saved with these files"
        )


def settle(model: nn.Module) -> None:
    """Reads off loaded scales which modules are calibrated, and which outputs stay float."""
    for name, module in model.named_modules():
        if isinstance(module, QModuleMixin) and module.activation_qtype is not None:
            for scale in (module.input_scale, module.output_scale):
                if scale.is_meta:
                    raise CheckpointError(f"the activation scales of {name} were not loaded: they are not in the files")
                if not bool(torch.isfinite(scale) & (scale > 0)):
                    raise CheckpointError(
                        f"an activation scale of {name} is {float(scale)}: the checkpoint is damaged, take it from its "
                        f"source again"
                    )
            module.settle_scales()
