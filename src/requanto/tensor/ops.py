"""The operators on QTensor, in two registries: torch functions and aten operators.

`requanto.linear.functions` and `aliases.py` implement torch functions (GEMMs on codes; memory), `aten.py` aten operators
(copies, moves, views). Any other operator that reads runs on the dequantized values, with a log line (`values.py`); one that
writes raises.
"""

from requanto.tensor import aliases, aten, distributed, joining, merge, rebuild, scaling  # noqa: F401  (register operators)
from requanto.tensor.dispatch import torch_dispatch, torch_function

__all__ = ["torch_dispatch", "torch_function"]
