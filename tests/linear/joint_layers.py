"""Layers of one input and a stand-in for the launch that computes several of them; used by test_joint*.py."""

import contextlib

import torch
from torch import nn

from requanto import QTensor
from requanto.linear import custom_ops
from requanto.linear.gpu import many
from requanto.runtime.settings import registry_state


@contextlib.contextmanager
def launches():
    """Lets sets of weights run together on this CPU: one "launch" for all, which computes them one by one and is noted."""
    noted = []

    def make_plan():
        def gemm(x, weights, biases, stacked):
            xs = [x] * len(weights) if isinstance(x, torch.Tensor) and not stacked else list(x)
            rows = xs[0].numel() // xs[0].shape[-1]
            noted.append((len(weights), rows))
            each = zip(xs, weights, biases)
            outs = [custom_ops.run(one.reshape(rows, -1), weight, bias) for one, weight, bias in each]
            return [out.view(*one.shape[:-1], -1) for one, out in zip(xs, outs)]

        return gemm

    names = ("why_not_here", "why_separate", "why_other_memory", "make_plan", "run")
    before = [getattr(many, name) for name in names]
    for name, function in zip(names, (*[lambda *_: None] * 3, make_plan, make_plan())):
        setattr(many, name, function)
    registry_state.changed()
    try:
        yield noted
    finally:
        for name, function in zip(names, before):
            setattr(many, name, function)
        registry_state.changed()


def quantized(out_features, in_features=128, kind="int4", bias=True, dtype=torch.float32, **how):
    layer = nn.Linear(in_features, out_features, bias=bias, dtype=dtype)
    weight = QTensor.quantize(layer.weight.detach(), kind, **{"search": "minmax", **how})
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer.requires_grad_(False)


class Attention(nn.Module):
    """Queries, keys and values of one input."""

    def __init__(self, **how):
        super().__init__()
        self.q, self.k, self.v = (quantized(n, **how) for n in (256, 64, 64))

    def forward(self, x):
        return torch.cat([self.q(x), self.k(x), self.v(x)], -1)
