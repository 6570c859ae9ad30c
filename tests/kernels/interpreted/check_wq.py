"""Weight-quantized kernels in Triton's interpreter against float64. bf16 is left out: the interpreter's is wrong."""

import random

import pytest
import torch
from reference import FP8, TOLERANCE, error, weight

from requanto_kernels import Config, group_major, to_exec_layout, wq_dequant, wq_gemm, wq_gemm_dx, wq_gemm_grouped
from requanto_kernels._check import check_weight
from requanto_kernels.forms import form_of

HALF, FULL = torch.float16, torch.float32
SMALL = Config(block_m=16, block_n=32, block_k=64, split_k=1)


def run(w, x, layout="plain", **more):
    qdata, scale, shift = w.qdata, w.scale, w.shift
    if layout == "exec":
        qdata, scale = to_exec_layout(qdata, w.bits, x.shape[-1]), group_major(scale)
        shift = None if shift is None else group_major(shift)
    return wq_gemm(x, qdata, scale, shift, bits=w.bits, group_size=w.group, layout=layout, **more)


@pytest.mark.parametrize("dtype", [FULL, HALF])
@pytest.mark.parametrize("layout", ["plain", "exec"])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("group", [32, 64, 128, 256, None])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_group_and_layout(bits, group, affine, layout, dtype):
    w = weight(40, 256, bits, group, affine)
    x = torch.randn(3, 256).to(dtype)
    bias = torch.randn(40)
    got = run(w, x, layout, bias=bias)
    assert got.dtype == dtype
    assert error(got, x.double() @ w.meaning.T + bias.double()) <= TOLERANCE[dtype]


@pytest.mark.parametrize("fp8", FP8)
@pytest.mark.parametrize("group", [None, 64])
@pytest.mark.parametrize("dtype", [FULL, HALF])
def test_float8(fp8, group, dtype):
    w = weight(33, 128, 8, group, fp8=fp8)
    x = torch.randn(5, 128).to(dtype)
    assert error(run(w, x), x.double() @ w.meaning.T) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [FULL, HALF])
@pytest.mark.parametrize("layout", ["plain", "exec"])
@pytest.mark.parametrize(("group", "k"), [(16, 256), (32, 256), (None, 128), (16, 80)])
def test_floats_of_4_bits(group, k, layout, dtype):
    """e2m1 codes, as NVFP4 and MXFP4 have them, in every kernel."""
    w = weight(24, k, 4, group, experts=2)
    codes = torch.stack([w.qdata & 15, w.qdata >> 4], -1).flatten(-2).long()
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
    meaning = values[codes] * w.scale.double().repeat_interleave(group or k, -1)[..., :k]
    qdata = to_exec_layout(w.qdata, 4, k) if layout == "exec" else w.qdata
    common = {"bits": 4, "group_size": group, "layout": layout, "small_float": "e2m1"}
    x = torch.randn(5, k).to(dtype)
    assert error(wq_gemm(x, qdata[0], w.scale[0], **common), x.double() @ meaning[0].T) <= TOLERANCE[dtype]
    grad = torch.randn(5, 24).to(dtype)
    got = wq_gemm_dx(grad, qdata[1], w.scale[1], k=k, **common)
    assert error(got, grad.double() @ meaning[1]) <= TOLERANCE[dtype]
    got = wq_gemm_grouped(x, torch.tensor([0, 2, 5]), qdata, w.scale, **common)
    assert error(got, torch.cat([x[:2].double() @ meaning[0].T, x[2:].double() @ meaning[1].T])) <= TOLERANCE[dtype]
    assert error(wq_dequant(qdata[0], w.scale[0], k=k, dtype=dtype, **common), meaning[0]) <= TOLERANCE[dtype]
    with pytest.raises(
        ValueError, match=r"small_float: found 'e2m1', expected '' or, without a shift, 'eXmY' of 1 .* = 4"
    ):
        wq_gemm(x, qdata[0], w.scale[0], w.scale[0], **common)


@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 1, 1), (1, 257, 96), (2, 31, 33), (17, 65, 130), (64, 48, 100), (129, 20, 64), (257, 70, 48)]
)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_ragged_shapes(m, n, k, bits):
    w = weight(n, k, bits, None, affine=True)
    x = torch.randn(m, k)
    assert error(run(w, x), x.double() @ w.meaning.T) <= TOLERANCE[FULL]


@pytest.mark.parametrize("seed", range(24))
def test_any_combination(seed):
    """All axes at once, drawn anew each time; pytest shows the draw where it fails."""
    pick = random.Random(f"{seed} {random.random()}").choice
    bits, fp8 = pick([(2, None), (4, None), (8, None), *((8, kind) for kind in FP8)])
    m, n, k = pick([1, 2, 15, 16, 17, 33, 100, 257]), pick([1, 7, 31, 64, 70]), pick([33, 128, 192, 256, 300, 512])
    group, affine, layout, dtype = (
        pick([32, 64, 128, 256, None]),
        pick([False, True]),
        pick(["plain", "exec"]),
        pick([FULL, HALF]),
    )
    strided, biased = pick([False, True]), pick([False, True])
    draw = f"{bits=} {fp8=} {m=} {n=} {k=} {group=} {affine=} {layout=} {dtype=} {strided=} {biased=}"
    w = weight(n, k, bits, group, affine, fp8=fp8)
    x = (torch.randn(k, 2 * m).T[::2] if strided else torch.randn(m, k)).to(dtype)
    bias = torch.randn(n).to(dtype) if biased else None
    want = x.double() @ w.meaning.T + (0 if bias is None else bias.double())
    got = run(w, x, layout, bias=bias)
    assert got.dtype == dtype
    # Where terms cancel (one output, say) the error is measured against their size, not the sum's.
    size = (x.double().abs() @ w.meaning.abs().T).norm() / k**0.5
    assert ((got.double() - want).norm() / torch.maximum(size, want.norm())).item() <= TOLERANCE[dtype], draw
    if layout == "exec":
        w.qdata, w.scale = to_exec_layout(w.qdata, bits, k), group_major(w.scale)
    dx = wq_gemm_dx(got, w.qdata, w.scale, w.shift, bits=bits, k=k, group_size=group, layout=layout)
    size = (got.double().abs() @ w.meaning.abs()).norm() / n**0.5
    want = got.double() @ w.meaning
    assert ((dx.double() - want).norm() / torch.maximum(size, want.norm())).item() <= TOLERANCE[dtype], draw


@pytest.mark.parametrize(("k", "group"), [(100, 32), (192, 48), (130, 128), (96, 24)])
def test_groups_that_do_not_fit(k, group):
    w = weight(20, k, 4, group, affine=True)
    x = torch.randn(4, k)
    for layout in ("plain", "exec"):
        assert error(run(w, x, layout), x.double() @ w.meaning.T) <= TOLERANCE[FULL]


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("fields", [False, True])
@pytest.mark.parametrize("split", [1, 2, 16])
def test_every_form_of_the_kernel(bits, left, fields, split):
    """Whole, in parts of two blocks and one, and in as many parts as there are blocks."""
    w = weight(24, 768, bits, 64, affine=True)
    x = torch.randn(9, 768).to(HALF)
    bias = torch.randn(24).to(HALF)
    config = Config(block_m=16, block_n=16, block_k=256, left=left, fields=fields, split_k=split)
    got = run(w, x, "exec", bias=bias, config=config)
    assert error(got, x.double() @ w.meaning.T + bias.double()) <= TOLERANCE[HALF]
    if split == 2:
        assert torch.equal(got, run(w, x, "exec", bias=bias, config=config))


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize(("m", "group", "slots", "rows"), [(1, 32, 8, 1), (1, 64, 4, 2), (3, 64, 4, 4), (8, 128, 2, 8)])
def test_few_rows_are_laid_out_in_slots(m, group, slots, rows, affine):
    """One column for each row and group of a tile; groups of 64 and 256 k are 4 slots, so two rows fill 8 columns."""
    w = weight(40, 512, 4, group, affine)
    config = Config(block_m=8, block_n=16, block_k=256, split_k=1)
    found = form_of(check_weight(w.qdata, w.scale, w.shift, 512, 4, group, "exec"), config, m)
    assert (found.scale, found.slots, found.block_m) == ("after", slots, rows)
    x = torch.randn(m, 512).to(HALF)
    assert error(run(w, x, "exec", config=config), x.double() @ w.meaning.T) <= 5e-4  # weights are not rounded


def test_long_sum():
    # The order of 4096 fp32 additions costs sqrt(K) ulp: 5e-6 is the bound of such a sum, not of the kernel.
    w = weight(16, 4096, 4, 128)
    x = torch.randn(2, 4096)
    assert error(run(w, x, "exec"), x.double() @ w.meaning.T) <= 5e-6


@pytest.mark.parametrize("scale_dtype", [HALF, torch.bfloat16])
def test_scale_dtypes(scale_dtype):
    if scale_dtype == torch.bfloat16:
        pytest.skip("the interpreter's bf16 loads are not to be trusted; compiled and GPU tests cover it")
    w = weight(16, 64, 4, 32, affine=True, scale_dtype=scale_dtype)
    x = torch.randn(2, 64)
    assert error(run(w, x), x.double() @ w.meaning.T) <= TOLERANCE[FULL]


def test_strided_inputs():
    w = weight(24, 96, 4, 32)
    base = torch.randn(96, 14).to(HALF)
    x = base.T[::2]
    assert error(run(w, x), x.double() @ w.meaning.T) <= TOLERANCE[HALF]
    cube = torch.randn(2, 3, 96).to(HALF).transpose(0, 1)
    assert error(run(w, cube), cube.double() @ w.meaning.T) <= TOLERANCE[HALF]
    w.scale = torch.stack([w.scale, w.scale], -1)[..., 0]
    assert error(run(w, x), x.double() @ w.meaning.T) <= TOLERANCE[HALF]


def test_misaligned_storage():
    w = weight(8, 128, 4, 64)
    odd = torch.empty(w.qdata.numel() + 1, dtype=torch.uint8)[1:].view(w.qdata.shape)
    odd.copy_(w.qdata)
    x = torch.randn(3 * 128 + 1)[1:].view(3, 128)
    want = x.double() @ w.meaning.T
    got = wq_gemm(x, to_exec_layout(odd, 4, inplace=True), w.scale, bits=4, layout="exec")
    assert error(got, want) <= TOLERANCE[FULL]


@pytest.mark.parametrize("order", ["group major", "every other", "one for all rows"])
def test_strides_of_scales(order):
    """Scale and shift with any strides, each with its own, in every kernel."""
    w = weight(24, 128, 4, 32, affine=True, experts=2)
    if order == "one for all rows":
        w.meaning += ((w.shift - w.shift[:, :1]).double()).repeat_interleave(32, -1)
        w.shift = w.shift[:, :1].expand_as(w.shift)
    elif order == "every other":
        w.scale = torch.stack([w.scale, torch.rand_like(w.scale)], -1)[..., 0]
        w.shift = torch.stack([torch.rand_like(w.shift), w.shift])[1]
    else:
        w.scale = group_major(w.scale)
    common, weights = {"bits": 4, "group_size": 32}, (w.qdata, w.scale, w.shift)
    x, grad = torch.randn(5, 128), torch.randn(5, 24)
    for expert in range(2):
        one = [part[expert] for part in weights]
        assert error(wq_gemm(x, *one, **common), x.double() @ w.meaning[expert].T) <= TOLERANCE[FULL]
        assert error(wq_gemm_dx(grad, *one, **common), grad.double() @ w.meaning[expert]) <= TOLERANCE[FULL]
        assert error(wq_dequant(*one, dtype=FULL, **common), w.meaning[expert]) <= TOLERANCE[FULL]
    offsets, both = torch.tensor([0, 2, 5]), [slice(0, 2), slice(2, 5)]
    want = torch.cat([x[rows].double() @ w.meaning[e].T for e, rows in enumerate(both)])
    assert error(wq_gemm_grouped(x, offsets, *weights, **common), want) <= TOLERANCE[FULL]
    want = torch.cat([grad[rows].double() @ w.meaning[e] for e, rows in enumerate(both)])
    assert error(wq_gemm_dx(grad, *weights, offsets=offsets, **common), want) <= TOLERANCE[FULL]


@pytest.mark.parametrize("order", ["pairs", "odd rows", "odd address", "odd stride", "overlapping"])
def test_pairs_of_half_precision_scales(order):
    """Scales of two bytes are loaded as words of two rows, where their memory allows it."""
    n = 23 if order == "odd rows" else 24
    w = weight(n, 256, 4, 64, affine=True, scale_dtype=HALF)
    w.scale, w.shift = group_major(w.scale), group_major(w.shift)
    if order == "odd address":
        flat = torch.empty(n * 4 + 1, dtype=HALF)
        w.scale = flat[1:].view(4, n).copy_(w.scale.T).T
    elif order == "odd stride":
        w.shift = torch.empty(4, n + 1, dtype=HALF)[:, :n].copy_(w.shift.T).T
    elif order == "overlapping":
        row = torch.rand(n + 3).to(HALF) / 16
        before, w.scale = w.scale, row.as_strided((n, 4), (1, 1))
        ratio = (w.scale.double() / before.double()).repeat_interleave(64, -1)
        shift = w.shift.double().repeat_interleave(64, -1)
        w.meaning = (w.meaning + shift) * ratio - shift
    found = check_weight(w.qdata, w.scale, w.shift, 256, 4, 64, "plain")
    assert found.has_pairs() == (order == "pairs")
    common = {"bits": 4, "group_size": 64}
    for config in (
        None,
        Config(block_m=16, block_n=16, block_k=64),
        Config(block_m=32, block_n=16, block_k=64, num_stages=1),
    ):
        x, grad = torch.randn(3, 256).to(HALF), torch.randn(3, n).to(HALF)
        got = wq_gemm(x, w.qdata, w.scale, w.shift, config=config, **common)
        assert error(got, x.double() @ w.meaning.T) <= TOLERANCE[HALF]
    got = wq_gemm_dx(grad, w.qdata, w.scale, w.shift, **common)
    assert error(got, grad.double() @ w.meaning) <= TOLERANCE[HALF]
    assert error(wq_dequant(w.qdata, w.scale, w.shift, dtype=FULL, **common), w.meaning) <= TOLERANCE[FULL]


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64)])
def test_no_rows_are_named(shape):
    w = weight(8, 64, 4, 32)
    message = rf"found \({', '.join(map(str, shape))}\), expected at least one row"
    with pytest.raises(ValueError, match=r"x.shape: " + message):
        run(w, torch.randn(*shape))
    with pytest.raises(ValueError, match=r"dy.shape: found .* expected at least one row"):
        wq_gemm_dx(torch.randn(*shape[:-1], 8), w.qdata, w.scale, bits=4)
    experts = weight(8, 64, 4, 32, experts=2)
    with pytest.raises(ValueError, match=r"x.shape: found \(0, 64\), expected at least one row"):
        wq_gemm_grouped(torch.randn(0, 64), torch.zeros(3, dtype=torch.int32), experts.qdata, experts.scale, bits=4)


def test_out_buffer():
    w = weight(8, 64, 8)
    x, out = torch.randn(2, 64), torch.empty(2, 8)
    assert run(w, x, out=out) is out
    assert error(out, x.double() @ w.meaning.T) <= TOLERANCE[FULL]


@pytest.mark.parametrize("dtype", [FULL, HALF])
@pytest.mark.parametrize(("bits", "k", "group"), [(2, 256, 64), (4, 128, 32), (4, 101, 20), (8, 70, None)])
@pytest.mark.parametrize("layout", ["plain", "exec"])
def test_dequant(bits, k, group, layout, dtype):
    w = weight(19, k, bits, group, affine=True)
    qdata = to_exec_layout(w.qdata, bits, k) if layout == "exec" else w.qdata
    out = torch.empty(19, k, dtype=dtype)
    got = wq_dequant(
        qdata, w.scale, w.shift, bits=bits, k=k, group_size=group, layout=layout, dtype=dtype, out=out
    )  # fmt: skip
    assert got is out
    assert error(got, w.meaning) <= (1e-6 if dtype == FULL else 5e-4)


@pytest.mark.parametrize("fp8", FP8)
def test_every_float8_code(fp8):
    codes = torch.arange(256, dtype=torch.uint8).view(1, 256)
    got = wq_dequant(codes.view(fp8), torch.ones(1, 1), bits=8, dtype=FULL)
    want = codes.view(fp8).float()
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(0, 1e9, -1e9), want.nan_to_num(0, 1e9, -1e9))


@pytest.mark.parametrize("dtype", [FULL, HALF])
@pytest.mark.parametrize(
    ("bits", "group", "layout"), [(2, 64, "exec"), (4, 32, "exec"), (4, None, "plain"), (8, None, "plain")]
)
def test_gradient(bits, group, layout, dtype):
    w = weight(50, 256, bits, group, affine=True)
    dy = torch.randn(7, 50).to(dtype)
    qdata = to_exec_layout(w.qdata, bits) if layout == "exec" else w.qdata
    got = wq_gemm_dx(dy, qdata, w.scale, w.shift, bits=bits, group_size=group, layout=layout)
    assert error(got, dy.double() @ w.meaning) <= TOLERANCE[dtype]


def test_gradient_float8_and_ragged():
    w = weight(37, 90, 8, fp8=FP8[0])
    dy = torch.randn(40, 37).T.contiguous().T
    assert error(wq_gemm_dx(dy, w.qdata, w.scale, bits=8), dy.double() @ w.meaning) <= TOLERANCE[FULL]


@pytest.mark.parametrize("counts", [[3, 0, 40, 1], [0, 0, 0, 5], [33, 32, 31, 0]])
@pytest.mark.parametrize(("bits", "layout"), [(4, "exec"), (8, "plain")])
def test_experts(counts, bits, layout):
    w = weight(24, 128, bits, 64, affine=True, experts=4)
    ends = torch.tensor([0, *counts]).cumsum(0)
    x, bias = torch.randn(int(ends[-1]), 128), torch.randn(4, 24)
    qdata = to_exec_layout(w.qdata, bits) if layout == "exec" else w.qdata
    common = {"bits": bits, "group_size": 64, "layout": layout}
    got = wq_gemm_grouped(x, ends.int(), qdata, w.scale, w.shift, bias, **common)
    owner = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))
    want = torch.einsum("tk,tnk->tn", x.double(), w.meaning[owner]) + bias.double()[owner]
    assert error(got, want) <= TOLERANCE[FULL]
    dx = wq_gemm_dx(got, qdata, w.scale, w.shift, offsets=ends, **common)
    assert error(dx, torch.einsum("tn,tnk->tk", got.double(), w.meaning[owner])) <= TOLERANCE[FULL]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(2, 60)}, "qdata.shape"),
        ({"x": torch.randn(2, 64).double()}, "x.dtype"),
        ({"x": torch.tensor(1.0)}, "K"),
        ({"bits": 9}, "bits: found 9"),
        ({"bits": 3}, r"qdata.shape: found \(8, 32\), expected \(8, 24\)"),
        ({"layout": "tiles"}, "layout: found 'tiles'"),
        ({"group_size": 16}, "scale.shape"),
        ({"group_size": -32}, "group_size: found -32"),
        ({"scale": torch.ones(8, 3)}, "group_size"),
        ({"scale": torch.ones(7, 2)}, r"scale.shape: found \(7, 2\), expected \(8, 2\)"),
        ({"scale": torch.ones(8, 2, dtype=torch.int32)}, "scale.dtype"),
        ({"shift": torch.ones(8, 1)}, "shift.shape"),
        ({"bias": torch.ones(9)}, r"bias.shape: found \(9,\), expected \(8,\)"),
        ({"qdata": torch.zeros(8, 32, dtype=torch.int8)}, "qdata.dtype"),
        ({"out": torch.zeros(2, 9)}, "out.shape"),
        ({"out": torch.zeros(8, 2).T}, "out.stride"),
        ({"scale": torch.ones(8, 2, device="meta")}, "scale.device: found meta, expected cpu"),
    ],
)
def test_bad_input_is_named(change, message):
    w = weight(8, 64, 4, 32)
    good = {"x": torch.randn(2, 64), "qdata": w.qdata, "scale": w.scale, "bits": 4}
    with pytest.raises(ValueError, match=message):
        wq_gemm(**(good | change))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q, s, o: wq_dequant(q[0], s[0], bits=0), "bits: found 0, expected a whole number, 1 to 8"),
        (lambda q, s, o: wq_dequant(q[0], s[0], bits=4, dtype=torch.float64), "dtype: found torch.float64"),
        (lambda q, s, o: wq_dequant(q[0], s[0, :1], bits=4), r"scale.shape: found \(1, 2\), expected \(8, 2\)"),
        (lambda q, s, o: wq_dequant(q[0], s[0], bits=4, out=torch.ones(8, 60)), r"out.shape: found \(8, 60\)"),
        (lambda q, s, o: wq_dequant(q[0], s[0].to("meta"), bits=4), "scale.device: found meta, expected cpu"),
        (lambda q, s, o: wq_gemm_dx(torch.ones(2, 7), q[0], s[0], bits=4), r"dy.shape: found \(2, 7\), expected \(..., 8\)"),
        (lambda q, s, o: wq_gemm_dx(torch.ones(2, 8).int(), q[0], s[0], bits=4), "dy.dtype: found torch.int32"),
        (lambda q, s, o: wq_gemm_dx(torch.ones(2, 8), q, s, bits=4), r"qdata.shape: .* together with offsets"),
        (lambda q, s, o: wq_gemm_dx(torch.ones(2, 8), q, s, bits=4, offsets=o[:2]), r"offsets.shape: .* expected \(4,\)"),
        (lambda q, s, o: wq_gemm_grouped(torch.ones(2, 60), o, q, s, bits=4), r"qdata.shape: found \(3, 8, 32\)"),
        (lambda q, s, o: wq_gemm_grouped(torch.ones(2, 64), o.float(), q, s, bits=4), "offsets.dtype: found torch.float32"),
        (lambda q, s, o: wq_gemm_grouped(torch.ones(2, 64), o[::2], q, s, bits=4), "offsets.shape"),
        (lambda q, s, o: wq_gemm_grouped(torch.ones(2, 64), o, q, s, bits=4, group_size=16), "scale.shape"),
        (lambda q, s, o: wq_gemm_grouped(torch.ones(2, 64), o, q, s, None, torch.ones(8), bits=4), "bias.shape"),
        (lambda q, s, o: to_exec_layout(q.int(), 4), "qdata.dtype"),
        (lambda q, s, o: to_exec_layout(q, 4, 80), "qdata.shape"),
    ],
)  # fmt: skip
def test_bad_input_of_the_other_kernels_is_named(call, message):
    w = weight(8, 64, 4, 32, experts=3)
    with pytest.raises(ValueError, match=message):
        call(w.qdata, w.scale, torch.tensor([0, 0, 1, 2], dtype=torch.int32))
