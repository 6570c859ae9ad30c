"""Every test computes on one thread: the machines that run them are small, and several workers share one."""

import torch

torch.set_num_threads(1)

try:
    from hypothesis import settings
except ImportError:  # `make gpu-check` installs nothing, and its tests do without
    pass
else:
    # Shared machines stall: a slow example is no failure. The same examples on every run.
    settings.register_profile("requanto", deadline=None, max_examples=40, derandomize=True)
    settings.load_profile("requanto")
