"""Cache layers for Transformers whose old tokens are quantized, in buffers of fixed size: for compiled models."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import (
    LinearAttentionAndStaticFullAttentionLayer,
    LinearAttentionAndStaticSlidingWindowAttentionLayer,
    StaticIndexedLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from requanto.integrations.transformers_cache_layers import (
    ReadOnlyStates,
    WithLinearAttention,
    check_same_model,
    without_keys,
)
from requanto.kv import Fixed, KVSettings


class StaticQuantizedLayer(ReadOnlyStates, StaticLayer):
    """Keys and values of a layer with full attention, up to ``max_cache_len`` tokens.

    Args:
        settings: types and window.
        max_cache_len: most tokens.
    """

    _sliding = False
    _settings = KVSettings()

    def __init__(self, settings: KVSettings | None = None, *, max_cache_len: int, **kwargs: Any) -> None:
        if settings is not None:
            self._settings = settings
        self._stores: tuple[Fixed, Fixed] | None = None
        # The number of tokens is a tensor (`cumulative_length`), and so is this: a compiled step must not depend on them.
        self._quantized = torch.tensor(0, dtype=torch.int64, device="cpu")
        super().__init__(max_cache_len=max_cache_len, **kwargs)

    def _read(self, which: int) -> torch.Tensor | None:
        if self._stores is None:
            return None
        return self._stores[which].read(self.cumulative_length, self._quantized, self._offset(1), self.max_cache_len)

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether the last tokens can be removed: those in the window, if no older ones are overwritten."""
        return self._settings.window > 0 and not self._sliding

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocates the buffers for keys and values of these shapes, dtypes and device."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size, self.num_heads = key_states.shape[:2]
        self.k_head_dim, self.v_head_dim = key_states.shape[-1], value_states.shape[-1]
        kind, size = self._settings, self.max_cache_len
        self._stores = (
            Fixed(key_states, kind.key_codec(), kind.window, kind.block, size, self._sliding),
            Fixed(value_states, kind.value_codec(), kind.window, kind.block, size, self._sliding),
        )
        self.cumulative_length = self.cumulative_length.to(self.device)
        self._quantized = self._quantized.to(self.device)
        if not torch.compiler.is_compiling():
            # CUDA graphs need to know that these are updated in place.
            for buffer in (self.cumulative_length, self._quantized, *self._stores[0].buffers, *self._stores[1].buffers):
                torch._dynamo.mark_static_address(buffer)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds tokens and returns all places as floats; new tokens are returned as they were given.

        Raises:
            ValueError: the keys or values are of another shape or dtype; on a CPU also if there are too many tokens.
        """
        if self._stores is None:
            self.lazy_initialization(key_states, value_states)
        self._check(key_states, value_states)
        new, length = key_states.shape[2], self.cumulative_length
        size, offset = self._size(new), self._offset(new)
        keys, values = (
            store.update(states, length, self._quantized, offset, size)
            for store, states in zip(self._stores, (key_states, value_states))  # type: ignore[arg-type]
        )
        for store in self._stores:  # type: ignore[union-attr]
            if store.codec is not None:
                self._quantized.copy_(store.quantized_after(length + new, self._quantized))
                break
        length.add_(new)
        return keys, values

    def _check(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        batch, heads = self.batch_size, self.num_heads
        check_same_model(torch.Size([batch, heads, 0, self.k_head_dim]), self.dtype, key_states, "keys")
        check_same_model(torch.Size([batch, heads, 0, self.v_head_dim]), self.dtype, value_states, "values")
        # A read of the length would stop a GPU, and split a compiled graph.
        if self.device.type == "cpu" and not self._sliding and not torch.compiler.is_compiling():
            total = int(self.cumulative_length) + key_states.shape[2]
            if total > self.max_cache_len:
                raise ValueError(
                    f"a static cache of max_cache_len={self.max_cache_len} tokens is given {total} tokens: make it larger"
                )

    def _size(self, new: int) -> int:
        """Number of places that are returned with ``new`` new tokens."""
        return self.max_cache_len

    def _offset(self, new: int) -> torch.Tensor | int:
        """The token in the first of these places."""
        return 0

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last tokens (given as a negative number), of which at most those that are float."""
        count = abs(tokens_to_remove)
        floats = int(self.cumulative_length) - int(self._quantized)
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop takes the number of tokens to remove as a negative number, found {tokens_to_remove}"
            )
        if count > floats:
            raise ValueError(
                f"a static quantized cache can remove its float tokens, now {floats}, found {count}: use a larger "
                f"window, now {self._settings.window}, or QuantizedCache, which can remove all tokens"
            )
        self.cumulative_length.sub_(count)

    def reset(self) -> None:
        """Removes all tokens; the buffers stay where they are."""
        self.cumulative_length.zero_()
        self._quantized.zero_()
        for store in self._stores or ():
            store.zero()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i of the batch becomes row ``beam_idx[i]``: exact, codes and scales are moved."""
        for store in self._stores or ():
            store.select(beam_idx)

    def offload(self) -> None:
        """Not supported: buffers that move have no fixed address."""
        raise NotImplementedError(
            "a static quantized cache cannot be offloaded: use requanto.QuantizedCache(offloading=True)"
        )


class StaticQuantizedSlidingLayer(StaticQuantizedLayer, StaticSlidingWindowLayer):
    """Keys and values of a layer that attends to the last ``sliding_window`` tokens.

    Unlike Transformers' layer, it keeps no number of tokens in Python: a compiled step reads none, and is compiled once.
    """

    def __init__(self, settings: KVSettings, max_cache_len: int, sliding_window: int, **kwargs: Any) -> None:
        # Up to the window the layer is one of full attention.
        self._sliding = max_cache_len > sliding_window
        super().__init__(settings, max_cache_len=max_cache_len, sliding_window=sliding_window, **kwargs)

    @property
    def cumulative_length_int(self) -> int:
        """Number of tokens so far, read from the device."""
        return int(self.cumulative_length)

    @cumulative_length_int.setter
    def cumulative_length_int(self, value: int) -> None:
        pass  # Transformers' constructor sets 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of places that `update` returns, and the token in the first."""
        offset = self._offset(query_length)
        if isinstance(offset, torch.Tensor) and not torch.compiler.is_compiling():
            offset = int(offset)
        return self._size(query_length), offset  # type: ignore[return-value]

    def _size(self, new: int) -> int:
        window = self.max_cache_len
        if new == 1 or not self._sliding:
            return window
        length = int(self.cumulative_length) if self.is_initialized else 0
        if length >= window:
            return window - 1 + new
        return max(length + new, window)

    def _offset(self, new: int) -> torch.Tensor | int:
        if not self._sliding:
            return 0
        return (self.cumulative_length - self.max_cache_len + 1).clamp(min=0)

    def get_seq_length(self) -> int:
        """Number of tokens so far."""
        return self.cumulative_length if self.is_initialized else 0  # type: ignore[return-value]

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last tokens, if none of those before them is gone."""
        if self._sliding and int(self.cumulative_length) > self.max_cache_len and tokens_to_remove:
            raise ValueError(
                f"tokens cannot be removed from a static layer with a sliding window of {self.max_cache_len} after more "
                f"tokens than that: use requanto.QuantizedCache and its activate_past_recording()"
            )
        super().crop(tokens_to_remove)


class StaticQuantizedIndexedLayer(StaticIndexedLayer, StaticQuantizedLayer):
    """Keys and values of a layer with sparse attention; the keys of its indexer stay float."""

    def __init__(self, settings: KVSettings, max_cache_len: int, **kwargs: Any) -> None:
        self._settings = settings  # Transformers' constructor takes none
        super().__init__(max_cache_len=max_cache_len)
        self.indexer_position_ids = None


class StaticQuantizedHybridLayer(WithLinearAttention, StaticQuantizedLayer, LinearAttentionAndStaticFullAttentionLayer):
    """A layer with full attention and linear attention."""

    _attention = StaticQuantizedLayer


class StaticQuantizedHybridSlidingLayer(
    WithLinearAttention, StaticQuantizedSlidingLayer, LinearAttentionAndStaticSlidingWindowAttentionLayer
):
    """A layer with sliding-window attention and linear attention."""

    _attention = StaticQuantizedSlidingLayer


def static_quantized_layer(layer: Any, settings: KVSettings, max_cache_len: int) -> Any:
    """The quantized layer for one of Transformers' static layers; one without keys stays as it is; None: unknown."""
    kind, states = type(layer), {"number_of_states": getattr(layer, "number_of_states", 1)}
    if kind is StaticLayer:
        return StaticQuantizedLayer(settings, max_cache_len=max_cache_len)
    if kind is StaticIndexedLayer:
        return StaticQuantizedIndexedLayer(settings, max_cache_len)
    if kind is LinearAttentionAndStaticFullAttentionLayer:
        return StaticQuantizedHybridLayer(settings, max_cache_len=max_cache_len, **states)
    # These layers have the smaller of the two lengths.
    if kind is StaticSlidingWindowLayer:
        return StaticQuantizedSlidingLayer(settings, max_cache_len, layer.max_cache_len)
    if kind is LinearAttentionAndStaticSlidingWindowAttentionLayer:
        return StaticQuantizedHybridSlidingLayer(settings, max_cache_len, layer.max_cache_len, **states)
    return layer if without_keys(layer) else None
