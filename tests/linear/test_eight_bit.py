"""The vendor's GEMMs of 8-bit codes: when they are chosen, and that torch takes the call. No GPU is asked."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from requanto.dtypes.qtypes import qfloat8_e4m3fn, qfloat8_e4m3fnuz, qfloat8_e5m2, qint8, quint8
from requanto.linear import linear
from requanto.linear.gpu import conditions, eight_bit
from requanto.linear.gpu import eight_bit_conditions as rules
from requanto.linear.registry import Problem, choose
from requanto.tensor.qtensor import QTensor

pytest.importorskip("triton")

from fake_driver import fake_gpu_layers, watch

ROWS = 8192
INT8 = Problem(
    device="cuda", qtype=qint8, activation=qint8, dtype=torch.bfloat16, rows=ROWS, out_features=4096, in_features=4096,
    group_size=None, affine=False,
)  # fmt: skip
FLOAT8 = replace(INT8, qtype=qfloat8_e4m3fn, activation=qfloat8_e4m3fn)
FNUZ = replace(INT8, qtype=qfloat8_e4m3fnuz, activation=qfloat8_e4m3fnuz)


@pytest.fixture
def gpu(monkeypatch):
    """Pretends that kernels run on a GPU: of NVIDIA's compute capability, or one of AMD's by name."""

    def pretend(arch):
        monkeypatch.setattr(conditions, "available", lambda: True)
        monkeypatch.setattr(conditions, "capability", lambda kind: arch if isinstance(arch, int) else 0)
        monkeypatch.setattr(rules, "rocm_arch", lambda kind: arch if isinstance(arch, str) else "")

    return pretend


def name(problem, **changes):
    return choose(replace(problem, **changes)).implementation.name


@pytest.mark.parametrize(
    ("arch", "problem"),
    [(89, FLOAT8), (90, FLOAT8), (100, FLOAT8), (103, FLOAT8), ("gfx942", FNUZ), ("gfx950", FLOAT8)],
)
def test_float8_with_many_rows_is_the_vendors(gpu, arch, problem):
    gpu(arch)
    assert name(problem) == "torch-scaled-mm"
    assert name(problem, group_size=4096) == "torch-scaled-mm"
    assert name(problem, static=True) == "torch-scaled-mm"
    from_rows = conditions.rows_for(rules.TORCH_FLOAT8_ROWS, "cuda")
    assert name(problem, rows=from_rows) == "torch-scaled-mm"
    assert name(problem, rows=from_rows - 1) == name(problem, rows=1) == "triton-scaled-mm"
    for unfit in (
        {"out_features": 4104}, {"in_features": 4104}, {"in_features": 16}, {"dtype": torch.float16},
        {"dtype": torch.float32}, {"device": "xpu"},
    ):  # fmt: skip
        assert not rules.torch_float8(replace(problem, **unfit)), unfit
    for unfit in ({"layout": "exec"}, {"affine": True}, {"transposed": True}, {"group_size": 128}):
        assert name(problem, **unfit) == "triton-rounded", unfit
    for kind in (qfloat8_e5m2, qint8, quint8):
        assert not rules.torch_float8(replace(problem, qtype=kind))
        assert not rules.torch_float8(replace(problem, activation=kind))
    # Two e5m2 operands: cuBLAS has no such GEMM.
    assert name(problem, qtype=qfloat8_e5m2, activation=qfloat8_e5m2) != "torch-scaled-mm"


@pytest.mark.parametrize(
    ("arch", "problem", "found"),
    [
        (80, FLOAT8, "triton-rounded"), (120, FLOAT8, "triton-scaled-mm"), (90, FNUZ, "triton-rounded"),
        ("gfx942", FLOAT8, "triton-rounded"), ("gfx950", FNUZ, "triton-rounded"), ("gfx1201", FLOAT8, "triton-rounded"),
        ("gfx90a", FLOAT8, "triton-rounded"), ("gfx90a", INT8, "triton-scaled-mm"), ("gfx942", INT8, "triton-scaled-mm"),
        (75, FLOAT8, "triton-rounded"), (70, FLOAT8, "gpu-dequantize"), (70, INT8, "gpu-dequantize"),
    ],
)  # fmt: skip
def test_other_gpus(gpu, arch, problem, found):
    gpu(arch)
    assert name(problem) == found


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_the_vendors_int8_gemm_is_chosen_where_a_table_says_so(gpu, monkeypatch, capability):
    gpu(capability)
    assert name(INT8) == "triton-scaled-mm"
    monkeypatch.setattr(rules, "TORCH_INT8_ROWS", ((80, 1),))
    assert name(INT8) == name(INT8, rows=17) == name(INT8, static=True) == "torch-int-mm"
    assert name(INT8, dtype=torch.float16) == name(INT8, dtype=torch.float32) == "torch-int-mm"
    for unfit in ({"rows": 16}, {"out_features": 4100}, {"in_features": 4100}, {"in_features": 2**17}):
        assert name(INT8, **unfit) in ("triton-scaled-mm", "triton-rounded"), unfit
    for unfit in ({"group_size": 128}, {"affine": True}, {"transposed": True}, {"activation": qfloat8_e4m3fn}):
        assert name(INT8, **unfit) in ("triton-w4a8", "triton-rounded"), unfit


def test_sm_75_has_no_other_integer_gemm(gpu):
    gpu(75)
    assert name(INT8) == name(INT8, rows=17) == "torch-int-mm"
    assert name(INT8, rows=16) == name(INT8, out_features=4100) == "triton-rounded"


@pytest.mark.parametrize("bias_dtype", [None, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 257])
def test_torch_takes_the_float8_call(monkeypatch, rows, scale_dtype, bias_dtype):
    """torch's own checks for CUDA, on tensors without data."""
    kind, asked = qfloat8_e4m3fn, []
    with FakeTensorMode():
        empty = lambda *shape, dtype: torch.empty(shape, dtype=dtype, device="cuda")  # noqa: E731
        x = empty(rows, 64, dtype=torch.bfloat16)
        codes, scale = empty(32, 64, dtype=kind.dtype), empty(32, 1, dtype=scale_dtype)
        monkeypatch.setattr(eight_bit, "quantized", lambda x, *_: (x.to(kind.dtype), empty(rows, dtype=torch.float32)))
        monkeypatch.setattr(eight_bit, "codes_of", lambda weight: (codes, "plain"))
        monkeypatch.setattr(eight_bit, "_is_aligned", lambda codes: True)
        monkeypatch.setattr(eight_bit, "float32_scales", lambda weight: scale.reshape(-1).float())
        call = torch._scaled_mm
        monkeypatch.setattr(torch, "_scaled_mm", lambda *args, **more: asked.append(more) or call(*args, **more))
        bias = None if bias_dtype is None else empty(32, dtype=bias_dtype)
        out = eight_bit.run_torch_scaled_mm(x, None, bias, kind)
    assert (out.shape, out.dtype) == ((rows, 32), torch.bfloat16)
    assert asked[0]["use_fast_accum"]
    assert asked[0]["bias"] is None or asked[0]["bias"].dtype == torch.bfloat16


def test_unaligned_codes_are_named_once(caplog):
    eight_bit._log_unaligned.cache_clear()
    memory = torch.zeros(16 * 64 + 1, dtype=torch.uint8)
    codes = [memory[i : i + 16 * 64].view(16, 64) for i in (0, 1)]
    assert [eight_bit._is_aligned(one) for one in (codes[0], codes[1], codes[1])] == [True, False, False]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    eight_bit._log_unaligned.cache_clear()


# ---------------------------------------------------------------------- launches, on a GPU that only the driver pretends


def layer(kind, activation, n=256, k=512, **how):
    weight = QTensor.quantize(torch.randn(n, k, dtype=torch.bfloat16), kind, **how)
    weight = QTensor._over(weight._spec.replace(activation=activation), weight._storage)
    return torch.nn.Parameter(weight, requires_grad=False)


def counted(gpu, weight, rows=16, **how):
    """What a call does once its plan is cached."""
    x = torch.randn(2, rows // 2, 512, dtype=torch.bfloat16)
    bias = torch.randn(256, dtype=torch.bfloat16)
    call = lambda: linear(x, weight, bias, **how)  # noqa: E731
    with torch.no_grad():
        for _ in range(3):
            out = call()
        assert (out.shape, out.dtype) == ((2, rows // 2, 256), torch.bfloat16)
        return watch(gpu, call)


PAIRS = {
    "int8": ("int8", qint8, {}, "scaled_mm_kernel"),
    "float8": ("float8_e4m3fn", qfloat8_e4m3fn, {}, "scaled_mm_kernel"),
    "int4": ("int4", qint8, {"group_size": 64}, "w4a8_gemm_kernel"),
    "int8 in groups": ("int8", qint8, {"group_size": 64}, "w4a8_gemm_kernel"),
    "scales in 6 bits": ("int4", qint8, {"group_size": 32, "scale_bits": 6}, "w4a8_gemm_kernel"),
    "rounded": ("int8", qfloat8_e4m3fn, {}, "wq_gemm_kernel"),
    "nf4": ("nf4", qint8, {"group_size": 64}, "wq_gemm_kernel"),
}


@pytest.mark.parametrize("column", [False, True])
@pytest.mark.parametrize("name", PAIRS)
def test_a_call_is_two_launches(name, column):
    kind, activation, how, gemm = PAIRS[name]
    if column:
        how = how | {"column_scale": torch.rand(512) + 0.5}
    with fake_gpu_layers() as gpu:
        weight = layer(kind, activation, **how)
        found = counted(gpu, weight)
        assert found.launches[:2] == ["quant_rows_kernel", gemm]
        assert len(found.launches) == 2 or gemm == "wq_gemm_kernel"  # which may sum parts in a launch of its own
        assert set(found.operators) <= {"empty", "view"}
        assert found.reads == []


@pytest.mark.parametrize("name", PAIRS)
def test_a_static_scale_is_two_launches(name):
    kind, activation, how, gemm = PAIRS[name]
    with fake_gpu_layers() as gpu:
        found = counted(gpu, layer(kind, activation, **how), input_scale=torch.tensor(0.02))
        assert found.launches[:2] == ["quant_rows_kernel", gemm]
        assert found.reads == []
        assert not {"mul", "div", "clamp", "round", "copy_", "to"} & set(found.operators)


def test_one_program_for_all_row_counts():
    with fake_gpu_layers() as gpu:
        weight = layer("int8", qint8, n=4096)
        for rows in range(144, 1040, 16):
            linear(torch.randn(rows, 512, dtype=torch.bfloat16), weight)
        assert gpu.compiled.count("scaled_mm_persistent_kernel") <= 3  # one for each tile
        assert "scaled_mm_kernel" not in gpu.compiled


@pytest.mark.parametrize("column", [False, True])
@pytest.mark.parametrize("name", ["float8", "int8"])
def test_the_vendors_gemms_are_cached_plans(monkeypatch, name, column):
    kind, activation, operator, rows = {
        "float8": ("float8_e4m3fn", qfloat8_e4m3fn, "_scaled_mm", 256),
        "int8": ("int8", qint8, "_int_mm", 32),
    }[name]
    asked = []

    def stand_in(a, b, *args, **more):
        asked.append((a, b, args, more))
        return torch.empty(a.shape[0], b.shape[1], dtype=more.get("out_dtype", torch.int32))

    monkeypatch.setattr(torch, operator, stand_in)
    monkeypatch.setattr(rules, "TORCH_INT8_ROWS", ((80, 1),))
    how = {"column_scale": torch.rand(512) + 0.5} if column else {}
    with fake_gpu_layers() as gpu:
        weight = layer(kind, activation, **how)
        found = counted(gpu, weight, rows)
        assert found.launches == ["quant_rows_kernel"] + ["rescale_kernel"] * (name == "int8")
        assert not {"mul", "_to_copy", "copy_"} & set(found.operators)
        assert found.reads == []
    a, b, args, _ = asked[-1]
    assert (a.shape, a.dtype, b.shape) == ((rows, 512), activation.dtype, (512, 256))
    assert b.data_ptr() == weight._storage.parts["qdata"].data_ptr()
    if name == "float8":
        assert [one.shape for one in args] == [(rows, 1), (1, 256)]
        assert torch.equal(args[1][0], weight.scale.float()[:, 0])
