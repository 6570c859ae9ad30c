"""Group sizes: how many adjacent weights of a row share one scale.

A group size that does not divide the row length K is halved until it does, down to 8; if none does, the row is one group
(one scale per row). A changed group size is logged.
"""

from __future__ import annotations

import logging

from requanto.dtypes.qtypes import qtype

logger = logging.getLogger(__name__)

#: Smallest group size from halving: in smaller groups the scales would take more memory than the codes.
SMALLEST_GROUP = 8


def default_group_size(kind: qtype) -> int | None:
    """The default group size: 64 for 4 to 7 bits, 32 below, None (one scale per row) for 8 bits; 16 in NVFP4, 32 in MX."""
    if kind.blocks is not None:
        return kind.blocks.size
    if kind.bits == 8:
        return None
    return 64 if kind.bits >= 4 else 32


def fit_group_size(wanted: int | None, length: int, name: str = "weight") -> int | None:
    """The group size for rows of ``length`` weights if the user asks for ``wanted``.

    Returns:
        A divisor of ``length``, or None for one scale per row.

    Raises:
        ValueError: ``wanted`` is not a positive integer.
    """
    if wanted is None or wanted == -1:
        return None
    if not isinstance(wanted, int) or isinstance(wanted, bool) or wanted < 1:
        raise ValueError(f"group_size must be a positive integer, or None for one scale a row; found {wanted!r}")
    if wanted == length:
        return None
    group = wanted
    while group > SMALLEST_GROUP and (length % group or group > length):
        group //= 2
    fits = group <= length and length % group == 0
    fitted = (group if group < length else None) if fits else None
    if fitted != wanted:
        got = "one scale a row" if fitted is None else f"group size {fitted}"
        logger.info("%s: group size %d does not divide its row length %d, using %s", name, wanted, length, got)
    return fitted
