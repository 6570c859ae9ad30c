"""``svdquant_w4a4`` of ComfyUI: SVDQuant with 4-bit inputs, in rows or in the tiles of comfy-kitchen's kernels.

    y = Q (x / smooth) + up (down x) + bias

| tensor | in rows | in tiles |
|---|---|---|
| ``weight`` int8, two's complement, first code in the low nibble | [N, K / 2] | [N / 128, K / 64, 32, 128]: four rows of 32 bytes |
| ``weight_scale`` | [K / 64, N] | [N / 128, K / 64, 128] |
| ``weight_proj_up`` | [N, r] | [N / 128, r, 128] |
| ``weight_proj_down`` [K, r], ``weight_smooth_factor`` [K] | | |

With ``act_unsigned`` the kernel adds a number to the inputs of Q, and the bias is that for such inputs (`nunchaku_layers`).
"""  # noqa: E501  (a table)

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from requanto.checkpoint.foreign.found import ForeignFloat, ForeignWeight, Parts
from requanto.checkpoint.foreign.nunchaku_layers import bias_without_shift
from requanto.checkpoint.foreign.pieces import FLOATS, line, unfit
from requanto.checkpoint.foreign.source import Source
from requanto.checkpoint.format import CheckpointError

if TYPE_CHECKING:
    from requanto.checkpoint.foreign.comfyui_layers import Layer

_GROUP = 64
_NOTE = "ComfyUI rounds the inputs of such layers to 4 bits; here they stay float"


def svdquant(layer: Layer) -> Mapping[str, ForeignWeight | ForeignFloat]:
    """``svdquant_w4a4``."""
    shape, dtype = layer.stored
    if dtype not in (torch.int8, torch.uint8) or len(shape) not in (2, 4) or 0 in shape:
        raise unfit(layer.name, layer.stored, "int8 (N, K / 2), or (N / 128, K / 64, 32, 128)")
    rows, length = (shape[0], 2 * shape[1]) if len(shape) == 2 else (128 * shape[0], _GROUP * shape[1])
    if length % _GROUP or (len(shape) == 4 and tuple(shape[2:]) != (32, 128)):
        raise unfit(layer.name, layer.stored, "rows of a multiple of 64 codes, tiles of 32 x 128 bytes")
    groups = length // _GROUP
    names = {part: layer.tensor(f"weight_{part}") for part in ("scale", "proj_down", "proj_up", "smooth_factor")}
    down = layer.source.need(names["proj_down"], layer.name)
    rank = down.shape[-1] if down.shape else 0
    wanted = {
        "scale": [(groups, rows), (rows // 128, groups, 128)],
        "proj_down": [(length, rank)],
        "proj_up": [(rows, rank), (rows // 128, rank, 128)],
        "smooth_factor": [(length,)],
    }
    for part, shapes in wanted.items():
        found = layer.source.need(names[part], layer.name)
        if found.dtype not in FLOATS or tuple(found.shape) not in shapes:
            raise unfit(names[part], found, f"floats {' or '.join(map(str, shapes))}")
    names["codes"] = layer.name
    text = line(layer.name, "qint4", (rows, length), f"rank={rank}" if rank else "", "columns", group=_GROUP)
    build = functools.partial(_parts, names, rank)
    made: dict[str, ForeignWeight | ForeignFloat] = {
        layer.name: ForeignWeight(text, tuple(names.values()), build, _NOTE)
    }
    if layer.conf.get("act_unsigned"):
        bias = layer.tensor("bias")
        if bias not in layer.source:
            raise CheckpointError(
                f"{layer.module} is quantized for shifted inputs (act_unsigned), and has no bias in which the shift would "
                f"be taken back: it is damaged"
            )
        stored = layer.source.need_shape(bias, layer.name, (rows,), *FLOATS)
        sources = (bias, layer.name, names["scale"], names["smooth_factor"])
        made[bias] = ForeignFloat(stored.shape, stored.dtype, sources, functools.partial(_bias, bias, names))
    return made


def _codes(stored: torch.Tensor) -> torch.Tensor:
    """The bytes of our rows ``[N, K / 2]``."""
    if stored.dim() == 4:
        # tile, four rows, 64 columns: one row after the other
        stored = stored.unflatten(-1, (4, _GROUP // 2)).permute(0, 2, 3, 1, 4).flatten(3).flatten(0, 2)
    return stored.contiguous().view(torch.uint8) ^ 0x88


def _by_rows(stored: torch.Tensor) -> torch.Tensor:
    """``[N, ...]`` of scales or factors in tiles."""
    return stored.transpose(1, 2).flatten(0, 1)


def _scale(stored: torch.Tensor) -> torch.Tensor:
    return (_by_rows(stored) if stored.dim() == 3 else stored.t()).contiguous()


def _column(names: Mapping[str, str], source: Source) -> torch.Tensor:
    return 1 / source[names["smooth_factor"]].float()


def _parts(names: Mapping[str, str], rank: int, source: Source) -> Parts:
    parts = {
        "qdata": _codes(source[names["codes"]]),
        "scale": _scale(source[names["scale"]]),
        "column": _column(names, source),
    }
    if rank:
        up = source[names["proj_up"]]
        parts["up"] = (_by_rows(up) if up.dim() == 3 else up).contiguous()
        parts["down"] = source[names["proj_down"]].t().contiguous()
    return parts


def _bias(bias: str, names: Mapping[str, str], source: Source) -> torch.Tensor:
    codes, scale = _codes(source[names["codes"]]), _scale(source[names["scale"]])
    return bias_without_shift(source[bias], codes, scale, _column(names, source))
