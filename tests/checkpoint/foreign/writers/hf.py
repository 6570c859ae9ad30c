"""Writes float8, MXFP4, Gemma and BFL weights as Transformers and Diffusers do, and what their own functions dequantize.

python hf.py OUT    writes OUT/KIND.safetensors and OUT/KIND.reference.safetensors for fp8, gpt_oss, gemma and bfl
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file
from transformers.integrations import finegrained_fp8, gemma_quant, mxfp4


def fp8(out: Path) -> None:
    """Modules of "fp8": quantized by Fp8Quantize, dequantized by Fp8Dequantize; if blocks are cut, as in a backward pass."""
    tensors, reference = {}, {}

    def quantized(block, scale_fmt="float"):
        config = SimpleNamespace(weight_block_size=block, scale_fmt=scale_fmt)
        return finegrained_fp8.Fp8Quantize(SimpleNamespace(quantization_config=config))._quantize_one

    dequantize = finegrained_fp8.Fp8Dequantize(None)._dequantize_one
    for name, shape, block, form in (
        ("blocks", (256, 384), (128, 128), "float"),
        ("small", (96, 64), (32, 64), "float"),
        ("powers", (64, 128), (32, 64), "ue8m0"),
        ("micro", (24, 96), (1, 32), "ue8m0"),
    ):
        made = quantized(block, form)(f"{name}.weight", torch.randn(shape))
        tensors |= made
        reference[name] = dequantize(made[f"{name}.weight"], made[f"{name}.weight_scale_inv"], torch.float32)
    made = quantized((32, 64))("experts.gate_up_proj", torch.randn(3, 64, 128))
    tensors |= made
    reference["experts.gate_up_proj"] = dequantize(*made.values(), torch.float32)

    for name, shape, block in (("ragged", (200, 160), (128, 128)), ("crooked", (20, 100), (8, 64))):
        codes = torch.randn(shape).to(torch.float8_e4m3fn)
        scale = torch.rand(-(-shape[0] // block[0]), -(-shape[1] // block[1])) + 0.01
        tensors |= {f"{name}.weight": codes, f"{name}.weight_scale_inv": scale}
        reference[name] = finegrained_fp8._dequantize_fp8_weight(codes, scale, list(block), torch.float32)
    for name in ("tensor", "static"):
        codes, scale = torch.randn(24, 32).to(torch.float8_e4m3fn), torch.tensor(0.03)
        tensors |= {f"{name}.weight": codes, f"{name}.weight_scale_inv": scale}
        reference[name] = finegrained_fp8._dequantize_fp8_weight(codes, scale, None, torch.float32)
    tensors["static.activation_scale"] = torch.tensor(0.5)
    # Two codes of 4 bits in an int8, as DeepSeek V4 stores its experts.
    codes = torch.randint(-128, 128, (16, 32), dtype=torch.int8)
    scale = torch.randint(120, 130, (16, 2), dtype=torch.uint8).view(torch.float8_e8m0fnu)
    tensors |= {"experts.0.w1.weight": codes, "experts.0.w1.scale": scale}
    reference["experts.0.w1"] = dequantize(codes, scale, torch.float32)
    save_file(tensors, out / "fp8.safetensors")
    save_file(reference, out / "fp8.reference.safetensors")


def gpt_oss(out: Path) -> None:
    """Experts as gpt-oss stores them; 255, which stands for no scale, is left out, and so are scales beyond float16."""
    tensors, reference = {}, {}
    for name, rows, length in (("gate_up_proj", 64, 96), ("down_proj", 96, 32)):
        blocks = torch.randint(0, 256, (3, rows, length // 32, 16), dtype=torch.uint8)
        scales = torch.randint(110, 130, (3, rows, length // 32), dtype=torch.uint8)
        prefix = f"model.layers.0.mlp.experts.{name}"
        tensors |= {f"{prefix}_blocks": blocks, f"{prefix}_scales": scales, f"{prefix}_bias": torch.randn(3, rows)}
        reference[prefix] = mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.randn(96, 96)
    save_file(tensors, out / "gpt_oss.safetensors")
    save_file(reference, out / "gpt_oss.reference.safetensors")


def gemma(out: Path) -> None:
    """Layers of Gemma: codes of 2, 4 and 8 bits, one scale a row."""
    tensors, reference = {}, {}
    for name, bits in (("two", 2), ("four", 4), ("eight", 8)):
        layer = gemma_quant.QuantizedLinear(64, 24, num_bits=bits)
        low, high = (-128, 128) if bits == 8 else (0, 256)
        layer.weight.data.copy_(torch.randint(low, high, layer.weight.shape, dtype=layer.weight.dtype))
        layer.weight_scale.data.uniform_(0.01, 0.1)
        layer.input_activation_scale.data.fill_(0.25 if bits == 8 else 0.0)
        layer.output_activation_scale.data.fill_(0.5 if bits == 4 else 0.0)
        tensors |= {f"model.layers.0.{name}.{part}": value.detach() for part, value in layer.state_dict().items()}
        reference[f"model.layers.0.{name}"] = layer._dequantize_weights()
    for name, bits, blocks in (("embed_tokens", 4, 1), ("embed_tokens_per_layer", 8, 4)):
        table = gemma_quant.QuantizedEmbedding(32, 64, torch.float32, num_bits=bits)
        stored = table.embedding_quantized
        low, high = (-128, 128) if bits == 8 else (0, 256)
        stored.data.copy_(torch.randint(low, high, stored.shape, dtype=stored.dtype))
        table.embedding_scale = torch.nn.Parameter(torch.rand(32, blocks) + 0.01)
        tensors |= {f"model.{name}.{part}": value.detach() for part, value in table.state_dict().items()}
        reference[f"model.{name}"] = table.weight
    tensors["model.layers.0.self_attn.k_cache_scale"] = torch.tensor(0.5)
    tensors["model.norm.weight"] = torch.ones(64)
    save_file({name: value.contiguous() for name, value in tensors.items()}, out / "gemma.safetensors")
    save_file(
        {name: value.detach().contiguous() for name, value in reference.items()}, out / "gemma.reference.safetensors"
    )


def bfl(out: Path) -> None:
    """Layers of Black Forest Labs' files: NVFP4, and float8 by rows."""
    from diffusers.quantizers.bfl import utils

    weight = torch.randn(24, 64)
    tensors, reference = {}, {}
    for name, quantize, dequantize in (
        ("blocks.0.fp8r", utils.quantize_fp8r, utils.dequantize_fp8r),
        ("blocks.0.nvfp4", utils.quantize_nvfp4, utils.dequantize_nvfp4),
    ):
        made = quantize(weight)
        parts = dict(zip(("weight", "weight_scale", "weight_scale_2"), made, strict=False))
        tensors |= {f"{name}.{part}": value.contiguous() for part, value in parts.items()}
        reference[name] = dequantize(*made)
    tensors["blocks.0.nvfp4.input_scale"] = torch.tensor(0.1)
    tensors["blocks.0.norm.weight"] = torch.ones(24)
    save_file(tensors, out / "bfl.safetensors")
    save_file(reference, out / "bfl.reference.safetensors")


torch.manual_seed(0)
for write in (fp8, gpt_oss, gemma, bfl):
    write(Path(sys.argv[1]))
