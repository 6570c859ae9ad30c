"""GPTQ, AWQ and AutoRound: int32 words of codes along K, or along N in AWQ.

AutoRound is written by auto-round (round to nearest); GPTQ and AWQ by their specifications, as their own packages have to be
compiled. Codes are unpacked again by compressed-tensors, an independent reader of dense bit streams, and the weights are
``scale * (code - zero)`` of those, in the dtype of the scales: one rounding, as in the kernels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from formats_writers.common import Made, float_model, layers, probed, save

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def packed(codes: Tensor, bits: int) -> Tensor:
    """Codes ``[R, C]`` -> words ``[R, C * bits / 32]``, code j at bit ``j * bits`` of its row."""
    rows, count = codes.shape
    words = torch.zeros(rows, count * bits // 32, dtype=torch.int64)
    at = torch.arange(count) * bits
    low, start = at // 32, at % 32
    wide = codes.long() << start
    words.index_add_(1, low, wide & 0xFFFFFFFF)
    spill = start + bits > 32
    if spill.any():
        words.index_add_(1, low[spill] + 1, wide[:, spill] >> 32)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpacked(words: Tensor, bits: int, count: int) -> Tensor:
    """compressed-tensors' reading of words ``[R, W]``: codes ``[R, count]``."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    return unpack_from_int32(words, bits, torch.Size([words.shape[0], count])).int() + 2 ** (bits - 1)


def rounded(weight: Tensor, bits: int, group: int, sym: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Codes ``[N, K]``, zero points ``[N, K / group]`` and fp16 scales ``[N, K / group]`` by the range of each group."""
    groups = weight.float().unflatten(1, (-1, group))
    top = 2**bits - 1
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    if sym:
        high = torch.maximum(high, -low)
        low = -high
    scales = ((high - low) / top).clamp(min=1e-6).half()
    zeros = torch.full_like(low, 2 ** (bits - 1)) if sym else (-low / scales.float()).round().clamp(1, top)
    codes = (groups / scales.float()[..., None] + zeros[..., None]).round().clamp(0, top).int()
    return codes.flatten(1), zeros.int(), scales


def gptq(
    out: Path, base: Path, bits: int = 4, group: int = 64, sym: bool = False, act_order: bool = False, v2: bool = False
) -> Made:
    """GPTQ's layout; v1 stores zero points less 1."""
    tensors: dict[str, Tensor] = {}
    reference: dict[str, Tensor] = {}
    for name, layer in layers(float_model(base)).items():
        weight = layer.weight.detach()
        rows, columns = weight.shape
        groups = torch.arange(columns) // group
        if act_order:
            groups = groups[torch.randperm(columns)]
        order = torch.argsort(groups, stable=True)
        codes, zeros, scales = rounded(weight[:, order], bits, group, sym)
        codes = codes[:, torch.argsort(order)]  # back in the order of the columns
        words = packed(codes, bits).t().contiguous()
        zero_words = packed(zeros.t() - (0 if v2 else 1), bits)
        tensors |= {
            f"{name}.qweight": words,
            f"{name}.qzeros": zero_words,
            f"{name}.scales": scales.t().contiguous(),
            f"{name}.g_idx": groups.int(),
        }
        seen = unpacked(words.t().contiguous(), bits, columns).t()
        seen_zeros = unpacked(zero_words, bits, rows) + (0 if v2 else 1)
        reference[f"{name}.weight"] = (scales.t()[groups] * (seen - seen_zeros[groups]).half()).t().contiguous()
    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": act_order, "sym": sym}
    save(out, base, tensors, config | {"checkpoint_format": "gptq_v2" if v2 else "gptq", "lm_head": False})
    return Made(reference, "compressed-tensors", "by the specification; codes unpacked by compressed-tensors")


def awq(out: Path, base: Path, group: int = 64) -> Made:
    """AutoAWQ's GEMM layout."""
    tensors: dict[str, Tensor] = {}
    reference: dict[str, Tensor] = {}
    for name, layer in layers(float_model(base)).items():
        rows = len(layer.weight)
        codes, zeros, scales = rounded(layer.weight.detach(), 4, group, False)
        slots = torch.arange(rows).view(-1, 8)[:, list(AWQ_ORDER)].flatten()
        words, zero_words = packed(codes.t()[:, slots], 4), packed(zeros.t()[:, slots], 4)
        own = {"qweight": words, "qzeros": zero_words, "scales": scales.t().contiguous()}
        tensors |= {f"{name}.{part}": value for part, value in own.items()}
        back = torch.argsort(slots)
        seen, seen_zeros = unpacked(words, 4, rows)[:, back], unpacked(zero_words, 4, rows)[:, back]
        wide = [t.repeat_interleave(group, 0) for t in (scales.t(), seen_zeros)]
        reference[f"{name}.weight"] = (wide[0] * (seen - wide[1]).half()).t().contiguous()
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    save(out, base, tensors, config | {"modules_to_not_convert": None})
    return Made(reference, "compressed-tensors", "by the specification; codes unpacked by compressed-tensors")


def auto_round(out: Path, base: Path, layout: str = "auto_round", group: int = 64) -> Made:
    """auto-round's own export without tuning, and what its torch layers multiply by."""
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    setting: dict[str, Any] = {"scheme": "W4A16", "group_size": group, "iters": 0, "disable_opt_rtn": True}
    made = AutoRound(float_model(base), AutoTokenizer.from_pretrained(base), device_map="cpu", **setting)
    made.quantize_and_save(str(out / "made"), format=layout)
    file = next((out / "made").rglob("model.safetensors"))
    file.parent.rename(out / "model")
    model: Any = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32)
    float_layers = layers(float_model(base))
    reference = {
        f"{name}.weight": probed(model.get_submodule(name), layer.in_features) for name, layer in float_layers.items()
    }
    return Made(reference, "auto-round", "auto-round writes it; what its torch layers multiply a unit matrix by")


def compressed_order(out: Path, base: Path, group: int = 64) -> Made:
    """compressed-tensors' act-order of versions before 0.15: ``weight_g_idx``, which today's library no longer writes."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    tensors: dict[str, Tensor] = {}
    reference: dict[str, Tensor] = {}
    for name, layer in layers(float_model(base)).items():
        weight = layer.weight.detach()
        groups = torch.arange(weight.shape[1])[torch.randperm(weight.shape[1])] // group
        order = torch.argsort(groups, stable=True)
        codes, _, scales = rounded(weight[:, order], 4, group, True)
        signed = (codes - 8)[:, torch.argsort(order)].to(torch.int8)
        scales = scales.to(torch.bfloat16)
        own = {
            "weight_packed": pack_to_int32(signed, 4),
            "weight_scale": scales,
            "weight_shape": torch.tensor(weight.shape),
            "weight_g_idx": groups.int(),
        }
        tensors |= {f"{name}.{part}": value for part, value in own.items()}
        reference[f"{name}.weight"] = scales[:, groups] * signed.to(scales.dtype)
    weights = {
        "num_bits": 4,
        "type": "int",
        "strategy": "group",
        "group_size": group,
        "symmetric": True,
        "actorder": "group",
    }
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    save(out, base, tensors, config)
    return Made(reference, "compressed-tensors", "by the specification of older files; packed by compressed-tensors")
