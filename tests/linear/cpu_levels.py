"""Which instruction sets the CPU kernels were tested on in a run: one closing line, and why others were not.

A test says what it ran with ``record_property(PROPERTY, "avx2")``; what it could not run with ``record_property(MISSING,
"neon: qemu-aarch64 is not installed")`` before it skips.
"""

from __future__ import annotations

from collections import Counter

PROPERTY, MISSING = "cpu level", "cpu level missing"


class Levels:
    """A pytest plugin; with xdist it is the controller's that sees the reports of all workers."""

    def __init__(self) -> None:
        self.ran: Counter[str] = Counter()
        self.missing: dict[str, str] = {}

    def pytest_runtest_logreport(self, report) -> None:
        if report.when != "teardown":
            return
        for name, value in report.user_properties:
            if name == PROPERTY:
                self.ran[value] += 1
            elif name == MISSING:
                level, _, why = value.partition(": ")
                self.missing[level] = why

    def pytest_terminal_summary(self, terminalreporter) -> None:
        if self.ran or self.missing:
            terminalreporter.write_line(self.line())

    def line(self) -> str:
        """ "CPU kernels: avx2, vnni run; amx: this processor has none"."""
        try:
            import requanto_cpu
            from requanto_cpu.load import NAMES, TORCH

            requanto_cpu.library()
        except (ImportError, requanto_cpu.LibraryUnavailable, ValueError) as error:
            return f"CPU kernels: none run: {error}"
        here, built = requanto_cpu.levels(), requanto_cpu.library().rq_built().decode().split(",")
        left = dict(self.missing)
        for name in NAMES:
            if name == TORCH or any(one.split()[0] == name for one in (*self.ran, *left)):
                continue
            if name in here:
                left[name] = "no test of it was selected"
            elif name in built:
                left[name] = "this processor has none"
            else:
                left[name] = "not built for this processor, or by this compiler"
        same: dict[str, list[str]] = {}
        for name, why in left.items():
            same.setdefault(why, []).append(name)
        ran = [f"{', '.join(self.ran) or 'none'} run"]
        return "CPU kernels: " + "; ".join(ran + [f"{', '.join(names)}: {why}" for why, names in same.items()])
