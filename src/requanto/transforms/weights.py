"""The float weights of a model, as matrices whose rows and columns are scaled and rotated in place."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from requanto.config.plan import parameter_holders, weight_kind


class FloatWeight:
    """One weight of a layer.

    Attributes:
        name: full dotted name of the parameter.
        module, leaf: the place of the parameter.
        kind: ``"linear"``, ``"conv1d"`` (GPT-2's), ``"experts"`` (``[E, ...]``), ``"embedding"`` or ``"router"`` (a module
            of another class with a matrix named ``weight``).
        transposed: the parameter is ``[..., K, N]``.
        shared: another module has the same parameter.
    """

    def __init__(self, name: str, module: nn.Module, leaf: str, kind: str, transposed: bool, shared: bool) -> None:
        self.name, self.module, self.leaf, self.kind = name, module, leaf, kind
        self.transposed, self.shared = transposed, shared

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter."""
        return self.module._parameters[self.leaf]  # type: ignore[return-value]

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias ``[..., N]``, or None."""
        return self.module._parameters.get("bias" if self.leaf == "weight" else f"{self.leaf}_bias")

    @property
    def matrix(self) -> torch.Tensor:
        """A view of the values as ``[..., N, K]``."""
        values = self.parameter.data
        return values.transpose(-1, -2) if self.transposed else values

    @property
    def rows(self) -> int:
        """N: output channels."""
        return self.matrix.shape[-2]

    @property
    def columns(self) -> int:
        """K: input channels."""
        return self.matrix.shape[-1]

    def scale_columns(self, factors: torch.Tensor) -> None:
        """Multiplies columns by ``[..., K]``."""
        self.matrix.mul_(factors.to(self.matrix).unsqueeze(-2))

    def scale_rows(self, factors: torch.Tensor) -> None:
        """Multiplies rows and bias by ``[..., N]``."""
        self.matrix.mul_(factors.to(self.matrix).unsqueeze(-1))
        if self.bias is not None:
            self.bias.data.mul_(factors.to(self.bias))

    def rotate_columns(self, rotation: torch.Tensor) -> None:
        """Replaces W by W Q."""
        self.matrix.copy_(_matmul(self.matrix, rotation))

    def rotate_rows(self, rotation: torch.Tensor) -> None:
        """Replaces W by Q^T W, and the bias by b Q: what the layer computes becomes y Q."""
        self.matrix.copy_(_matmul(self.matrix.transpose(-1, -2), rotation).transpose(-1, -2))
        if self.bias is not None:
            self.bias.data.copy_(_matmul(self.bias.data, rotation))


def _matmul(values: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    wide = values.reshape(-1, values.shape[-1])
    if not values.is_cpu:  # a GPU may multiply float32 in TF32
        parts = [(part.double() @ rotation.to(part.device)).to(values.dtype) for part in wide.split(8192)]
        return torch.cat(parts).view(values.shape)
    return (wide @ rotation.to(values)).view(values.shape)


def float_weights(model: nn.Module) -> Iterator[FloatWeight]:
    """Yields the weights of all layers that compute a matmul, and of embeddings."""
    holders = parameter_holders(model)
    for name, module in model.named_modules():
        for leaf, parameter in module._parameters.items():
            if parameter is None or not parameter.is_floating_point():
                continue
            found = weight_kind(module, leaf, parameter)
            kind, transposed = ("router", False) if found is None else (found[0], found[2])
            if found is None and (leaf != "weight" or parameter.dim() != 2):
                continue
            if kind != "convolution":
                shared = len(holders[id(parameter)]) > 1
                yield FloatWeight(f"{name}.{leaf}".lstrip("."), module, leaf, kind, transposed, shared)


def norm_vector(module: nn.Module) -> nn.Parameter | None:
    """The weight of a module that multiplies channels by a vector, as norms do; None for other modules."""
    weight = module._parameters.get("weight")
    return weight if weight is not None and weight.dim() == 1 and weight.is_floating_point() else None
