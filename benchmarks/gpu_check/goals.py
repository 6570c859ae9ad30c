"""The goals: ratio to cuBLAS bf16 in the same run, and whether rows reach them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
FEW, MANY = (4096, 14336), (28672, 8192)


@dataclass(frozen=True)
class Goal:
    """A ratio to bf16 that a case should reach, and one that would be a leap."""

    goal: float
    moonshot: float

    def verdict(self, ratio: float) -> str:
        """``"MOON"``, ``"goal"`` or ``"below"``."""
        return "MOON" if ratio >= self.moonshot else "goal" if ratio >= self.goal else "below"


_FOUR = {
    (1, FEW): Goal(2.6, 3.5),
    (1, MANY): Goal(3.1, 3.6),
    16: Goal(2.5, 3.2),
    128: Goal(1.4, 1.8),
    4096: Goal(0.9, 0.98),
}
_EIGHT = {
    (1, FEW): Goal(1.6, 1.9),
    (1, MANY): Goal(1.8, 1.95),
    16: Goal(1.6, 1.9),
    128: Goal(1.2, 1.4),
    4096: Goal(0.9, 0.98),
}
#: By kind, then by (M, shape) or by M for every shape.
PRODUCTS: dict[str, dict[Any, Goal]] = {
    "int4 g128": _FOUR,
    "int4 g64 affine": _FOUR,
    "int8": _EIGHT,
    "float8": _EIGHT,
    "float8 x float8": {16: Goal(1.2, 1.6), 128: Goal(1.3, 1.6), 4096: Goal(1.45, 1.7)},
    "int8 x int8": {16: Goal(1.2, 1.6), 128: Goal(1.3, 1.6), 4096: Goal(1.5, 1.75)},
}
_WEIGHT_ONLY = {
    "decode compiled": Goal(2.0, 2.6), "decode eager": Goal(1.0, 1.5),
    "prefill eager": Goal(0.9, 1.0), "prefill graph": Goal(0.9, 1.0),
}  # fmt: skip
_BOTH = {"prefill eager": Goal(1.35, 1.6), "prefill graph": Goal(1.35, 1.6), "prefill compiled": Goal(1.35, 1.6)}
#: By kind, then by step and mode, of the 8B-shaped model.
MODELS: dict[str, dict[str, Goal]] = {
    "int4 g128": _WEIGHT_ONLY,
    "int4 g128 joined": _WEIGHT_ONLY,
    "int4 g64 affine": _WEIGHT_ONLY,
    "int8": {name: goal for name, goal in _WEIGHT_ONLY.items() if "prefill" in name},
    "float8 x float8": _BOTH,
    "int8 x int8": _BOTH,
}


def goal_of(row: Row) -> Goal | None:
    """The goal of a row, if it has one."""
    if row["stage"] == "models" and row["family"] == "llama-8b":
        return MODELS.get(row["kind"], {}).get(row["op"])
    if row["stage"] != "goals" or row["op"] != "layer":
        return None
    known = PRODUCTS.get(row["kind"], {})
    return known.get((row["m"], (row["n"], row["k"])), known.get(row["m"]))


def verdict(row: Row, ratio: float | None) -> str:
    """``"MOON"``, ``"goal"``, ``"below"``, ``"FAULT"`` (whatever its speed), or nothing where no goal is set."""
    if row.get("fault"):
        return "FAULT"
    goal = goal_of(row)
    return "" if goal is None or ratio is None or row.get("dry") else goal.verdict(ratio)
