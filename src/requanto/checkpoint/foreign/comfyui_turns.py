"""Codes of ConvRot's rotation as those of ours: columns with sign -1 are negated (`regular_hadamard`).

The least code, -2^(bits - 1), has no negative. Where a row holds it in such a column, the row is negated instead, and its
scale too; where it holds it in columns of both signs, it has no place in our form.
"""

from __future__ import annotations

import torch

from requanto.checkpoint.foreign.pieces import per_row
from requanto.checkpoint.foreign.regular_hadamard import regular_matrix
from requanto.checkpoint.foreign.source import Source
from requanto.checkpoint.format import CheckpointError


def is_turnable(codes: torch.Tensor, signs: torch.Tensor) -> bool:
    """Whether `turned` has a result for int8 codes ``[N, K]``."""
    plus, minus = _least(codes, signs, -128)
    return not bool((plus & minus).any())


def turned(codes: torch.Tensor, signs: torch.Tensor, low: int, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Signed codes in the columns of our rotation.

    Args:
        codes: int8 ``[N, K]``.
        signs: ``[K]``, of `regular_hadamard.column_signs`.
        low: the least code.
        name: the tensor, for messages.

    Returns:
        codes, and signs of the rows' scales ``[N, 1]``.

    Raises:
        CheckpointError: a row holds the least code in columns of both signs.
    """
    plus, minus = _least(codes, signs, low)
    if bool((plus & minus).any()):
        raise CheckpointError(
            f"{name} holds the code {low} several times in a row of a rotated weight, which ComfyUI does not write: the "
            f"checkpoint is damaged, or another program wrote it"
        )
    rows = torch.where(minus, -1.0, 1.0).unsqueeze(-1)
    return torch.where(signs * rows < 0, -codes, codes), rows


def _least(codes: torch.Tensor, signs: torch.Tensor, low: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows with the least code in a column with sign 1, and with sign -1."""
    least = codes == low
    return (least & (signs > 0)).any(-1), (least & (signs < 0)).any(-1)


def turned_values(names: tuple[str, str], rows: int, block: int, source: Source) -> torch.Tensor:
    """The float weight of rotated int8 codes, bfloat16."""
    values = source[names[0]].float() * per_row(source[names[1]].float(), (rows,))
    found = values.unflatten(-1, (-1, block)) @ regular_matrix(block).to(values)
    if not bool(torch.isfinite(found).all()):
        raise CheckpointError(f"{names[1]} holds NaN or Inf: the checkpoint is damaged, download it again")
    return found.flatten(-2).to(torch.bfloat16)
