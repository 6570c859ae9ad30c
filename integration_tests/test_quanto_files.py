"""The real optimum-quanto 0.2.7, in a process of its own: the same codes, scales and files, bit for bit."""

import json

import pytest
import torch
from quanto_process import run_oracle
from torch import nn

from requanto.checkpoint.foreign.quanto_files import from_qtensor, to_qtensor
from requanto.checkpoint.format import CheckpointError
from requanto.checkpoint.shards import SafetensorsFiles, save_shards
from requanto.dtypes.qtypes import qtypes
from requanto.integrations.optimum_quanto import MaxOptimizer as CompatMax
from requanto.integrations.optimum_quanto import quantize_weight
from requanto.integrations.optimum_quanto.models import core_map, core_state
from requanto.model.quantize import freeze, quantization_map, quantize
from requanto.model.requantize import requantize
from requanto.scales.optimizers import AbsmaxOptimizer, HqqOptimizer, MaxOptimizer

OPTIMIZERS = {"absmax": AbsmaxOptimizer, "max": MaxOptimizer, "hqq": HqqOptimizer}
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    out = tmp_path_factory.mktemp("oracle")
    run_oracle("_quanto_oracle.py", out)
    return torch.load(out / "cases.pt", weights_only=True)


def weight_of(shape, dtype):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def layer_with(weight):
    kind = nn.Conv2d if weight.dim() == 4 else nn.Linear
    layer = kind(weight.shape[1], weight.shape[0], *[3] * (weight.dim() == 4), bias=False, dtype=weight.dtype)
    layer.weight.data.copy_(weight)
    return layer


def own_last_axis(shape, optimizer):
    # On a convolution without groups its HQQ gives every run along the last axis a shift; the published method, and
    # Requanto, one for the row.
    return optimizer == "hqq" and len(shape) == 4 and torch.Size(shape[1:]).numel() < 128


def test_its_stored_weights_are_read_and_written_back_to_the_bit(oracle):
    assert len(oracle["cases"]) == 210
    for shape, dtype, kind, optimizer, state, values in oracle["cases"]:
        parts = {f".{key}": value for key, value in state.items()}
        tensor = to_qtensor(parts, qtypes[kind], shape)
        limit = TOLERANCE[dtype]
        torch.testing.assert_close(tensor.dequantize(), values, atol=4 * limit, rtol=limit)
        if not own_last_axis(shape, optimizer):
            same_parts(from_qtensor(tensor), parts)


def same_parts(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert value.shape == theirs[key].shape
        assert value.dtype == theirs[key].dtype
        assert torch.equal(value.view(torch.uint8) if value.dim() else value, _bytes(theirs[key]))


def _bytes(tensor):
    return tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor


def test_absmax_max_and_hqq_by_name_find_its_codes_scales_and_shifts(oracle):
    for shape, dtype, kind, optimizer, state, _ in oracle["cases"]:
        if own_last_axis(shape, optimizer):
            continue
        layer = layer_with(weight_of(shape, dtype))
        freeze(quantize(layer, weights=kind, optimizer=OPTIMIZERS[optimizer]()))
        same_parts(from_qtensor(layer.weight), {f".{key}": value for key, value in state.items()})


def test_its_integer_zero_points_are_read(oracle):
    for kind, state, values in oracle["zeropoint"]:
        tensor = to_qtensor({f".{key}": value for key, value in state.items()}, qtypes[kind], (4, 64))
        torch.testing.assert_close(tensor.dequantize(), values, atol=1e-6, rtol=1e-6)
        weight = weight_of((4, 64), torch.float32)
        scale, zero = CompatMax()(weight, qtypes[kind], 0, group_size=None, zeropoint=True)
        ours = {}
        quantize_weight(weight, qtypes[kind], 0, scale, zero).save_to_state_dict(ours, "", False)
        same_parts(ours, state)


SIZES = [(256, 32), (32, 128)]


def test_it_loads_core_directories_that_requanto_wrote(tmp_path):
    written = {}
    for kind in ("int8", "int4", "int2", "float8"):
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            model = nn.Sequential(*[nn.Linear(k, n) for k, n in SIZES]).to(dtype)
            optimizer = AbsmaxOptimizer() if kind in ("int8", "float8") else MaxOptimizer()
            freeze(quantize(model, weights=kind, optimizer=optimizer))
            directory = tmp_path / f"{kind}-{dtype}"
            save_shards(core_state(model), directory)
            (directory / "quanto_qmap.json").write_text(json.dumps(core_map(model)))
            (directory / "config.json").write_text(json.dumps({"sizes": SIZES}))
            written[directory] = model
    run_oracle("_quanto_oracle.py", tmp_path, *written)
    for directory, model in written.items():
        loaded = torch.load(directory / "loaded.pt", weights_only=True)
        assert loaded["map"] == core_map(model)
        for layer, values in zip(model, loaded["weights"], strict=True):
            limit = TOLERANCE[layer.weight.dtype]
            torch.testing.assert_close(layer.weight.dequantize(), values, atol=4 * limit, rtol=limit)
        # and back, one tensor at a time, to the bit
        with torch.device("meta"):
            empty = nn.Sequential(*[nn.Linear(k, n) for k, n in SIZES])
        requantize(empty, SafetensorsFiles(directory), core_map(model))
        assert all(torch.equal(a.weight, b.weight) for a, b in zip(empty, model, strict=True))
        assert quantization_map(empty) == quantization_map(model)


def test_a_weight_its_format_cannot_hold_is_refused_with_the_way_out():
    layer = nn.Linear(256, 8, dtype=torch.bfloat16)
    freeze(quantize(layer, weights="int4"))  # groups of 64
    with pytest.raises(CheckpointError, match="groups of 128, found 64; quantize with optimizer="):
        from_qtensor(layer.weight)
    layer = nn.Linear(256, 8, dtype=torch.bfloat16)
    freeze(quantize(layer, weights="int8"))  # scales in float32
    with pytest.raises(CheckpointError, match=r"stores them in the weight's torch\.bfloat16"):
        from_qtensor(layer.weight)
