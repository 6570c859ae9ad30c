"""HQQ checkpoints, as Transformers and ``AutoHQQHFModel.save_to_safetensors`` write them: a state dict of HQQLinear layers.

    M.W_q            codes of the groups: uint8, or int32 for 3 bits; or the same bytes as floats (``view_as_float``)
    M.scale, M.zero  of each group, in ``compute_dtype``: w = (code - zero) * scale, with zeros that need not be whole
    M.shape, M.nbits, M.group_size, M.axis, M.packing ...   numbers and texts (uint8 characters), one tensor each

With axis 1 a group is a run of the flattened weight, so it lies in a row if its size divides the row. With axis 0 it is
every (N K / group)-th number, which our format cannot hold.

``W_q`` has the groups as rows, in p parts of as many rows: the first part in the highest bits of a byte or word.

The library rounds ``code - zero`` to ``compute_dtype`` before it multiplies; here both are one float32 expression. So
weights differ by the one rounding that is missing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from requanto.checkpoint.foreign.found import ForeignCheckpoint, ForeignFloat, ForeignWeight, Parts
from requanto.checkpoint.foreign.integers import SCALES, need_codes
from requanto.checkpoint.foreign.packing import packed_rows
from requanto.checkpoint.foreign.source import Source
from requanto.checkpoint.format import CheckpointError
from requanto.config.checks import shown
from requanto.scales.groups import SMALLEST_GROUP

#: packing -> (bits of a stored code, number of parts, dtype of W_q)
_PACKINGS = {
    "8bit_u8": (8, 1, torch.uint8),
    "4bit_u8": (4, 2, torch.uint8),
    "3bit_32": (3, 10, torch.int32),
    "2bit_u8": (2, 4, torch.uint8),
    "1bit_u8": (1, 8, torch.uint8),
}
_DTYPES = {"torch.float16": torch.float16, "torch.bfloat16": torch.bfloat16, "torch.float32": torch.float32}
#: what HQQ stores of a layer besides the codes, scales and zeros
_FACTS = ("shape", "nbits", "group_size", "axis", "packing")
_OTHERS = (
    *("unpack_view_dtype", "view_as_float", "quant_scale", "quant_zero", "compute_dtype", "offload_meta"),
    *("encoded_state_dict", "stores_quant_config", "channel_wise", "optimize", "round_zero"),
)


class _Layer(NamedTuple):
    """What is known of a layer before its codes are read.

    Attributes:
        bits: of a code.
        packing: key of the layout of W_q.
        shape: N, K.
        rows: of the matrix that was packed.
        group: numbers that share a scale; those of a row if all share one.
        axis: 1 if groups are runs of the flattened weight.
        dtype: in which the library computes.
    """

    bits: int
    packing: str
    shape: torch.Size
    rows: int
    group: int
    axis: int
    dtype: torch.dtype


def recognize(description: Mapping[str, Any], source: Source) -> dict[str, Any] | None:
    """See `requanto.checkpoint.foreign.readers`. ``save_to_safetensors`` writes the config that the float model had."""
    for name in source:
        module = name.removesuffix(".W_q")
        if module != name and f"{module}.packing" in source:
            return {"quant_method": "hqq"}
    return None


def scan(config: Mapping[str, Any], source: Source) -> ForeignCheckpoint:
    """See `requanto.checkpoint.foreign.readers`."""
    modules = sorted(name.removesuffix(".W_q") for name in source if name.endswith(".W_q"))
    if not modules:
        raise CheckpointError(
            "the config says that weights are quantized by HQQ, and no file holds a W_q. HQQ's own qmodel.pt is a pickle, "
            "which Requanto does not open: load it with AutoHQQHFModel.from_quantized, set model.config.quantization_config "
            "to {'quant_method': 'hqq'}, and write it anew with AutoHQQHFModel.save_to_safetensors"
        )
    need_codes(source, ("W_q",), "packing", "nbits")
    allowed = _allowed(config.get("quant_config"))
    found = ForeignCheckpoint(format="HQQ")
    described = set()
    for module in modules:
        layer = _read(source, module, allowed)
        described.add(f"{layer.bits} bits, group size {layer.group}")
        _add(found, source, module, layer)
    found.format = f"HQQ, {' or '.join(sorted(described)[:3])}"
    return found


def _allowed(config: Any) -> set[tuple[Any, Any, Any]] | None:
    """(bits, group size, axis) that a config allows; None: it says nothing."""
    if not isinstance(config, Mapping):
        return None
    settings = [config, *(value for value in config.values() if isinstance(value, Mapping))]
    params = [one["weight_quant_params"] for one in settings if isinstance(one.get("weight_quant_params"), Mapping)]
    return {(one.get("nbits"), one.get("group_size"), one.get("axis")) for one in params} or None


def _read(source: Source, module: str, allowed: set[tuple[Any, Any, Any]] | None) -> _Layer:
    """The numbers and texts of a layer.

    Raises:
        CheckpointError: they are missing, or describe no layer of HQQ, or not one of the config's.
    """
    name = f"{module}.weight"
    for fact in (*_FACTS, "scale", "zero"):
        source.need(f"{module}.{fact}", name)
    shape = source[f"{module}.shape"].flatten().tolist()
    nbits, group, axis = (_number(source, f"{module}.{fact}") for fact in ("nbits", "group_size", "axis"))
    packing = _text(source, f"{module}.packing")
    if len(shape) != 2 or not all(isinstance(size, int) and 1 <= size < 2**40 for size in shape):
        raise CheckpointError(f"{module}.shape is {shown(shape)}, expected the two sizes of a weight")
    if packing not in _PACKINGS or axis not in (0, 1) or not 1 <= group <= math.prod(shape):
        raise CheckpointError(
            f"{module}: packing {shown(packing)}, axis {shown(axis)}, group_size {shown(group)}; HQQ writes "
            f"{', '.join(_PACKINGS)}, axis 0 or 1 and a positive group size: it is damaged, or of a newer version"
        )
    if allowed is not None and not any(
        bits == nbits and axis == along and size in (group, None) for bits, size, along in allowed
    ):
        raise CheckpointError(
            f"{module} has {nbits:g} bits in groups of {group} along axis {axis}, and quant_config in the config says "
            f"{shown(sorted(map(str, allowed)))}: config and files do not belong together"
        )
    for fact in ("quant_scale", "quant_zero"):
        if f"{module}.{fact}" in source and _number(source, f"{module}.{fact}"):
            raise CheckpointError(
                f"{module}.{fact} is set: scales or zeros that are quantized too have no files in HQQ. Quantize without that"
            )
    size = math.prod(shape)
    whole = f"{module}.channel_wise" in source and not _number(source, f"{module}.channel_wise")  # one scale in all
    if not whole and size % group:
        raise CheckpointError(f"{module}: groups of {group} do not divide a weight of {size} numbers")
    stored = _PACKINGS[packing][0]
    bits = nbits if packing == "8bit_u8" else stored  # 1.58 bits are stored as 2, 5 and 6 as 8
    if bits not in (1, 2, 3, 4, 5, 6, 8) or not bits - 1 < nbits <= bits:
        raise CheckpointError(f"{module}: nbits is {nbits:g}, and packing {packing} holds {stored} bits")
    dtype = torch.float16
    if f"{module}.compute_dtype" in source:
        text = _text(source, f"{module}.compute_dtype")
        if text not in _DTYPES:
            raise CheckpointError(f"{module}.compute_dtype is {shown(text)}, expected {', '.join(_DTYPES)}")
        dtype = _DTYPES[text]
    if whole:
        return _Layer(bits, packing, torch.Size(shape), shape[0], shape[1], 1, dtype)
    return _Layer(bits, packing, torch.Size(shape), size // group if axis == 1 else group, group, axis, dtype)


def _number(source: Source, name: str) -> float:
    stored = source[name]
    if stored.numel() != 1:
        raise CheckpointError(f"{name} has shape {tuple(stored.shape)}, expected one number")
    value = stored.item()
    return int(value) if float(value).is_integer() else float(value)


def _text(source: Source, name: str) -> str:
    stored = source[name]
    if stored.dtype != torch.uint8 or stored.numel() > 100:
        raise CheckpointError(
            f"{name} is {stored.dtype} with {stored.numel()} numbers, expected the characters of a word"
        )
    return bytes(stored.flatten().tolist()).decode("latin-1")


def _add(found: ForeignCheckpoint, source: Source, module: str, layer: _Layer) -> None:
    name, codes = f"{module}.weight", f"{module}.W_q"
    (n, k), size = layer.shape, layer.shape.numel()
    _, parts, dtype = _PACKINGS[layer.packing]
    wanted = -(-layer.rows // parts) * (size // layer.rows) * dtype.itemsize
    head = source.need(codes, name)
    if head.shape.numel() * head.dtype.itemsize != wanted or (layer.rows % parts and layer.packing != "3bit_32"):
        raise CheckpointError(
            f"{codes} is {head.dtype} {tuple(head.shape)}, expected {wanted} bytes for a weight of {n} x {k} in "
            f"{layer.packing} with groups of {layer.group}: it is damaged"
        )
    scales = source.need(f"{module}.scale", name)
    source.need_shape(f"{module}.scale", name, scales.shape, *SCALES)
    source.need_shape(f"{module}.zero", name, scales.shape, *SCALES)
    if scales.shape.numel() not in (size // layer.group, 1):
        raise CheckpointError(
            f"{module}.scale has {scales.shape.numel()} numbers, expected {size // layer.group} for a weight of {n} x {k} "
            f"in groups of {layer.group}"
        )
    facts = {f"{module}.{fact}" for fact in (*_FACTS, *_OTHERS)}
    found.dropped |= {fact for fact in facts if fact in source}
    sources = (codes, f"{module}.scale", f"{module}.zero")
    group = math.gcd(k, layer.group)
    if layer.axis == 0 or group < SMALLEST_GROUP:
        crossing = f"its groups of {layer.group} cross rows of {k} weights"
        reason = "its groups are not runs of a row (HQQ with axis=0)" if layer.axis == 0 else crossing
        found.floats[name] = ForeignFloat(
            layer.shape, layer.dtype, sources, lambda source: _dequantized(source, sources, layer), reason
        )
        return
    words = [f"{'quint' if layer.bits in (1, 8) else 'qint'}{layer.bits}", f"{n}x{k}"]
    words += [f"group={group}"] if group < k else []
    words.append("affine")

    def build(source: Source) -> Parts:
        values = _codes(source[codes], layer).reshape(n, k)
        if layer.bits < 8 and int(values.max()) >= 2**layer.bits:
            raise CheckpointError(f"{codes} holds the code {int(values.max())}, which has more than {layer.bits} bits")
        scale, zero = (source[part].flatten().expand(size // layer.group) for part in sources[1:])
        shift = scale.float() * zero.float()  # 22 bits of two float16: exact
        if group != layer.group:
            index = torch.arange(0, size, group, device=scale.device) // layer.group
            scale, shift = scale[index], shift[index]
        lead = (n, k // group)
        return {
            "qdata": packed_rows(values, layer.bits),
            "scale": scale.reshape(lead).contiguous(),
            "shift": shift.reshape(lead).contiguous(),
        }

    found.weights[name] = ForeignWeight(" ".join(words), sources, build)


def _codes(stored: torch.Tensor, layer: _Layer) -> torch.Tensor:
    """Unpacked codes, uint8 ``[rows, size / rows]``."""
    bits, parts, dtype = _PACKINGS[layer.packing]
    words = stored.contiguous().view(torch.uint8).flatten().view(dtype)
    words = words.view(-(-layer.rows // parts), -1)
    mask = 2**bits - 1
    return torch.cat([((words >> (bits * i)) & mask).to(torch.uint8) for i in reversed(range(parts))])[: layer.rows]


def _dequantized(source: Source, sources: tuple[str, ...], layer: _Layer) -> torch.Tensor:
    """The float weight, computed as HQQ does."""
    codes, scale, zero = (source[name] for name in sources)
    values = _codes(codes, layer).to(layer.dtype)
    return ((values - zero.to(layer.dtype)) * scale.to(layer.dtype)).reshape(layer.shape)
