"""``requanto tune MODEL``: finds the fastest kernel tiles for a model's layers on this GPU and stores them on disk.

Kernels never time anything themselves. Without tuning, they use the tiles that ship with them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from requanto.checkpoint.format import parse_spec
from requanto.config.config import QuantoConfig
from requanto.dtypes.qtypes import qtype
from requanto.linear.gpu import conditions as rules
from requanto.linear.registry import Problem
from requanto.tensor.qtensor import QTensor

#: Numbers of rows (tokens) to time: decoding, small batches, prompts.
ROWS = (1, 16, 64, 256, 1024, 4096)


@dataclass(frozen=True, order=True)
class Job:
    """One shape to tune: all layers of this shape use the same tiles for a given number of rows."""

    op: str
    bits: int
    group_size: int | None
    out_features: int
    in_features: int


@dataclass
class Tuned:
    """Result of `tune_model`.

    Attributes:
        path: the file of tiles, which every later process reads.
        entries: number of entries written.
        jobs: the shapes that were timed.
        skipped: parameter -> why it is not tuned.
        seconds: duration of the run.
    """

    path: Path
    entries: int = 0
    jobs: list[Job] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


def tune_model(
    model: nn.Module | str | Path,
    *,
    rows: Iterable[int] = ROWS,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
    repeats: int = 20,
    progress: bool = True,
    report: Callable[[str], object] | None = None,
) -> Tuned:
    """Times tiles for each shape of the model's quantized layers (`requanto_kernels.tune`).

    The results of each shape are written before the next shape starts: an interrupted run loses one shape.

    Args:
        model: a quantized model, its directory or its name on the hub; of a directory only config.json is read.
        rows: numbers of rows (tokens) of a GEMM to tune for.
        dtype: of the activations.
        device: the GPU, ``"cuda"`` also for ROCm.
        repeats: timed launches per tile.
        progress: show a progress bar.
        report: called with a line of text for each result; None: not called.

    Raises:
        RuntimeError: no GPU, or Triton does not work on it.
        ValueError: no weight of the model is quantized.
    """
    jobs, skipped = jobs_of(model)
    if not jobs and not skipped:
        raise ValueError(f"{_name(model)} holds no quantized matrix; quantize it first (requanto quantize MODEL OUT)")
    _require_gpu(torch.device(device))
    from requanto_kernels import tune
    from requanto_kernels.config import cache_path

    started = time.monotonic()
    found = Tuned(cache_path(), jobs=jobs, skipped=skipped)
    rows = tuple(rows)
    with tqdm(jobs, desc="tuning", unit="shape", disable=not progress) as bar:
        for job in bar:
            bar.set_postfix_str(f"{job.op} {job.bits} bit {job.out_features}x{job.in_features}")
            winners = tune(
                [(job.out_features, job.in_features)],
                op=job.op,
                bits=job.bits,
                group_size=job.group_size,
                rows=rows,
                dtype=dtype,
                device=device,
                repeats=repeats,
                report=report or (lambda line: None),
            )
            found.entries += len(winners)
    found.seconds = time.monotonic() - started
    return found


def jobs_of(model: nn.Module | str | Path) -> tuple[list[Job], dict[str, str]]:
    """Returns (distinct shapes to time, {parameter: why it is not tuned})."""
    jobs: set[Job] = set()
    skipped: dict[str, str] = {}
    for name, problem in _problems(model):
        job = _job(problem)
        if isinstance(job, Job):
            jobs.add(job)
        else:
            skipped[name] = job
    return sorted(
        jobs, key=lambda job: (job.op, job.bits, job.group_size or 0, job.out_features, job.in_features)
    ), skipped


def _problems(model: nn.Module | str | Path) -> Iterator[tuple[str, Problem]]:
    """Yields (name, problem with one row) for every quantized matrix or stack of experts."""
    if isinstance(model, nn.Module):
        for prefix, module in model.named_modules():
            own = getattr(module, "activation_qtype", None)
            for leaf, weight in module.named_parameters(recurse=False):
                if isinstance(weight, QTensor) and weight.dim() in (2, 3) and not isinstance(module, nn.Embedding):
                    name = f"{prefix}.{leaf}" if prefix else leaf
                    yield (
                        name,
                        _problem({**weight.spec(), "qtype": weight.qtype, "activation": own or weight.activation}),
                    )
        return
    for name, text in _stored(model).items():
        spec = parse_spec(text, name)
        if len(spec["shape"]) in (2, 3):
            yield name, _problem(spec)


def _problem(spec: dict[str, Any]) -> Problem:
    return Problem(
        device="cuda",
        qtype=spec["qtype"],
        activation=spec["activation"],
        dtype=torch.bfloat16,
        rows=1,
        out_features=spec["shape"][-2],
        in_features=spec["shape"][-1],
        group_size=spec["group_size"],
        affine=spec["affine"],
        transposed=spec["transposed"],
    )


def _stored(model: str | Path) -> dict[str, str]:
    from requanto.report.convert import local_directory

    path = local_directory(model) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected a directory that save_pretrained wrote")
    stored = json.loads(path.read_text(encoding="utf-8")).get("quantization_config") or {}
    return QuantoConfig.from_dict(stored).tensors if stored.get("quant_method") == "quanto" else {}


def _job(problem: Problem) -> Job | str:
    """Returns the job for the kernel that the registry selects on a GPU with matrix instructions, or why it is not tuned."""
    kind, group = problem.qtype, problem.group_size
    if problem.transposed:
        return "stored transposed: the kernel for transposed weights has fixed tiles"
    if kind.is_codebook and kind.blocks is None:
        return "codebooks use the tiles of integers of as many bits"
    group = None if group == problem.in_features else group
    if problem.activation is None:
        return Job("wq_gemm", kind.bits, group, problem.out_features, problem.in_features)
    return _job_8_bit(problem, kind, group)


def _job_8_bit(problem: Problem, kind: qtype, group: int | None) -> Job | str:
    assert problem.activation is not None
    shape = problem.out_features, problem.in_features
    if kind.is_floating_point or problem.activation.is_floating_point:
        return "GEMMs of float8 codes use the shipped tiles"
    if kind.is_codebook or (kind.bits == 8 and kind.is_unsigned):
        return f"{kind.name} with int8 activations uses a float GEMM"
    if kind.bits == 8 and group is None and not problem.affine:
        return Job("scaled_mm", 8, None, *shape)
    if group is not None and (group < 32 or group & (group - 1)):
        return f"groups of {group} with int8 activations use a float GEMM"
    return Job("w4a8_gemm", kind.bits, group, *shape)


def _require_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        raise RuntimeError(f"tuning needs a CUDA or ROCm device, found {device}")
    if not torch.cuda.is_available():
        raise RuntimeError(
            f"tuning needs a GPU, but this PyTorch ({torch.__version__}) finds none. Kernels work without tuning; run this "
            "command on the machine that will run the model."
        )
    if not rules.available():
        raise RuntimeError("tuning needs Triton, which does not work on this GPU; see the log for the reason")


def _name(model: nn.Module | str | Path) -> str:
    return type(model).__name__ if isinstance(model, nn.Module) else str(model)
