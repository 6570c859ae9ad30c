"""Nodes of an ONNX graph that stand for operators on quantized weights, while `requanto.integrations.onnx` exports a model.

Operators on a QTensor become one node each, with the weight's parts as inputs. The integration replaces them by operators
of ONNX once the values of the parts are known.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence

import torch

#: Domain of the nodes. None is left in an exported model.
DOMAIN = "requanto"
_local = threading.local()


@contextlib.contextmanager
def exports() -> Iterator[None]:
    """While it is open, operators on quantized weights that this thread traces become nodes."""
    _local.exports = getattr(_local, "exports", 0) + 1
    try:
        yield
    finally:
        _local.exports -= 1


def exporting() -> bool:
    """True while `exports` is open in this thread. Only traced operators may become nodes: check `is_tracing` first."""
    return getattr(_local, "exports", 0) > 0


def check_wrapped() -> None:
    """Raises an error while torch.onnx exports, but by a function that was taken from torch before Requanto wrapped it.

    Raises:
        RuntimeError: see above.
    """
    if torch.onnx.is_in_onnx_export() and not exporting():
        raise RuntimeError(
            "this torch.onnx.export does not know quantized weights: it was imported by name before requanto. Import "
            "requanto first, or call it as torch.onnx.export."
        )


def node(
    name: str,
    inputs: Sequence[torch.Tensor | None],
    attributes: Mapping[str, int | str | list[int]],
    like: torch.Tensor,
    shape: Sequence[int | torch.SymInt],
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """A node of the graph that is being traced.

    Args:
        name: name of the operator in `DOMAIN`.
        like: the result's dtype (unless ``dtype`` is given) and device are those of this tensor.
        shape: the result's shape.
    """
    found = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{name}", inputs, dict(attributes), dtype=dtype or like.dtype, shape=shape, version=1
    )
    return found.to(like.device)
