"""Cache layers for Transformers whose old tokens are quantized; they grow as tokens are generated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import cache_utils
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from requanto.kv import Codec, Growing, KVSettings


def check_same_model(have: torch.Size, dtype: torch.dtype, found: torch.Tensor, name: str) -> None:
    """Raises ValueError if new keys or values do not fit those in the cache; the number of tokens is not compared."""
    rest = [*have[:2], have[3]]
    if [*found.shape[:2], found.shape[3]] != rest or found.dtype != dtype:
        batch, heads, channels = rest
        raise ValueError(
            f"the cache holds {name} of shape [{batch}, {heads}, tokens, {channels}] in {dtype}, found new ones of shape "
            f"{list(found.shape)} in {found.dtype}: a cache is for one model and one batch of texts; make a new one, or "
            f"call its reset()"
        )


def tokens_to_remove(number: int, length: int) -> int:
    """The argument of ``crop`` as a number of tokens.

    Transformers gives the number to remove as a negative number; up to 5.17 also the length to keep as a positive one.
    """
    return -number if number <= 0 else max(0, length - number)


class ReadOnlyStates:
    """``keys`` and ``values`` of a cache layer, dequantized at each access by ``_read``, and the bytes of ``_stores``."""

    _stores: tuple[Any, Any] | None
    _read: Callable[[int], torch.Tensor | None]

    @property
    def keys(self) -> torch.Tensor | None:
        """All keys as floats, None before the first update; places of fixed buffers after the last token are finite."""
        return self._read(0)

    @keys.setter
    def keys(self, value: torch.Tensor | None) -> None:
        self._only_none("keys", value)

    @property
    def values(self) -> torch.Tensor | None:
        """All values as floats, as for keys."""
        return self._read(1)

    @values.setter
    def values(self, value: torch.Tensor | None) -> None:
        self._only_none("values", value)

    @staticmethod
    def _only_none(name: str, value: torch.Tensor | None) -> None:
        if value is not None:  # None: Transformers' constructors
            raise AttributeError(f"{name} of a quantized cache layer are read only: new tokens are added by update()")

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and floats."""
        return 0 if self._stores is None else sum(store.nbytes for store in self._stores)


class QuantizedLayer(ReadOnlyStates, DynamicLayer):
    """Keys and values of a layer with full attention.

    ``keys`` and ``values`` are all tokens as floats, dequantized at each access: cross-attention reads them.

    Args:
        settings: types and window.
    """

    is_croppable = True
    _settings = KVSettings()

    def __init__(self, settings: KVSettings | None = None, **kwargs: Any) -> None:
        if settings is not None:
            self._settings = settings
        self._stores: tuple[Growing, Growing] | None = None
        super().__init__(**kwargs)

    def _read(self, which: int) -> torch.Tensor | None:
        return None if self._stores is None else self._stores[which].read()

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Makes empty stores for keys and values of these shapes, dtypes and device."""
        self.dtype, self.device = key_states.dtype, key_states.device
        kind, (key_codec, value_codec) = self._settings, self._codecs()
        self._stores = (
            Growing(key_states, key_codec, kind.window, kind.block),
            Growing(value_states, value_codec, kind.window, kind.block),
        )
        self.is_initialized = True

    def _codecs(self) -> tuple[Codec | None, Codec | None]:
        return self._settings.key_codec(), self._settings.value_codec()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds tokens and returns all of them as floats; the new ones are returned as they were given."""
        self._append(key_states, value_states)
        found = (self._stores[0].read(), self._stores[1].read())  # type: ignore[index]
        self._settle()
        return found

    def _append(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        if self._stores is None:
            self.lazy_initialization(key_states, value_states)
        for store, new, name in zip(self._stores, (key_states, value_states), ("keys", "values")):  # type: ignore[arg-type]
            check_same_model(store.shape, store.dtype, new, name)
            if store.device != new.device:
                store.to(new.device)
            store.append(new)

    def _settle(self) -> None:
        for store in self._stores or ():
            store.quantize_old()

    def get_seq_length(self) -> int:
        """Number of tokens."""
        return 0 if self._stores is None else self._stores[0].length

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last tokens (given as a negative number); codes and scales of the others stay as they are."""
        count = _removed(tokens_to_remove, self.get_seq_length())
        for store in self._stores or ():
            store.crop(count)

    def reset(self) -> None:
        """Removes all tokens; the next ones may be of another batch."""
        self._stores, self.is_initialized = None, False

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i of the batch becomes row ``beam_idx[i]``: exact, codes and scales are moved."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps these rows of the batch, given as indices or as a boolean mask."""
        indices = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
        for store in self._stores or ():
            store.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row of the batch."""
        for store in self._stores or ():
            store.repeat(repeats)

    def offload(self) -> None:
        """Moves codes, scales and floats to the CPU."""
        for store in self._stores or ():
            store.to("cpu")

    def prefetch(self) -> None:
        """Moves them back."""
        for store in self._stores or ():
            if store.device != self.device:
                store.to(self.device)


_removed = tokens_to_remove  # `crop` has a parameter of this name, which callers may use


class QuantizedSlidingLayer(QuantizedLayer, DynamicSlidingWindowLayer):
    """Keys and values of a layer that attends to the last ``sliding_window`` tokens. Older blocks are removed.

    With a sliding window of less than ``window + block`` tokens they stay float.
    """

    def __init__(self, settings: KVSettings, sliding_window: int, **kwargs: Any) -> None:
        super().__init__(settings, sliding_window=sliding_window, **kwargs)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self._sliding_window_tensor = self._sliding_window_tensor.to(self.device)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds tokens; returns them and the ``sliding_window - 1`` tokens before them as floats."""
        self._append(key_states, value_states)
        new = key_states.shape[2]
        self.cumulative_length += new
        visible = self.sliding_window - 1 + new
        keys, values = (store.read()[:, :, -visible:] for store in self._stores)  # type: ignore[union-attr]
        # In this order: blocks begin at the same tokens however many come at once.
        self._settle()
        if not self.record_past:
            self._forget()
        return keys, values

    def _codecs(self) -> tuple[Codec | None, Codec | None]:
        small = self.sliding_window < self._settings.window + self._settings.block
        return (None, None) if small else super()._codecs()

    def _forget(self) -> None:
        for store in self._stores or ():
            store.drop_front(max(0, store.length - (self.sliding_window - 1)))

    def get_seq_length(self) -> int:
        """Number of tokens so far, with those that were removed."""
        return self.cumulative_length

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last tokens; needs `activate_past_recording` if older ones may be gone."""
        count = _removed(tokens_to_remove, self.cumulative_length)
        kept = 0 if self._stores is None else self._stores[0].length
        needed = min(self.cumulative_length - count, self.sliding_window - 1)
        if kept - count < needed and count:
            raise RuntimeError(
                f"{count} tokens cannot be removed from a layer with a sliding window of {self.sliding_window}: tokens that "
                f"would be needed again are gone. Call activate_past_recording() on the cache before they are added"
            )
        for store in self._stores or ():
            store.crop(count)
        self.cumulative_length -= count
        self._forget()

    def reset(self) -> None:
        super().reset()
        self.cumulative_length = 0


class QuantizedIndexedLayer(DynamicIndexedLayer, QuantizedLayer):
    """Keys and values of a layer with sparse attention; the keys of its indexer stay float."""

    def __init__(self, settings: KVSettings, **kwargs: Any) -> None:
        self._settings = settings  # Transformers' constructor takes none
        super().__init__()
        self.indexer_position_ids = None


class WithLinearAttention:
    """Mixin of layers with attention and linear attention: its states (of fixed size) stay float."""

    _attention: type[CacheLayerMixin]

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        # Keys and values are given by position, states by name.
        owner: Any = self._attention if args else LinearAttentionLayer
        owner.lazy_initialization(self, *args, **kwargs)

    def reset(self) -> None:
        LinearAttentionLayer.reset(self)  # type: ignore[arg-type]
        self._attention.reset(self)  # type: ignore[arg-type]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        LinearAttentionLayer.reorder_cache(self, beam_idx)  # type: ignore[arg-type]
        self._attention.reorder_cache(self, beam_idx)  # type: ignore[arg-type]

    def crop(self, tokens_to_remove: int) -> None:
        LinearAttentionLayer.crop(self, tokens_to_remove)  # type: ignore[arg-type]
        self._attention.crop(self, tokens_to_remove)  # type: ignore[attr-defined]

    def offload(self) -> None:
        LinearAttentionLayer.offload(self)  # type: ignore[arg-type]
        self._attention.offload(self)  # type: ignore[arg-type]

    def prefetch(self) -> None:
        LinearAttentionLayer.prefetch(self)  # type: ignore[arg-type]
        self._attention.prefetch(self)  # type: ignore[arg-type]


class QuantizedHybridLayer(WithLinearAttention, QuantizedLayer, LinearAttentionAndFullAttentionLayer):
    """A layer with full attention and linear attention."""

    _attention = QuantizedLayer


class QuantizedHybridSlidingLayer(
    WithLinearAttention, QuantizedSlidingLayer, LinearAttentionAndSlidingWindowAttentionLayer
):
    """A layer with sliding-window attention and linear attention."""

    _attention = QuantizedSlidingLayer


def quantized_layer(layer: Any, settings: KVSettings) -> Any:
    """The quantized layer for one of Transformers' dynamic layers; one without keys stays as it is; None: unknown."""
    kind, states = type(layer), {"number_of_states": getattr(layer, "number_of_states", 1)}
    if kind is DynamicLayer:
        return QuantizedLayer(settings)
    if kind is DynamicSlidingWindowLayer:
        return QuantizedSlidingLayer(settings, layer.sliding_window)
    if kind is DynamicIndexedLayer:
        return QuantizedIndexedLayer(settings)
    if kind is LinearAttentionAndFullAttentionLayer:
        return QuantizedHybridLayer(settings, **states)
    if kind is LinearAttentionAndSlidingWindowAttentionLayer:
        return QuantizedHybridSlidingLayer(settings, layer.sliding_window, **states)
    return layer if without_keys(layer) else None


def without_keys(layer: Any) -> bool:
    """True for layers that have no keys and values: linear attention, and layers without a cache of their own."""
    dummy = getattr(cache_utils, "DummyLayer", None)
    return type(layer) is LinearAttentionLayer or (dummy is not None and type(layer) is dummy)
