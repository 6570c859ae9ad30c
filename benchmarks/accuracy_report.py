"""The results of accuracy.py as a Markdown table and as a plot."""

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
    "gptqmodel": ("tab:brown", "X"),
    "autoround": ("tab:pink", "*"),
}


def percent(row: dict[str, Any], text: str) -> str:
    """A cell of the table: perplexity in percent of bfloat16's."""
    if f"{text}_percent" not in row:
        return "-"
    value = row[f"{text}_percent"]
    return f"{value:.1f} %" if value < 1000 else f"{value:,.0f} %"


def line(row: dict[str, Any]) -> str:
    """One line of the table."""
    if "failed" in row:
        return f"| {row['library']} {row.get('version', '')} | {row['label']} | - | - | - | {row['failed']} |"
    bits = row.get("bits", row.get("minilm_bits"))
    stored = row.get("stored_bits", bits)
    shown = f"{bits:.2f}" + (f" (stored in {stored:.2f})" if stored - bits > 0.1 else "")
    cosine = f"{row['minilm_cosine']:.4f}" if "minilm_cosine" in row else "-"
    name = f"{row['library']} {row['version']}" if row["library"] != "float" else "none"
    return f"| {name} | {row['label']} | {shown} | {percent(row, 'eval')} | {percent(row, 'heldout')} | {cosine} |"


def table(results: dict[str, Any]) -> str:
    """All rows, grouped by whole numbers of bits, in each group the best first."""

    def order(row: dict[str, Any]) -> tuple[float, float, float]:
        bits = row.get("bits", row.get("minilm_bits", 0.0))
        width = math.floor(bits) if bits < 16 else 16
        return (-width, row.get("eval_percent", math.inf), -row.get("minilm_cosine", 0.0))

    head = "| library | weights | bits | SmolLM2 | SmolLM2, held-out text | cosine, MiniLM |\n|---|---|---|---|---|---|"
    return "\n".join([head, *(line(row) for row in sorted(results["rows"].values(), key=order))])


def draw(results: dict[str, Any], path: Path) -> None:
    """Draws loss of accuracy over bits for both models; rows without figures are left out."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 5), constrained_layout=True)
    titles = ("SmolLM2-135M: perplexity, % of bfloat16", "all-MiniLM-L6-v2: 1 - cosine")
    for axis, title in zip(axes, titles, strict=True):
        first = axis is axes[0]
        for library, (colour, mark) in STYLES.items():
            rows = [row for row in results["rows"].values() if row["library"] == library]
            points = [
                (row["bits"], row["eval_percent"]) if first else (row["minilm_bits"], 1 - row["minilm_cosine"])
                for row in rows
                if ("eval_percent" if first else "minilm_cosine") in row
                and row.get("minilm_bits", row.get("bits", 9)) < 6
            ]
            points = [point for point in points if math.isfinite(point[1])]
            if points:
                axis.scatter(*zip(*points, strict=True), c=colour, marker=mark, s=42, label=library, alpha=0.85)
        axis.set_yscale("log")
        axis.set_xlabel("bits a weight, scales and zero points counted")
        axis.set_title(title, fontsize=10)
        axis.grid(True, which="both", alpha=0.25)
        axis.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
