"""Every form of weights on every instruction set of this processor, against float64: sizes, dtypes, strides, modes.

Limits are those of `cpu_reference`: what rounding explains, for each element and as a whole. Random numbers are fresh in
each run; `REQUANTO_SEED=...` repeats those of a message.
"""

import contextlib
import itertools
import math

import pytest
import torch
from ambient import default_dtype, threads
from cpu_reference import (
    DTYPES,
    HALF_STEP,
    INPUTS,
    KINDS,
    LAID_OUT,
    ROWS,
    Fresh,
    every_form,
    form,
    inputs,
    laid_out,
    quantized_layer,
    reference,
)
from hypothesis import given
from hypothesis import strategies as st

from requanto import QTensor, prepare, qint8
from requanto.linear import linear
from requanto.linear.activations import quantize_activations

OUTPUTS = (1, 5, 15, 16, 17, 31, 33, 48, 100)
LENGTHS = (1, 2, 7, 8, 15, 31, 32, 33, 63, 64, 65, 96, 127, 160, 300)
FLOAT8 = ("float8", "fp8_e5m2", "fp8_e4m3fnuz")


@pytest.fixture
def draw():
    return Fresh()


def checked(layer, x, generator, about="", calls=2, **how):
    """The layer's results of several calls: the first may prepack, later ones run a cached plan."""
    want = reference(x.reshape(-1, x.shape[-1]), layer.weight, layer.bias, **how)
    with torch.no_grad():
        for call in range(calls):
            got = layer(x)
            assert got.dtype == x.dtype
            assert got.shape == (*x.shape[:-1], layer.weight.shape[0])
            want.check(got, f"{about} {tuple(x.shape)} {x.dtype} call {call} ({generator})")
    return got


@pytest.mark.parametrize("part", range(3))
def test_every_form(cpu_level, part, draw):
    """One size and three kinds of x for each, packed at first use, beforehand or never."""
    for index, one in list(enumerate(every_form()))[part::3]:
        dtype = DTYPES[(index // 3 + draw.number(2)) % 3]
        outputs = draw.one_of(OUTPUTS)
        weight = one.weight(outputs, one.length(draw.one_of((40, 96, 200))), dtype, draw)
        bias = torch.randn(outputs, generator=draw).to(draw.one_of((dtype, torch.float32))) if index % 2 else None
        layer = quantized_layer(weight, bias)
        stored = weight.qdata.view(torch.uint8).clone()
        if draw.number(4):
            prepare(layer, smallest=0)
        for rows in (1, draw.one_of((2, 3, 4, 5, 7)), draw.one_of((16, 17, 33, 130))):
            x = inputs(
                rows, weight.shape[1], dtype if draw.number(3) else draw.one_of(DTYPES), draw, draw.one_of(INPUTS)
            )
            checked(layer, x, draw, one)
        assert torch.equal(layer.weight.qdata.view(torch.uint8), stored), one


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_outputs_and_lengths(cpu_level, dtype, draw):
    """All numbers of rows, and odd sizes of weights, for types with kernels of different kinds."""
    for kind in KINDS:
        lengths, outputs = itertools.cycle(LENGTHS), itertools.cycle(OUTPUTS)
        for _ in range(draw.number(9)):
            next(outputs)
        for length in itertools.islice(lengths, len(LENGTHS)):
            weight = form(kind, group_size=draw.one_of((None, 32, 16))).weight(next(outputs), length, dtype, draw)
            layer = quantized_layer(weight)
            prepare(layer, smallest=0)
            checked(layer, inputs(draw.one_of(ROWS), length, dtype, draw, draw.one_of(INPUTS)), draw, kind, 1)


@pytest.mark.parametrize("kind", ["int8", "int4", "int3", "nf4", "float8"])
def test_long_rows_and_many_of_them(cpu_level, kind, draw):
    """Sums over many blocks; more rows of x and of the weight than one part of the scratch buffer holds."""
    for outputs, length, rows in ((40, 11008, 2), (700, 1024, 5), (1500, 520, 260)):
        weight = form(kind).weight(outputs, length, torch.bfloat16, draw)
        layer = quantized_layer(weight)
        prepare(layer, smallest=0)
        for dtype in DTYPES:
            checked(layer, inputs(rows, length, dtype, draw), draw, kind)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["int8", "int4", "int2", "nf4", "float8"])
def test_strides_and_addresses(cpu_level, kind, dtype, draw):
    """Whatever the memory looks like; what lies beside x is not read."""
    for rows in (1, 3, 40):
        weight = form(kind).weight(33, 96, dtype, draw)
        layer = quantized_layer(weight)
        prepare(layer, smallest=0)
        x = inputs(rows, 96, dtype, draw)
        want = checked(layer, x, draw, kind)
        for how in LAID_OUT:
            seen = laid_out(x, how)
            before = seen.clone()
            got = checked(layer, seen, draw, f"{kind} {how}").reshape(want.shape)
            # What kernels compute; torch's GEMM sums in an order that depends on the address.
            assert torch.equal(got, want) or kind == "float8" or rows > 16, (how, str(draw))
            assert torch.equal(seen, before)


@pytest.mark.parametrize("kind", ["int8", "int4", "int2", "nf4", "float8", "uint8"])
@pytest.mark.parametrize("static", [False, True])
def test_int8_activations(cpu_level, kind, static, draw):
    for dtype, rows in itertools.product(DTYPES, (1, 2, 5, 17, 130)):
        for how in ({}, {"group_size": 32}, {"group_size": 16}):
            weight = form(kind, **how).weight(33, 160, dtype, draw)
            layer = quantized_layer(weight)
            if draw.number(2):
                prepare(layer, smallest=0)
            x = inputs(rows, 160, dtype, draw, draw.one_of(("normal", "sparse", "zero row")))
            scale = torch.tensor(0.02) if static else None
            want = reference(x, weight, activation=qint8, input_scale=scale)
            with torch.no_grad():
                for _ in range(2):
                    got = linear(x, layer.weight, activation=qint8, input_scale=scale)
                    # Codes of x at a tie may go either way, where a scale is rounded differently.
                    codes, steps = quantize_activations(x, qint8, scale)
                    step = (steps * codes.abs().clamp_max(1)).double()
                    slack = 2e-6 * codes.abs().double() * step @ weight.dequantize(torch.float64).abs().t()
                    want.each = want.each + slack
                    want.check(got, f"{kind} {how} {rows} {dtype} static={static} ({draw})")


@pytest.mark.parametrize("kind", ["int2", "int3", "int4", "int6", "int8", "nf4", "float8"])
def test_float_arithmetic_never_rounds_x(cpu_level, kind, draw, monkeypatch):
    from requanto.runtime.settings import settings

    monkeypatch.setattr(settings, "cpu_arithmetic", "float")
    for rows, how in itertools.product((1, 4, 33), ("normal", "spiky", "heavy")):
        weight = form(kind).weight(33, 192, torch.float32, draw)
        layer = quantized_layer(weight)
        prepare(layer, smallest=0)
        for dtype in DTYPES:
            checked(layer, inputs(rows, 192, dtype, draw, how), draw, f"{kind} {how}", arithmetic="float")


@pytest.mark.parametrize("kind", ["int8", "int5", "int4", "int2", "nf4", "float8"])
def test_a_setting_changed_between_calls_is_seen(kind, draw, monkeypatch):
    from requanto.runtime.settings import settings

    layer = quantized_layer(form(kind).weight(48, 192, torch.float32, draw))
    x = inputs(3, 192, torch.float32, draw, "heavy")
    for arithmetic in ("auto", "float", "auto", "float"):
        monkeypatch.setattr(settings, "cpu_arithmetic", arithmetic)
        checked(layer, x, draw, kind, arithmetic=arithmetic)


# ---------------------------------------------------------------------- what is no ordinary number


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["int8", "int4", "int3", "nf4", "float8", "mxfp4"])
@pytest.mark.parametrize("arithmetic", ["auto", "float"])
def test_rows_that_are_not_finite(cpu_level, kind, dtype, arithmetic, draw, monkeypatch):
    """Such a row becomes what it becomes in a float GEMM, and no other row changes."""
    from requanto.runtime.settings import settings

    monkeypatch.setattr(settings, "cpu_arithmetic", arithmetic)
    weight = form(kind).weight(33, 128, dtype, draw)
    layer = quantized_layer(weight)
    prepare(layer, smallest=0)
    values = weight.dequantize(torch.float64)
    for rows, number_ in itertools.product((1, 3, 20), (math.nan, math.inf, -math.inf)):
        x = inputs(rows, 128, dtype, draw)
        with torch.no_grad():
            clean = layer(x)
            x[rows // 2, 5] = number_
            got = layer(x)
        others = [row for row in range(rows) if row != rows // 2]
        reference(x[others], weight, arithmetic=arithmetic).check(got[others], f"{kind} beside {number_} ({draw})")
        assert torch.equal(got[others], clean[others]) or arithmetic == "float" or rows > 16
        found, wanted = got[rows // 2].double(), x[rows // 2].double() @ values.t()
        known = wanted.isnan()
        assert not found.isfinite().any()
        assert torch.equal(found.isnan() | known, known)
        assert torch.equal(found[~known], wanted[~known])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["int8", "int4", "int2", "nf4", "float8"])
def test_large_and_small_numbers(cpu_level, kind, dtype, draw):
    """From numbers below the smallest normal one to where the result leaves the dtype's range."""
    weight = form(kind).weight(33, 96, torch.float32, draw)
    layer = quantized_layer(weight)
    prepare(layer, smallest=0)
    values, info = weight.dequantize(torch.float64), torch.finfo(dtype)
    for rows in (1, 5):
        # Sums are float32: far enough from its own range.
        largest = info.max / (8 if dtype == torch.float16 else 1e6)
        for size in (info.smallest_normal * info.eps, info.smallest_normal, info.smallest_normal * 300, 1.0, largest):
            x = (inputs(rows, 96, torch.float32, draw).double() * size).clamp(-info.max, info.max).to(dtype)
            want = reference(x, weight)
            with torch.no_grad():
                got = layer(x).double()
            exact = x.double() @ values.t()
            inside = exact.abs() + want.each < info.max
            over = exact.abs() - want.each > info.max * (1 + HALF_STEP[dtype])
            assert ((got - exact).abs() <= want.each)[inside].all(), (kind, size, draw)
            assert torch.equal(got[over], exact[over].sign() * math.inf)


@pytest.mark.parametrize("kind", ["int8", "int4", "int3", "nf4", "float8"])
@pytest.mark.parametrize("shape", [(0, 32, 16), (3, 0, 16), (3, 32, 0), (0, 0, 0), (1, 0, 1)])
def test_no_rows_no_columns(kind, shape):
    rows, length, outputs = shape
    layer = quantized_layer(QTensor.quantize(torch.zeros(outputs, length), kind), torch.ones(outputs))
    with torch.no_grad():
        for dtype in DTYPES:
            got = layer(torch.zeros(rows, length, dtype=dtype))
            assert torch.equal(got, torch.ones(rows, outputs, dtype=dtype))


@pytest.mark.parametrize("kind", FLOAT8)
def test_every_float8_code(cpu_level, kind):
    """At every column of a unit, in every row of a strip; NaN included."""
    codes = torch.stack([torch.arange(256).roll(shift) for shift in range(48)]).to(torch.uint8)
    weight = QTensor.quantize(torch.ones(48, 256), kind)
    numbers = codes.view(weight.qdata.dtype)
    weight.qdata, weight.scale = numbers, torch.ones(48, 1)
    layer = quantized_layer(weight)
    prepare(layer, smallest=0)
    with torch.no_grad():
        for rows in (range(256), (3,), (77, 78, 250)):
            eye = torch.eye(256)[list(rows)]
            for dtype in DTYPES:
                got = layer(eye.to(dtype)).float()
                wide = numbers.float().to(dtype).float().t()[list(rows)]
                nan = numbers.float().isnan().any(1)  # a row with NaN times 0 is NaN
                assert got[:, nan].isnan().all()
                assert torch.equal(got[:, ~nan], wide[:, ~nan])
    assert torch.equal(layer.weight.dequantize(torch.float32).nan_to_num(-1e9), numbers.float().nan_to_num(-1e9))


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_code(cpu_level, bits):
    """Each code at each place: x selects one column at a time."""
    from requanto.dtypes.bit_packing import pack

    kind = "int8" if bits == 8 else f"uint{bits}"
    codes = torch.stack([torch.arange(96).roll(shift) for shift in range(17)]).remainder(2**bits).to(torch.uint8)
    weight = QTensor.quantize(torch.randn(17, 96), kind, group_size=32 if bits < 8 else None)
    weight.qdata = codes.view(torch.int8) if bits == 8 else pack(codes, bits)
    weight.scale = torch.ones_like(weight.scale)
    if weight.shift is not None:
        weight.shift = torch.full_like(weight.shift, 3.0)
    want = codes.view(torch.int8).float() if bits == 8 else codes.float() - 3
    layer = quantized_layer(weight)
    prepare(layer, smallest=0)
    with torch.no_grad():
        for rows in (range(96), (5,), (31, 32, 95)):
            for dtype in DTYPES:
                got = layer(torch.eye(96)[list(rows)].to(dtype)).float()
                torch.testing.assert_close(got, want.t()[list(rows)].to(dtype).float(), rtol=1e-6, atol=1e-4)
    assert torch.equal(layer.weight.dequantize(), want)


# ---------------------------------------------------------------------- modes


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


MODES = {
    "inference mode": torch.inference_mode,
    "no gradient": torch.no_grad,
    "default float64": lambda: default_dtype(torch.float64),
    "default bfloat16": lambda: default_dtype(torch.bfloat16),
    "deterministic": deterministic,
    "two threads": lambda: threads(2),
    "device context": lambda: torch.device("meta"),
    "function mode": lambda: torch.overrides.BaseTorchFunctionMode(),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["int8", "int4", "int3", "nf4", "float8"])
@pytest.mark.parametrize("first", [False, True])
def test_modes_of_the_process(mode, kind, first, draw):
    """The same bits in each mode; also where the mode is on when the weight is prepacked and the plan made."""
    for dtype, rows, activation in itertools.product(DTYPES, (1, 5, 40), (None, qint8)):
        weight = form(kind).weight(48, 96, dtype, draw)
        weight.activation = activation
        layer = quantized_layer(weight)
        twin = quantized_layer(weight.clone())
        x = inputs(rows, 96, dtype, draw)
        with torch.no_grad():
            for one in (layer, twin):
                prepare(one, smallest=0) if not first or one is twin else None
            want = [twin(x) for _ in range(2)][1]
            with MODES[mode]():
                if first:
                    prepare(layer, smallest=0)
                got = [linear(x, layer.weight) for _ in range(3)]
        for one in got:
            assert one.dtype == dtype
            assert one.device.type == "cpu"
            assert torch.equal(one, want) or (mode == "two threads" and torch.allclose(one, want, rtol=2e-2, atol=2e-2))


@pytest.mark.parametrize("kind", ["int8", "int4", "nf4", "float8"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(kind, dtype, draw):
    """x is rounded to autocast's dtype first, which the result has; plans made outside of it are not used."""
    layer = quantized_layer(form(kind).weight(48, 96, torch.float32, draw))
    x = inputs(5, 96, torch.float32, draw)
    with torch.no_grad():
        for _ in range(2):
            assert layer(x).dtype == torch.float32
            with torch.autocast("cpu", dtype):
                got = layer(x)
            assert got.dtype == dtype
            reference(x.to(dtype), layer.weight).check(got, f"{kind} ({draw})")


@pytest.mark.parametrize("kind", ["int8", "int4", "nf4", "float8"])
@pytest.mark.parametrize("packed", [False, True])
def test_graphs(kind, packed, draw):
    torch._dynamo.reset()
    layer = quantized_layer(form(kind).weight(48, 96, torch.float32, draw), torch.randn(48))
    if packed:
        prepare(layer, smallest=0)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows, dtype in ((1, torch.float32), (5, torch.float32), (3, torch.bfloat16)):
        x = inputs(rows, 96, dtype, draw)
        with torch.no_grad():
            reference(x, layer.weight, layer.bias).check(compiled(x), f"{kind} ({draw})")


@given(data=st.data())
def test_whatever_is_asked_for(at_level, data):
    """All choices at once."""
    draw = Fresh(data.draw(st.integers(0, 2**31)))
    one = data.draw(st.sampled_from(every_form()))
    dtype, x_dtype = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(DTYPES))
    weight = one.weight(data.draw(st.integers(1, 70)), one.length(data.draw(st.integers(1, 300))), dtype, draw)
    if data.draw(st.booleans()) and weight.shape[0] > 2:
        weight = weight[1:-1]
    layer = quantized_layer(weight, torch.randn(weight.shape[0]) if data.draw(st.booleans()) else None)
    with at_level(data.draw(st.sampled_from(at_level.names))):
        if data.draw(st.booleans()):
            prepare(layer, smallest=0)
        for _ in range(2):
            x = inputs(
                data.draw(st.integers(1, 70)), weight.shape[1], x_dtype, draw, data.draw(st.sampled_from(INPUTS))
            )
            checked(layer, laid_out(x, data.draw(st.sampled_from(LAID_OUT))), draw, one)
