"""The results of accuracy.py as Markdown tables and as a plot."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

#: colour and marker of a library in the plot
STYLES = {
    "requanto": ("tab:red", "o"),
    "hqq": ("tab:blue", "s"),
    "torchao": ("tab:orange", "^"),
    "bitsandbytes": ("tab:green", "D"),
    "optimum-quanto": ("tab:purple", "v"),
    "sdnq": ("tab:gray", "P"),
    "sinq": ("tab:cyan", "<"),
    "llama.cpp": ("black", "x"),
    "gptqmodel": ("tab:brown", "X"),
    "autoround": ("tab:pink", "*"),
}
TEXTS = ("numpy", "aptitude")
#: title and least bits a weight of each table; a row belongs to the first whose bits it reaches
LEVELS = (
    ("8 bits", 6.0),
    ("4.4 bits and more", 4.4),
    ("4 to 4.4 bits", 3.95),
    ("3.2 to 3.9 bits", 3.0),
    ("below 3 bits", 0.0),
)
HEAD = (
    "| library | weights | bits | Gemma, NumPy | Gemma, aptitude | Gemma, KL | causal, KL | reactions, KL | vision, KL |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def percent(row: dict[str, Any], base: dict[str, Any], model: str, text: str) -> float | None:
    """Perplexity in percent of the float model's; None where it was not measured."""
    own = row["models"].get(model, {}).get(f"perplexity_{text}")
    return None if own is None else 100 * own / base["models"][model][f"perplexity_{text}"]


def bits(row: dict[str, Any]) -> tuple[float, float]:
    """Least and most bits a weight, over the models."""
    found = [figures["bits"] for figures in row["models"].values() if "bits" in figures]
    return min(found), max(found)


def line(row: dict[str, Any], base: dict[str, Any]) -> str:
    """One line of a table."""
    least, most = bits(row)
    shown = f"{least:.2f}" if most - least < 0.06 else f"{least:.2f} to {most:.2f}"
    stored = max(figures.get("stored_bits", 0.0) - figures.get("bits", 0.0) for figures in row["models"].values())
    if stored > 0.1:
        shown += f" (stored in {most + stored:.2f})"
    shares = [percent(row, base, "gemma", text) for text in TEXTS]
    cells = ["-" if value is None else f"{value:.1f} %" if value < 1000 else f"{value:,.0f} %" for value in shares]
    for model in ("gemma", "causal", "reactions", "vision"):
        kl = row["models"].get(model, {}).get("kl")
        cells.append("-" if kl is None else f"{1000 * kl:.1f}" if kl < 1 else f"{1000 * kl:,.0f}")
    return f"| {row['library']} {row['version']} | {row['label']} | {shown} | {' | '.join(cells)} |"


def tables(results: dict[str, Any]) -> str:
    """A table for each level of bits, without samples and with; in each the rows with the least loss first."""
    rows = [row for row in results["rows"].values() if any("bits" in figures for figures in row["models"].values())]
    base = results["rows"]["float/bfloat16"]
    text = []
    for samples in (False, True):
        for at, (title, least) in enumerate(LEVELS):
            below = LEVELS[at - 1][1] if at else 12.0
            own = [row for row in rows if row["samples"] == samples and least <= bits(row)[0] < below]
            if own:
                text += [f"**{title}, {'with' if samples else 'without'} samples**", "", HEAD]
                text += [line(row, base) for row in sorted(own, key=loss)] + [""]
    for row in results["rows"].values():
        reasons = {figures["failed"] for figures in row["models"].values() if "failed" in figures}
        text += [f"- {row['library']} {row['label']}: {reason}" for reason in sorted(reasons)]
    return "\n".join(text)


def loss(row: dict[str, Any]) -> float:
    """What rows are sorted by: KL of the masked language model, which all libraries support, or else of Gemma."""
    found = [row["models"].get(model, {}).get("kl") for model in ("reactions", "gemma", "causal")]
    return next((kl for kl in found if kl is not None), math.inf)


def draw(results: dict[str, Any], path: Path) -> None:
    """Draws KL divergence over bits for the models that two libraries or more were measured on."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    titles = {
        "gemma": "Gemma-3-270M",
        "reactions": "BERT of chemical reactions",
        "vision": "vision transformer, digits",
    }
    rows = results["rows"].values()
    seen = {name: {row["library"] for row in rows if "kl" in row["models"].get(name, {})} for name in titles}
    titles = {name: title for name, title in titles.items() if len(seen[name] - {"float"}) > 1}
    figure, axes = plt.subplots(1, len(titles), figsize=(6 * len(titles), 5), constrained_layout=True)
    for axis, (model, title) in zip(axes, titles.items(), strict=True):
        for library, (colour, mark) in STYLES.items():
            for samples in (False, True):
                points = [
                    (row["models"][model]["bits"], row["models"][model]["kl"])
                    for row in results["rows"].values()
                    if row["library"] == library and row["samples"] == samples and "kl" in row["models"].get(model, {})
                ]
                points = [point for point in points if point[0] < 6]
                if points:
                    label = library + (" with samples" if samples else "")
                    size = 90 if samples else 36
                    axis.scatter(*zip(*points, strict=True), c=colour, marker=mark, s=size, label=label, alpha=0.8)
        axis.set_yscale("log")
        axis.set_xlabel("bits a weight, scales and zero points counted")
        axis.set_ylabel("KL divergence to the float model, nats")
        axis.set_title(title, fontsize=10)
        axis.grid(True, which="both", alpha=0.25)
    handles, labels = axes[-1].get_legend_handles_labels()
    axes[-1].legend(handles, labels, fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
