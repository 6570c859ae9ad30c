"""torch's factory functions take dtype and device from settings of the process, unless a call names them.

Transformers builds and loads a model under its dtype as the default dtype, and under the meta device.
"""

import ast
from pathlib import Path

import pytest
import torch
from ambient import default_device, default_dtype

import requanto
from requanto import QTensor
from requanto.budget.measure import MOST_WEIGHTS, rows_of
from requanto.config.config import LayerOptions
from requanto.config.plan import PlannedWeight
from requanto.tensor import exact

ROOT = Path(__file__).parents[1]
# Functions whose result is in the default dtype if the call names none; those below it are of integers only.
FLOATS = {
    *(
        "as_tensor",
        "asarray",
        "empty",
        "empty_permuted",
        "empty_strided",
        "eye",
        "full",
        "linspace",
        "logspace",
        "normal",
    ),
    *("ones", "rand", "randn", "range", "scalar_tensor", "sparse_coo_tensor", "tensor", "zeros"),
    *("bartlett_window", "blackman_window", "hamming_window", "hann_window", "kaiser_window", "Tensor", "FloatTensor"),
}
INTEGERS = {"arange", "randint", "randperm", "tril_indices", "triu_indices"}


def unnamed(source: str) -> list[tuple[int, str, str]]:
    """(line, function, what it does not name) of each factory call."""
    found = []
    for node in ast.walk(ast.parse(source)):
        call = node.func if isinstance(node, ast.Call) else None
        if not (isinstance(call, ast.Attribute) and isinstance(call.value, ast.Name) and call.value.id == "torch"):
            continue
        given = {keyword.arg for keyword in node.keywords}
        wanted = ["dtype", "device"] if call.attr in FLOATS else ["device"] if call.attr in INTEGERS else []
        if call.attr == "arange" and any(isinstance(n, ast.Constant) and isinstance(n.value, float) for n in node.args):
            wanted = ["dtype", "device"]
        if None not in given:  # **options
            found += [(node.lineno, call.attr, name) for name in wanted if name not in given]
    return found


def test_the_search_finds_what_it_looks_for():
    assert unnamed("torch.linspace(0, 1, 3, device=d)") == [(1, "linspace", "dtype")]
    assert unnamed("torch.arange(3)\ntorch.arange(0.5, 3, device=d)") == [
        (1, "arange", "device"),
        (2, "arange", "dtype"),
    ]
    assert unnamed("torch.zeros(3, dtype=a, device=d), torch.zeros(3, **like), x.zeros(3)") == []


@pytest.mark.parametrize("folder", ["src", "kernels"])
def test_every_call_names_dtype_and_device(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    found = [(str(f.relative_to(ROOT)), *call) for f in files for call in unnamed(f.read_text(encoding="utf-8"))]
    assert len(files) > 5
    assert not found, "\n".join(
        f"{name}:{line}: torch.{function}() names no {what}" for name, line, function, what in found
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [576, 575, 1023, 2049])
def test_a_budget_measures_the_same_rows_under_any_default_dtype(dtype, rows):
    """bfloat16 has 8 bits: a linspace in it repeats rows, and rounds the last one past the end."""
    length = 2 * MOST_WEIGHTS // rows
    weight = torch.arange(rows, dtype=torch.float32).unsqueeze(1).expand(rows, length)
    planned = PlannedWeight(LayerOptions("int4"), 0, False, "linear")
    expected = rows_of(weight, planned, torch.float32).values[:, 0]
    with default_dtype(dtype):
        found = rows_of(weight, planned, torch.float32).values[:, 0]
    assert torch.equal(found, expected)
    assert len(found.unique()) == len(found) < rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_budget_chooses_the_same_types_under_any_default_dtype(dtype):
    def chosen():
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            *(torch.nn.Linear(576, size, dtype=dtype) for size in (1024, 576)), torch.nn.Linear(576, 576, dtype=dtype)
        )
        torch.nn.init.normal_(model[0].weight, std=0.5)
        requanto.quantize(model, weights="auto", bits=4.3, progress=False)
        return requanto.quantization_map(model)

    expected = chosen()
    with default_dtype(dtype):
        assert chosen() == expected


@pytest.mark.parametrize("setting", [lambda: default_dtype(torch.float16), lambda: default_device("meta")])
def test_factors_and_low_rank_changes_under_any_setting(setting):
    weight = QTensor.quantize(torch.randn(512, 512, generator=torch.Generator().manual_seed(0)), "int8")
    before = weight.dequantize()
    a, b = (torch.randn(512, 2, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    with setting():
        weight.mul_(2.0**20)  # infinite in float16
        torch.testing.assert_close(weight.dequantize(), before * 2.0**20, rtol=0, atol=0)
        weight.div_(2.0**20)
        exact.assign(weight, before + a @ b.T)
    torch.testing.assert_close(weight.dequantize(), before + a @ b.T, rtol=1e-5, atol=1e-4)
