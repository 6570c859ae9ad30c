"""CPU kernels in C++: one library for all versions of Python and torch, which this package finds or builds, and loads.

``library()`` has the functions of csrc/requanto_cpu.h; `interface` has their structs and constants.
"""

from requanto_cpu.library import LibraryUnavailable, check, level, levels, library, set_level

__all__ = ["LibraryUnavailable", "check", "level", "levels", "library", "set_level"]
