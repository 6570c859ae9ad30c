"""Writes data/modelopt_0_47.safetensors with NVIDIA ModelOpt 0.47: one layer for each algorithm, as it exports them.

    python modelopt_export.py data/modelopt_0_47.safetensors     (nvidia-modelopt[hf] installed)

A tiny Llama is quantized and exported for each algorithm. Of each export one layer is kept under the name of the algorithm,
with ``reference.NAME``, the weight by which inputs are multiplied: what ModelOpt dequantizes plus the low-rank term, times
the pre_quant_scale. The metadata holds hf_quant_config.json of each. (Blocks are quantized on the fly by a CUDA kernel. On a
CPU activations pass unchanged.)
"""

import copy
import json
import sys
import tempfile
from pathlib import Path

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint, quant_utils
from modelopt.torch.quantization import tensor_quant
from modelopt.torch.quantization.qtensor import MXFP4QTensor, MXFP8QTensor, NVFP4QTensor
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

CONFIGS = {
    "nvfp4": mtq.NVFP4_DEFAULT_CFG,
    "nvfp4_weights": mtq.W4A16_NVFP4_CFG,
    "nvfp4_fp8": mtq.W4A8_NVFP4_FP8_CFG,
    "nvfp4_awq": mtq.NVFP4_AWQ_LITE_CFG,
    "nvfp4_svd": mtq.NVFP4_SVDQUANT_DEFAULT_CFG,
    "fp8": mtq.FP8_DEFAULT_CFG,
    "fp8_rows": mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG,
    "fp8_blocks": mtq.FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG,
    "mxfp8": mtq.MXFP8_DEFAULT_CFG,
    "mxfp4_fp8": mtq.W4A8_MXFP4_FP8_CFG,
    "int8": mtq.INT8_DEFAULT_CFG,
    "int8_smooth": mtq.INT8_SMOOTHQUANT_CFG,
    "int8_weights": mtq.INT8_WEIGHT_ONLY_CFG,
    "int4_awq": mtq.INT4_AWQ_CFG,
}
LAYER = "model.layers.0.self_attn.k_proj"


def dequantized(stored: dict[str, torch.Tensor], name: str, group: int) -> torch.Tensor:
    """The stored weight as ModelOpt computes it."""
    codes, scale = stored["weight"], stored["weight_scale"]
    blocks, shape = {-1: group}, torch.Size([codes.shape[0], 128])
    if name.startswith("nvfp4"):
        tensor, more = NVFP4QTensor(shape, torch.float32, codes), {"double_scale": stored["weight_scale_2"]}
        return tensor.dequantize(torch.float32, scale=scale, block_sizes=blocks, **more)
    if name.startswith("mxfp4"):
        return MXFP4QTensor(shape, torch.float32, codes).dequantize(torch.float32, scale=scale, block_sizes=blocks)
    if name.startswith("mxfp8"):
        return MXFP8QTensor(shape, torch.float32, codes).dequantize(torch.float32, scale=scale)
    if name.startswith("fp8"):
        scale = scale[:, None] if scale.dim() == 1 else scale
        return quant_utils.from_quantized_weight(codes, scale, "fp8", torch.float32)
    if name.startswith("int8"):
        return quant_utils.from_quantized_weight(codes, scale, "int8_sq", torch.float32)
    # int4: ModelOpt has only the way there. What is packed to the same bytes is what they stand for.
    signed = torch.stack((codes & 0xF, codes >> 4), 1).flatten(0, 1).to(torch.int8)
    values = torch.where(signed > 7, signed - 16, signed) * scale.float().repeat_interleave(group, 1)
    assert torch.equal(quant_utils.pack_int4_in_uint8(values, scale.float(), group), codes)
    return values


def values_of(stored: dict[str, torch.Tensor], name: str, group: int) -> torch.Tensor:
    """What inputs are multiplied by."""
    values = dequantized(stored, name, group)
    factors = [stored.get(f"weight_quantizer._svdquant_lora_{which}") for which in "ba"]
    if factors[0] is not None:
        values = values + factors[0].float() @ factors[1].float()
    return values * stored["pre_quant_scale"].float() if "pre_quant_scale" in stored else values


def main(file: str) -> None:
    tensor_quant.dynamic_block_quantize_op = lambda inputs, *rest: inputs.clone()
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=32,
        num_key_value_heads=1,
        head_dim=4,
        architectures=["LlamaForCausalLM"],
    )
    tensors, described = {}, {}
    for name, recipe in CONFIGS.items():
        torch.manual_seed(0)
        model = LlamaForCausalLM(copy.deepcopy(config)).to(torch.bfloat16).eval()
        for parameter in model.parameters():
            parameter.data.mul_(5)
        calls = [torch.randint(0, 64, (2, 16)) for _ in range(2)]
        mtq.quantize(model, copy.deepcopy(recipe), lambda model, calls=calls: [model(ids) for ids in calls])
        with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
            export_hf_checkpoint(model, export_dir=folder)
            file_tensors = load_file(Path(folder) / "model.safetensors")
            described[name] = json.loads((Path(folder) / "hf_quant_config.json").read_text())
        stored = {
            key.removeprefix(f"{LAYER}."): value for key, value in file_tensors.items() if key.startswith(f"{LAYER}.")
        }
        group = described[name]["quantization"].get("group_size", 0)
        tensors |= {f"{name}.{part}": value for part, value in stored.items()}
        with torch.no_grad():
            tensors[f"reference.{name}"] = values_of(stored, name, group).contiguous()
        print(name, {part: (tuple(value.shape), value.dtype) for part, value in stored.items()}, described[name])
    save_file(tensors, file, {"hf_quant_configs": json.dumps(described)})


main(sys.argv[1])
