"""Column scales: one number for each column of a weight, by which the weight is divided before it is rounded.

    W[n, k] = dequant(codes)[n, k] * column[k]        W x = dequant(codes) (column * x)

Columns of a trained weight differ in size, because the inputs do that they are multiplied with. A group along a row holds
weights of several columns, so its scale is that of the largest of them. Divided by a column scale, they fill the same grid
alike. The GEMM multiplies x instead, which costs K multiplications for each token. (SINQ, Mueller et al. 2025,
arXiv:2509.22944, finds scales of rows and columns in turns, from standard deviations. Here each row is divided once, so
that no row counts more than another; and the size of a column is the mean magnitude of its weights, which a few large ones
hardly change. Language models lose less with it than with standard deviations, see docs/accuracy.md.)

For a convolution a column is one weight of a row: one input channel at one place of the kernel.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from requanto.dtypes.qtypes import qtype
from requanto.runtime.buffers import release_scratch, scratch_like

logger = logging.getLogger(__name__)

#: Power of the weights that is averaged over a column, and the exponent of that mean, by the name of the kind.
KINDS = {"mean": (1, 1.0), "std": (2, 0.5), "root": (2, 0.25)}
#: What ``column_scale=True`` means but for `best_column_scale`.
DEFAULT_KIND = "mean"
#: A weight is on a type's grid already if rounding takes less than this part of its norm. The grid's weights rounded to
#: bfloat16 lose 0.003 at most; any others lose 0.01 with 7 bits, and more with fewer.
ON_GRID = 0.005
#: Rows that are rounded to find that out.
PROBED = 16
#: A computed column scale lies between 1 / LIMIT and LIMIT times the geometric mean of its weight.
LIMIT = 64.0
#: Least ratio of the smallest to the largest column scale. Below it float16 has fewer digits than bfloat16.
SMALLEST = 2.0**-14
#: Fewer rows get no computed column scale: it would take more than half a bit for each weight.
LEAST_ROWS = 32
#: Fewer rows get none by default: it would take more than an eighth of a bit for each weight in 16 bits.
DEFAULT_ROWS = 128
#: Weights that are read at once; on an accelerator each step costs kernel launches.
_CHUNK = 2**20
_CHUNK_ACCELERATOR = 2**24


def check_column_scale(value: Any, where: str = "column_scale") -> str | bool | None:
    """A kind, True (the type's best kind), False (none) or None (in models: the type's default).

    Raises:
        ValueError: another value.
    """
    if value is None or isinstance(value, bool) or (isinstance(value, str) and value in KINDS):
        return value
    raise ValueError(f"{where} must be {', '.join(map(repr, KINDS))}, True, False or None, found {value!r}")


def best_column_scale(kind: qtype, scale_bits: int | None = None) -> str:
    """The kind that ``column_scale=True`` stands for, as measured (docs/accuracy.md).

    The mean hardly grows with one large weight in a column, so that weight is divided by little, and its group gets a large
    scale. As codes of 4 or 5 bits the scales of the other groups of the row are then too coarse. With 2 bits that does more
    harm than the mean does good.
    """
    return "std" if kind.bits == 2 and scale_bits is not None and scale_bits < 6 else DEFAULT_KIND


def default_column_scale(kind: qtype, rows: int, scale_bits: int | None = None) -> str | None:
    """The kind of column scale that weights of a type get in models if none is asked for; None: they get none.

    With few rows it would take too many bits: these are better spent on smaller groups.

    Types of 8 bits gain too little. NVFP4 and MX types are formats that other programs read, and these have none.
    """
    if kind.blocks is not None or kind.bits in (1, 8) or rows < DEFAULT_ROWS:
        return None
    return best_column_scale(kind, scale_bits)


def column_scale(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """A column scale from the weight alone: geometric mean 1, cut to 1 / `LIMIT` .. `LIMIT`; 1 for columns of zeros.

    Args:
        weight: float ``[..., N, K]``, without NaN and Inf.
        kind: ``"mean"``: in proportion to the mean magnitude of each column, after each row was divided by its root mean
            square; ``"std"``: to the root mean square of the column instead; ``"root"``: to the square root of that.

    Returns:
        float32 ``[..., K]``.

    Raises:
        ValueError: the kind is unknown.
    """
    if kind not in KINDS:
        raise ValueError(f"column_scale must be {', '.join(map(repr, KINDS))}, found {kind!r}")
    power, exponent = KINDS[kind]
    *lead, rows, length = weight.shape
    if weight.device.type == "meta" or isinstance(weight, FakeTensor) or not weight.numel():
        return torch.ones(*lead, length, dtype=torch.float32, device=weight.device)
    wide = torch.float32 if weight.device.type == "mps" else torch.float64
    total = torch.zeros(*lead, length, dtype=wide, device=weight.device)
    # Sums of a few thousand rows in float32, which is ten times as fast; and all of them in float64.
    cpu = weight.device.type == "cpu"
    step = (_CHUNK if cpu else _CHUNK_ACCELERATOR) // max(1, weight.shape[:-2].numel() * length)
    step = min(4096, max(1, step))
    for start in range(0, rows, step):
        part = weight[..., start : start + step, :]
        # A copy, since sums of a transposed view could differ in their last bits.
        sizes = scratch_like(part, "block").copy_(part).abs_()
        norm = torch.linalg.vector_norm(sizes, dim=-1, keepdim=True)
        usable = norm > 0
        if not cpu or not bool(((norm > 1e-15) & (norm < 1e15)).all()):
            # Squares may over- or underflow: divided by their mean they do not. Rows of zeros do not count.
            mean = sizes.mean(-1, keepdim=True)
            usable = mean > torch.finfo(torch.float32).tiny
            sizes.mul_(torch.where(usable, mean, 1.0).reciprocal_())
            norm = torch.linalg.vector_norm(sizes, dim=-1, keepdim=True)
        sizes.mul_(torch.where(usable, norm, 1.0).reciprocal_().mul_(length**0.5).mul_(usable))
        total += (sizes.square_() if power == 2 else sizes).sum(-2)
    release_scratch()
    size = total / rows
    alive = size > 0
    # The logarithms of dead columns are zeros, which do not count in the mean.
    logs = torch.where(alive, size, 1.0).log() * exponent
    logs = logs - logs.sum(-1, keepdim=True) / alive.sum(-1, keepdim=True).clamp(min=1)
    found = logs.exp().clamp(1 / LIMIT, LIMIT)
    return torch.where(alive, found, 1.0).to(torch.float32)


@torch.no_grad()
def is_on_grid(
    rows: torch.Tensor, quantize: Callable[..., Any], name: str, kind: qtype, group: int | None = None
) -> bool:
    """Whether a weight has been rounded to this type and group size before, so that it loses nothing without a column scale.

    Args:
        rows: the weight, float ``[..., N, K]``; a few of its rows are tried.
        quantize: rounds a float weight, without a column scale.
        name: name of the weight in messages.
        kind: the type.
        group: number of weights that share a scale; None: a row.
    """
    if rows.device.type == "meta" or isinstance(rows, FakeTensor) or not rows.numel():
        return False
    first = rows.reshape(-1, rows.shape[-1])[0, :group]
    if len(set(first.tolist())) > 2**kind.bits:  # a rounded group has no more values than there are codes
        return False
    flat = rows.reshape(-1, rows.shape[-1])
    probe = flat[:: max(1, len(flat) // PROBED)][:PROBED]
    if not bool(torch.isfinite(probe).all()):
        return False  # refused with its own message
    error = (quantize(probe, search="minmax").dequantize(torch.float32) - probe.float()).norm()
    found = bool(error < ON_GRID * probe.float().norm())
    if found:
        logger.info("%s: its weights are on the type's grid already; it gets no column scale", name)
    return found


def default_of_weight(
    rows: torch.Tensor,
    quantize: Callable[..., Any],
    name: str,
    kind: qtype,
    group: int | None = None,
    scale_bits: int | None = None,
) -> str | None:
    """The kind of column scale that one weight gets in a model if none is asked for: its type's, but none on the grid.

    Args:
        rows, quantize, name, kind, group: see `is_on_grid`.
        scale_bits: bits of the scales of groups; None: they are floats, or there is one a row.
    """
    found = default_column_scale(kind, rows.shape[-2], scale_bits)
    if found is None or kind.is_learned:  # a learned type has no grid before it is fitted
        return found
    return None if is_on_grid(rows, quantize, name, kind, group) else found


def fit_column(
    asked: str | bool | torch.Tensor | None,
    rows: torch.Tensor,
    kind: qtype,
    dtype: torch.dtype,
    name: str,
    scale_bits: int | None = None,
) -> torch.Tensor | None:
    """The column scale to store for a weight, ``[..., K]`` in ``dtype``; None: it gets none.

    It is multiplied by a power of two such that the largest value is at most 1: then ``column * x`` cannot overflow, in
    float16 either. (The codes' scales take the inverse.)

    Args:
        asked: a kind; True: the type's best one (`best_column_scale`); False or None: none; or a tensor of the result's
            shape.
        rows: the weight, float ``[..., N, K]``.
        kind: type of the codes.
        dtype: dtype of the weight.
        name: name of the weight in messages.
        scale_bits: bits of the scales of groups; the best kind depends on them.

    Raises:
        ValueError: a given tensor is not float, has another shape, is not positive and finite, or its smallest value is
            less than `SMALLEST` times its largest.
    """
    stored = torch.float32 if dtype == torch.float64 else dtype
    if isinstance(asked, torch.Tensor):
        column = _checked(asked, rows, name)
    else:
        asked = check_column_scale(asked, f"{name}: column_scale")
        if not asked:
            return None
        if asked is True:
            asked = best_column_scale(kind, scale_bits)
        if rows.shape[-2] < LEAST_ROWS:
            logger.info(
                "%s: a weight of %d rows gets no column scale, which would take %.2g bits for each weight",
                name,
                rows.shape[-2],
                8 * stored.itemsize / max(1, rows.shape[-2]),
            )
            return None
        column = column_scale(rows, asked)
    if column.device.type == "meta" or isinstance(column, FakeTensor) or not column.numel():
        return column.to(stored)
    if not bool(torch.isfinite(column).all()):
        return None  # of a weight with NaN or Inf, which is refused later, with a message of its own
    largest = column.amax(-1, keepdim=True)
    power = torch.frexp(largest).exponent
    half = power // 2  # in two steps: the whole power may exceed float32
    return torch.ldexp(torch.ldexp(column, -half), half - power).to(stored)


def _checked(given: torch.Tensor, rows: torch.Tensor, name: str) -> torch.Tensor:
    shape = (*rows.shape[:-2], rows.shape[-1])
    if tuple(given.shape) != shape or not given.is_floating_point():
        raise ValueError(
            f"{name}: a column scale of shape {tuple(given.shape)} and {given.dtype} was given; expected a float tensor of "
            f"shape {shape}, one number for each column of the weight"
        )
    column = given.detach().to(rows.device, torch.float32)
    if column.device.type == "meta" or isinstance(column, FakeTensor) or not column.numel():
        return column
    bad = ~(torch.isfinite(column) & (column > 0))
    if bool(bad.any()):
        raise ValueError(
            f"{name}: {int(bad.sum())} of the {column.numel()} column scales given are zero, negative, NaN or Inf; they "
            f"have to be positive numbers. Use 1 for columns that are not to be scaled."
        )
    ratio = float((column.amin(-1) / column.amax(-1)).min())
    if ratio < SMALLEST:
        raise ValueError(
            f"{name}: the smallest column scale given is {ratio:.2g} of the largest, and would underflow in float16; "
            f"expected at least {SMALLEST:.2g}. Limit them, e.g. column.clamp(min=column.max() * {SMALLEST:.2g})."
        )
    return column


def divide_columns(block: torch.Tensor, column: torch.Tensor, start: int, rows: int) -> torch.Tensor:
    """Divides rows ``start ..`` of a weight by its column scale, in place.

    Args:
        block: float32 ``[count, K]``, rows of the weight seen as a matrix.
        column: ``[..., K]``; each covers ``rows`` rows.
        start: index of the first row.
    """
    columns = column.reshape(-1, column.shape[-1]).to(block.dtype)
    if len(columns) == 1:
        return block.div_(columns)
    owner = torch.arange(start, start + len(block), device=block.device) // rows
    return block.div_(columns[owner])
