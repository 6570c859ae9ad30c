"""``requanto tune MODEL``: finds the fastest kernel tiles for a model's layers on this GPU and stores them on disk.

Kernels never time anything themselves. Without tuning, they use the tiles that ship with them. What is timed is what the
layers launch: `Job` has all that the kernels' tables tell tiles apart by.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from requanto.checkpoint.format import parse_spec
from requanto.cli import tune_humming as beside
from requanto.config.config import QuantoConfig
from requanto.dtypes.codebooks import MINIFLOATS, minifloat
from requanto.dtypes.qtypes import qtype
from requanto.linear.gpu import conditions as rules
from requanto.linear.gpu import humming as backend
from requanto.linear.gpu.eight_bit_conditions import integer_gemm
from requanto.linear.prepack import SMALLEST
from requanto.tensor.qtensor import QTensor

#: Numbers of rows (tokens) to time: decoding, small batches, prompts.
ROWS = (1, 16, 64, 256, 1024, 4096)


@dataclass(frozen=True, order=True)
class Job:
    """One shape to tune: all layers of this shape use the same tiles for a given number of rows.

    Attributes:
        op: the kernel.
        bits, kind: of the codes; kind as `requanto_kernels.tune` has it.
        group_size: None: one scale per row.
        out_features, in_features: N and K.
        affine: whether there is a shift.
        scale_dtype: dtype of scales and shifts as kernels read them.
        layout: ``"exec"``, or ``"plain"`` for weights that are not packed.
    """

    op: str
    bits: int
    group_size: int | None
    out_features: int
    in_features: int
    kind: str = ""
    affine: bool = False
    scale_dtype: str = "float32"
    layout: str = "exec"

    def __str__(self) -> str:
        kind = f" {self.kind}" if self.kind else ""
        group = "" if self.group_size is None else f" group {self.group_size}"
        affine = " affine" if self.affine else ""
        return f"{self.op} {self.bits} bit{kind}{group}{affine} {self.out_features}x{self.in_features}"


@dataclass
class Tuned:
    """Result of `tune_model`.

    Attributes:
        path: the file of tiles, which every later process reads.
        entries: number of entries written.
        humming: of `Job` with humming beside ours: whether it will run such layers from now on.
        jobs: the shapes that were timed.
        skipped: parameter -> why it is not tuned.
        seconds: duration of the run.
    """

    path: Path
    entries: int = 0
    jobs: list[Job] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    humming: dict[str, bool] = field(default_factory=dict)


def tune_model(
    model: nn.Module | str | Path,
    *,
    rows: Iterable[int] = ROWS,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
    repeats: int = 20,
    progress: bool = True,
    report: Callable[[str], object] | None = None,
    humming: bool = False,
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
        humming: also time humming's kernels (`requanto.linear.gpu.humming`) beside the tuned ones, weight-only layers only,
            and keep the times, by which layers choose between the two.

    Raises:
        RuntimeError: no GPU, or Triton does not work on it; humming asked for and not available.
        ValueError: no weight of the model is quantized.
    """
    jobs, skipped = jobs_of(model, dtype)
    if not jobs and not skipped:
        raise ValueError(f"{_name(model)} holds no quantized matrix; quantize it first (requanto quantize MODEL OUT)")
    _require_gpu(torch.device(device))
    if humming and not backend.available():
        raise RuntimeError("humming is asked for and not available: pip install requanto[humming]; see the log")
    from requanto_kernels import tune
    from requanto_kernels.config import cache_path

    started = time.monotonic()
    found = Tuned(cache_path(), jobs=jobs, skipped=skipped)
    rows, report = tuple(rows), report or (lambda line: None)
    with tqdm(total=len(jobs) * len(rows), desc="tuning", unit="tile", disable=not progress) as bar:
        for job in jobs:
            bar.set_postfix_str(str(job))
            winners = tune(
                [(job.out_features, job.in_features)],
                op=job.op,
                bits=job.bits,
                group_size=job.group_size,
                kind=job.kind,
                affine=job.affine,
                scale_dtype=getattr(torch, job.scale_dtype),
                layout=job.layout,
                rows=rows,
                dtype=dtype,
                device=device,
                repeats=repeats,
                report=report,
                done=bar.update,
            )
            found.entries += len(winners)
            if humming and job.op == "wq_gemm":
                faster = beside.compare(job, rows, dtype, torch.device(device), repeats, report)
                if faster is not None:
                    found.humming[str(job)] = faster
    found.seconds = time.monotonic() - started
    return found


def export_tiles(path: str | Path) -> int:
    """Writes all tuned tiles of this machine to a file; returns their number."""
    from requanto_kernels.config import export_table

    return export_table(path)


def import_tiles(path: str | Path) -> int:
    """Adds the tiles of a file that `export_tiles` wrote to those of this machine; returns their number."""
    from requanto_kernels.config import import_table

    return import_table(path)


def jobs_of(model: nn.Module | str | Path, dtype: torch.dtype = torch.bfloat16) -> tuple[list[Job], dict[str, str]]:
    """Returns (distinct shapes to time, {parameter: why it is not tuned}).

    Args:
        dtype: of the activations.
    """
    jobs: set[Job] = set()
    skipped: dict[str, str] = {}
    for name, spec in _specs(model, dtype):
        job = _job(spec)
        if isinstance(job, Job):
            jobs.add(job)
        else:
            skipped[name] = job
    order = lambda job: (job.op, job.bits, job.group_size or 0, job.out_features, job.in_features, str(job))  # noqa: E731
    return sorted(jobs, key=order), skipped


def _specs(model: nn.Module | str | Path, dtype: torch.dtype) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (name, spec with the dtype of scales) for every quantized matrix or stack of experts."""
    if isinstance(model, nn.Module):
        for prefix, module in model.named_modules():
            own = getattr(module, "activation_qtype", None)
            for leaf, weight in module.named_parameters(recurse=False):
                if isinstance(weight, QTensor) and weight.dim() in (2, 3) and not isinstance(module, nn.Embedding):
                    spec = {**weight.spec(), "qtype": weight.qtype, "activation": own or weight.activation}
                    stored = weight._storage.parts["scale"].dtype
                    yield (
                        f"{prefix}.{leaf}" if prefix else leaf,
                        spec | {"scale_dtype": _scale_dtype(spec, stored, dtype)},
                    )
        return
    for name, text in _stored(model).items():
        spec = parse_spec(text, name)
        if len(spec["shape"]) in (2, 3):
            # As `QTensor.quantize` stores them; a model is run in the dtype in which it is tuned.
            stored = torch.float32 if spec["group_size"] in (None, spec["shape"][-1]) else dtype
            yield name, spec | {"scale_dtype": _scale_dtype(spec, stored, dtype)}


def _scale_dtype(spec: dict[str, Any], stored: torch.dtype, dtype: torch.dtype) -> torch.dtype:
    """dtype of scales as kernels read them: those in few bits are expanded (`requanto.linear.gpu.layout.ExpandedScales`)."""
    if spec["scale_bits"] is None and not spec["zeros"] and spec["qtype"].blocks is None:
        return stored
    return dtype if dtype == torch.bfloat16 else torch.float32


def _stored(model: str | Path) -> dict[str, str]:
    from requanto.report.convert import local_directory

    path = local_directory(model) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected a directory that save_pretrained wrote")
    stored = json.loads(path.read_text(encoding="utf-8")).get("quantization_config") or {}
    return QuantoConfig.from_dict(stored).tensors if stored.get("quant_method") == "quanto" else {}


def _job(spec: dict[str, Any]) -> Job | str:
    """Returns the job for the kernel that the registry selects on a GPU with matrix instructions, or why it is not tuned."""
    kind, activation, shape = spec["qtype"], spec["activation"], spec["shape"]
    rows, length = shape[-2:]
    if spec["transposed"]:
        return "stored transposed: the kernel for transposed weights has fixed tiles"
    group = None if spec["group_size"] == length else spec["group_size"]
    if kind.is_codebook and kind.bits == 8:
        return f"{kind.name} has no kernel"
    layout = "exec" if math.prod(shape) >= SMALLEST else "plain"
    job = Job(
        "wq_gemm", kind.bits, group, rows, length, _kind(kind), spec["affine"], str(spec["scale_dtype"])[6:], layout
    )
    if activation is None or activation.blocks is not None:
        return job
    if kind.bits == 8 and not kind.is_unsigned and group is None and not job.affine:
        if kind.is_floating_point == activation.is_floating_point:
            return replace(job, op="scaled_mm", scale_dtype="float32", layout="exec")
    elif integer_gemm(kind, activation, group, length):
        return replace(job, op="w4a8_gemm")
    return job  # x is rounded, then multiplied as floats


def _kind(kind: qtype) -> str:
    """The type of codes as `requanto_kernels.tune` names it."""
    if kind.is_floating_point:
        return str(kind.dtype).removeprefix("torch.float8_")
    if kind.is_codebook:
        forms = ((exponent, mantissa) for bits, exponent, mantissa in MINIFLOATS if bits == kind.bits)
        return next((f"e{e}m{m}" for e, m in forms if kind.values == minifloat(e, m)), "table")
    return "u8" if kind.bits == 8 and kind.is_unsigned else ""


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
