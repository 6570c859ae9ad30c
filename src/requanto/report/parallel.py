"""Memory and network traffic per rank of a quantized model that is sharded over several devices.

Computed from the shapes of a model on the meta device; no weights are loaded. Used by ``requanto inspect --parallel tp=8``.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from requanto.config.config import QuantoConfig
from requanto.config.plan import PlannedWeight, plan
from requanto.dtypes.bit_packing import packed_length
from requanto.scales import default_group_size, fit_group_size
from requanto.scales.columns import LEAST_ROWS, default_column_scale
from requanto.scales.compact import ROW_DTYPE, stored_length
from requanto.scales.weights import scale_dtype
from requanto.tensor.qtensor import QTensor

#: shapes of Llama models, so that no download is needed
LLAMA_SHAPES = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "405B": {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128},
}

_KEYS = ("tp", "fsdp")


@dataclass(frozen=True)
class ParallelReport:
    """One row of the table; all sizes are bytes of one rank.

    Attributes:
        tp, fsdp: number of ranks of tensor parallelism, number of ranks of FSDP2.
        quantized: codes, scales and shifts.
        floats: everything that stays float (norms, embeddings, lm_head).
        gathered: FSDP2 only: the largest layer, which is gathered while it runs.
        cache_per_token: KV cache of one token, in the model's dtype.
        sent_per_token: bytes sent for one token through the whole model with tensor parallelism.
        sent_per_step: bytes sent for one forward with FSDP2, independent of the batch (training: twice that).
    """

    tp: int
    fsdp: int
    quantized: int
    floats: int
    gathered: int
    cache_per_token: int
    sent_per_token: int
    sent_per_step: int

    @property
    def total(self) -> int:
        """Bytes of weights that a rank needs."""
        return self.quantized + self.floats + self.gathered


def parse_parallel(text: str) -> dict[str, int]:
    """Parses ``"tp=8"`` or ``"tp=8,fsdp=2"``.

    Raises:
        ValueError: an unknown key, or a value that is not a positive number.
    """
    found = dict.fromkeys(_KEYS, 1)
    for part in text.replace(" ", "").split(","):
        key, _, value = part.partition("=")
        if key not in _KEYS or not value.isdecimal() or int(value) < 1:
            raise ValueError(f"--parallel {text!r}: expected e.g. 'tp=8' or 'tp=8,fsdp=2', found {part!r}")
        found[key] = int(value)
    return found


def llama(size: str) -> nn.Module:
    """Returns a Llama of a size in LLAMA_SHAPES, on the meta device.

    Raises:
        ValueError: an unknown size.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    if size not in LLAMA_SHAPES:
        raise ValueError(f"size {size!r} is unknown; known: {', '.join(LLAMA_SHAPES)}")
    config = LlamaConfig(**LLAMA_SHAPES[size], num_key_value_heads=8, vocab_size=128256, dtype=torch.bfloat16)
    with torch.device("meta"):
        return LlamaForCausalLM(config).to(torch.bfloat16)


def parallel_report(model: nn.Module, config: QuantoConfig | None, *, tp: int = 1, fsdp: int = 1) -> ParallelReport:
    """Computes memory and traffic of one rank.

    Args:
        model: a Transformers model, float or quantized; the meta device is enough.
        config: how its weights will be quantized; None: they stay as they are.
        tp: ranks of tensor parallelism, by the model's ``tp_plan``.
        fsdp: ranks of FSDP2 (per group of tp ranks).

    Raises:
        ValueError: ``tp`` or ``fsdp`` is below 1, or the model has no ``tp_plan``.
    """
    if tp < 1 or fsdp < 1:
        raise ValueError(f"tp and fsdp must be 1 or more, found tp={tp}, fsdp={fsdp}")
    styles = dict(getattr(model, "tp_plan", None) or {}) if tp > 1 else {}
    if tp > 1 and not styles:
        raise ValueError(f"{type(model).__name__} has no tp_plan, so Transformers cannot shard it: use fsdp={tp}")
    planned: dict[str, PlannedWeight] = {}
    if config is not None:
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        skips = [name for name, module in model.named_modules() if module is head and name]
        planned = plan(model, config, default_skips=skips, output_embeddings=head)

    quantized = floats = 0
    by_layer: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        style = _style(name, styles)
        if name in planned or isinstance(parameter, QTensor):
            size = _quantized_bytes(name, parameter, planned.get(name), style, tp)
            quantized += size
        else:
            size = parameter.numel() * parameter.element_size() // (tp if style else 1)
            floats += size
        layer = ".".join(name.split(".")[:3])
        by_layer[layer] = by_layer.get(layer, 0) + size
    whole, gathered = quantized + floats, 0
    if fsdp > 1:
        quantized, floats, gathered = -(-quantized // fsdp), -(-floats // fsdp), max(by_layer.values())
    settings = getattr(model, "config", None)
    cache, sent = _per_token(settings, tp)
    return ParallelReport(
        tp, fsdp, quantized, floats, gathered, cache, sent, whole * (fsdp - 1) // fsdp if fsdp > 1 else 0
    )


def _style(name: str, styles: dict[str, str]) -> str | None:
    """Returns how tensor parallelism shards a parameter: ``"colwise"`` (out_features), ``"rowwise"`` (in_features) ..."""
    module = name.rpartition(".")[0]
    for pattern, style in styles.items():
        if fnmatch.fnmatchcase(module, pattern) or fnmatch.fnmatchcase(name, pattern):
            found = str(style)
            return next((known for known in ("colwise", "rowwise", "embedding") if known in found), None)
    return None


def _quantized_bytes(name: str, parameter: Any, planned: PlannedWeight | None, style: str | None, tp: int) -> int:
    if isinstance(parameter, QTensor):
        kind, group, affine = parameter.qtype, parameter.group_size, parameter.affine
        transposed, axis, bits = parameter.transposed, parameter.axis, parameter.scale_bits
        rank, zeros = parameter.rank, parameter.zeros
    else:
        assert planned is not None
        options = planned.options
        kind, transposed, axis, bits = options.qtype, planned.transposed, planned.axis, options.scale_bits
        rank, zeros = options.low_rank or 0, options.zero_point is not None
        wanted = default_group_size(kind) if options.group_size == "default" else options.group_size
        affine = kind.affine(options.symmetric, name)
        group = wanted  # type: ignore[assignment]
    shape = list(parameter.shape)
    if transposed:
        shape[-1], shape[-2] = shape[-2], shape[-1]
    rows, length = torch.Size(shape[: axis + 1]).numel(), torch.Size(shape[axis + 1 :]).numel()
    if planned is not None:
        group = fit_group_size(group, length, name)
    ranks = tp if style else 1
    rows_here, length_here = (rows, -(-length // ranks)) if style == "rowwise" else (-(-rows // ranks), length)
    groups = 1 if group is None else -(-length_here // group)  # both shards of a split group have its scale
    each = groups * scale_dtype(parameter.dtype, group is not None).itemsize
    row = 0
    if bits is not None and group is not None:
        each, row = stored_length(groups, bits), ROW_DTYPE.itemsize
    if isinstance(parameter, QTensor) and parameter.scale_block is not None:
        numbers = [part for part in (parameter.row_scale, parameter.row_shift) if part is not None]
        row = sum(part.element_size() for part in numbers) * -(-length_here // parameter.scale_block)
    second = stored_length(groups, kind.bits) if zeros else each
    codes = packed_length(length_here, kind.bits) * kind.storage_dtype.itemsize
    shared = 4 * 2**kind.bits if kind.is_learned else 0
    factors = rank * (rows_here + torch.Size(shape[:axis]).numel() * length_here) * parameter.element_size()
    column = isinstance(parameter, QTensor) and parameter.column is not None
    if planned is not None:
        asked = planned.options.column_scale
        column = bool(default_column_scale(kind, shape[axis]) if asked is None else asked) and shape[axis] >= LEAST_ROWS
    if column:
        shared += torch.Size(shape[:axis]).numel() * length_here * parameter.element_size()
    if isinstance(parameter, QTensor) and parameter.order is not None:
        shared += torch.Size(shape[:axis]).numel() * length_here * parameter.order.element_size()
    return shared + rows_here * (codes + each + (second if affine else 0) + row) + factors


def _per_token(settings: Any, tp: int) -> tuple[int, int]:
    """Returns (KV cache bytes, bytes sent) per token on one rank, in 16 bits."""
    layers = getattr(settings, "num_hidden_layers", 0)
    heads = getattr(settings, "num_attention_heads", 0)
    hidden = getattr(settings, "hidden_size", 0)
    if not (layers and heads and hidden):
        return 0, 0
    kv_heads = getattr(settings, "num_key_value_heads", heads)
    width = getattr(settings, "head_dim", None) or hidden // heads
    cache = 2 * layers * max(1, -(-kv_heads // tp)) * width * 2
    # Two all-reduces of the hidden state per layer; in a ring each rank sends 2 (n - 1) / n of it.
    sent = 2 * layers * hidden * 2 * 2 * (tp - 1) // tp
    return cache, sent
