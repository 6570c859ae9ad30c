"""What may be done with a QTensor: two tables, one of torch functions and one of aten operators.

`functions.py` holds the torch-level ones (products, which run on codes), `aten.py` the rest (copies, moves, views). What
is in neither raises: a QTensor is never dequantized behind the user's back.
"""

from requanto.dispatch import torch_dispatch, torch_function  # isort: skip
from requanto.ops import aten, distributed, functions, merge  # noqa: F401  (fill the tables)

__all__ = ["torch_dispatch", "torch_function"]
