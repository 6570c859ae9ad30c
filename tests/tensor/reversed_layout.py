"""A layout for any weight, also one that is too small for a kernel's: tests that need a packed weight share it."""

import torch

from requanto.tensor.layout import Layout, register_layout


class Reversed(Layout):
    """Last row first."""

    name = "test-reversed"
    rows_are_views = False

    def pack(self, spec, parts):
        return {"qdata": parts["qdata"].view(torch.uint8).flip(0).view(parts["qdata"].dtype)}

    def unpack(self, spec, parts):
        return self.pack(spec, parts)["qdata"]

    def codes(self, spec, parts, start, stop):
        return super().codes(spec, {"qdata": self.unpack(spec, parts)}, start, stop)


REVERSED = register_layout(Reversed())
