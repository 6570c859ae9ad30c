"""Modules of Nunchaku's models of Flux and Qwen-Image, and those of Diffusers that they are.

Nunchaku joins q, k and v. In Flux's single blocks it applies the two halves of ``proj_out`` one by one. A second model class
(V2) has other names for the same tensors.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_QKV, _ADDED = ("attn.to_q", "attn.to_k", "attn.to_v"), ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")


class Place(NamedTuple):
    """Where a module of Nunchaku is in Diffusers' model.

    Attributes:
        names: the modules that share its rows.
        shifted: True behind GELU: with int4 codes its bias is that for shifted inputs.
        order: number of modulations that its rows alternate between, else 1.
        half: which half of its inputs it has of a module; None: all.
    """

    names: tuple[str, ...]
    shifted: bool = False
    order: int = 1
    half: int | None = None


_BLOCK = {
    "qkv_proj": Place(_QKV),
    "attn.to_qkv": Place(_QKV),
    "qkv_proj_context": Place(_ADDED),
    "attn.add_qkv_proj": Place(_ADDED),
    "out_proj": Place(("attn.to_out.0",)),
    "out_proj_context": Place(("attn.to_add_out",)),
    "mlp_fc1": Place(("ff.net.0.proj",)),
    "mlp_fc2": Place(("ff.net.2",), shifted=True),
    "mlp_context_fc1": Place(("ff_context.net.0.proj",)),
    "mlp_context_fc2": Place(("ff_context.net.2",), shifted=True),
    **{f"norm_{one}": Place((f"attn.norm_{one}",)) for one in ("q", "k", "added_q", "added_k")},
    **{name: Place((name,)) for name in ("attn.to_out.0", "attn.to_add_out")},
    **{f"{name}.net.0.proj": Place((f"{name}.net.0.proj",)) for name in ("ff", "ff_context", "img_mlp", "txt_mlp")},
    **{f"{name}.net.2": Place((f"{name}.net.2",), shifted=True) for name in ("ff", "ff_context", "img_mlp", "txt_mlp")},
    **{name: Place((name,), order=6) for name in ("norm1.linear", "norm1_context.linear", "img_mod.1", "txt_mod.1")},
}
_SINGLE = {
    "qkv_proj": Place(_QKV),
    "attn.to_qkv": Place(_QKV),
    "norm_q": Place(("attn.norm_q",)),
    "norm_k": Place(("attn.norm_k",)),
    "mlp_fc1": Place(("proj_mlp",)),
    "out_proj": Place(("proj_out",), half=0),
    "attn.to_out": Place(("proj_out",), half=0),
    "mlp_fc2": Place(("proj_out",), shifted=True, half=1),
    "norm.linear": Place(("norm.linear",), order=3),
}
_BLOCKS = {"transformer_blocks": _BLOCK, "single_transformer_blocks": _SINGLE}
_NAME = re.compile(r"((single_)?transformer_blocks)\.(\d+)\.(.+)")


def place_of(module: str) -> Place | None:
    """Where a module of Nunchaku's is, with whole names; None: it is none that this reader knows."""
    found = _NAME.fullmatch(module)
    place = None if found is None else _BLOCKS[found[1]].get(found[4])
    if found is None or place is None:
        return None
    return place._replace(names=tuple(f"{found[1]}.{found[3]}.{name}" for name in place.names))
