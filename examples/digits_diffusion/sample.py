"""Draws digits with the float and the quantized models from the same noise, in one picture, and measures them.

    python examples/digits_diffusion/sample.py --out docs/images/digits_dtypes.png

PSNR is taken against the float model's images over their range of 2 (-1 .. 1). Accuracy is how often a classifier
that was trained on the real digits reads the requested digit.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from sklearn.datasets import load_digits
from sklearn.svm import SVC

import requanto

MODEL = Path(__file__).resolve().parent / "model"
DTYPES = ("int8", "float8", "int4", "int2")


def load(weights: str | None = None, **options: Any) -> DiTTransformer2DModel:
    """The trained model: float32, or quantized to a type."""
    config = None if weights is None else requanto.QuantoConfig(weights=weights, **options)
    return DiTTransformer2DModel.from_pretrained(MODEL, torch_dtype=torch.float32, quantization_config=config)


@torch.no_grad()
def draw(model: DiTTransformer2DModel, labels: torch.Tensor, steps: int = 20, seed: int = 1) -> torch.Tensor:
    """Digits of the given classes, ``[n, 1, 8, 8]``; the same seed is the same noise for every model."""
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(MODEL / "scheduler")
    scheduler.set_timesteps(steps)
    images = torch.randn(len(labels), 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    for timestep in scheduler.timesteps:
        velocity = model(images, timestep=timestep.expand(len(labels)), class_labels=labels).sample
        images = scheduler.step(velocity, timestep, images).prev_sample
    return images.clamp(-1, 1)


def digits(model: DiTTransformer2DModel, seed: int) -> torch.Tensor:
    """Ten digits of one seed, for `requanto compare --run examples/digits_diffusion/sample.py:digits`."""
    return draw(model, torch.arange(10), seed=seed)


def psnr(images: torch.Tensor, reference: torch.Tensor) -> float:
    """Peak signal to noise ratio in dB of images in [-1, 1]."""
    error = torch.mean((images.double() - reference.double()) ** 2).item()
    return 10 * math.log10(4 / error) if error else math.inf


def classifier() -> SVC:
    """A classifier that is trained on the real digits (99 % correct on held-out digits)."""
    digits = load_digits()
    return SVC(gamma=0.001).fit(digits.images.reshape(len(digits.images), -1), digits.target)


def accuracy(reader: SVC, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of images that are read as the requested digit."""
    pixels = ((images + 1) * 8).reshape(len(images), -1).numpy()
    return float((reader.predict(pixels) == labels.numpy()).mean())


def measure(count: int = 400, dtypes: tuple[str, ...] = DTYPES) -> tuple[dict[str, dict], dict[str, torch.Tensor]]:
    """PSNR, accuracy and size for each type, and the images."""
    labels = torch.arange(count) % 10
    reader = classifier()
    rows: dict[str, dict] = {}
    images: dict[str, torch.Tensor] = {}
    for name in ("float", *dtypes):
        model = load(None if name == "float" else name)
        images[name] = draw(model, labels)
        rows[name] = {
            "psnr_db": None if name == "float" else round(psnr(images[name], images["float"]), 2),
            "accuracy": round(accuracy(reader, images[name], labels), 4),
            "bytes": model.get_memory_footprint(),
        }
    return rows, images


def picture(rows: dict[str, dict], images: dict[str, torch.Tensor], path: Path) -> None:
    """Draws one row for each type, with the same digit and noise in each column."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names, columns = list(images), 20
    figure, axes = plt.subplots(len(names), columns, figsize=(columns * 0.5 + 2.6, len(names) * 0.56))
    for row, name in enumerate(names):
        for column in range(columns):
            axis = axes[row][column]
            axis.imshow(images[name][column, 0], cmap="gray_r", vmin=-1, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
        figures = rows[name]
        noise = "" if figures["psnr_db"] is None else f"{figures['psnr_db']:.1f} dB, "
        text = f"{name}\n{noise}{figures['accuracy']:.1%} read right"
        axes[row][0].set_ylabel(text, rotation=0, ha="right", va="center", fontsize=8)
    figure.subplots_adjust(left=0.19, right=0.995, top=0.98, bottom=0.02, wspace=0.08, hspace=0.08)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Prints the results, and draws the picture if --out is given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows, images = measure(arguments.count)
    print(json.dumps(rows, indent=2))
    if arguments.out:
        picture(rows, images, arguments.out)
        print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
