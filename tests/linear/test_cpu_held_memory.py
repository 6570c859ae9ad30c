"""What quantized layers take on a CPU once they have run: the bytes that are stored, 2 % more, and the scratch buffers.

Weights of which N is no multiple of 16 or K none of 32 take their padding besides, which `max_memory` counts.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import requanto
from requanto import QTensor
from requanto.linear.cpu.strips import MAX_PADDING, STRIPS, fits, padding_bytes
from requanto.runtime import buffers, pages
from requanto.runtime.pages import HUGE

STATUS = Path("/proc/self/status")
WORKSPACE = 4 * 2**20
MEASURED = ("int2", "int3", "int4", "int8")
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(autouse=True)
def library(monkeypatch):
    monkeypatch.setattr(requanto.settings, "compiled", None)
    monkeypatch.setattr(requanto.settings, "workspace_bytes", WORKSPACE)
    yield
    buffers.release()


def weights_of(model: nn.Module) -> list[QTensor]:
    return [p for p in model.parameters() if isinstance(p, QTensor)]


def stored_bytes(weight: QTensor) -> int:
    return sum(part.nbytes for part in weight._storage.parts.values())


def resident() -> int:
    """Bytes of this process that are in memory and of no file, without what malloc keeps."""
    gc.collect()
    with contextlib.suppress(AttributeError):  # another C library than GNU's
        ctypes.CDLL(None).malloc_trim(0)
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


def measure(kind: str) -> tuple[int, int]:
    """How much more memory the process takes once layers have run, and what they store, codes in whole huge pages."""
    for _ in range(2):  # the first time, torch and the library take memory of their own, and scratch buffers
        pages._range = None  # no room in a page that is there already
        before = resident()
        layers = nn.Sequential(*(nn.Linear(1024, 1024, bias=False, dtype=torch.bfloat16) for _ in range(8)))
        requanto.quantize(layers, weights=kind, progress=False)
        requanto.freeze(layers)
        stored = sum(map(stored_bytes, weights_of(layers)))
        with torch.no_grad():
            for rows in (1, 64, 1):
                layers(torch.randn(rows, 1024, dtype=torch.bfloat16))
        assert {w.layout_name for w in weights_of(layers)} == {"strips"}
        grown = resident() - before
        codes = sum(weight._storage.parts["qdata"].nbytes for weight in weights_of(layers))
        del layers
    return grown, stored + -codes % HUGE


@pytest.fixture(scope="module")
def measured():
    """Of a process that does nothing else: threads and garbage of other tests move a worker's memory at any time."""
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(not STATUS.exists(), reason="no /proc/self/status on this system")
@pytest.mark.parametrize("kind", MEASURED)
def test_memory_of_a_process(measured, kind):
    grown, stored = measured[kind]
    assert grown <= 1.02 * stored + 2**19, "the stored bytes, and plans"


HOW = {
    **{
        kind: {}
        for kind in ("int2", "int3", "int4", "int5", "int6", "int8", "uint4", "float8", "nf4", "mxfp4", "nvfp4")
    },
    "int4 g64": {"group_size": 64},
    "int4 scales in 4 bits": {"group_size": 32, "scale_bits": 4},
    "int3 columns": {"column_scale": "root"},
    "int2 low rank": {"low_rank": 4},
    "int4 rotated": {"rotation": 64},
    "codebook3": {},
}


@pytest.mark.parametrize("name", HOW)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_tensors_that_a_weight_holds(name, dtype):
    values = torch.randn(512, 256, dtype=dtype)
    weight = nn.Parameter(QTensor.quantize(values, name.split()[0], **HOW[name]), requires_grad=False)
    stored = stored_bytes(weight)
    for rows, x_dtype in itertools.product((1, 3, 70, 300), FLOATS):
        nn.functional.linear(torch.randn(rows, 256, dtype=x_dtype), weight)
        if weight.column is not None:
            weight.column.mul_(1)  # another version, of which no second copy may stay
    x = torch.randn(5, 256, dtype=dtype, requires_grad=True)
    nn.functional.linear(x, weight).sum().backward()
    nn.functional.embedding(torch.arange(7), weight)
    weight.dequantize()
    assert weight.layout_name == "strips"
    assert weight._storage.nbytes <= 1.02 * stored
    assert buffers.held_bytes() <= requanto.settings.workspace_bytes


@pytest.mark.parametrize("shape", [(320, 256), (1000, 1000), (333, 520), (4, 64, 104), (8, 40)], ids=str)
@pytest.mark.parametrize("kind", ["int2", "int3", "int4", "int8", "float8", "nf4"])
def test_padding(shape, kind):
    weight = QTensor.quantize(torch.randn(shape), kind, group_size=8 if kind != "float8" else None)
    stored, padding = weight.nbytes, padding_bytes(weight._spec)
    assert 0 <= padding <= MAX_PADDING * weight.numel() * weight.qtype.bits / 8
    if fits(weight._spec):
        weight.pack(STRIPS)
    assert weight._storage.nbytes == stored + padding


@pytest.mark.parametrize("sizes", [(1024, 1024), (1000, 1000), (520, 330)], ids=str)
def test_a_budget_holds_once_the_model_has_run(sizes):
    n, k = sizes
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(a, b, dtype=torch.bfloat16) for a, b in ((k, n), (n, k), (k, n))))
    # What one type takes exactly, so that not a byte is left.
    biases = sum(layer.bias.nbytes for layer in model)
    budget = (
        sum(QTensor.quantize(layer.weight, "int4", group_size=8, column_scale="root").nbytes for layer in model)
        + biases
    )
    types = ["int2:8", "int3:8", "int4:8"]
    requanto.quantize(model, weights="auto", max_memory=budget, candidates=types, progress=False)
    requanto.freeze(model)
    with torch.no_grad():
        for rows in (1, 40):
            model(torch.randn(rows, k, dtype=torch.bfloat16))
    assert {w.layout_name for w in weights_of(model)} == {"strips"}
    assert biases + sum(w._storage.nbytes for w in weights_of(model)) <= budget


if __name__ == "__main__":
    torch.set_num_threads(1)
    requanto.settings.workspace_bytes = WORKSPACE
    print(json.dumps({kind: measure(kind) for kind in MEASURED}))
