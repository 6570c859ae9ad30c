"""Files of bitsandbytes, written by its own layers, with its own dequantized weights beside them.

python bnb_files.py OUT   writes OUT/4bit.safetensors, OUT/8bit.safetensors and OUT/{4,8}bit.expected.safetensors
"""

import sys
from pathlib import Path

import bitsandbytes as bnb
import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from safetensors.torch import save_file

torch.compiler.set_stance("force_eager")
out = Path(sys.argv[1])
torch.manual_seed(0)


def weight(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return (torch.randn(*shape) * torch.logspace(-1, 0.5, shape[0]).view(-1, *[1] * (len(shape) - 1))).to(dtype)


def four(value: torch.Tensor, bias: bool = False, **options) -> bnb.nn.Linear4bit:
    layer = bnb.nn.Linear4bit(value.shape[1], value.shape[0], bias=bias)
    layer.weight = bnb.nn.Params4bit(value, requires_grad=False, module=layer, **options)
    return layer.to("cpu")


class Experts(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj = torch.nn.Parameter(weight(2, 32, 64))
        replace_parameter_4bit(self, "up_proj", quant_type="nf4")


sparse = weight(64, 256)
sparse[3:5] = 0  # blocks of zeros: double quantization rounds their scales, to below 0 too
layers = {
    "nf4": four(weight(32, 128), bias=True, quant_type="nf4", compress_statistics=False),
    "nf4_double": four(weight(64, 256), quant_type="nf4"),
    "nf4_sparse": four(sparse, quant_type="nf4"),
    "fp4_double": four(weight(32, 128, dtype=torch.float16), quant_type="fp4"),
    "fp4_128": four(weight(32, 256, dtype=torch.float32), quant_type="fp4", blocksize=128, compress_statistics=False),
    "words": four(weight(32, 128), quant_type="nf4", quant_storage=torch.bfloat16),
    "crossing": four(weight(8, 96), quant_type="nf4", compress_statistics=False),  # in groups of 32
    "rows": four(
        weight(7, 32), quant_type="nf4", compress_statistics=False
    ),  # a block is two rows; the last one is short
    "tiny_groups": four(weight(8, 20), quant_type="nf4", compress_statistics=False),  # groups of 4
    "experts": Experts(),
}
model = torch.nn.ModuleDict(layers)
model["norm"] = torch.nn.LayerNorm(8)
save_file(model.state_dict(), out / "4bit.safetensors")


def dequantized(value: bnb.nn.Params4bit) -> torch.Tensor:
    state = value.quant_state
    if state.shape[-1] % state.blocksize == 0:
        return dequantize_4bit(value.data, state)
    # bitsandbytes 0.50.2's kernel for CPUs starts a block at each row, but blocks of the flattened weight were written: its
    # result is several times too large. Its implementation for other devices follows what was written.
    codes, scales = value.data.flatten().view(torch.uint8), state.absmax
    return _dequantize_4bit_compute(codes, scales, state.code, state.blocksize, state.shape, state.dtype)


expected = {f"{n}.weight": dequantized(m.weight) for n, m in layers.items() if n != "experts"}
expected["experts.up_proj"] = model["experts"].up_proj.detach()
save_file({name: value.contiguous() for name, value in expected.items()}, out / "4bit.expected.safetensors")

eight = bnb.nn.Linear8bitLt(128, 32, bias=True, has_fp16_weights=False, threshold=6.0)
eight.weight = bnb.nn.Int8Params(weight(32, 128, dtype=torch.float16), requires_grad=False, has_fp16_weights=False)
eight = eight.to("cpu")
save_file(torch.nn.ModuleDict({"m": eight}).state_dict(), out / "8bit.safetensors")
save_file({"m.weight": int8_vectorwise_dequant(eight.weight.data, eight.weight.SCB)}, out / "8bit.expected.safetensors")
