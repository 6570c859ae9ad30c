"""Quantization with samples, on the yardsticks that defaults are chosen on (`yardsticks.CHOOSE`).

    python benchmarks/methods.py --list
    python benchmarks/methods.py --only smollm2/codebook4 --samples 32 --length 256 --keep DIR

Samples are parts of `requanto.data.calibration_text()` (fiction). For the language model it is also one of the two texts
that are measured, which favours methods with samples there; the other, technical prose, is not in the samples. Digits are
drawn from other noise. Each case is added to benchmarks/results/methods.json when it is done, with the yardstick's figures
(`yardsticks.measure`), the float model's own, bits and time. ``--keep`` names a directory for finished blocks, from which an
interrupted case continues.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accuracy_digits import calibrate
from common import RESULTS, command, machine
from torch import nn
from transformers import AutoTokenizer
from yardsticks import CHOOSE
from yardsticks.makers import MAKERS
from yardsticks.measure import LEFT_FLOAT, figures, load

import requanto
from requanto.data import calibration_text
from requanto.methods import text_samples
from requanto.tensor.qtensor import QTensor

OUT = RESULTS / "methods.json"


@dataclass(frozen=True)
class Case:
    """A model and the keywords of `requanto.quantize`; ``method`` None: without samples."""

    model: str
    weights: str
    group: int | None
    method: str | None
    more: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name; ``--only`` takes it."""
        choices = "".join(f"+{k}={v}" for k, v in self.options.items())
        extra = "".join(f"-{k}={v}" for k, v in self.more.items())
        kind = self.weights if self.group is None else f"{self.weights}-g{self.group}"
        return f"{self.model}/{kind}{extra}/{self.method or 'nearest'}{choices}"


#: The three levels, 4.3, 3.3 and 2.5 bits in a model of 16 bits: types, groups, and bits of scales.
LEVELS = (
    *(("int4", 64, 8), ("int4", 32, 4), ("codebook4", 16, 4)),
    *(("int3", 32, 4), ("codebook3", 16, 4)),
    *(("int2", 16, 4), ("codebook2", 8, 4)),
)
COLUMNS: tuple[dict[str, Any], ...] = ({"column_scale": True}, {"column_scale": False})
PLAIN = {"correct": False, "sequential": False, "rounds": 0, "damping": 0.01, "order": "none"}
CASES = [
    Case(model, weights, group, method, {"scale_bits": bits, **column}, options)
    for model in CHOOSE["models"]
    for weights, group, bits in LEVELS
    for column in COLUMNS
    for method, options in (
        (None, {}),
        ("gptq", {}),
        ("gptq", PLAIN),
        ("gptq", {"damping": 0.1, "rounds": 3}),
        ("awq", {}),
        ("signround", {"iterations": 40, "batch": 2}),
    )
]
CASES += [
    Case(model, "auto", None, "gptq", {"bits": bits, "scale_bits": 4, "column_scale": True})
    for model in CHOOSE["models"]
    for bits in (4.3, 3.3, 2.55)
]
# Inputs of 8 bits: nothing, SmoothQuant, and SmoothQuant with a low-rank term (SVDQuant).
CASES += [
    Case(model, "int4", 64, method, {"activations": "int8", **low_rank})
    for model in ("smollm2", "minilm")
    for method, low_rank in ((None, {}), ("gptq", {}), ("smoothquant", {}), ("smoothquant", {"low_rank": 32}))
]


def calibration(name: str, samples: int, length: int) -> Any:
    """Samples of a yardstick: pieces of text, or a function that draws digits."""
    if name == "digits":
        return calibrate
    return text_samples(AutoTokenizer.from_pretrained(MAKERS[name]()), calibration_text(), samples, length)


def run(case: Case, samples: int, length: int, keep: Path | None) -> dict[str, Any]:
    """Runs one case, from loading to the measurement."""
    model = load(case.model)
    names = {name for name, _ in model.named_modules()}
    options = {"exclude": [name for name in LEFT_FLOAT if name in names], **case.more}
    if case.group is not None:
        options["group_size"] = case.group
    start = time.process_time()
    if case.method is None:
        requanto.quantize(model, case.weights, **options)
        requanto.freeze(model)
    else:
        requanto.quantize(
            model,
            case.weights,
            calibration=calibration(case.model, samples, length),
            method=case.method,
            method_options=case.options,
            resume=None if keep is None else keep / case.name.replace("/", "_"),
            **options,
        )
    seconds = time.process_time() - start
    quantized = [p for p in model.parameters() if isinstance(p, QTensor)]
    # As in a checkpoint: after a run, int4 weights may be prepacked.
    stored = sum(part.nbytes for p in quantized for part in p.inner_tensors().values())
    bits = 8 * stored / sum(p.numel() for p in quantized)
    if case.more.get("activations") is None:
        for module in model.modules():
            if isinstance(module._parameters.get("weight"), QTensor):
                module.weight = nn.Parameter(module.weight.dequantize(), requires_grad=False)
    return {
        **figures(case.model, model, **({"asked": 0} if case.model == "smollm2" else {})),
        "bits_per_weight": round(bits, 4),
        "cpu_seconds": round(seconds, 1),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "samples": samples if case.method else 0,
        "length": length if case.method else 0,
        "options": case.options,
        "command": command(),
    }


def main() -> None:
    """Runs the selected cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="name of a case, or prefix of several")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--keep", type=Path, help="directory for finished blocks")
    options = parser.parse_args()
    cases = [case for case in CASES if options.only is None or case.name == options.only]
    cases = cases or [case for case in CASES if case.name.startswith(options.only or "")]
    if options.list or not cases:
        print("\n".join(case.name for case in (cases or CASES)))
        raise SystemExit(0 if cases else f"no case is called {options.only!r}")
    for number, case in enumerate(cases, 1):
        print(f"[{number}/{len(cases)}] {case.name}", flush=True)
        float_name = f"{case.model}/float"
        stored = json.loads(OUT.read_text(encoding="utf-8")) if OUT.exists() else {}
        whole = stored.get(float_name)
        if whole is None:
            sizes = {"asked": 0} if case.model == "smollm2" else {}
            whole = {**figures(case.model, load(case.model), **sizes), "command": command()}
        found = run(case, options.samples, options.length, options.keep)
        for key in [key for key in found if key.startswith("perplexity")]:
            found[f"percent{key.removeprefix('perplexity')}"] = round(100 * found[key] / whole[key], 1)
        whole = {key: value for key, value in whole.items() if value != float("inf")}  # of equal images; JSON has none
        print(json.dumps(found), flush=True)
        # Another process may have added a case meanwhile.
        latest = json.loads(OUT.read_text(encoding="utf-8")) if OUT.exists() else {}
        latest |= {float_name: whole, case.name: found, "machine": machine()}
        OUT.write_text(json.dumps(dict(sorted(latest.items())), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
