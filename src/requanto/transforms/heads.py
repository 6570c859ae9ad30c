"""The size of attention's heads, which a rotation of values must not mix."""

from __future__ import annotations

from torch import nn

_SIZES = ("head_dim", "attention_head_size", "attention_head_dim", "dim_head", "key_value_proj_dim", "d_kv", "v_head_dim")
_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")


def head_sizes(block: nn.Module, model: nn.Module) -> list[int]:
    """Sizes that a head may have, as modules of a block and the model's config name them; a trial tells which one it is."""
    config = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    found: dict[int, None] = {}
    for holder in (*block.modules(), text):
        for name in _SIZES:
            value = getattr(holder, name, None)
            if isinstance(value, int) and value > 1:
                found.setdefault(value)
    for holder in (*block.modules(), text):
        width = next((w for n in ("hidden_size", "embed_dim", "d_model") if isinstance(w := getattr(holder, n, None), int)), 0)
        for name in _COUNTS:
            value = getattr(holder, name, None)
            if isinstance(value, int) and value > 0 and width % value == 0 and width > value:
                found.setdefault(width // value)
    return list(found)
