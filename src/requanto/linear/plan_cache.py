"""Products made ready: what depends on a weight and on the shape of x alone is done once, and kept with the weight.

A product of a small layer takes 50 us on a CPU; what Python does between ``F.linear`` and the kernel takes as long again,
and three times as long after a large product has driven it out of the caches. A bound product is found by x's shape and
dtype, and is two calls.

It holds the memory of the packed form it reads, so a weight that turns plain forgets it; and whatever else it was made from
is compared at each use, so that nobody who changes a weight has to know of it.

Of a weight that is no plain matrix, transposed or that of a convolution, products with the matrix that it is stored as are
kept (`requanto.linear.api.packed_product`).
"""

from __future__ import annotations

import torch

from requanto.linear.registry import Product, choose, problem_of
from requanto.runtime.settings import choices
from requanto.runtime.tracing import has_numbers, wants_gradient
from requanto.tensor.layout import LOCK, Packed
from requanto.tensor.qtensor import QTensor

#: Shapes remembered with a weight; one more, and all are forgotten.
SHAPES = 16


class Bound:
    """A product, or None where there is nothing to make ready, and what it was made from."""

    __slots__ = ("activation", "address", "packed", "product", "scale", "shift")

    def __init__(self, weight: QTensor, product: Product | None) -> None:
        self.product = product
        self.packed, self.scale, self.shift = weight._packed, weight._scale, weight._shift
        self.activation, self.address = weight.activation, weight._scale.data_ptr()


def find(x: torch.Tensor, weight: QTensor, bias: torch.Tensor | None) -> Product | None:
    """The product made ready for an x like this one, if it holds for this call: no gradient, no autocast, no tracing."""
    if torch.compiler.is_compiling():  # alone and first: a compiler that reads this line skips the others
        return None
    held = weight.__dict__
    kept = held.get("_bound")
    if kept is None or not has_numbers():
        return None
    found = kept.get((x.shape, x.dtype, choices.version))
    if found is None:
        return None
    if (
        found.packed is not held["_packed"]
        or found.scale is not held["_scale"]
        or found.address != found.scale.data_ptr()
        or found.shift is not held["_shift"]
        or found.activation is not held["activation"]
        or held["up"] is not None
        or held["rotation"] is not None
    ):
        kept.clear()
        return None
    if not x.is_cpu or torch.is_autocast_enabled("cpu"):
        return None
    if wants_gradient(x, bias):
        return None
    return found.product


def remember(x: torch.Tensor, weight: QTensor) -> None:
    """Makes the product ready that the next x like this one will want."""
    if not has_numbers() or weight._packed is None or weight.up is not None or weight.rotation is not None:
        return
    if x.device.type != "cpu" or x.dim() < 2 or not x.numel():
        return
    kept = weight.__dict__.setdefault("_bound", {})
    key = x.shape, x.dtype, choices.version
    if key in kept:
        return
    rows = x.numel() // x.shape[-1]
    stored = matrix(weight)
    bind = choose(problem_of(stored, x.dtype, rows, weight.activation)).implementation.bind
    product = bind(stored, rows, x.dtype) if bind is not None else None
    if len(kept) >= SHAPES:
        kept.clear()
    packed = stored.packed
    copied = product is not None and packed is not None and packed.row_scales
    kept[key] = Bound(weight, _with_its_scales(product, packed) if copied else product)


def _with_its_scales(product: Product, packed: Packed) -> Product:
    """A product that reads copies of scales (`Packed.row_scale`): they are written anew first."""

    def with_its_scales(x: torch.Tensor, weight: QTensor, bias: torch.Tensor | None) -> torch.Tensor:
        for held in list(packed.row_scales):
            packed.row_scale(weight, held)
        return product(x, weight, bias)

    return with_its_scales


def matrix(weight: QTensor) -> QTensor:
    """A weight as the matrix ``[N, K]`` of its stored form, sharing its packed one; itself, where it is that."""
    if weight.dim() == 2 and not weight.transposed:
        return weight
    shape = weight.matrix_shape
    with LOCK:  # its codes and their form are not to change in between
        packed = weight._packed  # held here: another thread may make the weight plain meanwhile
        codes = weight._qdata.reshape(shape[0], -1) if packed is None else packed.handle
    return weight.replace(codes, shape=shape, axis=0, transposed=False)
