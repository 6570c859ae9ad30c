"""Quantization with and without training, on scikit-learn's 1797 handwritten digits of 8 x 8 pixels.

    python examples/qat_digits.py

Trains a small float network, quantizes copies of it, and prints each copy's accuracy on 360 held-out digits: quantized
after training (PTQ), and after some more epochs of training under quantization (QAT). Needs scikit-learn; takes half a
minute on a CPU.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from requanto import Calibration, freeze, quantize

#: (weights, activations) of each line of the table
CASES = [("int8", None), ("int8", "int8"), ("float8", "float8"), ("int4", None), ("int4", "int8"), ("int2", None)]


class Net(nn.Module):
    """Two convolutions and two linear layers; 31 thousand weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.norm = nn.LayerNorm(512)
        self.hidden = nn.Linear(512, 48)
        self.out = nn.Linear(48, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.conv1(x))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.out(F.relu(self.hidden(self.norm(x.flatten(1)))))


def digits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Training images, test images (float, 0 .. 1, ``[n, 1, 8, 8]``), training labels, test labels."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=360, random_state=0, stratify=labels)
    x_train, x_test = (torch.tensor(part / 16, dtype=torch.float32).view(-1, 1, 8, 8) for part in parts[:2])
    return x_train, x_test, torch.tensor(parts[2]), torch.tensor(parts[3])


def train(model: nn.Module, x: torch.Tensor, y: torch.Tensor, epochs: int, rate: float) -> None:
    """Adam with a cosine schedule, batches of 64."""
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
        schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """Percent of the images that are classified correctly."""
    return 100 * float((model(x).argmax(-1) == y).float().mean())


def quantized(model: nn.Module, weights: str, activations: str | None, samples: torch.Tensor) -> nn.Module:
    """A quantized copy of a float model that can still be trained; its activations are calibrated on samples."""
    model = quantize(copy.deepcopy(model), weights=weights, activations=activations)
    if activations is not None:
        with torch.no_grad(), Calibration():
            for batch in samples.split(256):
                model(batch)
    return model


def run(cases: list[tuple[str, str | None]] = CASES, seed: int = 0) -> dict[str, float | tuple[float, float]]:
    """Accuracies in percent: ``{"float": a, "int8/None": (after training only, trained under quantization), ...}``."""
    torch.manual_seed(seed)
    x_train, x_test, y_train, y_test = digits()
    model = Net()
    train(model, x_train, y_train, epochs=15, rate=3e-3)
    found: dict[str, float | tuple[float, float]] = {"float": accuracy(model, x_test, y_test)}
    for weights, activations in cases:
        plain = quantized(model, weights, activations, x_train)
        freeze(plain)
        tuned = quantized(model, weights, activations, x_train)
        train(tuned, x_train, y_train, epochs=6, rate=1e-3)
        freeze(tuned)
        found[f"{weights}/{activations}"] = accuracy(plain, x_test, y_test), accuracy(tuned, x_test, y_test)
    return found


def save(path: Path, found: dict[str, float | tuple[float, float]]) -> None:
    """Writes the accuracies as JSON, with the command that measured them."""
    rows = [
        {"case": case, "quantized": round(both[0], 2), "trained": round(both[1], 2)}
        for case, both in found.items()
        if isinstance(both, tuple)
    ]
    record = {
        "command": f"python examples/qat_digits.py --save {path.as_posix()}",
        "torch": torch.__version__,
        "units": "percent of 360 held-out digits named right; case: weights/activations; trained: 6 epochs, seed 0",
        "float": round(float(found["float"]), 2),
        "results": rows,
    }
    path.write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Accuracies with and without training under quantization.")
    parser.add_argument("--save", type=Path, help="also write the accuracies to this JSON file")
    arguments = parser.parse_args()
    found = run()
    if arguments.save is not None:
        save(arguments.save, found)
    print(f"float: {found.pop('float'):.2f} %\n\nweights  activations   quantized   trained under quantization")
    for case, accuracies in found.items():
        weights, activations = case.split("/")
        activations = "float" if activations == "None" else activations
        print(f"{weights:8} {activations:12} {accuracies[0]:8.2f} % {accuracies[1]:14.2f} %")


if __name__ == "__main__":
    main()
