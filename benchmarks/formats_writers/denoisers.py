"""Diffusion transformers: Nunchaku's SVDQuant, ComfyUI's scaled float8 in one file, GGUF in one file.

Tiny models with random weights. No library reads Nunchaku's files on a CPU; its tiles are packed as tests/checkpoint/foreign
packs them, lane by lane as its kernels read them. A float8 weight of ComfyUI is its codes times one scale.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from formats_writers.common import Made, float_tensors

TESTS = Path(__file__).parents[2] / "tests" / "checkpoint" / "foreign" / "writers"
#: names of Diffusers -> those of Z-Image's own file
Z_IMAGE = {
    "all_final_layer.2-1.": "final_layer.",
    "all_x_embedder.2-1.": "x_embedder.",
    ".attention.to_out.0.weight": ".attention.out.weight",
    ".attention.norm_k.weight": ".attention.k_norm.weight",
    ".attention.norm_q.weight": ".attention.q_norm.weight",
}


def inputs_for(model: nn.Module) -> dict[str, Tensor]:
    """Inputs of a denoiser, by the names of its forward; "list." marks one that is a list."""
    torch.manual_seed(1)
    config: Any = model.config
    if type(model).__name__.startswith("ZImage"):
        return {
            "list.x": torch.randn(config.in_channels, 1, 8, 8),
            "t": torch.tensor([0.5]),
            "list.cap_feats": torch.randn(12, config.cap_feat_dim),
        }
    places = torch.zeros(16, 3)
    places[:, 1], places[:, 2] = torch.arange(16) // 4, torch.arange(16) % 4
    return {
        "hidden_states": torch.randn(1, 16, config.in_channels),
        "encoder_hidden_states": torch.randn(1, 8, config.joint_attention_dim),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim),
        "timestep": torch.tensor([0.5]),
        "img_ids": places,
        "txt_ids": torch.zeros(8, 3),
        "guidance": torch.tensor([3.5]),
    }


def nunchaku(out: Path, base: Path, rank: int = 16, group: int = 64) -> Made:
    """Diffusers' "nunchaku_lite": int4 codes in groups of 64, smoothing, a low-rank term."""
    sys.path.insert(0, str(TESTS))
    import nunchaku_files as tiles

    tensors: dict[str, Tensor] = {}
    reference: dict[str, Tensor] = {}
    modules = []
    quantized = 0
    for name, weight in float_tensors(base).items():
        if (
            weight.dim() != 2
            or "transformer_blocks" not in name
            or ".norm" in name
            or any(n % 128 for n in weight.shape)
        ):
            tensors[name] = weight
            continue
        module = name.removesuffix(".weight")
        modules.append(module)
        value = weight.double()
        u, s, v = torch.linalg.svd(value, full_matrices=False)
        up, down = (u[:, :rank] * s[:rank]).bfloat16(), v[:rank].bfloat16()
        smooth = (value.abs().amax(0) / value.abs().max()).sqrt().clamp(min=0.1).bfloat16()
        rest = ((value - up.double() @ down.double()) * smooth.double()).unflatten(-1, (-1, group))
        scale = (rest.abs().amax(-1) / 7).bfloat16()
        codes = (rest / scale.double()[..., None]).round().clamp(-8, 7)
        parts = {
            "qweight": tiles.pack_codes(codes.flatten(-2).to(torch.int8)),
            "wscales": tiles.pack_scales(scale),
            "proj_down": tiles.pack_factor(down, True),
            "proj_up": tiles.pack_factor(up, False),
            "smooth_factor": tiles.pack_scales(smooth.unsqueeze(-1)).reshape(-1),
        }
        quantized += sum(part.nbytes for part in parts.values())
        tensors |= {f"{module}.{part}": value for part, value in parts.items()}
        whole = (codes * scale.double()[..., None]).flatten(-2) / smooth.double() + up.double() @ down.double()
        reference[name] = whole.float()
    for name in [f"{module}.bias" for module in modules if f"{module}.bias" in tensors]:
        # Biases of these layers are in tiles, and those that were copied before are not.
        tensors[name] = tiles.pack_scales(float_tensors(base)[name].unsqueeze(-1)).reshape(-1)
    target = out / "model"
    target.mkdir()
    save_file({n: t.contiguous() for n, t in tensors.items()}, target / "diffusion_pytorch_model.safetensors")
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    section = {"precision": "int4", "group_size": group, "rank": rank, "targets": modules}
    config["quantization_config"] = {"quant_method": "nunchaku_lite", "svdq_w4a4": section}
    (target / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    return Made(
        reference,
        "diffusers",
        "by the specification; codes, factors and smoothing before they were packed",
        quantized=quantized,
        kind="diffusers",
        cls="FluxTransformer2DModel",
        values=torch.bfloat16,
    )


def _original(base: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A Z-Image model under its own names, and the names of Diffusers' weights of which each is made."""
    tensors: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    stored = float_tensors(base)
    for name, value in stored.items():
        own = name
        for new, old in Z_IMAGE.items():
            own = own.replace(new, old)
        if own.endswith((".to_k.weight", ".to_v.weight")):
            continue
        if own.endswith(".to_q.weight"):
            value = torch.cat([stored[name.replace("to_q", part)] for part in ("to_q", "to_k", "to_v")])
            own = own.replace("to_q", "qkv")
        tensors[own], names[own] = value, name
    return tensors, names


def comfyui(out: Path, base: Path) -> Made:
    """One file of float8 weights with scales, under the model's own names, as ComfyUI's older scaled files are."""
    tensors, names = _original(base)
    reference: dict[str, Tensor] = {}
    quantized = 0
    made = {"scaled_fp8": torch.empty(2, dtype=torch.float8_e4m3fn)}
    for own, value in tensors.items():
        made[own] = value
        if value.dim() != 2 or "layers." not in own or "refiner" in own or "adaLN" in own:
            continue
        scale = value.float().abs().max() / 448
        codes = (value.float() / scale).to(torch.float8_e4m3fn)
        made |= {own: codes, own.replace(".weight", ".scale_weight"): scale}
        quantized += codes.nbytes + 4
        floats = codes.float() * scale
        if own.endswith(".qkv.weight"):
            thirds = floats.chunk(3)
            reference |= {names[own].replace("to_q", f"to_{x}"): third for x, third in zip("qkv", thirds)}
        else:
            reference[names[own]] = floats
    save_file({n: t.contiguous() for n, t in made.items()}, out / "model.safetensors")
    shutil.copytree(base, out / "config", ignore=shutil.ignore_patterns("*.safetensors"))
    return Made(
        reference,
        "diffusers",
        "by ComfyUI's reading code; codes times scales",
        quantized=quantized,
        kind="diffusers",
        cls="ZImageTransformer2DModel",
        single_file="model.safetensors",
        options={"config": "config"},
    )


def gguf(out: Path, base: Path, kind: str = "Q4_0") -> Made:
    """One GGUF file of the model under its own names; gguf quantizes and dequantizes."""
    import gguf as library

    tensors, names = _original(base)
    reference: dict[str, Tensor] = {}
    quantized = 0
    wanted = library.GGMLQuantizationType[kind]
    writer = library.GGUFWriter(out / "model.gguf", "lumina2")
    for own, value in tensors.items():
        numbers = value.float().numpy()
        if value.dim() != 2 or "layers." not in own or "refiner" in own:
            writer.add_tensor(own, numbers)
            continue
        codes = library.quants.quantize(numbers, wanted)
        writer.add_tensor(own, codes, raw_dtype=wanted)
        quantized += codes.nbytes
        floats = torch.from_numpy(library.quants.dequantize(codes, wanted).copy())
        if own.endswith(".qkv.weight"):
            thirds = floats.chunk(3)
            reference |= {names[own].replace("to_q", f"to_{x}"): third for x, third in zip("qkv", thirds)}
        else:
            reference[names[own]] = floats
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    shutil.copytree(base, out / "config", ignore=shutil.ignore_patterns("*.safetensors"))
    return Made(
        reference,
        "gguf",
        "gguf.quants.quantize and dequantize",
        quantized=quantized,
        kind="diffusers",
        cls="ZImageTransformer2DModel",
        single_file="model.gguf",
        options={"config": "config"},
    )
