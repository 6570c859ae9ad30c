"""Reading the file of rows: one JSON object a line, written as soon as it was known."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def done(file: Path) -> set[str]:
    """Keys of the cases that the file has a row without a fault for: those with one are worth another try."""
    found = set()
    for row in rows_of(file):
        if "case" in row and not row.get("fault") and row.get("stage") not in ("compile", "compiled"):
            found.add(row["case"])
    return found


def rows_of(file: Path) -> list[Row]:
    """The rows of a file; lines that are no JSON (cut off while writing) are named and left out."""
    rows = []
    for number, line in enumerate(file.read_text().splitlines() if file.exists() else [], 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            print(f"{file}: line {number} is not JSON, left out: {line[:80]!r}", file=sys.stderr)
    return rows
