"""Inputs for tiny models, what they compute, and how far off a quantized one is."""

import torch
from tiny_models import VOCABULARY

import requanto

quiet = {"progress": False}


def token_samples(count=6, length=24):
    """Random tokens, two rows a sample."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(4, VOCABULARY, (2, length), generator=generator) for _ in range(count)]


def vector_samples(count=4, columns=32):
    """Random vectors, some channels much larger than others."""
    generator = torch.Generator().manual_seed(5)
    spread = torch.randn(columns, generator=generator).exp()
    return [torch.randn(16, columns, generator=generator) * spread for _ in range(count)]


def logits(model, samples):
    """What a model computes for all samples."""
    with torch.no_grad():
        found = [model(sample) for sample in samples]
    return torch.cat([getattr(f, "logits", getattr(f, "last_hidden_state", f)) for f in found])


def error(model, samples, expected):
    """Relative error of what a model computes."""
    return float((logits(model, samples) - expected).norm() / expected.norm())


def nearest(model, **options):
    """The model rounded to nearest."""
    requanto.quantize(model, **options)
    requanto.freeze(model)
    return model
