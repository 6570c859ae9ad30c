"""Trains two small image classifiers on scikit-learn's digits: a vision transformer and a convolutional network.

    PYTHONPATH=benchmarks python -m yardsticks.images           # a few minutes on one core

Both are Transformers' own classes, in float32. 500 of the 1797 digits are kept for the measurement; the others are trained
on with noise and shifts, so that an answer is no matter of course.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from yardsticks import example

real_models = example("real_models.py")

STEPS, BATCH, RATE, TESTED = {"vit": 1000, "resnet": 600}, 64, 1e-3, 500


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images ``[n, 1, 8, 8]`` in [-1, 1] and classes: first those to train on, then the 500 to measure on."""
    images, labels = example("digits_diffusion/train.py").images_and_labels()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:-TESTED], order[-TESTED:]
    return images[train], labels[train], images[test], labels[test]


def pixels(images: Tensor, size: int) -> Tensor:
    """The images as a model wants them: the network of convolutions halves them too often for 8 x 8."""
    return images if images.shape[-1] == size else F.interpolate(images, size=size, mode="bilinear")


def new_model(kind: str) -> torch.nn.Module:
    """The untrained model; `kind` is `"vit"` or `"resnet"`."""
    from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

    if kind == "vit":
        return ViTForImageClassification(
            ViTConfig(
                image_size=8,
                patch_size=2,
                num_channels=1,
                hidden_size=128,
                intermediate_size=512,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_labels=10,
            )
        )
    return ResNetForImageClassification(
        ResNetConfig(
            num_channels=1,
            embedding_size=32,
            hidden_sizes=[32, 64, 128],
            depths=[2, 2, 2],
            layer_type="basic",
            num_labels=10,
        )
    )


def size_of(model: torch.nn.Module) -> int:
    """Height and width of the model's images."""
    return getattr(model.config, "image_size", 32)


def trained(kind: str) -> Path:
    """The directory of the trained model; trains it if there is none."""
    target = real_models.cache_dir() / f"digits-{kind}"
    if target.is_dir():
        return target
    torch.manual_seed(0)
    images, labels, test_images, test_labels = digits()
    model = new_model(kind).train()
    size = size_of(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05)
    for step in range(STEPS[kind]):
        optimizer.param_groups[0]["lr"] = RATE * min(1.0, (step + 1) / 50) * (1 - step / STEPS[kind])
        picked = torch.randint(len(images), (BATCH,))
        batch = images[picked] + 0.3 * torch.randn(BATCH, 1, 8, 8)
        down, right = torch.randint(-1, 2, (2,)).tolist()
        loss = F.cross_entropy(
            model(pixel_values=pixels(batch.roll((down, right), (2, 3)), size)).logits, labels[picked]
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 100 == 0:
            print(f"{kind} step {step + 1} loss {loss.item():.4f}", flush=True)
    model.eval()
    with torch.no_grad():
        found = model(pixel_values=pixels(test_images, size)).logits.argmax(-1)
    print(f"{kind}: {(found == test_labels).float().mean():.1%} of {TESTED} test digits", flush=True)
    new = target.parent / f".{target.name}-new"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    model.save_pretrained(new)
    new.replace(target)
    return target


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(trained("vit"), trained("resnet"), sep="\n")
