"""Quantized modules, for float weights in training and for quantized activations; a QTensor alone needs no module."""

from requanto.nn.activation import QActivation, quantize_activation
from requanto.nn.mixin import QModuleMixin
from requanto.nn.modules import (
    QConv1d,
    QConv2d,
    QConv3d,
    QConvTranspose2d,
    QEmbedding,
    QLayerNorm,
    QLinear,
    QTransposedLinear,
)
from requanto.nn.registry import register_qmodule

__all__ = [
    "QActivation",
    "QConv1d",
    "QConv2d",
    "QConv3d",
    "QConvTranspose2d",
    "QEmbedding",
    "QLayerNorm",
    "QLinear",
    "QModuleMixin",
    "QTransposedLinear",
    "quantize_activation",
    "register_qmodule",
]
