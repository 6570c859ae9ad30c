"""KV caches for Transformers whose old tokens are quantized."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, StaticCache

from requanto.integrations.transformers_cache_layers import quantized_layer, without_keys
from requanto.integrations.transformers_cache_static import static_quantized_layer
from requanto.kv import KVSettings

logger = logging.getLogger(__name__)


class QuantizedCache(DynamicCache):
    """A cache that grows: old keys and values are quantized once, the last tokens stay float (KIVI, 2402.02750).

    Pass it as ``past_key_values`` to a model or to ``generate``. For an encoder-decoder model give Transformers'
    ``EncoderDecoderCache`` two of them. Layers with a sliding window keep only its tokens; the states of linear
    attention stay float.

    Args:
        config: the model's config, or the model.
        keys, values: "int8", "int4", "int2", "float8"; None: they stay float.
        window: at least so many of the last tokens stay float.
        block: tokens that are quantized together; a block of keys has one scale for each channel.
        group: channels of a value that share a scale.
        offloading: layers that are not in use are kept on the CPU (needs a GPU).

    Raises:
        ValueError, TypeError: an argument is wrong, or the model has layers of another kind.
    """

    def __init__(
        self,
        config: Any,
        keys: Any = "int8",
        values: Any = "int8",
        window: int = 64,
        block: int = 64,
        group: int = 64,
        offloading: bool = False,
    ) -> None:
        self.settings = KVSettings(keys, values, window, block, group)
        # Transformers tells the kinds of the layers.
        layers = _layers(DynamicCache, config=_config(config))
        made = _replaced(layers, lambda layer: quantized_layer(layer, self.settings))
        Cache.__init__(self, layers=made, offloading=offloading)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds tokens to a layer and returns all of them as floats; the new ones are returned as they were given.

        Raises:
            ValueError: the cache has no such layer, or the keys or values are of another model or batch.
        """
        _check_index(self, layer_idx)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    @property
    def nbytes(self) -> int:
        """Bytes of all layers: codes, scales and floats."""
        return _bytes(self)


class StaticQuantizedCache(StaticCache):
    """A cache of fixed size, for compiled models: old keys and values are quantized once, the last tokens stay float.

    Its buffers are allocated once, and a step of one token runs the same operations on the same shapes whatever the
    number of tokens, so ``torch.compile`` compiles it once, with CUDA graphs too (``mode="reduce-overhead"``). The last
    ``window + block`` tokens are kept as floats.

    Args:
        max_cache_len: most tokens, prompt and new ones.
        config, keys, values, window, block, group: as for `QuantizedCache`.

    Raises:
        ValueError, TypeError: an argument is wrong, or the model has layers of another kind.
    """

    def __init__(
        self,
        config: Any,
        max_cache_len: int,
        keys: Any = "int8",
        values: Any = "int8",
        window: int = 64,
        block: int = 64,
        group: int = 64,
    ) -> None:
        if isinstance(max_cache_len, bool) or not isinstance(max_cache_len, int):
            raise TypeError(f"max_cache_len is a number of tokens, found {max_cache_len!r}")
        if max_cache_len < 1:
            raise ValueError(f"max_cache_len must be 1 or more, found {max_cache_len}")
        self.settings = KVSettings(keys, values, window, block, group)
        layers = _layers(StaticCache, config=_config(config), max_cache_len=max_cache_len)
        made = _replaced(layers, lambda layer: static_quantized_layer(layer, self.settings, max_cache_len))
        Cache.__init__(self, layers=made)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds tokens to a layer and returns all its places as floats; new tokens are returned as they were given.

        Raises:
            ValueError: the cache has no such layer or too few places, or the keys or values are of another model or batch.
        """
        _check_index(self, layer_idx)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    @property
    def nbytes(self) -> int:
        """Bytes of all layers: codes, scales and floats."""
        return _bytes(self)


def _config(config: Any) -> Any:
    config = getattr(config, "config", config)
    if not hasattr(config, "get_text_config"):
        raise TypeError(
            f"a quantized cache is made for a model: give its config or the model, found {type(config).__name__}"
        )
    return config


def _layers(cache: type[Cache], **arguments: Any) -> list[Any]:
    try:
        return cache(**arguments).layers  # type: ignore[arg-type]
    except KeyError as error:
        raise ValueError(
            f"this model has layers of the kind {error}, for which Transformers has no layer of a {cache.__name__}"
        ) from error


def _replaced(layers: list[Any], make: Callable[[Any], Any]) -> list[Any]:
    made = [make(layer) for layer in layers]
    unknown = sorted({type(layer).__name__ for layer, new in zip(layers, made) if new is None})
    if unknown:
        where = [index for index, new in enumerate(made) if new is None]
        raise ValueError(
            f"layers {where} of this model have caches that cannot be quantized ({', '.join(unknown)}): use Transformers' "
            f"DynamicCache or StaticCache"
        )
    if all(without_keys(layer) for layer in made):
        logger.warning("no layer of this model caches keys and values: nothing will be quantized")
    return made


def _check_index(cache: Cache, layer_idx: int) -> None:
    if layer_idx >= len(cache.layers):
        raise ValueError(
            f"the cache was made for a model of {len(cache.layers)} layers, found keys of layer {layer_idx}: make it with "
            f"the config of the model that uses it"
        )


def _bytes(cache: Cache) -> int:
    total = 0
    for layer in cache.layers:
        total += getattr(layer, "nbytes", 0)
        for states in (getattr(layer, "conv_states", None), getattr(layer, "recurrent_states", None)):
            total += sum(state.nbytes for state in (states or {}).values() if state is not None)
    return total
