"""Layers that SDNQ itself quantized and saved: for each case files, config and what SDNQ dequantizes."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ["SDNQ_USE_TORCH_COMPILE"] = "0"  # compiling takes minutes, and computes the same

import torch
from safetensors.torch import save_file
from sdnq.common import sdnq_keys
from sdnq.quantizer import SDNQConfig, sdnq_post_load_quant
from sdnq.utils import get_sdnq_params

#: case -> arguments of SDNQConfig
CASES: dict[str, dict] = {
    **{f"uint{bits}": {"weights_dtype": f"uint{bits}"} for bits in range(1, 9)},
    **{f"int{bits}": {"weights_dtype": f"int{bits}"} for bits in range(2, 9)},
    "int4_rows": {"weights_dtype": "int4", "group_size": -1},
    "uint4_g16_bf16": {"weights_dtype": "uint4", "group_size": 16, "dequantize_fp32": False},
    "int8_tensor": {"weights_dtype": "int8", "group_size": -2},
    "uint4_tensor": {"weights_dtype": "uint4", "group_size": -2},
    "int8_matmul": {"weights_dtype": "int8", "use_quantized_matmul": True},
    "uint8_matmul": {"weights_dtype": "uint8", "use_quantized_matmul": True},
    "uint4_matmul_svd": {"weights_dtype": "uint4", "use_quantized_matmul": True, "use_svd": True, "svd_rank": 8},
    "int8_matmul_svd": {"weights_dtype": "int8", "use_quantized_matmul": True, "use_svd": True, "svd_rank": 8},
    "uint4_svd": {"weights_dtype": "uint4", "use_svd": True, "svd_rank": 8},
    "fp8": {"weights_dtype": "float8_e4m3fn"},
    "fp8_matmul": {"weights_dtype": "float8_e4m3fn", "use_quantized_matmul": True},
    "fp8_e5m2": {"weights_dtype": "float8_e5m2", "group_size": 32},
    "fp6": {"weights_dtype": "fp6"},
    "fp4": {"weights_dtype": "fp4", "group_size": 16},
    "fp2": {"weights_dtype": "fp2"},
    "nvfp4": {"weights_dtype": "fp4", "group_size": 16, "scale_dtype": "float8_e4m3fn"},
    "scales_uint8": {"weights_dtype": "uint4", "group_size": 32, "scale_dtype": "uint8"},
    "scales_int8": {"weights_dtype": "int4", "group_size": 32, "scale_dtype": "int8"},
    "scales_codebook": {
        **{"weights_dtype": "uint4", "group_size": 32, "scale_dtype": "uint8"},
        **{"use_codebook_scale": True, "codebook_steps": 2},
    },
    "codebook_tensor": {"weights_dtype": "uint4", "group_size": -2, "use_codebook": True, "codebook_steps": 2},
    "codebook_groups": {"weights_dtype": "uint3", "group_size": 32, "use_codebook": True, "codebook_steps": 2},
    "fp8_e3m4": {"weights_dtype": "float8_e3m4fn"},
    "ufp4": {"weights_dtype": "ufp4"},
    "int12": {"weights_dtype": "int12"},
    "hadamard_32": {"weights_dtype": "int4", "use_hadamard": True, "hadamard_group_size": 32},
    "hadamard_svd_32": {
        **{"weights_dtype": "uint4", "use_hadamard": True, "hadamard_group_size": 32},
        **{"use_svd": True, "svd_rank": 8},
    },
    **{
        f"hadamard_64_{kind}": {"weights_dtype": kind, "use_hadamard": True, "hadamard_group_size": 64}
        for kind in ("int4", "uint4", "int8", "fp8", "fp6")
    },
    "hadamard_svd_64": {
        **{"weights_dtype": "int5", "use_hadamard": True, "hadamard_group_size": 64},
        **{"use_svd": True, "svd_rank": 8},
    },
    "dynamic": {"weights_dtype": "uint2", "use_dynamic_quantization": True, "dynamic_loss_threshold": 1e-3},
    "mixed": {
        "weights_dtype": "uint4",
        "modules_dtype_dict": {"minimum_6bit": ["deep"], "int5": ["odd.weight"], "uint3": ["*.inner.weight"]},
        "modules_quant_config": {"table": {"weights_dtype": "uint2", "group_size": 8}},
    },
    "conv": {"weights_dtype": "uint4", "quant_conv": True, "group_size": 16},
    "conv_int8": {"weights_dtype": "int8", "quant_conv": True},
    "conv_svd": {"weights_dtype": "int6", "quant_conv": True, "use_svd": True, "svd_rank": 8},
    "conv_codebook": {
        **{"weights_dtype": "uint4", "quant_conv": True, "use_codebook": True, "codebook_steps": 2},
    },
}


def model(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    layers: dict[str, torch.nn.Module] = {
        "wide": torch.nn.Linear(128, 64),
        "odd": torch.nn.Linear(104, 48, bias=name.endswith("_tensor") or "codebook" in name),
        "table": torch.nn.Embedding(96, 64),
    }
    if name == "mixed":
        layers["deep"] = torch.nn.ModuleDict({"inner": torch.nn.Linear(64, 64)})
        layers["more"] = torch.nn.ModuleDict({"inner": torch.nn.Linear(64, 64)})
    if name.startswith("conv"):
        layers |= {
            **{
                "conv": torch.nn.Conv2d(64, 48, 3),
                "one": torch.nn.Conv2d(64, 48, 1),
                "line": torch.nn.Conv1d(64, 48, 3),
            },
        }
    if name in ("conv_int8", "conv_svd"):  # SDNQ cannot quantize it in groups
        layers["up"] = torch.nn.ConvTranspose2d(48, 32, 2)
    if name.endswith("_tensor"):
        del layers["table"]
    layers["norm"] = torch.nn.LayerNorm(64)
    return torch.nn.ModuleDict(layers).to(torch.bfloat16)


out = Path(sys.argv[1])
for name, arguments in CASES.items():
    found = model(name)
    options = {"quant_embedding": True, "minimum_allowed_numel": 1, "add_skip_keys": False, **arguments}
    # Without its config the function drops scale_dtype.
    found = sdnq_post_load_quant(found, torch_dtype=torch.bfloat16, quantization_config=SDNQConfig(**options))
    folder = out / name
    folder.mkdir()
    save_file({key: value.contiguous() for key, value in found.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": found.quantization_config.to_dict()}))
    wanted = {}
    for path, module in found.named_modules():
        quantizer = getattr(module, "sdnq_dequantizer", None)
        if quantizer is not None:
            own = get_sdnq_params(module)
            assert own.keys() <= sdnq_keys
            for dtype in (torch.float32, torch.bfloat16):
                value = quantizer(**own, skip_quantized_matmul=quantizer.use_quantized_matmul, dtype=dtype)
                wanted[f"{path}.weight.{dtype}"] = value.reshape(quantizer.original_shape).contiguous()
    assert wanted
    save_file(wanted, folder / "wanted.safetensors")
