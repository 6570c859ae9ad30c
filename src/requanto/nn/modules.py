"""The quantized modules."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from requanto.dtypes.qtypes import qtype
from requanto.linear import linear, times
from requanto.nn.activation import QActivation
from requanto.nn.mixin import QModuleMixin
from requanto.nn.registry import modules
from requanto.scales.optimizers import Optimizer
from requanto.tensor.qtensor import QTensor


@modules.register(nn.Linear)
class QLinear(QModuleMixin, nn.Linear):
    """nn.Linear with a weight that is rounded in each forward, or with quantized activations."""

    @classmethod
    def qcreate(
        cls,
        module: nn.Linear,
        weights: qtype | None,
        activations: qtype | None = None,
        optimizer: Optimizer | None = None,
        device: torch.device | None = None,
    ) -> QLinear:
        return cls(
            module.in_features,
            module.out_features,
            module.bias is not None,
            dtype=module.weight.dtype,
            device=device,
            weights=weights,
            activations=activations,
            optimizer=optimizer,
            quantize_input=True,
        )

    fuses_input = True

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _linear(self, input, self.qweight)


def _linear(module: QModuleMixin, input: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``input @ weight.T + bias``, or ``input @ weight + bias`` for a weight [in, out].

    With a QTensor, quantized activations are multiplied as codes. With a column scale, what is quantized is the input times
    the column scale, so an input that is quantized already is quantized anew.
    """
    kind, scale, transposed = module.activation_qtype, None, module.transposed_weight
    if not isinstance(weight, QTensor) or (kind is None and isinstance(input, QActivation)):
        return F.linear(input, weight.t() if transposed else weight, module.bias)
    if kind is None:
        return times(input, weight, module.bias) if transposed else F.linear(input, weight, module.bias)
    if isinstance(input, QActivation) and weight.column is None:
        input, scale = input.dequantize(), input._scale
    elif module.calibrated:
        scale = module.input_scale
    run = times if transposed else linear
    return run(input, weight, module.bias, activation=kind, input_scale=scale)


class _QConvNd(QModuleMixin):
    """Base of the convolutions. Only their outputs are quantized, with static scales; inputs are not."""

    @classmethod
    def qcreate(
        cls,
        module: Any,
        weights: qtype | None,
        activations: qtype | None = None,
        optimizer: Optimizer | None = None,
        device: torch.device | None = None,
    ) -> Any:
        extra = {"output_padding": module.output_padding} if module.transposed else {}
        return cls(
            module.in_channels,
            module.out_channels,
            module.kernel_size,
            stride=module.stride,
            padding=module.padding,
            dilation=module.dilation,
            groups=module.groups,
            bias=module.bias is not None,
            padding_mode=module.padding_mode,
            dtype=module.weight.dtype,
            device=device,
            weights=weights,
            activations=activations,
            optimizer=optimizer,
            **extra,
        )

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(input, self.qweight, self.bias)  # type: ignore[attr-defined]


@modules.register(nn.Conv1d)
class QConv1d(_QConvNd, nn.Conv1d):
    """nn.Conv1d, quantized."""


@modules.register(nn.Conv2d)
class QConv2d(_QConvNd, nn.Conv2d):
    """nn.Conv2d, quantized."""


@modules.register(nn.Conv3d)
class QConv3d(_QConvNd, nn.Conv3d):
    """nn.Conv3d, quantized."""


@modules.register(nn.ConvTranspose2d)
class QConvTranspose2d(_QConvNd, nn.ConvTranspose2d):
    """nn.ConvTranspose2d, quantized. Its weight is [in, out, h, w], and each input channel has separate scales."""

    def forward(self, input: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:
        padding = self._output_padding(
            input,
            output_size,
            self.stride,
            self.padding,
            self.kernel_size,
            2,
            self.dilation,  # type: ignore[arg-type]
        )
        return F.conv_transpose2d(
            input, self.qweight, self.bias, self.stride, self.padding, padding, self.groups, self.dilation
        )


@modules.register(nn.Embedding)
class QEmbedding(QModuleMixin, nn.Embedding):
    """nn.Embedding with a quantized table; its activations are never quantized."""

    @classmethod
    def qcreate(
        cls,
        module: nn.Embedding,
        weights: qtype | None,
        activations: qtype | None = None,
        optimizer: Optimizer | None = None,
        device: torch.device | None = None,
    ) -> QEmbedding | None:
        if weights is None:
            return None
        return cls(
            module.num_embeddings,
            module.embedding_dim,
            padding_idx=module.padding_idx,
            max_norm=module.max_norm,
            norm_type=module.norm_type,
            scale_grad_by_freq=module.scale_grad_by_freq,
            sparse=module.sparse,
            dtype=module.weight.dtype,
            device=device,
            weights=weights,
            optimizer=optimizer,
        )

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.embedding(
            input,
            self.qweight,
            self.padding_idx,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.sparse,
        )


@modules.register(nn.LayerNorm)
class QLayerNorm(QModuleMixin, nn.LayerNorm):
    """nn.LayerNorm whose output is quantized; its weight stays float."""

    @classmethod
    def qcreate(
        cls,
        module: nn.LayerNorm,
        weights: qtype | None,
        activations: qtype | None = None,
        optimizer: Optimizer | None = None,
        device: torch.device | None = None,
    ) -> QLayerNorm | None:
        if activations is None:
            return None
        return cls(
            module.normalized_shape,
            module.eps,
            module.elementwise_affine,
            module.bias is not None,
            dtype=None if module.weight is None else module.weight.dtype,
            device=device,
            activations=activations,
        )


class TransposedLinear(nn.Module):
    """``x @ W + b`` with W [in, out], as Transformers' Conv1D computes it."""

    def __init__(
        self, nf: int, nx: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.empty(nx, nf, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(nf, device=device, dtype=dtype))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(input, self.weight.t(), self.bias)

    def extra_repr(self) -> str:
        return f"nf={self.nf}, nx={self.nx}"


@modules.register("transformers.pytorch_utils.Conv1D")
class QTransposedLinear(QModuleMixin, TransposedLinear):
    """GPT-2's Conv1D: a linear layer whose weight is [in, out]."""

    transposed_weight = True
    fuses_input = True

    @classmethod
    def qcreate(
        cls,
        module: Any,
        weights: qtype | None,
        activations: qtype | None = None,
        optimizer: Optimizer | None = None,
        device: torch.device | None = None,
    ) -> QTransposedLinear:
        return cls(
            module.nf,
            module.nx,
            dtype=module.weight.dtype,
            device=device,
            weights=weights,
            activations=activations,
            optimizer=optimizer,
            quantize_input=True,
        )

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _linear(self, input, self.qweight)
