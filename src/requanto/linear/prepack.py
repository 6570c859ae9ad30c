"""When a weight is packed for its kernel: at its first product, or all at once by `prepare`."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import nn

from requanto.dtypes.qtypes import qint8, qtype
from requanto.linear.cpu import float8, fused_dequantize, int4, onednn_bf16, onednn_int8
from requanto.linear.cpu.aot import cache, calls
from requanto.linear.gpu import layout
from requanto.linear.plan_cache import matrix
from requanto.runtime.settings import choices, settings
from requanto.tensor.layout import LOCK, Packed
from requanto.tensor.qtensor import QTensor

logger = logging.getLogger(__name__)

#: Weights below which packing does not pay: the products' own cost is no longer that of reading weights.
SMALLEST = 2**20
#: The same on a CPU for int4 and int2, which cost more to decode in their stored form (SmolLM2, whose layers have 10^5 to
#: 10^6 weights, generates four times as many tokens a second packed), and for int8 with int8 activations, whose product is
#: two to three times as fast packed. int8 weights alone lose by it below `SMALLEST`, unless compiled kernels read that form.
SMALLEST_ON_CPU = 2**16
#: How often a weight that was read in its stored form is packed again before it stays as it is.
REPACKS = 3


def packer(
    weight: QTensor, dtype: torch.dtype | None = None, activation: qtype | None = None
) -> Callable[[QTensor], Packed] | None:
    """How the weight would be packed for x of ``dtype``; None: it stays as it is stored.

    On a CPU a transposed weight and that of a convolution are for products with the matrix that they are stored as
    (`requanto.linear.api.packed_product`).
    """
    if layout.fits(weight, activation):
        return layout.pack
    if weight.device.type != "cpu" or weight.axis != 0 or weight.dim() not in (2, 4):
        return None
    if weight.qtype == qint8:
        right = not weight.affine and weight.group_size is None and weight.row_length <= onednn_int8.LONGEST
        activation = activation or weight.activation
        wanted = activation == qint8 or (activation is None and (dtype or weight.dtype) != torch.float32)
        return onednn_int8.pack if right and wanted and onednn_int8.works() else None
    if float8.fits(weight):
        return float8.pack
    if not int4.fits(weight):
        return None
    # The operator takes any x; kernels are for bfloat16.
    return int4.pack if weight.group_size in int4.GROUPS or (dtype or weight.dtype) == torch.bfloat16 else None


def _pays(
    weight: QTensor,
    make: Callable[[QTensor], Packed] | None,
    activation: qtype | None = None,
    smallest: int | None = None,
) -> bool:
    """Whether the weight is large enough for the packed form that ``make`` gives it."""
    if smallest is None:
        both = make is onednn_int8.pack and (activation or weight.activation) == qint8
        read = make is onednn_int8.pack and cache.wanted(calls.INT8) and onednn_bf16.fits(*weight.matrix_shape)
        smallest = SMALLEST_ON_CPU if make in (int4.pack, float8.pack) or both or read else SMALLEST
    return make is not None and weight.numel() >= smallest


def layout_to_be(weight: QTensor, dtype: torch.dtype, activation: qtype | None = None) -> str:
    """The layout that a layer's weight has, or will have after its first product with x of ``dtype``.

    Args:
        activation: type that the layer quantizes x to; None: the weight's own choice.
    """
    if weight.packed is not None:
        return weight.packed.layout
    stays = weight.__dict__.get("_stays_plain", False) or not settings.pack_on_first_use
    make = None if stays else packer(weight, dtype, activation)
    make = make if _pays(weight, make, activation) else None
    names = {
        onednn_int8.pack: onednn_int8.LAYOUT,
        int4.pack: int4.LAYOUT,
        float8.pack: float8.LAYOUT,
        layout.pack: layout.LAYOUT,
    }
    return "plain" if make is None else names[make]


def pack_on_first_use(weight: QTensor, dtype: torch.dtype, activation: qtype | None) -> None:
    """Packs a layer's weight, once, unless settings, size or its history speak against it."""
    if (
        weight.packed is not None
        or weight.__dict__.get("_stays_plain", False)
        or not settings.pack_on_first_use
        or not getattr(weight, "_is_param", False)
        or weight.__dict__.get("_no_form_at") == (choices.version, dtype, activation)
    ):
        return
    if weight.numel() < min(SMALLEST, SMALLEST_ON_CPU):
        weight._stays_plain = True
        return
    _pack(weight, dtype, activation)


def _pack(
    weight: QTensor,
    dtype: torch.dtype | None = None,
    activation: qtype | None = None,
    smallest: int | None = None,
) -> bool:
    with LOCK:
        if weight.packed is not None:
            return True
        if layout.capturing(weight.device):
            return False  # a graph is being recorded: what it has read must stay where it is
        make = packer(weight, dtype, activation)
        if make is None:  # float8 has a form for compiled kernels only: ask again when something has changed
            weight._no_form_at = (choices.version, dtype, activation)
            return False
        count = weight.__dict__.get("_times_packed", 0)
        if not _pays(weight, make, activation, smallest) or count > REPACKS:
            weight._stays_plain = True
            return False
        # The form is of no use without the kernels, which are made now if they have never been.
        if make is float8.pack and not calls.ready(calls.FLOAT8):
            return False
        if make is int4.pack and int4.for_kernels(weight) and not calls.ready(calls.NIBBLES):
            return False
        small = make is onednn_int8.pack and (activation or weight.activation) is None and weight.numel() < SMALLEST
        if small and smallest is None and not calls.ready(calls.INT8):
            return False
        with torch.inference_mode(False), torch.no_grad():
            packed = make(matrix(weight) if make is not layout.pack else weight)
        weight._times_packed = count + 1
        weight.pack(packed)
    return True


def keep_plain(weight: QTensor) -> None:
    """Rows of this weight are looked up (an embedding, perhaps tied to the head): it is not packed any more."""
    if not weight.__dict__.get("_stays_plain", False):
        weight._stays_plain = True
        _ = weight.qdata


def _load_kernels(weight: QTensor) -> None:
    """Compiled kernels that this packed weight's products will call, made if they have never been on this machine."""
    families = {int4.LAYOUT: [calls.NIBBLES], float8.LAYOUT: [calls.FLOAT8]}
    families[onednn_int8.LAYOUT] = [calls.INT8 if weight.activation is None else calls.INT8_INT8]
    for family in families.get(weight.packed.layout, []):
        fits = family == calls.INT8_INT8 or onednn_bf16.fits(*weight.matrix_shape)
        if weight.dtype != torch.float32 and cache.wanted(family) and fits:
            calls.ready(family)


def prepare(model: nn.Module, *, smallest: int | None = None) -> dict[str, str]:
    """Packs every linear layer's weight for this machine now, instead of at its first product.

    The packed form replaces the stored one; saving, copying or moving the model gives the stored form back. Worth it before
    ``torch.compile``, which cannot pack, and for a first token without delay: kernels that have never been compiled on this
    machine are (`requanto.linear.cpu.aot.cache`).

    Args:
        smallest: weights of fewer elements stay as they are; None: from where it was measured to pay.

    Returns:
        Layout by parameter name, for the parameters that were packed.
    """
    looked_up = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    done = {}
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, QTensor) or id(parameter) in looked_up:
            continue
        # A convolution is packed for small images alone, which nobody knows yet.
        if parameter.dim() != 4 and _pack(parameter, smallest=smallest) and parameter.packed is not None:
            done[name] = parameter.packed.layout
            _load_kernels(parameter)
        elif parameter.packed is None:
            fused_dequantize.ready(parameter, parameter.dtype)
    logger.info("packed %d weights for this machine", len(done))
    return done
