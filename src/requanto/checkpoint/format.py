"""The stored form of a quantized weight, versions 1 and 2 (docs/format.md).

A weight ``W`` is stored as ``W_qdata``, ``W_scale``, when affine ``W_shift``, and of learned types ``W_codebook``; never
under its own name, so that a loader without the plugin finds it missing instead of taking codes for weights. What the
tensors cannot say stands in config.json, ``quantization_config.tensors``, a line a weight:

    "model.layers.0.mlp.up_proj.weight": "qint4 1536x576 group=64 affine"

The words after type and shape: ``group=N`` (else one scale a row), ``affine`` (else symmetric), ``axis=N`` (else 0),
``transposed``, ``activation=TYPE`` (inputs are quantized on the fly), ``rank=R`` (a merged adapter is kept beside the
codes: ``W_up`` and ``W_down``, and the weight is ``dequant(W) + up @ down``), ``scales=B`` (``W_scale`` and ``W_shift`` are
codes of B bits, and ``W_row_scale`` is there: `requanto.scales.compact`), ``rotation=B`` (codes are those of rows rotated in
blocks of B: `requanto.tensor.rotation`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from requanto.config.config import FORMAT, FORMAT_VERSION
from requanto.dtypes.bit_packing import packed_length
from requanto.dtypes.qtypes import qtypes, resolve_qtype
from requanto.scales.compact import check_scale_bits, stored_length
from requanto.tensor.qtensor import QTensor
from requanto.tensor.rotation import check_rotation

PARTS = QTensor.tensor_data_names


class CheckpointError(ValueError):
    """A quantized checkpoint that cannot be read as what it says it is."""


def spec_text(tensor: QTensor) -> str:
    """The line that describes a tensor."""
    words = [tensor.qtype.name, "x".join(map(str, tensor.shape))]
    if tensor.group_size is not None:
        words.append(f"group={tensor.group_size}")
    if tensor.affine:
        words.append("affine")
    if tensor.axis:
        words.append(f"axis={tensor.axis}")
    if tensor.transposed:
        words.append("transposed")
    if tensor.activation is not None:
        words.append(f"activation={tensor.activation.name}")
    if tensor.rank:
        words.append(f"rank={tensor.rank}")
    if tensor.scale_bits is not None:
        words.append(f"scales={tensor.scale_bits}")
    if tensor.rotation is not None:
        words.append(f"rotation={tensor.rotation}")
    return " ".join(words)


def parse_spec(text: str, name: str) -> dict[str, Any]:
    """The reverse of :func:`spec_text`: keyword arguments of QTensor, with ``affine`` and ``rank``.

    Raises:
        CheckpointError: the line is not of that form.
    """
    try:
        kind, shape, *words = text.split()
        spec: dict[str, Any] = {
            "qtype": qtypes[kind],
            "shape": torch.Size(int(size) for size in shape.split("x")),
            "group_size": None,
            "axis": 0,
            "affine": False,
            "transposed": False,
            "activation": None,
            "rank": 0,
            "scale_bits": None,
            "rotation": None,
        }
        for word in words:
            key, _, value = word.partition("=")
            if key in ("affine", "transposed") and not value:
                spec[key] = True
            elif key == "group":
                spec["group_size"] = int(value)
            elif key in ("axis", "rank"):
                spec[key] = int(value)
            elif key == "scales":
                spec["scale_bits"] = check_scale_bits(int(value))
            elif key == "rotation":
                spec["rotation"] = check_rotation(int(value))
            elif key == "activation":
                spec["activation"] = resolve_qtype(value)
            else:
                raise KeyError(word)
        if spec["qtype"].is_unsigned or spec["qtype"].is_codebook:
            spec["qtype"].affine(not spec["affine"], name)
    except (KeyError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"quantization_config.tensors[{name!r}] is {text!r}, which is no description of a quantized weight "
            f"({error}); expected e.g. 'qint4 1536x576 group=64 affine'"
        ) from error
    return spec


def table_of(named: Iterable[tuple[str, torch.Tensor]]) -> dict[str, str]:
    """Name -> description of every quantized tensor."""
    return {name: spec_text(tensor) for name, tensor in named if isinstance(tensor, QTensor)}


def flatten(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state dict with every QTensor replaced by its stored parts, in place of the weight's own name."""
    flat: dict[str, Any] = {}
    for name, value in state_dict.items():
        if isinstance(value, QTensor):
            flat |= {f"{name}_{part}": inner for part, inner in value.inner_tensors().items()}
        else:
            flat[name] = value
    return flat


def expected_parts(spec: dict[str, Any]) -> dict[str, tuple[torch.Size, tuple[torch.dtype, ...]]]:
    """Shape and possible dtypes of each stored part that a description asks for."""
    shape = list(spec["shape"])
    if spec["transposed"]:
        shape[-1], shape[-2] = shape[-2], shape[-1]
    lead, length = shape[: spec["axis"] + 1], torch.Size(shape[spec["axis"] + 1 :]).numel()
    kind, group = spec["qtype"], spec["group_size"] or length
    codes = [*lead, packed_length(length, kind.bits)] if kind.is_packed else shape
    count, bits = length // group if group and length else 1, spec.get("scale_bits")
    groups = [*lead, count if bits is None else stored_length(count, bits)]
    floats = (torch.float32, torch.bfloat16, torch.float16)
    scales = floats if bits is None else (torch.uint8,)
    parts = {"qdata": (torch.Size(codes), (kind.storage_dtype,)), "scale": (torch.Size(groups), scales)}
    if spec["affine"]:
        parts["shift"] = (torch.Size(groups), scales)
    if bits is not None:
        parts["row_scale"] = (torch.Size([*lead, 1]), floats)
    if kind.is_learned:
        parts["codebook"] = (torch.Size([2**kind.bits]), floats)
    if spec["rank"]:
        parts["up"] = (torch.Size([*lead, spec["rank"]]), floats)
        parts["down"] = (torch.Size([*lead[:-1], spec["rank"], length]), floats)
    return parts


def rebuild(
    name: str, text: str, parts: dict[str, torch.Tensor], dtype: torch.dtype, check_values: bool = True
) -> QTensor:
    """The QTensor that stored parts and a description make.

    Args:
        name: the weight's name, for messages.
        text: its line in ``quantization_config.tensors``.
        parts: ``qdata``, ``scale``, when affine ``shift``, of learned types ``codebook``, with a low-rank term ``up`` and
            ``down``.
        dtype: float dtype the weight is seen as.
        check_values: refuse scales and shifts that hold NaN or Inf.

    Raises:
        CheckpointError: parts are missing, of another shape or dtype than described, or not finite.
    """
    spec = parse_spec(text, name)
    expected = expected_parts(spec)
    if set(parts) != set(expected):
        raise CheckpointError(
            f"{name} is described as {text!r} and needs the tensors {', '.join(f'{name}_{p}' for p in expected)}; "
            f"the checkpoint has {', '.join(f'{name}_{p}' for p in parts) or 'none of them'}"
        )
    for part, (shape, dtypes) in expected.items():
        found = parts[part]
        if found.shape != shape or found.dtype not in dtypes:
            raise CheckpointError(
                f"{name}_{part}: found {found.dtype} {tuple(found.shape)}, expected "
                f"{' or '.join(map(str, dtypes))} {tuple(shape)} for {text!r}. Config and tensors do not belong together: "
                f"restore the config.json that was saved with these files."
            )
        if (
            check_values
            and found.dtype.itemsize > 1
            and found.device.type != "meta"
            and not bool(torch.isfinite(found).all())
        ):
            raise CheckpointError(
                f"{name}_{part} holds NaN or Inf: the checkpoint is damaged, take it from its source again"
            )
    del spec["affine"], spec["rank"]
    return QTensor(**parts, dtype=dtype, **spec)


def check_version(format_name: str | None, version: int | None, where: str) -> None:
    """Refuses a format that this version cannot read.

    Raises:
        CheckpointError: an unknown format, or a version newer than known.
    """
    if format_name != FORMAT:
        raise CheckpointError(f"{where}: format {format_name!r} is unknown, expected {FORMAT!r}")
    if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
        raise CheckpointError(
            f"{where} is of format version {version!r}; this Requanto reads versions 1 to {FORMAT_VERSION}. "
            f"Install a newer one: pip install -U requanto"
        )
