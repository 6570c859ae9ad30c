"""Models that other libraries quantized and saved through Diffusers itself, with what they dequantize.

python foreign_diffusers.py OUT   writes OUT/KIND, a directory of Diffusers, and OUT/KIND.safetensors, its weights as floats
"""

import json
import os
import sys
from pathlib import Path

os.environ["SDNQ_USE_TORCH_COMPILE"] = "0"  # compiling takes minutes, and computes the same

import torch
from diffusers import FluxTransformer2DModel, TorchAoConfig
from safetensors.torch import load_file, save_file

#: arguments of a tiny Flux
FLUX = {
    "patch_size": 1,
    "in_channels": 32,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "axes_dims_rope": [8, 8, 16],
}


def flux() -> FluxTransformer2DModel:
    torch.manual_seed(0)
    return FluxTransformer2DModel(**FLUX).to(torch.bfloat16)


def torchao(out: Path, original: Path) -> None:
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    config = TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)))
    model = FluxTransformer2DModel.from_pretrained(original, quantization_config=config, torch_dtype=torch.bfloat16)
    model.save_pretrained(out / "torchao", max_shard_size="120KB")
    save_floats(model, out / "torchao.safetensors")


def sdnq(out: Path, original: Path) -> None:
    from sdnq import SDNQConfig

    config = SDNQConfig(weights_dtype="uint4", group_size=32)
    model = FluxTransformer2DModel.from_pretrained(original, quantization_config=config, torch_dtype=torch.bfloat16)
    model.save_pretrained(out / "sdnq")
    save_floats(model, out / "sdnq.safetensors")


def save_floats(model: torch.nn.Module, file: Path) -> None:
    tensors = {}
    for name, module in model.named_modules():
        for leaf, value in module._parameters.items():
            if leaf == "weight" and hasattr(module, "sdnq_dequantizer"):
                parts = {part: getattr(module, part, None) for part in ("scale", "zero_point", "svd_up", "svd_down")}
                tensors[f"{name}.{leaf}"] = module.sdnq_dequantizer(value, **parts, dtype=torch.float32)
            elif value is not None and value.dtype != torch.uint8:
                floats = (
                    value.dequantize()
                    if hasattr(value, "dequantize") and type(value.data) is not torch.Tensor
                    else value
                )
                tensors[f"{name}.{leaf}"] = floats.float()
    save_file({name: value.detach().contiguous() for name, value in tensors.items()}, file)


def bitsandbytes(out: Path, original: Path) -> None:
    """Diffusers quantizes with it on GPUs only; its functions run on CPUs."""
    from bitsandbytes import functional

    torch.compiler.set_stance("force_eager")
    tensors, floats = {}, {}
    for name, value in load_file(original / "diffusion_pytorch_model.safetensors").items():
        tensors[name], floats[name] = value, value.float()
        if value.dim() == 2 and "transformer_blocks" in name:
            tensors[name], state = functional.quantize_4bit(value, quant_type="nf4", compress_statistics=True)
            tensors |= {f"{name}.{part}": one for part, one in state.as_dict(packed=True).items()}
            floats[name] = functional.dequantize_4bit(tensors[name], state).float()
    (out / "bitsandbytes").mkdir()
    save_file(tensors, out / "bitsandbytes" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    save_file(floats, out / "bitsandbytes.safetensors")
    config = json.loads((original / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
    }
    (out / "bitsandbytes" / "config.json").write_text(json.dumps(config))


def main(out: Path) -> None:
    flux().save_pretrained(out / "float")
    for write in (torchao, sdnq, bitsandbytes):
        write(out, out / "float")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
