"""The types that a budget may choose for a layer, and their sizes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from requanto.config.limit import parse_candidates
from requanto.config.plan import PlannedWeight
from requanto.dtypes.qtypes import resolve_qtype
from requanto.linear.cpu.strips import padding_bytes
from requanto.scales.search import valid_methods
from requanto.tensor.qtensor import QTensor

#: Types and group sizes that are tried without samples: ``type``, ``type:group`` or ``type:row``; float is always added.
#: Types below 8 bits have groups: with one scale per row, errors concentrate in rows with outliers, whose effect cannot be
#: estimated from weights only (all-MiniLM-L6-v2 loses most of its accuracy in some such layers).
GROUPED_CANDIDATES = (
    *("int2:16", "int2:32", "int2:64"),
    *("int3:32", "int3:64", "int3:128"),
    *("int4:32", "int4:64", "int4:128"),
    *("int5:64", "int5:128"),
    *("int6:64", "int6:128"),
    "int7:128",
    *("int8:row", "float8:row"),
)

#: Types that are tried with samples, which show that effect.
ALL_CANDIDATES = (*GROUPED_CANDIDATES, "int3:row", "int4:row", "int5:row", "int6:row")

FLOAT = "float"


@dataclass(frozen=True)
class Candidate:
    """One type (and group size) for a weight.

    Attributes:
        label: ``"int4 g64"``, ``"int8"`` (one scale per row), ``"float"``.
        planned: how to quantize it; None: it stays float.
        bytes: size of all stored parts; for a budget of memory also what kernels of a CPU pad the codes with.
    """

    label: str
    planned: PlannedWeight | None
    bytes: int


def bytes_of(weight: QTensor, running: bool) -> int:
    """The size of a weight: of all stored parts.

    Args:
        running: with the padding of codes that a CPU's kernels multiply, for a budget that holds once the model has run.
    """
    return weight.nbytes + (padding_bytes(weight._spec) if running else 0)


def candidates_for(
    planned: PlannedWeight, shape: torch.Tensor, texts: Sequence[str], running: bool = False
) -> list[Candidate]:
    """Returns the distinct candidates for a weight, float last.

    Args:
        planned: its plan with ``options.auto``; a group size given by the user is used for all types.
        shape: the weight, or a meta tensor of its shape and dtype.
        texts: see ``GROUPED_CANDIDATES``.
        running: see `bytes_of`.
    """
    meta = torch.empty(shape.shape, dtype=shape.dtype, device="meta")
    found: dict[str, Candidate] = {}
    for name, group in parse_candidates(texts):
        kind = resolve_qtype(name)
        options = copy.copy(planned.options)
        options.qtype, options.auto = kind, False
        if options.group_size == "default":
            options.group_size = group
        if options.symmetric is not None and (kind.is_codebook or kind.bits == 8 or kind.is_unsigned):
            options.symmetric = None  # the option does not apply to these types
        if kind.blocks is not None:
            options.scale_bits = None  # its scales have 8 bits
        if options.method is not None and options.method not in valid_methods(kind):
            options.method = None  # the scale search does not support this type
        choice = replace(planned, options=options)
        tensor = choice.quantize(meta, "a candidate")
        fitted = "" if tensor.group_size is None else f" g{tensor.group_size}"
        options.group_size = tensor.group_size
        found.setdefault(f"{name}{fitted}", Candidate(f"{name}{fitted}", choice, bytes_of(tensor, running)))
    float_bytes = shape.numel() * shape.element_size()
    return [*found.values(), Candidate(FLOAT, None, float_bytes)]
