"""A transformer of FLUX.1's shape in plain torch: the same linear layers, attention and sizes, no diffusers needed.

Double blocks process image and text separately except for a joint attention; single blocks process both as one sequence,
attention and MLP in parallel (Black Forest Labs 2024, https://github.com/black-forest-labs/flux). Random weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Shape:
    """Blocks, heads of 128, width of the text's features, tokens."""

    double: int
    single: int
    heads: int
    text: int
    image_tokens: int
    text_tokens: int

    @property
    def width(self) -> int:
        """Features of a token."""
        return 128 * self.heads


SHAPES = {
    "flux-tiny": Shape(1, 1, 1, 64, 16, 4),
    "flux": Shape(19, 38, 24, 4096, 4096, 512),  # FLUX.1 at 1024 x 1024 pixels: 11.9 billion parameters
}


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
    """Attention of q, k, v ``[batch, tokens, width]``; queries and keys are normalized, as in the model."""
    q, k, v = (t.unflatten(-1, (heads, 128)).transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(F.rms_norm(q, (128,)), F.rms_norm(k, (128,)), v)
    return out.transpose(1, 2).flatten(2)


def modulated(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Layer norm, then shift and scale, which depend on the timestep."""
    return F.layer_norm(x, (x.shape[-1],)) * (1 + scale[:, None]) + shift[:, None]


class Stream(nn.Module):
    """Image's or text's half of a double block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, 6 * width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)


class DoubleBlock(nn.Module):
    """Two streams that attend to each other."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.image, self.text = Stream(shape.width), Stream(shape.width)

    def forward(self, image: torch.Tensor, text: torch.Tensor, time: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Updates both streams."""
        streams = [(self.text, text), (self.image, image)]
        parts = [one.modulation(F.silu(time)).chunk(6, dim=-1) for one, _ in streams]
        normed = [modulated(x, p[0], p[1]) for (_, x), p in zip(streams, parts)]
        qkv = [(one.q(x), one.k(x), one.v(x)) for (one, _), x in zip(streams, normed)]
        joint = attention(*(torch.cat(pair, dim=1) for pair in zip(*qkv)), self.heads)
        found = []
        for (one, x), p, attended in zip(streams, parts, joint.split([text.shape[1], image.shape[1]], dim=1)):
            x = x + p[2][:, None] * one.out(attended)
            inner = F.gelu(one.up(modulated(x, p[3], p[4])), approximate="tanh")
            found.append(x + p[5][:, None] * one.down(inner))
        return found[1], found[0]


class SingleBlock(nn.Module):
    """One sequence, attention and MLP in parallel."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.width
        self.heads = shape.heads
        self.modulation = nn.Linear(width, 3 * width)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.up, self.out = nn.Linear(width, 4 * width), nn.Linear(5 * width, width)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """Updates the sequence."""
        shift, scale, gate = self.modulation(F.silu(time)).chunk(3, dim=-1)
        y = modulated(x, shift, scale)
        both = [attention(self.q(y), self.k(y), self.v(y), self.heads), F.gelu(self.up(y), approximate="tanh")]
        return x + gate[:, None] * self.out(torch.cat(both, dim=-1))


class FluxShaped(nn.Module):
    """One denoising step: image tokens ``[1, tokens, 64]`` in and out."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.image_in, self.text_in = nn.Linear(64, shape.width), nn.Linear(shape.text, shape.width)
        self.double_blocks = nn.ModuleList(DoubleBlock(shape) for _ in range(shape.double))
        self.single_blocks = nn.ModuleList(SingleBlock(shape) for _ in range(shape.single))
        self.image_out = nn.Linear(shape.width, 64)

    def forward(self, image: torch.Tensor, text: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """image ``[1, tokens, 64]``, text ``[1, tokens, text]``, time ``[1, width]``."""
        image, text = self.image_in(image), self.text_in(text)
        for block in self.double_blocks:
            image, text = block(image, text, time)
        x = torch.cat([text, image], dim=1)
        for block in self.single_blocks:
            x = block(x, time)
        return self.image_out(x[:, text.shape[1] :])

    def inputs(self, device: str) -> tuple[torch.Tensor, ...]:
        """Random inputs of the right sizes."""
        s = self.shape
        sizes = ((1, s.image_tokens, 64), (1, s.text_tokens, s.text), (1, s.width))
        return tuple(torch.randn(size, device=device, dtype=torch.bfloat16) for size in sizes)
