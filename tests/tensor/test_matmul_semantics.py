"""Matmul and its relatives with a quantized operand follow torch's rules: shapes, broadcasting, dtypes, errors.

Every case is held against torch on the dequantized weight: values in float64, all else as torch gives it.
"""

import pytest
import torch
import torch.nn.functional as F
from ambient import default_dtype
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from requanto import QTensor
from requanto.runtime.tracing import runs_eagerly

KINDS = ["int8", "int4", "nf4", "float8"]
MATMULS = {"matmul": torch.matmul, "@": lambda a, b: a @ b, "method": lambda a, b: a.matmul(b)}
MATMULS |= {"linalg": torch.linalg.matmul}


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def quantized(*shape, kind="int8", seed=1, dtype=torch.float32, transposed=False):
    """A weight with scales of its own for each of its matrices, however many axes it has."""
    weight = random(*shape, seed=seed, dtype=dtype)
    return QTensor.quantize(weight, kind, axis=len(shape) - 2, group_size=None, transposed=transposed)


def plain(value, dtype=None):
    """An argument as torch alone would get it."""
    if isinstance(value, QTensor):
        value = value.dequantize()
    if dtype is not None and isinstance(value, torch.Tensor) and value.is_floating_point():
        value = value.to(dtype)
    return value


def outcome(function, *args, **how):
    try:
        return function(*args, **how)
    except (RuntimeError, ValueError, IndexError) as error:
        return error


def check(function, *args, tolerance=1e-5, **how):
    """The function gives what torch gives for the dequantized weight, or raises where torch raises.

    Returns:
        What it gave or raised.
    """
    want = outcome(function, *(plain(arg) for arg in args), **how)
    got = outcome(function, *args, **how)
    if isinstance(want, Exception):
        assert isinstance(got, RuntimeError), f"torch raises {want!r}, found {got!r}"
        return got
    assert not isinstance(got, Exception), f"torch gives {tuple(want.shape)}, found {got!r}"
    assert type(got) is torch.Tensor
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    exact = function(*(plain(arg, torch.float64) for arg in args), **how)
    assert (got.double() - exact).norm() <= tolerance * exact.norm()
    return got


# ---------------------------------------------------------------------- matmul: shapes

SHAPES = {  # of x and the weight
    "vector": ((64,), (64, 32)),
    "rows": ((5, 64), (64, 32)),
    "batch": ((3, 5, 64), (64, 32)),
    "two batches": ((2, 3, 5, 64), (64, 32)),
    "no rows": ((0, 64), (64, 32)),
    "empty batch": ((0, 5, 64), (64, 32)),
    "experts": ((2, 5, 64), (2, 64, 32)),
    "experts, a vector": ((64,), (2, 64, 32)),
    "experts, shared rows": ((5, 64), (2, 64, 32)),
    "experts, batch of one": ((1, 5, 64), (2, 64, 32)),
    "experts in a batch": ((2, 2, 5, 64), (2, 64, 32)),
    "experts in a larger batch": ((3, 2, 5, 64), (2, 64, 32)),
    "experts, shared in a batch": ((3, 1, 5, 64), (2, 64, 32)),
    "experts without rows": ((2, 0, 64), (2, 64, 32)),
    "experts in an empty batch": ((0, 2, 5, 64), (2, 64, 32)),
    "one expert": ((3, 5, 64), (1, 64, 32)),
    "no expert": ((5, 64), (0, 64, 32)),
    "two axes of experts": ((5, 64), (2, 3, 64, 32)),
    "two axes of experts in a batch": ((4, 2, 1, 5, 64), (2, 3, 64, 32)),
    # what does not fit
    "number": ((), (64, 32)),
    "short rows": ((5, 63), (64, 32)),
    "short vector": ((63,), (64, 32)),
    "wrong batch": ((3, 5, 64), (2, 64, 32)),
    "wrong inner batch": ((2, 3, 5, 64), (2, 64, 32)),
    "short rows of experts": ((2, 5, 63), (2, 64, 32)),
    "short vector of experts": ((63,), (2, 64, 32)),
}


@pytest.mark.parametrize("how", MATMULS)
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name, transposed, side, how):
    x_shape, w_shape = SHAPES[name]
    if side == "left":
        x_shape = (*x_shape[:-2], x_shape[-1], x_shape[-2]) if len(x_shape) > 1 else x_shape
        w_shape = (*w_shape[:-2], w_shape[-1], w_shape[-2])
    x, weight = random(*x_shape), quantized(*w_shape, transposed=transposed)
    got = check(MATMULS[how], *((x, weight) if side == "right" else (weight, x)))
    if isinstance(got, RuntimeError):  # both shapes are named
        assert str(x_shape) in str(got)
        assert str(w_shape) in str(got)
    else:
        assert got.is_contiguous()


@pytest.mark.parametrize("kind", KINDS)
def test_every_type_meets_its_own_expert(kind):
    check(torch.matmul, random(3, 2, 5, 64), quantized(2, 64, 32, kind=kind))
    check(torch.matmul, quantized(2, 64, 32, kind=kind), random(32))
    check(torch.matmul, random(5, 64), QTensor.quantize(random(2, 64, 32), kind, axis=1, transposed=True))


SIZES = st.sampled_from([0, 1, 2, 3])


@given(
    x_lead=st.none() | st.lists(SIZES, max_size=3),
    w_lead=st.lists(SIZES, max_size=2),
    m=SIZES,
    n=SIZES,
    k=st.sampled_from([0, 1, 6, 8]),
    off=st.sampled_from([0, 0, 0, 0, 1]),
    left=st.booleans(),
    transposed=st.booleans(),
    kind=st.sampled_from(["int8", "int4"]),
)
def test_any_shapes(x_lead, w_lead, m, n, k, off, left, transposed, kind):
    """Fit or not: torch says."""
    x = random(k + off) if x_lead is None else random(*x_lead, *((k + off, m) if left else (m, k + off)))
    weight = quantized(*w_lead, *((n, k) if left else (k, n)), kind=kind, transposed=transposed)
    check(torch.matmul, *((weight, x) if left else (x, weight)))


@given(
    x_shape=st.lists(SIZES, max_size=4),
    w_lead=st.lists(SIZES, max_size=2),
    left=st.booleans(),
    function=st.sampled_from([torch.mm, torch.bmm, torch.mv]),
)
def test_those_that_do_not_broadcast(x_shape, w_lead, left, function):
    x, weight = random(*x_shape), quantized(*w_lead, 3, 2)
    check(function, *((weight, x) if left else (x, weight)))


@pytest.mark.parametrize(
    ("function", "x", "weight"),
    [
        (torch.bmm, (3, 5, 64), (2, 64, 32)),
        (torch.bmm, (1, 5, 64), (2, 64, 32)),
        (torch.bmm, (5, 64), (2, 64, 32)),
        (torch.bmm, (2, 5, 64), (64, 32)),
        (torch.bmm, (2, 5, 63), (2, 64, 32)),
        (torch.mm, (2, 5, 64), (64, 32)),
        (torch.mm, (64,), (64, 32)),
        (torch.mm, (5, 64), (2, 64, 32)),
        (torch.mm, (5, 63), (64, 32)),
    ],
)
def test_what_does_not_fit_names_both_shapes(function, x, weight):
    error = check(function, random(*x), quantized(*weight))
    assert function.__name__ in str(error)
    assert str(x) in str(error)
    assert str(weight) in str(error)


def test_vectors():
    weight, experts = quantized(64, 32), quantized(2, 64, 32)
    check(torch.mv, weight, random(32))
    check(torch.Tensor.mv, weight.t(), random(64))
    for wrong in (random(31), random(32, 1), random(1, 32)):
        assert isinstance(check(torch.mv, weight, wrong), RuntimeError)
    assert isinstance(check(torch.mv, experts, random(32)), RuntimeError)
    assert isinstance(check(torch.dot, random(64), weight), RuntimeError)


def test_weights_without_matrices_of_their_own_are_read_as_floats(caplog):
    """A convolution's weight has scales for whole filters: its matrices cannot be taken apart."""
    weight = QTensor.quantize(random(4, 8, 6), "int8", axis=0)
    left, right, batch = random(4, 5, 8), random(6, 2), random(4, 6, 2)
    for call in (lambda w: left @ w, lambda w: w @ right, lambda w: torch.bmm(w, batch)):
        torch.testing.assert_close(call(weight), call(weight.dequantize()))
    assert sum("reads the values" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped_mm")
def test_rows_of_experts_that_do_not_fit():
    experts, ends = quantized(2, 64, 32), torch.tensor([2, 4], dtype=torch.int32)
    assert F.grouped_mm(random(4, 64), experts, offs=ends).shape == (4, 32)
    for shape in [(4, 63), (64,), (2, 4, 64)]:
        with pytest.raises(RuntimeError, match=r"grouped_mm: shapes .* and \(2, 64, 32\) do not fit"):
            F.grouped_mm(random(*shape), experts, offs=ends)
    for wrong in ([4], [1, 2, 4], [[2, 4]]):
        with pytest.raises(RuntimeError, match="one end row for each of 2 experts"):
            F.grouped_mm(random(4, 64), experts, offs=torch.tensor(wrong, dtype=torch.int32))
    with pytest.raises(RuntimeError, match="expected float tensors"):
        F.grouped_mm(torch.ones(4, 64, dtype=torch.int32), experts, offs=ends)


def test_linear_as_in_torch():
    weight = quantized(32, 64)
    for shape in [(64,), (5, 64), (0, 64), (2, 3, 64), (2, 0, 64)]:
        for bias in (None, random(32), random(1)):
            check(F.linear, random(*shape), weight, bias)
    for x, w in [((5, 63), weight), ((63,), weight), ((5, 64), quantized(2, 32, 64))]:
        with pytest.raises((RuntimeError, ValueError), match=r"\(5, 6.\)|\(63,\)"):
            F.linear(random(*x), w)


# ---------------------------------------------------------------------- with a tensor to add

ADDED = {  # name: function, a, b (the weight), shape of the result
    "addmm": (torch.addmm, (5, 64), (64, 32), (5, 32)),
    "baddbmm": (torch.baddbmm, (2, 5, 64), (2, 64, 32), (2, 5, 32)),
    "addbmm": (torch.addbmm, (2, 5, 64), (2, 64, 32), (5, 32)),
    "addmv": (torch.addmv, (64,), (32, 64), (32,)),
}


def operands(name, dtype=torch.float32, side="right"):
    _, x, w, _ = ADDED[name]
    x, weight = random(*x, dtype=dtype), quantized(*w, dtype=dtype)
    if name == "addmv":
        return weight, x
    if side == "left":  # the weight comes first: the shapes of the two change places
        return quantized(*ADDED[name][1], dtype=dtype), random(*w, dtype=dtype)
    return x, weight


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("factors", [{}, {"beta": 0.5, "alpha": 2}, {"alpha": -0.25}, {"beta": 3}, {"beta": 0}])
@pytest.mark.parametrize("name", ADDED)
def test_added(name, factors, side):
    function, *_, shape = ADDED[name]
    a, b = operands(name, side=side)
    inputs = {shape, shape[-1:], (1,), (), (1,) * len(shape)} | ({(*shape[:-1], 1)} if len(shape) > 1 else set())
    for each in inputs:
        check(function, random(*each, seed=3), a, b, **factors)
        check(getattr(torch.Tensor, name), random(*each, seed=3), a, b, **factors)


@pytest.mark.parametrize("name", ADDED)
def test_beta_zero_does_not_read_the_input(name):
    function, *_, shape = ADDED[name]
    a, b = operands(name)
    for value in (float("nan"), float("inf")):
        for each in (shape, shape[-1:], ()):
            for alpha in (1, 0.5):
                got = function(torch.full(each, value), a, b, beta=0, alpha=alpha)
                torch.testing.assert_close(got, function(torch.zeros(shape), plain(a), plain(b), alpha=alpha))
    # A shape that does not fit is an error all the same.
    assert isinstance(check(function, torch.zeros(7, 7, 7, 7), a, b, beta=0), RuntimeError)


@given(
    input=st.lists(st.sampled_from([1, 2, 3, 5]), max_size=4),
    x=st.tuples(st.sampled_from([1, 2, 3]), st.sampled_from([0, 1, 5]), st.sampled_from([4, 6])),
    name=st.sampled_from(["addmm", "baddbmm", "addbmm"]),
)
def test_any_shape_added(input, x, name):
    function = ADDED[name][0]
    x, weight = random(*x), quantized(2, 4, 3)
    check(function, random(*input, seed=3), *((x[0], weight[0]) if name == "addmm" else (x, weight)))


@pytest.mark.parametrize("name", ADDED)
def test_dtypes_that_differ_are_an_error(name):
    function, *_, shape = ADDED[name]
    a, b = operands(name)
    for dtype in (torch.float64, torch.bfloat16, torch.int64, torch.complex64):
        for factors in ({}, {"beta": 0}):
            assert isinstance(check(function, torch.ones(shape).to(dtype), a, b, **factors), RuntimeError)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        a, b = operands(name, dtype)
        check(function, random(*shape, dtype=dtype), a, b, tolerance=2e-2 if dtype.itemsize < 4 else 1e-6)


@pytest.mark.parametrize("name", ADDED)
def test_what_no_gemm_takes_is_computed_from_the_values(name):
    function, *_, shape = ADDED[name]
    a, b = operands(name)
    add, out = random(*shape, seed=9), torch.zeros(shape)
    wanted = function(add, plain(a), plain(b))
    torch.testing.assert_close(function(add, a, b, out=out), wanted)
    torch.testing.assert_close(out, wanted)
    if len(shape) == 2:
        table = quantized(*shape)
        torch.testing.assert_close(
            function(table, plain(a), plain(b)), function(table.dequantize(), plain(a), plain(b))
        )
    if name != "addmv":  # no vector is quantized
        other = quantized(*a.shape)
        torch.testing.assert_close(
            function(add, other, b), function(add, other.dequantize(), plain(b)), atol=1e-4, rtol=1e-4
        )


def test_a_matmul_into_a_given_tensor():
    x, weight, out = random(5, 64), quantized(64, 32), torch.zeros(5, 32)
    for function in (torch.matmul, torch.mm):
        assert function(x, weight, out=out.zero_()) is out
        torch.testing.assert_close(out, x @ weight.dequantize())


# ---------------------------------------------------------------------- dtypes, and what surrounds the call


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_only_float_beside_a_weight(dtype):
    x, weight = (random(5, 64) * 4).to(dtype), quantized(64, 32)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            for call in (lambda: x @ weight, lambda: weight.t() @ x.t(), lambda: torch.mm(x, weight)):
                with pytest.raises(
                    RuntimeError, match=f"expected a float tensor with a quantized weight, found {dtype}"
                ):
                    call()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_computed_in_the_dtype_of_x(dtype):
    """Where torch wants both dtypes alike: a quantized weight has none that its codes depend on."""
    x, weight = random(3, 5, 64, dtype=dtype), quantized(64, 32)
    for got in (x @ weight, (weight.t() @ x.mT).mT, torch.bmm(x, quantized(3, 64, 32)).clone()):
        assert got.dtype == dtype
    assert (x @ weight - (x.double() @ weight.dequantize().double())).norm() < 2e-2 * (x @ weight).norm()


def test_autocast():
    x, weight, experts = random(2, 5, 64), quantized(64, 32), quantized(2, 64, 32)
    calls = {
        "matmul": lambda x, w, e: x @ w,
        "left": lambda x, w, e: w.mT @ x.mT,
        "bmm": lambda x, w, e: torch.bmm(x, e),
        "addmm": lambda x, w, e: torch.addmm(x.new_ones(32), x[0], w),
        "addmm with factors": lambda x, w, e: torch.addmm(x.new_ones(32), x[0], w, beta=0.5, alpha=2),
        "baddbmm": lambda x, w, e: torch.baddbmm(x.new_ones(32), x, e, beta=0.5),
        "addbmm": lambda x, w, e: torch.addbmm(x.new_ones(32), x, e),
    }
    for name, call in calls.items():
        with torch.autocast("cpu", torch.bfloat16):
            got = call(x, weight, experts)
            want = call(x, weight.dequantize(), experts.dequantize())
        assert got.dtype == want.dtype == torch.bfloat16, name
        assert (got - want).norm() <= 1e-2 * want.norm(), name
        # Autocast leaves float64 alone.
        with torch.autocast("cpu", torch.bfloat16):
            got = call(x.double(), weight, experts)
        want = call(x.double(), weight.dequantize(torch.float64), experts.dequantize(torch.float64))
        assert got.dtype == torch.float64, name
        assert (got - want).norm() <= 1e-6 * want.norm(), name


AMBIENT = {
    "default dtype": lambda: default_dtype(torch.float64),
    "inference mode": lambda: torch.inference_mode(),
    "no gradient": lambda: torch.no_grad(),
    "autocast that is off": lambda: torch.autocast("cpu", torch.bfloat16, enabled=False),
}
CALLS = {
    "matmul": lambda x, w: x @ w["matrix"],
    "left": lambda x, w: w["matrix"].mT @ x.mT,
    "experts": lambda x, w: x @ w["experts"],
    "added": lambda x, w: torch.baddbmm(torch.ones(32, dtype=x.dtype), x, w["experts"], beta=0.5, alpha=2),
    "image": lambda x, w: F.conv2d(x[None], w["filters"]),
    "rows": lambda x, w: F.embedding(torch.tensor([0, 3]), w["matrix"]),
}


@pytest.mark.parametrize("state", AMBIENT)
@pytest.mark.parametrize("name", CALLS)
def test_nothing_is_left_behind(name, state):
    """The result depends on the arguments alone, and a later call with a gradient finds nothing of an earlier one."""
    weights = {"matrix": quantized(64, 32), "experts": quantized(2, 64, 32)}
    weights["filters"] = QTensor.quantize(random(3, 2, 2, 2), "int8")
    float_weights = {key: weight.dequantize() for key, weight in weights.items()}
    x = random(2, 5, 64)
    before = (
        torch.get_default_dtype(),
        torch.is_autocast_enabled("cpu"),
        torch.is_inference_mode_enabled(),
        runs_eagerly(),
    )
    with AMBIENT[state]():
        got, want = CALLS[name](x, weights), CALLS[name](x, float_weights)
    assert (got.dtype, got.shape, got.is_inference()) == (want.dtype, want.shape, want.is_inference())
    torch.testing.assert_close(got, want)
    after = (
        torch.get_default_dtype(),
        torch.is_autocast_enabled("cpu"),
        torch.is_inference_mode_enabled(),
        runs_eagerly(),
    )
    assert before == after
    if name != "rows":
        one, two = (x.clone().requires_grad_() for _ in range(2))
        CALLS[name](one, weights).square().sum().backward()
        CALLS[name](two, float_weights).square().sum().backward()
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-3)


GRADIENTS = {
    "vector": ((64,), lambda x, w, e: x @ w),
    "left vector": ((32,), lambda x, w, e: w @ x),
    "left": ((3, 32, 5), lambda x, w, e: w @ x),
    "experts": ((3, 2, 5, 64), lambda x, w, e: x @ e),
    "shared by experts": ((5, 64), lambda x, w, e: x @ e),
    "experts on the left": ((32, 5), lambda x, w, e: e @ x),
    "input added": ((32,), lambda x, w, e: torch.addmm(x, torch.ones(5, 64), w, beta=0.5, alpha=2)),
    "batch added": ((5, 32), lambda x, w, e: torch.baddbmm(x, torch.ones(2, 5, 64), e, beta=0.5)),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients(name):
    shape, call = GRADIENTS[name]
    weights = quantized(64, 32), quantized(2, 64, 32)
    one, two = (random(*shape).requires_grad_() for _ in range(2))
    call(one, *weights).square().sum().backward()
    call(two, *map(plain, weights)).square().sum().backward()
    torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-3)
    got = torch.func.grad(lambda x: call(x, *weights).square().sum())(one.detach())
    torch.testing.assert_close(got, two.grad, rtol=1e-4, atol=1e-3)
    batch = torch.stack([one.detach()] * 3)
    got = torch.vmap(lambda x: call(x, *weights))(batch)
    torch.testing.assert_close(got[1], call(one.detach(), *map(plain, weights)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", GRADIENTS)
def test_traced(name):
    shape, call = GRADIENTS[name]
    weights = quantized(64, 32), quantized(2, 64, 32)
    x, want = random(*shape), call(random(*shape), *map(plain, weights))
    for grad in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(lambda x: call(x, *weights), backend="eager", fullgraph=True)
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(compiled(x), want, rtol=1e-4, atol=1e-4)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = call(mode.from_tensor(x), *map(mode.from_tensor, weights))
    assert (fake.shape, fake.dtype) == (want.shape, want.dtype)


# ---------------------------------------------------------------------- what torch composes of others

COMPOSED = {
    "inner": lambda x, w, e: torch.inner(x, w.t()),
    "inner, left": lambda x, w, e: torch.inner(w.t(), x),
    "einsum": lambda x, w, e: torch.einsum("ij,jk->ik", x, w),
    "einsum of experts": lambda x, w, e: torch.einsum("ij,bjk->bik", x, e),
    "tensordot": lambda x, w, e: torch.tensordot(x, w, 1),
    "multi_dot": lambda x, w, e: torch.linalg.multi_dot([x, w, torch.ones(32, 2)]),
    "vecdot": lambda x, w, e: torch.linalg.vecdot(x, w.t()[:5]),
    "bilinear": lambda x, w, e: F.bilinear(x, torch.ones(5, 32), e),
    "kron": lambda x, w, e: torch.kron(x, w),
    "outer": lambda x, w, e: torch.outer(x[0], w),
    "cdist": lambda x, w, e: torch.cdist(x, w.t()),
    "attention": lambda x, w, e: F.scaled_dot_product_attention(x[None], w.t()[None], w.t()[None]),
    "sparse": lambda x, w, e: torch.sparse.mm(x.to_sparse(), w),
    "in place": lambda x, w, e: torch.zeros(5, 32).addmm_(x, w),
    "several matrices": lambda x, w, e: torch.addr(torch.zeros(64, 32), x[0], w),
    "mixed up": lambda x, w, e: F.linear(w, x),
    "quantized bias": lambda x, w, e: F.linear(x, torch.ones(32, 64), w),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", COMPOSED)
def test_composed_functions_are_right_or_refuse(name, inference):
    x, weights = random(5, 64), (quantized(64, 32), quantized(2, 64, 32))
    with torch.inference_mode(inference):
        want = outcome(COMPOSED[name], x, *map(plain, weights))
        got = outcome(COMPOSED[name], x, *weights)
    if isinstance(got, Exception):
        assert isinstance(want, Exception) or ".dequantize()" in str(got)
    else:
        torch.testing.assert_close(got, want)


# ---------------------------------------------------------------------- tables


@pytest.mark.parametrize("kind", KINDS)
def test_embedding_arguments(kind):
    table = quantized(10, 64, kind=kind)
    for index in (torch.tensor(3), torch.tensor([[0, 9], [4, 4]]), torch.empty(0, 2, dtype=torch.int64)):
        for dtype in (torch.int32, torch.int64):
            check(F.embedding, index.to(dtype), table)
            for padding in (None, 0, 9, -1, -10):
                check(F.embedding, index.to(dtype), table, padding)
            # These two say how the gradient of the table is made; a quantized one has none.
            check(F.embedding, index.to(dtype), table, None, None, 2.0, True, True)
    for wrong in ([10], [-1], [0, 10], [2**31]):
        with pytest.raises(IndexError, match="out of range"):
            F.embedding(torch.tensor(wrong), table)
    for padding in (10, -11):
        with pytest.raises(AssertionError, match=f"padding_idx {padding} is out of range for a table of 10"):
            F.embedding(torch.tensor([1]), table, padding)
    for dtype in (torch.float32, torch.int16, torch.bool):
        with pytest.raises(RuntimeError, match=f"indices must be int32 or int64, found {dtype}"):
            F.embedding(torch.ones(2).to(dtype), table)


def test_embedding_of_what_is_no_table():
    for shape, axis in (((4, 6, 8), 0), ((4, 6, 8), 1), ((4, 3, 3, 3), 0)):
        with pytest.raises(RuntimeError, match="the table must have two axes"):
            F.embedding(torch.tensor([1]), QTensor.quantize(random(*shape), "int8", axis=axis))
    with pytest.raises(NotImplementedError, match="quantized indices"):
        F.embedding(quantized(4, 8), random(4, 8))


def test_embedding_bag_reads_the_table():
    table, index = quantized(10, 64), torch.tensor([[1, 2], [3, 4]])
    for call in (
        lambda table: F.embedding_bag(index, table),
        lambda table: torch.embedding_bag(table, index[0], torch.tensor([0]))[0],
    ):
        torch.testing.assert_close(call(table), call(table.dequantize()))


def test_a_lookup_in_a_transposed_table():
    table, index = quantized(64, 10).t(), torch.tensor([[1, 2], [3, 4]])
    assert torch.equal(F.embedding(index, table), table.dequantize()[index])


# ---------------------------------------------------------------------- torch.jit.trace

TRACED = {
    "linear": ((32, 64), 2, F.linear),
    "addmm": ((64, 32), 2, lambda x, w: torch.addmm(torch.ones(32), x, w)),
    "matmul": ((64, 32), 2, lambda x, w: x @ w),
    "experts": ((2, 64, 32), 2, lambda x, w: x @ w),
    "conv2d": ((8, 4, 3, 3), 4, F.conv2d),
    "embedding": ((32, 64), 1, F.embedding),
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", ["int8", "int4", "nf4", "float8", "int3", "codebook3"])
@pytest.mark.parametrize("name", TRACED)
def test_jit_trace(name, kind, grad):
    """A traced model is right for another number of rows too, and keeps its derivative."""
    shape, axes, call = TRACED[name]

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(QTensor.quantize(random(*shape), kind), requires_grad=False)

        def forward(self, x):
            return call(x, self.weight)

    def rows(count):
        if axes == 1:
            return torch.arange(count)
        return random(count, 4, 6, 6) if axes == 4 else random(count, 64)

    model, grad = Model(), grad and axes > 1
    traced = torch.jit.trace(model, rows(5).requires_grad_(grad))
    for count in (5, 3):
        x = rows(count).requires_grad_(grad)
        y = x.detach().clone().requires_grad_(grad)
        got, want = traced(x), call(y, model.weight.dequantize())
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        if grad:
            got.square().sum().backward()
            want.square().sum().backward()
            torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-3)
