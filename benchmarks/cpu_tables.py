"""Output of benchmarks/cpu.py: lines, the tables of docs/cpu.md, cells that miss their goal, a plot."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROWS = (1, 4, 16, 64, 128, 512, 2048)
FLOATS = ("bf16", "f16", "f32")
#: The least ratio to the best float: of every cell, and what a few rows are to reach.
FLOOR = 0.95
CLASS_ORDER = ("avx2", "avxvnni", "avx512", "vnni", "bf16", "amx", "native")
Row = dict[str, Any]


def show(row: Row) -> None:
    """Prints one result as a line."""
    shape = "x".join(map(str, row["shape"]))
    own = {name: found for name, found in row["results"].items() if name not in FLOATS}
    floats = ", ".join(f"{f} {row['results'][f]['ms']:.3g}" for f in FLOATS if f in row["results"])
    texts = " ".join(
        f"{name} {found['ratio']:.2f}{'!' if found['ratio'] < FLOOR else ''}" for name, found in own.items()
    )
    print(f"{shape:10} {row['dtype']:4} M={row['rows']:<5} ms {floats} | {texts}", flush=True)


def cells(stored: Row) -> Iterator[tuple[Row, Row, str, Row]]:
    """Part, row, type and figures of every measured cell that is not float."""
    for part in stored["parts"].values():
        for row in part["rows"]:
            for name, found in row.get("results", {}).items():
                if name not in FLOATS:
                    yield part, row, name, found


def below(stored: Row) -> list[str]:
    """Lines for Requanto's cells below the floor, the slowest first, and a line with their number."""
    found, count = [], 0
    for part, row, name, figures in cells(stored):
        if part["library"] != "requanto":
            continue
        count += 1
        if max(figures["ratio"], figures["best_ratio"]) < FLOOR:
            shape = "x".join(map(str, row["shape"]))
            where = f"{part['class']}, {part['threads']} thread(s), {shape}, {row['dtype']}, {row['rows']} rows"
            found.append((figures["ratio"], f"{figures['ratio']:.2f} ({figures['best_ratio']:.2f})  {name}: {where}"))
    return [line for _, line in sorted(found)] + [f"{len(found)} of {count} cells are below {FLOOR}"]


def _table(stored: Row, shape: tuple[int, int], threads: int) -> list[str]:
    """Requanto's: a line for each type and number of rows, a column for each class; bf16 / f16 / f32 models."""
    found: dict[tuple[str, int], dict[str, dict[str, float]]] = {}
    for part, row, name, figures in cells(stored):
        if tuple(row["shape"]) == shape and part["threads"] == threads and part["library"] == "requanto":
            found.setdefault((name, row["rows"]), {}).setdefault(part["class"], {})[row["dtype"]] = figures["ratio"]
    columns = [name for name in CLASS_ORDER if any(name in by_class for by_class in found.values())]
    lines = ["| | rows | " + " | ".join(columns) + " |", "|---" * (2 + len(columns)) + "|"]
    names = list(dict.fromkeys(name for name, _ in found))
    for name, rows in sorted(found, key=lambda key: (names.index(key[0]), key[1])):
        own = [found[name, rows].get(column, {}) for column in columns]
        texts = [" / ".join(f"{by_dtype[f]:.2f}" for f in FLOATS if f in by_dtype) for by_dtype in own]
        lines.append(f"| {name} | {rows} | " + " | ".join(texts) + " |")
    return lines if found else []


def _peers(stored: Row, shape: tuple[int, int], threads: int) -> list[str]:
    """All libraries on the best class: a line for each type, a column for each number of rows; bfloat16 models."""
    found: dict[tuple[str, str, str], dict[int, float]] = {}
    for part, row, name, figures in cells(stored):
        if tuple(row["shape"]) == shape and part["threads"] == threads and row["dtype"] == "bf16":
            found.setdefault((part["class"], part["library"], name), {})[row["rows"]] = figures["ratio"]
    classes = {key[0] for key in found if key[1] != "requanto"}
    if not classes:
        return []
    best = max(classes, key=CLASS_ORDER.index)
    lines = ["| | " + " | ".join(f"M={rows}" for rows in ROWS) + " |", "|---" * (1 + len(ROWS)) + "|"]
    for (kind, library, name), own in found.items():
        if kind == best:
            texts = [f"{own[rows]:.2f}" if rows in own else "" for rows in ROWS]
            lines.append(f"| {library} {name} | " + " | ".join(texts) + " |")
    return lines


def markdown(stored: Row) -> str:
    """The tables of docs/cpu.md as markdown."""
    rows = [row for part in stored["parts"].values() for row in part["rows"]]
    shapes = dict.fromkeys(tuple(row["shape"]) for row in rows if "shape" in row)
    lines: list[str] = []
    for shape in shapes:
        for threads in sorted({part["threads"] for part in stored["parts"].values()}):
            for table in (_table(stored, shape, threads), _peers(stored, shape, threads)):
                if table:
                    lines += [f"{shape[0]} x {shape[1]}, {threads} thread{'s'[: threads - 1]}:", "", *table, ""]
    return "\n".join(lines)


def speeds(stored: Row) -> list[str]:
    """GB/s of weights that one row of x reads, beside a plain read of memory, by type."""
    lines = []
    for part in stored["parts"].values():
        plain = next((row["reading_gb_per_s"] for row in part["rows"] if "reading_gb_per_s" in row), 0.0)
        sizes = {(tuple(row["shape"]), row["dtype"]): row["bytes"] for row in part["rows"] if "bytes" in row}
        for row in part["rows"]:
            own = sizes.get((tuple(row.get("shape", ())), row.get("dtype")), {})
            if row.get("rows") == 1 and own:
                texts = [
                    f"{name} {own[name] / found['best_ms'] / 1e6:.1f}"
                    for name, found in row["results"].items()
                    if own.get(name)
                ]
                where = f"{part['library']}, {part['class']}, {part['threads']}, {row['shape']}, {row['dtype']}"
                lines.append(f"{where}: GB/s, plain read {plain} | {', '.join(texts)}")
    return lines


def plot(stored: Row, path: Path) -> None:
    """Draws speed over rows of x, one panel for each class, bfloat16 models of 4096 x 4096 on one thread."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    chosen: dict[str, dict[str, dict[int, float]]] = {}
    for part, row, name, figures in cells(stored):
        if part["threads"] == 1 and tuple(row["shape"]) == (4096, 4096) and row["dtype"] == "bf16":
            label = name if part["library"] == "requanto" else f"{part['library']} {name}"
            if part["library"] not in ("requanto", "llama.cpp", "openvino"):
                continue  # the others are in the tables
            chosen.setdefault(part["class"], {}).setdefault(label, {})[row["rows"]] = figures["ratio"]
    classes = [name for name in CLASS_ORDER if name in chosen]
    figure, axes = plt.subplots(1, len(classes), figsize=(4 * len(classes), 4.4), sharey=True, squeeze=False)
    labels = list(dict.fromkeys(label for own in chosen.values() for label in own))
    ours = [label for label in labels if label.split()[0] in _own_names(stored)]
    colors = {label: f"C{i % 10}" for i, label in enumerate(ours)} | dict.fromkeys(set(labels) - set(ours), "0.6")
    markers = dict(zip([label for label in labels if label not in ours], "sv^<>DPX*hd" * 4))
    for axis, name in zip(axes[0], classes):
        for label, points in chosen[name].items():
            own = label in ours
            axis.plot(
                list(points),
                list(points.values()),
                "-" if own else ":",
                marker="o" if own else markers[label],
                lw=1.8 if own else 0.9,
                ms=3.5,
                color=colors[label],
                label=label,
            )
        axis.axhline(1, color="black", lw=0.8)
        axis.set(xscale="log", yscale="log", title=name, xlabel="rows of x")
        axis.set_xticks(ROWS, ["" if m == 64 else str(m) for m in ROWS])
        axis.minorticks_off()
        ticks = [0.3, 0.5, 1, 2, 5, 10, 20]
        axis.set_yticks(ticks, [str(tick) for tick in ticks])
        axis.set_ylim(0.3, 20)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("speed, best float of the class = 1")
    handles: dict[str, Any] = {}
    for axis in axes[0]:
        for handle, label in zip(*axis.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles.keys(), fontsize=7, loc="center right")
    figure.tight_layout(rect=(0, 0, 1 - 1.7 / (4 * len(classes)), 1))
    figure.savefig(path, dpi=110)


def _own_names(stored: Row) -> set[str]:
    return {name.split()[0] for part, _, name, _ in cells(stored) if part["library"] == "requanto"}
