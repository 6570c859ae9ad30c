"""Small GGUF files of several architectures, written with the package gguf.

Values of quantized tensors are random blocks: all bits but the exponents of float16 numbers. Names are the package's own.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

#: where each type has its float16 numbers, in bytes of a block
_HALVES = {
    **{"Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "IQ4_NL": (0,), "IQ4_XS": (0,)},
    **{"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ3_S": (0,), "MXFP4": ()},
    "TQ2_0": (64,),
}
#: which of them llama.cpp also writes negative
_NEGATIVE = {
    **{"Q4_0": (0,), "Q5_0": (0,), "Q4_1": (2,), "Q5_1": (2,), "Q3_K": (108,), "Q6_K": (208,)},
    **{"IQ4_NL": (0,), "IQ4_XS": (0,)},
}


def blocks(kind: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Random blocks of a tensor of this shape, or random numbers for ``"F32"``, ``"F16"`` and ``"BF16"``."""
    random = np.random.default_rng([seed, *kind.encode()])
    if kind in ("F32", "F16", "BF16"):
        values = random.normal(0, 0.05, shape).astype(np.float32)
        return gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])
    count, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    made = random.integers(0, 256, (*shape[:-1], shape[-1] // count, size), dtype=np.uint8)
    small = 1e-4 if kind.endswith("_K") else 1e-2
    for start in _HALVES[kind]:
        numbers = random.uniform(small / 4, small, made.shape[:-1]).astype(np.float16)
        if start in _NEGATIVE.get(kind, ()):
            numbers *= random.choice(np.array([-1, 1], dtype=np.float16), numbers.shape)
        made[..., start : start + 2] = numbers[..., None].view(np.uint8)
    if kind == "MXFP4":
        made[..., 0] = random.integers(115, 122, made.shape[:-1])
    return made.reshape(*shape[:-1], -1)


def values(data: np.ndarray, kind: str) -> torch.Tensor:
    """What the package gguf makes of blocks."""
    return torch.from_numpy(gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind]))


def write(
    path: Path,
    architecture: str,
    fields: Mapping[str, Any],
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    values: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """Writes a file.

    Args:
        path: where.
        architecture: ``general.architecture``.
        fields: metadata without the architecture's prefix.
        tensors: name -> (type, shape in torch's order).
        values: name -> the values of a tensor, where random ones will not do.
    """
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in fields.items():
        name = key if key.startswith(("tokenizer.", "general.", "split.", "comfy.")) else f"{architecture}.{key}"
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_array(name, value)
    for name, (kind, shape) in tensors.items():
        made = (values or {}).get(name)
        made = blocks(kind, shape, zlib.crc32(name.encode())) if made is None else made
        writer.add_tensor(name, made, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


Kinds = Callable[[str], str]
#: sizes of the models
HIDDEN, WIDE, VOCABULARY, LAYERS, HEADS, PAIRS = 256, 512, 96, 2, 8, 4


def _vocabulary() -> dict[str, Any]:
    words = ["<unk>", "<s>", "</s>", *(f"word{number}" for number in range(VOCABULARY - 3))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.scores": [0.0] * VOCABULARY,
        "tokenizer.ggml.token_type": [1] * VOCABULARY,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def _sizes(**changes: Any) -> dict[str, Any]:
    sizes = {
        "context_length": 128,
        "embedding_length": HIDDEN,
        "block_count": LAYERS,
        "feed_forward_length": WIDE,
        "attention.head_count": HEADS,
        "attention.head_count_kv": PAIRS,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
        "vocab_size": VOCABULARY,
    }
    return {**sizes, **changes, **_vocabulary()}


def _layers(kinds: Kinds, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[str, tuple[int, ...]]]:
    names = {f"blk.{layer}.{name}.weight": shape for layer in range(LAYERS) for name, shape in shapes.items()}
    return {name: ("F32" if len(shape) == 1 else kinds(name), shape) for name, shape in names.items()}


_ATTENTION = {
    "attn_norm": (HIDDEN,),
    "attn_q": (HIDDEN, HIDDEN),
    "attn_k": (HIDDEN // 2, HIDDEN),
    "attn_v": (HIDDEN // 2, HIDDEN),
    "attn_output": (HIDDEN, HIDDEN),
    "ffn_norm": (HIDDEN,),
}
_MLP = {"ffn_gate": (WIDE, HIDDEN), "ffn_up": (WIDE, HIDDEN), "ffn_down": (HIDDEN, WIDE)}


def llama(path: Path, kinds: Kinds, tied: bool = False) -> Path:
    """A Llama; ``kinds`` gives the type of each matrix by its name in the file."""
    tensors = {
        "token_embd.weight": (kinds("token_embd.weight"), (VOCABULARY, HIDDEN)),
        **_layers(kinds, {**_ATTENTION, **_MLP}),
        "output_norm.weight": ("F32", (HIDDEN,)),
    }
    if not tied:
        tensors["output.weight"] = (kinds("output.weight"), (VOCABULARY, HIDDEN))
    return write(path, "llama", _sizes(**{"rope.dimension_count": HIDDEN // HEADS}), tensors)


def gemma3(path: Path, kinds: Kinds) -> Path:
    """A Gemma 3, whose norms are stored plus one and whose embedding is the output layer too."""
    head = {"attn_q_norm": (32,), "attn_k_norm": (32,), "post_attention_norm": (HIDDEN,), "post_ffw_norm": (HIDDEN,)}
    tensors = {
        "token_embd.weight": (kinds("token_embd.weight"), (VOCABULARY, HIDDEN)),
        **_layers(kinds, {**_ATTENTION, **_MLP, **head}),
        "output_norm.weight": ("F32", (HIDDEN,)),
    }
    sizes = {"attention.key_length": 32, "attention.value_length": 32, "attention.sliding_window": 64}
    return write(path, "gemma3", _sizes(**sizes), tensors)


def qwen3moe(path: Path, kinds: Kinds) -> Path:
    """A Qwen3 with 4 experts, which are stacked in the file."""
    experts = {
        "attn_q_norm": (32,),
        "attn_k_norm": (32,),
        "ffn_gate_exps": (4, 768, HIDDEN),  # Transformers does not read this width, and takes it to be 768
        "ffn_up_exps": (4, 768, HIDDEN),
        "ffn_down_exps": (4, HIDDEN, 768),
    }
    tensors = {
        "token_embd.weight": (kinds("token_embd.weight"), (VOCABULARY, HIDDEN)),
        **_layers(kinds, {**_ATTENTION, **experts}),
        **{f"blk.{layer}.ffn_gate_inp.weight": ("F32", (4, HIDDEN)) for layer in range(LAYERS)},
        "output_norm.weight": ("F32", (HIDDEN,)),
        "output.weight": (kinds("output.weight"), (VOCABULARY, HIDDEN)),
    }
    sizes = {
        **{"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 768},
        **{"attention.key_length": 32, "attention.value_length": 32},
    }
    return write(path, "qwen3moe", _sizes(**sizes), tensors)


def gpt2(path: Path, kinds: Kinds) -> Path:
    """A GPT-2, whose model has its weights the other way round."""
    shapes: dict[str, tuple[int, ...]] = {
        **{"attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,)},
        **{"attn_qkv": (3 * HIDDEN, HIDDEN), "attn_output": (HIDDEN, HIDDEN)},
        **{"ffn_up": (4 * HIDDEN, HIDDEN), "ffn_down": (HIDDEN, 4 * HIDDEN)},
    }
    tensors = {
        "token_embd.weight": (kinds("token_embd.weight"), (VOCABULARY, HIDDEN)),
        "position_embd.weight": ("F32", (1024, HIDDEN)),
        **_layers(kinds, shapes),
        "output_norm.weight": ("F32", (HIDDEN,)),
        "output_norm.bias": ("F32", (HIDDEN,)),
        "output.weight": (kinds("output.weight"), (VOCABULARY, HIDDEN)),
    }
    for layer in range(LAYERS):
        for name, shape in shapes.items():
            tensors[f"blk.{layer}.{name}.bias"] = ("F32", shape[:1])
    return write(path, "gpt2", _sizes(**{"attention.layer_norm_epsilon": 1e-5}), tensors)


def bloom(path: Path, kinds: Kinds) -> Path:
    """A BLOOM, whose fused queries, keys and values are in another order in the file."""
    shapes: dict[str, tuple[int, ...]] = {
        **{"attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,)},
        **{"attn_qkv": (3 * HIDDEN, HIDDEN), "attn_output": (HIDDEN, HIDDEN)},
        **{"ffn_up": (4 * HIDDEN, HIDDEN), "ffn_down": (HIDDEN, 4 * HIDDEN)},
    }
    tensors = {
        "token_embd.weight": (kinds("token_embd.weight"), (VOCABULARY, HIDDEN)),
        "token_embd_norm.weight": ("F32", (HIDDEN,)),
        "token_embd_norm.bias": ("F32", (HIDDEN,)),
        **_layers(kinds, shapes),
        "output_norm.weight": ("F32", (HIDDEN,)),
        "output_norm.bias": ("F32", (HIDDEN,)),
    }
    for layer in range(LAYERS):
        for name, shape in shapes.items():
            tensors[f"blk.{layer}.{name}.bias"] = ("F32", shape[:1])
    return write(path, "bloom", _sizes(**{"attention.layer_norm_epsilon": 1e-5}), tensors)


def lfm2(path: Path, kinds: Kinds) -> Path:
    """An LFM2: a short convolution in the first layer, attention in the second. Read by Transformers' newer rules."""
    attention = {key: shape for key, shape in _ATTENTION.items() if key.startswith("attn_") and key != "attn_norm"}
    both = {"attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,), **_MLP}
    conv = {
        "shortconv.in_proj": (3 * HIDDEN, HIDDEN),
        "shortconv.out_proj": (HIDDEN, HIDDEN),
        "shortconv.conv": (HIDDEN, 3),
    }
    heads = {"attn_q_norm": (32,), "attn_k_norm": (32,)}
    names = {f"blk.0.{name}.weight": shape for name, shape in {**both, **conv}.items()}
    names |= {f"blk.1.{name}.weight": shape for name, shape in {**both, **attention, **heads}.items()}
    tensors = {
        "token_embd.weight": (kinds("token_embd.weight"), (VOCABULARY, HIDDEN)),
        **{n: ("F32" if len(s) == 1 or s[-1] < 32 else kinds(n), s) for n, s in names.items()},
        "token_embd_norm.weight": ("F32", (HIDDEN,)),
    }
    return write(path, "lfm2", _sizes(**{"shortconv.l_cache": 3, "attention.head_count_kv": [0, PAIRS]}), tensors)


def qwen35(path: Path, kinds: Kinds) -> Path:
    """A Qwen3.5: linear attention in the first layer, with heads in another order in the file, attention in the second."""
    both = {"attn_norm": (HIDDEN,), "post_attention_norm": (HIDDEN,), **_MLP}
    linear = {
        "attn_qkv": (2 * 2 * 32 + 4 * 64, HIDDEN),
        "attn_gate": (4 * 64, HIDDEN),
        **{"ssm_alpha": (4, HIDDEN), "ssm_beta": (4, HIDDEN)},
        **{"ssm_conv1d": (2 * 2 * 32 + 4 * 64, 4), "ssm_norm": (64,), "ssm_out": (HIDDEN, 4 * 64)},
    }
    heads = {
        "attn_q": (2 * HIDDEN, HIDDEN),
        **{"attn_k": (HIDDEN // 2, HIDDEN), "attn_v": (HIDDEN // 2, HIDDEN), "attn_output": (HIDDEN, HIDDEN)},
        **{"attn_q_norm": (32,), "attn_k_norm": (32,)},
    }
    names = {f"blk.0.{name}.weight": shape for name, shape in {**both, **linear}.items()}
    names |= {f"blk.1.{name}.weight": shape for name, shape in {**both, **heads}.items()}
    tensors = {
        "token_embd.weight": (kinds("token_embd.weight"), (VOCABULARY, HIDDEN)),
        **{n: ("F32" if len(s) == 1 or s[-1] < 32 else kinds(n), s) for n, s in names.items()},
        **{"blk.0.ssm_a": ("F32", (4,)), "blk.0.ssm_dt.bias": ("F32", (4,)), "output_norm.weight": ("F32", (HIDDEN,))},
    }
    sizes = _sizes(
        **{
            **{"attention.key_length": 32, "attention.value_length": 32, "full_attention_interval": 2},
            **{"ssm.conv_kernel": 4, "ssm.state_size": 32, "ssm.group_count": 2, "ssm.time_step_rank": 4},
            **{"ssm.inner_size": 4 * 64, "rope.dimension_sections": [2, 1, 1, 0], "rope.dimension_count": 8},
        }
    )
    decay = {"blk.0.ssm_a": -np.linspace(0.5, 2, 4, dtype=np.float32)}
    return write(path, "qwen35", sizes, tensors, decay)


def t5(path: Path, kinds: Kinds) -> Path:
    """The encoder of a T5, as text encoder of image models."""
    shapes: dict[str, tuple[int, ...]] = {
        **{"attn_norm": (HIDDEN,), "attn_q": (HIDDEN, HIDDEN), "attn_k": (HIDDEN, HIDDEN)},
        **{"attn_v": (HIDDEN, HIDDEN), "attn_o": (HIDDEN, HIDDEN), "ffn_norm": (HIDDEN,), **_MLP},
    }
    tensors = {
        "token_embd.weight": (kinds("token_embd.weight"), (VOCABULARY, HIDDEN)),
        **{key.replace("blk.", "enc.blk."): found for key, found in _layers(kinds, shapes).items()},
        "enc.blk.0.attn_rel_b.weight": ("F32", (32, HEADS)),
        "enc.output_norm.weight": ("F32", (HIDDEN,)),
    }
    sizes = {"attention.key_length": HIDDEN // HEADS, "attention.relative_buckets_count": 32}
    return write(path, "t5encoder", _sizes(**sizes), tensors)


def every(kind: str) -> Kinds:
    """All matrices of one type."""
    return lambda name: kind


def mixed(name: str) -> str:
    """Types as files of llama.cpp mix them: k-quants, some of more bits, embeddings in Q6_K."""
    if "token_embd" in name or name == "output.weight":
        return "Q6_K"
    for part, kind in (("attn_v", "Q5_K"), ("ffn_down", "Q3_K"), ("attn_k", "Q2_K")):
        if part in name:
            return kind
    return "Q4_K"


def legacy(name: str) -> str:
    """Types of before k-quants, one for each part of a layer."""
    parts = ("attn_k", "Q4_1"), ("attn_v", "Q5_0"), ("ffn_up", "Q5_1"), ("ffn_down", "Q8_0"), ("token_embd", "Q8_0")
    return next((kind for part, kind in parts if part in name), "Q4_0")


def identifiers() -> torch.Tensor:
    """Tokens for a forward."""
    return torch.arange(3, 35, dtype=torch.int64, device="cpu").view(2, 16)
