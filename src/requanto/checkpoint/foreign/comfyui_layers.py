"""Layers of ComfyUI: the layouts of comfy-kitchen 0.2, which Comfy's loader calls formats.

| format | tensors of the layer | a weight is |
|---|---|---|
| ``float8_e4m3fn``, ``float8_e5m2`` | ``weight``, ``weight_scale`` for the tensor or each row | ``scale * code`` |
| ``nvfp4`` | ``weight`` [N, K / 2], first code in the high nibble; ``weight_scale`` e4m3, blocked; ``weight_scale_2`` | their product |
| ``mxfp8`` | ``weight`` e4m3, ``weight_scale`` e8m0, blocked | ``scale * code`` |
| ``int8_tensorwise`` | ``weight`` int8, ``weight_scale`` for the tensor or each row; perhaps rotated | ``scale * code`` |
| ``convrot_w4a4`` | ``weight`` [N, K / 2], two's complement; ``weight_scale`` [N]; rotated | ``scale * code`` |
| ``awq_w4a16`` | ``weight`` [N, K / 2]; ``weight_scale``, ``weight_zeros`` [K / g, N] | ``scale * (code - 8) + zero`` |
| ``svdquant_w4a4`` | `comfyui_svdquant` | |

Of packed codes the first is in the low nibble, except NVFP4. N and K of NVFP4 are padded to multiples of 16, of MXFP8 of 32;
a bias tells N. Blocked scales are those of `blocked_scales`, rotated rows those of `regular_hadamard`.
"""  # noqa: E501  (a table)

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from requanto.checkpoint.foreign.blocked_scales import blocked_numel, plain_scales
from requanto.checkpoint.foreign.comfyui_svdquant import svdquant
from requanto.checkpoint.foreign.comfyui_turns import is_turnable, turned, turned_values
from requanto.checkpoint.foreign.found import ForeignFloat, ForeignWeight, Parts
from requanto.checkpoint.foreign.pieces import FLOATS, float_scale, joined, line, per_row, unfit
from requanto.checkpoint.foreign.regular_hadamard import column_order, column_signs, is_regular
from requanto.checkpoint.foreign.source import Source
from requanto.checkpoint.format import CheckpointError
from requanto.config.checks import shown
from requanto.dtypes.bit_packing import pack, unpack

#: stored dtypes of float8 weights, and our types
FLOAT8 = {torch.float8_e4m3fn: "qfloat8_e4m3fn", torch.float8_e5m2: "qfloat8_e5m2"}
Made = Mapping[str, ForeignWeight | ForeignFloat]
_NOTE = "ComfyUI rounds the inputs of such layers too, where the GPU has a GEMM for it; here they stay float"


class Layer:
    """A quantized layer as it is stored.

    Args:
        module: its name.
        conf: what the file says of it.
        source: the tensors.
    """

    def __init__(self, module: str, conf: Mapping[str, Any], source: Source) -> None:
        self.module, self.conf, self.source = module, conf, source
        self.name = joined(module, "weight")
        self.stored = source.need(self.name, module)

    def tensor(self, part: str) -> str:
        """Name of one of its tensors."""
        return joined(self.module, part)

    def matrix(self, *dtypes: torch.dtype) -> tuple[int, int]:
        """The shape of the codes.

        Raises:
            CheckpointError: they are no matrix, or have another dtype.
        """
        if self.stored.dtype not in dtypes or len(self.stored.shape) != 2 or 0 in self.stored.shape:
            raise unfit(self.name, self.stored, f"a matrix of {str(dtypes[0]).removeprefix('torch.')}")
        rows, columns = self.stored.shape
        return rows, columns

    def number(self, key: str, default: int) -> int:
        """A positive whole number of the options.

        Raises:
            CheckpointError: it is something else.
        """
        value = self.conf.get(key, default)
        if type(value) is not int or value < 1:
            raise CheckpointError(f"{self.module}: {key} is {shown(value)}, expected a positive whole number")
        return value

    def rows(self, stored: int, multiple: int) -> int:
        """N of a weight whose rows were padded: the length of its bias, if there is one."""
        bias = self.tensor("bias")
        if bias not in self.source:
            return stored
        shape = self.source.header(bias).shape
        if len(shape) != 1 or -(-shape[0] // multiple) * multiple != stored:
            raise unfit(self.name, self.stored, f"rows for the bias {tuple(shape)}, padded to a multiple of {multiple}")
        return shape[0]

    def row_scale(self, rows: int, part: str = "weight_scale") -> str:
        """Name of a scale that is one number, or one for each row.

        Raises:
            CheckpointError: it is missing, or has another shape.
        """
        name = self.tensor(part)
        found = self.source.need(name, self.name)
        shape = list(found.shape)
        while len(shape) > 1 and shape[-1] == 1:
            shape.pop()
        if found.dtype not in FLOATS or (found.shape.numel() != 1 and shape != [rows]):
            raise unfit(name, found, f"one float, or one for each of {rows} rows")
        return name


# ---------------------------------------------------------------------- floats


def float8_weight(layer: Layer) -> Made:
    """``float8_e4m3fn``, ``float8_e5m2``, and old files."""
    shape, dtype = layer.stored
    wanted = layer.conf["format"]
    if dtype not in FLOAT8 or len(shape) < 2 or (wanted is not None and wanted != str(dtype).removeprefix("torch.")):
        raise unfit(layer.name, layer.stored, f"{wanted or 'float8'} with rows")
    part = next((one for one in ("weight_scale", "scale_weight") if layer.tensor(one) in layer.source), "weight_scale")
    scale = layer.row_scale(shape[0], part)
    build = functools.partial(_float8_parts, layer.name, scale, shape[0])
    note = "" if layer.conf.get("full_precision_matrix_mult") else _NOTE
    text = line(layer.name, FLOAT8[dtype], shape)
    return {layer.name: ForeignWeight(text, (layer.name, scale), build, note)}


def cast_weight(name: str, source: Source) -> ForeignWeight:
    """A float8 tensor whose codes are the weight."""
    shape, dtype = source.header(name)
    build = functools.partial(_float8_parts, name, None, shape[0])
    return ForeignWeight(line(name, FLOAT8[dtype], shape), (name,), build)


def _float8_parts(name: str, scale: str | None, rows: int, source: Source) -> Parts:
    one = torch.ones((), dtype=torch.float32, device="cpu") if scale is None else float_scale(source[scale])
    return {"qdata": source[name], "scale": per_row(one, (rows,))}


def nvfp4(layer: Layer) -> Made:
    """``nvfp4``."""
    all_rows, half = layer.matrix(torch.uint8)
    rows, length = layer.rows(all_rows, 16), 2 * half
    names = [layer.name, layer.tensor("weight_scale"), layer.tensor("weight_scale_2")]
    if length % 16:
        raise unfit(layer.name, layer.stored, "rows of a multiple of 16 codes")
    _check_blocked(layer, all_rows, length // 16, torch.float8_e4m3fn, torch.uint8)
    factor = layer.source.need(names[2], layer.name)
    if factor.shape.numel() != 1 or factor.dtype not in FLOATS:
        raise unfit(names[2], factor, "one float")
    column = layer.tensor("pre_quant_scale") if layer.tensor("pre_quant_scale") in layer.source else None
    if column is not None:
        layer.source.need_shape(column, layer.name, (length,), *FLOATS)
        names.append(column)
    build = functools.partial(_nvfp4_parts, names[:3], column, (all_rows, rows))
    text = line(layer.name, "qnvfp4", (rows, length), "columns" if column else "", group=16)
    return {layer.name: ForeignWeight(text, tuple(names), build, _NOTE)}


def _nvfp4_parts(names: list[str], column: str | None, rows: tuple[int, int], source: Source) -> Parts:
    codes, scale = source[names[0]][: rows[1]], source[names[1]].view(torch.uint8)
    parts = {
        "qdata": (codes << 4) | (codes >> 4),
        "scale": plain_scales(scale, rows[0], codes.shape[1] // 8)[: rows[1]].contiguous(),
        "row_scale": per_row(source[names[2]].float(), (rows[1],)),
    }
    if column is not None:
        parts["column"] = source[column]
    return parts


def mxfp8(layer: Layer) -> Made:
    """``mxfp8``."""
    all_rows, length = layer.matrix(torch.float8_e4m3fn)
    rows, scale = layer.rows(all_rows, 32), layer.tensor("weight_scale")
    if length % 32:
        raise unfit(layer.name, layer.stored, "rows of a multiple of 32 codes")
    _check_blocked(layer, all_rows, length // 32, torch.uint8, torch.float8_e8m0fnu)
    build = functools.partial(_mxfp8_parts, layer.name, scale, (all_rows, rows))
    text = line(layer.name, "qmxfp8_e4m3", (rows, length), group=32)
    return {layer.name: ForeignWeight(text, (layer.name, scale), build, _NOTE)}


def _mxfp8_parts(name: str, scale: str, rows: tuple[int, int], source: Source) -> Parts:
    codes, scales = source[name][: rows[1]], source[scale].view(torch.uint8)
    found = plain_scales(scales, rows[0], codes.shape[1] // 32)[: rows[1]]
    return {"qdata": codes.contiguous(), "scale": found.contiguous()}


def _check_blocked(layer: Layer, rows: int, groups: int, *dtypes: torch.dtype) -> None:
    name = layer.tensor("weight_scale")
    found = layer.source.need(name, layer.name)
    if found.dtype not in dtypes or found.shape.numel() != blocked_numel(rows, groups):
        wanted = f"{blocked_numel(rows, groups)} scales in blocks of 128 x 4, for {rows} rows of {groups} groups"
        raise unfit(name, found, f"{str(dtypes[0]).removeprefix('torch.')}: {wanted}")


# ---------------------------------------------------------------------- whole numbers


def int8(layer: Layer) -> Made:
    """``int8_tensorwise``."""
    rows, length = layer.matrix(torch.int8)
    scale = layer.row_scale(rows)
    names = (layer.name, scale)
    if not layer.conf.get("convrot"):
        build = functools.partial(_int8_parts, names, rows)
        return {layer.name: ForeignWeight(line(layer.name, "qint8", (rows, length)), names, build, _NOTE)}
    block = _block(layer, length)
    signs = column_signs(length, block, torch.device("cpu"))
    if not is_turnable(layer.source[layer.name], signs):
        make = functools.partial(turned_values, names, rows, block)
        reason = "rotated rows with the code -128 in several places, whose negative does not exist"
        return {layer.name: ForeignFloat(layer.stored.shape, torch.bfloat16, names, make, reason)}
    text = line(layer.name, "qint8", (rows, length), f"rotation={block}", "columns", "signed", "order")
    return {layer.name: ForeignWeight(text, names, functools.partial(_turned_parts, names, block, 8), _NOTE)}


def _int8_parts(names: tuple[str, str], rows: int, source: Source) -> Parts:
    return {"qdata": source[names[0]], "scale": per_row(source[names[1]], (rows,))}


def _block(layer: Layer, length: int) -> int:
    """Size of the blocks of the rotation."""
    block = layer.number("convrot_groupsize", 256)
    if not is_regular(block) or length % block:
        raise CheckpointError(
            f"{layer.module}: convrot_groupsize is {block}, expected a power of 4 that divides rows of {length}"
        )
    return block


def convrot(layer: Layer) -> Made:
    """``convrot_w4a4``."""
    rows, half = layer.matrix(torch.int8, torch.uint8)
    block, names = _block(layer, 2 * half), (layer.name, layer.row_scale(rows))
    text = line(layer.name, "qint4", (rows, 2 * half), f"rotation={block}", "columns", "signed", "order")
    return {layer.name: ForeignWeight(text, names, functools.partial(_turned_parts, names, block, 4), _NOTE)}


def _turned_parts(names: tuple[str, str], block: int, bits: int, source: Source) -> Parts:
    stored = source[names[0]]
    rows, length = stored.shape[0], stored.shape[1] * 8 // bits
    if bits == 4:
        # Two's complement from -8 on becomes codes from 0 on: the sign bit of each nibble is flipped.
        stored = unpack(stored.view(torch.uint8) ^ 0x88, 4, length).view(torch.int8) - 8
    signs = column_signs(length, block, stored.device)
    codes, flips = turned(stored, signs, -(2 ** (bits - 1)), names[0])
    return {
        "qdata": codes if bits == 8 else pack((codes + 8).view(torch.uint8), 4),
        "scale": per_row(source[names[1]].float(), (rows,)) * flips,
        "column": signs,
        "order": column_order(length, block, stored.device),
    }


def awq(layer: Layer) -> Made:
    """``awq_w4a16``."""
    rows, half = layer.matrix(torch.int8, torch.uint8)
    length, group = 2 * half, layer.number("group_size", 64)
    if length % group:
        raise CheckpointError(f"{layer.module}: group_size is {group}, expected one that divides rows of {length}")
    names = layer.name, layer.tensor("weight_scale"), layer.tensor("weight_zeros")
    for name in names[1:]:
        layer.source.need_shape(name, layer.name, (length // group, rows), *FLOATS)
    text = line(layer.name, "qint4", (rows, length), "affine", group=group if group < length else None)
    return {layer.name: ForeignWeight(text, names, functools.partial(_awq_parts, names))}


def _awq_parts(names: tuple[str, str, str], source: Source) -> Parts:
    scale, zero = (source[name].t().float() for name in names[1:])
    return {
        "qdata": source[names[0]].view(torch.uint8),
        "scale": scale.contiguous(),
        "shift": (8 * scale - zero).contiguous(),
    }


FORMATS: dict[str, Callable[[Layer], Made]] = {
    "float8_e4m3fn": float8_weight,
    "float8_e5m2": float8_weight,
    "nvfp4": nvfp4,
    "mxfp8": mxfp8,
    "int8_tensorwise": int8,
    "int8_rowwise": int8,
    "convrot_w4a4": convrot,
    "awq_w4a16": awq,
    "svdquant_w4a4": svdquant,
}
