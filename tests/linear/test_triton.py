"""Which GPU kernel a problem gets, by architecture; and what happens where Triton has no driver. No GPU is asked."""

import logging
from dataclasses import replace

import pytest
import torch

from requanto.dtypes.qtypes import (
    qfloat8_e4m3fn,
    qfloat8_e5m2,
    qint3,
    qint4,
    qint5,
    qint8,
    qnf4,
    qtypes,
    quint1,
    quint7,
    quint8,
)
from requanto.linear.gpu import conditions as rules
from requanto.linear.registry import Problem, choose

BASE = Problem(
    device="cuda", qtype=qint4, activation=None, dtype=torch.bfloat16, rows=1, out_features=4096, in_features=4096,
    group_size=128, affine=False,
)  # fmt: skip
INT8 = replace(BASE, qtype=qint8, group_size=None)
FLOAT8 = replace(BASE, qtype=qfloat8_e4m3fn, group_size=None)


@pytest.fixture
def gpu(monkeypatch):
    """Pretends that kernels can run, on a GPU of the capability that the test names (0: ROCm or XPU)."""
    monkeypatch.setattr(rules, "available", lambda: True)
    return lambda capability: monkeypatch.setattr(rules, "capability", lambda kind: capability)


def name(problem, **changes):
    return choose(replace(problem, **changes)).implementation.name


@pytest.mark.parametrize("capability", [0, 80, 86, 89, 90, 100, 120])
def test_weight_only(gpu, capability):
    gpu(capability)
    half = replace(BASE, dtype=torch.float16)
    for kind in dict.fromkeys(qtypes.values()):
        for group in (None, 32, 96, 128):
            for dtype in (torch.float16, torch.float32):
                for transposed in (False, True):
                    found = name(half, qtype=kind, group_size=group, dtype=dtype, transposed=transposed)
                    assert found == "triton-wq"
    assert name(half, layout="exec") == "triton-wq"
    assert name(half, rows=100_000) == name(half, rows=100_000, transposed=True) == "triton-dequantize"
    assert name(half, rows=rules.dequantize_from("cuda", False) - 1) == "triton-wq"
    assert name(half, rows=rules.dequantize_from("cuda", False)) == "triton-dequantize"
    assert name(half, device="xpu") == name(BASE) == "triton-wq"


def test_before_sm_80_weights_are_rebuilt(gpu):
    gpu(75)
    for problem in (BASE, INT8, FLOAT8, replace(BASE, transposed=True), replace(BASE, layout="exec")):
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            assert name(problem, dtype=dtype) == "triton-dequantize"
    assert name(INT8, activation=qint8) == name(BASE, activation=qint8) == "triton-rounded"
    assert choose(BASE, grouped=True).implementation.name == "reference"  # a loop; each expert's product is as above


def test_what_no_kernel_takes(gpu):
    gpu(90)
    for layout in ("plain", "exec"):
        assert name(BASE, dtype=torch.float64, layout=layout) == "triton-dequantize"
    assert name(BASE, dtype=torch.float64, activation=qint8) == "gpu-dequantize"
    assert name(BASE, layout="onednn") == "reference"
    assert name(BASE, device="mps") == "reference"
    assert name(BASE, device="cpu") != "triton-wq"
    gpu(70)
    for kind in (qint4, qnf4, quint8):
        for changes in ({}, {"activation": qint8}, {"rows": 5000}, {"transposed": True}, {"dtype": torch.float64}):
            assert name(BASE, qtype=kind, **changes) == "gpu-dequantize"
        assert choose(replace(BASE, qtype=kind), grouped=True).implementation.name == "gpu-dequantize"


@pytest.mark.parametrize("capability", [0, 80, 89, 90])
def test_quantized_activations(gpu, capability):
    gpu(capability)
    for rows in (1, 5000):
        assert name(INT8, activation=qint8, rows=rows) == "triton-scaled-mm"
        assert name(BASE, activation=qint8, rows=rows) == "triton-w4a8"
        assert name(BASE, activation=qint8, rows=rows, layout="exec") == "triton-w4a8"
    for kind in (qfloat8_e4m3fn, qfloat8_e5m2):
        # Below sm_89 no matrix instruction multiplies float8.
        found = name(FLOAT8, qtype=kind, activation=kind)
        assert found == ("triton-scaled-mm" if capability >= 89 else "triton-rounded")
    assert name(INT8, activation=qint8, affine=True) == "triton-w4a8"
    assert name(INT8, activation=qint8, group_size=64) == "triton-w4a8"
    assert name(BASE, activation=qint8, group_size=64) == "triton-w4a8"
    for kind in (qint3, qint5, quint1, quint7):
        assert name(BASE, qtype=kind, activation=qint8, affine=True) == "triton-w4a8"
    for kind, group in ((qint3, 256), (qint3, 128), (qint4, 64), (qint4, 32)):  # also groups smaller than a block
        assert name(BASE, qtype=kind, activation=qint8, group_size=group, layout="exec") == "triton-w4a8"
    for unfit in (
        replace(BASE, activation=qint8, group_size=96),
        replace(BASE, activation=qint8, group_size=16),
        replace(BASE, activation=qint8, transposed=True),
        replace(INT8, activation=qint8, transposed=True),
        replace(INT8, activation=qint8, layout="exec"),
        replace(INT8, activation=qfloat8_e4m3fn),
        replace(FLOAT8, activation=qint8),
        replace(FLOAT8, activation=qfloat8_e4m3fn, group_size=128),
        replace(FLOAT8, activation=qfloat8_e4m3fn, layout="exec"),
        replace(INT8, activation=qint8, in_features=2**17),  # an int32 sum could overflow
        replace(INT8, qtype=quint8, activation=qint8, affine=True),  # codes up to 255 are no int8
        replace(BASE, qtype=qnf4, activation=qint8),
    ):
        assert name(unfit) == "triton-rounded"
    assert name(INT8, activation=qint8, in_features=2**17 - 8) == "triton-scaled-mm"
    assert name(BASE, activation=qint4) == "reference"  # which refuses it by name


def test_fused_experts(gpu):
    gpu(90)
    assert choose(replace(BASE, rows=5000), grouped=True).implementation.name == "triton-wq"
    assert choose(replace(BASE, dtype=torch.float64), grouped=True).implementation.name == "gpu-dequantize"


def test_without_a_driver_one_line_and_torch(monkeypatch, caplog):
    triton = pytest.importorskip("triton")

    class NoDriver:
        @property
        def active(self):
            raise RuntimeError("0 active drivers ([]). There should only be one.\nsecond line")

    monkeypatch.setattr(triton.runtime, "driver", NoDriver())
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(rules, "capability", lambda kind: 90)
    rules.available.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert [name(BASE, rows=rows) for rows in (1, 2, 3)] == ["gpu-dequantize"] * 3
        (record,) = caplog.records
        assert "0 active drivers" in record.message
        assert "\n" not in record.message
    finally:
        rules.available.cache_clear()


def test_without_triton_torch(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "triton", None)  # what an import of a missing module meets
    rules.available.cache_clear()
    try:
        assert name(BASE) == "gpu-dequantize"
    finally:
        rules.available.cache_clear()


def test_importing_requanto_does_not_import_triton():
    import subprocess
    import sys

    code = "import requanto, sys; assert 'requanto_kernels' not in sys.modules; print('ok')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "ok", done.stderr
