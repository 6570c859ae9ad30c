"""Trains a small diffusion transformer on scikit-learn's handwritten digits, in minutes on one CPU core.

    python examples/digits_diffusion/train.py            # writes model/ and train.log next to this file

The model is Diffusers' own DiT (class-conditional, 8x8 pixels, one channel), the noise schedule its flow-matching Euler
scheduler. Requanto's image tests and docs quantize the saved weights (float16, about 2 MB).
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from sklearn.datasets import load_digits

HERE = Path(__file__).resolve().parent


def images_and_labels() -> tuple[torch.Tensor, torch.Tensor]:
    """The 1797 digits as ``[n, 1, 8, 8]`` in [-1, 1], and their classes."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    return images, torch.tensor(digits.target)


def new_model() -> DiTTransformer2DModel:
    """An untrained model of about 1 M parameters."""
    return DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=1,
        num_layers=3,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
        dropout=0.0,
    )


def main() -> None:
    """Trains for the given steps or minutes, whichever ends first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    images, labels = images_and_labels()
    model = new_model().train()
    scheduler = FlowMatchEulerDiscreteScheduler()
    average = copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4)
    log = (arguments.out / "train.log").open("w", encoding="utf-8")
    start = time.time()
    schedule_end = arguments.minutes * 60
    running, step = 0.0, 0

    def say(line: str) -> None:
        print(line, flush=True)
        print(line, file=log, flush=True)

    say(f"{sum(p.numel() for p in model.parameters())} parameters, batch {arguments.batch}")
    while step < arguments.steps and time.time() - start < schedule_end:
        progress = max(step / arguments.steps, (time.time() - start) / schedule_end)
        for group in optimizer.param_groups:  # warm-up, then linearly to zero
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 100) * (1 - progress)
        picked = torch.randint(len(images), (arguments.batch,))
        clean, noise = images[picked], torch.randn(arguments.batch, 1, 8, 8)
        # The scheduler's own noise: sigma * noise + (1 - sigma) * image, at random timesteps of the schedule.
        timesteps = scheduler.timesteps[torch.randint(len(scheduler.timesteps), (arguments.batch,))]
        noisy = scheduler.scale_noise(clean, timesteps, noise)
        velocity = model(noisy, timestep=timesteps, class_labels=labels[picked]).sample
        loss = torch.nn.functional.mse_loss(velocity, noise - clean)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        decay = min(0.998, (step + 1) / (step + 10))
        with torch.no_grad():
            for mean, parameter in zip(average.parameters(), model.parameters()):
                mean.lerp_(parameter, 1 - decay)
        running += loss.item()
        if step % 100 == 0:
            say(f"step {step:5d}  loss {running / 100:.4f}  {time.time() - start:6.1f} s")
            running = 0.0
    average.half().save_pretrained(arguments.out / "model")
    scheduler.save_pretrained(arguments.out / "model" / "scheduler")
    say(f"saved after {step} steps, {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
