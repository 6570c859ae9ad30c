"""No crash for any shape from 1 to 300 in any type: a sample of odd and even sizes, each product against float64."""

import pytest
import torch
import torch.nn.functional as F

from requanto import QTensor

KINDS = ["int2", "int4", "int8", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2"]
KINDS += ["int3", "int5", "int7", "uint8", "nf3", "fp6_e2m3", "codebook2"]
SIZES = [1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 299, 300]
ALLOWED = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("dtype", ALLOWED)
@pytest.mark.parametrize("kind", KINDS)
def test_sizes_from_1_to_300(kind, dtype):
    generator = torch.Generator().manual_seed(0)
    for index, length in enumerate(SIZES):
        for step, outputs in enumerate((1, 5, SIZES[-1 - index])):
            rows = SIZES[(index + 7 * step) % len(SIZES)]
            weight = torch.randn(outputs, length, generator=generator).to(dtype)
            x = torch.randn(rows, length, generator=generator).to(dtype)
            tensor = QTensor.quantize(weight, kind)
            found = F.linear(x, tensor).double()
            wanted = x.double() @ tensor.dequantize(torch.float32).double().t()
            size = x.double().abs() @ tensor.dequantize(torch.float32).double().abs().t()
            assert (found - wanted).norm() <= ALLOWED[dtype] * size.norm() + 1e-12, (rows, length, outputs)
