"""Files of HQQ, written by its own layers on the CPU, with its own dequantized weights beside them.

python hqq_files.py OUT   writes OUT/model.safetensors and OUT/expected.safetensors
"""

import sys
from pathlib import Path

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from safetensors.torch import save_file

out = Path(sys.argv[1])
torch.manual_seed(0)


def layer(
    n: int, k: int, nbits: float, group_size: int | None, dtype=torch.float16, change=None, **options
) -> HQQLinear:
    config = BaseQuantizeConfig(nbits=nbits, group_size=group_size, **options)
    config["weight_quant_params"] |= change or {}
    linear = torch.nn.Linear(k, n, bias=n == 32)
    return HQQLinear(linear, config, compute_dtype=dtype, device="cpu")


layers = {
    "four": layer(32, 128, 4, 64),
    "four_row": layer(64, 64, 4, 64),
    "four_bf16": layer(64, 128, 4, 32, torch.bfloat16),
    "as_float": layer(64, 128, 4, 64, view_as_float=True),
    "eight": layer(64, 128, 8, 64),
    "six": layer(64, 128, 6, 64),
    "five": layer(64, 128, 5, 64),
    "three": layer(64, 96, 3, 32),
    "three_as_float": layer(64, 96, 3, 32, torch.float32, view_as_float=True),
    "two": layer(64, 128, 2, 16),
    "ternary": layer(64, 128, 1.58, 16),
    "one": layer(64, 128, 1, 16),
    "crossing": layer(64, 96, 4, 64),  # in groups of 32
    "row": layer(64, 128, 4, None),
    "tensor": layer(64, 128, 4, 64, change={"channel_wise": False}),
    "axis0": layer(64, 128, 4, 64, axis=0),
    "axis0_three": layer(64, 128, 3, 64, axis=0),
}
model = torch.nn.ModuleDict(layers)
save_file({name: value.detach() for name, value in model.state_dict().items()}, out / "model.safetensors")
save_file({f"{name}.weight": m.dequantize().contiguous() for name, m in layers.items()}, out / "expected.safetensors")
