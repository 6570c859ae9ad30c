"""Reader of gpt-oss: experts in MXFP4 (``quant_method`` "mxfp4").

    E_blocks uint8 [experts, rows, K / 32, 16]    16 bytes hold 32 codes, the first of two in the low nibble
    E_scales uint8 [experts, rows, K / 32]        2^(byte - 127)

The weight E (``...mlp.experts.gate_up_proj``, ``down_proj``) shows [experts, K, rows], as Transformers' model has it. Its
bias and all other tensors are floats. Read in transformers 5.24 (integrations/mxfp4.py); values are those of its
``convert_moe_packed_tensors``.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch

from requanto.checkpoint.foreign.found import ForeignCheckpoint, ForeignWeight, Parts
from requanto.checkpoint.foreign.pieces import line, names_in, unfit
from requanto.checkpoint.foreign.source import Source
from requanto.checkpoint.format import CheckpointError

_BLOCK = 32


def scan(config: Mapping[str, Any], source: Source) -> ForeignCheckpoint:
    """Reads the headers; see `readers.scan`.

    Raises:
        CheckpointError: blocks without scales, scales without blocks, or shapes that do not fit.
    """
    found = ForeignCheckpoint("MXFP4 experts of gpt-oss, blocks of 32")
    float_names = set(names_in(config, "modules_to_not_convert"))
    for name in source:
        if name.endswith("_scales"):
            source.need(name.removesuffix("_scales") + "_blocks", name)
        if not name.endswith("_blocks"):
            continue
        weight = name.removesuffix("_blocks")
        if weight in float_names or weight.rpartition(".")[0] in float_names:
            raise CheckpointError(
                f"the files hold {name}, and quantization_config.modules_to_not_convert leaves {weight} float: config and "
                f"files do not belong together"
            )
        found.weights[weight] = _weight(source, weight)
    return found


def _weight(source: Source, weight: str) -> ForeignWeight:
    blocks, scales = f"{weight}_blocks", f"{weight}_scales"
    stored = source.header(blocks)
    if len(stored.shape) != 4 or stored.shape[-1] != _BLOCK // 2 or stored.dtype != torch.uint8:
        raise unfit(blocks, stored, f"uint8 [experts, rows, K / {_BLOCK}, {_BLOCK // 2}]")
    if weight in source:
        raise CheckpointError(f"the files hold {weight} beside {blocks}: files of two checkpoints are mixed")
    source.need_shape(scales, weight, stored.shape[:-1], torch.uint8)
    experts, rows, groups, _ = stored.shape
    text = line(weight, "qmxfp4", (experts, groups * _BLOCK, rows), "axis=1", "transposed", group=_BLOCK)
    return ForeignWeight(text, (blocks, scales), functools.partial(_parts, blocks=blocks, scales=scales))


def _parts(source: Source, blocks: str, scales: str) -> Parts:
    return {"qdata": source[blocks].flatten(-2), "scale": source[scales]}
