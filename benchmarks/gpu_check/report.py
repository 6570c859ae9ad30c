"""Tables and a plot from the rows of a file; needs no GPU, and no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gpu_check.goals import goal_of, verdict
from gpu_check.plot import plot
from gpu_check.rows import rows_of

Row = dict[str, Any]


def write(file: Path, out: Path | None = None, before: Path | None = None) -> str:
    """Writes gpu_check.md and gpu_check.png beside the rows, or into ``out``; returns the summary.

    Args:
        before: rows of an earlier run, to say what has changed since.
    """
    folder = out or file.parent
    folder.mkdir(parents=True, exist_ok=True)
    rows = last_of_each(file)
    text = summary(rows)
    if before is not None:
        text = f"{text}\n{_since(last_of_each(before), rows)}\n"
    (folder / "gpu_check.md").write_text(text)
    drawn = plot(folder / "gpu_check.png", rows)
    return f"{text}\nwrote {folder / 'gpu_check.md'}; {drawn}"


def last_of_each(file: Path) -> list[Row]:
    """The last row of each case."""
    return list({row["case"]: row for row in rows_of(file) if "case" in row}.values())


def _since(before: Sequence[Row], rows: Sequence[Row]) -> str:
    """Cases whose time has changed by more than the spreads of both, those that changed most first."""
    known, lines = {row["case"]: row for row in before}, []
    for row in rows:
        old = known.get(row["case"])
        if old is None or row["stage"] in ("compile", "ceilings") or bool(old.get("fault")) != bool(row.get("fault")):
            if old is not None and bool(old.get("fault")) != bool(row.get("fault")):
                lines.append((float("inf"), f"- {row['case']}: {'now a fault' if row.get('fault') else 'right now'}"))
            continue
        if not (is_right(row) and is_right(old)):
            continue
        gain = old["us"] / row["us"]
        if max(gain, 1 / gain) > 1 + max(row.get("spread", 0), old.get("spread", 0), 0.02):
            lines.append((max(gain, 1 / gain), f"- {row['case']}: {old['us']:.1f} -> {row['us']:.1f} us, {gain:.2f}x"))
    shown = [text for _, text in sorted(lines, reverse=True)]
    more = [f"- and {len(shown) - 20} more"] if len(shown) > 20 else []
    return "## Since the earlier run\n\n" + "\n".join(
        [*shown[:20], *more] or ["nothing has changed by more than the spread"]
    )


def summary(rows: Sequence[Row]) -> str:
    """The whole summary as Markdown, the most important at the end: a remote call may return only that."""
    rows = [row for row in rows if row["stage"] != "compile" or row.get("fault")]
    order = (
        _head, _tune, _best, _dequantize, _vendor, _least_rows, _sums, _joined, _host, _peers, _models, _goals,
        _faults, _counts,
    )  # fmt: skip
    parts = [part(rows) for part in order]
    return "\n\n".join(part for part in parts if part) + "\n"


def of(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """Rows with these values."""
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]


def is_right(row: Row) -> bool:
    """True for a row with a time, which has been checked before."""
    return "us" in row and not row.get("fault")


def ratio_of(row: Row) -> float | None:
    """Times as fast as bf16."""
    return row["bf16_us"] / row["us"] if is_right(row) and row.get("bf16_us") else None


def ceilings_of(rows: Iterable[Row]) -> dict[str, float]:
    return {row["op"]: row["rate"] for row in rows if row["stage"] == "ceilings" and "rate" in row}


def share_of(row: Row, ceilings: dict[str, float]) -> tuple[float, str] | None:
    """(share of the nearer ceiling that was reached, its name): memory (``"mem"``) or the matrix units (``"mma"``)."""
    if not is_right(row) or "bytes" not in row or not {"copy", "bf16"} <= set(ceilings):
        return None
    memory = row["bytes"] / ceilings["copy"]
    matrix = row.get("flops", 0) / (ceilings["bf16"] * row.get("factor", 1))
    return max(memory, matrix) / row["us"] * 1e6, "mem" if memory >= matrix else "mma"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table, its columns aligned for the screen."""
    cells = [list(map(str, head)), *([_cell(cell) for cell in row] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def _cell(value: object) -> str:
    return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def _head(rows: Sequence[Row]) -> str:
    device = next(iter(of(rows, op="device")), {})
    start = next(iter(of(rows, stage="start")), {})
    rates = ceilings_of(rows)
    known = ", ".join(f"{device[name]}" for name in ("gpu",) if name in device)
    versions = ", ".join(
        f"{name} {device[name]}" for name in ("torch", "triton", "cuda", "transformers") if name in device
    )
    units = ", ".join(
        f"{name} {rate / 1e12:.2f} TB/s" if name == "copy" else f"{name} {rate / 1e12:.0f} T/s"
        for name, rate in rates.items()
    )
    return (
        f"# GPU check: {known or 'no device row'}\n\n{versions}. Commit {start.get('commit')}; `{start.get('command')}`.\n"
        f"Ceilings: {units or 'not measured'}."
    )


def _goals(rows: Sequence[Row]) -> str:
    found, ceilings = of(rows, stage="goals", op="layer"), ceilings_of(rows)
    if not found:
        return ""
    ms = sorted({row["m"] for row in found})
    lines = []
    for kind, n, k in dict.fromkeys((row["kind"], row["n"], row["k"]) for row in found):
        cells = []
        for m in ms:
            row = next(iter(of(found, kind=kind, n=n, k=k, m=m)), None)
            cells.append("-" if row is None else _goal_cell(row, ceilings))
        lines.append([kind, f"{n}x{k}", *cells])
    note = "us, ratio to bf16, share of the nearer ceiling (memory or matrix units), verdict"
    return f"## Goals ({note})\n\n" + table(["kind", "NxK", *(f"M={m}" for m in ms)], lines)


def _goal_cell(row: Row, ceilings: dict[str, float]) -> str:
    ratio, share = ratio_of(row), share_of(row, ceilings)
    if ratio is None:
        return "FAULT"
    where = f" {share[0]:.0%} {share[1]}" if share else ""
    return f"{row['us']:.1f} {ratio:.2f}x{where} {verdict(row, ratio)}".rstrip()


def _best(rows: Sequence[Row]) -> str:
    """For each question about tiles, the fastest right variant against what ships."""
    lines = []
    tiled = [row for row in rows if row["stage"] == "questions" and row["family"] in ("splits", "tiles", "8bit-tiles")]
    for family, kind, n, k, m in dict.fromkeys((r["family"], r["kind"], r["n"], r["k"], r["m"]) for r in tiled):
        here = [row for row in of(tiled, family=family, kind=kind, n=n, k=k, m=m) if is_right(row)]
        if not here:
            continue
        best = min(here, key=lambda row: row["us"])
        shipped = next((row["us"] for row in here if not row.get("config")), None) or _layer_us(rows, kind, n, k, m)
        config = ", ".join(f"{name} {value}" for name, value in best.get("config", {}).items()) or "as shipped"
        gain = None if shipped is None else shipped / best["us"]
        lines.append([family, kind, f"{n}x{k}", m, shipped, best["us"], gain, config, best.get("spread")])
    head = ["question", "kind", "NxK", "M", "shipped us", "best us", "gain", "best variant", "spread"]
    return "## Best tile by question\n\n" + table(head, lines) if lines else ""


def _layer_us(rows: Sequence[Row], kind: str, n: int, k: int, m: int) -> float | None:
    found = [row for row in of(rows, stage="goals", op="layer", kind=kind, n=n, k=k, m=m) if is_right(row)]
    return found[0]["us"] if found else None


def _by_rows(rows: Sequence[Row], family: str, name: str) -> list[list[object]]:
    """Lines of (kind, what, microseconds by M) for one question; ``name`` is the column that tells variants apart."""
    found = of(rows, stage="questions", family=family)
    ms = sorted({row["m"] for row in found})
    lines: list[list[object]] = []
    for kind, n, k, what in dict.fromkeys((r["kind"], r["n"], r["k"], r[name]) for r in found):
        cells: list[object] = []
        for m in ms:
            row = next(iter(of(found, kind=kind, n=n, k=k, m=m, **{name: what})), None)
            ratio = None if row is None else ratio_of(row)
            fast = "" if what == "quantize x" or ratio is None else f" {ratio:.2f}x"
            cells.append(None if row is None else "FAULT" if ratio is None else f"{row['us']:.1f}{fast}")
        lines.append([kind, f"{n}x{k}", what, *cells])
    return [["kind", "NxK", "op", *(f"M={m}" for m in ms)], *lines] if lines else []


def _dequantize(rows: Sequence[Row]) -> str:
    lines = _by_rows(rows, "dequantize-rows", "op")
    if not lines:
        return ""
    found, said = of(rows, family="dequantize-rows"), []
    for kind in dict.fromkeys(row["kind"] for row in found):
        times = {(row["op"], row["m"]): row["us"] for row in of(found, kind=kind) if is_right(row)}
        faster = [m for op, m in times if op == "dequantize" and times[op, m] < times.get(("fused", m), 0)]
        said.append(f"{kind}: from M={min(faster)}" if faster else f"{kind}: never")
    return f"## Dequantize + cuBLAS is faster than fused\n\n{'; '.join(said)}\n\n" + table(lines[0], lines[1:])


def _vendor(rows: Sequence[Row]) -> str:
    lines = _by_rows(rows, "vendor", "op")
    return "## Whose GEMM of 8-bit codes (us, ratio to bf16)\n\n" + table(lines[0], lines[1:]) if lines else ""


def _least_rows(rows: Sequence[Row]) -> str:
    lines = _by_rows(rows, "least-rows", "op")
    return "## From how many rows 8-bit activations pay\n\n" + table(lines[0], lines[1:]) if lines else ""


def _joined(rows: Sequence[Row]) -> str:
    lines = _by_rows(rows, "joined", "op")
    return "## Gate and up projection: one launch or two\n\n" + table(lines[0], lines[1:]) if lines else ""


def _sums(rows: Sequence[Row]) -> str:
    """What exact sums of float8 products cost, and what they change."""
    found = [row for row in of(rows, family="8bit-tiles", kind="float8 x float8") if is_right(row)]
    chosen = [row for row in found if not row.get("config") or "exact_every" in row["config"]]
    said = []
    for row in chosen:
        every = row.get("config", {}).get("exact_every", "as shipped")
        said.append(f"M={row['m']} {every}: {row['us']:.1f} us, error {row['error']:.2e}")
    return "## Float8: sums in fp32 after so many products\n\n" + "; ".join(said) if said else ""


def _host(rows: Sequence[Row]) -> str:
    found = [f"{row['kind']} {row['us']:.1f}" for row in of(rows, family="host") if is_right(row)]
    return f"## CPU time of one eager call, us\n\n{', '.join(found)}" if found else ""


def _peers(rows: Sequence[Row]) -> str:
    """Each peer's product: microseconds, ratio to bf16, and how many times as fast ours of the same kind is."""
    found = of(rows, stage="peers")
    ms = sorted({row["m"] for row in found if is_right(row)})
    lines = []
    for peer, op, n, k in dict.fromkeys((r["family"], r["op"], r["n"], r["k"]) for r in found if is_right(r)):
        cells = []
        for m in ms:
            row = next(iter(of(found, family=peer, op=op, n=n, k=k, m=m)), None)
            if row is None or not is_right(row):
                cells.append("-" if row is None else "FAULT")
                continue
            own, mark = _layer_us(rows, row["kind"], n, k, m), "" if row.get("how") in ("graph", "cold") else "*"
            ours = f" {row['us'] / own:.2f}" if own else ""
            cells.append(f"{row['us']:.1f}{mark} {ratio_of(row) or 0:.2f}x{ours}")
        lines.append([peer, op, f"{n}x{k}", *cells])
    note = "us, ratio to bf16, how many times as fast ours is; *: no graph, launches included"
    head = ["peer", "op", "NxK", *(f"M={m}" for m in ms)]
    return f"## Peers ({note})\n\n" + table(head, lines) if lines else ""


def _models(rows: Sequence[Row]) -> str:
    lines, found = [], of(rows, stage="models")
    for family in dict.fromkeys(row["family"] for row in found):
        ops = list(dict.fromkeys(row["op"] for row in of(found, family=family)))
        for kind in dict.fromkeys(row["kind"] for row in of(found, family=family)):
            cells: list[object] = []
            for op in ops:
                row = next(iter(of(found, family=family, kind=kind, op=op)), None)
                cells.append(None if row is None else _model_cell(row, found))
            lines.append((family, ops, [kind, *cells]))
    tables = []
    for family in dict.fromkeys(line[0] for line in lines):
        own = [line for line in lines if line[0] == family]
        tables.append(table([family, *own[0][1]], (line[2] for line in own)))
    note = "ms of the whole model, computed from a part of its layers; ratio to bf16; verdict"
    return f"## Models ({note})\n\n" + "\n\n".join(tables) if tables else ""


def _model_cell(row: Row, found: Sequence[Row]) -> str:
    ratio = model_ratio(row, found)
    if ratio is None:
        return "FAULT" if row.get("fault") else f"{model_us(row) / 1e3:.2f}"
    return f"{model_us(row) / 1e3:.2f} {ratio:.2f}x {verdict(row, ratio)}".rstrip()


def model_us(row: Row) -> float:
    return row.get("all_us", row["us"])


def model_ratio(row: Row, found: Iterable[Row]) -> float | None:
    """Times as fast as the bf16 model, of the same step and mode."""
    base = [one for one in of(found, family=row["family"], op=row["op"], kind="bf16") if is_right(one)]
    return model_us(base[0]) / model_us(row) if base and is_right(row) else None


def _tune(rows: Sequence[Row]) -> str:
    found = [row for row in of(rows, stage="tune") if "entries" in row]
    return f"Tuned: {sum(row['entries'] for row in found)} entries, in kernels.json." if found else ""


def _faults(rows: Sequence[Row]) -> str:
    lines: dict[str, int] = {}
    for row in rows:
        why = row.get("fault") or (row.get("not_captured") and f"timed without a graph: {row['not_captured']}")
        if why:
            peer = row["stage"] == "peers" and why.startswith("not compared")
            name = f"peers/{row['family']}" if peer else row["case"]
            text = f"- {name}: {why[:200]}"
            lines[text] = lines.get(text, 0) + 1
    shown = [text + (f" ({count} times)" if count > 1 else "") for text, count in lines.items()]
    if len(shown) > 25:
        shown = [*shown[:25], f"- and {len(shown) - 25} more in the file"]
    return "## Faults\n\n" + "\n".join(shown) if shown else ""


def _counts(rows: Sequence[Row]) -> str:
    marks: dict[str, int] = {}
    for row in rows:
        goal = goal_of(row)
        if goal is None:
            continue
        ratio = model_ratio(row, rows) if row["stage"] == "models" else ratio_of(row)
        word = verdict(row, ratio) or "no ratio"
        marks[word] = marks.get(word, 0) + 1
    end = next(iter(of(rows, stage="end")), {})
    left = ", ".join(f"{name} {count}" for name, count in end.get("left_out", {}).items())
    reached = ", ".join(f"{word} {count}" for word, count in sorted(marks.items()))
    seconds = f"{end['t']:.0f} s" if "t" in end else "did not end"
    faults = sum(1 for row in rows if row.get("fault"))
    return f"Goals: {reached or 'none measured'}. Faults: {faults}. Left out for time: {left or 'nothing'}. {seconds}."
