"""The CPU in the place of a GPU, for tests in the interpreter: kernels run, and what torch decodes is noted."""

import contextlib

import pytest
import torch

from requanto.linear import registry
from requanto.linear.gpu import conditions as rules
from requanto.linear.gpu import dequantize, layout
from requanto.runtime.settings import settings
from requanto.tensor import qtensor
from requanto.tensor.layout import Layout

NOWHERE = ("none",)


def take_for_a_gpu(patch, device="cpu", capability=0, first=("triton",)):
    """Implementations for GPUs take ``device`` for theirs. Those whose names begin as one of ``first`` lead the table.

    The library of CPU kernels is not used: it would do what the GPU's kernels are asked for.
    """
    patch.setattr(settings, "compiled", False)
    patch.setattr(qtensor, "value_kernels", {device: dequantize.values})
    patch.setattr(rules, "DEVICES", (device,))
    patch.setattr(rules, "capability", lambda kind: capability)
    entries = sorted(registry._REGISTRY, key=lambda one: not one.name.startswith(first))
    patch.setattr(registry, "_REGISTRY", entries)


@contextlib.contextmanager
def gpu(device="cpu", capability=0):
    """The table with the GPU's entries first, which take ``device`` for theirs; yields a list of what torch decodes."""
    noted = []

    def counted(original):
        def run(*args, **kwargs):
            if rules.DEVICES != NOWHERE:
                noted.append(original.__qualname__)
            return original(*args, **kwargs)

        return run

    with pytest.MonkeyPatch.context() as patch:
        take_for_a_gpu(patch, device, capability, first=("triton", "gpu"))
        for place, name in (
            (Layout, "codes"), (Layout, "gather"), (layout.ExecLayout, "codes"), (layout.ExecLayout, "gather"),
            (qtensor, "scaled_values"),
        ):  # fmt: skip
            patch.setattr(place, name, counted(getattr(place, name)))
        yield noted


def reference(weight, dtype=torch.float32):
    """The dequantized weight by torch's operators, whatever the device is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rules, "DEVICES", NOWHERE)
        patch.setattr(qtensor, "value_kernels", {})
        patch.setattr(settings, "compiled", False)
        return weight.dequantize(dtype)
