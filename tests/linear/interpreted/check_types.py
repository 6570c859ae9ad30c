"""Every type on the GPU's part of the table in Triton's interpreter, against float64; without bf16, which is wrong there."""

import random

import pytest
import torch
from gpu_stand_in import take_for_a_gpu
from reference import TOLERANCE, error

import requanto
from requanto.dtypes.qtypes import qint8, qtypes
from requanto.linear import grouped_linear, linear, registry
from requanto.linear.gpu import layout, paths
from requanto.linear.prepack import prepare
from requanto.tensor.qtensor import QTensor

HALF, FULL = torch.float16, torch.float32
KINDS = [kind.name for kind in dict.fromkeys(qtypes.values())]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """The table with the GPU's entries first, which take the CPU for their device."""
    take_for_a_gpu(monkeypatch)
    torch.manual_seed(0)


def chosen(q, x, activation=None):
    return registry.choose(registry.problem_of(q, x.dtype, x.shape[0], activation)).implementation.name


@pytest.mark.parametrize("kind", KINDS)
def test_every_type(kind):
    """Packed where it can be, transposed or not, in a dtype drawn anew."""
    pick = random.Random(f"{kind} {random.random()}").choice
    dtype, transposed, k, group = pick([FULL, HALF]), pick([False, True]), pick([77, 256]), pick([32, None, "default"])
    if qtypes[kind].blocks is not None:
        group = "default"
    values = torch.randn(k, 24) if transposed else torch.randn(24, k)
    q = QTensor.quantize(values.to(dtype), kind, group_size=group, transposed=transposed)
    q = q.view_of_storage(transposed=False) if transposed else q  # as x @ W.T, whose rows are the stored ones
    say, meaning = f"{dtype=} {transposed=} {k=} {group=}", q.dequantize(torch.float64)
    x, dy, bias = torch.randn(3, k).to(dtype), torch.randn(3, 24).to(dtype), torch.randn(24)
    assert chosen(q, x) == "triton-wq"
    for packed in (False, True):
        if packed:
            if not layout.fits(q):
                assert q.qtype.bits not in (2, 3, 4) or k == 77
                continue
            q.pack(layout.EXEC)
        for run in (paths.run_wq, paths.run_dequantized):
            assert error(run(x, q, bias), x.double() @ meaning.T + bias.double()) <= TOLERANCE[dtype], say
            assert error(run(dy, q.t(), None), dy.double() @ meaning) <= TOLERANCE[dtype], say


@pytest.mark.parametrize("kind", KINDS)
def test_a_dequantized_weight_is_the_one_of_torch(kind):
    """Bit for bit in float32 where nothing is subtracted; else to the rounding of the last step."""
    q = QTensor.quantize(torch.randn(9, 96), kind)
    got, want = paths._dequantized_rows(q, 2, 9, FULL), q.dequantize()[2:]
    assert torch.equal(got, want) if q.shift is None else error(got, want.double()) <= 1e-6


@pytest.mark.parametrize("stored", [FULL, HALF, torch.bfloat16])
def test_a_learned_codebook_in_any_dtype(stored):
    q = QTensor.quantize(torch.randn(16, 128).to(HALF), "codebook4")
    q.set_inner({**q.inner_tensors(), "codebook": q.codebook.to(stored)})
    x = torch.randn(2, 128)
    for _ in range(2):
        want = x.double() @ q.dequantize(torch.float64).T
        assert error(paths.run_wq(x, q, None), want) <= TOLERANCE[FULL]
        q.pack(layout.EXEC)
    other = QTensor.quantize(torch.randn(16, 128) ** 3, "codebook4")  # one type, other values
    assert error(paths.run_wq(x, other, None), x.double() @ other.dequantize(torch.float64).T) <= TOLERANCE[FULL]


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("int3", {"scale_bits": 6}), ("uint8", {"zero_point": "integer", "group_size": 32}), ("uint1", {}),
        ("int5", {"symmetric": True}), ("nf4", {"rotation": 64, "column_scale": "root"}), ("nf4", {"scale_bits": 8}),
    ],
)  # fmt: skip
def test_scales_of_few_bits_columns_and_rotations(kind, how):
    q = QTensor.quantize(torch.randn(24, 256), kind, **how)
    x = torch.randn(3, 256)
    want = x.double() @ q.dequantize(torch.float32).double().T
    for _ in range(2):
        assert error(linear(x, q), want) <= 1e-5
        if layout.fits(q):
            q.pack(layout.EXEC)


@pytest.mark.parametrize("kind", ["nf4", "codebook3", "int3", "uint8", "mxfp6"])
def test_experts_and_gradients(kind):
    q = QTensor.quantize(torch.randn(3, 24, 256), kind)
    w = q.dequantize(torch.float64)
    ends, owner = torch.tensor([2, 2, 6], dtype=torch.int32), torch.tensor([0, 0, 2, 2, 2, 2])
    for packed in (False, True):
        if packed and layout.fits(q):
            q.pack(layout.EXEC)
        x = torch.randn(7, 256, requires_grad=True)  # one row more than the experts have
        got = grouped_linear(x, q, ends)
        assert registry.choose(registry.problem_of(q, FULL, 7), grouped=True).implementation.name == "triton-wq"
        assert error(got[:6], torch.einsum("tk,tnk->tn", x[:6].double(), w[owner])) <= TOLERANCE[FULL]
        assert not got[6:].any()
        dy = torch.randn_like(got)
        got.backward(dy)
        assert error(x.grad[:6], torch.einsum("tn,tnk->tk", dy[:6].double(), w[owner])) <= TOLERANCE[FULL]


@pytest.mark.parametrize(
    ("kind", "name"), [("int3", "triton-w4a8"), ("uint8", "triton-rounded"), ("nf4", "triton-rounded")]
)
def test_int8_activations(kind, name):
    q, x = QTensor.quantize(torch.randn(24, 256), kind, group_size=64), torch.randn(5, 256)
    step = x.double().abs().amax(1, keepdim=True) / 127
    assert chosen(q, x, qint8) == name
    want = (x.double() / step).round() * step @ q.dequantize(torch.float64).T
    assert error(linear(x, q, activation=qint8), want) <= 1e-5


def test_training_an_adapter_over_nf4_and_explain():
    base = torch.nn.Linear(256, 32)
    q = QTensor.quantize(base.weight.detach(), "nf4")
    base.weight = torch.nn.Parameter(q, requires_grad=False)
    model = torch.nn.Sequential(base)
    assert requanto.explain(model, rows=1)[0].implementation == "triton-wq"
    assert requanto.explain(model, rows=5000)[0].implementation == "triton-dequantize"
    assert prepare(model, smallest=0) == {"0.weight": "exec"}
    x = torch.randn(4, 256, requires_grad=True)
    out = base(x)
    dy = torch.randn_like(out)
    out.backward(dy)
    assert error(x.grad, dy.double() @ q.dequantize(torch.float64)) <= TOLERANCE[FULL]
    assert base.weight.is_packed
    stored = torch.nn.Linear(256, 32)
    stored.weight = torch.nn.Parameter(QTensor.quantize(torch.randn(32, 256), "nf4"), requires_grad=False)
    stored.load_state_dict(base.state_dict())
    assert torch.equal(stored.weight.dequantize(), q.dequantize())
