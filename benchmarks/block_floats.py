"""NVFP4 and MX types beside integers and codebooks at equal bits, on the yardsticks that defaults are chosen on.

    python benchmarks/block_floats.py                        # all cases: about half an hour on one core
    python benchmarks/block_floats.py --cases nvfp4 int4     # some of them; the others keep their figures

Each case is a type with its options, data-free; ``nvfp4 minmax`` and ``mxfp4 minmax`` are the plain rules of the formats,
without the choice between two scales a block. Writes benchmarks/results/block_floats.json after each case.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from common import RESULTS, command, machine
from tqdm import tqdm
from yardsticks import CHOOSE
from yardsticks.measure import figures, load, ours

from requanto import QTensor

OUT = RESULTS / "block_floats.json"
#: of types that have a column scale by default
PLAIN = {"column_scale": False}
CASES: dict[str, dict[str, Any]] = {
    "int4": PLAIN | {"weights": "int4", "group_size": 64, "method": "aligned"},
    "int4 minmax": PLAIN | {"weights": "int4", "group_size": 64, "method": "minmax"},
    "nf4 g32": PLAIN | {"weights": "nf4", "group_size": 32},
    "fp4_e2m1 g32": PLAIN | {"weights": "fp4_e2m1", "group_size": 32},
    "nvfp4 minmax": {"weights": "nvfp4", "method": "minmax"},
    "nvfp4": {"weights": "nvfp4"},
    "nf4 g64": PLAIN | {"weights": "nf4", "group_size": 64},
    "codebook4 g64": PLAIN | {"weights": "codebook4", "group_size": 64},
    "mxfp4 minmax": {"weights": "mxfp4", "method": "minmax"},
    "mxfp4": {"weights": "mxfp4"},
    "int4 columns": {"weights": "int4", "group_size": 64, "method": "aligned", "column_scale": "root"},
    "nvfp4 columns": {"weights": "nvfp4", "column_scale": "root"},
    "mxfp4 columns": {"weights": "mxfp4", "column_scale": "root"},
    "nvfp4 rotated": {"weights": "nvfp4", "rotation": 16},
    "nvfp4 a-nvfp4": {"weights": "nvfp4", "activations": "nvfp4"},
    "mxfp4 a-mxfp4": {"weights": "mxfp4", "activations": "mxfp4"},
    "mxfp4 a-mxfp8": {"weights": "mxfp4", "activations": "mxfp8"},
    "mxfp6": {"weights": "mxfp6"},
    "int6 g128": PLAIN | {"weights": "int6", "group_size": 128, "method": "minmax"},
    "mxfp8": {"weights": "mxfp8"},
    "mxfp8 a-mxfp8": {"weights": "mxfp8", "activations": "mxfp8"},
    "int8 a-int8": {"weights": "int8", "activations": "int8"},
}


def bits_of(model: torch.nn.Module) -> float:
    """Bits for each quantized weight, with scales."""
    weights = [value for value in model.parameters() if isinstance(value, QTensor)]
    return round(8 * sum(w.nbytes for w in weights) / sum(w.numel() for w in weights), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--models", nargs="*", choices=CHOOSE["models"], default=list(CHOOSE["models"]))
    parser.add_argument("--tokens", type=int, default=1024, help="of each text")
    options = parser.parse_args()
    rows = json.loads(OUT.read_text())["rows"] if OUT.exists() else {}
    for case in tqdm(["float", *options.cases], desc="cases", unit="case"):
        for name in options.models:
            if case == "float" and name in rows.get(case, {}):
                continue
            model = load(name)
            # Inputs are rounded by the layers, and images are drawn with dequantized weights.
            if name == "digits" and (case == "float" or "activations" in CASES[case]):
                continue
            bits = {}
            if case != "float":
                ours(**CASES[case])(model)
                bits = {"bits": bits_of(model)}  # before layers are packed, which copies scales
            sizes = {"tokens": options.tokens, "asked": 0} if name == "smollm2" else {}
            found = {key: round(value, 5) for key, value in figures(name, model, **sizes).items()}
            rows.setdefault(case, {})[name] = bits | found | {"command": command()}
            OUT.write_text(json.dumps({"machine": machine(), "cases": CASES, "rows": rows}, indent=1) + "\n")
            tqdm.write(f"{case:14} {name:8} {bits} {found}")


if __name__ == "__main__":
    main()
