"""optimum-quanto's public names, implemented by Requanto: ``import optimum.quanto`` returns them after
:func:`requanto.install_as_optimum_quanto`."""

from __future__ import annotations

from typing import Any

from requanto.dtypes.qtypes import (
    qfloat8,
    qfloat8_e4m3fn,
    qfloat8_e4m3fnuz,
    qfloat8_e5m2,
    qint2,
    qint4,
    qint8,
    qtype,
    qtypes,
)
from requanto.integrations.optimum_quanto.activations import ActivationQBytesTensor, quantize_activation
from requanto.integrations.optimum_quanto.base import PackedTensor, QBitsTensor, QBytesTensor, QTensor, qfallback
from requanto.integrations.optimum_quanto.library import (
    axis_to_dim,
    dtype_info,
    get_extension,
    is_diffusers_available,
    is_extension_available,
    is_transformers_available,
)
from requanto.integrations.optimum_quanto.modules import (
    Calibration,
    QConv2d,
    QLayerNorm,
    QLinear,
    QModuleMixin,
    quantize_module,
    register_qmodule,
)
from requanto.integrations.optimum_quanto.quantize import freeze, quantization_map, quantize, requantize
from requanto.integrations.optimum_quanto.weights import WeightQBitsTensor, WeightQBytesTensor, quantize_weight
from requanto.scales.observers import absmax_scale
from requanto.scales.optimizers import (
    AbsmaxOptimizer,
    AffineOptimizer,
    HqqOptimizer,
    MaxOptimizer,
    Optimizer,
    SymmetricOptimizer,
)
from requanto.scales.quanto import group, grouped_shape, ungroup

#: the version of optimum-quanto whose names and behaviour are reproduced
__version__ = "0.2.7"

WRAPPERS = (
    "QuantizedDiffusersModel",
    "QuantizedModelForCausalLM",
    "QuantizedPixArtTransformer2DModel",
    "QuantizedTransformersModel",
)

__all__ = [
    "AbsmaxOptimizer",
    "ActivationQBytesTensor",
    "AffineOptimizer",
    "Calibration",
    "HqqOptimizer",
    "MaxOptimizer",
    "Optimizer",
    "PackedTensor",
    "QBitsTensor",
    "QBytesTensor",
    "QConv2d",
    "QLayerNorm",
    "QLinear",
    "QModuleMixin",
    "QTensor",
    "SymmetricOptimizer",
    "WeightQBitsTensor",
    "WeightQBytesTensor",
    "absmax_scale",
    "axis_to_dim",
    "dtype_info",
    "freeze",
    "get_extension",
    "group",
    "grouped_shape",
    "is_diffusers_available",
    "is_extension_available",
    "is_transformers_available",
    "qfallback",
    "qfloat8",
    "qfloat8_e4m3fn",
    "qfloat8_e4m3fnuz",
    "qfloat8_e5m2",
    "qint2",
    "qint4",
    "qint8",
    "qtype",
    "qtypes",
    "quantization_map",
    "quantize",
    "quantize_activation",
    "quantize_module",
    "quantize_weight",
    "register_qmodule",
    "requantize",
    "ungroup",
]


def __getattr__(name: str) -> Any:
    if name in WRAPPERS:
        from requanto.integrations.optimum_quanto import wrappers

        return getattr(wrappers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
