"""A checkpoint of another library, made from the format's description: GPTQ, 4 bits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

GROUP = 32


def write_gptq(
    directory: Path,
    *,
    only: str = "",
    symmetric: bool = False,
    seed_of: Callable[[str], int | None] = lambda name: None,
    conv1d: str = "",
) -> dict[str, torch.Tensor]:
    """Quantizes a saved float model to GPTQ, version 2, in place.

    Args:
        directory: what ``save_pretrained`` wrote, in one file.
        only: quantize matrices with this in their names; ``""``: those of all layers.
        symmetric: zero points of 8 everywhere.
        seed_of: seed of the order in which a weight's columns are grouped (``desc_act``); None: their own order.
        conv1d: matrices with this in their names belong to Conv1D layers (``[in, out]``); returned as ``[out, in]``.

    Returns:
        The dequantized weights by name, float32.
    """
    stored, floats = {}, {}
    for name, value in load_file(directory / "model.safetensors").items():
        layer = ".layers." in name or ".h." in name
        if value.dim() != 2 or not layer or only not in name or name.endswith("gate.weight"):
            stored[name] = value
            continue
        value = value.t() if conv1d in name and conv1d else value
        length, seed = value.shape[1], seed_of(name)
        order = torch.arange(length, device="cpu", dtype=torch.int64)
        if seed is not None:
            order = torch.randperm(
                length, generator=torch.Generator().manual_seed(seed), dtype=torch.int64, device="cpu"
            )
        group_of = order.argsort() // GROUP
        codes, scale, zero = _rounded(value.float()[:, order], symmetric)
        codes = codes[:, order.argsort()]
        floats[name] = ((codes - zero[:, group_of]) * scale[:, group_of]).float()
        module = name.removesuffix(".weight")
        stored[f"{module}.qweight"] = _packed_rows(codes.t())
        stored[f"{module}.qzeros"] = _packed_rows(zero).t().contiguous()
        stored[f"{module}.scales"] = scale.t().contiguous().half()
        stored[f"{module}.g_idx"] = group_of.to(torch.int32)
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    config = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": GROUP,
        "desc_act": any(seed_of(name) is not None for name in floats),
        "sym": symmetric,
        "checkpoint_format": "gptq_v2",
    }
    edit_config(directory, quantization_config=config)
    return floats


def edit_config(directory: Path, **changes: Any) -> None:
    """Sets keys of config.json; None deletes one."""
    path = directory / "config.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def _rounded(weight: torch.Tensor, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    groups = weight.unflatten(1, (-1, GROUP))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    scale = ((high - low) / 15).half().float()
    zero = torch.full_like(scale, 8.0) if symmetric else (-low / scale).round().clamp(0, 15)
    codes = (groups / scale.unsqueeze(-1) + zero.unsqueeze(-1)).round().clamp(0, 15)
    return codes.flatten(1).to(torch.int64), scale, zero.to(torch.int64)


def _packed_rows(values: torch.Tensor) -> torch.Tensor:
    """``[8 R, N]`` numbers of 4 bits -> int32 ``[R, N]``: row 8 r + i is in bits 4 i of row r."""
    words = torch.zeros(len(values) // 8, values.shape[1], dtype=torch.int64, device="cpu")
    for lane in range(8):
        words |= values[lane::8].to(torch.int64) << (4 * lane)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
