"""Prepacks weights for the kernels of this machine, at the first GEMM or for a whole model with `prepare`.

The packed codes replace the plain ones, for the parameter and all its aliases, until other tensors are assigned or `unpack`
is called. Reading a packed weight does not unpack it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import nn

from requanto.dtypes.qtypes import qint8, qtype
from requanto.linear.cpu import float8, fused_dequantize, int4, onednn_bf16, onednn_int8
from requanto.linear.cpu.aot import cache, calls
from requanto.linear.gpu import humming
from requanto.linear.gpu import layout as gpu_layout
from requanto.runtime.settings import registry_state, settings
from requanto.tensor.layout import LOCK, PLAIN, Layout
from requanto.tensor.qtensor import QTensor

logger = logging.getLogger(__name__)

#: Smaller weights (number of elements) are not packed: reading them is a small part of a GEMM's time.
SMALLEST = 2**20
#: The same on a CPU for int4 and int2, which are slow to decode from the plain layout (SmolLM2, whose layers have 10^5 to
#: 10^6 weights, generates four times as many tokens per second packed), and for int8 with int8 activations, whose GEMM is
#: two to three times as fast packed. int8 weights with float activations are slower packed below `SMALLEST`, unless compiled
#: kernels read them.
SMALLEST_ON_CPU = 2**16
#: Why a small weight stays plain.
SMALL = "it is small"
#: Why an embedding's weight stays plain.
EMBEDDING_WEIGHT = "its rows are looked up by an embedding"
#: References to a memory block that only this weight uses: its tensor, and the handle that is used to count them.
_OWN_REFERENCES = 2
_warned_of_memory = False


def layout_for(weight: QTensor, dtype: torch.dtype | None = None, activation: qtype | None = None) -> Layout | None:
    """The layout to pack the weight into for x of ``dtype``; None if it stays plain.

    On a CPU, transposed weights and those of convolutions are packed for GEMMs with their stored matrix.
    """
    spec = weight._spec
    if not weight.numel():
        return None
    other = humming.layout_for(weight, dtype, activation)
    if other is not None:
        return other
    if gpu_layout.fits(weight, activation):
        return gpu_layout.EXEC
    if weight.device.type != "cpu" or spec.axis != 0 or len(spec.shape) not in (2, 4):
        return None
    if spec.qtype == qint8:
        right = not spec.affine and spec.group_size is None and spec.row_length <= onednn_int8.MAX_K
        activation = activation or spec.activation
        wanted = activation == qint8 or (activation is None and (dtype or spec.dtype) != torch.float32)
        return onednn_int8.layout(*spec.matrix_shape) if right and wanted else None
    if float8.fits(weight):
        return float8.LAYOUT
    if not int4.fits(weight):
        return None
    if (dtype or spec.dtype) == torch.bfloat16:
        return int4.layout()
    # Other dtypes are dequantized: int4 as fast from the plain layout, which needs no second copy of the scales. Without a
    # dtype, `prepare` asks: x may have any.
    faster = spec.qtype.bits < 4 or dtype is None
    return int4.layout() if spec.group_size in int4.GROUPS and faster else None


def _smallest(weight: QTensor, layout: Layout, activation: qtype | None) -> int:
    """Number of elements from which on that layout is faster than the plain one."""
    if isinstance(layout, (int4.Int4Layout, float8.Float8Layout)):
        return SMALLEST_ON_CPU
    if isinstance(layout, onednn_int8.Int8Layout):
        if (activation or weight.activation) == qint8:
            return SMALLEST_ON_CPU
        if cache.wanted(calls.INT8) and onednn_bf16.fits(*weight.matrix_shape):
            return SMALLEST_ON_CPU
    return SMALLEST


def expected_layout(weight: QTensor, dtype: torch.dtype, activation: qtype | None = None) -> str:
    """Name of the layout that a layer's weight has, or will have after its first GEMM with x of ``dtype``.

    Args:
        activation: type that the layer quantizes x to; None: ``weight.activation``.
    """
    if weight.is_packed:
        return weight.layout_name
    if weight._storage.stays_plain or not settings.pack_on_first_use:
        return PLAIN.name
    layout = layout_for(weight, dtype, activation)
    pays = layout is not None and weight.numel() >= _smallest(weight, layout, activation)
    return layout.name if pays else PLAIN.name  # type: ignore[union-attr]


def pack_on_first_use(weight: QTensor, dtype: torch.dtype, activation: qtype | None) -> None:
    """Packs a layer's weight, unless settings forbid it, the weight is small, or other tensors share its memory."""
    storage = weight._storage
    if storage.layout is not PLAIN or storage.stays_plain or not getattr(weight, "_is_param", False):
        return
    if not settings.pack_on_first_use or storage.declined == (registry_state.version, dtype, activation):
        return
    if weight.numel() < SMALLEST_ON_CPU and weight.numel() < SMALLEST:
        storage.stays_plain = SMALL
        return
    _pack(weight, dtype, activation)


def pack_together(weights: Sequence[QTensor], dtype: torch.dtype) -> None:
    """`pack_on_first_use` for weights that one launch reads: small ones are packed as well if a larger one is."""
    for weight in weights:
        pack_on_first_use(weight, dtype, None)
    if not settings.pack_on_first_use or not any(weight.is_packed for weight in weights):
        return
    for weight in weights:
        if getattr(weight, "_is_param", False) and weight._storage.stays_plain in (None, SMALL):
            _pack(weight, dtype, None, smallest=0)


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
        return False  # the CUDA graph that is being captured may have recorded the address of the codes
    layout = layout_for(weight, dtype, activation)
    if layout is not None and not humming.ready(weight, layout):  # compiles its kernels; the next choice is another
        layout = layout_for(weight, dtype, activation)
    if layout is None:  # float8 has a layout for compiled kernels only: ask again when something has changed
        storage.declined = (registry_state.version, dtype, activation)
        return False
    if weight.numel() < (_smallest(weight, layout, activation) if smallest is None else smallest):
        storage.declined = (registry_state.version, dtype, activation)
        return False
    # The layout is of no use without its kernels, which are compiled now if they have never been. No lock is held meanwhile.
    family = (
        _required_family(weight, layout, activation) if smallest is None else _family_required_to_read(weight, layout)
    )
    if family is not None and not calls.ready(family):
        return False
    with LOCK:
        # Codes that keep their order stay in the memory that they share.
        stays = layout.order(weight._spec) == PLAIN.name and storage.base is None
        why = None if stays else shared(weight)
        if why is not None:  # tried again at the next GEMM, when this may have changed
            if storage.declined != why:
                logger.info("a %s weight of shape %s is not packed: %s", weight.qtype.name, tuple(weight.shape), why)
            storage.declined = why
            return False
        try:
            weight.pack(layout)
        except torch.OutOfMemoryError:  # nothing has changed: the kernels read the stored form too, somewhat slower
            storage.declined = (registry_state.version, dtype, activation)
            _log_out_of_memory(weight, layout)
            return False
    return True


def _log_out_of_memory(weight: QTensor, layout: Layout) -> None:
    """One warning a process: after the first weight, the others meet the same."""
    global _warned_of_memory
    level = logging.DEBUG if _warned_of_memory else logging.WARNING
    _warned_of_memory = True
    logger.log(
        level,
        "%s of shape %s on %s stays as it is stored, and so may others: no memory is left to bring it into the layout %r. "
        "Kernels read it too, somewhat slower; call requanto.prepare(model) before other memory is taken.",
        weight._storage.name or f"a {weight.qtype.name} weight", tuple(weight.shape), weight.device, layout.name,
    )  # fmt: skip


def shared(weight: QTensor) -> str | None:
    """Why the codes share memory with other tensors, which packing would separate from them; None if they do not."""
    storage = weight._storage
    if storage.base is not None:
        return "it is a slice of another weight"
    codes = storage.parts["qdata"]
    if codes.is_shared() and codes.device.type == "cpu":
        return "other processes share its memory"
    if torch._C._storage_Use_Count(codes.untyped_storage()._cdata) > _OWN_REFERENCES:  # type: ignore[attr-defined]
        return "another tensor, such as a slice of it, shares its memory"
    return None


def _family_required_to_read(weight: QTensor, layout: Layout) -> str | None:
    """The family of compiled kernels that every GEMM with that layout needs; None if there is one without kernels."""
    if isinstance(layout, float8.Float8Layout):
        return calls.FLOAT8
    return calls.NIBBLES if isinstance(layout, int4.Int4Layout) and int4.only_for_kernels(weight) else None


def _required_family(weight: QTensor, layout: Layout, activation: qtype | None) -> str | None:
    """The family of compiled kernels without which that layout is not faster than the plain one, or not readable."""
    if isinstance(layout, onednn_int8.Int8Layout):
        return calls.INT8 if (activation or weight.activation) is None and weight.numel() < SMALLEST else None
    return _family_required_to_read(weight, layout)


def _load_kernels(weight: QTensor) -> None:
    """Loads the compiled kernels for this packed weight's GEMMs; compiles them if they are not in the cache."""
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

    Saving and moving the model is not affected: both use the plain layout. Call it before ``torch.compile``, which cannot
    pack, or to avoid a delay at the first token. It also compiles the CPU kernels that are not in the cache yet
    (`requanto.linear.cpu.aot.cache`).

    Args:
        smallest: weights with fewer elements are not packed; None: measured thresholds.

    Returns:
        Name of the layout by parameter name, for the packed parameters.
    """
    looked_up = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    done = {}
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, QTensor) or id(parameter) in looked_up:
            continue
        # Convolutions use a packed weight only for small images, and the image size is not known here.
        if parameter.dim() != 4 and _pack(parameter, smallest=smallest):
            done[name] = parameter.layout_name
            _load_kernels(parameter)
        elif not parameter.is_packed:
            fused_dequantize.ready(parameter, parameter.dtype)
    logger.info("packed %d weights for this machine", len(done))
    return done


def unpack(model: nn.Module) -> list[str]:
    """Returns every packed weight to the plain layout, e.g. before ``torch.export`` for another machine.

    Weights are packed again at their next GEMM unless ``requanto.settings.pack_on_first_use`` is False.

    Returns:
        Names of the parameters that were packed.
    """
    found = [(name, p) for name, p in model.named_parameters() if isinstance(p, QTensor) and p.is_packed]
    for _, parameter in found:
        parameter.unpack()
    return [name for name, _ in found]
