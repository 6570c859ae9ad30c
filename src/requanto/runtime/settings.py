"""Settings of the process: few, and none that changes a result.

requanto.settings.workspace_bytes = 256 * 2**20
"""

from __future__ import annotations

import os
from dataclasses import dataclass


def compiled_from(text: str) -> bool | None:
    """What REQUANTO_COMPILE stands for.

    Raises:
        ValueError: neither 1, 0 nor nothing.
    """
    known = {"": None, "0": False, "1": True}
    if text not in known:
        raise ValueError(
            f"REQUANTO_COMPILE is {text!r}, expected 1 (compiled CPU kernels, or an error), 0 (none of them) or nothing "
            "(where there is a C++ compiler)"
        )
    return known[text]


class Choices:
    """What choices of implementations are made under.

    Attributes:
        version: a number for the settings, the table's entries and the failures at the time; the same when they are again.
    """

    def __init__(self) -> None:
        self.version = 0
        self._seen: dict[tuple[object, ...], int] = {}
        self._settings: tuple[object, ...] = ()
        self._events = 0

    def changed(self, settings: tuple[object, ...] | None = None) -> None:
        """Choices made so far may be other ones now: an implementation more, kernels that could not be made, settings."""
        if settings is None:
            self._events += 1
        else:
            self._settings = settings
        self.version = self._seen.setdefault((self._events, *self._settings), len(self._seen) + 1)


choices = Choices()


@dataclass
class Settings:
    """What may be set, by attribute, at any time.

    Attributes:
        workspace_bytes: the most memory that one thread keeps to dequantize weights into
            (environment: REQUANTO_WORKSPACE_MB; 64 MB unless set).
        pack_on_first_use: on a CPU, reorder the codes of a layer for its kernel at the first product. The reordered
            form replaces the stored one, and the stored one comes back when it is asked for.
            (environment: REQUANTO_PACK=0 turns it off; `requanto.prepare(model)` packs all the same.)
        compiled: on a CPU, use kernels that torch's compiler makes where they are faster: for int8, float8 (e4m3), int4,
            int3 and int2 with many rows, and convolutions, mostly in bfloat16. Their first use on a machine takes half a
            minute and a C++ compiler, then they lie in a file (`cpu.aot.cache`). None: where there is a compiler,
            and if they cannot be made, eager operators and a line in the log; True: an error then; False: never.
            (environment: REQUANTO_COMPILE=1 or 0; None unless set)
    """

    workspace_bytes: int = int(float(os.environ.get("REQUANTO_WORKSPACE_MB", "64")) * 2**20)
    pack_on_first_use: bool = os.environ.get("REQUANTO_PACK", "1") != "0"
    compiled: bool | None = compiled_from(os.environ.get("REQUANTO_COMPILE", ""))

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        choices.changed(tuple(self.__dict__.values()))


settings = Settings()
