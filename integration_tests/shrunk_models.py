"""Every model class of the installed Transformers, made small by its config's own attributes, with inputs for its forward.

    for name in families():                 # model types
        for case in cases(name):            # classes of this type that can be built
            model = case.build()
            outputs = run(model, case.inputs(model))

Not every config can be made small by rules. `build` and `run` then raise whatever the library raises, and a test leaves
the class out: what counts is that a quantized model runs wherever the float model runs.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

VOCABULARY = 160
TOKENS = 12

#: (pattern of an attribute's name, value): the first match counts. Only ints (and lists of ints) that are larger shrink.
RULES: tuple[tuple[str, int], ...] = (
    (r"num_feat_extract_layers", 99),  # as many as the lists of its convolutions are long
    (r".*vocab_size.*", VOCABULARY),
    (r".*(num_labels|num_classes)", 5),
    (
        r"(num_)?experts_per_tok(en)?|moe_top_?k|top_?k(_experts)?|num_experts_per_tok|router_topk|moe_k|num_selected_experts",
        2,
    ),
    (r"topk_group|n_group|num_expert_groups?|(.*_)?n_groups", 1),
    (r"(.*_)?(num_|n_)?(local_|routed_)?experts|moe_num_experts|ep_size|num_experts.*", 4),
    (r"n_shared_experts|num_shared_experts|moe_num_shared_experts|zero_expert_num", 1),
    (r".*(kv_heads|key_value_heads)", 2),
    (r".*(num_heads|attention_heads|n_heads?|num_head|_heads)", 4),
    (r"qk_head_dim", 32),
    (r"(.*_)?head_dim|(qk_(nope|rope)|v)_head_dim|kv_channels|d_kv|attention_head_size|qk_rope_dim", 16),
    (r"attn_layer_(period|offset)", 1),
    (r"expert_layer_offset|moe_layer_start_index|num_dense_layers|first_k_dense_replace|n_dense_layers", 0),
    (r".*sparse_step|moe_layer_interval|expert_layer_period|.*moe_layer_step", 1),
    (r".*(_lora_rank|lora_rank)", 16),
    (r"(num_)?hidden_layers|.*num_layers|n_layers?|.*_layers|depth|.*num_blocks", 2),
    (
        r".*(intermediate_size|ffn_dim|ffn_hidden_size|d_ff|n_inner|ffn_size|dim_feedforward|mlp_dim|feedforward_dim)",
        128,
    ),
    (
        r"(.*_)?(hidden_size|d_model|n_embd|embed_dim|hidden_dim|embedding_size|projection_dim|d_embed|dim|width|embed_size)",
        64,
    ),
    (r".*(projection_hidden_size|proj_dim|output_dim|encoder_hidden_size|out_hidden_size|embedding_dim)", 64),
    (r".*image_size", 32),
    (r".*patch_size", 8),
    (r"(num_)?queries|.*num_queries|num_query_tokens|num_object_queries", 8),
    (r".*(max_position_embeddings|max_.*positions|n_positions|max_seq_len(gth)?|n_ctx|max_length|seq_length)", 128),
    (r".*(pad|bos|eos|decoder_start)_token_id", 1),
    (r".*token_(id|index)", 3),
    (r".*(sliding_window|window_size|attention_window|chunk_size)", 8),
    (r".*num_mel_bins", 16),
)
_COMPILED = [(re.compile(pattern), value) for pattern, value in RULES]


def _shrunk(name: str, value: Any) -> Any:
    """The smaller value of one config attribute; the same if no rule makes it smaller."""
    for pattern, small in _COMPILED:
        if pattern.fullmatch(name):
            if isinstance(value, bool) or value is None:
                return value
            if isinstance(value, int):
                return small if "experts" in name and "per_tok" not in name and value == 1 else min(value, small)
            if isinstance(value, (list, tuple)) and value and all(isinstance(v, int) for v in value):
                if name.endswith("heads"):
                    return type(value)(small for v in value)
                if "intermediate" in name:
                    return type(value)([small] * 2)
                return type(value)(min(v, small) for v in value)
            return value
    return value


def shrink(config: Any, changes: dict[str, int] | None = None) -> Any:
    """A config of the same class with small sizes, and so its sub-configs."""
    parts = {name: type(config).sub_configs[name] for name in getattr(type(config), "sub_configs", {})}
    arguments: dict[str, Any] = {}
    for name, value in config.to_dict().items():
        if name in parts or name in ("transformers_version", "model_type", "architectures", "dtype"):
            continue
        small = (changes or {}).get(name, _shrunk(name, value))
        if name in ("is_moe", "enable_moe_block", "use_moe"):
            small = True
        if name == "head_dim" and value is None:
            small = 16
        if name in ("rope_parameters", "rope_scaling") and isinstance(value, dict) and "mrope_section" in value:
            half = int(16 * (value.get("partial_rotary_factor") or 1)) // 2
            small = {**value, "mrope_section": [half - 2 * (half // 3), half // 3, half // 3]}
        if name == "layer_types" and isinstance(value, list):
            kinds = list(dict.fromkeys(value))
            small = (kinds * 2)[:2] if len(kinds) < 2 else kinds[:2]
        if name == "layer_types" and value is None and "mamba" in str(type(config)).lower() + str(list(vars(config))):
            small = ["mamba", "attention"]
        if name == "num_key_value_heads" and hasattr(config, "qk_rope_head_dim"):
            small = 4  # latent attention has no groups of heads
        if small != value:
            arguments[name] = small
    if arguments.get("enable_moe_block") or getattr(config, "enable_moe_block", False):
        arguments |= {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64}
    for name in parts:
        part = getattr(config, name, None)
        if isinstance(part, tf.PretrainedConfig):
            arguments[name] = shrink(part, changes).to_dict()
    return type(config)(**arguments)


MAPPINGS = (
    "MODEL_MAPPING_NAMES",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES",
    "MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "MODEL_FOR_CTC_MAPPING_NAMES",
    "MODEL_FOR_TIME_SERIES_PREDICTION_MAPPING_NAMES",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
)


@dataclass(frozen=True)
class Case:
    """One model class."""

    family: str
    class_name: str

    @property
    def cls(self) -> Any:
        """The class."""
        return getattr(tf, self.class_name)

    def config(self) -> Any:
        """A small config of the class."""
        return shrink(self.cls.config_class())

    def build(self) -> nn.Module:
        """The small model with seeded random weights; no parameter is zero."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.cls(self.config()).eval()
            size = sum(p.numel() for p in model.parameters())
            if size > 60_000_000:
                raise ValueError(f"{self.class_name} has {size} parameters after shrinking")
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.is_floating_point() and not parameter.any():
                        parameter.normal_(std=0.05)
        return model


def families() -> list[str]:
    """All model types with a class in one of the mappings."""
    found = {}
    for mapping in MAPPINGS:
        found.update(dict.fromkeys(getattr(modeling_auto, mapping, {})))
    return sorted(found)


def cases(family: str, every: bool = False) -> Iterator[Case]:
    """The classes of a family: the first found and the last (a head), or every one."""
    names: dict[str, None] = {}
    for mapping in MAPPINGS:
        value = getattr(modeling_auto, mapping, {}).get(family)
        for name in (value,) if isinstance(value, str) else value or ():
            if hasattr(tf, name):
                names[name] = None
    chosen = list(names)
    if not every and len(chosen) > 2:
        chosen = chosen[:2]
    for name in chosen:
        yield Case(family, name)


def _image_sizes(config: Any) -> tuple[int, int]:
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", 32)
    size = size if isinstance(size, int) else (max(size) if isinstance(size, (list, tuple)) else 32)
    return getattr(vision, "num_channels", 3) or 3, size


def inputs(model: nn.Module) -> dict[str, Tensor]:
    """Keyword inputs by the names in the signature of the model's forward; nothing that has a default but the main one."""
    names = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(1)
    config = model.config
    text = getattr(config, "get_text_config", lambda: config)()
    top = min(VOCABULARY, getattr(text, "vocab_size", VOCABULARY) or VOCABULARY)
    ids = torch.randint(min(10, top - 1), top, (2, TOKENS), generator=generator)
    channels, size = _image_sizes(config)
    image = torch.randn(2, channels, size, size, generator=generator)
    main = getattr(model, "main_input_name", "input_ids")
    found: dict[str, Tensor] = {}
    if "input_ids" in names:
        found["input_ids"] = ids
    # A model of two towers wants both inputs; one that writes about images also runs without.
    towers = hasattr(config, "text_config") and not any("image_token" in name for name in vars(config))
    needed = "pixel_values" in names and names["pixel_values"].default is inspect.Parameter.empty
    if "pixel_values" in names and (main == "pixel_values" or "input_ids" not in names or needed or towers):
        found["pixel_values"] = image
    if "decoder_input_ids" in names:
        found["decoder_input_ids"] = ids[:, :5]
    if "input_features" in names and main in ("input_features", "input_ids") and "input_ids" not in found:
        bins = getattr(config, "num_mel_bins", getattr(getattr(config, "encoder_config", None), "num_mel_bins", 80))
        frames = 2 * getattr(config, "max_source_positions", 32)
        first = torch.randn(2, bins, frames, generator=generator)
        found["input_features"] = first if "whisper" in type(model).__name__.lower() else first.transpose(1, 2)
    if "input_values" in names:
        found["input_values"] = torch.randn(2, 4000, generator=generator)
    if "bbox" in names:
        found["bbox"] = torch.zeros(2, TOKENS, 4, dtype=torch.long)
    for name, parameter in names.items():
        if (
            parameter.default is inspect.Parameter.empty
            and name not in found
            and parameter.kind not in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        ):
            if name == "hidden_states":
                width = getattr(config, "hidden_size", 64)
                found[name] = torch.randn(2, TOKENS, width, generator=generator)
            elif name == "past_values":
                length = getattr(config, "context_length", None) or getattr(config, "prediction_length", 24)
                found[name] = torch.randn(2, length, getattr(config, "num_input_channels", 1), generator=generator)
    return found


@torch.no_grad()
def run(model: nn.Module, arguments: dict[str, Tensor]) -> list[Tensor]:
    """The float tensors that the model returns, in float32."""
    torch.manual_seed(0)
    found: list[Tensor] = []

    def collect(value: Any) -> None:
        if isinstance(value, Tensor):
            if value.is_floating_point():
                found.append(value.float())
        elif isinstance(value, dict):
            for item in value.values():
                collect(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                collect(item)

    collect(model(**arguments))
    return found
