"""Values that no quantization writes are refused, also without a digest; what quantization does write is taken."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from requanto import QTensor, qtypes
from requanto.checkpoint import CheckpointError, rebuild, spec_text
from requanto.checkpoint.values import check_values
from requanto.scales.optimizers import AbsmaxOptimizer, MaxOptimizer, quantize_as_quanto
from requanto.scales.search import valid_methods

WEIGHTS = {
    "zeros": torch.zeros(4, 64),
    "constant": torch.full((4, 64), -0.2),
    "half zeros": torch.cat([torch.zeros(4, 32), torch.ones(4, 32).cumsum(1)], 1),
    "one outlier": torch.eye(4, 64) * 3e4,
    "tiny": torch.linspace(-1, 1, 256).view(4, 64) * 1e-30,
    "subnormal": torch.linspace(-1, 1, 256).view(4, 64) * 1e-42,
    "offset": torch.linspace(300, 301, 256).view(4, 64),
    "rows of all sizes": torch.linspace(-1, 1, 256).view(4, 64) * torch.tensor([[1e-8], [1e-3], [1.0], [1e3]]),
}


BLOCKS = ["nvfp4", "mxfp4", "mxfp8_e4m3"]


def damaged(tensor, part, change):
    parts = {name: inner.clone() for name, inner in tensor.inner_tensors().items()}
    change(parts[part])
    return parts


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize(
    "kind", ["int2", "int3", "int4", "int8", "uint8", "uint1", "float8", "float8_e5m2", "nf4", "codebook4", *BLOCKS]
)
def test_what_is_written_is_taken(kind, name):
    for method in valid_methods(qtypes[f"q{kind}" if f"q{kind}" in qtypes else "qfloat8"]):
        for bits in (None,) if kind in BLOCKS else (None, 6):
            for group in (None, 16):
                tensor = QTensor.quantize(WEIGHTS[name], kind, search=method, group_size=group, scale_bits=bits)
                check_values(tensor._spec, tensor.inner_tensors(), "w")


@pytest.mark.parametrize("name", WEIGHTS)
def test_what_optimum_quanto_writes_is_taken(name):
    if name == "subnormal":
        pytest.skip("its optimizers divide by a scale that rounds to 0")
    for kind, optimizer, group in (("qint8", AbsmaxOptimizer(), None), ("qint4", MaxOptimizer(), 16)):
        tensor = quantize_as_quanto(WEIGHTS[name], qtypes[kind], optimizer, group)
        check_values(tensor._spec, tensor.inner_tensors(), "w")


@given(
    kind=st.sampled_from(["int4", "int8", "float8", "nf4", "codebook3", "uint8"]),
    value=st.sampled_from([float("nan"), float("inf"), -1.0, -1e-30, 1e30, 1e20, 0.0]),
    place=st.integers(0, 3),
)
def test_a_damaged_scale_is_refused(kind, value, place):
    torch.manual_seed(1)
    tensor = QTensor.quantize(torch.randn(4, 64), kind)
    parts = damaged(tensor, "scale", lambda scale: scale.view(-1)[place].fill_(value))
    with pytest.raises(CheckpointError, match=r"^w.*the checkpoint is damaged"):
        rebuild("w", spec_text(tensor), parts, torch.float32)


@pytest.mark.parametrize(
    ("options", "part", "value", "message"),
    [
        ({"weights": "int4"}, "shift", 1e30, "w_shift makes weights of 1e"),
        ({"weights": "int4"}, "shift", float("nan"), "w_shift holds NaN or Inf"),
        ({"weights": "codebook3"}, "codebook", float("inf"), "w_codebook holds NaN or Inf"),
        ({"weights": "codebook3"}, "codebook", 1e30, r"w_codebook holds 1e\+30"),
        (
            {"weights": "int4", "scale_bits": 6, "group_size": 16},
            "row_scale",
            -1.0,
            "w_row_scale holds the negative scale -1",
        ),
        (
            {"weights": "int4", "scale_bits": 6, "group_size": 16},
            "row_scale",
            0.0,
            "w has a scale of 0 for weights that",
        ),
        (
            {"weights": "int4", "scale_bits": 6, "group_size": 16},
            "row_scale",
            1e30,
            "w_row_scale makes weights of|w_scale makes",
        ),
        ({"weights": "nvfp4"}, "scale", 0x7F, "w_scale holds NaN among its e4m3 codes"),
        ({"weights": "nvfp4"}, "scale", 0xB8, "w_scale holds the negative scale -1"),
        ({"weights": "nvfp4"}, "scale", 0, "w has a scale of 0 for weights that"),
        ({"weights": "nvfp4"}, "row_scale", -1.0, "w_row_scale holds the negative scale -1"),
        ({"weights": "nvfp4"}, "row_scale", 0.0, "w has a scale of 0 for weights that"),
        ({"weights": "nvfp4"}, "row_scale", float("nan"), "w_row_scale holds NaN or Inf"),
        ({"weights": "nvfp4"}, "row_scale", 1e30, "w_scale makes weights of"),
        ({"weights": "mxfp4"}, "scale", 0xFF, "w_scale holds NaN among its e8m0 codes"),
        ({"weights": "mxfp8"}, "scale", 0xFE, "w_scale makes weights of"),
        ({"weights": "int4", "low_rank": 2}, "up", float("nan"), "w_up holds NaN or Inf"),
        ({"weights": "int4", "low_rank": 2}, "down", 1e30, "w_down makes weights of"),
    ],
)
def test_other_parts(options, part, value, message):
    torch.manual_seed(1)
    options = dict(options)
    tensor = QTensor.quantize(torch.randn(4, 64), options.pop("weights"), **options)
    parts = damaged(tensor, part, lambda found: found.view(-1)[0].fill_(value))
    with pytest.raises(CheckpointError, match=message):
        rebuild("w", spec_text(tensor), parts, torch.float32)
    rebuild("w", spec_text(tensor), parts, torch.float32, check_values=False)


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "mxfp8_e4m3"])
def test_codes_that_are_no_numbers(kind):
    tensor = QTensor.quantize(torch.randn(4, 64), kind)
    values = torch.arange(256, dtype=torch.uint8).view(qtypes[f"q{kind}"].dtype)
    for value in values[~torch.isfinite(values.float())]:
        parts = {name: part.clone() for name, part in tensor.inner_tensors().items()}
        parts["qdata"].view(torch.uint8)[2, 3] = value.view(torch.uint8)
        with pytest.raises(CheckpointError, match="w_qdata holds NaN among its"):
            rebuild("w", spec_text(tensor), parts, torch.float32)
        rebuild("w", spec_text(tensor), parts, torch.float32, check_codes=False)
    finite = values[torch.isfinite(values.float())]
    one = torch.full((1, 1), 127, dtype=torch.uint8) if kind in BLOCKS else torch.ones(1, 1)
    parts = {"qdata": finite.view(1, -1), "scale": one}
    rebuild("w", f"q{kind} 1x{finite.numel()}", parts, torch.float32)
