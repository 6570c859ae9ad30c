"""The plot: how many times as fast as bf16, by rows and shape; and whole models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def plot(path: Path, rows: Sequence[Row]) -> str:
    """Draws one panel for each shape and one for models; returns a message, also where matplotlib is missing."""
    from gpu_check.report import is_right, model_ratio, of, ratio_of

    own = [row for row in of(rows, stage="goals", op="layer") if ratio_of(row)]
    shapes = list(dict.fromkeys((row["n"], row["k"]) for row in own))
    models = [row for row in of(rows, stage="models") if row["kind"] != "bf16" and model_ratio(row, rows)]
    if not shapes and not models:
        return "no plot: no rows for it"
    try:
        import matplotlib
    except ImportError:
        return "no plot: matplotlib is not installed"
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    count = len(shapes) + bool(models)
    figure, axes = plt.subplots(1, count, figsize=(5.6 * count, 6.2), squeeze=False, layout="constrained")
    for axis, (n, k) in zip(axes[0], shapes):
        here = [row for row in rows if (row.get("n"), row.get("k")) == (n, k) and is_right(row) and ratio_of(row)]
        own = of(here, stage="goals", op="layer")
        for number, kind in enumerate(dict.fromkeys(row["kind"] for row in own)):
            _line(axis, of(own, kind=kind), kind, color=f"C{number}", marker="o")
            for peer in dict.fromkeys(row["family"] for row in of(here, stage="peers", kind=kind)):
                points = of(here, stage="peers", kind=kind, family=peer)
                _line(axis, points, f"{peer}: {kind}", color=f"C{number}", linestyle=":", marker="x", linewidth=1)
        axis.set(title=f"{n} x {k}", xlabel="M (rows)", ylabel="times as fast as bf16")
        axis.set_xscale("log", base=2)
        ms = sorted({row["m"] for row in own})
        axis.set_xticks(ms, map(str, ms))
        axis.axhline(1.0, color="gray", linewidth=0.8)
        axis.legend(fontsize="x-small", ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    if models:
        _bars(axes[0][-1], models, rows)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return f"wrote {path}"


def _line(axis: Any, rows: Sequence[Row], label: str, **style: Any) -> None:
    from gpu_check.report import ratio_of

    points = sorted((row["m"], ratio_of(row)) for row in rows)
    axis.plot([m for m, _ in points], [ratio for _, ratio in points], label=label, **style)


def _bars(axis: Any, models: Sequence[Row], rows: Sequence[Row]) -> None:
    """One group of bars for each step, one bar for each kind."""
    from gpu_check.report import model_ratio, of

    steps = list(dict.fromkeys((row["family"], row["op"]) for row in models))
    kinds = list(dict.fromkeys(row["kind"] for row in models))
    width = 0.8 / len(kinds)
    for number, kind in enumerate(kinds):
        found = [(i, of(models, kind=kind, family=f, op=op)) for i, (f, op) in enumerate(steps)]
        found = [(i, rows_here[0]) for i, rows_here in found if rows_here]
        heights = [model_ratio(row, rows) for _, row in found]
        axis.bar([i + (number + 0.5) * width - 0.4 for i, _ in found], heights, width, label=kind)
    names = [op if family != "flux" else f"flux {op}" for family, op in steps]
    axis.set_xticks(range(len(steps)), names, rotation=35, ha="right", fontsize="small")
    axis.axhline(1.0, color="gray", linewidth=0.8)
    axis.set(title="whole models", ylabel="times as fast as the bf16 model")
    axis.legend(fontsize="x-small", ncols=len(kinds), loc="lower center", bbox_to_anchor=(0.5, 1.06))
