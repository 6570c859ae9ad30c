"""Output of benchmarks/cpu.py: a table with goals, the tables of docs/cpu.md, a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SHAPES = ((4096, 4096), (14336, 4096))
ROWS = (1, 16, 128, 1024)
# ratio to bf16 at ROWS
GOALS = {
    "int8": (1.8, 0.95, 0.9, 0.95),
    "int4": (2.5, 0.95, 0.9, 0.9),
    "int2": (2.0, 0.9, 0.9, 0.9),
    "float8": (1.2, 0.9, 0.9, 0.9),
    "int8 x int8": (1.6, 1.7, 2.0, 1.6),
}
Row = dict[str, Any]


def _cells(rows: list[Row], shape: tuple[int, int]) -> dict[tuple[str, str], dict[int, dict[str, float]]]:
    """Results by library and type, then by rows of x."""
    table: dict[tuple[str, str], dict[int, dict[str, float]]] = {}
    for row in rows:
        if tuple(row["shape"]) == shape and "results" in row:
            for name, found in row["results"].items():
                if name != "bf16":
                    table.setdefault((row["library"], name), {})[row["rows"]] = found
    return table


def show(rows: list[Row]) -> None:
    """Prints every result with its goal."""
    for shape in SHAPES:
        print(f"\n{shape[0]} x {shape[1]}: ratio to bf16 (of the fastest tenth), goal in brackets")
        for row in rows:
            if tuple(row["shape"]) == shape and "failed" in row:
                print(f"  {row['library']} failed: {row['failed'].splitlines()[-1] if row['failed'] else ''}")
        print(f"  {'':32}" + "".join(f"{f'M={m}':22}" for m in ROWS))
        for (library, name), cells in _cells(rows, shape).items():
            texts = {}
            for m, found in cells.items():
                texts[m] = f"{found['ratio']:.2f} ({found['best_ratio']:.2f})"
                if library == "requanto" and name in GOALS:
                    texts[m] += f" [{GOALS[name][ROWS.index(m)]}]"
            print(f"  {library + ' ' + name:32}" + "".join(f"{texts.get(m, ''):22}" for m in ROWS))


def markdown(documents: dict[int, dict[str, Any]]) -> str:
    """The tables of docs/cpu.md as markdown, from the results by number of threads."""
    lines = []
    for shape in SHAPES:
        lines += [f"Ratio to bf16 `F.linear`, {shape[0]} x {shape[1]} (above 1 is faster):", ""]
        lines += ["| threads | | " + " | ".join(f"M={m}" for m in ROWS) + " |", "|---" * (2 + len(ROWS)) + "|"]
        for threads, document in sorted(documents.items()):
            for (library, name), cells in _cells(document["results"], shape).items():
                texts = [f"{cells[m]['ratio']:.2f}" if m in cells else "" for m in ROWS]
                lines.append(f"| {threads} | {library} {name} | " + " | ".join(texts) + " |")
        lines.append("")
    return "\n".join(lines)


def plot(rows: list[Row], path: Path) -> None:
    """Draws speed over rows of x, one panel for each shape."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(SHAPES), figsize=(12, 4.5), sharey=True)
    styles = {"requanto": ("-", "o", 2.2), "optimum-quanto": ("--", "s", 1), "torchao": (":", "^", 1.2)}
    colors = {"int8": "C0", "int4": "C1", "int2": "C2", "float8": "C3", "int8 x int8": "C4", "nf4": "C5"}
    for axis, shape in zip(axes, SHAPES):
        for (library, name), cells in _cells(rows, shape).items():
            kind = name.removesuffix(" eager")
            if kind not in colors:
                continue
            line, marker, width = styles.get(library, ("-.", "v", 1.2))
            if kind != name:
                line, width = (0, (1, 1)), 1.6
            axis.plot(
                list(cells),
                [found["best_ratio"] for found in cells.values()],
                linestyle=line,
                marker=marker,
                lw=width,
                ms=4,
                color=colors[kind],
                label=f"{library} {name}",
            )
        axis.axhline(1, color="black", lw=0.8)
        axis.set(xscale="log", yscale="log", title=f"{shape[0]} x {shape[1]}", xlabel="rows of x")
        axis.set_xticks(ROWS, [str(m) for m in ROWS])
        axis.set_yticks([0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 4], ["0.02", "0.05", "0.1", "0.2", "0.5", "1", "2", "4"])
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("speed relative to bf16")
    axes[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=110)
