"""GPTQ checkpoints of AutoGPTQ, Optimum, GPTQModel and AutoRound, of 2 to 8 bits.

    M.qweight   int32 [K * bits / 32, N]: codes along K, low bits first; transposed these are our bytes
    M.qzeros    int32 [G, N * bits / 32]: zero points along N
    M.scales    float [G, N]
    M.g_idx     int32 [K]: the group of each input; with act-order (``desc_act``) groups are not contiguous

    w[n, k] = scales[g, n] * (code[k, n] - zero[g, n])

Zero points. ``gptq_v2`` stores them. ``gptq`` (v1) stores them minus one, which has no place for 0, and three conventions
for what happens there:

- AutoGPTQ, AutoRound and the kernels of ExLlama, Triton and Marlin read ``stored + 1`` in full, so 2^bits - 1 means 2^bits.
  (AutoGPTQ's own slow path for a CPU cuts it to 0; for a weight that was written with 0 both give noise in the fields
  above it, because AutoGPTQ packed -1 as 32 ones.) This is what is read here, unless GPTQModel wrote the file:
- GPTQModel subtracts one from all fields of a word at once, with borrows, and adds it again when it loads: 0 survives.
- Fields of 3 bits cross words. It subtracts one from each and keeps 3 bits; before version 7 it subtracted constants from
  words that are not one in each field. Both are undone as they were done.

A config names the writer in ``meta.quantizer``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from requanto.checkpoint.foreign.found import ForeignCheckpoint, ForeignWeight, Parts
from requanto.checkpoint.foreign.integers import (
    BITS,
    SCALES,
    Form,
    Scheme,
    Stored,
    fitting_scheme,
    form_of_zeros,
    has_negative,
    modules,
    need_codes,
    read_schemes,
)
from requanto.checkpoint.foreign.packing import codes_of_words, rows_of_words, with_columns
from requanto.checkpoint.foreign.source import Source
from requanto.checkpoint.format import CheckpointError
from requanto.config.checks import shown

#: How zero points are stored: themselves; minus one; minus one by GPTQModel from version 7 on, and before.
PLAIN, MINUS_ONE, BORROWED, BORROWED_BEFORE_7 = "plain", "minus one", "GPTQModel", "GPTQModel before 7"
#: checkpoint_format -> why it is not read
_OTHER_LAYOUTS = {
    "marlin": "stores codes in the order of a GPU kernel",
    "bitblas": "stores codes in the order of a GPU kernel",
    "gptq_p": "stores the bits of a code in several planes",
}
#: What GPTQModel before 7 subtracted from each three words of 3-bit zero points.
_BEFORE_7 = (0b00100100100100100100100100100100, 0b10010010010010010010010010010010, 0b01001001001001001001001001001001)
_WORDS = (torch.int32, torch.int16, torch.int8, torch.int64)


def recognize(description: Mapping[str, Any], source: Source) -> dict[str, Any] | None:
    """The config of an old checkpoint, the content of its ``quantize_config.json``: ``description["quantize_config"]``."""
    config = description.get("quantize_config")
    if not isinstance(config, Mapping) or not any(name.endswith(".qweight") for name in source):
        return None
    if "w_bit" in config:
        renamed = {"bits": config["w_bit"], "group_size": config.get("q_group_size", 128)}
        return {"quant_method": "awq", **renamed, **config}
    return {"quant_method": "gptq", **config}


def scan(config: Mapping[str, Any], source: Source) -> ForeignCheckpoint:
    """See `requanto.checkpoint.foreign.readers`."""
    told = next((config[key] for key in ("checkpoint_format", "format") if config.get(key) is not None), "gptq")
    layout = told.lower() if isinstance(told, str) else shown(told)
    if config.get("is_marlin_format"):
        layout = "marlin"
    if layout not in ("gptq", "gptq_v2"):
        why = _OTHER_LAYOUTS.get(layout, "is not known here")
        raise CheckpointError(
            f"quantization_config.checkpoint_format is {shown(layout)}, which {why}; read are 'gptq' and 'gptq_v2'. Save "
            f"the model with GPTQModel in one of them, or start from the float model"
        )
    if config.get("rotation"):
        raise CheckpointError(
            f"quantization_config.rotation is {shown(config['rotation'])}: GPTQModel rotates the inputs of some layers of "
            f"this model while it runs, which Requanto does not know. Start from the float model"
        )
    acts = config.get("desc_act")
    if acts is not None and type(acts) is not bool:
        raise CheckpointError(f"quantization_config.desc_act is {shown(acts)}, expected true or false")
    schemes = read_schemes(config, config.get("dynamic"), "dynamic")
    stored = PLAIN if layout == "gptq_v2" else stored_zeros(config)
    found = ForeignCheckpoint(format=_words(schemes, acts, layout))
    if acts and config.get("static_groups"):
        acts = None  # groups are contiguous although columns were quantized in another order
    signed = config.get("provider") == "auto-round"
    need_codes(source, ("qweight",), "scales")
    for name in modules(source):
        add_weight(found, source, name, schemes, stored, acts, signed)
    return found


def stored_zeros(config: Mapping[str, Any]) -> str:
    """How the writer of a v1 file stored zero points: by GPTQModel, or by anything else."""
    meta = config.get("meta")
    writers = meta.get("quantizer") if isinstance(meta, Mapping) else None
    for writer in [writers] if isinstance(writers, str) else writers or []:
        match = re.fullmatch(r"gptqmodel:(\d{1,6})\..{0,40}", str(writer))
        if match:
            return BORROWED_BEFORE_7 if int(match[1]) < 7 else BORROWED
    return MINUS_ONE


def zero_points(words: torch.Tensor, bits: int, count: int, stored: str) -> torch.Tensor:
    """Zero points ``[G, count]``, int16, from stored words ``[G, W]``.

    Args:
        stored: one of the conventions of this module.
    """
    if stored in (PLAIN, MINUS_ONE) or bits in (5, 6, 7):  # GPTQModel writes those in planes only
        zeros = codes_of_words(words, bits, count).to(torch.int16)
        return zeros if stored == PLAIN else zeros + 1
    if bits != 3:
        added = [sum(1 << start for start in range(0, words.dtype.itemsize * 8, bits))]
    elif stored == BORROWED_BEFORE_7:
        added = list(_BEFORE_7)
    else:
        return (codes_of_words(words, bits, count).to(torch.int16) + 1) & 7
    constants = torch.tensor(added, dtype=torch.int64, device=words.device).to(words.dtype)  # may wrap, as the sum does
    words = words + constants.repeat(words.shape[1] // len(added))
    return codes_of_words(words, bits, count).to(torch.int16)


def add_weight(
    found: ForeignCheckpoint,
    source: Source,
    module: str,
    schemes: list[Scheme],
    stored: str,
    acts: bool | None,
    signed: bool,
) -> None:
    """Adds a module's weight to what was found.

    Args:
        schemes: what the config allows.
        stored: how zero points are stored.
        acts: True if the inputs are in another order, False if they are not, None if the tensors tell.
        signed: the writer knows negative scales.

    Raises:
        CheckpointError: tensors are missing, or fit neither each other nor the config.
    """
    name, g_idx = f"{module}.weight", f"{module}.g_idx"
    names = [f"{module}.{part}" for part in ("qweight", "qzeros", "scales")]
    bits, n, k, groups = _sizes(source, name, names)
    scheme = fitting_scheme(schemes, bits, k, groups, name)
    ordered = False
    if g_idx in source:
        source.need_shape(g_idx, name, (k,), torch.int32, torch.int64)
        ordered = read_order(source[g_idx], groups, scheme.group, g_idx) is not None
        if ordered and acts is False:
            raise CheckpointError(
                f"{g_idx} permutes the inputs, and the config says desc_act=false: a kernel that believes the config mixes "
                f"up the groups. If the model was quantized with act-order, set desc_act to true"
            )
    elif acts and groups > 1:
        source.need(g_idx, name)
    if ordered:
        names.append(g_idx)
    elif g_idx in source:
        found.dropped.add(g_idx)
    zeros = "symmetric"
    if not scheme.symmetric:
        zeros = form_of_zeros(zero_points(source[names[1]], bits, n, stored), bits)
    form = Form(bits, (n, k), scheme.group, zeros, signed and has_negative(source[names[2]]), ordered)

    def build(source: Source) -> Parts:
        words, zeros, scale, *groups_of_inputs = (source[part] for part in names)
        rows = rows_of_words(words)
        order = read_order(groups_of_inputs[0], groups, scheme.group, g_idx) if groups_of_inputs else None
        if order is not None:
            rows = with_columns(rows, bits, k, order)
        parts = form.parts(Stored(rows, scale.t(), zero_points(zeros, bits, n, stored).t()), name)
        return parts if order is None else {**parts, "order": order.to(torch.int32)}

    found.weights[name] = ForeignWeight(form.text, tuple(names), build)


def _sizes(source: Source, name: str, names: list[str]) -> tuple[int, int, int, int]:
    """Bits, N, K and number of groups from the shapes of qweight, qzeros and scales.

    Raises:
        CheckpointError: the tensors are missing or do not fit together.
    """
    weight, zeros, scales = (source.need(part, name) for part in names)
    for part, head in zip(names, (weight, zeros, scales), strict=True):
        if len(head.shape) != 2 or 0 in head.shape:
            raise CheckpointError(f"{part} has shape {tuple(head.shape)}, expected two axes with at least one number")
    if weight.dtype not in _WORDS or zeros.dtype != weight.dtype:
        raise CheckpointError(f"{names[0]} is {weight.dtype} and {names[1]} {zeros.dtype}, expected int32 for both")
    word, (groups, n) = 8 * weight.dtype.itemsize, scales.shape
    bits = zeros.shape[1] * word // n
    if bits not in BITS or zeros.shape[1] * word != n * bits or weight.shape[0] * word % bits:
        raise CheckpointError(
            f"{names[1]} has {zeros.shape[1]} words of {word} bits for {n} outputs and {names[0]} {weight.shape[0]} for the "
            f"inputs, expected outputs x bits / {word} and inputs x bits / {word}, with 2 to 8 bits: one of them is damaged"
        )
    if bits in (3, 5, 6, 7) and word != 32:
        raise CheckpointError(f"{names[0]} holds codes of {bits} bits in words of {word}, expected int32")
    k = weight.shape[0] * word // bits
    source.need_shape(names[0], name, (k * bits // word, n))
    source.need_shape(names[1], name, (groups, n * bits // word))
    source.need_shape(names[2], name, (groups, n), *SCALES)
    return bits, n, k, groups


def read_order(g_idx: torch.Tensor, groups: int, group: int, name: str) -> torch.Tensor | None:
    """The columns of a weight sorted by group, int64 ``[K]``; None if they are sorted already.

    Args:
        g_idx: the group of each column.
        groups, group: their number and size.
        name: of the tensor, for messages.

    Raises:
        CheckpointError: it names unknown groups, or not each one as often as its size says.
    """
    k = g_idx.shape[0]
    size = k if group == -1 else group
    trivial = torch.arange(k, device=g_idx.device) // size
    if torch.equal(g_idx.long(), trivial):
        return None
    order = torch.argsort(g_idx.long(), stable=True)
    if not torch.equal(g_idx.long()[order], trivial):
        counts = torch.bincount(g_idx.clamp(0, groups).long(), minlength=groups)
        wrong = int((counts[:groups] != torch.bincount(trivial, minlength=groups)).nonzero()[:1].sum())
        raise CheckpointError(
            f"{name} does not divide {k} inputs into {groups} groups of {size}: it holds numbers from {int(g_idx.min())} to "
            f"{int(g_idx.max())}, and group {wrong} {int(counts[wrong])} times. It is damaged, or group_size in the config "
            f"is wrong"
        )
    return order


def _words(schemes: list[Scheme], acts: bool | None, layout: str) -> str:
    """The format in a user's words."""
    bits = "/".join(map(str, sorted({scheme.bits for scheme in schemes})))
    group = "one scale a row" if schemes[0].group == -1 else f"group size {schemes[0].group}"
    version = ", v2" if layout == "gptq_v2" else ""
    return f"GPTQ, {bits} bits, {group}{', act-order' if acts else ''}{version}"
