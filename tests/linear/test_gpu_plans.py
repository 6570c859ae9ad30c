"""Cached plans of GPU layers, on a GPU that only the driver pretends (`tests/kernels/fake_driver.py`)."""

import gc
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F

from requanto.linear import grouped_linear
from requanto.linear.gpu import layout, plans
from requanto.tensor.qtensor import QTensor

pytest.importorskip("triton")

from fake_driver import fake_gpu_layers, watch


@pytest.fixture
def gpu():
    with fake_gpu_layers() as found, torch.no_grad():
        torch.manual_seed(0)
        yield found


def parameter(kind="int4", n=256, k=512, dtype=torch.bfloat16, **how):
    return torch.nn.Parameter(QTensor.quantize(torch.randn(n, k, dtype=dtype), kind, **how), requires_grad=False)


def warm(x, weight, bias=None):
    for _ in range(2):
        F.linear(x, weight, bias)


def of_weight(gpu, weight):
    """The addresses of the weight's parts that the last launch of a GEMM got."""
    gemm = next(one for one in reversed(gpu.launches) if one.name == "wq_gemm_kernel")
    known = {part.data_ptr(): name for name, part in weight._storage.parts.items()}
    return {known[a.data_ptr()] for a in gemm.args if isinstance(a, torch.Tensor) and a.data_ptr() in known}


KINDS = {
    "int4": {"kind": "int4", "group_size": 64},
    "int8": {"kind": "int8"},
    "int8 groups": {"kind": "int8", "group_size": 64},
    "float8": {"kind": "float8_e4m3fn"},
    "nf4": {"kind": "nf4"},
    "int3": {"kind": "int3", "group_size": 64},
    "uint5": {"kind": "int5", "group_size": 32},
    "nvfp4": {"kind": "nvfp4"},
    "mxfp8": {"kind": "mxfp8_e4m3"},
    "scales in 6 bits": {"kind": "int4", "group_size": 32, "scale_bits": 6},
    "whole zero points": {"kind": "int4", "group_size": 64, "zero_point": "integer"},
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("rows", [1, 16])
def test_a_call_allocates_its_result_and_starts_the_gemm(gpu, name, rows):
    weight = parameter(**KINDS[name])
    x, bias = torch.randn(2, rows, 512, dtype=torch.bfloat16), torch.randn(256, dtype=torch.bfloat16)
    for b in (None, bias):
        warm(x, weight, b)
        compiled = len(gpu.compiled)
        counts = watch(gpu, lambda b=b: F.linear(x, weight, b))
        assert counts.launches[0] == "wq_gemm_kernel"
        assert len(counts.launches) <= 2  # a split sum
        assert set(counts.operators) == {"empty"}
        assert counts.reads == []
        assert len(gpu.compiled) == compiled
    assert F.linear(x, weight, bias).shape == (2, rows, 256)


def test_a_column_scale_costs_one_multiplication(gpu):
    weight = parameter("int4", group_size=64, column_scale=torch.rand(512) + 0.5)
    x = torch.randn(1, 512, dtype=torch.bfloat16)
    warm(x, weight)
    counts = watch(gpu, lambda: F.linear(x, weight))
    assert [one for one in counts.operators if one != "empty"] == ["mul"]
    assert counts.launches[0] == "wq_gemm_kernel"


def test_many_rows_are_dequantized_by_a_plan(gpu):
    weight = parameter()
    x = torch.randn(2048, 512, dtype=torch.bfloat16)
    warm(x, weight)
    counts = watch(gpu, lambda: F.linear(x, weight))
    assert counts.launches == ["wq_dequant_kernel"]
    assert "linear" in counts.operators


def test_other_tensors_end_the_plan(gpu):
    weight = parameter(kind="int4", group_size=64)
    x = torch.randn(1, 512, dtype=torch.bfloat16)
    warm(x, weight)
    assert {"qdata", "scale", "shift"} <= of_weight(gpu, weight)
    weight.scale = torch.rand_like(weight.scale)
    assert not weight._storage.plans
    warm(x, weight)
    F.linear(x, weight)
    assert {"qdata", "scale", "shift"} <= of_weight(gpu, weight)
    other = QTensor.quantize(torch.randn(256, 512, dtype=torch.bfloat16), "int4", group_size=64)
    weight.copy_(other)
    assert not weight._storage.plans


def test_expanded_scales_follow_changes_in_the_same_memory(gpu):
    weight = parameter(kind="int4", group_size=32, scale_bits=6)
    x = torch.randn(1, 512, dtype=torch.bfloat16)
    warm(x, weight)
    found = layout.ExpandedScales.of(weight, torch.bfloat16)
    assert found.scale.stride()[-2:] == (1, 256)
    before, at = found.scale.clone(), found.scale.data_ptr()
    weight.row_scale.mul_(2)
    F.linear(x, weight)
    assert found.scale.data_ptr() == at
    assert torch.equal(found.scale, before * 2)
    assert at in {a.data_ptr() for one in gpu.launches[-2:] for a in one.args if isinstance(a, torch.Tensor)}
    assert weight.nbytes >= sum(part.nbytes for part in weight._storage.parts.values()) + found.nbytes


def test_what_a_capture_read_keeps_its_memory(gpu, monkeypatch):
    weight = parameter(kind="int4", group_size=32, scale_bits=6)
    x = torch.randn(1, 512, dtype=torch.bfloat16)
    warm(x, weight)
    monkeypatch.setattr(plans, "capturing", lambda device: True)
    monkeypatch.setattr(layout, "capturing", lambda device: True)
    F.linear(x, weight)
    assert layout.is_pinned(weight._storage.parts["qdata"])
    found = layout.ExpandedScales.of(weight, torch.bfloat16)
    monkeypatch.undo()
    other = QTensor.quantize(torch.randn(256, 512, dtype=torch.bfloat16), "int4", group_size=32, scale_bits=6)
    weight.copy_(other)  # a replay of the graph calls no Python: the values must be there now
    assert layout.ExpandedScales.of(weight, torch.bfloat16) is found
    assert torch.equal(found.scale, other.scale.bfloat16())


def test_a_change_before_a_capture_is_not_taken_for_done(gpu, monkeypatch):
    """What a capture records has not run: new values would be missing until the first replay."""
    weight = parameter(kind="int4", group_size=32, scale_bits=6)
    x = torch.randn(1, 512, dtype=torch.bfloat16)
    warm(x, weight)
    found = layout.ExpandedScales.of(weight, torch.bfloat16)
    before = found.scale.clone()
    weight.row_scale.mul_(2)
    with monkeypatch.context() as patch:
        patch.setattr(plans, "capturing", lambda device: True)
        patch.setattr(layout, "capturing", lambda device: True)
        F.linear(x, weight)
    assert torch.equal(found.scale, before)
    assert not found.is_current()


def test_cached_values_are_allocated_by_another_thread(gpu, monkeypatch):
    """torch.compile(mode="reduce-overhead") raises for what a thread keeps of its first call's allocations."""
    threads = []
    made, table = layout.ExpandedScales._made, layout.values_of

    def noted(function):
        return lambda *args: threads.append(threading.current_thread()) or function(*args)

    monkeypatch.setattr(layout.ExpandedScales, "_made", noted(made))
    monkeypatch.setattr(layout, "values_of", noted(table))
    layout._fixed_values.cache_clear()
    for kind in ({"kind": "int4", "group_size": 32, "scale_bits": 6}, {"kind": "nf4"}):
        F.linear(torch.randn(1, 512, dtype=torch.bfloat16), parameter(**kind))
    assert len(threads) == 2
    assert threading.main_thread() not in threads


def test_the_first_call_in_a_capture_caches_no_values(gpu, monkeypatch):
    weight = parameter(kind="int4", group_size=32, scale_bits=6)
    x = torch.randn(1, 512, dtype=torch.bfloat16)
    with monkeypatch.context() as patch:
        patch.setattr(plans, "capturing", lambda device: True)
        patch.setattr(layout, "capturing", lambda device: True)
        warm(x, weight)
        assert not weight._storage.derived  # they would be computed when the graph runs
    warm(x, weight)
    assert weight._storage.derived


@pytest.mark.parametrize("name", ["strided", "unaligned", "transposed"])
def test_each_kind_of_x_has_a_plan(gpu, name):
    weight = parameter()
    base = torch.randn(8 * 1024 + 1, dtype=torch.bfloat16)
    kinds = {
        "strided": base[:8192].view(8, 1024)[:, :512],
        "unaligned": base[1:4097].view(8, 512),
        "transposed": base[:4096].view(512, 8).t(),
    }
    plain, x = base[:4096].view(8, 512), kinds[name]
    warm(plain, weight)
    warm(x, weight)
    for one in (plain, x):
        gpu.launches.clear()
        counts = watch(gpu, lambda one=one: F.linear(one, weight))
        assert set(counts.operators) == {"empty"}
        args = gpu.launches[0].args
        assert args[0].data_ptr() == one.data_ptr()
        strides = [a for a in args if isinstance(a, int)][3:5]
        assert strides == list(one.stride())


def test_a_copied_x_has_no_plan_and_says_so(gpu, caplog):
    weight = parameter()
    x = torch.randn(3, 2, 512, dtype=torch.bfloat16).transpose(0, 1)  # no view as [rows, K]
    with caplog.at_level("INFO", "requanto.linear.gpu.plans"):
        for _ in range(4):
            assert F.linear(x, weight).shape == (2, 3, 256)
    assert len(caplog.records) == 1
    assert "no cached plan" in caplog.text


def test_no_reference_cycle(gpu):
    weight = parameter(kind="int4", group_size=32, scale_bits=6)
    warm(torch.randn(1, 512, dtype=torch.bfloat16), weight)
    assert weight._storage.plans
    gc.collect()
    gc.disable()
    try:
        storage = weakref.ref(weight._storage)
        gpu.launches.clear()
        del weight
        assert storage() is None
    finally:
        gc.enable()


def test_threads_streams_and_inference_mode(gpu):
    weight = parameter()
    x = torch.randn(1, 512, dtype=torch.bfloat16)
    warm(x, weight)
    errors = []

    def work():
        try:
            with torch.inference_mode():
                for _ in range(50):
                    assert F.linear(x, weight).shape == (1, 256)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    gpu.stream = 99
    F.linear(x, weight)
    assert gpu.streams[-1] == 99


def test_gradients_and_errors_go_around_plans(gpu):
    weight = parameter()
    x = torch.randn(1, 512, dtype=torch.bfloat16)
    warm(x, weight)
    with pytest.raises(ValueError, match="bias"):
        F.linear(x, weight, torch.randn(255, dtype=torch.bfloat16))
    with torch.enable_grad():
        y = F.linear(x.clone().requires_grad_(), weight)
    assert y.requires_grad


@pytest.mark.parametrize("transposed", [False, True])
def test_fused_experts_are_two_launches(gpu, transposed):
    values = torch.randn(4, 512, 256, dtype=torch.bfloat16)
    weight = QTensor.quantize(values, "int4", transposed=transposed)
    weight.pack(layout.EXEC)
    x = torch.randn(6, 256 if not transposed else 512, dtype=torch.bfloat16)
    offsets = torch.tensor([1, 3, 3, 6], dtype=torch.int32)
    for _ in range(2):
        grouped_linear(x, weight.transpose(1, 2) if transposed else weight, offsets)
    counts = watch(gpu, lambda: grouped_linear(x, weight.transpose(1, 2) if transposed else weight, offsets))
    assert counts.launches[0] == "expert_bounds_kernel"
    assert len(counts.launches) == 2
    assert counts.reads == []
    free = {"empty", "new_zeros", "new_empty", "zero_", "fill_", "to", "transpose"}
    assert set(counts.operators) <= free  # the result's zeros, and what touches no memory


def test_a_rotated_weight_has_a_plan(gpu):
    weight = parameter("int4", rotation=True, column_scale=torch.rand(512) + 0.5)
    x = torch.randn(1, 512, dtype=torch.bfloat16)
    warm(x, weight)
    assert weight._storage.plans
    assert watch(gpu, lambda: F.linear(x, weight)).launches[0] == "wq_gemm_kernel"
