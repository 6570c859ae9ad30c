"""Prepacks weights for the kernels of this machine, at the first GEMM or for a whole model with `prepare`.

The packed codes replace the plain ones, for the parameter and all its aliases, until other tensors are assigned or `unpack`
is called. Reading a packed weight does not unpack it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import nn

from requanto.dtypes.qtypes import qtype
from requanto.linear.cpu import library
from requanto.linear.cpu.strips import STRIPS
from requanto.linear.cpu.strips import fits as fits_strips
from requanto.linear.gpu import humming
from requanto.linear.gpu import layout as gpu_layout
from requanto.runtime.settings import registry_state, settings
from requanto.tensor.layout import LOCK, PLAIN, Layout
from requanto.tensor.qtensor import QTensor

logger = logging.getLogger(__name__)

#: Smaller weights (number of elements) are not packed on a GPU: reading them is a small part of a GEMM's time.
SMALLEST = 2**20
#: The same on a CPU: a packed GEMM of 16 x 32 weights takes a third of the time of dequantizing them.
SMALLEST_ON_CPU = 2**8
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
    # `dtype` makes no difference: the kernels read x in any.
    return STRIPS if weight.device.type == "cpu" and fits_strips(spec) and library.find() is not None else None


def _smallest(layout: Layout) -> int:
    """Number of elements from which on that layout is faster than the plain one."""
    return SMALLEST_ON_CPU if layout is STRIPS else SMALLEST


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
    pays = layout is not None and weight.numel() >= _smallest(layout)
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
    if layout is None:  # ask again when something has changed
        storage.declined = (registry_state.version, dtype, activation)
        return False
    if weight.numel() < (_smallest(layout) if smallest is None else smallest):
        storage.declined = (registry_state.version, dtype, activation)
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


def prepare(model: nn.Module, *, smallest: int | None = None) -> dict[str, str]:
    """Packs every linear layer's weight for this machine now, instead of at its first GEMM.

    Saving and moving the model is not affected: both use the plain layout. Call it before ``torch.compile``, which cannot
    pack, or to avoid a delay at the first token. On a CPU it also loads the library of kernels, or builds it.

    Args:
        smallest: weights with fewer elements are not packed; None: measured thresholds.

    Returns:
        Name of the layout by parameter name, for the packed parameters.
    """
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    multiplied = {id(p) for m in model.modules() if not isinstance(m, nn.Embedding) for p in m._parameters.values()}
    # A CPU looks up rows of packed weights as fast as of plain ones.
    looked_up = {id(t) for t in tables if t.device.type != "cpu" or id(t) not in multiplied}
    done = {}
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, QTensor) or id(parameter) in looked_up:
            continue
        # Convolutions use a packed weight only for small images, and the image size is not known here.
        if parameter.dim() != 4 and _pack(parameter, smallest=smallest):
            done[name] = parameter.layout_name
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
