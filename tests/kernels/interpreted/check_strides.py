"""Elements more than 2^31 apart: operands of a few numbers as views of reserved memory, with strides below 2^31.

A product of an index and a stride in 32 bits would wrap around; the interpreter computes addresses with the types that the
kernels name. What it would read there is a part of it, too, so that such a bug is a wrong number and no crash.
"""

import mmap
import sys

import pytest
import torch
from reference import TOLERANCE, error, weight

from requanto_kernels import (
    Config,
    group_major,
    int_mm,
    quant_rows,
    scaled_mm,
    to_exec_layout,
    w4a8_gemm,
    wq_dequant,
    wq_gemm,
    wq_gemm_dx,
    wq_gemm_grouped,
    wq_gemm_many,
)

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reserves memory as Linux does")
HALF, FULL = torch.float16, torch.float32
SPAN = 2**31 + 2**27
NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Linux; memory is used where it is touched


def far(tensor, axis=-1):
    """The same values in reserved memory, with the first and the last along ``axis`` more than 2^31 elements apart."""
    axis %= tensor.dim()
    step = -(-SPAN // (tensor.shape[axis] - 1))
    step += -step % 2  # words of the execution layout begin at even bytes
    assert step < 2**31 < step * (tensor.shape[axis] - 1)
    others = list(tensor.select(axis, 0).contiguous().stride())
    strides = [*others[:axis], step, *others[axis:]]
    size = 2**31 + sum((n - 1) * s for n, s in zip(tensor.shape, strides)) + 1
    memory = mmap.mmap(-1, size * tensor.dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
    memory.madvise(mmap.MADV_NOHUGEPAGE)  # a page of 4 KB for each number that is touched
    return torch.frombuffer(memory, dtype=tensor.dtype).as_strided(tensor.shape, strides, 2**31).copy_(tensor)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("form", "dtype"), [("plain", FULL), ("left", HALF), ("fields", HALF), ("right", FULL)])
def test_activations(form, dtype, axis):
    w = weight(24, 256, 4, 64, affine=True)
    x = torch.randn(5, 256).to(dtype)
    layout = "plain" if form == "plain" else "exec"
    qdata = w.qdata if form == "plain" else to_exec_layout(w.qdata, 4)
    config = Config(block_m=16, block_n=32, block_k=128, left=form != "right", fields=form == "fields", split_k=2)
    got = wq_gemm(far(x, axis), qdata, w.scale, w.shift, **w.what, layout=layout, config=config)
    assert error(got, x.double() @ w.meaning.T) <= TOLERANCE[dtype]


@pytest.mark.parametrize("axis", [0, 1])
def test_gradients_and_experts(axis):
    w = weight(24, 128, 4, 32, affine=True)
    dy = torch.randn(5, 24)
    got = wq_gemm_dx(far(dy, axis), w.qdata, w.scale, w.shift, **w.what)
    assert error(got, dy.double() @ w.meaning) <= TOLERANCE[FULL]
    w, ends = weight(24, 128, 4, 32, affine=True, experts=2), torch.tensor([0, 2, 5])
    owner = torch.tensor([0, 0, 1, 1, 1])
    x, dy = torch.randn(5, 128), torch.randn(5, 24)
    got = wq_gemm_grouped(far(x, axis), ends, w.qdata, w.scale, w.shift, **w.what)
    assert error(got, torch.einsum("tk,tnk->tn", x.double(), w.meaning[owner])) <= TOLERANCE[FULL]
    got = wq_gemm_dx(far(dy, axis), w.qdata, w.scale, w.shift, offsets=ends, **w.what)
    assert error(got, torch.einsum("tn,tnk->tk", dy.double(), w.meaning[owner])) <= TOLERANCE[FULL]


@pytest.mark.parametrize("part", ["qdata", "rows of scales", "groups", "experts"])
@pytest.mark.parametrize(("bits", "scale_dtype"), [(3, FULL), (4, HALF), (5, HALF), (8, FULL)])
def test_weights(bits, part, scale_dtype):
    """Scales of 16 bits that are group-major are loaded as pairs, with code of its own."""
    w = weight(24, 256, bits, 32, affine=True, experts=2, scale_dtype=scale_dtype)
    qdata = to_exec_layout(w.qdata, bits)
    scale, shift = w.scale, w.shift
    if part == "qdata":
        qdata = far(qdata, 1)
    elif part == "experts":
        qdata, scale, shift = (far(t.repeat(2, 1, 1), 0)[::3].copy_(t) for t in (qdata, scale, shift))
    else:
        axis = 2 if part == "groups" else 1
        scale, shift = far(scale, axis), far(shift, axis)
    what = {**w.what, "layout": "exec"}
    x, dy, ends = torch.randn(4, 256), torch.randn(4, 24), torch.tensor([0, 2, 4])
    owner = torch.tensor([0, 0, 1, 1])
    got = wq_gemm_grouped(x, ends, qdata, scale, shift, **what)
    assert error(got, torch.einsum("tk,tnk->tn", x.double(), w.meaning[owner])) <= TOLERANCE[FULL]
    got = wq_gemm_dx(dy, qdata, scale, shift, offsets=ends, **what)
    assert error(got, torch.einsum("tn,tnk->tk", dy.double(), w.meaning[owner])) <= TOLERANCE[FULL]
    one = qdata[1], scale[1], shift[1]
    assert error(wq_gemm(x, *one, **what), x.double() @ w.meaning[1].T) <= TOLERANCE[FULL]
    assert error(wq_gemm_dx(dy, *one, **what), dy.double() @ w.meaning[1]) <= TOLERANCE[FULL]
    assert error(wq_dequant(*one, **what, dtype=FULL), w.meaning[1]) <= TOLERANCE[FULL]


@pytest.mark.parametrize("part", ["rows of x", "columns of x", "qdata", "rows of scales", "groups"])
def test_several_weights(part):
    ws = [weight(n, 256, 4, 32, affine=True, scale_dtype=HALF) for n in (24, 16)]
    taken = x = torch.randn(4, 256)
    if part.endswith("x"):
        taken = far(x, 0 if part == "rows of x" else 1)
    parts = [(to_exec_layout(w.qdata, 4), w.scale, w.shift) for w in ws]
    # Rows of the two must be equally far apart: the smaller weight is a part of one as large as the other.
    padded = [tuple(torch.cat([t, t])[:24] for t in one) for one in parts]
    if part == "qdata":
        parts = [(far(q, 0), s, z) for q, s, z in padded]
    elif not part.endswith("x"):
        axis = 0 if part == "rows of scales" else 1
        parts = [(q, far(s, axis), far(z, axis)) for q, s, z in padded]
    parts = [tuple(t[: len(w.meaning)] for t in one) for one, w in zip(parts, ws)]
    for found, w in zip(wq_gemm_many(taken, parts, bits=4, group_size=32, layout="exec"), ws):
        assert error(found, x.double() @ w.meaning.T) <= TOLERANCE[FULL]


@pytest.mark.parametrize("part", ["x", "qdata", "scale", "groups"])
@pytest.mark.parametrize("bits", [4, 8])
def test_int8_activations(bits, part):
    w, x = weight(24, 256, bits, 128, affine=True), torch.randint(-127, 128, (5, 256), dtype=torch.int8)
    qdata, scale, shift, xs = w.qdata, w.scale, w.shift, torch.rand(5)
    taken = far(x, 0) if part == "x" else x
    if part == "qdata":
        qdata = far(qdata, 0)
    elif part == "scale":
        scale, shift = far(scale, 0), far(shift, 0)
    elif part == "groups":
        scale, shift = (far(torch.cat([t, t], 1), 1)[:, ::3].copy_(t) for t in (scale, shift))
    got = w4a8_gemm(taken, xs, qdata, scale, shift, bits=bits, group_size=128, out_dtype=FULL)
    assert error(got, xs.double()[:, None] * (x.double() @ w.meaning.T)) <= TOLERANCE[FULL]


@pytest.mark.parametrize("axis", [0, 1])
def test_products_of_8_bits_and_quantization(axis):
    x, w = (torch.randint(-127, 128, (rows, 64), dtype=torch.int8) for rows in (17, 24))
    xs, ws = torch.rand(17), torch.rand(24)
    want = xs.double()[:, None] * ws.double() * (x.double() @ w.double().T)
    for config in (None, Config(16, 32, 32, left=False)):
        got = scaled_mm(far(x, axis), far(w, axis), xs, ws, out_dtype=FULL, config=config)
        assert error(got, want) <= TOLERANCE[FULL]
    assert error(int_mm(far(x, axis), far(w, axis), xs, ws, out_dtype=FULL), want) <= TOLERANCE[FULL]
    y = torch.randn(4, 256)
    codes, scale = quant_rows(far(y, axis))
    assert torch.equal(codes, quant_rows(y)[0])
    assert torch.equal(scale, quant_rows(y)[1])


def test_group_major_scales_stay_where_they_are():
    scale = group_major(torch.rand(24, 8))
    assert scale.stride() == (1, 24)
    assert group_major(scale) is scale or group_major(scale).data_ptr() == scale.data_ptr()
