"""A few results of the published package against float64; Requanto's own tests hold every kernel to that."""

import sys
from pathlib import Path

import pytest
import torch


def int4_weight(n: int, k: int, group: int, device: torch.device):
    """(packed codes, scale, shift, the weight in float64)."""
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, device=device)
    scale = torch.rand(n, k // group, dtype=torch.float16, device=device) * 0.1 + 0.01
    shift = scale * 8
    each = [part.double().repeat_interleave(group, dim=1) for part in (scale, shift)]
    return codes[:, ::2] | codes[:, 1::2] << 4, scale, shift, codes.double() * each[0] - each[1]


@pytest.mark.kernels_ci
@pytest.mark.parametrize("m", [1, 5])
def test_int4_in_groups(kernel, device, m):
    packed, scale, shift, weight = int4_weight(48, 256, 64, device)
    packed = kernel.to_exec_layout(packed, 4)
    x = torch.randn(m, 256, dtype=torch.float16, device=device)
    scale, shift = kernel.group_major(scale), kernel.group_major(shift)
    y = kernel.wq_gemm(x, packed, scale, shift, bits=4, group_size=64, layout="exec")
    expected = x.double() @ weight.T
    assert (y.double() - expected).norm() < 2e-3 * expected.norm()


@pytest.mark.kernels_ci
def test_dequantize(kernel, device):
    packed, scale, shift, weight = int4_weight(48, 256, 64, device)
    w = kernel.wq_dequant(packed, scale, shift, bits=4, group_size=64, dtype=torch.float32)
    torch.testing.assert_close(w.double(), weight, rtol=1e-6, atol=1e-6)


@pytest.mark.kernels_ci
def test_int8_rows(kernel, device):
    x = torch.randn(5, 256, dtype=torch.float16, device=device)
    w = torch.randint(-127, 128, (48, 256), dtype=torch.int8, device=device)
    scale = torch.rand(48, dtype=torch.float32, device=device) * 0.01
    codes, scales = kernel.quant_rows(x)
    y = kernel.scaled_mm(codes, w, scales, scale, out_dtype=torch.float32)
    expected = (codes.double() * scales.double()[:, None]) @ (w.double() * scale.double()[:, None]).T
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.kernels_ci
def test_tables_travel_with_the_package(kernel):
    folder = Path(kernel.__file__).parent / "tables"
    assert any(folder.glob("*.json")), f"no table of tiles in {folder}"
    config = sys.modules[f"{kernel.__name__}.config"]
    assert folder == config.TABLES
    assert config.families()
