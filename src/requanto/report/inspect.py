"""Type, shape and size of each weight of a model or a directory, and the model's size in each type."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from requanto.budget.models import budget_of
from requanto.checkpoint.commit import finish_interrupted
from requanto.checkpoint.files import stored_keys
from requanto.checkpoint.foreign.directory import ForeignDirectory, open_directory, open_file, open_gguf
from requanto.checkpoint.foreign.quanto_directory import is_quanto_directory, stored_weights
from requanto.checkpoint.foreign.quanto_files import owner_of
from requanto.checkpoint.format import CheckpointError, parse_spec
from requanto.checkpoint.opening import checked_config, is_ours, read_json, stored_config
from requanto.checkpoint.save_id import KEY, check_ids
from requanto.checkpoint.weight_files import MAP_NAME, model_files
from requanto.config.config import QuantoConfig
from requanto.dtypes.qtypes import qtypes, short_name
from requanto.scales import default_group_size, fit_group_size
from requanto.scales.columns import default_column_scale
from requanto.tensor.qtensor import QTensor
from requanto.tensor.spec import WeightSpec

#: types for which `inspect` computes the size of a float model
COMPARED = ("int8", "float8", "int4", "int2")


@dataclass(frozen=True)
class WeightReport:
    """One stored weight.

    Attributes:
        name: its name in the model.
        dtype: ``"int4"`` ... or the float dtype.
        shape: shape of the weight, not of its codes.
        group_size: number of weights that share a scale; None: one scale per row, or not quantized.
        bytes: size, including scales and shifts.
        bits: mean bits per weight.
        error: relative error ``|W - W_q| / |W|``, measured when a budget chose the type; else None.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    group_size: int | None
    bytes: int
    bits: float
    error: float | None = None


@dataclass(frozen=True)
class ModelReport:
    """All weights of a model or directory, with totals."""

    weights: list[WeightReport]
    total_bytes: int
    quantized_bytes: int
    float_bytes: int
    #: type -> bytes of the model if its quantizable weights (2D or larger, still float) were quantized to that type
    would_take: dict[str, int]
    #: how a budget chose the types (`requanto.budget.Choice.record`); None: the user gave them
    budget: dict[str, Any] | None = None
    #: the format of another library, in words; empty: Requanto's, or a float model
    format: str = ""

    def why(self) -> str:
        """Returns a text about how a budget chose the types; "" if the user gave them."""
        if not self.budget:
            return ""
        (key, value) = next(iter(self.budget["asked"].items()))
        by = {"samples": "effect on the model's output for samples", "weights": "relative weight error"}
        gap = self.budget["gap"]
        proof = "the smallest possible sum" if not gap else f"within {gap:.1e} of the smallest possible sum"
        return (
            f"Types chosen for {key}={value} to minimize the sum over layers of the {by[self.budget['measured']]}; found "
            f"{proof}. Mean over all weights to quantize: {self.budget['bits']:.4g} bits per weight."
        )

    def to_json(self) -> str:
        """Returns the report as JSON text."""
        return json.dumps(asdict(self), indent=2)


def inspect_model(model: torch.nn.Module) -> ModelReport:
    """Reports on a model in memory; tied weights are counted once."""
    weights = [_of_tensor(name, parameter) for name, parameter in model.named_parameters()]
    config = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    return _with_budget(_report(weights, _linear_names(model)), budget_of(model) or getattr(config, "budget", None))


def inspect_directory(directory: str | Path) -> ModelReport:
    """Reports on a saved directory, a GGUF file or a single file of ComfyUI; only headers are read, no weights.

    Raises:
        FileNotFoundError: no directory, or no config.json or safetensors file in it.
        CheckpointError: damaged files, or a config that does not match them.
    """
    directory = Path(directory)
    if directory.suffix == ".gguf" and directory.is_file():
        return _foreign_report(open_gguf(directory))
    if directory.suffix == ".safetensors" and directory.is_file():
        return _foreign_report(open_file(directory))
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} is not a directory; expected one that save_pretrained wrote")
    finish_interrupted(directory)
    files = model_files(directory)
    if not files:
        raise FileNotFoundError(f"{directory} holds no .safetensors file; found {_listing(directory)}")
    config = _read_config(directory)
    stored = stored_config(config, directory)
    quanto = is_quanto_directory(directory)
    if is_ours(stored):
        check_ids(stored.get(KEY), files)
    elif not quanto and (foreign := open_directory(directory)) is not None:
        return _foreign_report(foreign)
    owners = {key.removesuffix("_qdata") for key in stored_keys(files) if key.endswith("_qdata")}
    found: dict[str, WeightReport] = {}
    parts: dict[str, int] = {}
    specs = stored_weights(directory) if quanto else _specs(config)
    for file in files:
        with safe_open(str(file), framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118  (not a dict)
                piece = opened.get_slice(key)
                size = _bytes(piece.get_dtype(), piece.get_shape())
                owner = owner_of(key) if quanto else _owner(key, owners)
                if owner is not None:
                    parts[owner] = parts.get(owner, 0) + size
                else:
                    found[key] = _float_report(key, piece.get_dtype(), tuple(piece.get_shape()), size)
    if len(parts) != len(specs):
        raise CheckpointError(
            f"{directory}: {MAP_NAME if quanto else 'config.json'} describes {len(specs)} quantized weights, but the files "
            f"hold {len(parts)}"
        )
    for name, size in parts.items():
        # On saving, the library may have added or removed a prefix of the name.
        spec = specs.get(name) or next((s for n, s in specs.items() if n.endswith(name) or name.endswith(n)), None)
        if spec is None:
            raise CheckpointError(f"{directory}: {name} is quantized but config.json does not describe it")
        count = max(1, torch.Size(spec["shape"]).numel())
        found[name] = WeightReport(
            name, short_name(spec["qtype"]), tuple(spec["shape"]), spec["group_size"], size, size * 8 / count
        )
    budget = stored.get("budget")
    report = _report([found[name] for name in sorted(found)], set() if quanto else None)
    return _with_budget(replace(report, format="optimum-quanto") if quanto else report, budget)


def _foreign_report(foreign: ForeignDirectory) -> ModelReport:
    """Reports on a directory that another library quantized: what its weights are in our format, and their bytes in its."""
    source, found = foreign.source, foreign.found

    def stored_bytes(names: Iterable[str]) -> int:
        headers = [source.header(name) for name in names]
        return sum(header.shape.numel() * header.dtype.itemsize for header in headers)

    weights = []
    for name, weight in found.weights.items():
        spec, size = parse_spec(weight.text, name), stored_bytes(weight.sources)
        bits = size * 8 / max(1, torch.Size(spec["shape"]).numel())
        kind = short_name(spec["qtype"])
        weights.append(WeightReport(name, kind, tuple(spec["shape"]), spec["group_size"], size, bits))
    for name, one in found.floats.items():
        size = stored_bytes(one.sources)
        kind = str(one.dtype).removeprefix("torch.")
        weights.append(WeightReport(name, kind, tuple(one.shape), None, size, size * 8 / max(1, one.shape.numel())))
    made = (*found.weights.values(), *found.floats.values())
    parts = {name for one in made for name in one.sources}
    for name in source:
        if name not in parts:
            shape, dtype = source.header(name)
            size = shape.numel() * dtype.itemsize
            kind = str(dtype).removeprefix("torch.")
            weights.append(WeightReport(name, kind, tuple(shape), None, size, 8.0 * dtype.itemsize))
    report = _report(sorted(weights, key=lambda weight: weight.name), set())
    return replace(report, format=found.format)


def _with_budget(report: ModelReport, budget: dict[str, Any] | None) -> ModelReport:
    if not budget:
        return report
    errors = {name: row[0] for name, row in budget["layers"].items()}
    weights = [replace(w, error=_named(errors, w.name.rpartition(".")[0])) for w in report.weights]
    return replace(report, weights=[w if len(w.shape) > 1 else replace(w, error=None) for w in weights], budget=budget)


def _named(values: dict[str, float], name: str) -> float | None:
    # On saving, the library may have added or removed a prefix of the name.
    if name in values:
        return values[name]
    return next((v for n, v in values.items() if n.endswith(f".{name}") or name.endswith(f".{n}")), None)


def _specs(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    stored = stored_config(config, "config.json")
    if stored.get("quant_method") != "quanto" or not is_ours(stored):
        return {}
    return {name: parse_spec(text, name) for name, text in checked_config(stored).tensors.items()}


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{directory} holds no config.json; found {_listing(directory)}")
    return read_json(path)


def _listing(directory: Path) -> str:
    return ", ".join(sorted(p.name for p in directory.iterdir())[:8]) or "nothing"


def _owner(key: str, owners: set[str]) -> str | None:
    """Returns the quantized weight (one with ``_qdata``) that a stored tensor is a part of, or None."""
    for part in QTensor.tensor_data_names:
        if key.removesuffix(f"_{part}") in owners and key.endswith(f"_{part}"):
            return key.removesuffix(f"_{part}")
    return None


_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}


def _bytes(dtype: str, shape: Iterable[int]) -> int:
    return torch.Size(shape).numel() * _BYTES.get(dtype, 1)


_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def _float_report(name: str, dtype: str, shape: tuple[int, ...], size: int) -> WeightReport:
    return WeightReport(
        name, _NAMES.get(dtype, dtype.lower()), shape, None, size, size * 8 / max(1, torch.Size(shape).numel())
    )


def _of_tensor(name: str, parameter: torch.Tensor) -> WeightReport:
    if isinstance(parameter, QTensor):
        return WeightReport(
            name,
            short_name(parameter.qtype),
            tuple(parameter.shape),
            parameter.group_size,
            parameter.nbytes,
            parameter.bits_per_weight,
        )
    size = parameter.numel() * parameter.element_size()
    dtype = str(parameter.dtype).removeprefix("torch.")
    return WeightReport(name, dtype, tuple(parameter.shape), None, size, 8.0 * parameter.element_size())


def _linear_names(model: torch.nn.Module) -> set[str]:
    from requanto.config.plan import plan

    try:
        return set(plan(model, QuantoConfig()))
    except ValueError:
        return set()


def _report(weights: list[WeightReport], quantizable: set[str] | None) -> ModelReport:
    quantized = [w for w in weights if f"q{w.dtype}" in qtypes or w.dtype == "float8"]
    total = sum(w.bytes for w in weights)
    quantized_bytes = sum(w.bytes for w in quantized)
    candidates = [w for w in weights if w not in quantized and _is_quantizable(w, quantizable)]
    would = {
        kind: total - sum(w.bytes for w in candidates) + sum(_quantized_bytes(w, kind) for w in candidates)
        for kind in COMPARED
    }
    return ModelReport(weights, total, quantized_bytes, total - quantized_bytes, would if candidates else {})


def _is_quantizable(weight: WeightReport, quantizable: set[str] | None) -> bool:
    if quantizable is not None:
        return weight.name in quantizable
    leaf, parent = weight.name.rpartition(".")[2], weight.name.rpartition(".")[0].rpartition(".")[2]
    embedding = parent in ("lm_head",) or "embed" in parent or parent in ("wte", "wpe", "shared")
    return len(weight.shape) in (2, 3) and leaf in ("weight", "gate_up_proj", "down_proj") and not embedding


def _quantized_bytes(weight: WeightReport, kind_name: str) -> int:
    from requanto.dtypes.qtypes import resolve_qtype

    kind = resolve_qtype(kind_name)
    group = fit_group_size(default_group_size(kind), weight.shape[-1], weight.name)
    shape = torch.Size(weight.shape)
    column = default_column_scale(kind, shape[-2]) is not None
    spec = WeightSpec(kind, shape, torch.float32, len(shape) - 2, group, affine=kind.affine_by_default, column=column)
    float_bytes = 4 if weight.bits > 16 else 2
    scale_bytes = 4 if group is None else float_bytes
    sizes = {part: shape.numel() for part, (shape, _dtypes) in spec.expected.items()}
    return (
        sizes["qdata"] + scale_bytes * (sizes["scale"] + sizes.get("shift", 0)) + float_bytes * sizes.get("column", 0)
    )
