"""The address under which pickles name QTensor and what rebuilds it."""

from requanto.tensor.qtensor import QTensor, _rebuild, _rebuild_qtensor

__all__ = ["QTensor", "_rebuild", "_rebuild_qtensor"]
