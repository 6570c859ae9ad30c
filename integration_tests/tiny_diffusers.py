"""Tiny random models of the Diffusers architectures that Requanto is tested on, with inputs for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch


@dataclass(frozen=True)
class Tiny:
    """A model class, the arguments of a tiny one, and keyword inputs for its forward (floats in the given dtype)."""

    class_name: str
    config: dict[str, Any]
    inputs: Callable[[torch.dtype], dict[str, Any]]

    @property
    def cls(self) -> Any:
        """The class."""
        return getattr(diffusers, self.class_name)

    def make(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
        """A random model of it."""
        torch.manual_seed(seed)
        model = self.cls(**self.config).eval()
        with torch.no_grad():  # some models start with zeros, which would hide every error
            for parameter in model.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.05)
        return model if dtype == torch.float32 else model.to(dtype)

    @torch.no_grad()
    def run(self, model: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The model's output for the inputs, in float32."""
        return model(**self.inputs(dtype), return_dict=False)[0].float()


def _noise(*shape: int, dtype: torch.dtype, seed: int = 7) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _flux(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "hidden_states": _noise(1, 16, 4, dtype=dtype),
        "encoder_hidden_states": _noise(1, 8, 32, dtype=dtype),
        "pooled_projections": _noise(1, 32, dtype=dtype),
        "timestep": torch.tensor([0.5], dtype=dtype),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(8, 3),
    }


def _sd3(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "hidden_states": _noise(1, 4, 8, 8, dtype=dtype),
        "encoder_hidden_states": _noise(1, 8, 32, dtype=dtype),
        "pooled_projections": _noise(1, 64, dtype=dtype),
        "timestep": torch.tensor([500.0], dtype=dtype),
    }


def _pixart(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "hidden_states": _noise(1, 4, 8, 8, dtype=dtype),
        "encoder_hidden_states": _noise(1, 8, 32, dtype=dtype),
        "timestep": torch.tensor([500]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def _unet(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "sample": _noise(1, 4, 8, 8, dtype=dtype),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": _noise(1, 8, 32, dtype=dtype),
    }


def _vae(dtype: torch.dtype) -> dict[str, Any]:
    return {"sample": _noise(1, 3, 16, 16, dtype=dtype)}


def _hunyuan(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "hidden_states": _noise(1, 4, 8, 8, dtype=dtype),
        "timestep": torch.tensor([500.0], dtype=dtype),
        "encoder_hidden_states": _noise(1, 8, 32, dtype=dtype),
        "text_embedding_mask": torch.ones(1, 8, dtype=dtype),
        "encoder_hidden_states_t5": _noise(1, 8, 32, dtype=dtype, seed=8),
        "text_embedding_mask_t5": torch.ones(1, 8, dtype=dtype),
        "image_meta_size": torch.tensor([[8, 8, 8, 8, 0, 0]], dtype=dtype),
        "style": torch.zeros(1, dtype=torch.long),
        "image_rotary_emb": [torch.ones(16, 16), torch.zeros(16, 16)],
    }


def _lumina2(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "hidden_states": _noise(1, 4, 8, 8, dtype=dtype),
        "timestep": torch.tensor([0.5], dtype=dtype),
        "encoder_hidden_states": _noise(1, 8, 32, dtype=dtype),
        "encoder_attention_mask": torch.ones(1, 8, dtype=torch.bool),
    }


def _aura(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "hidden_states": _noise(1, 4, 8, 8, dtype=dtype),
        "encoder_hidden_states": _noise(1, 8, 32, dtype=dtype),
        "timestep": torch.tensor([0.5], dtype=dtype),
    }


def _latte(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "hidden_states": _noise(1, 4, 2, 8, 8, dtype=dtype),
        "encoder_hidden_states": _noise(1, 8, 32, dtype=dtype),
        "timestep": torch.tensor([500]),
        "enable_temporal_attentions": True,
    }


def _cogvideox(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "hidden_states": _noise(1, 1, 4, 8, 8, dtype=dtype),
        "encoder_hidden_states": _noise(1, 8, 32, dtype=dtype),
        "timestep": torch.tensor([500]),
    }


def _wan(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "hidden_states": _noise(1, 4, 2, 8, 8, dtype=dtype),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": _noise(1, 8, 32, dtype=dtype),
    }


def _ltx(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "hidden_states": _noise(1, 32, 4, dtype=dtype),
        "encoder_hidden_states": _noise(1, 8, 32, dtype=dtype),
        "timestep": torch.tensor([500.0], dtype=dtype),
        "encoder_attention_mask": torch.ones(1, 8, dtype=torch.bool),
        "num_frames": 2,
        "height": 4,
        "width": 4,
    }


def _qwen(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "hidden_states": _noise(1, 16, 16, dtype=dtype),
        "encoder_hidden_states": _noise(1, 8, 32, dtype=dtype),
        "encoder_hidden_states_mask": torch.ones(1, 8, dtype=torch.long),
        "timestep": torch.tensor([0.5], dtype=dtype),
        "img_shapes": [(1, 4, 4)],
    }


TINY: dict[str, Tiny] = {
    "flux": Tiny(
        "FluxTransformer2DModel",
        {
            "patch_size": 1,
            "in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 32,
            "axes_dims_rope": [4, 4, 8],
        },
        _flux,
    ),
    "sd3": Tiny(
        "SD3Transformer2DModel",
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 64,
            "out_channels": 4,
        },
        _sd3,
    ),
    "pixart": Tiny(
        "PixArtTransformer2DModel",
        {
            "sample_size": 8,
            "num_layers": 2,
            "patch_size": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "caption_channels": 32,
            "in_channels": 4,
            "cross_attention_dim": 32,
            "out_channels": 8,
            "use_additional_conditions": False,
        },
        _pixart,
    ),
    "unet": Tiny(
        "UNet2DConditionModel",
        {
            "sample_size": 8,
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "in_channels": 4,
            "out_channels": 4,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": 32,
            "attention_head_dim": 8,
            "norm_num_groups": 8,
        },
        _unet,
    ),
    "vae": Tiny(
        "AutoencoderKL",
        {
            "block_out_channels": (32, 64),
            "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
            "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
            "latent_channels": 4,
            "norm_num_groups": 8,
        },
        _vae,
    ),
    "hunyuandit": Tiny(
        "HunyuanDiT2DModel",
        {
            "sample_size": 8,
            "num_layers": 2,
            "patch_size": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "in_channels": 4,
            "cross_attention_dim": 32,
            "cross_attention_dim_t5": 32,
            "pooled_projection_dim": 32,
            "hidden_size": 32,
            "text_len": 8,
            "text_len_t5": 8,
            "activation_fn": "gelu-approximate",
            "use_style_cond_and_image_meta_size": True,
        },
        _hunyuan,
    ),
    "lumina2": Tiny(
        "Lumina2Transformer2DModel",
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "hidden_size": 32,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 16,
            "norm_eps": 1e-5,
            "scaling_factor": 1.0,
            "axes_dim_rope": [4, 4, 8],
            "axes_lens": [128, 128, 128],
            "cap_feat_dim": 32,
        },
        _lumina2,
    ),
    "auraflow": Tiny(
        "AuraFlowTransformer2DModel",
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "caption_projection_dim": 32,
            "joint_attention_dim": 32,
            "out_channels": 4,
            "pos_embed_max_size": 64,
        },
        _aura,
    ),
    "latte": Tiny(
        "LatteTransformer3DModel",
        {
            "sample_size": 8,
            "num_layers": 1,
            "patch_size": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "caption_channels": 32,
            "in_channels": 4,
            "cross_attention_dim": 32,
            "out_channels": 8,
            "attention_bias": True,
            "activation_fn": "gelu-approximate",
            "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "norm_eps": 1e-6,
            "video_length": 2,
        },
        _latte,
    ),
    "cogvideox": Tiny(
        "CogVideoXTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 16,
            "text_embed_dim": 32,
            "num_layers": 2,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 1,
            "patch_size": 2,
            "temporal_compression_ratio": 4,
            "max_text_seq_length": 8,
        },
        _cogvideox,
    ),
    "wan": Tiny(
        "WanTransformer3DModel",
        {
            "patch_size": (1, 2, 2),
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 32,
            "freq_dim": 64,
            "ffn_dim": 64,
            "num_layers": 2,
            "cross_attn_norm": True,
            "qk_norm": "rms_norm_across_heads",
            "rope_max_seq_len": 32,
        },
        _wan,
    ),
    "ltx": Tiny(
        "LTXVideoTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "cross_attention_dim": 32,
            "num_layers": 2,
            "caption_channels": 32,
        },
        _ltx,
    ),
    "qwenimage": Tiny(
        "QwenImageTransformer2DModel",
        {
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "axes_dims_rope": (4, 4, 8),
        },
        _qwen,
    ),
}


def tiny_pipeline(dtype: torch.dtype = torch.float32, transformer: Any = None) -> Any:
    """A Flux pipeline of a tiny transformer, VAE and CLIP text encoder, without tokenizers: give it embeddings."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(1)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=32,
            intermediate_size=64,
            num_attention_heads=2,
            num_hidden_layers=2,
            vocab_size=100,
            projection_dim=32,
        )
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=1,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
        scaling_factor=1.0,
    )
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae.eval().to(dtype),
        text_encoder=text_encoder.eval().to(dtype),
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=TINY["flux"].make(dtype) if transformer is None else transformer,
    )


def run_pipeline(pipe: Any, dtype: torch.dtype = torch.float32, **kwargs: Any) -> torch.Tensor:
    """Two steps of it, as latents in float32: the same noise and the same embeddings each time."""
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        prompt_embeds=_noise(1, 8, 32, dtype=dtype),
        pooled_prompt_embeds=_noise(1, 32, dtype=dtype, seed=9),
        num_inference_steps=2,
        height=16,
        width=16,
        output_type="latent",
        generator=torch.Generator().manual_seed(3),
        return_dict=False,
        **kwargs,
    )[0].float()


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of what was expected."""
    return ((found - expected).norm() / expected.norm()).item()
