"""Scales chosen without samples: methods, column scales, group sizes, on the models and texts that defaults are chosen on.

    OMP_NUM_THREADS=1 python benchmarks/search.py                          # everything: half an hour on one core
    OMP_NUM_THREADS=1 python benchmarks/search.py --only int4-g64 nf4      # cases by name prefix; other results stay
    OMP_NUM_THREADS=1 python benchmarks/search.py --table                  # the table of docs/accuracy.md, from the results

Every linear layer but the output layer is quantized, as 16-bit weights; figures are those of `yardsticks.measure`: dithered
SmolLM2-135M-Instruct (perplexity in % of its float model's on 1,022 tokens of each of two texts, and KL divergence in nats a
token), all-MiniLM-L6-v2 (1 - cosine), the digits diffusion transformer (PSNR in dB: it jumps by 1 dB from one rounding to
the next). Time: the weights of one block of SmolLM2, alternating with minmax without a column scale, same type and
groups; the fastest of five rounds. Adds to benchmarks/results/search.json after each case.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from typing import Any

import torch
import transformers
from common import RESULTS, command, machine
from torch import nn
from tqdm import tqdm
from yardsticks.measure import figures, load, ours

from requanto import QTensor

OUT = RESULTS / "search.json"
MODELS = ("smollm2", "minilm", "digits")

#: Cases by name: keywords of `requanto.quantize`; those left out are the type's defaults.
CASES: dict[str, dict[str, Any] | None] = {
    "float": None,
    "int8": {"weights": "int8"},
    "float8": {"weights": "float8"},
    "float8, mean": {"weights": "float8", "column_scale": "mean"},
    "int4-g16-s4": {"weights": "int4", "group_size": 16, "scale_bits": 4},
    "int4-g32-s8": {"weights": "int4", "group_size": 32, "scale_bits": 8},
    "int4-g64": {"weights": "int4"},
    **{
        f"int4-g64, {method}, {kind or 'no'} columns": {"weights": "int4", "method": method, "column_scale": kind}
        for method, kind in (
            ("weighted", "std"),
            ("weighted", "root"),
            ("weighted", False),
            ("aligned", "mean"),
            ("mse", "mean"),
            ("hqq", "mean"),
            ("minmax", "mean"),
            ("aligned", False),
            ("mse", False),
            ("hqq", False),
            ("minmax", False),
        )
    },
    "int4-g32-s4": {"weights": "int4", "group_size": 32, "scale_bits": 4},
    "int4-g64-zeros": {"weights": "int4", "zero_point": "integer"},
    "int4-g64-zeros, weighted": {"weights": "int4", "zero_point": "integer", "method": "weighted"},
    "int4-g64-s8": {"weights": "int4", "scale_bits": 8},
    "nf4-g64": {"weights": "nf4"},
    "nf4-g64, no columns": {"weights": "nf4", "column_scale": False},
    "codebook4-g64": {"weights": "codebook4"},
    "codebook4-g64, no columns": {"weights": "codebook4", "column_scale": False},
    "int3-g32": {"weights": "int3"},
    "int3-g16-s4": {"weights": "int3", "group_size": 16, "scale_bits": 4},
    "int3-g64": {"weights": "int3", "group_size": 64},
    "int3-g64, aligned, mean columns": {"weights": "int3", "group_size": 64, "method": "aligned"},
    "int3-g32, minmax, no columns": {"weights": "int3", "method": "minmax", "column_scale": False},
    "codebook3-g32": {"weights": "codebook3"},
    "codebook3-g32, no columns": {"weights": "codebook3", "column_scale": False},
    "int2-g32": {"weights": "int2"},
    "int2-g16-s4": {"weights": "int2", "group_size": 16, "scale_bits": 4},
    "int2-g32, minmax, no columns": {"weights": "int2", "method": "minmax", "column_scale": False},
}


class Stored:
    """A quantizer of `yardsticks.measure` that leaves dequantized weights in the model; counts the bits."""

    def __init__(self, case: dict[str, Any], dtype: torch.dtype) -> None:
        self.case, self.dtype = case, dtype
        self.bits = 0.0

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> None:
        floats = {name: value.clone() for name, value in model.named_parameters()}
        if self.dtype == torch.float32:
            model.to(torch.bfloat16)  # so that scales take as many bits in all models
        ours(**self.case, progress=False)(model)
        size = count = 0
        for module in model.modules():
            for name, value in list(module.named_parameters(recurse=False)):
                if isinstance(value, QTensor):
                    size, count = size + value.nbytes, count + value.numel()
                    setattr(module, name, nn.Parameter(value.dequantize(torch.float32), requires_grad=False))
        quantized = {name for name, value in model.named_parameters() if value.dtype == torch.float32}
        model.to(self.dtype)
        for name, value in model.named_parameters():
            if name not in quantized:
                value.copy_(floats[name])
        self.bits = 8 * size / count


def row(case: dict[str, Any] | None) -> dict[str, Any]:
    """All figures of a case."""
    found: dict[str, Any] = {}
    for name in MODELS:
        model = load(name)
        bits = 16.0
        if case is not None:
            quantizer = Stored(case, model.dtype)
            quantizer(model)
            bits = quantizer.bits
        measured = figures(name, model, **({"asked": 0, "tokens": 1024, "window": 512} if name == "smollm2" else {}))
        found[name] = {"bits": round(bits, 3)} | {key: float(f"{value:.5g}") for key, value in measured.items()}
    return found


def seconds(case: dict[str, Any], weights: list[torch.Tensor]) -> dict[str, float]:
    """Seconds of rounding the weights of a case and by minmax without a column scale, alternating."""
    options = {key: value for key, value in case.items() if key in ("group_size", "scale_bits", "zero_point")}
    own = options | {"search": case.get("method"), "column_scale": case.get("column_scale", "default")}
    best = [float("inf")] * 2
    for _ in range(5):
        for which, how in enumerate((own, options | {"search": "minmax"})):
            start = time.perf_counter()
            for weight in weights:
                QTensor.quantize(weight, case["weights"], **how)
            best[which] = min(best[which], time.perf_counter() - start)
    return {
        "seconds": round(best[0], 4),
        "minmax_seconds": round(best[1], 4),
        "times_minmax": round(best[0] / best[1], 2),
    }


def stored() -> dict[str, Any]:
    """The results of earlier runs."""
    return json.loads(OUT.read_text(encoding="utf-8")) if OUT.exists() else {}


def keep(name: str, found: dict[str, Any]) -> None:
    """Adds a case: reads the file again, since another process may have written it, and replaces it as a whole."""
    latest = stored() | {name: found}
    part = OUT.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps({k: latest[k] for k in CASES if k in latest}, indent=1) + "\n", encoding="utf-8")
    part.replace(OUT)


def table() -> str:
    """The rows of docs/accuracy.md."""
    rows = stored()
    base = rows["float"]["smollm2"]
    lines = [
        "| weights | bits | SmolLM2, two texts | KL | MiniLM | digits | time |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in rows.items():
        if name == "float":
            continue
        chat = found["smollm2"]
        percent = [100 * chat[key] / base[key] for key in ("perplexity_eval", "perplexity_calibration")]
        shown = " / ".join(f"{value:,.0f}" if value >= 102 else f"{value:.1f}" for value in percent)
        lines.append(
            f"| {name} | {chat['bits']:.2f} | {shown} % | {chat['kl']:.3f} | {found['minilm']['one_minus_cosine']:.4f} | "
            f"{found['digits']['psnr_db']:.1f} dB | {found['time']['times_minmax']:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Runs the selected cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME", help="prefixes of names; default: all")
    parser.add_argument("--missing", action="store_true", help="skip cases that have results")
    parser.add_argument("--table", action="store_true", help="print the table of the results and stop")
    options = parser.parse_args()
    if options.table:
        print(table())
        return
    known = stored() if options.missing else {}
    cases = [name for name in CASES if name.startswith(tuple(options.only)) and name not in known]
    transformers.utils.logging.disable_progress_bar()
    block = load("smollm2").model.layers[10]
    weights = [value.detach() for value in block.parameters() if value.dim() == 2]
    bar = tqdm(cases, desc="cases", unit="case")
    for name in bar:
        bar.set_postfix_str(name)
        case = CASES[name]
        found = row(case)
        if case is not None:
            found["time"] = seconds(case, weights)
        keep(name, found | {"command": command(), "machine": machine()})
        tqdm.write(f"{name:40} {json.dumps(found)}")


if __name__ == "__main__":
    main()
