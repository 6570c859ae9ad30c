"""Requanto: quantized weights for Transformers and Diffusers.

``import requanto`` is all that `from_pretrained` needs; everything else here is for models of your own.
"""

from typing import Any

from requanto import integrations as _integrations
from requanto.checkpoint.format import CheckpointError
from requanto.config.config import QuantoConfig
from requanto.dtypes.qtypes import (
    qcodebook2,
    qcodebook3,
    qcodebook4,
    qfloat8,
    qfloat8_e4m3fn,
    qfloat8_e4m3fnuz,
    qfloat8_e5m2,
    qfp4,
    qint2,
    qint3,
    qint4,
    qint5,
    qint6,
    qint7,
    qint8,
    qnf2,
    qnf3,
    qnf4,
    qtype,
    qtypes,
    quint1,
    quint2,
    quint3,
    quint4,
    quint5,
    quint6,
    quint7,
    quint8,
)
from requanto.integrations.optimum_quanto.install import install_as_optimum_quanto
from requanto.linear import functions as _functions  # noqa: F401  (registers QTensor's GEMMs)
from requanto.linear.explain import explain
from requanto.linear.prepack import prepare, unpack
from requanto.model.calibrate import Calibration
from requanto.model.join import join_layers, separate_layers
from requanto.model.quantize import freeze, quantization_map, quantize, quantize_module
from requanto.model.requantize import requantize
from requanto.nn import (
    QConv1d,
    QConv2d,
    QConv3d,
    QConvTranspose2d,
    QEmbedding,
    QLayerNorm,
    QLinear,
    QModuleMixin,
    register_qmodule,
)
from requanto.report.inspect import inspect_directory, inspect_model
from requanto.runtime.settings import settings
from requanto.scales.observers import MseObserver, PercentileObserver, absmax_scale
from requanto.scales.optimizers import (
    AbsmaxOptimizer,
    AffineOptimizer,
    HqqOptimizer,
    MaxOptimizer,
    Optimizer,
    SymmetricOptimizer,
)
from requanto.tensor import ops as _ops  # noqa: F401  (registers the operators of QTensor)
from requanto.tensor.lowrank import fold_lowrank
from requanto.tensor.qtensor import QTensor

__version__ = "0.1.0"

# Importing these, and the caches below, imports Transformers or Diffusers, so `__getattr__` does it on first use.
_WRAPPERS = (
    "QuantizedDiffusersModel",
    "QuantizedModelForCausalLM",
    "QuantizedPixArtTransformer2DModel",
    "QuantizedTransformersModel",
)
_CACHES = ("QuantizedCache", "StaticQuantizedCache")

__all__ = [
    "AbsmaxOptimizer",
    "AffineOptimizer",
    "Calibration",
    "CheckpointError",
    "HqqOptimizer",
    "MaxOptimizer",
    "MseObserver",
    "Optimizer",
    "PercentileObserver",
    "QConv1d",
    "QConv2d",
    "QConv3d",
    "QConvTranspose2d",
    "QEmbedding",
    "QLayerNorm",
    "QLinear",
    "QModuleMixin",
    "QTensor",
    "QuantoConfig",
    "SymmetricOptimizer",
    "absmax_scale",
    "explain",
    "fold_lowrank",
    "freeze",
    "inspect_directory",
    "inspect_model",
    "install_as_optimum_quanto",
    "join_layers",
    "prepare",
    "qcodebook2",
    "qcodebook3",
    "qcodebook4",
    "qfloat8",
    "qfloat8_e4m3fn",
    "qfloat8_e4m3fnuz",
    "qfloat8_e5m2",
    "qfp4",
    "qint2",
    "qint3",
    "qint4",
    "qint5",
    "qint6",
    "qint7",
    "qint8",
    "qnf2",
    "qnf3",
    "qnf4",
    "qtype",
    "qtypes",
    "quantization_map",
    "quantize",
    "quantize_module",
    "quint1",
    "quint2",
    "quint3",
    "quint4",
    "quint5",
    "quint6",
    "quint7",
    "quint8",
    "register_qmodule",
    "requantize",
    "separate_layers",
    "settings",
    "unpack",
]


def __getattr__(name: str) -> Any:
    if name in _WRAPPERS:
        from requanto.integrations.optimum_quanto import models

        return getattr(models, name)
    if name in _CACHES:
        from requanto.integrations import transformers_cache

        return getattr(transformers_cache, name)
    if not name.startswith("_"):
        # The other public names of optimum-quanto: tensor classes and helpers.
        from requanto.integrations import optimum_quanto

        if name in optimum_quanto.__all__:
            return getattr(optimum_quanto, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_WRAPPERS, *_CACHES])


_integrations.install()
