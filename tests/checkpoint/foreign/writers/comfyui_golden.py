"""Writes data/comfy_kitchen_0_2_40.safetensors, with comfy-kitchen 0.2.40 on the path: its layouts, as ComfyUI saves them.

    pip install --no-deps --target KITCHEN comfy-kitchen==0.2.40
    PYTHONPATH=KITCHEN python comfyui_golden.py data/comfy_kitchen_0_2_40.safetensors

``reference.M`` is what it dequantizes in float32. Layouts that it only reads are made here; tiles of its kernels are made
number by number, and its own functions put them back.
"""

import json
import sys

import torch
from comfy_kitchen.backends.eager import svdquant
from comfy_kitchen.tensor import QuantizedTensor, get_layout_class
from safetensors.torch import save_file

#: module -> layout, rows, columns, arguments, what ComfyUI writes to comfy_quant
CASES = {
    "fp8": ("TensorCoreFP8Layout", (24, 64), {}, {"format": "float8_e4m3fn"}),
    "fp8_e5m2": ("TensorCoreFP8Layout", (24, 64), {"dtype": torch.float8_e5m2}, {"format": "float8_e5m2"}),
    "nvfp4": ("TensorCoreNVFP4Layout", (40, 96), {}, {"format": "nvfp4"}),
    "nvfp4_large": ("TensorCoreNVFP4Layout", (144, 16), {}, {"format": "nvfp4"}),
    "mxfp8": ("TensorCoreMXFP8Layout", (40, 96), {}, {"format": "mxfp8"}),
    "int8": ("TensorWiseINT8Layout", (24, 64), {}, {"format": "int8_tensorwise"}),
    "int8_rows": ("TensorWiseINT8Layout", (24, 64), {"per_channel": True}, {"format": "int8_tensorwise"}),
    "int8_turned": (
        *("TensorWiseINT8Layout", (24, 64), {"per_channel": True, "convrot": True, "convrot_groupsize": 16}),
        {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 16},
    ),
    "int4_turned": (
        *("TensorCoreConvRotW4A4Layout", (16, 256), {"convrot_groupsize": 256}),
        {"format": "convrot_w4a4", "convrot_groupsize": 256},
    ),
}


def nibbles(codes: torch.Tensor) -> torch.Tensor:
    return svdquant._pack_int4_row_major(codes)


def awq(tensors: dict[str, torch.Tensor]) -> dict:
    tensors["awq.weight"] = nibbles(torch.randint(0, 16, (24, 64)))
    tensors["awq.weight_scale"] = torch.rand(2, 24).to(torch.bfloat16)
    tensors["awq.weight_zeros"] = torch.randn(2, 24).to(torch.bfloat16)
    layout = get_layout_class("TensorCoreAWQW4A16Layout")
    params = layout.Params(
        scale=tensors["awq.weight_scale"].float(),
        zeros=tensors["awq.weight_zeros"].float(),
        group_size=32,
        orig_dtype=torch.float32,
        orig_shape=(24, 64),
    )
    tensors["reference.awq"] = layout.dequantize(tensors["awq.weight"], params)
    return {"format": "awq_w4a16", "group_size": 32}


def svdquant_layer(tensors: dict[str, torch.Tensor]) -> None:
    rows, length, rank = 128, 128, 16
    codes = torch.randint(-7, 8, (rows, length))
    parts = {
        "weight": nibbles(codes),
        "weight_scale": torch.rand(2, rows).to(torch.bfloat16),
        "weight_proj_down": torch.randn(length, rank).to(torch.bfloat16),
        "weight_proj_up": torch.randn(rows, rank).to(torch.bfloat16),
        "weight_smooth_factor": (0.5 + torch.rand(length)).to(torch.bfloat16),
    }
    layout = get_layout_class("TensorCoreSVDQuantW4A4Layout")
    params = layout.Params(
        scale=parts["weight_scale"].float(),
        proj_down=parts["weight_proj_down"].float(),
        proj_up=parts["weight_proj_up"].float(),
        smooth_factor=parts["weight_smooth_factor"].float(),
        orig_dtype=torch.float32,
        orig_shape=(rows, length),
    )
    tensors["reference.svd"] = layout.dequantize(parts["weight"], params)[:16].contiguous()
    tensors |= {f"svd.{name}": part for name, part in parts.items()}
    weight = torch.zeros(1, 2, 32, 128, dtype=torch.int8)
    scale = torch.zeros(1, 2, 128, dtype=torch.bfloat16)
    up = torch.zeros(1, rank, 128, dtype=torch.bfloat16)
    for row in range(rows):
        for column in range(0, length, 2):
            byte = parts["weight"][row, column // 2]
            weight[0, column // 64, row // 4, row % 4 * 32 + column % 64 // 2] = byte
        scale[0, :, row] = parts["weight_scale"][:, row]
        up[0, :, row] = parts["weight_proj_up"][row]
    assert torch.equal(svdquant._tile_packed_weight_to_row_major(weight), parts["weight"])
    assert torch.equal(svdquant._tile_packed_scales_to_natural(scale), parts["weight_scale"])
    assert torch.equal(svdquant._tile_packed_lora_up_to_natural(up), parts["weight_proj_up"])
    tiles = {"weight": weight, "weight_scale": scale, "weight_proj_up": up}
    tensors |= {f"svd_tiles.{name}": part.clone() for name, part in (parts | tiles).items()}


def main(file: str) -> None:
    torch.manual_seed(7)
    tensors, confs = {}, {}
    for module, (layout, shape, arguments, conf) in CASES.items():
        weight = torch.randn(shape).to(torch.bfloat16)
        found = QuantizedTensor.from_float(weight, layout, **arguments)
        tensors |= {f"{module}.weight{part}": value for part, value in found.state_dict().items()}
        params = type(found._params)(**{**vars(found._params), "orig_dtype": torch.float32})
        rows, columns = shape
        tensors[f"reference.{module}"] = (
            get_layout_class(layout).dequantize(found._qdata, params)[:rows, :columns].clone()
        )
        tensors[f"{module}.bias"] = torch.zeros(rows, dtype=torch.bfloat16)
        confs[module] = conf
    confs["awq"] = awq(tensors)
    svdquant_layer(tensors)
    confs["svd"] = confs["svd_tiles"] = {"format": "svdquant_w4a4"}
    for module, conf in confs.items():
        tensors[f"{module}.comfy_quant"] = torch.tensor(list(json.dumps(conf).encode()), dtype=torch.uint8)
    least = tensors["int8_turned.weight"] == -128
    print(
        "rows of int8_turned with -128:",
        least.any(1).nonzero().flatten().tolist(),
        "columns:",
        least.nonzero().tolist(),
    )
    save_file({name: value.contiguous() for name, value in tensors.items()}, file)


main(sys.argv[1])
