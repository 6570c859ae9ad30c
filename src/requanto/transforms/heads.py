"""The size of attention's heads, which a rotation of values must not mix."""

from __future__ import annotations

from torch import nn

_SIZES = (
    "head_dim",
    "attention_head_size",
    "attention_head_dim",
    "dim_head",
    "key_value_proj_dim",
    "d_kv",
    "v_head_dim",
)
_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")


def head_sizes(block: nn.Module, model: nn.Module) -> list[int]:
    """Sizes that a head may have, as modules of a block and the model's config name them; a trial tells which one it is."""
    config = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    found: dict[int, None] = {}
    # A module's own attributes only: others may be computed, or warn that they are old.
    holders = [*(vars(module).get for module in block.modules()), lambda name: getattr(text, name, None)]
    for get in holders:
        for name in _SIZES:
            value = get(name)
            if isinstance(value, int) and value > 1:
                found.setdefault(value)
    for get in holders:
        width = next((w for n in ("hidden_size", "embed_dim", "d_model") if isinstance(w := get(n), int)), 0)
        for name in _COUNTS:
            value = get(name)
            if isinstance(value, int) and value > 0 and width % value == 0 and width > value:
                found.setdefault(width // value)
    return list(found)
