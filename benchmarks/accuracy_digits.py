"""Accuracy of types and methods on images, with and without samples: the digits diffusion model.

    python benchmarks/accuracy_digits.py                # minutes on one core; writes results/accuracy_digits.json

The model is the diffusion transformer of examples/digits_diffusion (1 M parameters, in float16, trained in minutes, never
quantized before). Every Linear layer is quantized; the dequantized weights draw digits in float32 from the same noise as the
float model. PSNR is taken against the float model's images over their range of 2; accuracy is how often a classifier trained
on the real digits reads the requested digit. The samples of ``gptq`` are runs of the pipeline with other noise.
Bits a weight include scales and shifts of 16 bits each.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, write
from torch import nn

sys.path.append(str(Path(__file__).parents[1] / "examples" / "digits_diffusion"))

import sample
from diffusers import DiTTransformer2DModel

import requanto
from requanto import QTensor

INT4 = {"weights": "int4", "group_size": 64}
PLAIN = {"column_scale": False}
ROWS: dict[str, dict[str, Any]] = {
    "int8": {"weights": "int8"},
    "float8": {"weights": "float8"},
    "int4 g64, minmax, no column scale": INT4 | {"method": "minmax"} | PLAIN,
    "int4 g64, mse, no column scale": INT4 | {"method": "mse"} | PLAIN,
    "int4 g64, hqq, no column scale": INT4 | {"method": "hqq"} | PLAIN,
    "int4 g64, aligned, no column scale": INT4 | {"method": "aligned"} | PLAIN,
    "int4 g64, weighted, no column scale": INT4 | PLAIN,
    "int4 g64 (default)": INT4,
    "int4 g64, scales in 8 bits": INT4 | {"scale_bits": 8},
    "int4 g16, scales in 4 bits": {"weights": "int4", "group_size": 16, "scale_bits": 4},
    "int4 g64, gptq": INT4 | {"method": "gptq"},
    "nf4 g64": {"weights": "nf4"},
    "codebook4 g64": {"weights": "codebook4"},
    "int3 g32": {"weights": "int3"},
    "int3 g64": {"weights": "int3", "group_size": 64},
    "codebook3 g32": {"weights": "codebook3"},
    "int3 g64, gptq": {"weights": "int3", "group_size": 64, "method": "gptq"},
    "int2 g16, scales in 4 bits": {"weights": "int2", "group_size": 16, "scale_bits": 4},
    "int2 g16, scales in 4 bits, gptq": {"weights": "int2", "group_size": 16, "scale_bits": 4, "method": "gptq"},
}
#: samples of gptq: digits and noise that are not measured
CALIBRATION = {"digits": 40, "seed": 1000}


def calibrate(model: nn.Module) -> None:
    """Draws digits, as a pipeline would."""
    sample.draw(Float32Ends(model), torch.arange(CALIBRATION["digits"]) % 10, seed=CALIBRATION["seed"])


class Float32Ends:
    """Calls a float16 model with float32 images and returns float32, as `sample.draw` expects."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, images: torch.Tensor, **arguments: Any) -> Any:
        found = self.model(images.half(), **arguments)
        found.sample = found.sample.float()
        return found


def quantized(setting: dict[str, Any]) -> tuple[nn.Module, float, float]:
    """The model with dequantized weights, in float32; bits a weight; seconds."""
    model = DiTTransformer2DModel.from_pretrained(sample.MODEL, torch_dtype=torch.float16)
    start = time.perf_counter()
    more = {"calibration": calibrate, "progress": False} if setting.get("method") == "gptq" else {}
    requanto.quantize(model, **setting, **more, exclude="pos_embed.proj")  # a convolution of 512 weights
    requanto.freeze(model)
    seconds = time.perf_counter() - start
    found = {name: p for name, p in model.named_parameters() if isinstance(p, QTensor)}
    # As in a checkpoint: after a run, int4 weights may be prepacked.
    stored = sum(part.nbytes for p in found.values() for part in p.inner_tensors().values())
    bits = 8 * stored / sum(p.numel() for p in found.values())
    plain = DiTTransformer2DModel.from_pretrained(sample.MODEL, torch_dtype=torch.float32)
    with torch.no_grad():
        for name, tensor in found.items():
            plain.get_parameter(name).copy_(tensor.dequantize(torch.float32))
    return plain, bits, seconds


def main() -> None:
    """Measures all rows and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--out", type=Path, default=RESULTS / "accuracy_digits.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    labels = torch.arange(arguments.images) % 10
    reader, reference = sample.classifier(), sample.draw(sample.load(), labels)
    rows: dict[str, Any] = {"float16": {"bits": 16.0, "accuracy": sample.accuracy(reader, reference, labels)}}
    for number, (name, setting) in enumerate(ROWS.items(), 1):
        model, bits, seconds = quantized(setting)
        images = sample.draw(model, labels)
        rows[name] = {
            "setting": setting,
            "bits": round(bits, 3),
            "psnr_db": round(sample.psnr(images, reference), 2),
            "accuracy": round(sample.accuracy(reader, images, labels), 4),
            "quantize_seconds": round(seconds, 1),
        }
        print(f"[{number}/{len(ROWS)}] {name}: {json.dumps(rows[name])}", file=sys.stderr, flush=True)
    write(arguments.out, {"images": arguments.images, "calibration": CALIBRATION, "results": rows})


if __name__ == "__main__":
    main()
