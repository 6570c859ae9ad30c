"""GPTQ and AWQ files written from their specifications, and read by compressed-tensors' own unpacking.

python gptq.py OUT   writes OUT/CASE.safetensors and OUT/CASE.expected.safetensors (float16 weights) and OUT/configs.json

Codes are packed one by one, as AutoGPTQ's and AutoAWQ's ``pack`` describe it. compressed-tensors has the same dense bit
stream, so it unpacks what was written here; from its numbers, not from the ones that were packed, the expected weights
are computed in float16 as the libraries' kernels do: ``scale * (code - zero)``, rounded once.
"""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file


def unpacking():
    """compressed-tensors' module of unpacking alone: the package imports transformers, which takes seconds."""
    package = importlib.util.find_spec("compressed_tensors").submodule_search_locations[0]
    file = Path(package) / "compressors" / "pack_quantized" / "helpers.py"
    spec = importlib.util.spec_from_file_location("unpacking", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


unpack_from_int32 = unpacking().unpack_from_int32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def packed(codes: np.ndarray, bits: int) -> torch.Tensor:
    """Codes ``[R, C]`` -> int32 words ``[R, C * bits / 32]``: code j at bit ``j * bits`` of its row."""
    rows, count = codes.shape
    words = np.zeros((rows, count * bits // 32), dtype=np.uint64)
    for j in range(count):
        word, start = divmod(j * bits, 32)
        wide = codes[:, j].astype(np.uint64) << np.uint64(start)
        words[:, word] |= wide & np.uint64(0xFFFFFFFF)
        if start + bits > 32:
            words[:, word + 1] |= wide >> np.uint64(32)
    return torch.from_numpy(words.astype(np.uint32).view(np.int32))


def unpacked(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """compressed-tensors' reading of the words ``[R, W]``: int32 codes ``[R, count]``."""
    return unpack_from_int32(words, bits, torch.Size([words.shape[0], count])).int() + 2 ** (bits - 1)


def gptq(rng, bits, group, *, sym=False, v1=False, act_order=False, zero=None, k=64, n=32, dtype=torch.float16):
    size = k if group == -1 else group
    groups = -(-k // size)
    codes = rng.integers(0, 2**bits, (k, n))
    zeros = np.full((groups, n), 2 ** (bits - 1)) if sym else rng.integers(1, 2**bits, (groups, n))
    if zero is not None:
        zeros[0, 3] = zero
    scales = torch.from_numpy(rng.uniform(0.01, 0.1, (groups, n))).to(dtype)
    g_idx = torch.arange(k) // size
    if act_order:
        g_idx = g_idx[torch.from_numpy(rng.permutation(k))]
    tensors = {
        "m.qweight": packed(codes.T, bits).T.contiguous(),
        "m.qzeros": packed(zeros - (1 if v1 else 0), bits),
        "m.scales": scales,
        "m.g_idx": g_idx.int(),
    }
    seen = unpacked(tensors["m.qweight"].T.contiguous(), bits, k).T
    seen_zeros = unpacked(tensors["m.qzeros"], bits, n) + (1 if v1 else 0)
    weight = scales[g_idx] * (seen - seen_zeros[g_idx]).to(dtype)
    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": act_order, "sym": sym}
    return {**config, "checkpoint_format": "gptq" if v1 else "gptq_v2"}, tensors, weight.T.contiguous()


def awq(rng, group, *, version="gemm", zero_point=True, k=64, n=32):
    size = k if group == -1 else group
    groups = k // size
    codes = rng.integers(0, 16, (k, n))
    zeros = rng.integers(0, 16, (groups, n)) if zero_point else np.full((groups, n), 8)
    scales = torch.from_numpy(rng.uniform(0.01, 0.1, (groups, n))).half()
    if version == "gemm":
        slots = [8 * (j // 8) + AWQ_ORDER[j % 8] for j in range(n)]
        tensors = {"m.qweight": packed(codes[:, slots], 4), "m.qzeros": packed(zeros[:, slots], 4), "m.scales": scales}
        where = np.argsort(slots)
        seen = unpacked(tensors["m.qweight"], 4, n)[:, where]
        seen_zeros = unpacked(tensors["m.qzeros"], 4, n)[:, where]
    else:  # gemv: along K, and more groups than there are, for alignment
        width = -(-groups // 8) * {128: 1, 64: 2, 32: 4}[group]
        wide = np.zeros((n, width * 8), dtype=np.int64)
        wide[:, :groups] = zeros.T
        aligned = torch.zeros(n, width * 8, dtype=torch.float16)
        aligned[:, :groups] = scales.T
        tensors = {"m.qweight": packed(codes.T, 4), "m.qzeros": packed(wide, 4), "m.scales": aligned}
        seen = unpacked(tensors["m.qweight"], 4, k).T
        seen_zeros = unpacked(tensors["m.qzeros"], 4, groups).T
    weight = scales.repeat_interleave(size, 0) * (seen - seen_zeros.repeat_interleave(size, 0)).half()
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": zero_point, "version": version}
    return config, tensors, weight.T.contiguous()


def main(out: Path) -> None:
    rng = np.random.default_rng(0)
    cases = {f"asym{bits}": gptq(rng, bits, 32) for bits in (2, 3, 4, 5, 6, 7, 8)}
    cases |= {f"sym{bits}": gptq(rng, bits, 32, sym=True, v1=True) for bits in (2, 3, 4, 8)}
    cases["v1"] = gptq(rng, 4, 16, v1=True, dtype=torch.bfloat16)
    cases["v1_zero_16"] = gptq(rng, 4, 32, v1=True, zero=16)
    cases["v1_zero_256"] = gptq(rng, 8, 32, v1=True, zero=256)
    cases["row"] = gptq(rng, 4, -1, sym=True)
    cases["short_group"] = gptq(rng, 4, 64, k=96)
    cases["order"] = gptq(rng, 4, 16, act_order=True)
    cases["order3_sym"] = gptq(rng, 3, 32, act_order=True, sym=True, v1=True)
    cases["order_short"] = gptq(rng, 8, 64, act_order=True, k=96)
    cases["awq"] = awq(rng, 16, n=64)
    cases["awq_row"] = awq(rng, -1)
    cases["awq_sym"] = awq(rng, 32, zero_point=False)
    cases["gemv"] = awq(rng, 32, version="gemv")
    cases["gemv128"] = awq(rng, 128, version="gemv", k=256)
    for name, (_, tensors, weight) in cases.items():
        save_file(tensors, out / f"{name}.safetensors")
        save_file({"m.weight": weight}, out / f"{name}.expected.safetensors")
    (out / "configs.json").write_text(json.dumps({name: case[0] for name, case in cases.items()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
