"""The warning that few bits without samples cost much."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from requanto.dtypes.qtypes import qtype, short_name

logger = logging.getLogger(__name__)

#: from this many bits on, a type is used without samples without a warning
ENOUGH_BITS = 4

#: what this process has warned of: names of types, and "auto"
_said: set[str] = set()


def warn_few_bits(kinds: Iterable[qtype | None]) -> None:
    """Warns, once a process for each type, that weights of fewer than `ENOUGH_BITS` bits are made without samples.

    Args:
        kinds: types that weights are about to be quantized to without samples; None: a weight stays float.
    """
    for name in sorted({short_name(kind) for kind in kinds if kind is not None and kind.bits < ENOUGH_BITS} - _said):
        _said.add(name)
        logger.warning("%s weights without samples: %s", name, _advice(f"weights={name!r}", f"--weights {name}"))


def warn_few_bits_of_budget(bits: float) -> None:
    """Does the same, once a process, for a budget of ``bits`` a weight whose types were chosen without samples."""
    if bits < ENOUGH_BITS and "auto" not in _said:
        _said.add("auto")
        short = f"{bits:.3g}"
        advice = _advice(f"weights='auto', bits={short}", f"--weights auto --bits {short}")
        logger.warning("%s bits a weight without samples: %s", short, advice)


def _advice(python: str, command: str) -> str:
    return (
        f"with fewer than {ENOUGH_BITS} bits, codes and scales found from the weights alone cost a language model much of "
        f"its quality (figures: docs/accuracy.md, 'Below 4 bits'). Give samples of what the model reads: "
        f"requanto.quantize(model, {python}, method='gptq', calibration=samples), or on the command line requanto quantize "
        f"{command} --method gptq; or train the quantized model (docs/training.md); or take {ENOUGH_BITS} bits or more."
    )
