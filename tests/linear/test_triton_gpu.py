"""Quantized layers on a real GPU: eager, compiled, captured, trained, saved. Run by `make gpu-test`."""

import copy

import pytest
import torch
from torch import nn

import requanto
from requanto.dtypes.qtypes import qfloat8_e4m3fn, qint8, resolve_qtype
from requanto.linear import choose, custom_ops, grouped_linear, linear
from requanto.linear import prepack as packing
from requanto.linear.gpu import conditions as rules
from requanto.linear.registry import problem_of
from requanto.tensor.qtensor import QTensor

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device"),
]
#: fp32: sums are ordered by tiles and splits; fp16, bf16: a rounding of each weight and one of the result.
BOUND = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
KINDS = [
    ("int8", None), ("int8", 64), ("int4", 32), ("int4", 128), ("int4", None), ("int2", 64), ("float8", None),
    ("float8_e5m2", None), ("int3", 64), ("nf4", 64), ("codebook4", 64), ("uint8", 64), ("int6", 64), ("mxfp6", 32),
]  # fmt: skip


@pytest.fixture(autouse=True)
def small_layers_are_packed(monkeypatch):
    monkeypatch.setattr(packing, "SMALLEST", 0)
    torch.manual_seed(0)
    assert rules.available()
    torch._dynamo.reset()  # tests compile the same code objects: together they would reach dynamo's limit


def layer(kind="int4", group=64, n=384, k=1024, dtype=torch.bfloat16, activation=None, **how):
    module = nn.Linear(k, n, device=DEVICE, dtype=dtype)
    weight = QTensor.quantize(module.weight.detach(), kind, group_size=group, **how)
    weight.activation = activation
    module.weight = nn.Parameter(weight, requires_grad=False)
    return module.requires_grad_(False)


def values(module):
    """The weight in float64, by way of generic operators; the module keeps its form."""
    return copy.deepcopy(module.weight.detach().cpu()).dequantize(torch.float32).double().to(DEVICE)


def error(found, expected):
    if found.shape != expected.shape or not torch.isfinite(found).all():
        return float("inf")
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("kind", ["int4", "int8", "float8", "nf4"])
@pytest.mark.parametrize("dtype", BOUND)
def test_a_column_scale(kind, dtype):
    module = layer(kind, dtype=dtype, column_scale="root")
    expected, bound = values(module), 2 * BOUND[dtype]
    for stored in (dtype, torch.float32):  # of the scale, which is the dtype of x or another
        parts = {**module.weight.inner_tensors(), "column": module.weight.column.to(stored)}
        module.weight.data = module.weight.with_inner(parts)
        for rows in (1, 16, 300):
            x = torch.randn(rows, 1024, device=DEVICE, dtype=dtype, requires_grad=rows == 16)
            wanted = x.detach().double() @ expected.t() + module.bias.double()
            for _ in range(2):
                assert error(module(x).detach(), wanted) < bound
            if x.requires_grad:
                module(x).sum().backward()
                assert error(x.grad, torch.ones(rows, 384, device=DEVICE).double() @ expected) < bound


@pytest.mark.parametrize(
    ("kind", "group", "dtype"),
    [
        *((*kind, torch.bfloat16) for kind in KINDS),
        *((*kind, dtype) for kind in (("int4", 128), ("int8", None)) for dtype in (torch.float16, torch.float32)),
        ("nf4", 64, torch.float16),
        ("nf4", 64, torch.float32),
    ],
)
def test_eager_forward_and_backward(kind, group, dtype):
    module = layer(kind, group, dtype=dtype)
    w, bias = values(module), module.bias.double()
    for rows in (1, 16, 70, 2048):
        x = torch.randn(rows, 1024, device=DEVICE, dtype=dtype)
        with torch.no_grad():
            got = module(x)
        assert got.dtype == dtype
        assert error(got, x.double() @ w.T + bias) <= BOUND[dtype]
        assert choose(problem_of(module.weight, dtype, rows)).implementation.name.startswith("triton")
        x.requires_grad_()
        out = module(x)
        dy = torch.randn_like(out)
        out.backward(dy)
        assert error(x.grad, dy.double() @ w) <= BOUND[dtype]
    assert module.weight.is_packed == rules.has_matrix_instructions(DEVICE)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_stored_transpose(transposed):
    weight = torch.randn(512, 256, device=DEVICE, dtype=torch.bfloat16)
    q = QTensor.quantize(weight, "int4", group_size=128 if not transposed else 64, transposed=transposed)
    w = q.detach().cpu().dequantize(torch.float32).double().to(DEVICE)
    for rows in (1, 33, 2048):
        x = torch.randn(rows, 256, device=DEVICE, dtype=torch.bfloat16)
        assert error(linear(x, q), x.double() @ w.T) <= 1e-2


@pytest.mark.parametrize(
    ("kind", "group", "activation", "bound"),
    [
        ("int8", None, qint8, 2e-2), ("float8", None, qfloat8_e4m3fn, 6e-2), ("int4", 128, qint8, 2e-2),
        ("int4", 64, qint8, 2e-2), ("int8", None, qfloat8_e4m3fn, 6e-2), ("float8", None, qint8, 2e-2),
    ],
)  # fmt: skip
def test_quantized_activations(kind, group, activation, bound):
    module = layer(kind, group, activation=activation)
    w = values(module)
    scale = torch.tensor(0.04, device=DEVICE)
    for rows in (1, 40, 2048):
        x = torch.randn(rows, 1024, device=DEVICE, dtype=torch.bfloat16)
        with torch.no_grad():
            got, static = module(x), linear(x, module.weight, module.bias, input_scale=scale)
        want = x.double() @ w.T + module.bias.double()
        assert error(got, want) <= bound  # what rounding x to 8 bits costs
        assert error(static, want) <= bound


@pytest.mark.parametrize("activation", [None, qint8])
def test_nothing_waits_for_the_host(activation):
    module = layer(group=128, activation=activation)
    x = torch.randn(4, 1024, device=DEVICE, dtype=torch.bfloat16)
    experts = QTensor.quantize(torch.randn(4, 64, 256, device=DEVICE, dtype=torch.bfloat16), "int4", group_size=64)
    tokens = torch.randn(9, 256, device=DEVICE, dtype=torch.bfloat16)
    ends = torch.tensor([2, 2, 7, 9], dtype=torch.int32, device=DEVICE)

    def step():
        return module(x), grouped_linear(tokens, experts, ends)

    with torch.no_grad():
        step()  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("kind", "activation"),
    [("int4", None), ("int4", "int8"), ("int8", "int8"), ("float8", None), ("nf4", None), ("codebook3", None)],
)
def test_compiled_in_one_graph(kind, activation):
    activation = None if activation is None else resolve_qtype(activation)
    group = 128 if kind == "int4" else None
    model = nn.Sequential(
        layer(kind, group, activation=activation), nn.GELU(), layer(kind, group, k=384, activation=activation)
    )
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        for rows in (1, 5, 64, 2000):
            x = torch.randn(rows, 1024, device=DEVICE, dtype=torch.bfloat16)
            assert error(compiled(x), model(x)) <= 1e-2  # eager packs at this point: the next call sees words
        quick = torch.compile(model, fullgraph=True, mode="reduce-overhead")
        x = torch.randn(8, 1024, device=DEVICE, dtype=torch.bfloat16)
        for _ in range(4):
            got = quick(x).clone()
        assert error(got, model(x)) <= 1e-2


def test_operators_are_well_formed():
    module = layer()
    requanto.prepare(nn.Sequential(module), smallest=0)
    w = module.weight
    x = torch.randn(5, 1024, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    torch.library.opcheck(torch.ops.requanto.linear, (x, module.bias, *custom_ops.arguments(w), None))
    grad = torch.randn(5, 384, device=DEVICE, dtype=torch.bfloat16)
    torch.library.opcheck(torch.ops.requanto.linear_backward, (grad, *custom_ops.arguments(w)))
    experts = QTensor.quantize(torch.randn(3, 64, 256, device=DEVICE, dtype=torch.bfloat16), "int8")
    ends = torch.tensor([2, 2, 5], dtype=torch.int32, device=DEVICE)
    x = torch.randn(6, 256, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    torch.library.opcheck(torch.ops.requanto.grouped_linear, (x, ends, *custom_ops.arguments(experts), False))


@pytest.mark.parametrize("how", [{}, {"scale_bits": 6}, {"zero_point": "integer"}, {"column_scale": "std"}])
def test_cached_plans_read_the_weight_as_it_is(how):
    module = layer(**how)
    other = QTensor.quantize(torch.randn(384, 1024, device=DEVICE, dtype=torch.bfloat16), "int4", group_size=64, **how)
    x = torch.randn(4, 1024, device=DEVICE, dtype=torch.bfloat16)
    odd = torch.randn(4 * 1024 + 1, device=DEVICE, dtype=torch.bfloat16)[1:].view(4, 1024)

    def right(got, x):
        want = x.double() @ module.weight.dequantize(torch.float64).T + module.bias.double()
        return error(got, want) <= BOUND[torch.bfloat16]

    with torch.no_grad():
        for one in (x, x, odd, x, odd, x[:, ::2].repeat(1, 2), x):
            assert right(module(one), one)
        assert module.weight._storage.plans
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            on_stream = module(x)
        torch.cuda.current_stream().wait_stream(stream)
        assert right(on_stream, x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = module(x)
        graph.replay()
        assert right(got, x)
        module.weight.copy_(other)  # in the memory that the graph reads, expanded scales too
        graph.replay()
        torch.cuda.synchronize()
        assert right(got, x)
        assert right(module(x), x)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rows", [1, 8, 1500])
def test_a_captured_graph_outlives_a_save(rows, packed):
    module = layer(group=128)
    stored = module.weight.qdata.clone()
    x = torch.randn(rows, 1024, device=DEVICE, dtype=torch.bfloat16)
    if packed:
        requanto.prepare(nn.Sequential(module), smallest=0)
    else:
        module.weight._storage.stays_plain = "this test compares with it"
    with torch.no_grad():
        want = module(x)  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = module(x)
        state = module.state_dict()
        assert torch.equal(state["weight"].qdata, stored)
        module.weight._storage.stays_plain = None
        assert (packing.prepare(nn.Sequential(module), smallest=0) == {}) == (not packed)
        torch.empty(2**22, device=DEVICE).fill_(float("nan"))  # would land in memory that was given back
        for _ in range(2):
            x.copy_(torch.randn_like(x))
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(got, module(x))
        assert want.shape == got.shape


def test_lora_trains():
    base = layer(group=128)
    w = values(base)
    requanto.prepare(nn.Sequential(base), smallest=0)
    down = nn.Parameter(torch.randn(8, 1024, device=DEVICE) * 0.03)
    up = nn.Parameter(torch.zeros(384, 8, device=DEVICE))
    x = torch.randn(64, 1024, device=DEVICE, requires_grad=True)
    target = torch.randn(64, 384, device=DEVICE)
    before = None
    optimizer = torch.optim.Adam([down, up], lr=1e-2)
    for _ in range(30):
        with torch.autocast(DEVICE, torch.bfloat16):
            out = base(x) + (x @ down.T) @ up.T
        loss = (out.float() - target).square().mean()
        before = loss.item() if before is None else before
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.9 * before
    x.grad = None
    base(x.bfloat16()).sum().backward()
    assert error(x.grad, torch.ones(64, 384, device=DEVICE, dtype=torch.float64) @ w) <= 1e-2


def test_save_and_reload_in_execution_layout(tmp_path):
    model = nn.Sequential(layer(), nn.ReLU(), layer(k=384, group=128, n=256))
    plain = {name: t.qdata.clone() for name, t in model.state_dict().items() if isinstance(t, QTensor)}
    held = torch.cuda.memory_allocated()
    x = torch.randn(7, 1024, device=DEVICE, dtype=torch.bfloat16)
    packs = rules.has_matrix_instructions(DEVICE)
    assert requanto.prepare(model, smallest=0) == ({"0.weight": "exec", "2.weight": "exec"} if packs else {})
    assert torch.cuda.memory_allocated() <= held  # never both forms
    with torch.no_grad():
        want = model(x)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    for name, codes in plain.items():
        assert torch.equal(state[name].qdata, codes)
    other = nn.Sequential(layer(), nn.ReLU(), layer(k=384, group=128, n=256))
    other.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(other(x), want)
    moved = copy.deepcopy(other).cpu()
    assert torch.equal(moved[0].weight.qdata, plain["0.weight"].cpu())


def test_a_mixture_of_experts():
    transformers = pytest.importorskip("transformers")
    shape = {
        "vocab_size": 160, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "initializer_range": 0.1,
    }  # fmt: skip
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**shape)).eval()
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            wanted = parameter.dim() == 3 or (isinstance(module, nn.Linear) and parameter.dim() == 2)
            if wanted and parameter.shape[-1] % 64 == 0 and not name.startswith("router"):
                q = QTensor.quantize(parameter.detach(), "int4", group_size=64)
                setattr(module, name, nn.Parameter(q, requires_grad=False))
    ids = torch.arange(24).reshape(2, 12) % 160
    with torch.no_grad():
        want = model(ids).logits
        on_gpu = copy.deepcopy(model).to(DEVICE)
        assert error(on_gpu(ids.to(DEVICE)).logits.cpu(), want) <= 1e-4
        if rules.has_matrix_instructions(DEVICE):
            assert any("experts" in name for name in requanto.prepare(on_gpu, smallest=0))
            assert any(p.dim() == 3 and p.is_packed for p in on_gpu.parameters() if isinstance(p, QTensor))
        assert error(on_gpu(ids.to(DEVICE)).logits.cpu(), want) <= 1e-4
        half = on_gpu.to(torch.bfloat16)
        assert error(half(ids.to(DEVICE)).logits.cpu(), want) <= 0.3  # a near tie may send a token to another expert


def test_experts_of_from_pretrained_are_packed_and_decode_on_the_grouped_kernel(tmp_path):
    transformers = pytest.importorskip("transformers")
    shape = {
        "vocab_size": 160, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "initializer_range": 0.1,
    }  # fmt: skip
    transformers.MixtralForCausalLM(transformers.MixtralConfig(**shape)).save_pretrained(tmp_path / "float")
    model = transformers.MixtralForCausalLM.from_pretrained(
        tmp_path / "float", quantization_config=requanto.QuantoConfig(weights="int4", group_size=64), device_map=DEVICE
    )
    experts = [p for p in model.parameters() if p.dim() == 3]
    ids = torch.arange(12, device=DEVICE).reshape(1, 12)
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 15)
    assert model.config._experts_implementation == "requanto"
    assert all(p.is_packed == rules.has_matrix_instructions(DEVICE) for p in experts)
