"""The results of formats.py as Markdown."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- formats: begin -->", "<!-- formats: end -->"
#: a peer keeps weights packed if it holds at most this much more than the quantized weights have in the file
PACKED = 1.3
HEAD = (
    "| format | opens, packed | weights | tokens | saves | LoRA, merge | peak / file, MB | after / file | s / token "
    "| its library here | after / file | s / token |\n|---|---|---|---|---|---|---|---|---|---|---|---|"
)
STEPS = ("opens", "packed", "equal", "generates", "saves", "trains")


def verdicts(row: dict[str, Any]) -> dict[str, bool]:
    """What holds of a row, by step."""
    own, dtype = row.get("requanto", {}), row["written"]["dtype"]
    exact = any(own.get(key) for key in ("exact", "rounds", "exact_in_dtype")) or own.get("ulps", 9.0) <= 1.0
    generates = own.get("tokens_equal", 16 if own.get("output_difference", 1.0) < 1e-3 else 0) == 16
    if "library_difference" in own:
        generates = own["output_difference"] <= 1.5 * own["library_difference"]
    trains = own.get("lora_changed", 0) > 0 and own.get("lora_changed") == own.get("lora_adapters")
    found = {
        "opens": bool(own.get("opens")),
        "packed": own.get("packed", 0.0) == 1.0,
        "equal": bool(exact) and bool(dtype),
        "generates": generates,
        "saves": bool(own.get("saves")),
        "trains": trains and bool(own.get("merge_finite")),
    }
    return {step: bool(own.get("opens")) and holds for step, holds in found.items()}


def peer_packed(row: dict[str, Any], peer: dict[str, Any]) -> bool:
    """Whether a library opened a row and held its weights in about their bytes in the file."""
    return bool(peer.get("opens")) and (bool(peer.get("packed")) or ratio(row, peer) <= PACKED)


def ratio(row: dict[str, Any], peer: dict[str, Any]) -> float:
    """Bytes that a library holds after a forward, over those of the file; without a float table of embeddings."""
    sizes = row["written"]["sizes"]
    if peer.get("held_but_embeddings"):
        return peer["held_but_embeddings"] / (sizes["file"] - sizes["embeddings"])
    return peer["held"] / sizes["file"]


def equality(row: dict[str, Any]) -> str:
    """How close weights are to the library's own."""
    own, dtype = row["requanto"], row["written"]["dtype"]
    if "packed" not in own:
        return "-"
    if own["exact"]:
        return "bit for bit"
    if own["rounds"]:
        return f"one rounding ({dtype})"
    if own.get("exact_in_dtype"):
        return f"bit for bit in {dtype}"
    if own["ulps"] <= 1.0:
        return f"one rounding, of the row's largest ({dtype})"
    return f"**{own['relative']:.1g} of the largest**"


def line(name: str, row: dict[str, Any]) -> str:
    """A line of the table."""
    label = f"{row['format']}: {row['label']}"
    own, sizes = row.get("requanto", {}), row["written"]["sizes"]
    if not own.get("opens"):
        cells = [f"**no**: {own.get('failed', {}).get('open', 'not run')[:90]}"] + ["-"] * 7
    else:
        share = own.get("packed", 0.0)
        holds = verdicts(row)
        failed = own.get("failed", {})
        tokens = own.get("tokens_equal")
        merge = own.get("merge_difference")
        cells = [
            "yes" if share == 1.0 else f"{share:.0%} packed",
            equality(row),
            "-" if "generates" in failed else f"{tokens} of 16{_inputs(own)}" if tokens is not None else _output(own),
            "equal" if holds["saves"] else f"**no** {failed.get('saves', '')[:60]}",
            f"yes, {merge:.0e}".replace("0e+00", "exact")
            if holds["trains"]
            else f"**no** {failed.get('lora', '')[:60]}",
            f"{own['peak'] / 1e6:.0f} / {sizes['file'] / 1e6:.0f}"
            + ("" if own["peak"] <= own["bound"] else " **above**"),
            f"{own['bytes_after'] / sizes['quantized']:.2f}",
            f"{own['token_seconds']:.3f}",
        ]
    peers = row.get("peers", {})
    told = [_peer(row, library, peer) for library, peer in peers.items()] or [("-", "-", "-")]
    columns = ["<br>".join(parts) for parts in zip(*told)]
    return f"| {label} | {' | '.join(cells + columns)} |"


def _inputs(own: dict[str, Any]) -> str:
    """What rounding of inputs does in the format's own arithmetic."""
    return f" (its library's arithmetic: {own['library_tokens']})" if "library_tokens" in own else ""


def _output(own: dict[str, Any]) -> str:
    return f"output within {own['output_difference']:.0e}"


def _peer(row: dict[str, Any], library: str, peer: dict[str, Any]) -> tuple[str, str, str]:
    name = f"{library} {peer.get('version', '')}".strip()
    if "error" in peer:
        return f"{name}: refuses ({_short(peer['error'])})", "-", "-"
    seconds = f"{peer['token_seconds']:.3f}"
    if not peer["opens"]:
        return f"{name}: wrong outputs", f"{ratio(row, peer):.2f}", seconds
    if peer.get("packed"):
        return f"{name}: opens", f"{ratio(row, peer):.2f} (process)", seconds
    kept = "opens" if peer_packed(row, peer) else "turns it into floats"
    return f"{name}: {kept}", f"{ratio(row, peer):.2f}", seconds


def _short(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")[:80]


def counts(results: dict[str, Any]) -> str:
    """How many rows and formats each library opens packed on this machine."""
    rows = results["rows"]
    formats: dict[str, set[str]] = defaultdict(set)
    totals: dict[str, int] = defaultdict(int)
    for row in rows.values():
        for library, peer in row.get("peers", {}).items():
            totals[library] += 0
            if peer_packed(row, peer):
                totals[library] += 1
                formats[library].add(row["format"])
    own = {step: [name for name, row in rows.items() if verdicts(row)[step]] for step in STEPS}
    every = [name for name, row in rows.items() if all(verdicts(row).values())]
    kinds = {row["format"] for row in rows.values()}
    whole = {kind for kind in kinds if all(name in every for name, row in rows.items() if row["format"] == kind)}
    lines = [
        f"Of {len(rows)} checkpoints in {len(kinds)} formats Requanto: "
        + ", ".join(f"{step} {len(names)}" for step, names in own.items())
        + f"; all of it {len(every)}, in {len(whole)} formats whole.",
        "",
        "| library | checkpoints opened and kept packed on this CPU | formats |",
        "|---|---|---|",
        f"| **Requanto** | {len(own['packed'])} | {len({rows[name]['format'] for name in own['packed']})} |",
    ]
    for library in sorted(totals, key=lambda one: (-len(formats[one]), -totals[one], one)):
        lines.append(f"| {library} | {totals[library]} | {len(formats[library])} |")
    return "\n".join(lines)


def tables(results: dict[str, Any]) -> str:
    """Both tables."""
    rows = results["rows"]
    return "\n".join([HEAD, *(line(name, row) for name, row in rows.items()), "", counts(results)])


def into(path: Path, results: dict[str, Any]) -> None:
    """Replaces what is between the markers of a document."""
    text = path.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    path.write_text(f"{before}{BEGIN}\n{tables(results)}\n{END}{after}", encoding="utf-8")
