"""Weights from the arguments of operators and from pickles. All of them pass the constructor's checks."""

from __future__ import annotations

from typing import Any

import torch

from requanto.dtypes.qtypes import qtypes
from requanto.tensor.layout import PLAIN, Layout, layout_named
from requanto.tensor.qtensor import QTensor
from requanto.tensor.spec import WeightSpec


@torch.library.custom_op("requanto::stored_codes", mutates_args=())
def _stored_codes(parts: list[torch.Tensor], words: str, shape: list[int]) -> torch.Tensor:
    """The plain codes of a prepacked weight, as an operator for traced graphs."""
    spec, layout, named = operator_weight(parts, words, shape, torch.float32)
    layout.check(spec, named)
    codes = layout.unpack(spec, named).view(spec.codes_shape)
    return codes.clone() if codes.data_ptr() == named["qdata"].data_ptr() else codes  # no result may be an argument


@_stored_codes.register_fake
def _(parts: list[torch.Tensor], words: str, shape: list[int]) -> torch.Tensor:
    spec = WeightSpec.from_words(words.partition(" layout=")[0], shape, torch.float32)
    return parts[0].new_empty(spec.codes_shape, dtype=spec.qtype.storage_dtype)


def operator_weight(
    parts: list[torch.Tensor], words: str, shape: Any, dtype: torch.dtype
) -> tuple[WeightSpec, Layout, dict[str, torch.Tensor]]:
    """Spec, layout and parts by name from the arguments of a custom operator; not checked yet.

    Args:
        parts: in the order of `Layout.names`.
        words: `WeightSpec.words`, followed by ``layout=NAME``.
        shape: the stored shape.
        dtype: dtype that the weight shows.

    Raises:
        ValueError: the number of parts does not fit the spec.
    """
    plain, _, name = words.partition(" layout=")
    spec, layout = WeightSpec.from_words(plain, shape, dtype), layout_named(name or PLAIN.name)
    names = layout.names(spec)
    if len(names) != len(parts):
        raise ValueError(f"{spec.text()}: found {len(parts)} tensors, expected {', '.join(names)}")
    return spec, layout, dict(zip(names, parts))


def _rebuild(
    words: str, shape: tuple[int, ...], dtype: torch.dtype, parts: dict[str, torch.Tensor], is_parameter: bool
) -> QTensor:
    """Unpickles a QTensor. Its device is that of the codes, so ``map_location`` works."""
    spec = WeightSpec.from_words(words, shape, dtype)
    codes = parts["qdata"]
    tensor = QTensor._of(spec, {**parts, "qdata": codes.view(spec.qtype.storage_dtype)})
    if is_parameter:
        tensor._is_param = True
    return tensor


def _rebuild_qtensor(
    qdata: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor | None,
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    axis: int,
    group_size: int | None,
    transposed: bool,
    is_param: bool,
    activation: str | None = None,
    up: torch.Tensor | None = None,
    down: torch.Tensor | None = None,
    later: dict[str, Any] | None = None,
) -> QTensor:
    """Unpickles a QTensor that was written by version 0.1 before November 2026."""
    tensor = QTensor(
        qdata.view(qtypes[name].storage_dtype),
        scale,
        shift,
        qtype=qtypes[name],
        shape=shape,
        dtype=dtype,
        axis=axis,
        group_size=group_size,
        transposed=transposed,
        activation=None if activation is None else qtypes[activation],
        up=up,
        down=down,
        **(later or {}),
    )
    if is_param:
        tensor._is_param = True
    return tensor


# Pickles refer to these functions by module and name, so the module name must not change when files move.
_rebuild.__module__ = _rebuild_qtensor.__module__ = "requanto.qtensor"
# torch.load(weights_only=True) only calls registered functions; these build tensors and have no side effects.
torch.serialization.add_safe_globals([_rebuild, _rebuild_qtensor, (QTensor, "requanto.qtensor.QTensor"), QTensor])
