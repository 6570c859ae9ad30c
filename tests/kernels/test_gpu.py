"""Every kernel on a real device against float64, bf16 included, and under CUDA graph capture."""

import sys

import pytest
import torch

pytest.importorskip("triton")
from reference import FP8, TOLERANCE, check_equal_groups, decode_fp8, draw, error, weight

from requanto_kernels import (
    Config,
    from_exec_layout,
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
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device"),
]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: On a device fp32 sums are ordered by tiles and splits: sqrt(K) ulp for the K of 1024 used here.
BOUND = TOLERANCE | {torch.float32: 5e-6}


def put(w):
    return to_exec_layout(w.qdata, w.bits)


FORMS = ((2, 64), (2, None), (4, 32), (4, 128), (4, None), (8, None), (8, 128))
#: Each is several compilations a number of rows: everything in bf16, the rest once each.
COMBINATIONS = [
    *((form, affine, "exec", torch.bfloat16) for form in FORMS for affine in (False, True)),
    *((form, True, "exec", torch.float16) for form in FORMS),
    *((form, False, "exec", torch.float32) for form in FORMS),
    *((form, True, "plain", torch.bfloat16) for form in FORMS if form[0] < 8),
]


@pytest.mark.parametrize(("form", "affine", "layout", "dtype"), COMBINATIONS)
def test_wq_gemm_and_gradient(form, affine, layout, dtype):
    bits, group = form
    w = weight(520, 1024, bits, group, affine, device="cuda", scale_dtype=dtype)
    qdata = put(w) if layout == "exec" else w.qdata
    common = {"bits": bits, "group_size": group, "layout": layout}
    for m in (1, 16, 33, 100, 300):  # one for each family, and the program for a single row
        x = torch.randn(m, 1024, device="cuda", dtype=dtype)
        bias = torch.randn(520, device="cuda", dtype=dtype)
        got = wq_gemm(x, qdata, w.scale, w.shift, bias, **common)
        assert error(got, x.double() @ w.meaning.T + bias.double()) <= BOUND[dtype], m
        assert torch.equal(got, wq_gemm(x, qdata, w.scale, w.shift, bias, **common))
        if m in (1, 300):
            dx = wq_gemm_dx(got, qdata, w.scale, w.shift, **common)
            assert error(dx, got.double() @ w.meaning) <= BOUND[dtype], m
    whole = wq_dequant(qdata, w.scale, w.shift, dtype=dtype, **common)
    assert error(whole, w.meaning) <= BOUND[dtype]


#: Kinds of `draw`: each is some compilations, so most run once, in bf16.
KINDS = [
    *(("3", affine, layout, torch.bfloat16) for affine, layout in ((True, "plain"), (True, "exec"), (False, "exec"))),
    *((kind, True, "plain", torch.bfloat16) for kind in ("1", "5", "6", "7", "u8")),
    *((kind, False, "plain", torch.bfloat16) for kind in ("table3", "table4", "e3m2", "e2m2")),
    *((kind, False, "exec", torch.bfloat16) for kind in ("table2", "table3", "table4", "e3m0")),
    *((kind, kind == "3", "exec", dtype) for kind in ("3", "table4") for dtype in (torch.float16, torch.float32)),
]


@pytest.mark.parametrize(("kind", "affine", "layout", "dtype"), KINDS)
def test_other_widths_and_codebooks(kind, affine, layout, dtype):
    for group, k, scale_dtype in ((64, 1024, dtype), (None, 1003, torch.float32)):
        w = draw(kind, affine, 264, k, group, device="cuda", scale_dtype=scale_dtype)
        how = w.what | {"layout": layout}
        qdata = to_exec_layout(w.qdata, w.bits, k) if layout == "exec" else w.qdata
        whole = wq_dequant(qdata, w.scale, w.shift, k=k, dtype=dtype, **how)
        assert error(whole, w.meaning) <= BOUND[dtype]
        for m in (1, 100) if group else (7,):
            x = torch.randn(m, k, device="cuda", dtype=dtype)
            assert error(wq_gemm(x, qdata, w.scale, w.shift, **how), x.double() @ w.meaning.T) <= BOUND[dtype], m
    dy = torch.randn(40, 264, device="cuda", dtype=dtype)
    assert error(wq_gemm_dx(dy, qdata, w.scale, w.shift, k=k, **how), dy.double() @ w.meaning) <= BOUND[dtype]


@pytest.mark.parametrize("kind", ["3", "4", "u8"])
def test_rows_beyond_two_gigabytes(kind):
    w = draw(kind, True, 3, 256, 64, device="cuda")
    stride = (2**31 + 4096) // 2
    codes = torch.empty(2 * stride + 256, dtype=torch.uint8, device="cuda").as_strided(w.qdata.shape, (stride, 1))
    codes.copy_(w.qdata)
    assert error(wq_dequant(codes, w.scale, w.shift, k=256, dtype=torch.float32, **w.what), w.meaning) <= 1e-6
    x = torch.randn(2, 256, device="cuda")
    assert error(wq_gemm(x, codes, w.scale, w.shift, **w.what), x.double() @ w.meaning.T) <= BOUND[torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fp8", FP8)
@pytest.mark.parametrize("m", [1, 300])
def test_float8_weights(fp8, m, dtype):
    w = weight(264, 1024, 8, None, fp8=fp8, device="cuda")
    x = torch.randn(m, 1024, device="cuda", dtype=dtype)
    assert error(wq_gemm(x, w.qdata, w.scale, bits=8), x.double() @ w.meaning.T) <= BOUND[dtype]


@pytest.mark.parametrize("m", [1, 16, 70, 1024])
@pytest.mark.parametrize("dtype", [torch.int8, FP8[0], FP8[2]])
def test_quantize_and_multiply(dtype, m):
    x = torch.randn(m, 1024, device="cuda", dtype=torch.bfloat16)
    codes, xs = quant_rows(x, dtype)
    limit = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    assert torch.allclose(xs, x.float().abs().amax(1) / limit, rtol=1e-6)
    w, ws = quant_rows(torch.randn(520, 1024, device="cuda"), dtype)
    value = (lambda t: t.double()) if dtype == torch.int8 else (lambda t: decode_fp8(t.cpu()).cuda())
    want = xs.double()[:, None] * ws.double() * (value(codes) @ value(w).T)
    assert error(scaled_mm(codes, w, xs, ws), want) <= BOUND[torch.bfloat16]


@pytest.mark.parametrize(
    ("bits", "group", "affine", "layout"),
    [
        (4, None, False, "exec"), (4, None, True, "exec"), (4, 128, False, "exec"), (4, 64, True, "exec"),
        (4, 32, True, "exec"), (4, 32, False, "plain"), (3, 256, True, "exec"), (2, 64, True, "exec"),
        (2, None, False, "plain"), (1, 64, False, "plain"), (6, 64, True, "plain"), (8, 128, False, "plain"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("m", [1, 400])
def test_int8_activations(bits, group, affine, layout, m):
    w = weight(520, 1024, bits, group, affine, device="cuda", scale_dtype=torch.bfloat16)
    codes, xs = quant_rows(torch.randn(m, 1024, device="cuda"))
    qdata = put(w) if layout == "exec" else w.qdata
    scale, shift = group_major(w.scale), None if w.shift is None else group_major(w.shift)
    got = w4a8_gemm(codes, xs, qdata, scale, shift, bits=bits, layout=layout, out_dtype=torch.float32)
    assert error(got, (codes.double() * xs.double()[:, None]) @ w.meaning.T) <= BOUND[torch.float32]


@pytest.mark.parametrize("m", [17, 300])
def test_the_librarys_int8_gemm_and_splits_agree_bit_for_bit(m):
    (x, xs), (w, ws) = (quant_rows(torch.randn(rows, 2048, device="cuda")) for rows in (m, 520))
    bias = torch.randn(520, device="cuda")
    want = int_mm(x, w, xs, ws, bias, out_dtype=torch.float32)
    assert torch.equal(scaled_mm(x, w, xs, ws, bias, out_dtype=torch.float32), want)
    for split in (1, 2, 8):
        config = Config(16, 64, 128, split_k=split)
        for _ in range(3):  # the counters are zeros again
            assert torch.equal(scaled_mm(x, w, xs, ws, bias, out_dtype=torch.float32, config=config), want)


@pytest.mark.parametrize("dtype", [torch.int8, *FP8])
def test_codes_are_those_of_a_cpu(dtype):
    x, column = torch.randn(40, 1030, device="cuda", dtype=torch.bfloat16), torch.rand(1030, device="cuda")
    kind = {FP8[0]: "qfloat8_e4m3fn", FP8[1]: "qfloat8_e4m3fnuz", FP8[2]: "qfloat8_e5m2"}.get(dtype, "qint8")
    activations = pytest.importorskip("requanto.linear.activations")
    types = pytest.importorskip("requanto.dtypes.qtypes").qtypes
    for static in (None, torch.tensor(0.02)):
        codes, scale = quant_rows(x, dtype, column=column, static_scale=None if static is None else static.cuda())
        scaled = (x * column.to(x.dtype)).cpu()
        want, want_scale = activations.quantize_activations(scaled, types[kind], static)
        found = codes.cpu().double() if dtype == torch.int8 else decode_fp8(codes.cpu())
        assert torch.equal(found, want.double())
        assert torch.equal(scale.cpu(), want_scale[:, 0].expand(40))


@pytest.mark.parametrize("dtype", DTYPES)
def test_experts(dtype):
    w = weight(256, 512, 4, 128, True, experts=6, device="cuda")
    counts = torch.tensor([0, 70, 1, 0, 33, 16])
    offsets = torch.tensor([0, *counts.tolist()]).cumsum(0).cuda()
    owner = torch.repeat_interleave(torch.arange(6), counts).cuda()
    x = torch.randn(int(counts.sum()), 512, device="cuda", dtype=dtype)
    got = wq_gemm_grouped(x, offsets, put(w), w.scale, w.shift, bits=4, layout="exec")
    assert error(got, torch.einsum("tk,tnk->tn", x.double(), w.meaning[owner])) <= BOUND[dtype]
    dx = wq_gemm_dx(got, put(w), w.scale, w.shift, bits=4, layout="exec", offsets=offsets)
    assert error(dx, torch.einsum("tn,tnk->tk", got.double(), w.meaning[owner])) <= BOUND[dtype]


@pytest.mark.parametrize("scale_dtype", ["its own", torch.float32])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_groups_of_equal_weights(form, dtype, scale_dtype):
    """Products with ones and zeros give the weight as each kernel rebuilt it."""
    bits, group = form
    scale_dtype = dtype if scale_dtype == "its own" else scale_dtype
    w = weight(264, 1024, bits, group, True, device="cuda", scale_dtype=scale_dtype, equal=0.5)
    common = {"bits": bits, "group_size": group, "layout": "exec"}
    ones = torch.eye(1024, device="cuda", dtype=dtype)
    for m in (16, 64, 1024):
        got = torch.cat([wq_gemm(x, put(w), w.scale, w.shift, **common) for x in ones.split(m)])
        check_equal_groups(got.T, w, BOUND[dtype])
    dy = torch.eye(264, device="cuda", dtype=dtype)
    check_equal_groups(wq_gemm_dx(dy, put(w), w.scale, w.shift, **common), w, BOUND[dtype])
    check_equal_groups(wq_dequant(put(w), w.scale, w.shift, dtype=dtype, **common), w, BOUND[dtype])
    x = torch.eye(1024, device="cuda", dtype=torch.int8)
    got = w4a8_gemm(x, torch.ones(1024, device="cuda"), put(w), w.scale, w.shift, out_dtype=dtype, **common)
    check_equal_groups(got.T, w, BOUND[dtype])


def test_layout_on_the_device():
    stored = torch.randint(0, 256, (4096, 2048), dtype=torch.uint8, device="cuda")
    moved = to_exec_layout(stored.clone(), 4, inplace=True)
    assert torch.equal(moved.cpu(), to_exec_layout(stored.cpu(), 4))
    assert torch.equal(from_exec_layout(moved, 4, inplace=True), stored)


@pytest.mark.parametrize("m", [1, 512])
def test_graph_capture(m):
    w = weight(512, 1024, 4, 128, device="cuda")
    q8, ws = quant_rows(torch.randn(512, 1024, device="cuda"))
    qdata = put(w)
    x = torch.randn(m, 1024, device="cuda", dtype=torch.bfloat16)

    def step():
        codes, xs = quant_rows(x)
        return (
            wq_gemm(x, qdata, w.scale, bits=4, layout="exec"),
            scaled_mm(codes, q8, xs, ws),
            w4a8_gemm(codes, xs, qdata, w.scale, layout="exec"),
        )

    step()  # compiles, which a capture must not
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.cuda.synchronize()
    for got, want in zip(captured, step(), strict=True):
        assert torch.equal(got, want)


def test_two_devices_are_named():
    with pytest.raises(ValueError, match=r"scale\.device: found cpu, expected cuda"):
        wq_gemm(
            torch.ones(1, 8, device="cuda"), torch.zeros(2, 4, dtype=torch.uint8, device="cuda"), torch.ones(2, 1), bits=4
        )  # fmt: skip


def test_tuning_times_tiles_and_keeps_the_best(tmp_path, monkeypatch):
    from requanto_kernels import config, tune

    monkeypatch.setenv("REQUANTO_CACHE", str(tmp_path))
    module = sys.modules["requanto_kernels.tune"]  # the package's `tune` is the function
    every = module.candidates
    monkeypatch.setattr(module, "candidates", lambda *what: every(*what)[:2])
    monkeypatch.setattr(module, "neighbours", lambda config, *what: [])
    lines = []
    for op, group in (("wq_gemm", 128), ("scaled_mm", None), ("w4a8_gemm", 128)):
        bits = 8 if op == "scaled_mm" else 4
        winners = tune([(256, 512)], op=op, bits=bits, group_size=group, rows=(1, 300), repeats=3, report=lines.append)
        assert len(winners) == 2, lines
    assert len(config.user_entries()) == 6
