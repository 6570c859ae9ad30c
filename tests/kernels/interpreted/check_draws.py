"""Every kernel that reads weights, on anything that it accepts: types, shapes, groups, strides, dtypes, layouts, tiles.

Drawn anew in each run; an example that fails is printed with its arguments. Half of the affine weights have groups of equal
weights, which the quantizer stores as scale 1, codes 0 and their value as shift.
"""

import pytest
import torch
from reference import FP8, TOLERANCE, check_equal_groups, decode_fp8, draw, error, weight

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from requanto_kernels import (
    Config,
    group_major,
    quant_rows,
    round_rows,
    scaled_mm,
    to_exec_layout,
    w4a8_gemm,
    wq_dequant,
    wq_gemm,
    wq_gemm_dx,
    wq_gemm_grouped,
)

HALF, FULL = torch.float16, torch.float32
INTEGERS = [str(bits) for bits in range(1, 9)]
OTHERS = ["u8", "e2m1", "e3m2", "e2m3", "e1m1", "e4m0", "table2", "table3", "table4", "table6"]


def some(examples):
    """So many examples; not made smaller when one fails, which would take minutes here."""
    return settings(
        max_examples=examples, derandomize=False, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


def laid_out(tensor, how):
    """The same values with other strides."""
    if how == "transposed":
        return tensor.mT.contiguous().mT
    if how == "sliced":
        wide = torch.full(
            (*tensor.shape[:-2], tensor.shape[-2] + 3, 2 * tensor.shape[-1] + 1), float("nan"), dtype=tensor.dtype
        )
        return wide[..., 2:-1, 1::2].copy_(tensor)
    if how == "rows":
        wide = torch.zeros(*tensor.shape[:-2], tensor.shape[-2], tensor.shape[-1] + 5, dtype=tensor.dtype)
        return wide[..., 3:-2].copy_(tensor)
    return tensor


LAYOUTS = st.sampled_from(["plain", "transposed", "sliced", "rows"])
CODES = st.sampled_from(["plain", "rows"])  # of 8 bits and below: a launcher copies what is not contiguous along K
TILES = st.builds(
    Config,
    block_m=st.sampled_from([16, 32, 128]), block_n=st.sampled_from([16, 32, 64]), block_k=st.sampled_from([32, 128, 256]),
    split_k=st.sampled_from([0, 1, 3]), left=st.booleans(), fields=st.booleans(), num_stages=st.sampled_from([1, 3]),
    group_m=st.sampled_from([1, 8]),
)  # fmt: skip


@st.composite
def weights(draws, kinds=INTEGERS + OTHERS, experts=0):
    """(reference weight, codes, scale, shift, keyword arguments of the kernels)."""
    kind = draws(st.sampled_from(kinds))
    affine = kind == "u8" or (kind in INTEGERS and draws(st.booleans()))
    n = draws(st.sampled_from([1, 2, 17, 24, 40]))
    group = draws(st.sampled_from([None, 8, 16, 20, 32, 48, 64, 128]))
    k = draws(st.sampled_from([128, 256, 512, 40, 77, 96, 131])) if group is None else group * draws(st.integers(1, 5))
    if group in (32, 64, 128) and draws(st.booleans()):
        k = 256
    dtype = draws(st.sampled_from([FULL, HALF]))
    equal = draws(st.sampled_from([0.0, 0.5])) if affine else 0.0
    seed = draws(st.integers(0, 2**31))
    torch.manual_seed(seed)
    w = draw(kind, affine, n, k, group, scale_dtype=dtype, equal=equal, experts=experts)
    exec_layout = draws(st.booleans())
    qdata = to_exec_layout(w.qdata, w.bits, k) if exec_layout else w.qdata
    qdata = laid_out(qdata, draws(CODES))
    how = draws(st.sampled_from(["plain", "transposed", "sliced", "major"]))
    scale, shift = (
        None if t is None else group_major(t) if how == "major" else laid_out(t, how) for t in (w.scale, w.shift)
    )
    return w, qdata, scale, shift, {**w.what, "layout": "exec" if exec_layout else "plain"}


@some(25)
@given(st.data())
def test_products(data):
    w, qdata, scale, shift, what = data.draw(weights())
    dtype, m = data.draw(st.sampled_from([FULL, HALF])), data.draw(st.sampled_from([1, 3, 16, 33]))
    config = data.draw(st.one_of(st.none(), TILES))
    n, k = w.meaning.shape
    x = laid_out(torch.randn(m, k).to(dtype), data.draw(LAYOUTS))
    bias = torch.randn(n).to(data.draw(st.sampled_from([FULL, HALF]))) if data.draw(st.booleans()) else None
    want = x.double() @ w.meaning.T + (0 if bias is None else bias.double())
    size = (x.double().abs() @ w.meaning.abs().T).norm() / want.norm()  # sums that cancel lose what they cancel
    got = wq_gemm(x, qdata, scale, shift, bias, **what, config=config)
    assert error(got, want) <= TOLERANCE[dtype] * max(1, size)
    dy = laid_out(torch.randn(m, n).to(dtype), data.draw(LAYOUTS))
    want = dy.double() @ w.meaning
    size = (dy.double().abs() @ w.meaning.abs()).norm() / want.norm()
    assert error(wq_gemm_dx(dy, qdata, scale, shift, k=k, **what), want) <= TOLERANCE[dtype] * max(1, size)


@some(30)
@given(st.data())
def test_dequantized(data):
    w, qdata, scale, shift, what = data.draw(weights())
    dtype, k = data.draw(st.sampled_from([FULL, HALF])), w.meaning.shape[1]
    got = wq_dequant(qdata, scale, shift, k=k, dtype=dtype, **what)
    assert error(got, w.meaning) <= TOLERANCE[dtype]
    if w.equal is not None and w.equal.any():
        check_equal_groups(got, w, TOLERANCE[dtype])
        eye = torch.eye(len(w.meaning), dtype=dtype)
        check_equal_groups(wq_gemm_dx(eye, qdata, scale, shift, k=k, **what), w, TOLERANCE[dtype])


@some(12)
@given(st.data())
def test_experts(data):
    w, qdata, scale, shift, what = data.draw(weights(experts=3))
    dtype = data.draw(st.sampled_from([FULL, HALF]))
    counts = data.draw(st.lists(st.sampled_from([0, 1, 5, 20]), min_size=3, max_size=3).filter(any))
    ends = torch.tensor([0, *counts]).cumsum(0).to(data.draw(st.sampled_from([torch.int32, torch.int64])))
    owner = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
    _, n, k = w.meaning.shape
    config = data.draw(st.one_of(st.none(), TILES))
    x, dy = (laid_out(torch.randn(len(owner), size).to(dtype), data.draw(LAYOUTS)) for size in (k, n))
    bias = torch.randn(3, n) if data.draw(st.booleans()) else None
    want = torch.einsum("tk,tnk->tn", x.double(), w.meaning[owner])
    size = torch.einsum("tk,tnk->tn", x.double().abs(), w.meaning[owner].abs()).norm() / want.norm()
    want = want if bias is None else want + bias[owner].double()
    got = wq_gemm_grouped(x, ends, qdata, scale, shift, bias, **what, config=config)
    assert error(got, want) <= TOLERANCE[dtype] * max(1, size)
    want = torch.einsum("tn,tnk->tk", dy.double(), w.meaning[owner])
    size = torch.einsum("tn,tnk->tk", dy.double().abs(), w.meaning[owner].abs()).norm() / want.norm()
    got = wq_gemm_dx(dy, qdata, scale, shift, k=k, offsets=ends, **what)
    assert error(got, want) <= TOLERANCE[dtype] * max(1, size)


@some(25)
@given(st.data())
def test_int8_activations(data):
    bits = data.draw(st.integers(1, 8))
    group = data.draw(st.sampled_from([None, 32, 64, 128, 256]))  # what a tile of int8 sums takes
    k = 77 if group is None and data.draw(st.booleans()) else 512
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    affine = data.draw(st.booleans())
    w = weight(24, k, bits, group, affine, equal=0.5 * affine, scale_dtype=data.draw(st.sampled_from([FULL, HALF])))
    packed = data.draw(st.booleans())
    qdata = to_exec_layout(w.qdata, bits, k) if packed else w.qdata
    out_dtype = data.draw(st.sampled_from([FULL, HALF]))
    x = torch.randint(-127, 128, (data.draw(st.sampled_from([1, 5, 20])), k), dtype=torch.int8)
    xs = torch.rand(len(x)).to(data.draw(st.sampled_from([FULL, HALF]))) * 0.01
    want = xs.double()[:, None] * (x.double() @ w.meaning.T)
    got = w4a8_gemm(
        laid_out(x, data.draw(CODES)), xs, laid_out(qdata, data.draw(CODES)), w.scale, w.shift, bits=bits, group_size=group,
        layout="exec" if packed else "plain", out_dtype=out_dtype,
    )  # fmt: skip
    size = (xs.double()[:, None] * (x.double().abs() @ w.meaning.abs().T)).norm() / want.norm()
    assert error(got, want) <= TOLERANCE[out_dtype] * max(1, size)


@some(12)
@given(st.data())
def test_products_of_8_bits(data):
    m, n, k = (data.draw(st.sampled_from(sizes)) for sizes in ([1, 5, 20, 70], [8, 24, 33], [16, 64, 100, 256]))
    kind = data.draw(st.sampled_from([torch.int8, *FP8]))
    x = torch.randn(m, k).to(data.draw(st.sampled_from([FULL, HALF]))) * 10 ** data.draw(st.sampled_from([-3, 0, 3]))
    taken = laid_out(x, data.draw(st.sampled_from(["plain", "transposed", "rows"])))
    codes, scale = quant_rows(taken, kind)
    values = codes.double() if kind == torch.int8 else decode_fp8(codes)
    step = x.double().abs().amax(1, keepdim=True) / (127 if kind == torch.int8 else torch.finfo(kind).max)
    assert (values * scale.double()[:, None] - x.double()).abs().le(
        x.double().abs() * 0.13 + step * (0.51 if kind == torch.int8 else 1)
    ).all()  # fmt: skip
    assert error(round_rows(taken, kind), values * scale.double()[:, None]) <= TOLERANCE[x.dtype]
    w = torch.randint(-127, 128, (n, k), dtype=torch.int8) if kind == torch.int8 else torch.randn(n, k).to(kind)
    w64, ws = w.double() if kind == torch.int8 else decode_fp8(w), torch.rand(n)
    want = scale.double()[:, None] * ws.double() * (values @ w64.T)
    assert error(scaled_mm(codes, w, scale, ws, out_dtype=FULL), want) <= 3e-6
