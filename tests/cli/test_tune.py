"""`requanto.cli.tune`: what is timed for a model. The timing itself needs a GPU."""

import json

import pytest
import torch
from torch import nn

from requanto import QTensor, qint8, quantize
from requanto.cli.tune import Job, jobs_of, tune_model
from requanto.linear.gpu import conditions as rules


def weight(kind, *shape, **how):
    tensor = QTensor.quantize(torch.randn(*shape), kind, **how)
    return nn.Parameter(tensor, requires_grad=False)


def with_activations(parameter):
    parameter.activation = qint8
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
    made.coded = weight("nf4", 32, 256)  # as int4
    made.far = with_activations(weight("uint8", 16, 64))
    made.turned = weight("int8", 64, 16, transposed=True)
    made.table = nn.Embedding(10, 64)
    made.table.weight = weight("int8", 10, 64)
    made.float = nn.Linear(4, 4)
    return made


JOBS = [
    Job("scaled_mm", 8, None, 16, 64),
    Job("w4a8_gemm", 4, 128, 32, 256),
    Job("wq_gemm", 3, 64, 32, 256),
    Job("wq_gemm", 4, 64, 32, 256),
    Job("wq_gemm", 4, 128, 48, 256),
    Job("wq_gemm", 8, None, 16, 64),
]


def test_jobs_of_a_model():
    jobs, skipped = jobs_of(model())
    assert jobs == JOBS
    assert set(skipped) == {"small", "turned", "coded", "far"}


def test_jobs_of_quantized_modules():
    made = nn.Sequential(nn.Linear(64, 16))
    quantize(made, weights=qint8, activations=qint8)
    from requanto import freeze

    freeze(made)
    assert jobs_of(made)[0] == [Job("scaled_mm", 8, None, 16, 64)]


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


def test_every_shape_is_tuned_and_kept(monkeypatch, tmp_path):
    kernels = pytest.importorskip("requanto_kernels")
    monkeypatch.setenv("REQUANTO_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(rules, "available", lambda: True)
    calls = []

    def fake(shapes, **options):
        calls.append((shapes, options))
        options["report"]("one line")
        return {str(len(calls)): kernels.Config()}

    monkeypatch.setattr(kernels, "tune", fake)
    lines = []
    found = tune_model(model(), rows=(1, 16), progress=False, report=lines.append)
    assert [shapes for shapes, _ in calls] == [[(j.out_features, j.in_features)] for j in JOBS]
    assert all(options["rows"] == (1, 16) for _, options in calls)
    assert (found.entries, found.path) == (len(JOBS), tmp_path / "kernels.json")
    assert lines == ["one line"] * len(JOBS)
