"""Damaged checkpoints of every format at hand: an error of Requanto, whatever tensor or key is changed."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from requanto.checkpoint.foreign import readers
from requanto.checkpoint.foreign.found import ForeignCheckpoint, ForeignFloat
from requanto.checkpoint.foreign.source import FilesSource, TensorsSource
from requanto.checkpoint.foreign.translated import Translated, built, built_float
from requanto.checkpoint.format import CheckpointError

Tensors = dict[str, torch.Tensor]
Case = tuple[dict[str, Any], Tensors, dict[str, str]]
CPU = torch.device("cpu")
#: what a checkpoint may lack: older versions of SDNQ do not write the first, Nunchaku takes 1 for the others
OPTIONAL = ("zero_point_2", "wtscale", "wcscales")
VALUES = (None, 0, -5, "x", [], {}, [1], {"a": 1}, True, False, 1e30, 2**40, 1.5, "")


def gptq(folder: Path) -> Iterator[tuple[str, Case]]:
    for name, config in json.loads((folder / "configs.json").read_text()).items():
        yield name, (config, load_file(folder / f"{name}.safetensors"), {})


def bnb_files(folder: Path) -> Iterator[tuple[str, Case]]:
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    yield "4bit", (config, load_file(folder / "4bit.safetensors"), {})


def nunchaku_files(folder: Path) -> Iterator[tuple[str, Case]]:
    for name in ("qwen_int4",):
        source = FilesSource([folder / f"{name}.safetensors"])
        yield name, (readers.recognize({}, source), dict(source), dict(source.metadata))


def sdnq_files(folder: Path) -> Iterator[tuple[str, Case]]:
    for name in ("int8", "int12", "uint4_svd", "codebook_groups", "hadamard_svd_32", "scales_uint8", "mixed"):
        config = json.loads((folder / name / "config.json").read_text())
        config = {"quant_method": "sdnq", **config.get("quantization_config", config)}
        yield name, (config, load_file(folder / name / "model.safetensors"), {})


def torchao_files(folder: Path) -> Iterator[tuple[str, Case]]:
    for name in ("intx3_asym", "plain4_pre", "nvfp4", "int8_static", "tile4", "mxfp6_e2m3"):
        source = FilesSource([folder / f"{name}.safetensors"])
        yield name, ({"quant_method": "torchao"}, dict(source), dict(source.metadata))


WRITERS = (gptq, bnb_files, nunchaku_files, sdnq_files, torchao_files)


@pytest.fixture(params=WRITERS, ids=lambda writer: writer.__name__)
def cases(request: pytest.FixtureRequest, written: Callable[..., Path]) -> dict[str, Case]:
    return dict(request.param(written(request.param.__name__)))


def read(config: Any, tensors: Tensors, metadata: dict[str, str]) -> ForeignCheckpoint:
    """Reads all that is there, as a loader does."""
    source = TensorsSource(tensors, metadata)
    found = readers.scan(config, source)
    Translated(found, source)
    for name, weight in found.weights.items():
        built(name, weight, source)
    for name, one in found.floats.items():
        built_float(name, one, source)
    return found


def test_no_part_may_be_missing(cases: dict[str, Case]) -> None:
    for case, (config, tensors, metadata) in cases.items():
        found = read(config, tensors, metadata)
        made = [*found.weights.values(), *(one for one in found.floats.values() if one.reason)]
        for part in sorted({part for one in made for part in one.sources}):
            if part.endswith((*OPTIONAL, ".bias")):
                continue
            rest = {name: value for name, value in tensors.items() if name != part}
            try:
                again = read(config, rest, metadata)
            except CheckpointError:
                continue
            symmetric = part.endswith("qzeros") and again.table == found.table
            assert symmetric, f"{case}: {part} was left out, and nothing said so"


def test_damage_is_an_error_of_requanto(cases: dict[str, Case]) -> None:
    draw = random.Random(0)
    for _ in range(120):
        case = draw.choice(sorted(cases))
        config, tensors, metadata = copy.deepcopy(cases[case])
        told = _damage(config, tensors, draw)
        try:
            read(config, tensors, metadata)
        except CheckpointError:
            continue
        except Exception as error:
            raise AssertionError(f"{case}, {told}: {type(error).__name__}: {error}") from error


def _damage(config: dict[str, Any], tensors: Tensors, draw: random.Random) -> str:
    """Changes a key of the config or a tensor; says which."""
    name = draw.choice(sorted(tensors))
    value = tensors[name]
    change = draw.choice(("key", "scalar", "empty", "flat", "row", "column", "axis", "half", "dtype", "exchange"))
    if change == "key" and _keys(config):
        holder, key = draw.choice(_keys(config))
        holder[key] = copy.deepcopy(draw.choice(VALUES))
        return f"{key}={holder[key]!r}"
    if change == "exchange":
        other = draw.choice(sorted(tensors))
        tensors[name], tensors[other] = tensors[other], value
        return f"{name} and {other} exchanged"
    if change == "dtype":
        tensors[name] = torch.zeros(
            value.shape, dtype=draw.choice((torch.uint8, torch.float32, torch.int64)), device=CPU
        )
        return f"{name} as {tensors[name].dtype}"
    axis = draw.randrange(value.dim()) if value.dim() else 0
    change = "empty" if change == "key" else change
    tensors[name] = {
        "scalar": lambda: value.flatten()[:1].reshape(()),
        "empty": lambda: value[:0] if value.dim() else value,
        "flat": lambda: value.flatten(),
        "row": lambda: value[1:] if value.dim() else value,
        "column": lambda: value[..., 1:].contiguous() if value.dim() else value,
        "axis": lambda: value.unsqueeze(axis),
        "half": lambda: value.narrow(axis, 0, value.shape[axis] // 2).contiguous() if value.dim() else value,
    }[change]()
    return f"{name} {change} {tuple(tensors[name].shape)}"


def _keys(config: Any) -> list[tuple[dict, str]]:
    found = [(config, key) for key in config if key not in ("quant_method", "quant_type")]
    return found + [pair for value in config.values() if isinstance(value, dict) for pair in _keys(value)]


# ---------------------------------------------------------------------- what readers have in common


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.uint32, torch.int16])
def test_codes_are_not_loaded_as_a_weight(dtype: torch.dtype) -> None:
    source = TensorsSource({"a.weight": torch.zeros(4, 4, dtype=dtype, device=CPU)})
    with pytest.raises(CheckpointError, match=r"a\.weight is .*which are codes, and neither the config nor a tensor"):
        Translated(ForeignCheckpoint(""), source)


@pytest.mark.parametrize(
    ("name", "dropped"),
    [
        ("model.layers.0.self_attn.k_scale", True),
        ("model.layers.0.self_attn.v_proj.v_bias", True),
        ("encoder.layer.0.attention.self.q_bias", False),
        ("encoder.layer.0.attention.v_bias", False),
        ("self_attn.k_proj.bias", False),
    ],
)
def test_biases_of_attention_are_not_taken_for_those_of_a_cache(name: str, dropped: bool) -> None:
    tensors = {
        "a.weight": torch.ones(16, 32, dtype=torch.float8_e4m3fn, device=CPU),
        "a.weight_scale": torch.ones(16, 1, dtype=torch.float32, device=CPU),
        name: torch.ones(1, dtype=torch.float32, device=CPU),
    }
    weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
    group = {"targets": ["Linear"], "weights": weights}
    modelopt = {"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}
    for config in (
        {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}},
        {"quant_method": "fp8", "weight_block_size": None},
        modelopt,
    ):
        found = readers.scan(config, TensorsSource(tensors))
        assert (name in found.dropped) is dropped, config
        assert "a.weight" in found.weights


def test_other_integers_are_loaded() -> None:
    kinds = {"table.ids": torch.int64, "steps.weight": torch.int64, "mask": torch.uint8, "keep.weight": torch.bool}
    tensors = {name: torch.zeros(4, dtype=dtype, device=CPU) for name, dtype in kinds.items()}
    assert set(Translated(ForeignCheckpoint(""), TensorsSource(tensors))) == set(tensors)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: torch.full((2, 3), float("inf"), device=CPU), r"w holds NaN or Inf.*made of w\.a, w\.b"),
        (lambda: torch.zeros(3, 2, dtype=torch.float32, device=CPU), r"w becomes torch\.float32 \(3, 2\), expected"),
        (lambda: {}["key"], r"w cannot be made of w\.a, w\.b \(KeyError: 'key'\)"),
    ],
)
def test_a_dequantized_weight_is_checked(made: Callable[[], torch.Tensor], message: str) -> None:
    one = ForeignFloat(torch.Size([2, 3]), torch.float32, ("w.a", "w.b"), lambda source: made(), "it has no place")
    with pytest.raises(CheckpointError, match=message):
        built_float("w", one, TensorsSource({}))
