"""Groups of equal weights, which the quantizer stores as scale 1, codes 0 and their value as shift, among normal ones.

Each product is one with ones and zeros, so that its result is the weight as the kernel rebuilt it.
"""

import pytest
import torch
from reference import TOLERANCE, Weight, check_equal_groups, pack, weight

from requanto_kernels import (
    Config,
    to_exec_layout,
    w4a8_gemm,
    wq_dequant,
    wq_gemm,
    wq_gemm_dx,
    wq_gemm_grouped,
)

HALF, FULL = torch.float16, torch.float32
#: (dtype of the product, of scale and shift); bf16 is left to the GPU, since the interpreter's is wrong.
PAIRS = [(FULL, FULL), (FULL, HALF), (HALF, HALF), (HALF, FULL)]
GROUPS = [16, 32, 64, 128, None]
K = 256
#: The interpreter takes its time by the number of tiles: few large ones.
LARGE = Config(block_m=256, block_n=32, block_k=256, split_k=1)


def draw(bits, group, scale_dtype, n=24, k=K, **more) -> Weight:
    return weight(n, k, bits, group, affine=True, scale_dtype=scale_dtype, equal=0.5, **more)


def common(w: Weight, form: str) -> tuple[torch.Tensor, dict]:
    layout = "plain" if form == "plain" else "exec"
    qdata = to_exec_layout(w.qdata, w.bits) if layout == "exec" else w.qdata
    return qdata, {"bits": w.bits, "group_size": w.group, "layout": layout}


@pytest.mark.parametrize(("dtype", "scale_dtype"), PAIRS)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize(
    ("bits", "form"),
    [(2, "left"), (2, "fields"), (4, "plain"), (4, "left"), (4, "right"), (4, "fields"), (8, "left")],
)
def test_product(bits, form, group, dtype, scale_dtype):
    w = draw(bits, group, scale_dtype)
    qdata, what = common(w, form)
    config = Config(
        block_m=256, block_n=32, block_k=256, left=form != "right", fields=form == "fields", split_k=1
    )  # fmt: skip
    got = wq_gemm(torch.eye(K, dtype=dtype), qdata, w.scale, w.shift, config=config, **what)
    check_equal_groups(got.T, w, TOLERANCE[dtype])


@pytest.mark.parametrize(("dtype", "scale_dtype"), PAIRS)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize(("bits", "form"), [(2, "exec"), (4, "plain"), (4, "exec"), (8, "plain")])
def test_gradient_and_rebuilt_weight(bits, form, group, dtype, scale_dtype):
    w = draw(bits, group, scale_dtype)
    qdata, what = common(w, form)
    check_equal_groups(wq_gemm_dx(torch.eye(24, dtype=dtype), qdata, w.scale, w.shift, **what), w, TOLERANCE[dtype])
    got = wq_dequant(qdata, w.scale, w.shift, dtype=dtype, **what)
    check_equal_groups(got, w, TOLERANCE[dtype])
    assert torch.equal(got[w.equal], w.meaning[w.equal].to(dtype))


@pytest.mark.parametrize(("dtype", "scale_dtype"), PAIRS)
@pytest.mark.parametrize("group", [20, 24, 48])
def test_groups_that_do_not_fit(group, dtype, scale_dtype):
    w = draw(4, group, scale_dtype, k=5 * group)
    got = wq_gemm(torch.eye(5 * group, dtype=dtype), w.qdata, w.scale, w.shift, bits=4, group_size=group)
    check_equal_groups(got.T, w, TOLERANCE[dtype])


@pytest.mark.parametrize(("dtype", "scale_dtype"), PAIRS)
@pytest.mark.parametrize("group", [64, None])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_experts(bits, group, dtype, scale_dtype):
    w = draw(bits, group, scale_dtype, experts=3)
    qdata, what = common(w, "exec")
    x, ends = torch.eye(K, dtype=dtype).repeat(3, 1), torch.arange(4) * K
    got = wq_gemm_grouped(x, ends, qdata, w.scale, w.shift, config=LARGE, **what)
    check_equal_groups(got.view(3, K, 24).transpose(1, 2), w, TOLERANCE[dtype])
    dy, ends = torch.eye(24, dtype=dtype).repeat(3, 1), torch.arange(4) * 24
    dx = wq_gemm_dx(dy, qdata, w.scale, w.shift, offsets=ends, config=LARGE, **what)
    check_equal_groups(dx.view(3, 24, K), w, TOLERANCE[dtype])


@pytest.mark.parametrize("scale_dtype", [FULL, HALF])
@pytest.mark.parametrize("out_dtype", [FULL, HALF])
@pytest.mark.parametrize(
    ("group", "form"), [(32, "plain"), (64, "plain"), (128, "plain"), (256, "exec"), (None, "exec")]
)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_int8_activations(bits, group, form, out_dtype, scale_dtype):
    w = draw(bits, group, scale_dtype)
    qdata, what = common(w, form)
    x, ones = torch.eye(K, dtype=torch.int8), torch.ones(K)
    got = w4a8_gemm(x, ones, qdata, w.scale, w.shift, out_dtype=out_dtype, config=LARGE, **what)
    check_equal_groups(got.T, w, TOLERANCE[out_dtype])


@pytest.mark.parametrize("layout", ["plain", "exec"])
@pytest.mark.parametrize("dtype", [FULL, HALF])
@pytest.mark.parametrize("group", [64, None])
@pytest.mark.parametrize("bits", [2, 4])
def test_rows_of_zeros_give_zero(bits, group, dtype, layout):
    w = weight(8, 1024, bits, group, affine=True, equal=1.0)
    w.shift.zero_()
    x = torch.rand(3, 1024).to(dtype)  # all positive: sums that should cancel would show
    qdata = to_exec_layout(w.qdata, bits) if layout == "exec" else w.qdata
    got = wq_gemm(x, qdata, w.scale, w.shift, bits=bits, group_size=group, layout=layout)
    assert torch.equal(got, torch.zeros(3, 8, dtype=dtype))


@pytest.mark.parametrize("spread", [0.02, 2e-3])
@pytest.mark.parametrize("scale_dtype", [HALF, FULL])
@pytest.mark.parametrize("offset", [0.0, 0.5, -3.0])
@pytest.mark.parametrize("group", [64, 256])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_normal_groups_keep_their_accuracy(bits, group, offset, scale_dtype, spread):
    """fp16 weights around zero, or far from it (a large shift beside a small scale). fp32 scales gave 2e-4 .. 4.4e-4 in 150
    draws each; codes never counted from the centre would give 6.5e-4 and more. The interpreter rounds an fma twice, which
    costs up to 6.6e-4 with fp16 scales; a GPU stays at 2.3e-4."""
    values = (torch.randn(32, 512 // group, group) * spread + offset).double()
    lowest = values.amin(-1, keepdim=True)
    scale = ((values.amax(-1, keepdim=True) - lowest) / (2**bits - 1)).to(scale_dtype)
    shift = (-lowest).to(scale_dtype)
    codes = ((values + shift) / scale).round().clamp(0, 2**bits - 1)
    meaning = (codes * scale.double() - shift.double()).flatten(1)
    stored = codes.flatten(1).long()
    stored = stored.to(torch.uint8) if bits == 8 else pack(stored, bits)
    got = wq_gemm_dx(
        torch.eye(32, dtype=HALF), stored, scale[..., 0], shift[..., 0], bits=bits, group_size=group
    )  # fmt: skip
    found = ((got.double() - meaning).norm() / meaning.norm()).item()
    assert found <= (8e-4 if scale_dtype == HALF else 7e-4 if bits == 8 else 5e-4), found
