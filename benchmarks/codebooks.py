"""Codebooks of 2 to 4 bits beside integers at equal bytes: one for a tensor, one for a row, and of several weights at once.

    python benchmarks/codebooks.py --models minilm smollm2          # about an hour on one core

Float simulation, without samples: every Linear layer but the output layer is replaced by its dequantized weights. Bits count
codes, scales, codebooks (16 bits a value) and column scales. Integers and codebooks of a tensor (`int3`, `codebook3`) are
the package's own; the others are not stored by the package:

    rows=R     a codebook for R rows together (any4, arXiv:2507.04610, has R = 1); 0: one for the tensor
    width=D    an index chooses D weights at once, of D * bits bits
    even       evenly spaced values, 0 and 1 among them: with a sign, an integer with a zero point of one bit
    pinned     0 and 1 are among the values (and -1 without a sign), so zeros and the largest weight of a group are exact
    signed     the scale has the sign of the largest weight of its group, so that 1 is enough and -1 needs no code

Values are fitted by Lloyd's algorithm to weights divided by the scale of their group, each weight counted with the square of
the scale and `power` of its own magnitude; `refits` times codes, scales and values are found in turns, by least squares.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import RESULTS, write
from torch import Tensor, nn
from yardsticks.makers import minilm, smollm2_dithered

from requanto import QTensor
from requanto.data import calibration_text, eval_text
from requanto.report import LogitReference

#: weights that are assigned to vectors at a time, and vectors that values are fitted to
_CHUNK, _SAMPLED = 2**18, 2**13


@dataclass(frozen=True)
class Setting:
    """How the weights of a model are rounded; see the module."""

    bits: int
    group: int
    kind: str = "codebook"  # "codebook", or a type of the package
    scale_bits: int | None = None
    column: str | None = None  # "mean", "std" or None
    rows: int = 0
    width: int = 1
    signed: bool = False
    pinned: bool = False
    even: bool = False
    power: float = 0.0
    refits: int = 0
    method: str | None = None
    symmetric: bool | None = None

    @property
    def label(self) -> str:
        """A short name."""
        words = [self.kind if self.kind != "codebook" else f"learned {self.bits} bits", f"g{self.group}"]
        words += [f"scales {self.scale_bits} bits"] if self.scale_bits else []
        words += [f"{name}={value}" for name, value in asdict(self).items() if name in ("rows", "refits") and value]
        words += [f"width={self.width}"] if self.width > 1 else []
        words += [name for name in ("signed", "pinned", "even") if getattr(self, name)]
        words += [f"power={self.power:g}"] if self.power else []
        words += [f"columns {self.column}"] if self.column else []
        words += [self.method] if self.method else []
        words += ["symmetric"] if self.symmetric else []
        return " ".join(words)


def column_of(weight: Tensor, kind: str) -> Tensor:
    """Sizes of the columns ``[1, K]``, geometric mean 1: of rows that are divided by their own size first."""
    size = (
        (lambda x, axis: x.abs().mean(axis, keepdim=True))
        if kind == "mean"
        else (lambda x, axis: x.std(axis, keepdim=True))
    )
    found = size(weight / size(weight, 1).clamp_min(1e-12), 0).clamp_min(1e-6)
    return (found / found.log().mean().exp()).bfloat16().float()


def rounded(weight: Tensor, setting: Setting) -> tuple[Tensor, float]:
    """(dequantized weight, bits) of a float weight ``[N, K]``."""
    column = torch.ones(1, weight.shape[1]) if setting.column is None else column_of(weight, setting.column)
    extra = 0.0 if setting.column is None else 16 * weight.shape[1]
    plain = weight / column
    group = math.gcd(setting.group, weight.shape[1])
    if setting.kind != "codebook":
        options = {"scale_bits": setting.scale_bits, "search": setting.method, "symmetric": setting.symmetric}
        found = QTensor.quantize(plain.bfloat16(), setting.kind, group_size=group, **options)
        return found.dequantize(torch.float32) * column, found.nbytes * 8 + extra
    groups = plain.view(len(plain), -1, group)
    scale = groups.abs().amax(-1, keepdim=True)
    if setting.signed:
        scale = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    scale, scale_bits = stored_scale(scale, setting)
    for turn in range(setting.refits + 1):
        unit = groups / scale
        mass = scale.square() * (groups.abs() / scale.abs()).clamp_max(1).pow(setting.power)
        # Refits keep the values: those of the scales before are as good.
        if turn == 0:
            values = fit(unit.view_as(plain), mass.expand_as(unit).reshape(plain.shape), setting)
        codes = nearest(unit.view_as(plain), values, setting).view_as(groups)
        if turn < setting.refits:
            heavy = (groups.abs() / scale.abs()).clamp_max(1).pow(setting.power)
            better = (heavy * groups * codes).sum(-1, keepdim=True) / (heavy * codes.square()).sum(
                -1, keepdim=True
            ).clamp_min(1e-12)
            scale, _ = stored_scale(torch.where(better * scale > 0, better, scale), setting)
    used = plain.numel() * setting.bits + scale_bits + 16 * values.numel() + extra
    return (codes * scale).view_as(plain) * column, used


def stored_scale(scale: Tensor, setting: Setting) -> tuple[Tensor, float]:
    """The scales as stored, and their bits: 16-bit floats, or multiples of a float of the row (and a sign)."""
    if setting.scale_bits is None:
        return torch.where(scale == 0, 1.0, scale).bfloat16().float(), 16 * scale.numel()
    top = 2**setting.scale_bits - 1
    of_row = scale.abs().amax(1, keepdim=True).clamp_min(1e-30).bfloat16().float() / top
    codes = (scale.abs() / of_row).round().clamp(1, top)
    used = scale.numel() * (setting.scale_bits + setting.signed) + 16 * len(scale)
    return codes * of_row * torch.where(scale < 0, -1.0, 1.0), used


def fit(unit: Tensor, mass: Tensor, setting: Setting) -> Tensor:
    """Values ``[blocks, 2^(bits * width), width]`` for weights ``[N, K]`` that count with ``mass``."""
    if setting.even:
        half = 2 ** (setting.bits - 1)
        return ((torch.arange(2 * half, dtype=torch.float32) - (half - 1)) / half).view(1, -1, 1)
    if setting.width == 1 and setting.rows:
        return fit_rows(unit, mass, setting)
    flat, heavy = unit.reshape(-1, setting.width), mass.reshape(-1, setting.width)
    step = max(1, len(flat) // _SAMPLED)
    flat, heavy = flat[::step], heavy[::step]
    line = fit_rows(flat.reshape(1, -1), heavy.reshape(1, -1), replace(setting, rows=1, width=1))[0, :, 0]
    grid = torch.cartesian_prod(*[line] * setting.width).view(-1, setting.width)
    for _ in range(12 if setting.width > 1 else 0):
        picked = _closest(flat, grid)
        weight = torch.zeros_like(grid).index_add_(0, picked, heavy)
        total = torch.zeros_like(grid).index_add_(0, picked, heavy * flat)
        grid = torch.where(weight > 0, total / weight.clamp_min(1e-30), grid)
    return grid.unsqueeze(0)


def fit_rows(unit: Tensor, mass: Tensor, setting: Setting) -> Tensor:
    """Values ``[N / rows, 2^bits, 1]`` of least squared error, by Lloyd's algorithm from quantiles."""
    blocks = max(1, len(unit) // setting.rows)
    unit, mass = unit.reshape(blocks, -1), mass.reshape(blocks, -1)
    count = 2**setting.bits
    ordered = unit.sort(1).values
    # Quantiles of a density between that of the weights and an even one, since the best one is its cube root.
    places = (torch.arange(count, dtype=torch.float32) + 0.5) / count
    quantiles = ordered[:, (places * (unit.shape[1] - 1)).long()]
    even = ordered[:, :1] + (ordered[:, -1:] - ordered[:, :1]) * places
    values = (quantiles + even) / 2
    for _ in range(20):
        borders = (values[:, 1:] + values[:, :-1]) / 2
        picked = torch.searchsorted(borders.contiguous(), unit.contiguous())
        weight = torch.zeros_like(values).scatter_add_(1, picked, mass)
        total = torch.zeros_like(values).scatter_add_(1, picked, mass * unit)
        values = torch.where(weight > 0, total / weight.clamp_min(1e-30), values).sort(1).values
        if setting.pinned:
            values.scatter_(1, values.abs().argmin(1, keepdim=True), 0.0)
            values[:, -1] = 1.0
            values[:, 0] = values[:, 0] if setting.signed else -1.0
    return values.bfloat16().float().unsqueeze(-1)


def nearest(unit: Tensor, values: Tensor, setting: Setting) -> Tensor:
    """The values ``[N, K]`` nearest to the weights."""
    if setting.width == 1:
        rows = unit.reshape(len(values), -1)
        lines = values[..., 0].sort(1).values
        picked = torch.searchsorted(((lines[:, 1:] + lines[:, :-1]) / 2).contiguous(), rows)
        return lines.gather(1, picked).view_as(unit)
    flat = unit.reshape(-1, setting.width)
    return torch.cat(
        [values[0][_closest(part, values[0])] for part in flat.split(_CHUNK // len(values[0]) * 16)]
    ).view_as(unit)


def _closest(vectors: Tensor, values: Tensor) -> Tensor:
    return torch.addmm(values.square().sum(1) / 2, vectors, values.mT, alpha=-1).argmin(1)


# ---------------------------------------------------------------------- models


class Model:
    """A model of the choosing half, its float weights, and how far another set of weights is from them."""

    def __init__(self, model: nn.Module, distance: Callable[[], dict[str, float]]) -> None:
        self.model, self.distance = model, distance
        self.weights = {
            name: module.weight.data.clone()
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and name != "lm_head"
        }

    @torch.no_grad()
    def measure(self, setting: Setting) -> dict[str, float]:
        """Rounds all weights; returns bits a weight, relative squared error, seconds and distances."""
        bits = error = square = 0.0
        start = time.perf_counter()
        for name, weight in self.weights.items():
            found, used = rounded(weight.float(), setting)
            bits, error = bits + used, error + (found - weight.float()).square().sum().item()
            square += weight.float().square().sum().item()
            self.model.get_submodule(name).weight.data.copy_(found)
        count = sum(weight.numel() for weight in self.weights.values())
        seconds = time.perf_counter() - start
        return {"bits": bits / count, "squared_error": error / square, "seconds": seconds, **self.distance()}


def language_model(tokens: int) -> Model:
    """SmolLM2, off the grid of its file: KL divergence and perplexity on two texts."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = smollm2_dithered()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    references = [LogitReference.of(model, tokenizer, text, 512, tokens) for text in (eval_text(), calibration_text())]

    def distance() -> dict[str, float]:
        found = [reference.compare(model) for reference in references]
        return {
            "kl": sum(one["kl"] for one in found) / len(found),
            "perplexity_ratio": math.exp(sum(math.log(one["perplexity_ratio"]) for one in found) / len(found)),
        }

    return Model(model, distance)


def encoder() -> Model:
    """all-MiniLM-L6-v2: 1 - cosine of the embeddings of 64 lines of text."""
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(minilm(), dtype=torch.float32).eval()
    lines = [line.strip() for line in eval_text().split("\n") if 60 < len(line.strip()) < 400][:64]
    inputs = AutoTokenizer.from_pretrained(minilm())(
        lines, return_tensors="pt", padding=True, truncation=True, max_length=128
    )
    mask = inputs["attention_mask"].unsqueeze(-1)

    def embedded() -> Tensor:
        with torch.inference_mode():
            return (model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)

    reference = embedded()
    return Model(model, lambda: {"cosine_error": 1 - F.cosine_similarity(embedded(), reference).double().mean().item()})


MODELS: dict[str, Callable[[argparse.Namespace], Model]] = {
    "minilm": lambda arguments: encoder(),
    "smollm2": lambda arguments: language_model(arguments.tokens),
}

SETTINGS = [
    # 2.5 bits
    Setting(2, 16, "int2", 4, "std", method="weighted"),
    Setting(2, 16, "int2", 4, "std", method="mse"),
    Setting(2, 8, "codebook2", 4, "std"),
    Setting(2, 8, scale_bits=3, column="std", signed=True),
    Setting(2, 8, scale_bits=3, column="std", signed=True, refits=2),
    Setting(2, 8, scale_bits=3, column="std", signed=True, refits=2, power=1.0),
    Setting(2, 8, scale_bits=3, column="std", signed=True, pinned=True),
    Setting(2, 8, scale_bits=3, column="std", signed=True, even=True),
    # 3.5 bits
    Setting(3, 16, "int3", 4, "mean", method="weighted"),
    Setting(3, 8, "codebook3", 4, "mean"),
    Setting(3, 8, "nf3", 4, "mean"),
    Setting(3, 8, "int3", 4, "mean", method="weighted", symmetric=True),
    Setting(3, 8, scale_bits=3, column="mean", signed=True),
    Setting(3, 8, scale_bits=3, column="mean", signed=True, refits=2),
    Setting(3, 8, scale_bits=3, column="mean", signed=True, refits=1, power=1.0),
    Setting(3, 8, scale_bits=3, column="mean", signed=True, pinned=True),
    Setting(3, 8, scale_bits=3, column="mean", signed=True, even=True),
    # 3.3 bits
    Setting(3, 32, "int3", 4, "mean", method="weighted"),
    Setting(3, 16, "codebook3", 4, "mean"),
    Setting(3, 16, "nf3", 4, "mean"),
    Setting(3, 16, "int3", 4, "mean", method="weighted", symmetric=True),
    Setting(3, 16, scale_bits=3, column="mean", signed=True, pinned=True),
    # 4.3 bits
    Setting(4, 32, "int4", 4, "mean", method="weighted"),
    Setting(4, 64, "codebook4", None, "mean"),
    Setting(4, 16, "codebook4", 4, "mean"),
    Setting(4, 16, "nf4", 4, "mean"),
    Setting(4, 16, "int4", 4, "mean", method="weighted", symmetric=True),
    # a codebook of few rows, and two weights at once: on MiniLM only, where a run takes seconds rather than minutes
    Setting(3, 8, scale_bits=4, column="mean", rows=1, pinned=True),
    Setting(3, 8, scale_bits=4, column="mean", rows=32, pinned=True),
    Setting(3, 8, scale_bits=4, column="mean", pinned=True),
    Setting(3, 8, scale_bits=4, column="mean", width=2, pinned=True),
    Setting(3, 8, scale_bits=4, column="mean", width=2),
    Setting(3, 8, scale_bits=4, column="mean"),
    Setting(2, 8, scale_bits=4, column="std", width=2),
    Setting(2, 8, scale_bits=4, column="std", width=4),
    Setting(2, 8, scale_bits=4, column="std"),
]


def speeds(size: int = 2048, rounds: int = 30) -> dict[str, float]:
    """Best milliseconds of a bfloat16 GEMM with one row, one thread, by type; the types take turns."""
    weight, x = torch.randn(size, size).bfloat16(), torch.randn(1, size).bfloat16()
    kinds = [
        ("int4", 32),
        ("codebook4", 16),
        ("int3", 32),
        ("int3", 16),
        ("codebook3", 16),
        ("codebook3", 8),
        ("int2", 16),
    ]
    layers = {}
    for kind, group in kinds:
        layer = nn.Linear(size, size, bias=False, dtype=torch.bfloat16)
        found = QTensor.quantize(weight, kind, group_size=group, scale_bits=4)
        layer.weight = nn.Parameter(found, requires_grad=False)
        layers[f"{kind} g{group}"] = layer
    best = dict.fromkeys(layers, math.inf)
    with torch.no_grad():
        for _ in range(rounds):
            for name, layer in layers.items():
                start = time.perf_counter()
                layer(x)
                best[name] = min(best[name], 1e3 * (time.perf_counter() - start))
    return {name: round(value, 3) for name, value in best.items()}


def main() -> None:
    """Measures the settings on the models; finished ones are taken from the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tokens", type=int, default=512, help="of each text")
    parser.add_argument("--only", nargs="+", default=[], help="words that a setting's name must hold")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no setting after this")
    parser.add_argument("--out", type=Path, default=RESULTS / "codebooks.json")
    parser.add_argument("--speed", action="store_true", help="only the speed of what the package stores")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start = time.time()
    known = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"rows": []}
    known = {key: value for key, value in known.items() if key not in ("command", "machine")}
    rows: list[dict[str, Any]] = known["rows"]
    if arguments.speed:
        write(arguments.out, {**known, "decode_ms": speeds()})
        return
    for name in arguments.models:
        model = None
        for setting in SETTINGS:
            done = any((row["model"], row["setting"]) == (name, asdict(setting)) for row in rows)
            if (
                done
                or not all(word in setting.label for word in arguments.only)
                or time.time() - start > 60 * arguments.minutes
            ):
                continue
            model = model or MODELS[name](arguments)
            found = {key: round(value, 5) for key, value in model.measure(setting).items()}
            print(name, setting.label, found, flush=True)
            rows.append({"model": name, "name": setting.label, "setting": asdict(setting), **found})
            write(arguments.out, {**known, "tokens": arguments.tokens, "rows": rows})
    write(arguments.out, {**known, "tokens": arguments.tokens, "rows": rows})


if __name__ == "__main__":
    main()
