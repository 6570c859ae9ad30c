"""Forks beside other threads: a child must not wait for a lock that no thread of it will ever release.

Each lock of Requanto is new in a child (`new_in_child`). Python's own locks of modules are not: a fork while another thread
imports a module leaves it locked in the child. torch imports `torch.distributed.tensor` at the first operator on any tensor
subclass, which takes up to a second; so a fork waits until such an import has ended.
"""

from __future__ import annotations

import importlib
import os
import threading
import time
from typing import Any

#: Most seconds that a fork waits for imports of other threads.
LIMIT = 30.0
#: Packages whose modules are imported at their first use, by torch or by Requanto.
PACKAGES = {
    *("filelock", "mpmath", "numpy", "requanto", "requanto_cpu", "requanto_kernels", "safetensors", "sympy", "torch"),
    "triton",
}


def new_in_child(lock: Any) -> Any:
    """The lock, which is released in the child of any later fork.

    Args:
        lock: a `threading.Lock` or `threading.RLock` that lives as long as the process.
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lock._at_fork_reinit)
    return lock


def _wait_for_imports() -> None:
    if threading.active_count() == 1:
        return
    until = time.monotonic() + LIMIT
    while _importing() and time.monotonic() < until:
        time.sleep(0.005)


def _importing() -> bool:
    """True while another thread imports a module of `PACKAGES`."""
    me = threading.get_ident()
    for name, reference in list(getattr(importlib._bootstrap, "_module_locks", {}).items()):  # type: ignore[attr-defined]
        owner = getattr(reference(), "owner", None)
        if owner not in (None, me) and name.partition(".")[0] in PACKAGES:
            return True
    return False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_wait_for_imports)
