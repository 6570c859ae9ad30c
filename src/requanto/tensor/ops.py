"""What may be done with a QTensor: two tables, one of torch functions and one of aten operators.

`functions.py` and `aliases.py` hold torch-level ones (GEMMs, which run on codes; memory), `aten.py` the rest (copies, moves,
views). What is in neither raises: a QTensor is never dequantized behind the user's back.
"""

from requanto.tensor import aliases, aten, distributed, functions, merge  # noqa: F401  (fill the tables)
from requanto.tensor.dispatch import torch_dispatch, torch_function

__all__ = ["torch_dispatch", "torch_function"]
