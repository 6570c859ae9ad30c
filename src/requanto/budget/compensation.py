"""Costs after GPTQ: what is left of an error once later columns compensate it.

GPTQ rounds a column and moves later ones so that the layer's output changes least. What is left of an error ``E_ik`` is
``E_ik^2 D_k``, where ``D`` is the diagonal of the factorization ``H = L D L^T`` of the inputs' second moment in the order in
which columns are rounded (without damping), and not ``E_ik^2 H_kk``, as after rounding to nearest. Where inputs are
correlated, ``D`` is much smaller. So layers differ in how much they gain, and the choice of types before GPTQ should know.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from requanto.budget.measure import Importance
from requanto.budget.sensitivity import MOST_SAMPLES
from requanto.config.plan import PlannedWeight
from requanto.methods.gptq import damped, inverse_factor
from requanto.methods.samples import Samples
from requanto.methods.statistics import layer_moments

logger = logging.getLogger(__name__)

#: Second moments of so many layers are computed in one run of the model that they take up to this many bytes.
MOST_BYTES = 2 * 2**30


def after_gptq(
    model: nn.Module,
    planned: Mapping[str, PlannedWeight],
    calibration: Any,
    importance: Mapping[str, Importance],
    damping: float,
) -> dict[str, Importance]:
    """Returns the importances with what GPTQ leaves of errors in each input channel.

    Args:
        model: the float model.
        planned: full parameter name -> how it is to be quantized.
        calibration: samples; the model runs on them once for about every 2 GiB of second moments.
        importance: of errors after rounding to nearest (`requanto.budget.sensitivity`).
        damping: of the method (`requanto.methods.gptq.gptq`).
    """
    found, samples = dict(importance), Samples(calibration).few(MOST_SAMPLES)
    names = [name for name, known in importance.items() if known.columns is not None]
    for part in _parts({name: planned[name] for name in names}, importance):
        for name, moments in layer_moments(model, part, samples, full=True).items():
            columns = importance[name].columns
            if not moments.rows or moments.hessian is None or columns is None:
                continue
            share = compensated_share(moments.hessian / moments.rows, damping, name)
            logger.info("%s: GPTQ leaves %.3f of the errors of rounding to nearest", name, share.mean().item())
            found[name] = replace(importance[name], columns=columns * share.to(columns.device))
    return found


def compensated_share(hessian: Tensor, damping: float, name: str) -> Tensor:
    """Returns what GPTQ leaves of the squared error of each column, ``[K]``, for columns in the order of their diagonal.

    GPTQ turns a rounding error ``z`` of column k into the error ``z U_k / U_kk`` of the row; ``U_k`` is a row of the factor
    of the damped inverse. Its cost is measured with the second moment itself, without damping.
    """
    wide = damped(hessian, damping, name)
    order = torch.argsort(wide.diagonal(), descending=True, stable=True)
    upper = inverse_factor(wide[order][:, order], name)
    inner = hessian[order][:, order].to(upper.dtype)
    cost = ((upper @ inner) * upper).sum(1) / upper.diagonal().square()
    share = torch.ones_like(cost)
    alive = inner.diagonal() > 0
    share[order[alive]] = (cost / inner.diagonal())[alive]
    return share.float()


def _parts(
    planned: dict[str, PlannedWeight], importance: Mapping[str, Importance]
) -> Iterator[dict[str, PlannedWeight]]:
    part: dict[str, PlannedWeight] = {}
    size = 0
    for name, choice in planned.items():
        more = 4 * len(importance[name].columns) ** 2  # type: ignore[arg-type]
        if part and size + more > MOST_BYTES:
            yield part
            part, size = {}, 0
        part[name] = choice
        size += more
    if part:
        yield part
