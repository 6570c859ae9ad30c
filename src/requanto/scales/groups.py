"""Group sizes: how many neighbouring weights of a row share one scale.

The rule when the wished group does not divide the row length K: halve it until it divides, down to 8; a row that no such
group divides is one group (a scale per row). The outcome is logged where it differs from the wish.
"""

from __future__ import annotations

import logging

from requanto.dtypes.qtypes import qtype

logger = logging.getLogger(__name__)

#: Smallest group the halving rule arrives at: below it the scales outweigh the codes.
SMALLEST_GROUP = 8


def default_group_size(kind: qtype) -> int | None:
    """Group size used when the user names none: 64 for 4 to 7 bits, 32 below, per row (None) for 8 bits."""
    if kind.bits == 8:
        return None
    return 64 if kind.bits >= 4 else 32


def fit_group_size(wanted: int | None, length: int, name: str = "weight") -> int | None:
    """The group size that a row of ``length`` weights gets when ``wanted`` is asked for.

    Returns:
        A divisor of ``length``, or None: one scale for the row.

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
