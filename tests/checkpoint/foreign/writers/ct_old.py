"""Writes data/ct_0_17_1.safetensors, with compressed-tensors 0.17.1 on the path: forms that later versions no longer write.

    pip install --no-deps --target OLD compressed-tensors==0.17.1
    PYTHONPATH=OLD python ct_old.py data/ct_0_17_1.safetensors

Words of whole codes (3, 5, 6, 7 bits) and act-order (weight_g_idx). ``reference.M`` is what that version decompresses.
"""

import json
import sys

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file

SCHEMES = {
    "int3": {"num_bits": 3, "strategy": "group", "group_size": 32},
    "int5": {"num_bits": 5, "strategy": "group", "group_size": 32, "symmetric": False},
    "int6": {"num_bits": 6, "strategy": "channel"},
    "int7": {"num_bits": 7, "strategy": "channel", "symmetric": False},
    "order4": {"num_bits": 4, "strategy": "group", "group_size": 32, "actorder": "group"},
    "order4_zeros": {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False, "actorder": "group"},
    "order3_zeros": {"num_bits": 3, "strategy": "group", "group_size": 32, "symmetric": False, "actorder": "group"},
}


def main(file: str) -> None:
    torch.manual_seed(0)
    tensors, groups = {}, {}
    for name, args in SCHEMES.items():
        scheme = QuantizationScheme(targets=[name], weights=QuantizationArgs(**args), format="pack-quantized")
        weight = torch.randn(8, 96).bfloat16()
        grouped = weight
        state = {"weight": weight}
        if "actorder" in args:
            state["weight_g_idx"] = (torch.arange(96) // 32)[torch.randperm(96)].to(torch.int32)
            grouped = weight[:, torch.argsort(state["weight_g_idx"], stable=True)]
        values = grouped.unflatten(1, (-1, args.get("group_size", 96)))
        scale, zero = calculate_qparams(values.amin(-1), values.amax(-1), scheme.weights)
        state["weight_scale"] = scale
        if not args.get("symmetric", True):
            state["weight_zero_point"] = zero
        compressor = BaseCompressor.get_value_from_registry("pack-quantized")
        stored = compressor.compress(state, scheme)
        tensors |= {f"{name}.{part}": tensor.contiguous() for part, tensor in stored.items()}
        tensors[f"reference.{name}"] = compressor.decompress(stored, scheme)["weight"].contiguous()
        groups[name] = {"targets": [name], "weights": args, "format": "pack-quantized"}
    config = {
        "quant_method": "compressed-tensors",
        "version": "0.17.1",
        "quantization_status": "compressed",
        "format": "mixed-precision",
        "config_groups": groups,
    }
    save_file(tensors, file, {"quantization_config": json.dumps(config)})


main(sys.argv[1])
