"""Files of MLX, written by its own quantization, with its own dequantized weights in float32 beside them.

python mlx_files.py OUT   writes OUT/model.safetensors, OUT/expected.safetensors and OUT/config.json
"""

import json
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

out = Path(sys.argv[1])
mx.random.seed(0)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(32, 128)
        self.norm = nn.RMSNorm(128)
        for bits in (1, 2, 3, 4, 5, 6, 8):
            setattr(self, f"affine{bits}", nn.Linear(128, 32, bias=bits == 4))
        self.half = nn.Linear(64, 32, bias=False)
        for mode in ("mxfp4", "mxfp8", "nvfp4"):
            setattr(self, mode, nn.Linear(128, 32, bias=False))
        self.dense = nn.Linear(128, 32)


settings = {f"affine{bits}": {"group_size": 32, "bits": bits} for bits in (1, 2, 3, 5, 6, 8)}
settings |= {
    "half": {"group_size": 64, "bits": 4},
    "mxfp4": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    "mxfp8": {"group_size": 32, "bits": 8, "mode": "mxfp8"},
    "nvfp4": {"group_size": 16, "bits": 4, "mode": "nvfp4"},
    "dense": False,
}
model = Model()
model.half.weight = model.half.weight.astype(mx.bfloat16)
nn.quantize(
    model,
    64,
    4,
    class_predicate=lambda path, module: hasattr(module, "to_quantized") and settings.get(path, True),
)
tensors = dict(tree_flatten(model.parameters()))
expected = {}
for path, module in tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module):
    if hasattr(module, "bits"):
        expected[f"{path}.weight"] = mx.dequantize(
            module.weight,
            module.scales,
            module.get("biases"),
            module.group_size,
            module.bits,
            module.mode,
            dtype=None if path == "half" else mx.float32,
        )

# Experts are stacked, as in mlx-lm's SwitchLinear, also with one scale of NVFP4 for each.
stacked = mx.random.normal((3, 16, 64))
for path, given in {
    "layers.0.mlp.switch_mlp.up_proj": {},
    "layers.0.block_sparse_moe.switch_mlp.down_proj": {"mode": "nvfp4", "group_size": 16},
}.items():
    whole = mx.max(mx.abs(stacked), axis=(1, 2)) if given else None
    experts = []
    for e in range(3):
        extra = {} if whole is None else {"global_scale": whole[e]}
        quantized = mx.quantize(stacked[e], given.get("group_size", 64), 4, given.get("mode", "affine"), **extra)
        experts.append(quantized)
        name = f"{path}.{e}.weight"
        expected[name] = mx.dequantize(
            *quantized, group_size=given.get("group_size", 64), bits=4, mode=given.get("mode", "affine"), **extra,
            dtype=mx.float32,
        )  # fmt: skip
    for part, values in zip(("weight", "scales", "biases"), zip(*experts)):
        tensors[f"{path}.{part}"] = mx.stack(values)
    if given:
        tensors[f"{path}.global_scale"] = whole
        settings[path] = {"group_size": 16, "bits": 4, "mode": "nvfp4"}
mx.save_safetensors(str(out / "model.safetensors"), tensors, metadata={"format": "mlx"})
mx.save_safetensors(str(out / "expected.safetensors"), expected)
(out / "config.json").write_text(json.dumps({"group_size": 64, "bits": 4, "mode": "affine", **settings}))
