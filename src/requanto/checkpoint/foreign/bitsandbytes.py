"""bitsandbytes checkpoints: nf4 and fp4, with or without double quantization, and LLM.int8().

4 bits, of a parameter ``W`` with shape ``[..., K]``:

    W                                    the codes of the flattened weight, the first of two in the high nibble; uint8, or
                                         the same bytes in another dtype (``bnb_4bit_quant_storage``)
    W.absmax                             float32: scales of blocks of the flattened weight; uint8 if doubly quantized
    W.quant_map                          float32 [16]: values of the codes
    W.nested_absmax, W.nested_quant_map  scale = nested_quant_map[absmax] * nested_absmax + nested_offset
    W.quant_state.bitsandbytes__nf4      (or ``__fp4``) JSON in UTF-8: shape, dtype, blocksize, nested_offset ...

8 bits, of a linear layer ``M``:

    M.weight, M.SCB, M.weight_format     int8 [N, K], float32 [N], uint8 0: w = SCB / 127 * code
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from requanto.checkpoint.foreign.found import ForeignCheckpoint, ForeignFloat, ForeignWeight, Parts
from requanto.checkpoint.foreign.source import Source
from requanto.checkpoint.format import CheckpointError
from requanto.config.checks import shown
from requanto.dtypes.qtypes import qtypes
from requanto.scales.groups import SMALLEST_GROUP

_STATE = ".quant_state.bitsandbytes__"
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
#: bitsandbytes multiplies by this number, not by 1 / 127 (functional.int8_vectorwise_dequant)
_ONE_127TH = 7.874015718698502e-3
#: values of weight_format that old versions wrote for the layouts of GPU kernels
_FORMATS = {1: "col32", 2: "col_turing", 3: "col_ampere"}


def scan(config: Mapping[str, Any], source: Source) -> ForeignCheckpoint:
    """See `requanto.checkpoint.foreign.readers`."""
    bits = {size: bool(config.get(f"load_in_{size}bit") or config.get(f"_load_in_{size}bit")) for size in (4, 8)}
    if bits[4] == bits[8]:
        raise CheckpointError(
            f"quantization_config of bitsandbytes says load_in_4bit={bits[4]} and load_in_8bit={bits[8]}, expected "
            f"one of them"
        )
    found = ForeignCheckpoint(format="bitsandbytes, 8 bits" if bits[8] else "bitsandbytes, 4 bits")
    states = sorted(name for name in source if _STATE in name)
    scales = sorted(name for name in source if name.endswith(".SCB"))
    if (states and bits[8]) or (scales and bits[4]):
        raise CheckpointError(
            f"quantization_config of bitsandbytes says load_in_{4 if bits[4] else 8}bit, and {(states or scales)[0]} is "
            f"of the other kind: config and files do not belong together"
        )
    for name in states:
        _add_4bit(found, source, name)
    for name in scales:
        _add_int8(found, source, name.removesuffix(".SCB"))
    consumed = found.consumed
    for name in source:
        if name.endswith(".weight") and name not in consumed and source.header(name).dtype in _CODES:
            raise CheckpointError(
                f"{name} is {str(source.header(name).dtype).removeprefix('torch.')}, and its "
                f"{'quant_state' if bits[4] else 'SCB'} is not in the files: codes without their scales"
            )
    for name in source:
        weight, _, part = name.rpartition(".")
        if part in ("absmax", "quant_map") and weight not in consumed:
            raise CheckpointError(f"{name} has no quant_state in the files: a shard is missing")
    if not states and not scales and not config.get("llm_int8_has_fp16_weight"):
        raise CheckpointError(
            "the config says that weights are quantized by bitsandbytes, and no file holds a quant_state or SCB: it is "
            "another checkpoint's config, or the weights are a pickle (.bin), which Requanto does not open"
        )
    return found


_CODES = (torch.uint8, torch.int8)


# ---------------------------------------------------------------------- 4 bits


class _State(NamedTuple):
    """What is known of a 4-bit weight before its codes are read."""

    kind: str
    shape: torch.Size
    dtype: torch.dtype
    block: int
    offset: float | None  # of doubly quantized scales
    nested_block: int


def _add_4bit(found: ForeignCheckpoint, source: Source, state_name: str) -> None:
    name, _, kind = state_name.partition(_STATE)
    state = _read_state(source, state_name, kind)
    names = {"codes": name, "absmax": f"{name}.absmax", "quant_map": f"{name}.quant_map"}
    if state.offset is not None:
        names |= {part: f"{name}.{part}" for part in ("nested_absmax", "nested_quant_map")}
    size = state.shape.numel()
    codes = source.need(name, name)
    if codes.shape.numel() * codes.dtype.itemsize != -(-size // 2):
        raise CheckpointError(
            f"{name} is {codes.dtype} {tuple(codes.shape)}, expected {-(-size // 2)} bytes for a weight of "
            f"{tuple(state.shape)}: it is damaged"
        )
    blocks = -(-size // state.block)
    source.need_shape(names["absmax"], name, (blocks,), torch.float32 if state.offset is None else torch.uint8)
    source.need_shape(names["quant_map"], name, (16,), torch.float32)
    if state.offset is not None:
        source.need_shape(names["nested_absmax"], name, (-(-blocks // state.nested_block),), torch.float32)
        source.need_shape(names["nested_quant_map"], name, (256,), torch.float32)
    sources = tuple(names.values())
    found.dropped.add(state_name)
    k = state.shape[-1] if state.shape else 0
    group = math.gcd(k, state.block)
    if len(state.shape) not in (2, 3) or group < SMALLEST_GROUP:
        reason = (
            f"bitsandbytes' blocks of {state.block} cross its rows of {k} weights"
            if len(state.shape) in (2, 3)
            else f"its shape {tuple(state.shape)} has no rows"
        )
        found.floats[name] = ForeignFloat(
            state.shape, state.dtype, sources, lambda source: _dequantized(source, names, state), reason
        )
        return
    table = source[names["quant_map"]]
    known = torch.equal(table, torch.tensor(qtypes[f"q{kind}"].values, dtype=torch.float32, device=table.device))
    words = [f"q{kind}" if known else "qcodebook4", "x".join(map(str, state.shape))]
    words += [f"group={group}"] if group < k else []
    words += ["axis=1"] if len(state.shape) == 3 else []
    words += ["signed"] if _has_negative_scales(source, names, state) else []

    def build(source: Source) -> Parts:
        lead = state.shape[:-1]
        packed = source[name].contiguous().view(torch.uint8).reshape(*lead, k // 2)
        parts = {"qdata": (packed << 4) | (packed >> 4)}
        scale = _scales(source, names, state)
        if group != state.block:
            scale = scale[torch.arange(0, size, group, device=scale.device) // state.block]
        parts["scale"] = scale.reshape(*lead, k // group)
        return parts if known else {**parts, "codebook": source[names["quant_map"]]}

    found.weights[name] = ForeignWeight(" ".join(words), sources, build)


def _read_state(source: Source, name: str, kind: str) -> _State:
    """The JSON of a weight.

    Raises:
        CheckpointError: it is damaged, or says what no version writes.
    """
    stored = source[name]
    try:
        if kind not in ("nf4", "fp4") or stored.dtype != torch.uint8 or stored.numel() > 100_000:
            raise ValueError(f"a tensor of {stored.dtype} for the type {shown(kind)}")
        state = json.loads(bytes(stored.tolist()).decode())
        nested = "nested_offset" in state or "nested_blocksize" in state
        shape, block, inner = state["shape"], state["blocksize"], state["nested_blocksize"] if nested else 1
        offset = float(state["nested_offset"]) if nested else None
        if state["quant_type"] != kind:
            raise ValueError(f"quant_type {shown(state['quant_type'])} under the name of {kind}")
        if not all(type(size) is int and 1 <= size < 2**40 for size in (*shape, block, inner)):
            raise ValueError(f"shape {shown(shape)}, blocksize {shown(block)}, nested_blocksize {shown(inner)}")
        if offset is not None and not math.isfinite(offset):
            raise ValueError(f"nested_offset {offset}")
        return _State(kind, torch.Size(shape), _DTYPES[state["dtype"]], block, offset, inner)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{name} does not describe a weight of bitsandbytes ({type(error).__name__}: {error}); expected JSON with "
            f"quant_type, shape, dtype and blocksize"
        ) from error


def _scales(source: Source, names: Mapping[str, str], state: _State) -> torch.Tensor:
    """float32 scales of the blocks, computed as bitsandbytes does."""
    absmax = source[names["absmax"]]
    if state.offset is None:
        return absmax
    values = source[names["nested_quant_map"]][absmax.int()]
    outer = source[names["nested_absmax"]].repeat_interleave(state.nested_block)[: values.numel()]
    return values.mul_(outer).add_(state.offset)


def _has_negative_scales(source: Source, names: Mapping[str, str], state: _State) -> bool:
    """True if double quantization rounded a scale near 0 to one below."""
    if state.offset is None:
        return False
    absmax, table = source[names["absmax"]], source[names["nested_quant_map"]]
    if not bool((table[1:] >= table[:-1]).all()):
        return bool((_scales(source, names, state) < 0).any())
    # The values ascend, so the smallest scale of a block is that of its smallest code.
    missing = -absmax.numel() % state.nested_block
    codes = torch.nn.functional.pad(absmax, (0, missing), value=255).view(-1, state.nested_block).amin(1)
    return bool((table[codes.int()] * source[names["nested_absmax"]] + state.offset < 0).any())


def _dequantized(source: Source, names: Mapping[str, str], state: _State) -> torch.Tensor:
    """The float weight."""
    size = state.shape.numel()
    packed = source[names["codes"]].contiguous().view(torch.uint8).flatten()
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten()[:size]
    values = source[names["quant_map"]][codes.int()]
    scale = _scales(source, names, state).repeat_interleave(state.block)[:size]
    return values.mul_(scale).to(state.dtype).reshape(state.shape)


# ---------------------------------------------------------------------- 8 bits


def _add_int8(found: ForeignCheckpoint, source: Source, module: str) -> None:
    name, scb, layout = f"{module}.weight", f"{module}.SCB", f"{module}.weight_format"
    head = source.need(name, name)
    if len(head.shape) != 2:
        raise CheckpointError(f"{name} has shape {tuple(head.shape)}, expected two axes")
    n, k = source.need_shape(name, name, head.shape, torch.int8).shape
    source.need_shape(scb, name, (n,), torch.float32, torch.float16, torch.bfloat16)
    if layout in source:
        stored = source[layout]
        value = int(stored) if stored.numel() == 1 and not stored.is_floating_point() else -1
        if value != 0:
            raise CheckpointError(
                f"{layout} is {_FORMATS.get(value, shown(stored.tolist()))}, which is the layout of a GPU kernel of old "
                f"versions of bitsandbytes; read is 'row' (0). Load and save the model with bitsandbytes 0.44, which "
                f"rearranges it"
            )
        found.dropped.add(layout)

    def build(source: Source) -> Parts:
        return {"qdata": source[name], "scale": (source[scb].float() * _ONE_127TH).unsqueeze(1)}

    note = (
        "bitsandbytes multiplies 8-bit weights by inputs that it rounds to int8, without their outliers "
        "(llm_int8_threshold); here inputs stay float"
    )
    found.weights[name] = ForeignWeight(f"qint8 {n}x{k}", (name, scb), build, note)
