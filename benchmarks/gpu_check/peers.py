"""Other libraries' layers, for comparison: what is not installed, or fails, costs its own rows only."""

from __future__ import annotations

from collections.abc import Callable

import torch

#: Operations of each peer, by the name that Requanto's have in `cases.py`. Each is a case of its own.
OPS: dict[str, tuple[str, ...]] = {}

Layer = Callable[[torch.Tensor], torch.Tensor]


def missing(name: str) -> str:
    """Why a peer cannot be compared: it is not installed, or its import fails; empty if it can."""
    return f"{name} is not a peer"


def ops(name: str, n: int, k: int, device: str, weight: torch.Tensor | None = None) -> dict[str, Layer]:
    """The peer's layers for one shape, without a bias, by operation: those of ``OPS[name]``, all of them.

    Args:
        name: a key of `OPS`.
        n, k: rows and columns of the weight; x is bf16 ``[M, K]``, the result bf16 ``[M, N]``.
        device: ``"cuda"``; ``"cpu"`` in a dry run.
        weight: bf16 ``[n, k]`` on the device, which the peer quantizes; None: a random one. It is not changed.

    Returns:
        One function for each operation. Of an operation that cannot be made, a function that raises the reason: the other
        operations are not affected.
    """
    raise ValueError(f"found {name!r}, expected one of {', '.join(OPS)}")
