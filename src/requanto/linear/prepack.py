"""When a weight is packed: at its first GEMM, or all at once by `prepare`.

The layout takes the place of the stored codes, for the parameter and all its aliases, until somebody writes other tensors or
calls `unpack`. Reading a packed weight leaves it packed.
"""

from __future__ import annotations

import logging

import torch
from torch import nn

from requanto.dtypes.qtypes import qint8, qtype
from requanto.linear.cpu import float8, fused_dequantize, int4, onednn_bf16, onednn_int8
from requanto.linear.cpu.aot import cache, calls
from requanto.linear.gpu import layout as gpu_layout
from requanto.runtime.settings import choices, settings
from requanto.tensor.layout import LOCK, PLAIN, Layout
from requanto.tensor.qtensor import QTensor

logger = logging.getLogger(__name__)

#: Weights below which packing does not pay: a GEMM's own cost is no longer that of reading weights.
SMALLEST = 2**20
#: The same on a CPU for int4 and int2, which cost more to decode in their stored form (SmolLM2, whose layers have 10^5 to
#: 10^6 weights, generates four times as many tokens a second packed), and for int8 with int8 activations, whose GEMM is
#: two to three times as fast packed. int8 weights alone lose by it below `SMALLEST`, unless compiled kernels read it.
SMALLEST_ON_CPU = 2**16
#: Why the weight of an embedding stays plain.
LOOKED_UP = "its rows are looked up by an embedding"
#: Holders of a memory block that is this weight's alone: its tensor, and the handle through which they are counted.
_SOLE = 2


def layout_for(weight: QTensor, dtype: torch.dtype | None = None, activation: qtype | None = None) -> Layout | None:
    """The layout that the weight would be packed in for x of ``dtype``; None: it stays as it is stored.

    On a CPU a transposed weight and that of a convolution are packed for GEMMs with the matrix that they are stored as.
    """
    spec = weight._spec
    if gpu_layout.fits(weight, activation):
        return gpu_layout.EXEC
    if weight.device.type != "cpu" or spec.axis != 0 or len(spec.shape) not in (2, 4):
        return None
    if spec.qtype == qint8:
        right = not spec.affine and spec.group_size is None and spec.row_length <= onednn_int8.LONGEST
        activation = activation or spec.activation
        wanted = activation == qint8 or (activation is None and (dtype or spec.dtype) != torch.float32)
        return onednn_int8.layout(*spec.matrix_shape) if right and wanted else None
    if float8.fits(weight):
        return float8.LAYOUT
    if not int4.fits(weight):
        return None
    # The operator takes any x; kernels are for bfloat16.
    return int4.layout() if spec.group_size in int4.GROUPS or (dtype or spec.dtype) == torch.bfloat16 else None


def _smallest(weight: QTensor, layout: Layout, activation: qtype | None) -> int:
    """Numbers of a weight from which on that layout pays."""
    if isinstance(layout, (int4.Int4Layout, float8.Float8Layout)):
        return SMALLEST_ON_CPU
    if isinstance(layout, onednn_int8.Int8Layout):
        if (activation or weight.activation) == qint8:
            return SMALLEST_ON_CPU
        if cache.wanted(calls.INT8) and onednn_bf16.fits(*weight.matrix_shape):
            return SMALLEST_ON_CPU
    return SMALLEST


def layout_to_be(weight: QTensor, dtype: torch.dtype, activation: qtype | None = None) -> str:
    """The layout that a layer's weight has, or will have after its first GEMM with x of ``dtype``.

    Args:
        activation: type that the layer quantizes x to; None: the weight's own choice.
    """
    if weight.is_packed:
        return weight.layout_name
    if weight._storage.stays_plain or not settings.pack_on_first_use:
        return PLAIN.name
    layout = layout_for(weight, dtype, activation)
    pays = layout is not None and weight.numel() >= _smallest(weight, layout, activation)
    return layout.name if pays else PLAIN.name  # type: ignore[union-attr]


def pack_on_first_use(weight: QTensor, dtype: torch.dtype, activation: qtype | None) -> None:
    """Packs a layer's weight, unless the settings, its size or another user of its memory speak against it."""
    storage = weight._storage
    if storage.layout is not PLAIN or storage.stays_plain or not getattr(weight, "_is_param", False):
        return
    if not settings.pack_on_first_use or storage.declined == (choices.version, dtype, activation):
        return
    if weight.numel() < SMALLEST_ON_CPU and weight.numel() < SMALLEST:
        storage.stays_plain = "it is small"
        return
    _pack(weight, dtype, activation)


def _pack(
    weight: QTensor,
    dtype: torch.dtype | None = None,
    activation: qtype | None = None,
    smallest: int | None = None,
) -> bool:
    storage = weight._storage
    if weight.is_packed:
        return True
    if gpu_layout.capturing(weight.device):
        return False  # a graph is being recorded: what it has read must stay where it is
    layout = layout_for(weight, dtype, activation)
    if layout is None:  # float8 has a layout for compiled kernels only: ask again when something has changed
        storage.declined = (choices.version, dtype, activation)
        return False
    if weight.numel() < (_smallest(weight, layout, activation) if smallest is None else smallest):
        storage.declined = (choices.version, dtype, activation)
        return False
    # The layout is of no use without its kernels, which are compiled now if they have never been. No lock is held meanwhile.
    family = _needed(weight, layout, activation) if smallest is None else _always_needed(weight, layout)
    if family is not None and not calls.ready(family):
        return False
    with LOCK:
        why = shared(weight)
        if why is not None:  # it may be alone at the next GEMM
            if storage.declined != why:
                logger.info("a %s weight of shape %s is not packed: %s", weight.qtype.name, tuple(weight.shape), why)
            storage.declined = why
            return False
        weight.pack(layout)
    return True


def shared(weight: QTensor) -> str | None:
    """Who else sees the memory of the codes, and would be left behind with it; None: nobody."""
    storage = weight._storage
    if storage.base is not None:
        return "it is a part of a packed weight"
    codes = storage.parts["qdata"]
    if codes.is_shared() and codes.device.type == "cpu":
        return "other processes share its memory"
    # A view holds the tensor that it was made of, which holds the memory too.
    own = _SOLE + (codes._base is not None)
    if torch._C._storage_Use_Count(codes.untyped_storage()._cdata) > own:  # type: ignore[attr-defined]
        return "another tensor, such as a slice of it, shares its memory"
    return None


def _always_needed(weight: QTensor, layout: Layout) -> str | None:
    """The family of compiled kernels without which no GEMM reads that layout."""
    if isinstance(layout, float8.Float8Layout):
        return calls.FLOAT8
    return calls.NIBBLES if isinstance(layout, int4.Int4Layout) and int4.for_kernels(weight) else None


def _needed(weight: QTensor, layout: Layout, activation: qtype | None) -> str | None:
    """The family of compiled kernels without which that layout does not pay."""
    if isinstance(layout, onednn_int8.Int8Layout):
        return calls.INT8 if (activation or weight.activation) is None and weight.numel() < SMALLEST else None
    return _always_needed(weight, layout)


def _load_kernels(weight: QTensor) -> None:
    """Compiled kernels that this packed weight's GEMMs will call, made if they have never been on this machine."""
    layout = weight._storage.layout
    if isinstance(layout, onednn_int8.Int8Layout):
        family = calls.INT8 if weight.activation is None else calls.INT8_INT8
    elif isinstance(layout, int4.Int4Layout):
        family = calls.NIBBLES
    elif isinstance(layout, float8.Float8Layout):
        family = calls.FLOAT8
    else:
        return
    fits = family == calls.INT8_INT8 or onednn_bf16.fits(*weight.matrix_shape)
    if weight.dtype != torch.float32 and cache.wanted(family) and fits:
        calls.ready(family)


def prepare(model: nn.Module, *, smallest: int | None = None) -> dict[str, str]:
    """Packs every linear layer's weight for this machine now, instead of at its first GEMM.

    Saving and moving the model uses the stored form, which a packed weight gives at any time. Worth it before
    ``torch.compile``, which cannot pack, and for a first token without delay: kernels that have never been compiled on this
    machine are (`requanto.linear.cpu.aot.cache`).

    Args:
        smallest: weights of fewer elements stay as they are; None: from where it was measured to pay.

    Returns:
        Layout by parameter name, for the parameters that are packed.
    """
    looked_up = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    done = {}
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, QTensor) or id(parameter) in looked_up:
            continue
        # A convolution is packed for small images alone, which nobody knows yet.
        if parameter.dim() != 4 and _pack(parameter, smallest=smallest):
            done[name] = parameter.layout_name
            _load_kernels(parameter)
        elif not parameter.is_packed:
            fused_dequantize.ready(parameter, parameter.dtype)
    logger.info("packed %d weights for this machine", len(done))
    return done


def unpack(model: nn.Module) -> list[str]:
    """Puts every packed weight back into its stored form, e.g. before ``torch.export`` for another machine.

    They are packed again at their next GEMM unless ``requanto.settings.pack_on_first_use`` is False.

    Returns:
        Names of the parameters that were packed.
    """
    found = [(name, p) for name, p in model.named_parameters() if isinstance(p, QTensor) and p.is_packed]
    for _, parameter in found:
        parameter.unpack()
    return [name for name, _ in found]
