"""CPU kernels in C++: one library for all versions of Python and torch, which this package finds or builds, and loads.

``library()`` has the functions of csrc/requanto_cpu.h; `interface` has their structs and constants. ``python -m
requanto_cpu`` builds it beforehand.
"""

from requanto_cpu.load import build_all, check, level, levels, library, path, set_level
from requanto_cpu.trust import LibraryUnavailable

__all__ = ["LibraryUnavailable", "build_all", "check", "level", "levels", "library", "path", "set_level"]
