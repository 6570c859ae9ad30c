"""Tensors of every class that torchao's safetensors support knows, flattened by torchao, and what torchao dequantizes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiles import tile_words
from torchao.prototype.mx_formats.mx_tensor import MXTensor, QuantizeTensorToMXKwargs
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, QuantizeTensorToNVFP4Kwargs
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
from torchao.quantization import (
    Float8Tensor,
    Int4PlainInt32Tensor,
    Int4Tensor,
    Int4TilePackedTo4dTensor,
    Int8DynamicActivationInt8WeightConfig,
    Int8Tensor,
    Int8WeightOnlyConfig,
    IntxUnpackedToInt8Tensor,
    IntxWeightOnlyConfig,
    MappingType,
    PerAxis,
    PerBlock,
    PerGroup,
    PerRow,
    PerTensor,
    quantize_,
)
from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs, QuantizeTensorToInt8Kwargs
from torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor import (
    IntxUnpackedToInt8TensorActivationQuantization,
)

torch.manual_seed(0)
WEIGHT = torch.randn(128, 256, dtype=torch.bfloat16, device="cpu") * 0.05
EXPERTS = torch.randn(3, 128, 128, dtype=torch.bfloat16, device="cpu") * 0.05


def linear(config) -> torch.Tensor:
    """A layer's weight, quantized by torchao's own function."""
    layer = torch.nn.Linear(256, 128, dtype=torch.bfloat16)
    layer.weight.data.copy_(WEIGHT)
    quantize_(torch.nn.Sequential(layer), config)
    return layer.weight.data


def int4(weight: torch.Tensor, group: int, symmetric: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes from 0 on, scale and zero point [N, K / g], as the functions of ``mslk`` choose them, which need a GPU."""
    parts = weight.float().unflatten(-1, (-1, group))
    low, high = parts.amin(-1, keepdim=True), parts.amax(-1, keepdim=True)
    if symmetric:
        high = parts.abs().amax(-1, keepdim=True)
        low = -high * 8 / 7
    scale = (high - low).clamp(min=1e-6) / 15
    codes = ((parts - low) / scale).round().clamp(0, 15)
    zero = torch.zeros_like(low) if symmetric else low + 8 * scale
    return codes.flatten(-2).int(), scale.squeeze(-1).to(weight.dtype), zero.squeeze(-1).to(weight.dtype)


def plain_int4(weight: torch.Tensor, group: int, symmetric: bool = False, **more) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scale, zero = int4(weight, group, symmetric)
    signed = (codes - 8).to(torch.int8)
    packed = (signed[..., ::2] & 0xF) | (signed[..., 1::2] << 4)
    block = [*[1] * (weight.dim() - 1), group]
    tensor = Int4Tensor(packed, scale.mT.contiguous(), zero.mT.contiguous(), block, weight.shape, **more)
    value = signed.float().unflatten(-1, (-1, group)) * scale.float().unsqueeze(-1) + zero.float().unsqueeze(-1)
    return tensor, value.flatten(-2)


def tile_int4(weight: torch.Tensor, group: int, **more) -> tuple[torch.Tensor, torch.Tensor]:
    """The tensor for CUDA kernels, whose columns are padded to a multiple of 1024."""
    rows, columns = weight.shape
    whole = torch.nn.functional.pad(weight, (0, -columns % 1024, 0, -rows % 8))
    codes, scale, zero = int4(whole, group)
    both = torch.stack((scale, zero), dim=-1).transpose(0, 1).contiguous()
    tensor = Int4TilePackedTo4dTensor(tile_words(codes), both, [1, group], weight.shape, **more)
    value = (codes - 8).float().unflatten(-1, (-1, group)) * scale.float().unsqueeze(-1) + zero.float().unsqueeze(-1)
    return tensor, value.flatten(-2)[:rows, :columns]


def intx(bits: int, granularity, mapping: MappingType = MappingType.SYMMETRIC) -> torch.Tensor:
    dtype = getattr(torch, f"int{bits}")
    return linear(IntxWeightOnlyConfig(weight_dtype=dtype, granularity=granularity, mapping_type=mapping))


def nvfp4(weight: torch.Tensor, **more) -> torch.Tensor:
    largest = weight.float().abs().amax((-2, -1)) / (448 * 6)
    scale = largest.reshape(-1, 1, 1) if weight.dim() == 3 else largest
    return NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=scale, **more)


ASYM, ROW, TOKEN = MappingType.ASYMMETRIC, PerRow(), QuantizeTensorToFloat8Kwargs(granularity=PerRow())
INT8_TOKEN = QuantizeTensorToInt8Kwargs(granularity=PerRow())
PRE = torch.rand(256, device="cpu").add(0.5).to(torch.bfloat16)
zero_inputs = QuantizeTensorToInt8Kwargs(granularity=PerRow(), mapping_type=ASYM)
ASYM_TOKEN = IntxUnpackedToInt8TensorActivationQuantization.INT8_ASYM_PER_TOKEN
tensors: dict[str, torch.Tensor] = {
    "int8_wo": linear(Int8WeightOnlyConfig()),
    "int8_dyn": linear(Int8DynamicActivationInt8WeightConfig()),
    "int8_tensor": Int8Tensor.from_hp(WEIGHT, PerTensor()),
    "int8_asym": Int8Tensor.from_hp(WEIGHT, ROW, mapping_type=ASYM),
    "int8_asym_inputs": Int8Tensor.from_hp(WEIGHT, ROW, act_quant_kwargs=zero_inputs),
    "int8_static": Int8Tensor.from_hp(
        *(WEIGHT, ROW),
        act_quant_kwargs=QuantizeTensorToInt8Kwargs(granularity=PerTensor()),
        act_quant_scale=torch.tensor([[0.03]], dtype=torch.float32, device="cpu"),
    ),
    "int8_pre": Int8Tensor.from_hp(WEIGHT, ROW, act_quant_kwargs=INT8_TOKEN, act_pre_scale=PRE),
    "int8_experts": Int8Tensor.from_hp(EXPERTS, ROW),
    **{f"intx{bits}": intx(bits, PerGroup(32)) for bits in range(1, 9)},
    **{f"intx{bits}_asym": intx(bits, PerGroup(64), ASYM) for bits in (2, 3, 4, 8)},
    "intx4_rows": intx(4, PerAxis(0)),
    "intx4_inputs": IntxUnpackedToInt8Tensor.from_hp(
        WEIGHT, (1, 32), torch.int4, mapping_type=ASYM, activation_quantization=ASYM_TOKEN
    ),
    "fp8_row": Float8Tensor.from_hp(WEIGHT, granularity=ROW),
    "fp8_dyn": Float8Tensor.from_hp(WEIGHT, granularity=ROW, act_quant_kwargs=TOKEN),
    "fp8_tensor": Float8Tensor.from_hp(WEIGHT, granularity=PerTensor()),
    "fp8_block": Float8Tensor.from_hp(WEIGHT, granularity=PerBlock([128, 128])),
    "fp8_e5m2": Float8Tensor.from_hp(WEIGHT, torch.float8_e5m2, granularity=ROW),
    "fp8_experts": Float8Tensor.from_hp(EXPERTS, granularity=ROW),
    "fp8_expert_columns": Float8Tensor.from_hp(EXPERTS, granularity=PerRow(1)),
    "nvfp4": nvfp4(WEIGHT),
    "nvfp4_plain": NVFP4Tensor.to_nvfp4(WEIGHT),
    "nvfp4_swizzled": nvfp4(WEIGHT[:100], is_swizzled_scales=True),
    "nvfp4_dyn": nvfp4(WEIGHT, act_quant_kwargs=QuantizeTensorToNVFP4Kwargs()),
    "nvfp4_experts": nvfp4(EXPERTS, is_swizzled_scales=True),
    "mxfp8": MXTensor.to_mx(WEIGHT, torch.float8_e4m3fn),
    "mxfp8_e5m2": MXTensor.to_mx(WEIGHT, torch.float8_e5m2),
    "mxfp8_dyn": MXTensor.to_mx(
        WEIGHT, torch.float8_e4m3fn, act_quant_kwargs=QuantizeTensorToMXKwargs(elem_dtype=torch.float8_e4m3fn)
    ),
    "mxfp6_e2m3": MXTensor.to_mx(WEIGHT, "fp6_e2m3"),
    "mxfp6_e3m2": MXTensor.to_mx(WEIGHT, "fp6_e3m2"),
    "mxfp4": MXTensor.to_mx(WEIGHT, torch.float4_e2m1fn_x2),
    "mxfp4_swizzled": MXTensor.to_mx(WEIGHT, torch.float4_e2m1fn_x2, is_swizzled_scales=True),
}
wanted = {name: tensor.dequantize() for name, tensor in tensors.items()}
wanted["int8_pre"] = tensors["int8_pre"].dequantize(torch.float32)
# Only their GPU kernels dequantize these: their arithmetic is written out here.
tensors["plain4"], wanted["plain4"] = plain_int4(WEIGHT, 32)
tensors["plain4_fp8"], wanted["plain4_fp8"] = plain_int4(
    WEIGHT, 64, symmetric=True, activation_dtype=torch.float8_e4m3fn
)
tensors["plain4_pre"], wanted["plain4_pre"] = plain_int4(WEIGHT, 32, act_pre_scale=PRE)
tensors["plain4_experts"], wanted["plain4_experts"] = plain_int4(EXPERTS, 64)
tensors["tile4"], wanted["tile4"] = tile_int4(WEIGHT[:100], 64)
for name in ("int8_pre", "plain4_pre"):
    wanted[name] = wanted[name] * PRE.float()  # inputs are multiplied by it
tensors["refused"] = Int4PlainInt32Tensor(
    torch.zeros(8, 4, dtype=torch.int32, device="cpu"),
    *(torch.ones(1, 8, dtype=torch.bfloat16, device="cpu"), torch.zeros(1, 8, dtype=torch.int8, device="cpu")),
    *([1, 32], torch.Size([8, 32])),
)

out = Path(sys.argv[1])
for name, tensor in tensors.items():
    leaf = "gate_up_proj" if "expert" in name else "weight"
    state = {f"model.layer.{leaf}": tensor, "model.layer.bias": torch.ones(128, dtype=torch.bfloat16, device="cpu")}
    data, metadata = flatten_tensor_state_dict(state)
    save_file(data, out / f"{name}.safetensors", metadata=metadata)
save_file({name: value.contiguous() for name, value in wanted.items()}, out / "wanted.safetensors")
(out / "names.json").write_text(json.dumps(list(wanted)))
