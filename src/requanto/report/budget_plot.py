"""Plot of a model quantized with ``weights="auto"``: size and error of each layer."""

from __future__ import annotations

from pathlib import Path

from requanto.report.compare_plot import COLOURS, FLOOR, pyplot
from requanto.report.inspect import ModelReport


def plot_budget(report: ModelReport, path: str | Path) -> Path:
    """Plots size and relative error of each layer whose type was chosen by a budget, into a PNG file.

    Raises:
        ValueError: the types were not chosen by a budget.
    """
    layers = [weight for weight in report.weights if weight.error is not None]
    if not report.budget or not layers:
        raise ValueError("only a model quantized with weights='auto' has errors to plot")
    plt = pyplot()
    labels = [w.dtype + (f" g{w.group_size}" if w.group_size else "") for w in layers]
    kinds = sorted(set(labels), key=lambda kind: min(w.bits for w, label in zip(layers, labels) if label == kind))
    colours = {kind: COLOURS[index % len(COLOURS)] for index, kind in enumerate(kinds)}
    figure, (upper, lower) = plt.subplots(2, 1, figsize=(11, 6.5), sharex=True, constrained_layout=True)
    for kind in kinds:
        chosen = [i for i, label in enumerate(labels) if label == kind]
        name = f"{kind}: {len(chosen)} layers, {sum(layers[i].bytes for i in chosen) / 1e6:.1f} MB"
        upper.bar(chosen, [layers[i].bytes / 1e6 for i in chosen], width=1.0, color=colours[kind], label=name)
        lower.plot(chosen, [max(FLOOR, layers[i].error or 0) for i in chosen], "o", ms=4, color=colours[kind])
    upper.set_ylabel("MB")
    upper.legend(fontsize=7, ncols=3)
    upper.set_title(report.why(), fontsize=9)
    lower.set_yscale("log")
    lower.set_ylabel("relative weight error")
    lower.grid(True, alpha=0.3)
    step = max(1, len(layers) // 30)
    lower.set_xticks(range(0, len(layers), step))
    names = [layers[i].name.removesuffix(".weight") for i in range(0, len(layers), step)]
    lower.set_xticklabels(names, fontsize=6, rotation=60, ha="right")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
