"""`explain`: which implementation runs each layer, and why.

Products come from the registry. Convolutions and embeddings have no entries there: they dequantize, by a kernel where the
device has one (`requanto.linear.convolution`, `requanto.linear.embedding`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from requanto.dtypes.qtypes import qtype
from requanto.linear.gpu import conditions as gpu
from requanto.linear.prepack import expected_layout
from requanto.linear.registry import choose, problem_of
from requanto.runtime.devices import made_current
from requanto.tensor.qtensor import QTensor


@dataclass(frozen=True)
class LayerChoice:
    """What runs one layer.

    Attributes:
        name: name of the parameter.
        weight: its type, e.g. ``"int4, group 64"``.
        shape: its shape.
        rows: rows of x (tokens); 0 for convolutions and embeddings, where it makes no difference.
        implementation, reason: the implementation that the registry selects, and why it exists; of convolutions and
            embeddings what dequantizes the weight.
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
            return "no quantized weights"
        head = ("parameter", "weight", "shape", "rows", "implementation", "layout", "why")
        lines = [
            (c.name, c.weight, "x".join(map(str, c.shape)), str(c.rows or "any"), c.implementation, c.layout, c.reason)
            for c in self
        ]
        widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in [head, *lines]
        )


#: What reads a weight that is not multiplied, by whether a kernel dequantizes it: (implementation, why).
_KERNEL, _TORCH, _CPU = "triton-dequantize", "gpu-dequantize", "cpu-dequantize"
_NO_KERNEL = "no kernel runs here (no Triton, or an older GPU): "
_CONVOLUTIONS = {
    _KERNEL: "dequantized by a kernel in each call, then the vendor's convolution",
    _TORCH: _NO_KERNEL + "dequantized by torch in each call, then the vendor's convolution",
    _CPU: "dequantized into a scratch buffer, then torch's convolution; images of few pixels as a GEMM of patches",
    "reference": "dequantized by torch in each call, then torch's convolution",
}
_LOOKUPS = {
    _KERNEL: "the rows that are looked up are gathered, then dequantized by a kernel",
    _TORCH: _NO_KERNEL + "the rows that are looked up are gathered, then dequantized by torch",
    _CPU: "the rows that are looked up are gathered, then dequantized",
    "reference": "the rows that are looked up are gathered, then dequantized by torch",
}


def explain(
    model: nn.Module, rows: tuple[int, ...] | int = (1, 16, 512), dtype: torch.dtype | None = None
) -> Explanation:
    """Lists what runs each quantized weight of a model, and why: linear layers, experts, convolutions, embeddings.

    Prints as a table. It names eager calls; a graph of torch.compile dequantizes what is not multiplied in its own kernels.

    Args:
        rows: one or several numbers of rows (tokens) of x.
        dtype: dtype of x; None: each weight's dtype.
    """
    found = Explanation()
    calibrated = {
        id(m.weight): m.activation_qtype
        for m in model.modules()
        if getattr(m, "calibrated", False)
        and isinstance(getattr(m, "weight", None), QTensor)
        and isinstance(getattr(m, "activation_qtype", None), qtype)
    }
    users = _users(model)
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, QTensor):
            continue
        readers = users.get(id(parameter), [])
        looked_up = [m for m in readers if isinstance(m, nn.Embedding)]
        convolved = [m for m in readers if isinstance(m, _CONVOLUTION)] or parameter.dim() > 3
        static = id(parameter) in calibrated
        activation = calibrated[id(parameter)] if static else parameter.activation
        kind = _described(parameter, activation, static)
        for used, reasons in ((looked_up, _LOOKUPS), (convolved, _CONVOLUTIONS)):
            if used:
                how = _dequantized_by(parameter)
                layout, shape = parameter.layout_name, tuple(parameter.shape)
                found.append(LayerChoice(name, kind, shape, 0, how, layout, reasons[how]))
        if convolved or (looked_up and len(looked_up) == len(readers)):
            continue
        float_type = dtype or parameter.dtype
        plain = looked_up and parameter.device.type != "cpu"
        layout = "plain" if plain else expected_layout(parameter, float_type, activation)
        # A transposed matrix is read as stored: x @ W, as in Conv1D.
        stored = parameter if parameter.dim() == 3 else parameter.as_matrix()
        for count in (rows,) if isinstance(rows, int) else rows:
            problem = problem_of(stored, float_type, count, activation, layout=layout, static=static)
            chosen = choose(problem, grouped=parameter.dim() == 3).implementation
            details = "" if chosen.details is None else chosen.details(problem)
            why = chosen.reason + details + _together(readers, count, float_type)
            found.append(LayerChoice(name, kind, tuple(parameter.shape), count, chosen.name, layout, why))
    return found


_CONVOLUTION = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d
)  # fmt: skip


def _users(model: nn.Module) -> dict[int, list[nn.Module]]:
    """The modules that hold each quantized parameter, by its id: a tied table is an embedding's and a linear layer's."""
    users: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if isinstance(parameter, QTensor):
                users.setdefault(id(parameter), []).append(module)
    return users


def _together(readers: list[nn.Module], rows: int, dtype: torch.dtype) -> str:
    """Names the layers that one launch computes together with this one (`requanto.join_layers`); "" if it runs alone."""
    layer = readers[0] if len(readers) == 1 else None
    others = getattr(layer, "others_in_one_launch", None)
    names = [] if others is None else others(rows, dtype)
    return f"; one launch with {', '.join(names)}" if names else ""


def _dequantized_by(weight: QTensor) -> str:
    """What dequantizes a convolution's or an embedding's weight in eager calls."""
    device = weight.device.type
    if device in gpu.DEVICES:
        with made_current(device, weight.device.index):
            return _KERNEL if gpu.decodes(device, weight.qtype, weight.layout_name) else _TORCH
    return _CPU if device == "cpu" else "reference"


def _described(weight: QTensor, activation: qtype | None, static: bool) -> str:
    """The weight's type and all that belongs to it, in words."""
    group = [] if weight.group_size is None else [f"group {weight.group_size}"]
    words = [weight.qtype.name.removeprefix("q"), *group, *weight._spec.features()]
    if weight.rank:
        words.append(f"plus a term of rank {weight.rank}")
    if activation is not None:
        words.append(f"{activation.name.removeprefix('q')} activations{' with a static scale' if static else ''}")
    return ", ".join(words)
