"""Writes a checkpoint of compressed-tensors with a module for each format, and what the library decompresses it to.

Two checkpoints: FOLDER (the modules of SCHEMES) and FOLDER/model (groups that target classes and patterns, an ignored head,
static activations).
"""

import json
import sys
from pathlib import Path

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.compressors.base import decompress_module
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import save_file

FP4 = {
    "num_bits": 4,
    "type": "float",
    "strategy": "tensor_group",
    "group_size": 16,
    "scale_dtype": "torch.float8_e4m3fn",
}
MX = {"type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
TOKEN = {"num_bits": 8, "strategy": "token", "dynamic": True}
#: module -> (rows, columns), weights, input_activations, format
SCHEMES = {
    **{
        f"int{b}_group": ((24, 96), {"num_bits": b, "strategy": "group", "group_size": 32}, None, None)
        for b in range(2, 9)
    },
    **{
        f"int{b}_zeros": (
            (24, 96),
            {"num_bits": b, "strategy": "group", "group_size": 32, "symmetric": False},
            None,
            None,
        )
        for b in range(2, 9)
    },
    "int1_group": ((24, 96), {"num_bits": 1, "strategy": "group", "group_size": 32}, None, None),
    "int4_channel": ((24, 100), {"num_bits": 4, "strategy": "channel"}, None, None),
    "int4_channel_zeros": ((20, 100), {"num_bits": 4, "strategy": "channel", "symmetric": False}, None, None),
    "int4_tensor": ((24, 96), {"num_bits": 4, "strategy": "tensor"}, None, None),
    "int4_tensor_zeros": ((24, 96), {"num_bits": 4, "strategy": "tensor", "symmetric": False}, None, None),
    "int3_odd": ((23, 90), {"num_bits": 3, "strategy": "group", "group_size": 30, "symmetric": False}, None, None),
    "int4_token8": (
        (24, 96),
        {"num_bits": 4, "strategy": "group", "group_size": 32},
        TOKEN,
        "pack-quantized",
    ),
    "w8a8_token": ((24, 96), {"num_bits": 8, "strategy": "channel"}, TOKEN, None),
    "w8a8_zeros": (
        (24, 96),
        {"num_bits": 8, "strategy": "channel", "symmetric": False},
        {**TOKEN, "symmetric": False},
        None,
    ),
    "w8a8_static": ((24, 96), {"num_bits": 8, "strategy": "tensor"}, {"num_bits": 8, "strategy": "tensor"}, None),
    "w4_in_bytes": ((24, 96), {"num_bits": 4, "strategy": "group", "group_size": 32}, TOKEN, "int-quantized"),
    "int8_block": (
        (40, 96),
        {"num_bits": 8, "strategy": "block", "block_structure": [16, 32]},
        None,
        "naive-quantized",
    ),
    "fp8_token": ((24, 96), {"num_bits": 8, "type": "float", "strategy": "channel"}, {**TOKEN, "type": "float"}, None),
    "fp8_static": (
        (24, 96),
        {"num_bits": 8, "type": "float", "strategy": "tensor"},
        {"num_bits": 8, "type": "float", "strategy": "tensor"},
        None,
    ),
    "fp8_block": (
        (40, 160),
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 64]},
        {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 64, "dynamic": True},
        None,
    ),
    "fp8_group": ((24, 96), {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 48}, None, None),
    "nvfp4": ((24, 96), FP4, {**FP4, "dynamic": "local"}, None),
    "mxfp4": ((24, 96), {"num_bits": 4, **MX}, {"num_bits": 4, **MX, "dynamic": True}, None),
    "mxfp6": ((24, 96), {"num_bits": 6, **MX}, None, None),
    "mxfp8": ((24, 96), {"num_bits": 8, **MX}, None, None),
}


def calibrate(module):
    """Fills the scales and zero points of a module from its weight."""
    scheme, weight = module.quantization_scheme, module.weight.detach().float()
    args = scheme.weights
    rows, columns = weight.shape
    if args.strategy == "tensor":
        groups, axes = weight, (0, 1)
    elif args.strategy == "channel":
        groups, axes = weight.unsqueeze(1), (2,)
    elif args.strategy == "block":
        high, wide = args.block_structure
        padded = torch.nn.functional.pad(weight, (0, -columns % wide, 0, -rows % high))
        groups, axes = padded.unflatten(0, (-1, high)).unflatten(2, (-1, wide)), (1, 3)
    else:
        groups, axes = weight.unflatten(1, (-1, args.group_size)), (2,)
    factor = None
    if hasattr(module, "weight_global_scale"):
        factor = generate_gparam(weight.min(), weight.max())
        module.weight_global_scale.data.copy_(factor)
    scale, zero = calculate_qparams(groups.amin(axes), groups.amax(axes), args, factor)
    module.weight_scale.data.copy_(scale.reshape(module.weight_scale.shape))
    if not args.symmetric:
        module.weight_zero_point.data.copy_(zero.reshape(module.weight_zero_point.shape))
    if hasattr(module, "input_scale"):
        module.input_scale.data.fill_(0.0625)
    if hasattr(module, "input_global_scale"):
        module.input_global_scale.data.fill_(8.0)


def save(model, config, folder):
    apply_quantization_config(model, QuantizationConfig.model_validate(config), show_progress=False)
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None and hasattr(module, "weight"):
            calibrate(module)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    for name, module in model.named_modules():
        if name.startswith("int1"):  # of one bit the library rounds all weights to 0
            module.weight_packed.data.random_(-(2**31), 2**31)
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    compressor.update_config(folder)
    reference = {}
    for name, module in model.named_modules():
        if getattr(module, "quantization_scheme", None) is not None and hasattr(module, "weight_scale"):
            decompress_module(module)
            reference[name] = module.weight.detach().contiguous()
    save_file(reference, folder / "reference.safetensors")


def main(folder):
    torch.manual_seed(0)
    model = torch.nn.Module()
    groups = {}
    for index, (name, ((rows, columns), weights, inputs, format)) in enumerate(SCHEMES.items()):
        linear = torch.nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16 if index % 2 else torch.float32)
        linear.weight.data.mul_(0.1 if index % 3 else 3.0)
        linear.weight.data[0].abs_()
        model.add_module(name, linear)
        groups[name] = {"targets": [name], "weights": weights, "input_activations": inputs, "format": format}
    save(model, {"config_groups": groups}, folder)

    from transformers import LlamaConfig, LlamaForCausalLM

    llama = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = LlamaForCausalLM(llama).to(torch.bfloat16)
    model.config.save_pretrained(folder / "model")
    config = {
        "config_groups": {
            "attention": {
                "targets": ["re:.*self_attn.*_proj$"],
                "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
                "input_activations": {"num_bits": 8, "type": "float", "strategy": "tensor"},
            },
            "others": {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "group", "group_size": 32}},
        },
        "ignore": ["lm_head", "re:.*layers.1.mlp.*"],
    }
    save(model, config, folder / "model")
    described = json.loads((folder / "model" / "config.json").read_text())
    assert described["quantization_config"]["format"] == "mixed-precision", described


main(Path(sys.argv[1]))
