"""Rotations by powers of a 4 x 4 Hadamard matrix with one -1 in each row, as those of our format.

SDNQ and ComfyUI (ConvRot) rotate rows by blocks of G = F (x) F (x) ... / sqrt(size), F = [[1, 1, 1, -1], [1, 1, -1, 1],
[1, -1, 1, 1], [-1, 1, 1, 1]]. With Sylvester's H of the same size, D the signs that are -1 for indices with an odd number of
digits 3 in base 4, and P the exchange of the digits 1 and 2,

    G = D P H D = D H P D

So codes C with the weight C G are those of (C D) H, with the signs D and the order P of columns: where codes of both signs
exist for each number, ``signed``, ``columns`` and ``order`` of our format hold them exactly.
"""

from __future__ import annotations

import functools
import math

import torch

from requanto.checkpoint.format import CheckpointError


def is_regular(block: int) -> bool:
    """Whether a block has a size for which there is such a matrix: a power of 4."""
    return block >= 4 and block & (block - 1) == 0 and block.bit_length() % 2 == 1


def regular_matrix(block: int) -> torch.Tensor:
    """G, float32 ``[block, block]``."""
    four = [[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]
    return _power(four, block)


def sylvester_matrix(block: int) -> torch.Tensor:
    """H, float32 ``[block, block]``."""
    return _power([[1, 1], [1, -1]], block)


def _power(small: list[list[int]], block: int) -> torch.Tensor:
    found = seed = torch.tensor(small, dtype=torch.float32, device="cpu")
    while found.shape[0] < block:
        found = torch.kron(found, seed)
    return found / math.sqrt(block)


@functools.lru_cache(maxsize=16)
def _digits(block: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """D and P of a block: signs, and the index of each column."""
    signs, order = [1], [0]
    while len(signs) < block:
        signs = [sign * one for one in (1, 1, 1, -1) for sign in signs]
        order = [place + digit * len(order) for digit in (0, 2, 1, 3) for place in order]
    return tuple(signs), tuple(order)


def column_signs(length: int, block: int, device: torch.device) -> torch.Tensor:
    """D for rows of ``length``: float32 1 and -1, ``[length]``."""
    signs = torch.tensor(_digits(block)[0], dtype=torch.float32, device=device)
    return signs.repeat(length // block)


def column_order(length: int, block: int, device: torch.device) -> torch.Tensor:
    """P for rows of ``length``: int32 ``[length]``, which column of the weight each rotated column is."""
    order = torch.tensor(_digits(block)[1], dtype=torch.int32, device=device)
    starts = torch.arange(0, length, block, dtype=torch.int32, device=device)
    return (order + starts.unsqueeze(-1)).reshape(-1)


def negated(codes: torch.Tensor, signs: torch.Tensor, low: int, name: str) -> torch.Tensor:
    """Signed whole codes ``[N, K]``, those of columns with sign -1 negated.

    Args:
        codes: int8.
        signs: ``[K]``.
        low: the least code, which has no negative.
        name: the tensor, for messages.

    Raises:
        CheckpointError: a code to be negated is the least one.
    """
    found = torch.where(signs < 0, -codes, codes)
    if bool(((codes == low) & (signs < 0)).any()):
        raise CheckpointError(
            f"{name} holds the code {low} in a rotated weight, which no program writes: the checkpoint is damaged, "
            f"or another program wrote it"
        )
    return found
