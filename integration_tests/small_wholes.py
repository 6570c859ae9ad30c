"""Tiny models of any class of Transformers, made from its default config: sizes are set by the names of their fields."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
import transformers as tf

# The first pattern that matches a field's whole name gives its value.
_SIZES: tuple[tuple[str, Any], ...] = (
    (r"(num|n)_(key_value_heads|kv_heads)|num_global_key_value_heads", 2),
    (r".*(num_attention_heads|num_heads|attention_heads|n_heads?|n_head)", 4),
    (r".*(num_hidden_layers|num_layers|n_layers?|encoder_layers|decoder_layers|depth|depths?|num_blocks)", 2),
    (r"(global_|v_|qk_nope_|qk_rope_|linear_key_|linear_value_)?head_dim|d_kv|kv_channels", 16),
    (r".*(intermediate_size|ffn_dim|d_ff|n_inner|mlp_dim|feed_forward_size)|intermediate_size_mlp", 128),
    (r"(vocab_size|text_vocab_size|vocab_size_per_layer_input)", 160),
    (r"(image_size|input_size|img_size)", 32),
    (r"(patch_size|spatial_patch_size)", 8),
    (r"(num_local_experts|num_experts|n_routed_experts|moe_num_experts)", 4),
    (r"(num_experts_per_tok|moe_topk|n_group|topk_group|n_shared_experts)", 1),
    (r"(max_position_embeddings|max_source_positions|max_target_positions|n_positions)", 64),
    (r"(hidden_size|d_model|embed_dim|projection_dim|n_embd|dim|output_dim|out_hidden_size|text_hidden_size)", 64),
    (r"(vision_output_dim|projector_input_dim|projector_output_dim|projector_dim|q_lora_rank|kv_lora_rank)", 64),
    (r"(hidden_size_per_layer_input|audio_hidden_size|encoder_hidden_size|cross_attention_hidden_size)", 64),
    (r"(num_mel_bins|sliding_window|num_query_tokens|latent_dim|num_latents)", 16),
)


def _gemma4() -> Any:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 16}
    text = {"vocab_size": 160, "global_head_dim": 16, "sliding_window": 8, "vocab_size_per_layer_input": 160}
    text |= {"hidden_size_per_layer_input": 16, "layer_types": ["sliding_attention", "full_attention"], **sizes}
    return tf.Gemma4Config(text_config=text, vision_config={**sizes, "num_key_value_heads": 4, "patch_size": 4})


# Those whose fields depend on each other.
_CONFIGS = {"Gemma4ForConditionalGeneration": _gemma4}


def shrink(config: Any) -> Any:
    """Sets the sizes of a config and of those inside it, in place."""
    for name, value in list(vars(config).items()):
        if isinstance(value, tf.PreTrainedConfig):
            shrink(value)
        elif name in ("layer_types", "mlp_layer_types") and isinstance(value, list):
            setattr(config, name, value[:2])
        elif name.endswith("token_id") and isinstance(value, int) and value > 150:
            setattr(config, name, 3 + sum(map(ord, name)) % 90)
        elif isinstance(value, int) and not isinstance(value, bool):
            for pattern, size in _SIZES:
                if re.fullmatch(pattern, name):
                    setattr(config, name, size)
                    break
    return config


def shrunk(cls: type, limit: int = 3_000_000) -> Any:
    """A model of the class with seeded weights, all of them different.

    Raises:
        ValueError: it is still larger than ``limit`` weights.
    """
    config = _CONFIGS[cls.__name__]() if cls.__name__ in _CONFIGS else shrink(cls.config_class())
    with torch.device("meta"):
        size = sum(p.numel() for p in cls(config).parameters())
    if size > limit:
        raise ValueError(f"{cls.__name__} has {size} weights")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = cls(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape) * 0.1)
    return model.eval()


def classes_beside(cls: type) -> Iterator[type]:
    """The model classes of the same file: the whole model, its parts, and those with other heads."""
    module = inspect.getmodule(cls)
    for name, found in vars(module).items():
        concrete = isinstance(found, type) and issubclass(found, tf.PreTrainedModel) and found.config_class is not None
        if concrete and found.__module__ == module.__name__ and name == found.__name__ and "PreTrained" not in name:
            yield found
