"""The address under which pickles of earlier versions name QTensor and what rebuilds it."""

from requanto.tensor.qtensor import QTensor, _rebuild_qtensor

__all__ = ["QTensor", "_rebuild_qtensor"]
