"""Requanto: quantized weights for Transformers and Diffusers."""

from requanto import integrations as _integrations
from requanto import ops as _ops  # noqa: F401  (fills the operator tables of QTensor)
from requanto.config import QuantoConfig
from requanto.qtensor import QTensor
from requanto.qtypes import qfloat8, qfloat8_e4m3fn, qfloat8_e4m3fnuz, qfloat8_e5m2, qint2, qint4, qint8, qtype, qtypes

__version__ = "0.1.0"

__all__ = [
    "QTensor",
    "QuantoConfig",
    "qfloat8",
    "qfloat8_e4m3fn",
    "qfloat8_e4m3fnuz",
    "qfloat8_e5m2",
    "qint2",
    "qint4",
    "qint8",
    "qtype",
    "qtypes",
]

_integrations.install()
