"""4-bit codes in the order of PyTorch's CUDA kernel, lane by lane as the kernel writes them."""

from __future__ import annotations

import torch


def tile_words(codes: torch.Tensor, inner: int = 8) -> torch.Tensor:
    """int32 [N / 8, K / (16 inner), 32, inner / 2] of codes [N, K] from 0 to 15."""
    rows, columns = codes.shape
    out = torch.zeros(rows // 8, columns // (16 * inner), 32, inner // 2, dtype=torch.int64, device="cpu")
    codes = codes.long()
    tiles = torch.arange(rows // 8, device="cpu")
    for run in range(out.shape[1]):
        for lane in range(32):
            row = tiles * 8 + lane // 4
            for word in range(inner // 2):
                first = (run * inner + 2 * word) * 16 + (lane % 4) * 2
                # values v[0] .. v[7] that the lane reads, and their order in the word
                values = [codes[row, first + offset] for offset in (0, 1, 8, 9, 16, 17, 24, 25)]
                for place, value in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                    out[:, run, lane, word] |= values[value] << (4 * place)
    return torch.where(out >= 2**31, out - 2**32, out).to(torch.int32)
