"""The GPU's part of the table in Triton's interpreter, against float64. No bf16: the interpreter's is wrong."""

import pytest
import torch
from gpu_stand_in import take_for_a_gpu
from reference import FP8, TOLERANCE, decode_fp8, error, weight

import requanto
from requanto.dtypes.qtypes import qfloat8_e4m3fn, qfloat8_e5m2, qint2, qint4, qint8, qtypes
from requanto.linear import custom_ops, grouped_linear, linear, registry
from requanto.linear.gpu import eight_bit, eight_bit_conditions, layout, paths
from requanto.linear.prepack import prepare
from requanto.tensor.qtensor import QTensor

HALF, FULL = torch.float16, torch.float32
KINDS = {2: qint2, 4: qint4, 8: qint8}


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """The table with the GPU's entries first, which take the CPU for their device."""
    take_for_a_gpu(monkeypatch, first=("torch-", "triton"))
    monkeypatch.setattr(eight_bit_conditions, "rocm_arch", lambda kind: "gfx950")
    torch.manual_seed(0)


def tensor(w, transposed=False, dtype=FULL):
    """A QTensor of a reference weight."""
    kind = KINDS[w.bits] if not w.qdata.is_floating_point() else qtypes[f"q{str(w.qdata.dtype)[6:]}"]
    shape = list(w.meaning.shape)
    if transposed:
        shape[-1], shape[-2] = shape[-2], shape[-1]
    return QTensor(
        w.qdata, w.scale, w.shift, qtype=kind, shape=shape, dtype=dtype, axis=len(shape) - 2, group_size=w.group,
        transposed=transposed,
    )  # fmt: skip


def chosen(q, x, activation=None):
    return registry.choose(registry.problem_of(q, x.dtype, x.shape[0], activation)).implementation.name


WEIGHTS = [(2, None, True), (2, 64, False), (4, 32, True), (4, 128, False), (8, None, False), (8, 64, True)]


@pytest.mark.parametrize("dtype", [FULL, HALF])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("bits", "group", "affine"), WEIGHTS)
def test_weight_only(bits, group, affine, transposed, dtype):
    w = weight(40, 256, bits, group, affine)
    matrix = w.meaning if transposed else w.meaning.T
    x, bias = torch.randn(3, matrix.shape[0]).to(dtype), torch.randn(matrix.shape[1])
    want = x.double() @ matrix + bias.double()
    for packed in (False, True):
        q = tensor(w, transposed, dtype)
        if packed:
            if not layout.fits(q):
                assert bits == 8
                continue
            q.pack(layout.EXEC)
        assert chosen(q, x) == "triton-wq"
        for run in (paths.run_wq, paths.run_dequantized):
            got = run(x, q, bias)
            assert got.dtype == dtype
            assert error(got, want) <= TOLERANCE[dtype]
        assert q.is_packed == packed


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", ["nvfp4", "mxfp4", "mxfp8_e4m3", "mxfp8_e5m2"])
def test_types_with_scales_of_8_bits(kind, transposed):
    for dtype in (FULL, HALF):
        shape = (128, 40) if transposed else (40, 128)
        q = QTensor.quantize(torch.randn(*shape).to(dtype), kind, transposed=transposed)
        x, bias = torch.randn(3, 128).to(dtype), torch.randn(40)
        if transposed:
            q = q.view_of_storage(transposed=False)
        want = x.double() @ q.dequantize(torch.float64).T + bias.double()
        for packed in (False, True):
            if packed and layout.fits(q):
                q.pack(layout.EXEC)
            assert q.is_packed == packed
            assert chosen(q, x) == "triton-wq"
            for run in (paths.run_wq, paths.run_dequantized):
                assert error(run(x, q, bias), want) <= TOLERANCE[dtype]
        back = paths.run_wq(torch.randn(2, 40).to(dtype), q.t(), None)
        assert back.shape == (2, 128)
        assert chosen(q, x, qint8) == "triton-rounded"
        assert chosen(q, x, qtypes["qnvfp4"]) == "triton-wq"


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("fp8", FP8)
def test_float8_weights(fp8, transposed):
    w = weight(33, 96, 8, None, fp8=fp8)
    matrix = w.meaning if transposed else w.meaning.T
    x = torch.randn(4, matrix.shape[0])
    assert error(paths.run_wq(x, tensor(w, transposed), None), x.double() @ matrix) <= TOLERANCE[FULL]


@pytest.mark.parametrize("transposed", [False, True])
def test_a_large_weight_is_rebuilt_in_parts(transposed, monkeypatch):
    monkeypatch.setattr(paths, "SCRATCH_BYTES", 7 * 256 * 4)
    w = weight(40, 256, 4, 64, True)
    matrix = w.meaning if transposed else w.meaning.T
    x, bias = torch.randn(5, matrix.shape[0]), torch.randn(matrix.shape[1])
    q = tensor(w, transposed)
    q.pack(layout.EXEC)
    assert error(paths.run_dequantized(x, q, bias), x.double() @ matrix + bias.double()) <= TOLERANCE[FULL]


def quantized_rows(x, limit, to_codes):
    step = x.double().abs().amax(1, keepdim=True) / limit
    return to_codes(x.double() / step) * step


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(
    ("bits", "group", "affine", "name"),
    [
        (8, None, False, "triton-scaled-mm"), (8, 64, False, "triton-w4a8"), (8, None, True, "triton-w4a8"),
        (4, 32, True, "triton-w4a8"), (4, 128, False, "triton-w4a8"), (2, None, True, "triton-w4a8"),
        (4, 48, False, "triton-rounded"),
    ],
)  # fmt: skip
def test_int8_activations(bits, group, affine, name, static):
    k = 384 if group == 48 else 256
    w = weight(40, k, bits, group, affine)
    q, x, bias = tensor(w), torch.randn(5, k), torch.randn(40)
    scale = torch.tensor(0.02) if static else None
    if static:
        codes = (x.double() / 0.02).round().clamp(-127, 127)
        rounded = torch.where((x.double() / 0.02).round() < -127, -128.0, codes) * 0.02
    else:
        rounded = quantized_rows(x, 127, torch.round)
    got = linear(x, q, bias, activation=qint8, input_scale=scale)
    assert chosen(q, x, qint8) == name
    assert error(got, rounded @ w.meaning.T + bias.double()) <= 1e-5  # a tie may fall the other way in float32
    if layout.fits(q, qint8):
        q.pack(layout.EXEC)
        again = linear(x, q, bias, activation=qint8, input_scale=scale)
        assert q.is_packed
        assert error(again, got.double()) <= 1e-6


@pytest.mark.parametrize("static", [False, True])
def test_the_vendors_int8_gemm_agrees_bit_for_bit(static):
    w = weight(40, 256, 8, scale_dtype=HALF)
    q, x, bias = tensor(w), torch.randn(18, 256), torch.randn(40)
    scale = torch.tensor(0.02) if static else None
    got = eight_bit.run_torch_int_mm(x, q, bias, qint8, scale)
    assert torch.equal(got, eight_bit.run_scaled_mm(x, q, bias, qint8, scale))
    assert torch.equal(got, linear(x, q, bias, activation=qint8, input_scale=scale))


@pytest.mark.parametrize("kind", ["int8", "int4", "nf4"])
def test_a_plan_multiplies_columns_as_a_first_call_does(kind):
    for dtype in (HALF, FULL):
        q = QTensor.quantize(torch.randn(40, 256).to(dtype), kind, column_scale=torch.rand(256) + 0.5)
        q = torch.nn.Parameter(QTensor._over(q._spec.replace(activation=qint8), q._storage), requires_grad=False)
        x, bias = torch.randn(2, 3, 256).to(dtype), torch.randn(40).to(dtype)
        with torch.no_grad():
            first, *others = [linear(x, q, bias) for _ in range(4)]
        assert len(q._storage.plans) == 1
        assert all(torch.equal(first, other) for other in others)
        assert first.shape == (2, 3, 40)
        want = quantized_rows((x * q.column.to(dtype)).view(6, 256), 127, torch.round)
        codes = (
            QTensor._over(q._spec.replace(activation=None), q._storage).dequantize(torch.float64) / q.column.double()
        )
        assert error(first.view(6, 40), want @ codes.T + bias.double()) <= 5e-3


def test_scales_for_the_vendors_float8_gemm_are_cached_and_follow_the_weight():
    w = weight(48, 64, 8, fp8=FP8[0], scale_dtype=HALF)
    q = tensor(w)
    found = eight_bit.float32_scales(q)
    assert torch.equal(found, w.scale[:, 0].float())
    assert eight_bit.float32_scales(q) is found
    with torch.no_grad():
        q.scale.mul_(2)
    assert torch.equal(eight_bit.float32_scales(q), 2 * found)
    full = tensor(weight(48, 64, 8, fp8=FP8[0]))
    assert eight_bit.float32_scales(full).data_ptr() == full.scale.data_ptr()


def test_a_row_with_nan_stays_nan_with_a_static_scale():
    for w in (weight(40, 256, 8), weight(40, 256, 4, 64, True), weight(40, 384, 4, 48)):
        x = torch.randn(3, w.meaning.shape[1])
        x[1, 5] = float("nan")
        out = linear(x, tensor(w), activation=qint8, input_scale=torch.tensor(0.02))
        assert out.isnan().all(1).tolist() == out.isnan().any(1).tolist() == [False, True, False]


def test_int8_activations_read_the_layout_of_float_ones():
    """Also with groups smaller than a block."""
    for bits, group in ((4, 64), (4, 32), (2, 64)):
        w = weight(40, 256, bits, group, affine=bits == 4)
        q, x = tensor(w), torch.randn(2, 256)
        assert layout.fits(q, qint8)
        q.pack(layout.EXEC)
        assert chosen(q, x, qint8) == "triton-w4a8"
        want = quantized_rows(x, 127, torch.round) @ w.meaning.T
        assert error(linear(x, q, activation=qint8), want) <= 1e-5


@pytest.mark.parametrize(("kind", "fp8"), [(qfloat8_e4m3fn, FP8[0]), (qfloat8_e5m2, FP8[2])])
def test_float8_activations(kind, fp8):
    w = weight(40, 128, 8, None, fp8=fp8)
    q, x = tensor(w), torch.randn(5, 128)
    rounded = quantized_rows(x, kind.qmax, lambda v: decode_fp8(v.float().to(fp8)))
    assert chosen(q, x, kind) == "triton-scaled-mm"
    assert error(linear(x, q, activation=kind), rounded @ w.meaning.T) <= 2e-3
    # float8 activations with int8 weights: no product of these codes exists.
    w = weight(40, 128, 8)
    q = tensor(w)
    assert chosen(q, x, kind) == "triton-rounded"
    assert error(linear(x, q, activation=kind), rounded @ w.meaning.T) <= 2e-3


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_experts(transposed, packed):
    w = weight(24, 256, 4, 64, True, experts=4)
    q = tensor(w, transposed)
    if packed:
        q.pack(layout.EXEC)
    matrix = w.meaning if transposed else w.meaning.transpose(1, 2)
    ends = torch.tensor([0, 5, 6, 10], dtype=torch.int32)
    owner = torch.tensor([1] * 5 + [2] + [3] * 4)
    x = torch.randn(13, matrix.shape[1], requires_grad=True)  # three rows more than the experts have
    got = grouped_linear(x, q, ends)
    want = torch.einsum("tk,tkn->tn", x[:10].double(), matrix[owner])
    assert error(got[:10], want) <= TOLERANCE[FULL]
    assert not got[10:].any()
    dy = torch.randn_like(got)
    got.backward(dy)
    want = torch.einsum("tn,tkn->tk", dy[:10].double(), matrix[owner])
    assert error(x.grad[:10], want) <= TOLERANCE[FULL]
    assert not x.grad[10:].any()
    assert q.is_packed == packed
    assert grouped_linear(x[:0], q, torch.zeros(4, dtype=torch.int32)).shape == (0, matrix.shape[2])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_gradient_and_operators(bits, packed):
    w = weight(40, 256, bits, 64 if bits == 4 else None)
    q = tensor(w)
    if packed and bits == 4:
        q.pack(layout.EXEC)
    x, bias = torch.randn(2, 3, 256, requires_grad=True), torch.randn(40, requires_grad=True)
    out = linear(x, q, bias)
    dy = torch.randn_like(out)
    out.backward(dy)
    assert error(x.grad, dy.double() @ w.meaning) <= TOLERANCE[FULL]
    assert error(bias.grad, dy.double().sum((0, 1))) <= TOLERANCE[FULL]
    assert q.is_packed == (packed and bits == 4)  # training neither packs nor unpacks
    rows = x.detach().reshape(-1, 256).requires_grad_()
    torch.library.opcheck(torch.ops.requanto.linear, (rows, bias, *custom_ops.arguments(q), None))


@pytest.mark.parametrize(
    ("bits", "group", "fp8", "activation"),
    [(8, None, None, qint8), (4, 128, None, qint8), (8, None, FP8[0], qfloat8_e4m3fn), (4, 48, None, qint8)],
)
def test_adapters_train_through_quantized_activations(bits, group, fp8, activation):
    # The rounding of x passes the gradient straight through: dx = dy @ W, whatever product the forward was.
    k = 384
    w = weight(40, k, bits, group, fp8=fp8)
    q = tensor(w)
    x = torch.randn(5, k, requires_grad=True)
    out = linear(x, q, activation=activation)
    dy = torch.randn_like(out)
    out.backward(dy)
    assert error(x.grad, dy.double() @ w.meaning) <= TOLERANCE[FULL]
    # (On a CPU torch cannot compare float8 tensors, as its check of the schema would.)
    checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    checks += [] if fp8 else ["test_schema"]
    arguments = (x, None, *custom_ops.arguments(q, activation), None)
    torch.library.opcheck(torch.ops.requanto.linear, arguments, test_utils=checks)


@pytest.mark.parametrize("packed", [False, True])
def test_operators_of_gradients_and_experts_are_well_formed(packed):
    w, stack = weight(40, 256, 4, 64, True), weight(24, 256, 4, 64, True, experts=3)
    q, experts = tensor(w), tensor(stack)
    if packed:
        q.pack(layout.EXEC)
        experts.pack(layout.EXEC)
    torch.library.opcheck(torch.ops.requanto.linear_backward, (torch.randn(3, 40), *custom_ops.arguments(q)))
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)
    x = torch.randn(6, 256, requires_grad=True)
    torch.library.opcheck(torch.ops.requanto.grouped_linear, (x, ends, *custom_ops.arguments(experts), False))


def layer(k=256, n=48):
    module = torch.nn.Linear(k, n)
    module.weight = torch.nn.Parameter(
        QTensor.quantize(module.weight.detach(), "int4", group_size=64), requires_grad=False
    )
    return module


def test_the_layout_replaces_the_codes_and_comes_back(tmp_path):
    model = torch.nn.Sequential(layer(), torch.nn.ReLU(), layer(48, 16))
    stored = [model[i].weight.qdata.clone() for i in (0, 2)]
    nbytes = model[0].weight.nbytes
    x = torch.randn(2, 256)
    before = model(x)
    assert prepare(model, smallest=0) == {"0.weight": "exec", "2.weight": "exec"}
    assert model[0].weight.nbytes == nbytes
    assert model[0].weight._qdata.dtype == torch.uint8
    with torch.no_grad():
        after = model(x)
    assert model[0].weight.is_packed
    assert error(after, before.double()) <= 1e-5
    shared = model[0].weight.detach()
    # Views keep the layout; a transposed GEMM reads it too.
    assert model[0].weight.t().is_packed
    state = model.state_dict()
    torch.save(state, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=True)
    for i, codes in zip((0, 2), stored):
        assert torch.equal(loaded[f"{i}.weight"].qdata, codes)
        assert torch.equal(model[i].weight.qdata, codes)
    assert model[0].weight.is_packed
    assert torch.equal(shared.qdata, stored[0])
    other = torch.nn.Sequential(layer(), torch.nn.ReLU(), layer(48, 16))
    prepare(other, smallest=0)
    other.load_state_dict(loaded)
    assert torch.equal(other[0].weight.dequantize(), model[0].weight.dequantize())
    assert error(other[0](x), model[0](x).double()) <= 1e-6


def test_the_first_product_packs(monkeypatch):
    from requanto.linear import prepack as module

    monkeypatch.setattr(module, "SMALLEST", 0)
    model, x = layer(), torch.randn(2, 256)
    want = x.double() @ model.weight.dequantize(torch.float32).double().T + model.bias.double()
    assert error(model(x), want) <= TOLERANCE[FULL]
    assert not model.weight.is_packed  # training packs nothing
    with torch.inference_mode():
        assert error(model(x), want) <= TOLERANCE[FULL]
    assert model.weight.layout_name == "exec"
    model(x).sum().backward()
    assert model.weight.layout_name == "exec"


def test_a_captured_weight_stays_where_it_is(monkeypatch):
    one, two = layer(), layer()
    prepare(one, smallest=0)
    stored = two.weight.qdata.clone()
    words = one.weight._qdata
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(layout, "capturing", lambda device: True)
        one(torch.randn(2, 256))
        two(torch.randn(2, 256))
        assert prepare(two, smallest=0) == {}
    copy = one.weight.qdata
    assert one.weight._qdata is words
    assert prepare(two, smallest=0) == {}
    assert torch.equal(two.weight.qdata, stored)
    # What is loaded into a captured layer reaches the memory that the graph reads.
    one.weight.copy_(two.weight)
    assert one.weight._qdata is words
    assert torch.equal(one.weight.qdata, stored)
    assert not torch.equal(copy, stored)
    address = words.untyped_storage()._cdata
    assert address in layout._pinned
    with pytest.raises(RuntimeError, match="captured CUDA graph"):
        one.weight.unpack()


def test_compiled_graphs_see_the_layout():
    module = layer()
    calls = []

    def backend(graph, inputs):
        calls.append([i.dtype for i in inputs if isinstance(i, torch.Tensor) and not i.is_floating_point()])
        return graph.forward

    from torch._dynamo.backends.common import aot_autograd

    compiled = torch.compile(module, backend=aot_autograd(fw_compiler=backend), fullgraph=True)
    x = torch.randn(3, 256)
    with torch.no_grad():
        plain = compiled(x)
        prepare(module, smallest=0)
        packed = compiled(x)
        assert module.weight.is_packed
        again = torch.nn.functional.linear(x, module.weight.detach().dequantize(), module.bias)
    assert calls == [[torch.uint8], [torch.uint8]]  # another layout is another graph
    assert error(packed, plain.double()) <= 1e-5
    assert error(packed, again.double()) <= 1e-5


def test_lowrank_beside_packed_codes():
    w = weight(40, 256, 4, 64)
    q = tensor(w)
    q.pack(layout.EXEC)
    up, down = torch.randn(40, 3), torch.randn(3, 256)
    q.set_lowrank(up, down)
    x = torch.randn(2, 256)
    want = x.double() @ (w.meaning + up.double() @ down.double()).T
    assert error(linear(x, q), want) <= TOLERANCE[FULL]
    assert q.is_packed


def test_explain_names_the_kernel():
    model = torch.nn.Sequential(layer())
    (found,) = requanto.explain(model, rows=1)
    assert found.implementation == "triton-wq"
    assert found.layout == "plain"  # too small to be packed unasked
    prepare(model, smallest=0)
    assert requanto.explain(model, rows=1)[0].layout == "exec"
    assert requanto.explain(model, rows=5000)[0].implementation == "triton-dequantize"
