"""`linear_many`: the GEMMs of several weights with one x, in one launch where that is expected to pay.

Queries, keys and values read one tensor; so do a gated MLP's gate and up projection. With few rows a launch, and the
Python before it, takes as long as the GEMM itself. The weights stay separate parameters: one launch reads them all.

Under torch.compile each product is an operator of its own, `requanto::linear_of_set`, which names all weights of the
set. When AOTAutograd traces it, the first of them becomes one `requanto::linear_many` for the whole set and the
others take their results from it, if x is still the same tensor with the same values. So Dynamo keeps no state, and a
graph break between them is harmless.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch._subclasses.functional_tensor import FunctionalTensor

from requanto.linear import custom_ops
from requanto.linear.api import linear
from requanto.linear.columns import scale_columns
from requanto.linear.gpu import layout as gpu_layout
from requanto.linear.gpu import many
from requanto.linear.prepack import pack_together
from requanto.linear.registry import MAX_PLANS
from requanto.runtime.settings import registry_state
from requanto.runtime.tracing import is_tracing, needs_gradient, runs_eagerly, without_ambient_state
from requanto.tensor.layout import LOCK
from requanto.tensor.qtensor import QTensor

logger = logging.getLogger(__name__)

#: Classes of x without behaviour of their own.
PLAIN = (torch.Tensor, torch.nn.Parameter)
Biases = Sequence[torch.Tensor | None]


def linear_many(x: torch.Tensor, weights: Sequence[QTensor], biases: Biases | None = None) -> list[torch.Tensor]:
    """Computes ``x @ weight.T + bias`` for each weight.

    Args:
        x: float ``[..., K]``.
        weights: quantized ``[N_i, K]``.
        biases: float ``[N_i]`` or None for each weight; None: no biases.

    Returns:
        ``[..., N_i]`` in x's dtype for each weight, in memory of its own. On GPUs, and with few rows, all are
        computed by one launch if `requanto.linear.gpu.many.why_separate` finds nothing against it; else each as by
        `requanto.linear.linear`, bit for bit. Always so where a gradient is needed and under autocast.

    Raises:
        ValueError: as `linear`; or there is not one bias for each weight.
    """
    weights, biases = list(weights), [None] * len(weights) if biases is None else list(biases)
    if len(biases) != len(weights):
        raise ValueError(f"linear_many: found {len(weights)} weights and {len(biases)} biases, expected as many")
    if torch.compiler.is_compiling():
        return [torch.ops.requanto.linear_of_set(x, weights, biases, place) for place in range(len(weights))]
    together = in_one_launch(x, weights, biases)
    return [linear(x, *one) for one in zip(weights, biases)] if together is None else together


def in_one_launch(x: torch.Tensor, weights: Sequence[QTensor], biases: Biases) -> list[torch.Tensor] | None:
    """The results of `linear_many` from one launch; None where the GEMMs run one by one."""
    if type(x) not in PLAIN or not runs_eagerly() or (not x.is_meta and torch.is_autocast_enabled(x.device.type)):
        return None
    if torch.is_grad_enabled() and any(needs_gradient(x, bias) for bias in biases):
        return None
    if x.dim() < 2 or not x.numel() or x.is_nested or x.layout is not torch.strided:
        return None
    plan = _plan_for(weights, x.numel() // x.shape[-1], x.shape[-1], x.dtype, x.device)
    if plan.gemm is None:
        return None
    xs, stacked = plan.inputs(x, weights)
    return plan.gemm(xs, weights, biases, stacked)


def why_unlike(weights: Sequence[QTensor]) -> str | None:
    """What keeps weights from ever being read by one launch; None if nothing does. Rows and device do not count here."""
    if not 2 <= len(weights) <= many.MOST:
        return f"{len(weights)} weights; one launch reads 2 to {many.MOST}"
    first = weights[0]._spec
    for weight in weights:
        spec = weight._spec
        if len(spec.shape) != 2 or spec.transposed or spec.axis:
            return "a weight is not a stored matrix [N, K]"
        if spec.rotation is not None or spec.order or "up" in weight._storage.parts:
            return "a weight is rotated, has an order of columns or a low-rank term"
        if spec.activation is not None:
            return "activations are quantized"
        if spec.qtype.is_learned:
            return "each weight has a codebook of its own"
        if spec.replace(shape=first.shape, dtype=first.dtype, column=first.column) != first:
            return f"weights differ: {spec.text()} and {first.text()}"
        if spec.shape[1] != first.shape[1]:
            return f"inputs of {first.shape[1]} and {spec.shape[1]} features"
    return None


# ---------------------------------------------------------------------- cached plans


class _Plan:
    """A cached GEMM for a set of weights and a number of rows; the storage of the first weight owns it.

    Attributes:
        gemm: the GEMM; None: the table says that they run one by one.
        storages: storage and version of each weight when it was made.
    """

    def __init__(self, gemm: many.Gemm | None, weights: Sequence[QTensor]) -> None:
        self.gemm = gemm
        self.storages = tuple((weakref.ref(w._storage), w._storage.version) for w in weights)
        self._columns: tuple[tuple, torch.Tensor] | None = None

    def fits(self, weights: Sequence[QTensor]) -> bool:
        """True if these are the weights that it was made for, unchanged."""
        if len(weights) != len(self.storages):
            return False
        for (known, version), weight in zip(self.storages, weights):
            now = weight._storage
            if known() is not now or now.version != version:
                return False
        return True

    def inputs(self, x: torch.Tensor, weights: Sequence[QTensor]) -> tuple[many.Inputs, bool]:
        """What the codes are multiplied with, and whether it is one tensor ``[weights, ..., K]`` with an x for each weight.

        It is x, or x times the column scale of each weight, by one launch for all.
        """
        columns = [weight._storage.parts.get("column") for weight in weights]
        if all(column is None for column in columns):
            return x, False
        # A captured graph would go on reading this copy; and of inference tensors it is not known whether they change.
        if gpu_layout.capturing(x.device) or any(column is not None and column.is_inference() for column in columns):
            return [scale_columns(x, weight).contiguous() for weight in weights], False
        versions = (x.dim(), *[None if column is None else column._version for column in columns])
        if self._columns is None or self._columns[0] != versions:
            with without_ambient_state():
                ones = torch.ones(x.shape[-1], dtype=x.dtype, device=x.device)
                each = torch.stack([ones if column is None else column.to(x.dtype) for column in columns])
                self._columns = versions, each.view(len(each), *(1,) * (x.dim() - 1), -1)
        return x.contiguous() * self._columns[1], True


def _plan_for(weights: Sequence[QTensor], rows: int, features: int, dtype: torch.dtype, device: torch.device) -> _Plan:
    """The plan for x of ``[rows, features]`` and these weights, from the cache if they have not changed."""
    key = ("many", rows, features, dtype, device, registry_state.version)
    plan = weights[0]._storage.plans.get(key)
    if plan is not None:
        if plan.fits(weights):
            return plan
        forget(weights[0])  # plans of other numbers of rows keep the tensors of former weights, too
    with torch._C.DisableTorchFunctionSubclass():
        gemm = None
        if why_separate(weights, rows, features, dtype, device) is None:
            pack_together(weights, dtype)
            why = many.why_other_memory(weights, dtype)
            if why is None:
                gemm = many.make_plan()
            else:
                logger.info("%d weights with one input run one by one: %s", len(weights), why)
        plan = _Plan(gemm, weights)
    with LOCK:
        plans = weights[0]._storage.plans
        if len(plans) >= MAX_PLANS:
            plans.clear()
        if plan.fits(weights):  # another thread may have changed a weight meanwhile
            plans[key] = plan
    return plan


def forget(first: QTensor) -> None:
    """Drops the plans of the sets whose first weight this is; they keep the tensors of the others."""
    plans = first._storage.plans
    for key in [key for key in list(plans) if key[0] == "many"]:
        plans.pop(key, None)


def why_separate(
    weights: Sequence[QTensor], rows: int, features: int, dtype: torch.dtype, device: torch.device
) -> str | None:
    """Why the GEMMs of these weights run one by one; None if one launch can compute all once they are packed."""
    why = many.why_not_here(device, rows) or why_unlike(weights)
    if why is not None:
        return why
    if any(weight.device != device for weight in weights):
        return "weights or x are on different devices"
    if weights[0]._spec.shape[1] != features or not dtype.is_floating_point or dtype.itemsize < 2:
        return "x does not fit the weights"
    return many.why_separate(weights, rows, dtype)


# ---------------------------------------------------------------------- graphs


@torch.library.custom_op("requanto::linear_many", mutates_args=())
def _many(
    xs: list[torch.Tensor], biases: list[torch.Tensor | None], parts: list[torch.Tensor], words: str, shapes: list[int]
) -> list[torch.Tensor]:
    """One ``[rows, N_i]`` for each weight.

    Args:
        xs: one tensor ``[rows, K]`` for all, or one for each.
        parts, words, shapes: of all weights, one after the other; words are separated by ``|``. Each shape is followed by
            the number of parts.
    """
    weights = _weights(parts, words, shapes, xs[0].dtype)
    (rows, features), dtype, device = xs[0].shape, xs[0].dtype, xs[0].device
    if xs[0].numel() and many.why_not_here(device, rows) is None:
        given = xs[0] if len(xs) == 1 else [x.contiguous() for x in xs]
        # A packed weight is the model's, with its plans; a plain one was made here, and a plan would be for this call alone.
        packed = [weight.is_packed for weight in weights]
        if all(packed):
            gemm = _plan_for(weights, rows, features, dtype, device).gemm
        elif any(packed):
            gemm = None  # one launch reads one layout
        else:
            separate = why_separate(weights, rows, features, dtype, device) or many.why_other_memory(weights, dtype)
            gemm = many.run if separate is None else None
        if gemm is not None:
            return list(gemm(given, weights, biases, False))
    each = xs if len(xs) > 1 else [xs[0]] * len(weights)
    return [custom_ops.run(x, weight, bias) for x, weight, bias in zip(each, weights, biases)]


@_many.register_fake
def _(xs, biases, parts, words, shapes):  # type: ignore[no-untyped-def]
    return [xs[0].new_empty(xs[0].shape[0], out_features) for out_features in shapes[::3]]


def _weights(parts: list[torch.Tensor], words: str, shapes: list[int], dtype: torch.dtype) -> list[QTensor]:
    """The weights from the arguments of the operator."""
    weights, begin = [], 0
    for text, *shape, count in zip(words.split("|"), shapes[::3], shapes[1::3], shapes[2::3]):
        weights.append(custom_ops._weight(parts[begin : begin + count], text, shape, dtype))
        begin += count
    return weights


class _Found(NamedTuple):
    """Results of one `requanto::linear_many` that wait for their operators, while a graph is traced.

    Attributes:
        x: the input; the entry ends with it.
        values: what x's values were (`_values_of`).
        weights: the weights of the set.
        results: those that nobody took yet, by place.
    """

    x: weakref.ref[torch.Tensor]
    values: object
    weights: list[QTensor]
    results: dict[int, torch.Tensor]


_waiting: dict[int, _Found] = {}


def _of_set(x: torch.Tensor, weights: list[QTensor], biases: list[torch.Tensor | None], place: int) -> torch.Tensor:
    """``x @ weights[place].T + biases[place]`` in a graph; the first of a set computes all."""
    alone = not is_tracing() or x.dim() < 2 or (not x.is_meta and torch.is_autocast_enabled(x.device.type))
    if alone or any(needs_gradient(x, bias) for bias in biases) or why_unlike(weights) is not None:
        return linear(x, weights[place], biases[place])
    found, values = _waiting.get(id(x)), _values_of(x)
    known = found is not None and found.x() is x and _same(found.values, values) and len(found.weights) == len(weights)
    if found is not None and known and all(one is two for one, two in zip(found.weights, weights)):
        result = found.results.pop(place, None)
        if not found.results:
            _waiting.pop(id(x), None)
        if result is not None:
            return result
    if place:
        return linear(x, weights[place], biases[place])
    parts: list[torch.Tensor] = []
    words: list[str] = []
    shapes: list[int] = []
    for weight in weights:
        its_parts, text, shape = custom_ops.arguments(weight)
        parts += its_parts
        words.append(text)
        shapes += [*shape, len(its_parts)]
    rows = x.reshape(-1, x.shape[-1])
    # Multiplied outside of the operator, where a compiler fuses it with what made x.
    columns = any(weight._spec.column for weight in weights)
    xs = [scale_columns(rows, weight) for weight in weights] if columns else [rows]
    outs = torch.ops.requanto.linear_many(xs, biases, parts, "|".join(words), shapes)
    results = {i: out.view(*x.shape[:-1], out.shape[-1]) for i, out in enumerate(outs)}
    key = id(x)
    _waiting[key] = _Found(weakref.ref(x, lambda _: _waiting.pop(key, None)), values, weights, results)
    return results.pop(0)


def _values_of(x: torch.Tensor) -> object:
    """Something that is another one (`_same`) once x's values have changed in place."""
    if isinstance(x, FunctionalTensor):  # a change in place gives it another inner tensor
        return torch._from_functional_tensor(x.elem)
    return None if x.is_inference() else x._version


def _same(one: object, two: object) -> bool:
    return one is two if isinstance(one, torch.Tensor) or isinstance(two, torch.Tensor) else one == two


_library = torch.library.Library("requanto", "FRAGMENT")
_library.define("linear_of_set(Tensor x, Tensor[] weights, Tensor?[] biases, int place) -> Tensor")
_library.impl("linear_of_set", _of_set, "CompositeImplicitAutograd")
