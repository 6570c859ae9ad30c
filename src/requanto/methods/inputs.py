"""The rows that a layer's weight is multiplied with: a Linear layer's inputs, or the patches that a convolution sees."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional as F

#: Patches are made for up to this many elements at once (64 MB in float32).
_CHUNK = 16 * 1024 * 1024

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def weight_inputs(module: nn.Module, given: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yields the rows ``[..., K]`` that the weight of a module is multiplied with, ``[N, K]`` seen as a matrix.

    Args:
        module: a Linear layer, Conv1D or convolution.
        given: its input.
    """
    if isinstance(module, CONVOLUTIONS):
        yield from patches(module, given)
    else:
        yield given


def patches(module: nn.Module, given: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yields the patches ``[count, K]`` of a convolution's input, ``K = in_channels / groups * kernel``, in parts.

    The patches of all groups of channels are rows of their own, so the moments of a grouped convolution are the mean over
    its groups.

    Args:
        module: any of torch's convolutions that are not transposed.
        given: ``[batch, channels, *sizes]``, or without the batch.
    """
    count = len(module.kernel_size)
    if given.dim() == count + 1:
        given = given.unsqueeze(0)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    # torch's own field: also right for padding="same", which may pad one side more than the other
    found = F.pad(given.detach(), module._reversed_padding_repeated_twice, mode=mode)
    for axis, (size, stride, dilation) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, strict=True), 2
    ):
        found = found.unfold(axis, (size - 1) * dilation + 1, stride)[..., ::dilation]
    batch, channels, first, *rest = found.shape
    groups = module.groups
    # [batch, groups, channels, *places, *kernel] -> [batch, first place, other places, groups, channels, *kernel]
    found = found.view(batch, groups, channels // groups, first, *rest)
    places, kernel = range(4, 3 + count), range(3 + count, 3 + 2 * count)
    found = found.permute(0, 3, *places, 1, 2, *kernel)
    length = channels // groups * torch.Size(module.kernel_size).numel()
    step = max(1, _CHUNK // max(1, found[0, 0].numel()))
    for image in found:
        for start in range(0, first, step):
            yield image[start : start + step].reshape(-1, length)
