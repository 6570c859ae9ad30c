"""Quantized weights in state dicts and files of ordinary tensors, such as those of ``safetensors.torch.save_file``.

A weight ``W`` becomes its parts ``W_qdata``, ``W_scale`` ... and ``W_spec``, a uint8 tensor with the text that describes it:
such a file has no config.json, and a dict that was read from it no metadata. No tensor is named ``W``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from requanto.checkpoint.digests import digest, mismatch
from requanto.checkpoint.format import PARTS, CheckpointError, check_version, rebuild, spec_text
from requanto.config.config import FORMAT, format_version_of
from requanto.runtime.settings import settings
from requanto.tensor.qtensor import QTensor

#: name of the tensor that describes a weight
SPEC = "spec"
_SUFFIXES = tuple(f"_{part}" for part in (*PARTS, SPEC))
_BLOCK = 64


def described(weight: QTensor) -> torch.Tensor:
    """The tensor ``W_spec``: JSON in UTF-8, with spaces up to a multiple of 64 bytes so that what follows is aligned."""
    line = spec_text(weight)
    fields = {
        "format": FORMAT,
        "format_version": format_version_of({"weight": line}),
        "weight": line,
        "dtype": str(weight.dtype).removeprefix("torch."),
    }
    if settings.write_digests and weight.device.type != "meta":
        fields["digest"] = digest(line, weight.inner_tensors())
    text = json.dumps(fields).encode()
    return torch.frombuffer(bytearray(text.ljust(-(-len(text) // _BLOCK) * _BLOCK)), dtype=torch.uint8)


def flatten_described(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """A dict of tensors with every QTensor ``W`` replaced by its parts and ``W_spec``.

    Raises:
        ValueError: another tensor of the dict has the name of a part.
    """
    flat: dict[str, Any] = {}
    for name, value in tensors.items():
        if not isinstance(value, QTensor):
            flat[name] = value
            continue
        parts = {f"{name}_{part}": inner.contiguous() for part, inner in value.inner_tensors().items()}
        parts[f"{name}_{SPEC}"] = described(value)
        taken = sorted(parts.keys() & tensors.keys())
        if taken:
            raise ValueError(
                f"the quantized weight {name} is stored as {', '.join(parts)}, but {taken[0]} is the name of another "
                f"tensor; rename it"
            )
        flat |= parts
    return flat


def _fields(value: Any) -> dict[str, Any] | None:
    """What a tensor ``W_spec`` says; None for any other tensor."""
    if not isinstance(value, torch.Tensor) or value.dtype != torch.uint8 or value.dim() != 1:
        return None
    if value.device.type == "meta" or not 0 < value.numel() <= 4096:
        return None
    try:
        fields = json.loads(bytes(value.tolist()).decode())
    except (ValueError, RecursionError):
        return None
    return fields if isinstance(fields, dict) and fields.get("format") == FORMAT else None


def join_described(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The reverse of `flatten_described`; a dict without described weights is returned with the same entries.

    Raises:
        CheckpointError: parts are missing or do not fit their description, or the dict also holds a tensor of the weight's
            name.
    """
    found: dict[str, dict[str, Any]] = {}
    for key in tensors:
        if isinstance(key, str) and key.endswith(f"_{SPEC}"):
            fields = _fields(tensors[key])
            if fields is not None:
                found[key.removesuffix(f"_{SPEC}")] = fields
    if not found:
        return dict(tensors)
    joined: dict[str, Any] = {}
    for key, value in tensors.items():
        owner = _owner(key, found)
        if owner is None:
            joined[key] = value
        elif owner not in joined:
            if owner in tensors:
                raise CheckpointError(
                    f"{owner} is there as a tensor and as the parts of a quantized weight; remove one"
                )
            joined[owner] = _rebuilt(owner, found[owner], tensors)
    return joined


def _owner(key: Any, found: Iterable[str]) -> str | None:
    if isinstance(key, str):
        for suffix in _SUFFIXES:
            if key.endswith(suffix) and key.removesuffix(suffix) in found:
                return key.removesuffix(suffix)
    return None


def check_described(name: str, found: Any, line: str) -> None:
    """Checks that a weight is what config.json says, where both describe it.

    Args:
        name: name of the weight.
        found: the tensor ``W_spec``, or the weight itself.
        line: its line in ``quantization_config.tensors``.

    Raises:
        CheckpointError: they differ.
    """
    says = spec_text(found) if isinstance(found, QTensor) else (_fields(found) or {}).get("weight")
    if says != line:
        raise CheckpointError(
            f"{name} is {says!r} according to the file and {line!r} according to config.json: they do not belong "
            f"together. Use the config.json of the model that the file was saved from."
        )


def _rebuilt(name: str, fields: dict[str, Any], tensors: Mapping[str, Any]) -> QTensor:
    line, dtype = fields.get("weight"), getattr(torch, str(fields.get("dtype")), None)
    if not isinstance(line, str) or not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"{name}_{SPEC} is damaged: found {fields}, expected the fields weight and dtype")
    check_version(fields.get("format"), fields.get("format_version"), f"{name}_{SPEC}")
    parts = {part: tensors[f"{name}_{part}"] for part in PARTS if f"{name}_{part}" in tensors}
    if "qdata" in parts:  # a loader that picks a device by a parameter's name finds none for its parts
        parts = {part: tensor.to(parts["qdata"].device) for part, tensor in parts.items()}
    wanted = fields.get("digest")
    tensor = rebuild(name, line, parts, dtype, check_codes=wanted is None)
    if wanted is not None and settings.check_digests and not parts["qdata"].is_meta:
        error = mismatch(name, line, parts, wanted, f"{name}_{SPEC}")
        if error is not None:
            raise error
    return tensor


def stray_part(tensors: Iterable[str], parameters: Iterable[str], known: Iterable[str]) -> tuple[str, str] | None:
    """A key that is a part of one of a model's parameters and was not joined, and that parameter's name; None without one.

    Args:
        tensors: keys of a state dict after `join_described`.
        parameters: names of the model's parameters.
        known: keys that the model reads itself.
    """
    parameters, known = set(parameters), set(known)
    for key in tensors:
        owner = None if key in known else _owner(key, parameters)
        if owner is not None:
            return key, owner
    return None


def check_joined(tensors: Iterable[str], model: nn.Module) -> None:
    """Checks that a state dict holds no part of one of the model's parameters that was not joined.

    A loader that is not strict would ignore such a part, and the parameter would keep its old values.

    Args:
        tensors: keys of a state dict after `join_described`.
        model: the model that it is loaded into.

    Raises:
        CheckpointError: it holds one, so its description is missing.
    """
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    buffers = [name for name, _ in model.named_buffers(remove_duplicate=False)]
    stray = stray_part(tensors, parameters, [*parameters, *buffers])
    if stray is not None:
        raise CheckpointError(
            f"the state dict holds {stray[0]}, a part of a quantized weight, without the {stray[1]}_spec that "
            f"describes it, so the weight cannot be put together. Load a checkpoint that save_pretrained wrote with "
            f"from_pretrained (its config.json describes the weights); safetensors.torch.save_file(model.state_dict(), ...) "
            f"with Requanto imported writes the description too."
        )
