"""`wq_gemm_many` in Triton's interpreter, against float64 and against one `wq_gemm` for each weight."""

import random

import pytest
import torch
from reference import TOLERANCE, error, weight

from requanto_kernels import Config, group_major, to_exec_layout, wq_gemm, wq_gemm_many
from requanto_kernels._plan import record

TYPES = [
    (4, 64, True), (4, 128, False), (8, None, False), (8, 64, True), (2, 32, True), (3, 64, False), (5, 32, True),
]  # fmt: skip


def parts(w, layout, grouped):
    scales = [group_major(one) if grouped and one is not None else one for one in (w.scale, w.shift)]
    return (to_exec_layout(w.qdata, w.bits) if layout == "exec" else w.qdata, *scales)


@pytest.mark.parametrize(("bits", "group", "affine"), TYPES)
def test_unlike_sizes(bits, group, affine):
    chosen = random.Random(bits)
    dtype = torch.float32 if bits in (3, 8) else torch.float16
    sizes = [(40, 70), (64, 24, 65), (10, 64, 1, 10), (1, 80)][bits % 4]
    layout, grouped = chosen.choice(["plain", "exec"]), chosen.random() < 0.5
    k, m = 256 if bits < 4 else 128, chosen.choice([1, 5])
    ws = [weight(n, k, bits, group, affine) for n in sizes]
    stored = [parts(w, layout, grouped) for w in ws]
    how = {"bits": bits, "group_size": group, "layout": layout}
    biases = [torch.randn(w.meaning.shape[0]).to(dtype) if i % 2 == 0 else None for i, w in enumerate(ws)]
    shared = torch.randn(m, 2 * k).to(dtype)[:, ::2]
    stack = torch.randn(len(ws), m, k).to(dtype)
    forms = [
        (shared, [shared] * len(ws), {}),
        ([*stack.clone()], list(stack), {}),
        (stack, list(stack), {"stacked": True}),
    ]
    for x, xs, form in forms if bits == 4 else forms[bits % 3 :][:1]:
        outs = wq_gemm_many(x, stored, biases, **how, **form)
        want = [
            one.double() @ w.meaning.T + (0 if bias is None else bias.double()) for one, w, bias in zip(xs, ws, biases)
        ]
        assert error(torch.cat(outs, 1), torch.cat(want, 1)) <= TOLERANCE[dtype]
        assert torch.equal(outs[-1], wq_gemm(xs[-1], *stored[-1], biases[-1], **how))
        assert len({out.untyped_storage().data_ptr() for out in outs}) == len(outs)


def test_a_codebook_and_small_floats():
    table = torch.linspace(-1, 1, 16)
    ws = [weight(n, 128, 4, 32, False) for n in (33, 64)]
    x = torch.randn(2, 1, 128)
    for how in ({"codebook": table}, {"small_float": "e2m1"}):
        outs = wq_gemm_many(x, [(w.qdata, w.scale, None) for w in ws], bits=4, **how)
        for out, w in zip(outs, ws):
            assert torch.equal(out, wq_gemm(x, w.qdata, w.scale, bits=4, **how))


@pytest.mark.parametrize("splits", [2, 3])
def test_a_split_is_summed_in_the_same_launch(splits):
    ws = [weight(n, 384, 4, 64, True) for n in (33, 8)]
    stored = [parts(w, "exec", True) for w in ws]
    config = Config(block_m=16, block_n=32, block_k=128, num_stages=1, split_k=splits)
    x, bias = torch.randn(3, 384), torch.randn(8)
    for _ in range(2):
        outs = wq_gemm_many(x, stored, [None, bias], bits=4, layout="exec", config=config)
        want = [x.double() @ w.meaning.T for w in ws]
        want[1] += bias.double()
        assert error(torch.cat(outs, 1), torch.cat(want, 1)) <= TOLERANCE[torch.float32]
    again = wq_gemm_many(x, stored, [None, bias], bits=4, layout="exec", config=config)
    assert all(torch.equal(a, b) for a, b in zip(again, outs))


def test_a_plan_gives_all_results():
    ws = [weight(n, 128, 4, 64, True) for n in (24, 10)]
    stored = [(w.qdata, w.scale, w.shift) for w in ws]
    x = torch.randn(1, 128)
    with record(x=x, constants=[one for codes in stored for one in codes]) as recording:
        outs = wq_gemm_many(x, stored, bits=4)
    plan = recording.plan(outs)
    assert plan.launches == 1
    x = torch.randn(1, 128)
    got = plan(x)
    assert len(got) == 2
    assert all(torch.equal(a, b) for a, b in zip(got, wq_gemm_many(x, stored, bits=4)))


def test_what_does_not_fit_is_named():
    ws = [weight(n, 256, 4, 64, True) for n in (40, 24)]
    a, b = [(w.qdata, w.scale, w.shift) for w in ws]
    x = torch.randn(3, 256)
    other = weight(24, 256, 4, 64, True)
    for call, named in (
        (lambda: wq_gemm_many(x, [a] * 5, bits=4), "weights"),
        (lambda: wq_gemm_many(x, [], bits=4), "weights"),
        (lambda: wq_gemm_many(x, [a, b], [None], bits=4), "biases"),
        (lambda: wq_gemm_many([x] * 3, [a, b], bits=4), "x"),
        (lambda: wq_gemm_many([x, x[:2]], [a, b], bits=4), r"x\[1\]"),
        (lambda: wq_gemm_many(torch.randn(3, 3, 256), [a, b], bits=4, stacked=True), "x.shape"),
        (lambda: wq_gemm_many(torch.randn(2, 3, 512)[..., ::2], [a, b], bits=4, stacked=True), "x.stride"),
        (lambda: wq_gemm_many(x, [a, (other.qdata, other.scale.half(), other.shift)], bits=4), r"weights\[1\]"),
        (lambda: wq_gemm_many(x, [a, (b[0], group_major(b[1]), group_major(b[2]))], bits=4), r"weights\[1\]"),
        (lambda: wq_gemm_many(x, [a, (b[0], b[1], group_major(b[2]))], bits=4), r"shift"),
        (lambda: wq_gemm_many(x, [a, b], [torch.zeros(40), torch.zeros(24).half()], bits=4), "bias"),
        (lambda: wq_gemm_many(x, [a, (b[0][:, :8], b[1], b[2])], bits=4), "qdata"),
    ):
        with pytest.raises(ValueError, match=named):
            call()
