"""Memory that a rank needs for 8B, 70B and 405B in each type: the table of docs/parallel.md. Computed, nothing is loaded.

    python benchmarks/parallel.py

Prints the table and writes benchmarks/results/parallel.json. `requanto inspect 8B --parallel tp=8` computes one of its
cells for each type.
"""

from __future__ import annotations

import dataclasses

from common import RESULTS, write

from requanto import QuantoConfig
from requanto.report.parallel import LLAMA_SHAPES, llama, parallel_report

TYPES = ("bfloat16", "int8", "float8", "int4", "int2")
SPLITS = ({"tp": 1}, {"tp": 2}, {"tp": 8}, {"tp": 16}, {"fsdp": 8}, {"fsdp": 16})


def main() -> None:
    rows = []
    names = [f"{word}={ranks}" for split in SPLITS for word, ranks in split.items()]
    print(f"| | | {' | '.join(names)} |\n|{'---|' * (len(names) + 2)}")
    for size in LLAMA_SHAPES:
        model = llama(size)
        for kind in TYPES:
            config = None if kind == "bfloat16" else QuantoConfig(weights=kind)
            found = [parallel_report(model, config, **split) for split in SPLITS]
            print(f"| {size} | {kind} | {' | '.join(f'{report.total / 1e9:.1f}' for report in found)} |", flush=True)
            for name, report in zip(names, found, strict=True):
                row = {"model": size, "weights": kind, "split": name, "bytes_a_rank": report.total}
                rows.append(row | dataclasses.asdict(report))
    write(RESULTS / "parallel.json", {"rows": rows})


if __name__ == "__main__":
    main()
