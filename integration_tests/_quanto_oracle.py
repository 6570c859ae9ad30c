"""Run in a process of its own with the real optimum-quanto: quantizes seeded weights and saves what it got.

python _quanto_oracle.py OUT          writes OUT/cases.pt
python _quanto_oracle.py OUT MODEL    loads MODEL (a core directory that Requanto wrote), writes OUT/loaded.pt
"""

import json
import sys
from pathlib import Path

import torch
from optimum.quanto import (
    AbsmaxOptimizer,
    HqqOptimizer,
    MaxOptimizer,
    QConv2d,
    QLinear,
    qtypes,
    quantization_map,
    quantize_weight,
    requantize,
)
from safetensors.torch import load_file

SHAPES = [(8, 16), (3, 32), (5, 96), (4, 128), (7, 160), (6, 192), (16, 256), (9, 130), (4, 3, 3, 3), (8, 32, 3, 3)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def weight_of(shape, dtype):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def layer_of(weight, kind):
    if weight.dim() == 4:
        return QConv2d(weight.shape[1], weight.shape[0], 3, bias=False, dtype=weight.dtype, weights=kind)
    return QLinear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype, weights=kind)


def cases():
    found = []
    for shape in SHAPES:
        for dtype in DTYPES:
            for name in ("qint2", "qint4", "qint8", "qfloat8_e4m3fn", "qfloat8_e5m2"):
                bits = qtypes[name].bits
                for optimizer in ("absmax",) if bits == 8 else ("max", "hqq"):
                    chosen = {"absmax": AbsmaxOptimizer, "max": MaxOptimizer, "hqq": HqqOptimizer}[optimizer]()
                    weight = weight_of(shape, dtype)
                    group = layer_of(weight, qtypes[name]).weight_group_size
                    if bits == 8:
                        scale, shift = chosen(weight, qtypes[name], axis=0), None
                    else:
                        scale, shift = chosen(weight, qtypes[name], axis=0, group_size=group)
                    # optimized=False: its CPU kernel for bfloat16 int4 rewrites the shift, and fails on most shapes.
                    tensor = quantize_weight(weight, qtypes[name], 0, scale, shift, group, optimized=False)
                    state = {}
                    tensor.save_to_state_dict(state, "", False)
                    found.append((shape, dtype, name, optimizer, state, tensor.dequantize()))
    return found


def zeropoint_cases():
    found = []
    for name in ("qint2", "qint4"):
        weight = weight_of((4, 64), torch.float32)
        scale, shift = MaxOptimizer()(weight, qtypes[name], 0, group_size=None, zeropoint=True)
        tensor = quantize_weight(weight, qtypes[name], 0, scale, shift)
        state = {}
        tensor.save_to_state_dict(state, "", False)
        found.append((name, state, tensor.dequantize()))
    return found


def load_core(path):
    """Writes PATH/loaded.pt: the map and the weights of a core directory that Requanto wrote."""
    state = load_file(path / "model.safetensors")
    sizes = json.loads((path / "config.json").read_text())["sizes"]
    model = torch.nn.Sequential(*[torch.nn.Linear(k, n) for k, n in sizes]).to(state["0.bias"].dtype)
    requantize(model, state, json.loads((path / "quanto_qmap.json").read_text()))
    torch.save(
        {"map": quantization_map(model), "weights": [layer.weight.dequantize() for layer in model]}, path / "loaded.pt"
    )


if __name__ == "__main__":
    out, *directories = map(Path, sys.argv[1:])
    if directories:
        for directory in directories:
            load_core(directory)
    else:
        torch.save({"cases": cases(), "zeropoint": zeropoint_cases()}, out / "cases.pt")
