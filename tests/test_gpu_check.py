"""`make gpu-check` without a GPU: what is missing, a dry run of every path, wrong kernels, timing, the summary."""

import importlib.util
import inspect
import json
import os
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fake_driver import fake_gpu_layers

import requanto_kernels
from requanto.linear import prepack

pytest.importorskip("triton")
pytest.importorskip("transformers")
ROOT = Path(__file__).resolve().parents[1]
FEW = {"n": 4096, "k": 14336}


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


# ---------------------------------------------------------------------- what is missing


def test_it_says_what_is_missing(part, monkeypatch, capsys):
    """No GPU, a torch that cannot use one, no Triton: said in a line each, before anything is written."""
    main = part("__main__")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for version, said in ((None, "is built without CUDA"), ("13.0", "finds none")):
        monkeypatch.setattr(torch.version, "cuda", version)
        monkeypatch.setattr(torch.version, "hip", None)
        assert main.main(["--only", "goals"]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert torch.__version__ in error
        assert "--dry" in error
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find(name))
    assert main.main(["--dry"]) == 2
    assert "has no package triton" in capsys.readouterr().err


# ---------------------------------------------------------------------- a dry run


@pytest.mark.slow
def test_a_dry_run_is_right_everywhere(tmp_path, part):
    paths = [ROOT / "src", ROOT / "kernels", ROOT / "benchmarks", os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, paths))}
    command = [sys.executable, "-m", "gpu_check", "--dry", "--out", str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = read(tmp_path / "gpu_check.jsonl")
    cases = part("cases")
    # A peer that is not installed; torch's operator on a CPU before torch 2.13.
    known = ("not compared", "RuntimeError: (scale_a.numel() == 1")
    faults = [(row["case"], row["fault"]) for row in rows if not row.get("fault", known[0]).startswith(known)]
    assert faults == []
    assert {row["family"] for row in rows} >= {case.family for case in cases.every_case()} - {"tune"}
    assert all(row["error"] < 0.01 for row in rows if row["stage"] in ("goals", "questions") and "error" in row)
    implementations = {row["kind"]: row["implementation"] for row in rows if "implementation" in row}
    assert all(name.startswith("triton") for name in implementations.values()), implementations
    assert set(implementations) == set(cases.KINDS)
    assert "Faults" in done.stdout.splitlines()[-3]
    assert (tmp_path / "gpu_check.md").read_text() in done.stdout
    assert (tmp_path / "gpu_check.png").exists() or "no plot: matplotlib" in done.stdout


def test_every_product_launches_on_a_device_of_the_goals(part, monkeypatch):
    """As the processes do that compile: the tiles of sm_90, every variant of the questions, no number computed."""
    cases, measure, place = part("cases"), part("measure"), part("weights").Place
    asked: dict[str, set] = {}
    monkeypatch.setattr(prepack, "layout_for", part("child").gpu_layout_for)
    with fake_gpu_layers() as gpu:
        measurer = measure.Measurer(place("cpu", torch.bfloat16, compiling=True))
        for case in sorted(cases.every_case(), key=lambda case: case.kind):
            if case.do != "product":
                continue
            before = len(gpu.launches)
            row = case.row() | {"n": 128, "k": 512, "m": case.m}
            assert measurer.product(row)["seconds"] > 0
            assert len(gpu.launches) > before or case.op == "vendor codes, fast sums", case.key
            asked.setdefault(case.op, set()).update(case.config)
    kernels = set(gpu.names())
    assert kernels >= {"wq_gemm_kernel", "wq_dequant_kernel", "quant_rows_kernel", "w4a8_gemm_kernel"}
    assert kernels >= {"wq_gemm_many_kernel", "scaled_mm_kernel", "scaled_mm_persistent_kernel", "rescale_kernel"}
    # A new field of the tiles is a new question.
    varied = asked["wq_gemm"] | asked["codes"]
    assert {one.name for one in fields(requanto_kernels.Config)} <= varied


def test_cases_are_told_apart_and_the_goals_come_first(part):
    cases = part("cases").every_case()
    assert len({case.key for case in cases}) == len(cases) < 700
    stages = list(dict.fromkeys(case.stage for case in cases))
    assert stages[:4] == ["ceilings", "goals", "questions", "models"]
    assert stages[-1] == "tune"
    assert list(part("cases").STAGES) == stages
    again = part("cases").Case(**{k: v for k, v in json.loads(json.dumps(cases[30].row())).items() if k != "case"})
    assert again.key == cases[30].key


# ---------------------------------------------------------------------- wrong kernels


def checked(part, call):
    expected = torch.ones(2, 3, dtype=torch.float64)
    weights = SimpleNamespace(expected=lambda x: expected)
    product = SimpleNamespace(call=call, check=None, expected=None, prepare=lambda x: x)
    return part("measure").check(weights, product, [torch.ones(2, 3)], 1e-2)


def test_the_reference_uses_no_kernel(part, monkeypatch):
    weights, cases = part("weights"), part("cases")
    monkeypatch.setattr(prepack, "layout_for", part("child").gpu_layout_for)
    for kind in cases.KINDS:
        made = weights.Weights(kind, 64, 256, weights.Place("cpu", torch.bfloat16))
        wanted = made.stored.dequantize(torch.float32).double()
        with fake_gpu_layers() as gpu:
            assert torch.allclose(made.exact, wanted, rtol=1e-6, atol=1e-7), kind
            assert gpu.launches == []
            assert made.stored.dequantize(torch.float32).shape == wanted.shape
            assert gpu.names() == ["wq_dequant_kernel"]  # as a user reads values


def test_a_wrong_kernel_is_a_fault(part):
    moving = iter([1.0, 1.001])
    assert "fault" not in checked(part, lambda x, i: torch.ones(2, 3))
    assert "wrong" in checked(part, lambda x, i: torch.ones(2, 3) * 1.02)["fault"]
    assert "error inf" in checked(part, lambda x, i: torch.full((2, 3), float("nan")))["fault"]
    assert "error inf" in checked(part, lambda x, i: torch.ones(3, 2))["fault"]
    assert "different bits" in checked(part, lambda x, i: torch.full((2, 3), next(moving)))["fault"]

    def leaves_one_out(x, i):
        out = torch.empty(2, 3)
        out[:, :2] = 1
        return out

    assert "error inf" in checked(part, leaves_one_out)["fault"]  # new memory is poisoned
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_wrong_kernel_meets_no_goal(part):
    goals = part("goals")
    row = {"stage": "goals", "op": "layer", "kind": "int4 g128", "m": 1, **FEW, "us": 5.0, "bf16_us": 20.0}
    assert goals.verdict(row, 4.0) == "MOON"
    assert goals.verdict(row, 2.7) == "goal"
    assert goals.verdict(row, 2.5) == "below"
    assert goals.verdict(row | {"fault": "wrong: error 0.5"}, 4.0) == "FAULT"
    assert goals.verdict(row | {"dry": True}, 4.0) == ""
    report = part("report")
    assert report.ratio_of(row | {"fault": "wrong"}) is None


# ---------------------------------------------------------------------- timing and steps on a device


class FakeGraph:
    """Records what is called during a capture, and calls it again when it is replayed."""

    current = None

    def __init__(self):
        self.replays = 0

    def replay(self):
        self.replays += 1


def test_graphs_are_timed(part, monkeypatch):
    timing = part("timing")
    events, graphs = [], []

    class Event:
        def __init__(self, enable_timing):
            self.when = None

        def record(self):
            self.when = time.perf_counter()
            events.append(self)

        def synchronize(self):
            assert self.when is not None

        def elapsed_time(self, other):
            return 0.1  # ms

    class Nothing:
        def __init__(self, *args):
            graphs.extend(arg for arg in args if isinstance(arg, FakeGraph))

        def __enter__(self):
            return self

        def __exit__(self, *args):
            return False

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {
        "Stream": lambda: stream, "current_stream": lambda: stream, "stream": Nothing, "synchronize": lambda: None,
        "CUDAGraph": FakeGraph, "graph": Nothing, "Event": Event,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    calls = []
    found = timing.time_calls([lambda i=i: calls.append(i) or i for i in range(3)], "cuda")
    # 100 us a replay: the second graph holds every call five times, twice 100 replays at most.
    assert found.us == pytest.approx(100 / 15)
    assert (found.spread, found.first, found.how) == (0, 0, "graph")
    assert calls.count(0) == 1 + 1 + 1 + 5
    assert len(graphs) == 2
    assert graphs[1].replays == 1 + 1 + 2 * 100

    def cannot_be_captured():
        if graphs and graphs[-1].replays == 0:
            raise RuntimeError("operation not permitted when stream is capturing")
        return "y"

    graphs.append(FakeGraph())
    with pytest.raises(RuntimeError, match="capturing"):
        timing.time_calls([cannot_be_captured], "cuda")
    timed = iter([RuntimeError("operation not permitted"), *["y"] * 1000])

    def at_first():
        value = next(timed)
        if isinstance(value, Exception):
            raise value
        return value

    found = timing.time_calls([at_first], "cuda", may_fail=True)
    assert (found.how, found.first) == ("events", "y")
    assert "not permitted" in found.row()["not_captured"]


def test_a_weight_in_the_cache_is_timed_as_if_it_were_not(part, monkeypatch):
    timing, done = part("timing"), []

    def time_calls(calls, device, may_fail=False):
        first = calls[0]()
        return timing.Timing(50.0 if first == "y" else 40.0, 0.01, first)

    monkeypatch.setattr(timing, "time_calls", time_calls)
    buffer = SimpleNamespace(sum=lambda: done.append("read"))
    found = timing.time_cold(lambda: done.append("called") or "y", "cuda", buffer)
    assert (found.us, found.how, found.first) == (10.0, "cold", "y")
    assert found.spread == pytest.approx(0.09)  # that of the difference
    assert done == ["read", "called", "read"]


@pytest.mark.parametrize("family", ["llama-8b", "flux"])
def test_a_step_reads_nothing_from_the_device(family, part, monkeypatch):
    # On the meta device there is nothing to read: what asks for a number raises, as it would break a capture.
    from transformers import masking_utils

    monkeypatch.setattr(masking_utils, "is_tracing", lambda *tensors: True)  # as it answers during a capture
    models, place = part("models"), part("weights").Place("meta", torch.bfloat16)
    monkeypatch.setattr(models, "synchronize", lambda device: None)
    monkeypatch.setattr(models, "PROMPT", 8)
    with torch.inference_mode():
        model = models.Model(family, "bf16", place)
        for name in ("step",) if family == "flux" else ("decode", "prefill"):
            step, restart = model.step(name, "graph")
            restart()
            assert step().is_meta
            assert step().is_meta


def test_tuning_is_asked_for_as_it_wants(part, monkeypatch):
    from requanto.cli import tune

    wanted, asked = inspect.signature(tune.tune_model), []

    def tune_model(*args, **keywords):
        asked.append(tune.jobs_of(wanted.bind(*args, **keywords).arguments["model"]))
        return tune.Tuned(Path(), entries=4)

    monkeypatch.setattr(tune, "tune_model", tune_model)
    runner = object.__new__(part("child").Runner)
    runner.torch, runner.measurer = torch, part("measure").Measurer(part("weights").Place("cpu", torch.bfloat16))
    for case in part("cases").tuning():
        assert runner.tune(case.row() | {"n": 128, "k": 256})["entries"] == 4
    assert all(len(jobs) + len(skipped) == 1 for jobs, skipped in asked)
    assert {job.op for jobs, _ in asked for job in jobs} >= {"wq_gemm", "w4a8_gemm", "scaled_mm"}


# ---------------------------------------------------------------------- the summary


def made_up(part):
    """Rows as a device would give them: every fourth kind fails, one model is missing."""
    generator, rows = torch.Generator().manual_seed(0), []
    cases = part("cases")
    for number, case in enumerate(cases.every_case()):
        row = case.row() | {"t": number, "s": 0.1}
        speed = 0.8 + 2 * torch.rand((), generator=generator).item()
        bf16 = max(case.n * case.k * 2 / 4.3e6, 2 * case.m * case.n * case.k / 7.9e8)
        if case.do == "ceiling":
            row |= {"rate": 4.3e12 if case.op == "copy" else 7.9e14, "us": 1.0}
        elif case.do == "device":
            row |= {"gpu": "made up", "torch": "2.11.0"}
        elif number % 37 == 5:
            row |= {"error": 0.5, "fault": "wrong: error 0.5, at most 0.01 is right"}
        elif case.do == "model":
            row |= {"us": 1e4 / speed, "all_us": 4e4 / speed}
        elif case.do == "tune":
            row |= {"entries": 4}
        else:
            work = {"bytes": case.n * case.k / 2, "flops": 2 * case.m * case.n * case.k}
            row |= {"us": max(1.0, bf16 / speed), "bf16_us": bf16, "spread": 0.01, "error": 0.002} | work
        rows.append(row)
    return rows


def test_the_summary_is_remade_from_the_file(tmp_path, part):
    file = tmp_path / "gpu_check.jsonl"
    rows = made_up(part)
    stale = rows[10] | {"fault": "an older row of the same case"}
    file.write_text("".join(json.dumps(row) + "\n" for row in [stale, *rows]))
    env = os.environ | {"PYTHONPATH": str(ROOT / "benchmarks")}
    command = [sys.executable, "-m", "gpu_check", "--summarize", str(file)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "gpu_check.md").read_text()
    assert text in done.stdout
    assert len(text) < 24_000
    assert "older row" not in text
    for words in ("4.30 TB/s", "MOON", "below", "FAULT", "int4 g64 affine", "dequantize", "llama-8b", "Goals: FAULT"):
        assert words in text, words
    assert text.index("## Best tile") < text.index("## Goals")  # the end of the output is what a remote call returns
    later = tmp_path / "later.jsonl"
    changed = [row | {"us": row["us"] / 2} if row["case"] == rows[20]["case"] else row for row in rows]
    later.write_text("".join(json.dumps(row) + "\n" for row in changed))
    said = part("report").write(later, tmp_path / "more", before=file).split("## Since the earlier run\n")[1]
    assert [line for line in said.splitlines() if rows[20]["case"] in line and "2.00x" in line]
    assert len([line for line in said.splitlines() if line.startswith("- ")]) == 1
    shares = part("report").share_of({"us": 2.0, "bytes": 4.3e6, "flops": 1.0}, {"copy": 4.3e12, "bf16": 7.9e14})
    assert shares == (pytest.approx(0.5), "mem")
