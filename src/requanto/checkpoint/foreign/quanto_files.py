"""Bit-exact conversion between optimum-quanto's stored tensors and QTensor.

Keys of a weight ``W`` (optimum-quanto 0.2.7):

    8 bits      ``W._data`` int8 or float8, the weight's shape; ``W._scale`` [out, 1 ...], a scalar if out = 1
    2, 4 bits   ``W._data._data`` uint8, one row per group, bit-packed along axis 0 (`scales.quanto.pack_split`);
                ``W._scale`` and ``W._shift`` [out * K / group, 1]; an integer shift is the code of zero

The module ``M`` also stores ``M.input_scale`` and ``M.output_scale``. Group sizes are not stored; they follow from
`scales.quanto.group_size_rule`. `checkpoint.foreign.quanto_directory` converts whole directories.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from requanto.checkpoint.format import CheckpointError
from requanto.checkpoint.values import check_values
from requanto.config.checks import shown
from requanto.dtypes.bit_packing import pack
from requanto.dtypes.qtypes import qtype, resolve_qtype
from requanto.scales.quanto import group_size_rule, pack_split, unpack_split
from requanto.tensor.qtensor import QTensor

#: suffixes of a weight's name
PARTS = ("._data", "._data._data", "._scale", "._shift")
#: suffixes of strings that old versions stored in the state dict
OLD_METADATA = (".qtype", ".axis", ".group_size", ".size", ".stride", ".activation_qtype", "._data.bits")


def quantized_names(keys: Iterable[str]) -> set[str]:
    """Returns the parameter names of the quantized weights among the keys of an optimum-quanto checkpoint."""
    return {key.removesuffix("._data._data").removesuffix("._data") for key in keys if key.endswith("._data")}


def checked_map(qmap: Any, where: Any) -> dict[str, dict[str, qtype | None]]:
    """The types of a quanto_qmap.json: module name -> ``weights`` and ``activations``, each a type or None.

    Raises:
        CheckpointError: the map has another form, or an unknown type.
    """
    if not isinstance(qmap, Mapping):
        raise CheckpointError(f"{where} holds {shown(qmap)}, expected an object: module name -> types")
    found: dict[str, dict[str, qtype | None]] = {}
    for name, entry in qmap.items():
        if not isinstance(entry, Mapping):
            raise CheckpointError(
                f"{where}: the entry of {shown(name)} is {shown(entry)}, expected an object with its types"
            )
        kinds: dict[str, qtype | None] = {}
        for key in ("weights", "activations"):
            value = entry.get(key)
            try:
                kinds[key] = None if value in (None, "none") else resolve_qtype(value)
            except (ValueError, TypeError) as error:
                raise CheckpointError(f"{where} says {key}={shown(value)} for {shown(name)}: {error}") from error
        if kinds["activations"] is not None and not kinds["activations"].fits_activations:
            raise CheckpointError(
                f"{where} says activations={shown(entry['activations'])} for {shown(name)}: activations are int8, float8, "
                f"nvfp4 or an MX type"
            )
        found[name] = kinds
    return found


def is_quanto_part(key: str) -> bool:
    """Whether a key is a part of a quantized weight of optimum-quanto."""
    return key.endswith(PARTS)


def owner_of(key: str) -> str | None:
    """The quantized weight of optimum-quanto that a stored tensor is a part of; None if it is none."""
    return next((key.removesuffix(part) for part in sorted(PARTS, key=len, reverse=True) if key.endswith(part)), None)


def to_qtensor(
    parts: Mapping[str, torch.Tensor], kind: qtype, shape: torch.Size | tuple[int, ...], name: str = "weight"
) -> QTensor:
    """Builds a QTensor from one weight's parts; its dtype is that of the scales.

    Args:
        parts: tensors by suffix: ``"._data"`` or ``"._data._data"``, ``"._scale"``, ``"._shift"``.
        kind: type of the codes, from quanto_qmap.json.
        shape: the float weight's shape, from the model.
        name: the weight's name, for messages.

    Raises:
        CheckpointError: parts are missing, or do not match the type and the shape.
    """
    shape = torch.Size(shape)
    _require_known(kind, name)
    needed = ("._data", "._scale") if kind.bits == 8 else ("._data._data", "._scale", "._shift")
    missing = [name + part for part in needed if part not in parts]
    if missing:
        raise CheckpointError(
            f"{name} is {kind.name} according to the map (quanto_qmap.json), but the checkpoint lacks {', '.join(missing)} "
            f"(it has {', '.join(name + part for part in parts) or 'none of its parts'})"
        )
    scale = parts["._scale"]
    if not scale.is_floating_point():
        raise CheckpointError(f"{name}._scale must be a float tensor, found {scale.dtype}")
    if kind.bits == 8:
        tensor = _bytes(parts["._data"], scale, kind, shape, name)
    else:
        tensor = _bits(parts["._data._data"], scale, parts["._shift"], kind, shape, name)
    check_values(tensor._spec, tensor.inner_tensors(), name)
    return tensor


def _require_known(kind: qtype, name: str) -> None:
    if kind.is_codebook or kind.is_unsigned or kind.blocks is not None or kind.bits not in (2, 4, 8):
        raise CheckpointError(f"{name}: optimum-quanto has no type {kind.name}; its types are int2, int4, int8, float8")


def _bytes(data: torch.Tensor, scale: torch.Tensor, kind: qtype, shape: torch.Size, name: str) -> QTensor:
    if data.dtype != kind.dtype or data.shape != shape or scale.numel() not in (1, shape[0]):
        raise CheckpointError(
            f"{name}: expected {kind.dtype} {tuple(shape)} and {shape[0]} scales for {kind.name}, found {data.dtype} "
            f"{tuple(data.shape)} and {scale.numel()} scales"
        )
    rows = scale.reshape(-1, 1).expand(shape[0], 1).contiguous()
    return QTensor(data.contiguous(), rows, None, qtype=kind, shape=shape, dtype=scale.dtype)


def _bits(
    data: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, kind: qtype, shape: torch.Size, name: str
) -> QTensor:
    rows, length = shape[0], shape.numel() // shape[0]
    group = group_size_rule(shape)
    if group is None and shift.numel() == shape[:-1].numel() > rows == scale.numel():
        # optimum-quanto's HQQ on an ungrouped convolution makes one shift per run along the last axis: a group size of
        # shape[-1].
        group = shape[-1]
        scale = scale.reshape(rows, 1).expand(rows, length // group).reshape(-1)
        data = data.reshape(data.shape[0], -1)
        codes = unpack_split(data, kind.bits)[:rows].reshape(rows, length)
        return _packed(codes, scale.view(rows, -1), shift.reshape(rows, -1), kind, shape, scale.dtype, group)
    width = group or length
    groups = rows * length // width
    wanted = (-(-groups // (8 // kind.bits)), width)
    found = (data.shape[0], data.shape[1:].numel()) if data.dim() > 1 else tuple(data.shape)
    if data.dtype != torch.uint8 or found != wanted or scale.numel() != groups or shift.numel() != groups:
        raise CheckpointError(
            f"{name}: expected uint8 {wanted} and {groups} scales and shifts for {kind.name} of shape {tuple(shape)}, "
            f"found {data.dtype} {tuple(data.shape)}, {scale.numel()} scales and {shift.numel()} shifts"
        )
    codes = unpack_split(data, kind.bits)[:groups].reshape(rows, length)
    scale = scale.reshape(rows, -1)
    if shift.is_floating_point():
        offset = shift.reshape(rows, -1).to(scale.dtype)
    else:  # w = scale * (code - zero): scale * zero may need more digits than a 16-bit float has
        dtype = scale.dtype
        scale = scale.float()
        offset = scale * shift.reshape(rows, -1).float()
        return _packed(codes, scale, offset, kind, shape, dtype, group)
    return _packed(codes, scale, offset, kind, shape, scale.dtype, group)


def _packed(
    codes: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    kind: qtype,
    shape: torch.Size,
    dtype: torch.dtype,
    group: int | None,
) -> QTensor:
    group = None if scale.shape[1] == 1 else group
    packed = pack(codes, kind.bits)
    return QTensor(
        packed, scale.contiguous(), shift.contiguous(), qtype=kind, shape=shape, dtype=dtype, group_size=group
    )


def from_qtensor(tensor: QTensor, name: str = "weight") -> dict[str, torch.Tensor]:
    """Returns the parts that optimum-quanto stores for this weight, by suffix.

    Raises:
        CheckpointError: optimum-quanto's format cannot hold this tensor exactly; the message says why and what to do.
    """
    _require_known(tensor.qtype, name)
    advice = "quantize with optimizer=AbsmaxOptimizer() (8 bits) or MaxOptimizer(), which do what optimum-quanto does"
    if tensor.rotation is not None or tensor.rank or tensor.column is not None or tensor.order is not None:
        raise CheckpointError(
            f"{name}: optimum-quanto's format has no rotated weights, no low-rank terms, no column scales and no columns in "
            f"another order; {advice}"
        )
    if tensor.axis != 0 or tensor.transposed:
        raise CheckpointError(
            f"{name}: optimum-quanto stores only weights of shape [out, in ...] quantized along axis 0; leave it float"
        )
    scale = tensor.scale.to(tensor.dtype)
    if not torch.equal(scale.float(), tensor.scale.float()):
        raise CheckpointError(
            f"{name}: its scales are {tensor.scale.dtype}, but optimum-quanto stores them in the weight's {tensor.dtype}, "
            f"which would change the weight; {advice}"
        )
    rows = tensor.shape[0]
    if tensor.qtype.bits == 8:
        shape = () if rows == 1 else (rows, *[1] * (tensor.dim() - 1))
        return {"._data": tensor.qdata.contiguous(), "._scale": scale.reshape(shape)}
    wanted = group_size_rule(tensor.shape)
    groups = 1 if wanted is None else tensor.row_length // wanted
    if tensor.scale.shape[1] != groups:
        raise CheckpointError(
            f"{name}: optimum-quanto quantizes a weight of shape {tuple(tensor.shape)} in groups of "
            f"{wanted or tensor.row_length}, found {tensor.group_size or tensor.row_length}; {advice}"
        )
    offset = tensor.scale.float() * tensor.qtype.zero_code if tensor.shift is None else tensor.shift
    shift = offset.to(tensor.dtype)
    if not torch.equal(shift.float(), offset.float()):
        raise CheckpointError(f"{name}: its shifts cannot be stored exactly in {tensor.dtype}; {advice}")
    codes = tensor.codes()
    grouped = codes.reshape(rows * groups, -1) if wanted is not None else codes.reshape(tensor.shape)
    column = (rows * groups, *[1] * (1 if wanted is not None else tensor.dim() - 1))
    return {
        "._data._data": pack_split(grouped, tensor.qtype.bits),
        "._scale": scale.reshape(column),
        "._shift": shift.reshape(column),
    }


def drop_old_metadata(state: dict[str, Any], qmap: Mapping[str, Mapping[str, Any]]) -> None:
    """Removes the strings that old versions stored in the state dict (``weight.qtype`` ...), after checking the types.

    Raises:
        CheckpointError: a stored type differs from quanto_qmap.json, or is unknown.
    """
    for key in [key for key in state if key.endswith(OLD_METADATA) and not isinstance(state[key], torch.Tensor)]:
        value = state.pop(key)
        if not key.endswith("weight.qtype"):
            continue
        module = key.removesuffix(".qtype").rpartition(".")[0]
        entry = qmap.get(module)
        try:
            stored = resolve_qtype(value if not isinstance(value, str) else value.removeprefix("quanto."))
        except (ValueError, TypeError) as error:
            raise CheckpointError(
                f"{key} of an old checkpoint holds {value!r}, which is not a quantized type"
            ) from error
        if entry is None or resolve_qtype(entry["weights"]) != stored:
            wanted = "nothing" if entry is None else entry["weights"]
            raise CheckpointError(f"{key} is {stored.name}, but the map (quanto_qmap.json) has {wanted} for {module!r}")
