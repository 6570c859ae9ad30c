"""Times humming's kernels beside the tuned Triton ones, for the table by which layers choose (`humming_times`)."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from requanto.dtypes.qtypes import qtypes
from requanto.linear.gpu import humming, humming_times
from requanto.linear.gpu.humming_layout import LAYOUTS
from requanto.linear.gpu.layout import EXEC
from requanto.linear.registry import choose, problem_of
from requanto.tensor.qtensor import QTensor

if TYPE_CHECKING:
    from requanto.cli.tune import Job

#: Bytes of weights that are multiplied in turn, more than an L2 cache holds, and most copies of one.
ROTATED_BYTES, MOST_COPIES = 256e6, 64


def compare(
    job: Job,
    rows: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    repeats: int,
    report: Callable[[str], object],
) -> bool | None:
    """Times both for one weight-only shape and stores the times; returns whether humming is chosen from now on.

    Ours is what the registry chooses, humming's what its layout runs. None if humming does not serve such weights.
    """
    n, k = job.out_features, job.in_features
    weight = _weight(job, dtype, device)
    if weight is None or not humming.serves(weight, dtype) or not humming.ready(weight, LAYOUTS[dtype]):
        return None
    copies = max(1, min(MOST_COPIES, int(ROTATED_BYTES / (n * k * job.bits / 8))))
    ours, theirs = ([weight.clone() for _ in range(copies)] for _ in range(2))
    for one in ours if EXEC.accepts(weight._spec) and job.layout == "exec" else ():
        one.pack(EXEC)
    for one in theirs:
        one.pack(LAYOUTS[dtype])
    times: dict[str, list[float]] = {}
    for m in rows:
        x = torch.randn(m, k, dtype=dtype, device=device)
        times[str(m)] = [round(1e3 * _milliseconds(x, packed, repeats), 2) for packed in (ours, theirs)]
        report(f"{job} M={m}: {times[str(m)][0]} us, humming {times[str(m)][1]} us")
    entry: dict[str, Any] = {"rows": times, **_versions()}
    name = humming_times.key(torch.cuda.get_device_name(device), weight.qtype, job.group_size, job.affine, dtype, n, k)
    humming_times.store({name: entry})
    return humming_times.is_faster(entry)


def _weight(job: Job, dtype: torch.dtype, device: torch.device) -> QTensor | None:
    """A random weight of the job's type."""
    wanted = (
        kind
        for kind in qtypes.values()
        if kind.bits == job.bits
        and not kind.is_codebook
        and kind.blocks is None
        and kind.is_floating_point == (job.kind not in ("", "u8"))
        and (not kind.is_floating_point or str(kind.dtype).endswith(job.kind))
        and (kind.bits < 8 or kind.is_unsigned == (job.kind == "u8"))
    )
    kind = next(wanted, None)
    if kind is None:
        return None
    values = torch.randn(job.out_features, job.in_features, dtype=dtype, device=device) * 0.02
    how = {} if kind.bits == 8 else {"symmetric": not job.affine}
    return QTensor.quantize(values, kind, group_size=job.group_size, **how)


def _milliseconds(x: torch.Tensor, weights: list[QTensor], repeats: int) -> float:
    from requanto_kernels.tune import median_ms

    run = choose(problem_of(weights[0], x.dtype, x.shape[0])).implementation.run
    return median_ms(partial(_one, run, x, weights), len(weights), repeats)


def _one(run: Callable[..., torch.Tensor], x: torch.Tensor, weights: list[QTensor], index: int) -> torch.Tensor:
    with torch.no_grad():
        return run(x, weights[index], None, None, None)


def _versions() -> dict[str, str]:
    import triton

    found = {"triton": triton.__version__}
    for name in ("requanto", "humming-kernels"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found
