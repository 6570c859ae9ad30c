"""`explain`: which implementation runs each layer, and why."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from requanto.dtypes.qtypes import qtype
from requanto.linear.prepack import expected_layout
from requanto.linear.registry import choose, problem_of
from requanto.tensor.qtensor import QTensor


@dataclass(frozen=True)
class LayerChoice:
    """The implementation of one layer's GEMM.

    Attributes:
        name: name of the parameter.
        weight: its type, e.g. ``"int4, group 64"``.
        shape: its shape.
        rows: rows of x (tokens).
        implementation, reason: the implementation that the registry selects, and why it exists.
        layout: layout of the codes, now or after the first GEMM.
    """

    name: str
    weight: str
    shape: tuple[int, ...]
    rows: int
    implementation: str
    layout: str
    reason: str


class Explanation(list):
    """A list of `LayerChoice` that prints as a table."""

    def __str__(self) -> str:
        if not self:
            return "no quantized linear weights"
        head = ("parameter", "weight", "shape", "rows", "implementation", "layout", "why")
        lines = [
            (c.name, c.weight, "x".join(map(str, c.shape)), str(c.rows), c.implementation, c.layout, c.reason)
            for c in self
        ]
        widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in [head, *lines]
        )


def explain(
    model: nn.Module, rows: tuple[int, ...] | int = (1, 16, 512), dtype: torch.dtype | None = None
) -> Explanation:
    """Lists the implementation that runs each quantized matrix of a model, and why. Prints as a table.

    Args:
        rows: one or several numbers of rows (tokens) of x.
        dtype: dtype of x; None: each weight's dtype.
    """
    found = Explanation()
    looked_up = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    calibrated = {
        id(m.weight): m.activation_qtype
        for m in model.modules()
        if getattr(m, "calibrated", False)
        and isinstance(getattr(m, "weight", None), QTensor)
        and isinstance(getattr(m, "activation_qtype", None), qtype)
    }
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, QTensor) or parameter.dim() not in (2, 3) or id(parameter) in looked_up:
            continue
        group = "" if parameter.group_size is None else f", group {parameter.group_size}"
        kind = parameter.qtype.name.removeprefix("q") + group
        if parameter.scale_bits is not None:
            kind += f", scales in {parameter.scale_bits} bits"
        if parameter.zeros:
            kind += ", whole zero points"
        if parameter.scale_block is not None:
            kind += f", blocks of {parameter.scale_block}"
        if parameter.rotation is not None:
            kind += f", rotated in blocks of {parameter.rotation}"
        if parameter.column is not None:
            kind += ", column scale"
        if parameter.order is not None:
            kind += ", columns in another order"
        if parameter.rank:
            kind += f", plus a term of rank {parameter.rank}"
        static = id(parameter) in calibrated
        activation = calibrated[id(parameter)] if static else parameter.activation
        if activation is not None:
            kind += f", {activation.name.removeprefix('q')} activations{' with a static scale' if static else ''}"
        float_type = dtype or parameter.dtype
        layout = expected_layout(parameter, float_type, activation)
        stored = (
            parameter if parameter.dim() == 3 else parameter.as_matrix()
        )  # of a transposed one: x @ W, as in Conv1D
        for count in (rows,) if isinstance(rows, int) else rows:
            problem = problem_of(stored, float_type, count, activation, layout=layout, static=static)
            chosen = choose(problem, grouped=parameter.dim() == 3).implementation
            found.append(LayerChoice(name, kind, tuple(parameter.shape), count, chosen.name, layout, chosen.reason))
    return found
