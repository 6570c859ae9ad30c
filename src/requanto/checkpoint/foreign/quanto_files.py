"""optimum-quanto's stored tensors, read into QTensor and written from it, bit for bit.

Keys of a weight ``W`` (optimum-quanto 0.2.7):

    8 bits      ``W._data`` int8 or float8, the weight's shape; ``W._scale`` [out, 1 ...], a scalar where out = 1
    2 and 4     ``W._data._data`` uint8, rows of groups packed split along axis 0 (`scales.quanto.pack_split`);
                ``W._scale`` and ``W._shift`` [out * K / group, 1]; a shift of integers is the code of zero

and beside it ``M.input_scale`` and ``M.output_scale``. Group sizes are stored nowhere: `scales.quanto.group_size_rule`.
A directory comes in two kinds: `requanto.quanto_models` and `requanto.integrations` read them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from requanto.checkpoint.format import CheckpointError
from requanto.dtypes.bit_packing import pack
from requanto.dtypes.qtypes import qtype
from requanto.scales.quanto import group_size_rule, pack_split, unpack_split
from requanto.tensor.qtensor import QTensor

#: what follows a weight's name
PARTS = ("._data", "._data._data", "._scale", "._shift")
#: what old versions stored beside the tensors, as strings
OLD_METADATA = (".qtype", ".axis", ".group_size", ".size", ".stride", ".activation_qtype", "._data.bits")


def quantized_names(keys: Iterable[str]) -> set[str]:
    """The weights among a checkpoint's keys that optimum-quanto stored quantized, by parameter name."""
    return {key.removesuffix("._data._data").removesuffix("._data") for key in keys if key.endswith("._data")}


def is_quanto_part(key: str) -> bool:
    """Whether a key belongs to a weight stored by optimum-quanto."""
    return key.endswith(PARTS)


def qtype_of(parts: Mapping[str, torch.Tensor]) -> qtype | None:
    """The type that an 8-bit payload's dtype says; None for a packed one, which may be int2 or int4."""
    from requanto.dtypes.qtypes import resolve_qtype

    data = parts.get("._data")
    return None if data is None else resolve_qtype(data.dtype)


def to_qtensor(
    parts: Mapping[str, torch.Tensor], kind: qtype, shape: torch.Size | tuple[int, ...], name: str = "weight"
) -> QTensor:
    """The QTensor that one weight's parts make; its dtype is that of the scales.

    Args:
        parts: tensors by what follows the weight's name: ``"._data"`` or ``"._data._data"``, ``"._scale"``, ``"._shift"``.
        kind: type of the codes, from the map.
        shape: the float weight's shape, from the model.
        name: the weight's name, for messages.

    Raises:
        CheckpointError: parts are missing, or do not fit the type and the shape.
    """
    shape = torch.Size(shape)
    _require_known(kind, name)
    needed = ("._data", "._scale") if kind.bits == 8 else ("._data._data", "._scale", "._shift")
    missing = [name + part for part in needed if part not in parts]
    if missing:
        raise CheckpointError(
            f"{name} is {kind.name} according to the map, and the checkpoint lacks {', '.join(missing)} (it has "
            f"{', '.join(name + part for part in parts) or 'nothing of it'}): map and tensors disagree"
        )
    scale = parts["._scale"]
    if not scale.is_floating_point():
        raise CheckpointError(f"{name}._scale must be a float tensor, found {scale.dtype}")
    if kind.bits == 8:
        return _bytes(parts["._data"], scale, kind, shape, name)
    return _bits(parts["._data._data"], scale, parts["._shift"], kind, shape, name)


def _require_known(kind: qtype, name: str) -> None:
    if kind.is_codebook or kind.is_unsigned or kind.bits not in (2, 4, 8):
        raise CheckpointError(
            f"{name}: optimum-quanto has no type {kind.name}; its format holds int2, int4, int8, float8"
        )


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
        # Its HQQ on a convolution without groups finds a shift for every run along the last axis: groups of that length.
        group = shape[-1]
        scale = scale.reshape(rows, 1).expand(rows, length // group).reshape(-1)
        data = data.reshape(data.shape[0], -1)
        codes = unpack_split(data, kind.bits)[:rows].reshape(rows, length)
        return _packed(codes, scale.view(rows, -1), shift.reshape(rows, -1), kind, shape, scale.dtype, group)
    width = group or length
    groups = rows * length // width
    wanted = (-(-groups // (8 // kind.bits)), width)
    found = (data.shape[0], data[0].numel()) if data.dim() > 1 else tuple(data.shape)
    if data.dtype != torch.uint8 or found != wanted or scale.numel() != groups or shift.numel() != groups:
        raise CheckpointError(
            f"{name}: expected uint8 {wanted} and {groups} scales and shifts for {kind.name} of shape {tuple(shape)}, "
            f"found {data.dtype} {tuple(data.shape)}, {scale.numel()} scales and {shift.numel()} shifts"
        )
    codes = unpack_split(data, kind.bits)[:groups].reshape(rows, length)
    scale = scale.reshape(rows, -1)
    if shift.is_floating_point():
        offset = shift.reshape(rows, -1).to(scale.dtype)
    else:  # w = scale * (code - zero): the product may need more digits than a 16-bit float has
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
    """The parts under which optimum-quanto stores this weight, by what follows its name.

    Raises:
        CheckpointError: its format cannot hold this tensor exactly; the message says why and what can be done.
    """
    _require_known(tensor.qtype, name)
    advice = "quantize with optimizer=AbsmaxOptimizer() (8 bits) or MaxOptimizer(), whose choices are optimum-quanto's"
    if tensor.rotation is not None or tensor.rank:
        raise CheckpointError(f"{name}: optimum-quanto's format has no rotated weights and no low-rank terms; {advice}")
    if tensor.axis != 0 or tensor.transposed:
        raise CheckpointError(f"{name}: optimum-quanto stores weights [out, in ...] only; leave this layer float")
    scale = tensor.scale.to(tensor.dtype)
    if not torch.equal(scale.float(), tensor.scale.float()):
        raise CheckpointError(
            f"{name}: its scales are {tensor.scale.dtype}, and optimum-quanto stores them in the weight's {tensor.dtype}, "
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
            f"{name}: optimum-quanto's rule gives a weight of shape {tuple(tensor.shape)} groups of "
            f"{wanted or tensor.row_length}, found {tensor.group_size or tensor.row_length}; {advice}"
        )
    offset = tensor.scale.float() * tensor.qtype.zero_code if tensor.shift is None else tensor.shift
    shift = offset.to(tensor.dtype)
    if not torch.equal(shift.float(), offset.float()):
        raise CheckpointError(f"{name}: its shifts do not fit {tensor.dtype} exactly; {advice}")
    codes = tensor.codes()
    grouped = codes.reshape(rows * groups, -1) if wanted is not None else codes.reshape(tensor.shape)
    column = (rows * groups, *[1] * (1 if wanted is not None else tensor.dim() - 1))
    return {
        "._data._data": pack_split(grouped, tensor.qtype.bits),
        "._scale": scale.reshape(column),
        "._shift": shift.reshape(column),
    }


def drop_old_metadata(state: dict[str, Any], qmap: Mapping[str, Mapping[str, Any]]) -> None:
    """Removes the strings that old versions stored beside the tensors (``weight.qtype`` ...), having checked the types.

    Raises:
        CheckpointError: a stored type is not the map's, or such a key holds no string.
    """
    from requanto.dtypes.qtypes import resolve_qtype

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
                f"{key} of an old checkpoint holds {value!r}, which names no quantized type"
            ) from error
        if entry is None or resolve_qtype(entry["weights"]) != stored:
            wanted = "nothing" if entry is None else entry["weights"]
            raise CheckpointError(f"{key} says {stored.name} and the map says {wanted} for {module!r}: they disagree")
