"""Launches and cached plans, on a GPU that only the driver pretends (`fake_driver.py`)."""

import contextlib
import logging
import sys
import threading

import pytest
import torch
from fake_driver import fake_gpu, watch
from reference import weight

pytest.importorskip("triton")

import triton

from requanto_kernels import (
    _device,
    _launch,
    config,
    quant_rows,
    scaled_mm,
    w4a8_gemm,
    wq_dequant,
    wq_gemm,
    wq_gemm_dx,
)
from requanto_kernels._plan import record, traits


@pytest.fixture
def gpu():
    with fake_gpu() as found:
        yield found


def int4(n=256, k=1024, group=64, affine=True, dtype=torch.bfloat16):
    w = weight(n, k, 4, group, affine)
    return w.qdata, w.scale.to(dtype), None if w.shift is None else w.shift.to(dtype)


def arguments(launched):
    """A launch's arguments, tensors as (address, dtype)."""
    tensors = [getattr(a, "base", a) if not isinstance(a, torch.Tensor) else a for a in launched.args]
    return [(a.data_ptr(), a.dtype) if isinstance(a, torch.Tensor) else a for a in tensors]


def by_triton(monkeypatch):
    """Makes all launches Triton's own."""
    monkeypatch.setattr(_launch, "signature_of", lambda kernel: None)


CALLS = {
    "wq_gemm": lambda x, q, s, z: wq_gemm(x, q, s, z, bits=4),
    "wq_gemm fp16 scales": lambda x, q, s, z: wq_gemm(x, q, s.half(), z.half(), bits=4),
    "wq_gemm_dx": lambda x, q, s, z: wq_gemm_dx(x[:, :256], q, s, z, bits=4),
    "wq_dequant": lambda x, q, s, z: wq_dequant(q, s, z, bits=4, dtype=x.dtype),
    "quant_rows": lambda x, q, s, z: quant_rows(x)[0],
    "w4a8_gemm": lambda x, q, s, z: w4a8_gemm(*quant_rows(x), q, s, z, bits=4),
    "scaled_mm": lambda x, q, s, z: scaled_mm(*_scaled(x)),
}


def _scaled(x):
    codes, scales = quant_rows(x)
    return codes, codes[:1].expand(32, -1).contiguous(), scales, torch.ones(32)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("rows", [1, 16, 200])
def test_the_same_launch_as_triton(gpu, monkeypatch, name, rows):
    q, s, z = int4()
    x = torch.randn(rows, 1024, dtype=torch.bfloat16)
    for _ in range(3):
        CALLS[name](x, q, s, z)
    ours, gpu.launches[:] = gpu.launches[-(len(gpu.launches) // 3) :], []
    compiled = len(gpu.compiled)
    by_triton(monkeypatch)
    CALLS[name](x, q, s, z)
    assert len(gpu.compiled) == compiled  # Triton finds what `launch` made it compile
    assert [one.name for one in ours] == gpu.names()
    for mine, theirs in zip(ours, gpu.launches, strict=True):
        assert mine.grid == theirs.grid
        kept = [x.data_ptr(), q.data_ptr(), s.data_ptr(), z.data_ptr()]
        for a, b in zip(arguments(mine), arguments(theirs), strict=True):
            # Tensors that a call allocates have other addresses.
            assert a == b or (isinstance(a, tuple) and a[0] not in kept and b[0] not in kept and a[1] == b[1])


def test_what_triton_specializes_on_is_told_apart(gpu):
    q, s, z = int4()
    base = torch.randn(64 * 1024 + 64, dtype=torch.bfloat16)
    aligned, odd = base[: 4 * 1024].view(4, 1024), base[1 : 1 + 4 * 1024].view(4, 1024)
    strided = base[: 4 * 2048].view(4, 2048)[:, :1024]
    for x in (aligned, odd, strided, aligned.half(), aligned.float(), aligned[:1]):
        seen = len(gpu.compiled)
        wq_gemm(x, q, s, z, bits=4)
        by_ours = len(gpu.compiled)
        _launch.forget()
        wq_gemm(x, q, s, z, bits=4)
        assert len(gpu.compiled) == by_ours
        assert by_ours > seen or x is strided or x.data_ptr() % 16 == 0


def test_hooks_of_profilers_are_called(gpu):
    q, s, z = int4()
    x, seen = torch.randn(1, 1024, dtype=torch.bfloat16), []
    wq_gemm(x, q, s, z, bits=4)
    enter, leave = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook

    def note(metadata):
        seen.append(metadata["name"])

    enter.add(note)
    leave.add(note)
    try:
        before = len(gpu.launches)
        wq_gemm(x, q, s, z, bits=4)
        launched = gpu.names()[before:]
        assert seen == [name for name in launched for _ in range(2)]
    finally:
        enter.remove(note)
        leave.remove(note)


def test_unknown_versions_launch_through_triton(gpu, monkeypatch, caplog):
    q, s, z = int4()
    x = torch.randn(1, 1024, dtype=torch.bfloat16)
    _launch.is_known.cache_clear()
    monkeypatch.setattr(_launch, "_signatures", {})
    monkeypatch.setattr(triton, "__version__", "4.0.0")
    try:
        with caplog.at_level(logging.INFO):
            for _ in range(3):
                wq_gemm(x, q, s, z, bits=4)
        assert not _launch._compiled
        assert [r.message for r in caplog.records] == [m for m in (r.message for r in caplog.records) if "4.0.0" in m][
            :1
        ]
        with record(x=x, constants=[q, s, z]) as recording:
            out = wq_gemm(x, q, s, z, bits=4)
        plan = recording.plan(out)
        before = len(gpu.launches)
        plan(x)
        assert len(gpu.launches) == before + plan.launches
    finally:
        _launch.is_known.cache_clear()


def test_a_changed_setting_compiles_again(gpu):
    q, s, z = int4()
    x = torch.randn(1, 1024, dtype=torch.bfloat16)
    with record(x=x, constants=[q, s, z]) as recording:
        out = wq_gemm(x, q, s, z, bits=4)
    plan, seen = recording.plan(out), len(gpu.compiled)
    plan(x)
    assert len(gpu.compiled) == seen
    triton.knobs.runtime.debug = True
    try:
        plan(x)
        assert len(gpu.compiled) > seen
    finally:
        triton.knobs.runtime.debug = False


@pytest.mark.parametrize("rows", [1, 7, 100])
@pytest.mark.parametrize("bias", [False, True])
def test_a_plan_repeats_the_launches(gpu, rows, bias):
    q, s, z = int4()
    x, b = torch.randn(2, rows, 1024, dtype=torch.bfloat16), torch.randn(256) if bias else None
    with record(x=x, bias=b, constants=[q, s, z]) as recording:
        out = wq_gemm(x, q, s, z, b, bits=4)
    plan = recording.plan(out)
    recorded = gpu.launches[:]
    other, b2 = torch.randn_like(x), None if b is None else torch.randn_like(b)
    assert traits(other) == traits(x)
    gpu.launches.clear()
    got = plan(other, b2)
    assert got.shape == out.shape
    assert got.dtype == out.dtype
    assert [(one.name, one.grid) for one in gpu.launches] == [(one.name, one.grid) for one in recorded]
    swap = {x.data_ptr(): other.data_ptr(), out.data_ptr(): got.data_ptr()}
    if bias:
        swap[b.data_ptr()] = b2.data_ptr()
    fixed = [q.data_ptr(), s.data_ptr(), z.data_ptr()]
    for old, new in zip(recorded, gpu.launches, strict=True):
        for a, c in zip(arguments(old), arguments(new), strict=True):
            if isinstance(a, tuple) and a[0] in (*swap, *fixed):
                assert c == (swap.get(a[0], a[0]), a[1])
            elif not isinstance(a, tuple):
                assert a == c


def test_a_plan_only_allocates_and_launches(gpu):
    q, s, z = int4()
    x = torch.randn(1, 1024, dtype=torch.bfloat16)
    with record(x=x, constants=[q, s, z]) as recording:
        out = wq_gemm(x, q, s, z, bits=4)
    plan = recording.plan(out)
    plan(x)
    compiled = len(gpu.compiled)
    counts = watch(gpu, lambda: plan(x))
    assert len(counts.launches) == plan.launches
    assert set(counts.operators) == {"empty"}
    assert len(counts.allocations) <= 3  # the result, the workspace and the counters of a split sum
    assert len(gpu.compiled) == compiled


def test_a_call_that_computes_elsewhere_has_no_plan(gpu):
    q, s, z = int4()
    x = torch.randn(4, 1024, dtype=torch.bfloat16)
    with record(x=x, constants=[q, s, z]) as recording:
        out = wq_gemm(x * 2, q, s, z, bits=4)
    assert recording.plan(out) is None
    assert "aten.mul" in recording.problem
    with record(x=x, constants=[q, z]) as recording:
        out = wq_gemm(x, q, s, z, bits=4)
    assert recording.plan(out) is None
    assert "s_ptr" in recording.problem
    with record(x=x.t().contiguous().t(), constants=[q, s, z]) as recording:
        out = wq_gemm(x, q, s, z, bits=4)
    assert recording.plan(out) is None  # x itself was not told


def test_a_plan_of_another_device_has_that_devices_kernels(gpu, monkeypatch):
    """As in a model on several devices, whose layers run while the first one is the current device."""
    q, s, z = int4()
    x = torch.randn(1, 1024, dtype=torch.bfloat16)
    wq_gemm(x, q, s, z, bits=4)  # the first device has the kernel
    first = gpu.device
    switched(gpu, monkeypatch)
    with record(x=x, constants=[q, s, z]) as recording:
        out = wq_gemm(x, q, s, z, bits=4)
    assert gpu.device == first
    of_first = {id(one) for key, one in _launch._compiled.items() if key[2] == first}
    found = [step.compiled for step in recording.plan(out)._steps]
    assert all(found)
    assert not of_first & {id(one) for one in found}


def switched(gpu, monkeypatch):
    """All tensors are on the device after the current one from now on."""

    @contextlib.contextmanager
    def on_device(tensor):
        before, gpu.device = gpu.device, home + 1
        try:
            yield
        finally:
            gpu.device = before

    home = gpu.device
    monkeypatch.setattr(sys.modules["requanto_kernels.wq_gemm"], "on_device", on_device)


def test_a_stored_table_ends_plans(gpu):
    q, s, z = int4()
    x = torch.randn(1, 1024, dtype=torch.bfloat16)
    with record(x=x, constants=[q, s, z]) as recording:
        out = wq_gemm(x, q, s, z, bits=4)
    plan = recording.plan(out)
    assert plan.holds()
    config.forget()
    assert not plan.holds()


def test_what_is_kept_is_made_by_another_thread_and_complete(monkeypatch):
    """Another thread: what one allocates in the first call of a graph of torch.compile is the graph's memory."""
    steps = []

    class Stream:
        def __init__(self, device):
            steps.append(device)

        def synchronize(self):
            steps.append("wait")

    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    with torch.inference_mode():
        found = _device.kept(lambda: steps.append(threading.current_thread()) or torch.ones(1), torch.device("cuda:1"))
    assert steps[::2] == [torch.device("cuda:1"), "wait"]
    assert steps[1] is not threading.current_thread()
    assert not found.is_inference()
