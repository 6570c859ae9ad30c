"""Layers of diffusion models that stay float by default: few weights, but their errors show in every pixel.

`QuantoConfig(default_skips=False)` clears the list; `QuantoConfig(modules={"proj_out": "int8"})` takes one layer off it;
`requanto inspect` on a saved directory shows what stayed float.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

#: Direct children of a model, by shell patterns: what images, text and time enter by, and what images leave by. The big
#: blocks between them often have layers of the same names (``single_transformer_blocks.0.proj_out``): those do count.
OUTER_LAYERS = (
    "*embed*",  # x_embedder, context_embedder, time_text_embed, pos_embed, patch_embed, time_embedding, cap_embedder ...
    "*_emb",  # time_extra_emb
    "time_step_proj",
    "adaln_single",  # turns the time step into the scales of all blocks
    "caption_projection",
    "encoder_hid_proj",
    "*_in",  # proj_in, img_in, txt_in, conv_in
    "norm_out",
    "proj_out*",
    "conv_out",
    "*final_layer*",
)

#: Parts of a name at any depth: embedders that some models keep inside their blocks, and the ends of image decoders.
INNER_LAYERS = (
    "timestep_embedder",
    "time_embedder",
    "guidance_embedder",
    "t_embedder",
    "conv_in",
    "conv_out",
)


def stays_float(name: str) -> bool:
    """Whether the module of this full dotted name is left float unless the config says otherwise."""
    parts = name.split(".")
    return any(fnmatchcase(parts[0], pattern) for pattern in OUTER_LAYERS) or any(
        part in INNER_LAYERS for part in parts[1:]
    )
