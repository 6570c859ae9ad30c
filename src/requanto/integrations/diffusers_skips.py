"""Layers of diffusion models that stay float by default: they have few weights, but their errors affect every pixel.

`QuantoConfig(default_skips=False)` disables the list; `QuantoConfig(modules={"proj_out": "int8"})` quantizes one layer of
it; `requanto inspect` on a saved directory shows which layers stayed float.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

#: Shell patterns for direct children of a model: the input layers of images, text and time, and the output layers. Layers of
#: the same name inside the blocks (``single_transformer_blocks.0.proj_out``) are quantized.
OUTER_LAYERS = (
    "*embed*",  # x_embedder, context_embedder, time_text_embed, pos_embed, patch_embed, time_embedding, cap_embedder ...
    "*_emb",  # time_extra_emb
    "time_step_proj",
    "adaln_single",  # computes the scales of all blocks from the time step
    "caption_projection",
    "encoder_hid_proj",
    "*_in",  # proj_in, img_in, txt_in, conv_in
    "norm_out",
    "proj_out*",
    "conv_out",
    "*final_layer*",
)

#: Module names at any depth: embedders that some models have inside their blocks, and the outer layers of image decoders.
INNER_LAYERS = (
    "timestep_embedder",
    "time_embedder",
    "guidance_embedder",
    "t_embedder",
    "conv_in",
    "conv_out",
)


def stays_float(name: str) -> bool:
    """Whether the module of this full dotted name stays float unless the config says otherwise."""
    parts = name.split(".")
    return any(fnmatchcase(parts[0], pattern) for pattern in OUTER_LAYERS) or any(
        part in INNER_LAYERS for part in parts[1:]
    )
