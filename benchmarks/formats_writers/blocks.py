"""bitsandbytes, HQQ, SDNQ, MLX, torchao, optimum-quanto: each library quantizes and saves by its own public call."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from formats_writers.common import Made, companions, float_model, float_tensors, layers, save


def bitsandbytes(out: Path, base: Path, bits: int = 4, kind: str = "nf4", double: bool = False) -> Made:
    """Transformers quantizes on loading and saves; bitsandbytes dequantizes."""
    import bitsandbytes as bnb
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_8bit=bits == 8, load_in_4bit=bits == 4, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double
    )
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=config, dtype=torch.bfloat16, device_map="cpu"
    )
    companions(base, out / "model")
    model.save_pretrained(out / "model")
    reference = {}
    for name in layers(float_model(base)):
        weight: Any = model.get_submodule(name).weight
        if bits == 8:
            value = bnb.functional.int8_vectorwise_dequant(weight.data, weight.SCB)
        else:
            value = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        reference[f"{name}.weight"] = value
    return Made(reference, "bitsandbytes", "save_pretrained of Transformers; bitsandbytes' own dequantization")


def hqq(out: Path, base: Path, bits: int = 4, group: int = 64) -> Made:
    """HQQ's layers, their state in safetensors (its own ``save_quantized`` writes pickles)."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
    from transformers import HqqConfig

    model = float_model(base)
    tensors: dict[str, Tensor] = {}
    reference: dict[str, Tensor] = {}
    setting = BaseQuantizeConfig(nbits=bits, group_size=group, axis=1)
    for name, layer in layers(model).items():
        own = HQQLinear(layer, setting, compute_dtype=torch.bfloat16, device="cpu", del_orig=False)
        own.encoded_state_dict = True
        tensors |= {f"{name}.{part}": value for part, value in own.state_dict().items()}
        reference[f"{name}.weight"] = own.dequantize()
    config = HqqConfig(nbits=bits, group_size=group, axis=1).to_dict()
    save(out, base, tensors, config)
    return Made(reference, "hqq", "HQQLinear.state_dict() in safetensors, HQQLinear.dequantize()")


def sdnq(out: Path, base: Path, dtype: str = "uint4", **setting: Any) -> Made:
    """SDNQ's own save."""
    os.environ["SDNQ_USE_TORCH_COMPILE"] = "0"  # compiling takes minutes, and computes the same
    from sdnq.loader import save_sdnq_model
    from sdnq.quantizer import SDNQConfig, sdnq_post_load_quant
    from sdnq.utils import get_sdnq_params

    model: Any = float_model(base)
    config = SDNQConfig(weights_dtype=dtype, **setting)
    model = sdnq_post_load_quant(model, torch_dtype=torch.bfloat16, quantization_config=config)
    companions(base, out / "model")
    save_sdnq_model(model, str(out / "model"))
    reference = {}
    for name, module in model.named_modules():
        quantizer = getattr(module, "sdnq_dequantizer", None)
        if quantizer is not None:
            own = quantizer(
                **get_sdnq_params(module), skip_quantized_matmul=quantizer.use_quantized_matmul, dtype=torch.float32
            )
            reference[f"{name}.weight"] = own.reshape(quantizer.original_shape)
    return Made(reference, "sdnq", "save_sdnq_model, SDNQ's dequantizer in float32")


def mlx(out: Path, base: Path, bits: int = 4, group: int = 64) -> Made:
    """mlx-lm's convert on the CPU; embeddings are quantized too."""
    import mlx.core as mx
    import numpy as np
    from mlx_lm.convert import convert

    mx.set_default_device(mx.cpu)
    convert(str(base), str(out / "model"), quantize=True, q_bits=bits, q_group_size=group)
    stored = mx.load(str(out / "model" / "model.safetensors"))
    reference = {}
    for name in stored:
        if name.endswith(".scales"):
            module = name.removesuffix(".scales")
            parts = [stored[f"{module}.{part}"] for part in ("weight", "scales", "biases")]
            value = mx.dequantize(*parts, group_size=group, bits=bits)
            reference[f"{module}.weight"] = torch.from_numpy(np.array(value.astype(mx.float32)))
    return Made(reference, "mlx-lm", "mlx_lm.convert, mx.dequantize", values=torch.bfloat16)


def torchao_int4(out: Path, base: Path, group: int = 64) -> Made:
    """torchao's plain int4 tensors, made of codes, as ``mslk``, which rounds for it, needs a GPU; torchao saves them."""
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import Int4Tensor, Int4WeightOnlyConfig
    from transformers import TorchAoConfig

    quantized: dict[str, Tensor] = {}
    reference: dict[str, Tensor] = {}
    for name, layer in layers(float_model(base)).items():
        parts = layer.weight.detach().float().unflatten(-1, (-1, group))
        low, high = parts.amin(-1), parts.amax(-1)
        scale = ((high - low).clamp(min=1e-6) / 15).bfloat16()
        zero = (low + 8 * scale).bfloat16()
        codes = ((parts - zero[..., None]) / scale[..., None]).round().clamp(-8, 7).to(torch.int8)
        flat = codes.flatten(-2)
        packed = (flat[..., ::2] & 0xF) | (flat[..., 1::2] << 4)
        block = [1, group]
        quantized[f"{name}.weight"] = Int4Tensor(
            packed, scale.mT.contiguous(), zero.mT.contiguous(), block, layer.weight.shape
        )
        # The tensor's own definition; its dequantize() needs the package of kernels.
        value = codes.float() * scale.float()[..., None] + zero.float()[..., None]
        reference[f"{name}.weight"] = value.flatten(-2)
    plain = {name: value for name, value in float_tensors(base).items() if name not in quantized}
    tensors, metadata = flatten_tensor_state_dict(plain | quantized)
    companions(base, out / "model")
    save_file(tensors, out / "model" / "model.safetensors", {"format": "pt", **metadata})
    config = TorchAoConfig(Int4WeightOnlyConfig(group_size=group, int4_packing_format="plain")).to_dict()
    described = json.loads((base / "config.json").read_text(encoding="utf-8")) | {"quantization_config": config}
    (out / "model" / "config.json").write_text(json.dumps(described, indent=1), encoding="utf-8")
    return Made(
        reference,
        "torchao",
        "Int4Tensor, flatten_tensor_state_dict; scale * code + zero",
        values=torch.bfloat16,
    )


def torchao(out: Path, base: Path, kind: str) -> Made:
    """Transformers quantizes on loading and saves with torchao's safetensors support."""
    from torchao import quantization
    from transformers import AutoModelForCausalLM, TorchAoConfig

    setting: Any = {
        "int8": lambda: quantization.Int8WeightOnlyConfig(version=2),
        "float8": lambda: quantization.Float8WeightOnlyConfig(version=2),
    }[kind]()
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=TorchAoConfig(setting), dtype=torch.bfloat16, device_map="cpu"
    )
    companions(base, out / "model")
    model.save_pretrained(out / "model")
    reference = {f"{n}.weight": m.weight.dequantize().detach() for n, m in layers(model).items()}
    return Made(reference, "torchao", "save_pretrained of Transformers; torchao's dequantize()")


def optimum_quanto(out: Path, base: Path) -> Made:
    """optimum-quanto's own save."""
    from optimum import quanto
    from optimum.quanto.tensor.packed import PackedTensor

    model = float_model(base)
    wrapped = quanto.QuantizedModelForCausalLM.quantize(model, weights=quanto.qint4, exclude="lm_head")
    companions(base, out / "model")
    wrapped.save_pretrained(out / "model")
    stored = load_file(out / "model" / "model.safetensors")
    reference = {}
    for name, layer in layers(float_model(base)).items():
        own = f"{name}.weight"
        packed = stored[f"{own}._data._data"]
        rows = 2 * len(packed)
        data = PackedTensor(packed, 4, (rows, packed.shape[1]), (packed.shape[1], 1)).unpack()
        # Its own tensor with scales in float32; in bfloat16 it would round twice.
        parts = (data, stored[f"{own}._scale"].float(), stored[f"{own}._shift"].float())
        shape = layer.weight.shape
        wide = quanto.WeightQBitsTensor(quanto.qint4, 0, data.shape[1], shape, layer.weight.stride(), *parts)
        reference[own] = wide.dequantize().detach()
    how = "QuantizedModelForCausalLM.save_pretrained; dequantize() with its scales in float32"
    return Made(reference, "optimum-quanto", how)
