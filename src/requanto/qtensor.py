"""The address under which pickles name QTensor and what rebuilds it."""

from requanto.tensor.qtensor import QTensor
from requanto.tensor.rebuild import _rebuild, _rebuild_qtensor

__all__ = ["QTensor", "_rebuild", "_rebuild_qtensor"]
