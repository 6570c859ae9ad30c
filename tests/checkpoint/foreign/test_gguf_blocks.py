"""The blocks of each GGUF type, against what the package gguf makes of the same bytes."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf_files import blocks as random_blocks
from gguf_files import values as values_of

from requanto.checkpoint.foreign.gguf_blocks import TYPES
from requanto.checkpoint.format import rebuild
from requanto.tensor.qtensor import QTensor


def weight_of(raw: np.ndarray, kind: str, columns: int) -> QTensor:
    """Blocks ``[rows, bytes]`` as our weight."""
    blocks = TYPES[kind]
    parts = blocks.parts(torch.from_numpy(raw).unflatten(-1, (-1, blocks.size))) | blocks.codebook
    return rebuild("w", blocks.line(torch.Size([raw.shape[0], columns])), parts, torch.float32)


@pytest.mark.parametrize("kind", TYPES)
def test_weights_are_those_of_gguf(kind):
    raw = random_blocks(kind, (6, 768))
    weight = weight_of(raw, kind, 768)
    assert torch.equal(weight.dequantize(), values_of(raw, kind))
    assert weight.nbytes <= raw.nbytes + 64 + 2 * 18  # a codebook; TQ2_0's shifts


@pytest.mark.parametrize("kind", TYPES)
def test_sizes_are_those_of_gguf(kind):
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]] == (TYPES[kind].count, TYPES[kind].size)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4"])
def test_what_gguf_quantized(kind):
    values = np.random.default_rng(1).normal(size=(8, 128)).astype(np.float32)
    values[2, :32] = 0
    values[3, 32:64] = 0.5
    raw = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])
    assert torch.equal(weight_of(raw, kind, 128).dequantize(), values_of(raw, kind))


def test_lines_are_those_of_the_format():
    assert TYPES["Q4_K"].line(torch.Size([8, 256])) == "qint4 8x256 group=32 affine scales=6 block=256"
    assert TYPES["Q6_K"].line(torch.Size([2, 8, 256]), axis=1) == (
        "qint6 2x8x256 group=16 axis=1 scales=8 signed block=256"
    )
    assert TYPES["Q8_0"].line(torch.Size([8, 64]), transposed=True) == "qint8 64x8 group=32 transposed"
