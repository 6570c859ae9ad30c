"""`requanto.cli.tune`: what is timed for a model. The timing itself needs a GPU."""

import json
import sys

import pytest
import torch
from torch import nn

from requanto import QTensor, qfloat8, qint8, quantize
from requanto.cli.tune import Job, jobs_of, tune_model
from requanto.linear.gpu import conditions as rules


def weight(kind, *shape, **how):
    tensor = QTensor.quantize(torch.randn(*shape, dtype=torch.bfloat16), kind, **how)
    return nn.Parameter(tensor, requires_grad=False)


def with_activations(parameter, kind=qint8):
    parameter.activation = kind
    return parameter


def model():
    made = nn.Module()
    made.a = weight("int4", 32, 256, group_size=64)
    made.b = weight("int4", 32, 256, group_size=64)  # the same entry
    made.experts = weight("int4", 3, 48, 256, group_size=128)
    made.row = weight("int8", 16, 64)
    made.dynamic = with_activations(weight("int8", 16, 64))
    made.mixed = with_activations(weight("int4", 32, 256, group_size=128))
    made.small = with_activations(weight("int4", 32, 256, group_size=64))
    made.narrow = weight("int3", 32, 256, group_size=64)
    made.coded = weight("nf4", 32, 256, group_size=64)
    made.blocks = weight("mxfp4", 32, 256)
    made.large = weight("int4", 1024, 1024, group_size=128, symmetric=True)
    made.floats = with_activations(weight("float8", 32, 64), qfloat8)
    made.far = with_activations(weight("uint8", 16, 64))  # rounded, then multiplied as floats
    made.turned = weight("int8", 64, 16, transposed=True)
    made.table = nn.Embedding(10, 64)
    made.table.weight = weight("int8", 10, 64)
    made.float = nn.Linear(4, 4)
    return made


def job(op, bits, group, n, k, kind="", affine=False, scale_dtype="float32", layout="plain"):
    return Job(op, bits, group, n, k, kind, affine, scale_dtype, layout)


JOBS = [
    job("scaled_mm", 8, None, 16, 64, layout="exec"),
    job("scaled_mm", 8, None, 32, 64, "e4m3fn", layout="exec"),
    job("w4a8_gemm", 4, 64, 32, 256, affine=True, scale_dtype="bfloat16"),
    job("w4a8_gemm", 4, 128, 32, 256, affine=True, scale_dtype="bfloat16"),
    job("wq_gemm", 3, 64, 32, 256, affine=True, scale_dtype="bfloat16"),
    job("wq_gemm", 4, 32, 32, 256, "e2m1", scale_dtype="bfloat16"),
    job("wq_gemm", 4, 64, 32, 256, affine=True, scale_dtype="bfloat16"),
    job("wq_gemm", 4, 64, 32, 256, "table", scale_dtype="bfloat16"),
    job("wq_gemm", 4, 128, 48, 256, affine=True, scale_dtype="bfloat16"),
    job("wq_gemm", 4, 128, 1024, 1024, scale_dtype="bfloat16", layout="exec"),
    job("wq_gemm", 8, None, 16, 64),
    job("wq_gemm", 8, None, 16, 64, "u8", affine=True),
]


def test_jobs_of_a_model():
    jobs, skipped = jobs_of(model())
    assert jobs == JOBS
    assert set(skipped) == {"turned"}


def test_scales_are_tuned_in_the_dtype_that_kernels_read():
    made = nn.Module()
    made.compact = weight("int4", 32, 256, group_size=64, scale_bits=6)
    made.zeros = weight("int4", 48, 256, group_size=64, zero_point="integer")
    made.sixteen = nn.Parameter(
        QTensor.quantize(torch.randn(64, 256, dtype=torch.float16), "int4", group_size=64), requires_grad=False
    )
    for dtype, expanded in ((torch.bfloat16, "bfloat16"), (torch.float16, "float32")):
        found = {job.out_features: job.scale_dtype for job in jobs_of(made, dtype)[0]}
        assert found == {32: expanded, 48: expanded, 64: "float16"}


def test_jobs_of_quantized_modules():
    made = nn.Sequential(nn.Linear(64, 16))
    quantize(made, weights=qint8, activations=qint8)
    from requanto import freeze

    freeze(made)
    assert jobs_of(made)[0] == [job("scaled_mm", 8, None, 16, 64, layout="exec")]


def test_jobs_of_a_directory_need_no_weights(tmp_path):
    from requanto.checkpoint.format import spec_text

    tensors = {
        name: spec_text(p) for name, p in model().named_parameters() if isinstance(p, QTensor) and name[0] != "t"
    }
    config = {"quantization_config": {"quant_method": "quanto", "weights": "int8", "tensors": tensors}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert jobs_of(tmp_path)[0] == JOBS


def test_without_a_gpu_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(RuntimeError, match="Kernels work without tuning"):
        tune_model(model())
    with pytest.raises(RuntimeError, match="CUDA or ROCm device, found cpu"):
        tune_model(model(), device="cpu")
    with pytest.raises(ValueError, match="holds no quantized matrix"):
        tune_model(nn.Linear(4, 4))


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """Pretends that there is a GPU with Triton, and an empty table."""
    kernels = pytest.importorskip("requanto_kernels")
    monkeypatch.setenv("REQUANTO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *index: "A GPU")
    monkeypatch.setattr(rules, "available", lambda: True)
    return kernels


def test_every_shape_is_tuned_and_kept(gpu, monkeypatch):
    calls = []

    def fake(shapes, **options):
        calls.append((shapes, options))
        options["report"]("one line")
        for _ in options["rows"]:
            options["done"]()
        return {str(len(calls)): gpu.Config()}

    monkeypatch.setattr(gpu, "tune", fake)
    lines = []
    found = tune_model(model(), rows=(1, 16), progress=False, report=lines.append)
    assert [shapes for shapes, _ in calls] == [[(j.out_features, j.in_features)] for j in JOBS]
    for one, (_, options) in zip(JOBS, calls):
        assert options["rows"] == (1, 16)
        asked = (options[name] for name in ("op", "bits", "group_size", "kind", "affine", "layout"))
        assert tuple(asked) == (one.op, one.bits, one.group_size, one.kind, one.affine, one.layout)
        assert str(options["scale_dtype"]) == f"torch.{one.scale_dtype}"
    assert (found.entries, found.path.name) == (len(JOBS), "kernels.json")
    assert lines == ["one line"] * len(JOBS)


def test_the_kernels_tune_every_job_of_a_model(gpu, monkeypatch):
    """`requanto_kernels.tune` with a clock that needs no GPU: its entries are those that layers look up."""
    config, module = gpu.config, sys.modules["requanto_kernels.tune"]
    monkeypatch.setattr(module, "arch_of", lambda device: "sm_90")
    made = module._launcher
    monkeypatch.setattr(module, "_launcher", lambda problem, m, device: made(problem, m, torch.device("cpu")))
    monkeypatch.setattr(module, "MOST_COPIES", 1)
    monkeypatch.setattr(module, "_time", lambda launch, copies, repeats, report, tile: 1.0 + tile.num_stages)
    found = tune_model(model(), rows=(1,), progress=False)
    names = config.user_entries()
    assert found.entries == len(names) == len(JOBS)
    assert "sm_90/wq_gemm/4/int/affine/bfloat16/plain/64/bfloat16/1/32x256" in names
    assert "sm_90/wq_gemm/4/int/symmetric/bfloat16/exec/128/bfloat16/1/1024x1024" in names
    assert "sm_90/wq_gemm/4/table/symmetric/bfloat16/plain/64/bfloat16/1/32x256" in names
    assert {"sm_90/scaled_mm/8/0/int8/1/16x64", "sm_90/scaled_mm/8/0/float8/1/32x64"} <= set(names)
    assert {tile.num_stages for tile in names.values()} == {1}  # the search went on to the fastest
    stored = json.loads(found.path.read_text())["entries"].values()
    assert {(entry["gpu"], entry["us"]) for entry in stored} == {("A GPU", 2000.0)}


def test_humming_is_timed_beside_the_tuned_tiles(gpu, monkeypatch):
    from requanto.cli import tune_humming as beside
    from requanto.linear.gpu import humming, humming_times

    monkeypatch.setattr(gpu, "tune", lambda shapes, **options: {})
    monkeypatch.setattr(humming, "available", lambda: True)
    monkeypatch.setattr(humming, "serves", lambda weight, dtype: weight.shape[0] >= 128)
    monkeypatch.setattr(humming, "ready", lambda weight, layout: True)
    asked = []

    def clock(x, weights, repeats):
        asked.append((weights[0].layout_name, weights[0].group_size, weights[0].affine, x.shape[0]))
        return 0.01 if weights[0].layout_name != "humming-bfloat16" else 0.007

    monkeypatch.setattr(beside, "_milliseconds", clock)
    monkeypatch.setattr(beside, "MOST_COPIES", 1)
    on_cpu = beside._weight
    monkeypatch.setattr(beside, "_weight", lambda job, dtype, device: on_cpu(job, dtype, torch.device("cpu")))
    monkeypatch.setattr(torch, "randn", lambda *shape, device=None, randn=torch.randn, **how: randn(*shape, **how))
    found = tune_model(model(), rows=(1, 16), progress=False, humming=True)
    assert found.humming == {"wq_gemm 4 bit group 128 1024x1024": True}
    assert asked == [(layout, 128, False, m) for m in (1, 16) for layout in ("exec", "humming-bfloat16")]
    (name,), (entry,) = zip(*humming_times.measured().items())
    assert name == "A GPU/qint4/128/symmetric/bfloat16/1024x1024"
    assert entry["rows"] == {"1": [10.0, 7.0], "16": [10.0, 7.0]}
    assert {"triton", "requanto", "humming-kernels"} < set(entry)
    monkeypatch.setattr(humming, "available", lambda: False)
    with pytest.raises(RuntimeError, match=r"requanto\[humming\]"):
        tune_model(model(), progress=False, humming=True)


def test_weights_of_every_job_can_be_made(gpu):
    from requanto.cli.tune_humming import _weight

    for one in JOBS:
        made = _weight(one, torch.bfloat16, torch.device("cpu"))
        if one.kind in ("table", "e2m1"):
            assert made is None
            continue
        assert (made.qtype.bits, made.affine, made.group_size) == (one.bits, one.affine, one.group_size)
        assert tuple(made.shape) == (one.out_features, one.in_features)


def test_tiles_are_exported_and_imported(gpu, tmp_path):
    from typer.testing import CliRunner

    from requanto.cli.app import app

    gpu.config.store({"a": gpu.Config()})
    run = CliRunner().invoke
    assert "exported: 1" in run(app, ["tune", "--export", str(tmp_path / "tiles.json")]).output
    gpu.config.cache_path().unlink()
    gpu.config.forget()
    done = run(app, ["tune", "--import", str(tmp_path / "tiles.json"), "--json"])
    assert json.loads(done.output) == {"imported": 1}
    assert list(gpu.config.user_entries()) == ["a"]
    assert run(app, ["tune"]).exit_code == 1
