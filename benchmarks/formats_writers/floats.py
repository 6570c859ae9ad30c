"""FP8 in blocks and rows, NVFP4 and FP8 of ModelOpt, gpt-oss' MXFP4, Gemma's own form.

FP8 in blocks, FBGEMM, gpt-oss and Gemma are written by their specifications: their code runs on GPUs only, or only reads.
Transformers' own code dequantizes them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from formats_writers.common import Made, companions, float_model, float_tensors, layers, save

E4M3 = torch.float8_e4m3fn


def fp8_blocks(out: Path, base: Path, block: int = 128) -> Made:
    """DeepSeek's and Qwen's: e4m3 codes, a float32 scale for each block."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    read: Any = Fp8Dequantize(None)
    tensors: dict[str, Tensor] = {}
    reference: dict[str, Tensor] = {}
    for name, layer in layers(float_model(base)).items():
        tiles = layer.weight.detach().float().unflatten(0, (-1, block)).unflatten(2, (-1, block))
        scale = tiles.abs().amax((1, 3)) / 448
        codes = (tiles / scale[:, None, :, None]).to(E4M3).flatten(2, 3).flatten(0, 1)
        tensors |= {f"{name}.weight": codes, f"{name}.weight_scale_inv": scale}
        reference[f"{name}.weight"] = read._dequantize_one(codes, scale, torch.float32)
    config = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [block, block], "activation_scheme": "dynamic"}
    save(out, base, tensors, config)
    return Made(reference, "transformers", "by the specification; Transformers' Fp8Dequantize")


def fbgemm(out: Path, base: Path) -> Made:
    """FBGEMM's: e4m3 codes, a float32 scale for each row."""
    tensors: dict[str, Tensor] = {}
    reference: dict[str, Tensor] = {}
    for name, layer in layers(float_model(base)).items():
        weight = layer.weight.detach().float()
        scale = weight.abs().amax(1, keepdim=True) / 448
        codes = (weight / scale).to(E4M3)
        tensors |= {f"{name}.weight": codes, f"{name}.weight_scale": scale}
        reference[f"{name}.weight"] = codes.float() * scale
    config = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]}
    save(out, base, tensors, config)

    def rounds(name: str, value: Tensor) -> Tensor:
        unit = value.abs().amax(-1, keepdim=True).clamp(max=1200.0) / 448
        return (value / unit).clamp(-448, 448).to(E4M3).float() * unit

    return Made(reference, "transformers", "by the specification, codes times scales", inputs=rounds)


def gpt_oss(out: Path, base: Path) -> Made:
    """gpt-oss' experts: blocks of 32 e2m1 codes, low nibble first, and e8m0 scales."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    tensors: dict[str, Tensor] = {}
    reference: dict[str, Tensor] = {}
    stored = float_tensors(base)
    for name in [name for name in stored if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        groups = stored.pop(name).float().mT.unflatten(-1, (-1, 32))  # [E, N, K / 32, 32]
        exponent = torch.floor(torch.log2(groups.abs().amax(-1).clamp(min=2.0**-100))) - 2
        scaled = groups / torch.exp2(exponent)[..., None]
        codes = (scaled.abs()[..., None] - values).abs().argmin(-1) + 8 * (scaled < 0)
        blocks = (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)
        scales = (exponent + 127).to(torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        reference[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    ignored = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    save(out, base, tensors | stored, {"quant_method": "mxfp4", "modules_to_not_convert": ignored}, add=False)
    return Made(reference, "transformers", "by the specification; Transformers' convert_moe_packed_tensors")


def gemma(out: Path, base: Path) -> Made:
    """Gemma's quantization-aware form: int4 attention, int2 feed-forward, scales of rows, no static activations."""
    from transformers.integrations.gemma_quant import QuantizedLinear

    tensors: dict[str, Tensor] = {}
    reference: dict[str, Tensor] = {}
    for name, layer in layers(float_model(base)).items():
        bits = 2 if ".mlp." in name else 4
        weight = layer.weight.detach().float()
        scale = weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 0.5)
        codes = (weight / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).long() + 2 ** (bits - 1)
        packed = sum(codes[:, i :: 8 // bits] << (i * bits) for i in range(8 // bits)).to(torch.uint8)  # type: ignore[union-attr]
        own = QuantizedLinear(weight.shape[1], weight.shape[0], num_bits=bits)
        own.weight.data, own.weight_scale.data = packed, scale
        zero = torch.zeros(())
        tensors |= {f"{name}.weight": packed, f"{name}.weight_scale": scale}
        tensors |= {f"{name}.input_activation_scale": zero, f"{name}.output_activation_scale": zero.clone()}
        reference[f"{name}.weight"] = own._dequantize_weights()
    config = {
        "quant_method": "gemma",
        "num_bits": 4,
        "quantize_embeddings": False,
        "module_quant_configs": {r"\.mlp\.": {"num_bits": 2}},
        "modules_to_not_convert": ["lm_head"],
    }
    save(out, base, tensors, config)
    return Made(reference, "transformers", "by Transformers' reading code; its QuantizedLinear dequantizes")


def modelopt(out: Path, base: Path, kind: str = "nvfp4") -> Made:
    """ModelOpt quantizes and exports; its own tensors dequantize."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint, quant_utils
    from modelopt.torch.quantization import tensor_quant
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    tensor_quant.dynamic_block_quantize_op = lambda inputs, *rest: (
        inputs.clone()
    )  # a CUDA kernel: fake values of inputs
    model = float_model(base)
    recipe = {"nvfp4": mtq.W4A16_NVFP4_CFG, "fp8": mtq.FP8_DEFAULT_CFG}[kind]
    ids = torch.randint(0, model.config.vocab_size, (1, 32))
    mtq.quantize(model, recipe, lambda quantized: quantized(ids))
    companions(base, out / "model")
    with torch.no_grad():
        export_hf_checkpoint(model, export_dir=str(out / "model"))
    stored = load_file(out / "model" / "model.safetensors")
    reference: dict[str, Tensor] = {}
    for name, layer in layers(float_model(base)).items():
        codes, scale = stored[f"{name}.weight"], stored[f"{name}.weight_scale"]
        if kind == "nvfp4":
            tensor = NVFP4QTensor(layer.weight.shape, torch.float32, codes)
            more = {"double_scale": stored[f"{name}.weight_scale_2"], "block_sizes": {-1: 16}}
            reference[f"{name}.weight"] = tensor.dequantize(torch.float32, scale=scale, **more)
        else:
            reference[f"{name}.weight"] = quant_utils.from_quantized_weight(codes, scale, "fp8", torch.float32)

    def rounds(name: str, value: Tensor) -> Tensor:
        unit = stored[f"{name}.input_scale"].float()
        return (value / unit).clamp(-448, 448).to(E4M3).float() * unit

    inputs = rounds if kind == "fp8" else None
    how = "export_hf_checkpoint; ModelOpt's own tensors dequantize"
    return Made(reference, "nvidia-modelopt", how, inputs=inputs)
