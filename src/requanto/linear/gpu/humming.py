"""An optional backend: humming's kernels for weights with 16-bit activations (``pip install requanto[humming]``, CUDA only).

humming compiles its kernels with NVRTC or nvcc: one when a weight of a new shape is packed for it, further ones when there
are so many rows for the first time (about thirty in all), as Triton does. It runs a weight only

- where a table of measurements says that it is faster than the Triton kernels on this GPU (`humming_times`; the shipped
  table is empty, ``requanto tune --humming`` adds to the user's), and nothing is asked of it otherwise, not even an import;
- or where ``requanto.settings.humming = True`` (REQUANTO_HUMMING=1) asks for it.

The weight's codes are put into humming's order (`requanto.linear.gpu.humming_layout`). A failed import, a failed compilation
and zero points that would be rounded too far are logged, and the Triton kernels run those weights. Once packed, products
with other dtypes, with quantized activations and backward passes run through the reference: `explain` shows all of this.
"""

from __future__ import annotations

import functools
import json
import logging
import weakref
from typing import Any

import torch

from requanto.dtypes.qtypes import qtype
from requanto.linear.gpu import conditions as rules
from requanto.linear.gpu import paths  # noqa: F401  (registered first: this one is inserted before them)
from requanto.linear.gpu.humming_layout import KINDS, LAYOUTS, HummingLayout, made_from, zero_points
from requanto.linear.gpu.humming_times import is_faster, key, measured
from requanto.linear.gpu.layout import capturing, codes_of, is_pinned
from requanto.linear.registry import Implementation, Problem, register
from requanto.runtime.devices import made_current
from requanto.runtime.settings import settings
from requanto.tensor.layout import Layout
from requanto.tensor.qtensor import QTensor
from requanto.tensor.storage import WeightStorage

logger = logging.getLogger(__name__)

#: N and K that its tiles divide, and groups that fit into them.
ROWS, COLUMNS = 128, 128
GROUPS = (32, 64, 128, 256, 512)
#: Largest rounding of a zero point that is accepted, in codes: the rounding of the weight itself reaches half a code.
ZERO_ERROR = 1 / 16
#: Flags of humming's LayerConfig under which it wants the codes in another order than that of `HummingLayout`.
OTHER_ORDERS = (
    "use_native_dequant", "use_raw_weight", "use_flat_weight", "use_packed_k_layout", "use_ldmatrix_dequant"
)  # fmt: skip

#: Forms that it could not compile a kernel for, and weights whose zero points it would round too far.
_failed: set[tuple[Any, ...]] = set()
_unfit: weakref.WeakSet[WeightStorage] = weakref.WeakSet()


# ---------------------------------------------------------------------- what it serves


def serves(weight: QTensor, dtype: torch.dtype | None = None, activation: qtype | None = None) -> bool:
    """True for weights that humming can multiply x of ``dtype`` by; nothing is imported."""
    spec = weight._spec
    dtype = dtype or spec.dtype
    if not _on_nvidia(weight.device) or dtype not in LAYOUTS or (activation or spec.activation) is not None:
        return False
    rows, length = spec.matrix_shape
    if spec.qtype not in KINDS or spec.transposed or spec.rotation is not None or rows % ROWS or length % COLUMNS:
        return False
    if spec.group_size not in (None, length, *GROUPS) or not LAYOUTS[dtype].accepts(spec):
        return False
    with made_current("cuda", weight.device.index):
        return rules.capability("cuda") >= (80 if dtype == torch.bfloat16 else 75)


def _on_nvidia(device: torch.device) -> bool:
    return device.type == "cuda" and not torch.version.hip


def wanted(weight: QTensor, dtype: torch.dtype) -> bool:
    """True if the user asks for humming, or a measurement says that it is faster for this weight on this GPU."""
    if settings.humming is not None:
        return settings.humming
    spec, table = weight._spec, measured()
    if not table:
        return False
    gpu = torch.cuda.get_device_name(_index(weight.device))
    return is_faster(table.get(key(gpu, spec.qtype, spec.group_size, spec.affine, dtype, *spec.matrix_shape)))


def layout_for(weight: QTensor, dtype: torch.dtype | None, activation: qtype | None) -> Layout | None:
    """humming's layout for a weight that it shall run; None if the Triton kernels run it. Compiles nothing."""
    dtype = dtype or weight.dtype
    if settings.humming is False or weight._storage in _unfit or not serves(weight, dtype, activation):
        return None
    if not wanted(weight, dtype) or _form(weight, dtype) in _failed or not available():
        return None
    return None if capturing(weight.device) or is_pinned(weight._storage.parts["qdata"]) else LAYOUTS[dtype]


def ready(weight: QTensor, layout: Layout) -> bool:
    """Compiles a kernel for a weight that is about to be packed; False, after a log line, if humming cannot run it."""
    if not isinstance(layout, HummingLayout):
        return True
    form = _form(weight, layout.dtype)
    if weight.affine:
        zero = zero_points(weight.scale, weight.shift)
        error = (zero.to(layout.dtype).float() - zero).abs().max()
        if not error <= ZERO_ERROR:
            _unfit.add(weight._storage)
            logger.warning(
                "humming does not run a %s weight of shape %s: its zero points would be rounded by up to %.3g codes, more "
                "than %g; the Triton kernels run it", weight.qtype.name, tuple(weight.shape), float(error), ZERO_ERROR
            )  # fmt: skip
            return False
    try:
        _compile(form)
    except Exception as error:  # no compiler, another version of humming, a shape that it has no kernel for
        _failed.add(form)
        logger.warning(
            "humming has no kernel for %s weights of shape %s on this GPU (%s: %s); the Triton kernels run them",
            weight.qtype.name, tuple(weight.shape), type(error).__name__, str(error).strip().splitlines()[:1]
        )  # fmt: skip
        return False
    return True


@functools.cache
def available() -> bool:
    """True if humming can be imported; else logs one line, once."""
    try:
        import humming.forward
        import humming.kernel.humming
        import humming.schema
        import humming.transform
        import humming.tune  # noqa: F401
    except Exception as error:  # ImportError, or what its native parts raise
        logger.warning(
            "humming is not available, the Triton kernels run instead: %s: %s. Install requanto[humming], or set "
            "requanto.settings.humming = False.", type(error).__name__, error
        )  # fmt: skip
        return False
    return True


# ---------------------------------------------------------------------- products


def _form(weight: QTensor, dtype: torch.dtype) -> tuple[Any, ...]:
    """What humming compiles a kernel for."""
    rows, length = weight.matrix_shape
    group = 0 if weight.group_size in (None, length) else weight.group_size
    return weight.qtype, group, weight.affine, dtype, rows, length, _index(weight.device)


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


@functools.lru_cache(maxsize=1024)
def config_of(kind: qtype, group: int, affine: bool, dtype: torch.dtype, rows: int, length: int, device: int) -> Any:
    """humming's LayerConfig for a weight.

    Args:
        group: group size; 0: one scale per row.

    Raises:
        ValueError: humming wants the codes in an order that `HummingLayout` does not have.
    """
    from humming.schema import HummingWeightSchema
    from humming.transform import prepare_layer_config

    names = {torch.float8_e4m3fn: "float8e4m3", torch.float8_e5m2: "float8e5m2"}
    schema = HummingWeightSchema(
        b_dtype=names.get(kind.dtype, f"uint{kind.bits}"),
        weight_scale_group_size=group,
        has_zero_point=affine,
        is_fp_zero_point=affine,
    )
    config = prepare_layer_config(rows, length, schema, torch_dtype=dtype, device=device)
    other = [name for name in OTHER_ORDERS if getattr(config, name)]
    if other:
        raise ValueError(f"{', '.join(other)}: it wants the codes of {kind.name} in another order on this GPU")
    return config


@functools.lru_cache(maxsize=1024)
def _tiles(form: tuple[Any, ...]) -> list[tuple[int, int, str]]:
    """(rows from, exclusive, rows to, tile): the tiles that humming chooses."""
    from humming.tune import get_heuristics_config

    return [
        (low, high, json.dumps(tile)) for low, high, tile in get_heuristics_config(config_of(*form), device=form[-1])
    ]


def _tile(form: tuple[Any, ...], rows: int) -> str:
    """The tile for a number of rows. Asked for one, humming compiles one kernel, else those of all tiles first."""
    return next(tile for low, high, tile in _tiles(form) if low < rows <= high)


def _compile(form: tuple[Any, ...]) -> None:
    """Compiles the kernel for one row, or loads it from humming's cache on disk."""
    from humming.kernel.humming import HummingKernel

    HummingKernel.prepare_kernels(config_of(*form).to_str(), tuning_config=_tile(form, 1), device=form[-1])


def run(
    x: torch.Tensor,
    weight: QTensor,
    bias: torch.Tensor | None,
    activation: qtype | None = None,
    input_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Weight-only GEMM by humming, of a weight in its layout."""
    rows, length = weight.matrix_shape
    if not x.shape[0]:
        return x.new_empty(0, rows)
    codes, _ = codes_of(weight)
    parts = _current(weight)
    from humming.forward import humming_forward

    form = _form(weight, x.dtype)
    out = humming_forward(
        config_of(*form),
        inputs=x.contiguous(),
        weight=codes.view(torch.int32).view(length // 16, -1),
        weight_scale=parts["humming_scale"],
        zero_point=parts["humming_zero"] if weight.affine else None,
        locks=parts["humming_locks"],
        tuning_config=_tile(form, x.shape[0]),
    )
    return out if bias is None else out.add_(bias)


def _current(weight: QTensor) -> dict[str, torch.Tensor]:
    """The weight's parts, with scales in humming's order made again, in place, if the stored ones were changed in place."""
    layout, parts = weight._storage.state
    assert isinstance(layout, HummingLayout)
    if made_from(parts) not in (None, getattr(parts["humming_scale"], "made_from", ())):
        for name, part in layout.scales(weight._spec, parts).items():
            parts[name].copy_(part)
        parts["humming_scale"].made_from = made_from(parts)  # type: ignore[attr-defined]
    return parts


def supports(problem: Problem) -> bool:
    """True for weights in humming's layout for x's dtype."""
    if problem.activation is not None or problem.transposed or problem.dtype not in LAYOUTS:
        return False
    return problem.layout == LAYOUTS[problem.dtype].name


register(
    Implementation(
        name="humming",
        run=run,
        supports=supports,
        reason="humming's kernels: faster in a table of measurements, or asked for by requanto.settings.humming",
    ),
    before="triton-dequantize",
)
