"""Reading a weight changes nothing, a write through one alias is there for all, and what is packed can be seen."""

import copy
import io
import os
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from reversed_layout import REVERSED
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import requanto
from requanto import QTensor, prepare, qint8, qtypes
from requanto.linear import registry
from requanto.linear.cpu import library
from requanto.linear.cpu.strips import STRIPS
from requanto.runtime.settings import settings
from requanto.tensor import layout, storage

#: Of several widths; the last has too many values for a table, and stays as it is stored.
KINDS = ["int8", "int4", "int3", "int2", "float8", "nf4", "fp7_e3m3"]
NEAR = 1e-2


def has_layout(kind: str) -> bool:
    return library.find() is not None and kind != "fp7_e3m3"


@pytest.fixture(params=["packed", "plain"])
def packs(request, monkeypatch):
    """Whether weights are packed at their first GEMM."""
    monkeypatch.setattr(settings, "pack_on_first_use", request.param == "packed")
    return request.param == "packed"


def quantized(kind: str, shape=(320, 256), seed: int = 0) -> QTensor:
    generator = torch.Generator().manual_seed(seed)
    return QTensor.quantize(torch.randn(shape, generator=generator).bfloat16(), kind)


def module(kind: str, packed: bool, seed: int = 0) -> nn.Linear:
    made = nn.Linear(256, 320, bias=False)
    made.weight = nn.Parameter(quantized(kind, seed=seed), requires_grad=False)
    if packed:
        prepare(made, smallest=0)
        assert made.weight.is_packed == has_layout(kind)
    return made


def x_of(rows: int = 5) -> torch.Tensor:
    return torch.randn(rows, 256).bfloat16()


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def gemm_error(made: nn.Module, values: torch.Tensor, rows: int = 5) -> float:
    """Of three calls: the first may pack, the second makes a plan, the third uses it."""
    found = 0.0
    for _ in range(3):
        x = x_of(rows)
        with torch.no_grad():
            found = max(found, error(made(x), x.double() @ values.double().t()))
    return found


# ------------------------------------------------------------------ 1. reading changes nothing


def train(made: nn.Linear) -> None:
    x = x_of().requires_grad_()
    made(x).float().square().sum().backward()


def evaluate(made: nn.Linear) -> None:
    with torch.no_grad():
        made(x_of())


def counted(made: nn.Linear) -> None:
    with FlopCounterMode(display=False) as counter:
        made(x_of())
    assert counter.get_total_flops() == 2 * 5 * 256 * 320


READERS = {
    "dequantize": lambda m: m.weight.dequantize(),
    "deepcopy": copy.deepcopy,
    "equal": lambda m: torch.equal(m.weight, m.weight.clone()),
    "data_ptr": lambda m: m.weight.data_ptr(),
    "slice": lambda m: m.weight[:8].dequantize(),
    "t": lambda m: m.weight.t().dequantize(),
    "pickle": lambda m: pickle.loads(pickle.dumps(m.weight)),
    "torch.save": lambda m: torch.save(m.state_dict(), io.BytesIO()),
    "state_dict": lambda m: m.state_dict()["weight"].qdata,
    "clone": lambda m: m.weight.clone(),
    "view": lambda m: m.weight.view(320, 256).view(-1, 256),
    "is_pinned": lambda m: m.weight.is_pinned(),
    "is_shared": lambda m: m.weight.is_shared(),
    "qdata": lambda m: m.weight.qdata,
    "codes": lambda m: m.weight.codes(),
    "to": lambda m: m.weight.to("meta"),
    "contiguous": lambda m: m.weight.contiguous(),
    "isfinite": lambda m: torch.isfinite(m.weight),
    "repr": lambda m: repr(m.weight),
    "embedding": lambda m: F.embedding(torch.tensor([0, 7, 319]), m.weight),
    "FlopCounterMode": counted,
    "torch.func": lambda m: torch.func.grad(lambda a: m(a).float().sum())(x_of()),
    "vmap": lambda m: torch.vmap(m)(x_of()),
    "jit.trace": lambda m: torch.jit.trace(m, x_of()),
    "other orientation": lambda m: x_of(3).new_ones(3, 320) @ m.weight,
    "training step": train,
    "evaluation": evaluate,
    "float32": lambda m: m(torch.randn(40, 256)),
    "float16": lambda m: m(torch.randn(40, 256).half()),
    "float64": lambda m: m(torch.randn(40, 256).double()),
    "autocast": lambda m: torch.autocast("cpu", torch.bfloat16)(lambda: m(torch.randn(3, 256)))(),
    "explain": requanto.explain,
}


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("kind", KINDS)
def test_reading_changes_nothing(kind, read):
    """As packed after as before, with the same numbers in the same memory, as often as one likes."""
    made = module(kind, packed=True)
    weight = made.weight
    before, parts, version = weight.layout_name, dict(weight._storage.parts), weight._storage.version
    copies = {name: part.clone() for name, part in parts.items()}
    for _ in range(5):
        READERS[read](made)
        assert weight.layout_name == before
        assert weight._storage.version == version
        assert all(weight._storage.parts[name] is part for name, part in parts.items())
        for name, part in copies.items():
            now = weight._storage.parts[name]  # scales are group-major
            assert torch.equal(now.contiguous().view(torch.uint8), part.contiguous().view(torch.uint8)), name


@pytest.mark.parametrize("kind", KINDS)
def test_training_and_evaluating_in_turns(kind):
    made = nn.Linear(256, 320, bias=False)
    made.weight = nn.Parameter(quantized(kind), requires_grad=False)
    values = made.weight.dequantize(torch.float32)
    train(made)
    assert not made.weight.is_packed  # training packs nothing
    evaluate(made)
    after = made.weight.layout_name
    assert made.weight.is_packed == has_layout(kind)
    for _ in range(4):
        evaluate(made)
        x = x_of().requires_grad_()
        out = made(x)
        out.float().sum().backward()
        assert error(out.detach(), x.detach().double() @ values.double().t()) < NEAR
        assert error(x.grad, values.double().sum(0).expand(5, -1)) < NEAR
        assert made.weight.layout_name == after


# ------------------------------------------------------------------ 2. a write reaches every alias


def load(made: nn.Linear, new: QTensor) -> None:
    made.load_state_dict({"weight": new})


WRITERS = {
    "data": lambda m, new: m.weight.data.copy_(new),
    "detach": lambda m, new: m.weight.detach().copy_(new),
    "state_dict": lambda m, new: m.state_dict()["weight"].copy_(new),
    "t": lambda m, new: m.weight.t().copy_(new.t()),
    "view": lambda m, new: m.weight.view(320, 256).data.copy_(new),
    "load_state_dict": load,
    "float": lambda m, new: m.weight.data.copy_(new.dequantize()),
    "halves": lambda m, new: [m.weight[:160].copy_(new[:160]), m.weight[160:].copy_(new[160:])],
    "rows": lambda m, new: [row.copy_(part) for row, part in zip(m.weight.split(64), new.split(64))],
    "set_inner": lambda m, new: m.weight.data.set_inner(new.inner_tensors()),
    "scale": lambda m, new: [
        setattr(m.weight.detach(), name, part)
        for name, part in new.inner_tensors().items()
        if name in ("scale", "shift")
    ],
    "qdata": lambda m, new: setattr(m.weight.detach(), "qdata", new.qdata),
}


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_write_through_any_alias_reaches_every_alias(kind, write, packs):
    made = module(kind, packs)
    weight = made.weight
    assert gemm_error(made, weight.dequantize(torch.float32)) < NEAR  # plans are there
    early = [weight.detach(), weight.data, made.state_dict()["weight"], weight.t(), weight[:64], weight[64:][8:40]]
    before = weight.dequantize(torch.float32)
    new = quantized(kind, seed=1)
    WRITERS[write](made, new)
    values = weight.dequantize(torch.float32)
    if write == "float":
        assert error(values, new.dequantize(torch.float32)) < (1.0 if kind == "int2" else 0.5)
    elif write in ("scale", "qdata"):
        assert not torch.equal(values, before)
    else:
        assert torch.equal(values, new.dequantize(torch.float32))
    late = [weight.detach(), weight.data, made.state_dict()["weight"], weight.t(), weight[:64], weight[64:][8:40]]
    for aliases in (early, late):
        for alias in aliases[:3]:
            assert torch.equal(alias.dequantize(torch.float32), values)
        assert torch.equal(aliases[3].dequantize(torch.float32), values.t())
        # Tensors put in the place of others leave early slices of a plain weight where they were, as ``x.data = y`` does.
        if write not in ("set_inner", "scale", "qdata") or weight.is_packed or aliases is late:
            assert torch.equal(aliases[4].dequantize(torch.float32), values[:64])
            assert torch.equal(aliases[5].dequantize(torch.float32), values[72:104])
    for rows in (1, 5, 40):
        assert gemm_error(made, values, rows) < NEAR


@pytest.mark.parametrize("kind", KINDS)
def test_scales_changed_in_place(kind, packs):
    made = module(kind, packs)
    values = made.weight.dequantize(torch.float32)
    assert gemm_error(made, values) < NEAR
    for part in ("scale", "shift"):
        tensor = getattr(made.weight.detach(), part)
        if tensor is not None:
            tensor.mul_(2)
    for rows in (1, 5, 40):
        assert gemm_error(made, 2 * values, rows) < NEAR
    with torch.inference_mode():
        for part in ("scale", "shift"):
            tensor = getattr(made.weight, part)
            if tensor is not None:
                tensor.mul_(2)
    for rows in (1, 5, 40):
        assert gemm_error(made, 4 * values, rows) < NEAR


@pytest.mark.parametrize("kind", KINDS)
def test_a_low_rank_term_set_through_an_alias(kind, packs):
    made = module(kind, packs)
    values = made.weight.dequantize(torch.float32)
    assert gemm_error(made, values) < NEAR
    alias = made.weight.detach()
    up, down = torch.randn(320, 4), torch.randn(4, 256)
    alias.set_lowrank(up, down)
    assert made.weight.rank == made.state_dict()["weight"].rank == 4
    assert gemm_error(made, values + up @ down) < NEAR
    made.weight.set_lowrank(None, None)
    assert alias.rank == 0
    assert gemm_error(made, values) < NEAR


def test_the_codes_of_a_packed_weight_cannot_be_changed_without_effect():
    weight = module("int4", packed=True).weight
    with pytest.raises(RuntimeError, match="nference"):
        weight.qdata.zero_()
    weight.unpack()
    weight.qdata.zero_()
    assert not weight.codes().any()


@pytest.mark.parametrize("kind", ["int8", "int4", "float8"])
def test_memory_that_somebody_else_sees_is_not_packed(kind, monkeypatch, caplog):
    made = module(kind, packed=False)
    part = made.weight[:8]
    with caplog.at_level("INFO", logger="requanto.linear.prepack"):
        for _ in range(3):
            evaluate(made)
    assert not made.weight.is_packed
    assert caplog.text.count("shares its memory") == 1
    part.copy_(quantized(kind, (8, 256), seed=3))
    assert gemm_error(made, made.weight.dequantize(torch.float32)) < NEAR
    assert prepare(made, smallest=0) == {}
    held = made.weight.qdata
    del part
    evaluate(made)
    assert not made.weight.is_packed
    del held
    evaluate(made)
    assert made.weight.is_packed
    made.weight.unpack()
    made.share_memory()
    evaluate(made)
    assert not made.weight.is_packed


@pytest.mark.parametrize("kind", KINDS)
def test_data_of_another_weight(kind, packs):
    """``weight.data = other``: another type, another group size, another shape."""
    made = module(kind, packs)
    assert gemm_error(made, made.weight.dequantize(torch.float32)) < NEAR
    for other in (quantized("int4", seed=5), quantized("int8", seed=6), quantized("nf4", seed=7), quantized(kind)):
        made.weight.data = other
        assert made.weight.qtype == other.qtype
        assert gemm_error(made, other.dequantize(torch.float32)) < NEAR
    grouped = QTensor.quantize(torch.randn(320, 256).bfloat16(), "int4", group_size=32)
    made.weight.data = grouped
    assert gemm_error(made, grouped.dequantize(torch.float32)) < NEAR


# ------------------------------------------------------------------ 3. what a packed weight is can be seen


@pytest.mark.parametrize("kind", ["int8", "int4", "int3", "float8"])
def test_a_packed_weight_is_ordinary_tensors_with_a_name(kind):
    weight = module(kind, packed=True).weight
    if not has_layout(kind):
        pytest.skip("this processor has no layout for it")
    assert weight.layout_name in repr(weight)
    names, _context = weight.__tensor_flatten__()
    for name in names:
        part = getattr(weight, name)
        assert type(part) is torch.Tensor
        assert part.layout is torch.strided
        assert part.dtype != torch.int64


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_of_the_parts_is_the_same_weight(kind):
    """Nothing but the numbers counts: not their address, not what else the process holds."""
    weight = module(kind, packed=True).weight
    names, context = weight.__tensor_flatten__()
    parts = {name: getattr(weight, name).clone() for name in names}
    again = QTensor.__tensor_unflatten__(parts, context, weight.shape, weight.stride())
    assert torch.equal(again.dequantize(), weight.dequantize())
    x = x_of()
    with torch.no_grad():
        for rows in (x, x[:1]):
            assert error(F.linear(rows, again), rows.double() @ weight.dequantize(torch.float64).t()) < NEAR


EXPORT = """
import os, sys, torch, requanto
from requanto import QTensor

def load(name, kind):
    # Another packed model lives in this process.
    other = torch.nn.Linear(256, 320, bias=False)
    other.weight = torch.nn.Parameter(QTensor.quantize(torch.randn(320, 256).bfloat16(), kind), requires_grad=False)
    requanto.prepare(other, smallest=0)
    program = torch.export.load(f"{name}.pt2")
    x, want = torch.load(f"{name}.pt")
    got = program.module()(x)
    return float((got.double() - want.double()).norm() / want.double().norm())

# A process each that has loaded nothing; torch and Requanto are imported once.
for argument in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        try:
            print(argument, load(argument, argument.partition("-")[0]), flush=True)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
"""
EXPORTED = [f"{kind}-{form}" for kind in ("int8", "int4", "float8") for form in ("plain", "packed")]


def export(name, folder):
    kind, form = name.split("-")
    made, x = module(kind, form == "packed"), x_of()
    with torch.no_grad():
        want = made(x)
        program = torch.export.export(made, (x,)).run_decompositions()
    for part, tensor in {**program.state_dict, **program.constants}.items():
        if isinstance(tensor, torch.Tensor):
            assert tensor.dtype != torch.int64, (name, part)
    assert error(program.module()(x), want) < NEAR
    torch.export.save(program, folder / f"{name}.pt2")
    torch.save((x, want), folder / f"{name}.pt")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The error of each exported program in a process that loads it; and what the processes said."""
    import subprocess
    import sys

    folder = tmp_path_factory.mktemp("exported")
    for name in EXPORTED:
        export(name, folder)
    command = [sys.executable, "-c", EXPORT, *EXPORTED]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return dict(line.split() for line in done.stdout.splitlines()), done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("name", EXPORTED)
def test_an_exported_program_holds_the_numbers(name, exported):
    errors, log = exported
    assert name in errors, log
    assert float(errors[name]) < NEAR


def test_a_layout_of_another_machine_is_refused():
    weight = module("int8", packed=True).weight
    names, (words, dtype, _layout) = weight.__tensor_flatten__()
    parts = {name: getattr(weight, name) for name in names}
    with pytest.raises(ValueError, match=r"does not know .*requanto\.unpack\(model\)"):
        QTensor.__tensor_unflatten__(parts, (words, dtype, "strips-of-another"), weight.shape, None)


def test_unpack_puts_a_model_back():
    made = nn.Sequential(module("int8", True), nn.Linear(320, 4), module("nf4", True))
    assert requanto.unpack(made) == ["0.weight", "2.weight"]
    assert requanto.unpack(made) == []
    assert not made[0].weight.is_packed


# ------------------------------------------------------------------ 5. the constructor checks


def parts_of(kind: str) -> tuple[dict, dict]:
    weight = quantized(kind, (64, 128))
    record = {"qtype": weight.qtype, "shape": (64, 128), "dtype": torch.bfloat16, "group_size": weight.group_size}
    return dict(weight.inner_tensors()), record


BAD_PARTS = {
    "too many columns": lambda p: {**p, "qdata": torch.cat([p["qdata"]] * 2, 1)},
    "too few rows": lambda p: {**p, "qdata": p["qdata"][:-1]},
    "another dtype": lambda p: {**p, "qdata": p["qdata"].to(torch.int16)},
    "a shorter scale": lambda p: {**p, "scale": p["scale"][:-1]},
    "a scale of integers": lambda p: {**p, "scale": p["scale"].int()},
    "a scale on another device": lambda p: {**p, "scale": p["scale"].to("meta")},
    "a scale of one axis": lambda p: {**p, "scale": p["scale"][:, 0]},
    "one factor": lambda p: {**p, "up": torch.ones(64, 2)},
    "factors of integers": lambda p: {**p, "up": torch.ones(64, 2).int(), "down": torch.ones(2, 128).int()},
    "unlike factors": lambda p: {**p, "up": torch.ones(64, 2), "down": torch.ones(3, 128)},
    "a codebook": lambda p: {**p, "codebook": torch.ones(16)},
    "a row scale": lambda p: {**p, "row_scale": torch.ones(64, 1)},
}


@pytest.mark.parametrize("bad", BAD_PARTS)
@pytest.mark.parametrize("kind", ["int8", "int4", "float8", "nf4"])
def test_parts_that_do_not_fit_are_refused_however_they_come(kind, bad, tmp_path):
    good, record = parts_of(kind)
    made = QTensor(**good, **record)
    parts = BAD_PARTS[bad](good)
    with pytest.raises(ValueError, match=rf"{made.qtype.name}|low-rank|scale|codebook"):
        QTensor(**parts, **record)
    with pytest.raises(ValueError):
        made.set_inner(parts)
    with pytest.raises(ValueError):
        made.with_inner(parts)
    _, context = made.__tensor_flatten__()
    with pytest.raises(ValueError):
        QTensor.__tensor_unflatten__({f"_{n}": p for n, p in parts.items()}, context, made.shape, None)
    # A pickle that says so: nothing is built but tensors, and these are checked.
    build, (words, shape, dtype, _parts, is_parameter) = made.__reduce_ex__(2)
    stored = {**parts, "qdata": parts["qdata"].view(torch.uint8) if kind == "float8" else parts["qdata"]}
    with pytest.raises(ValueError):
        build(words, shape, dtype, stored, is_parameter)
    # And an operator of a graph that somebody edited. (With a tensor on the meta device torch computes nothing but a shape.)
    if any(part.is_meta for part in parts.values()):
        return
    with pytest.raises((ValueError, RuntimeError)):
        torch.ops.requanto.linear(torch.randn(2, 128), None, list(parts.values()), words, [64, 128], None)
    assert made.dequantize().shape == (64, 128)


@pytest.mark.parametrize(
    "change",
    [
        {"shape": (128, 64)},
        {"shape": (64, 1 << 40)},
        {"shape": (64,)},
        {"group_size": 48},
        {"group_size": -64},
        {"axis": 1},
        {"axis": -1},
        {"rotation": 48},
        {"rotation": 256},
        {"scale_bits": 3},
        {"dtype": torch.int32},
        {"dtype": torch.float8_e4m3fn},
        {"activation": qtypes["qint4"]},
    ],
    ids=str,
)
def test_a_record_that_does_not_fit_is_refused(change):
    parts, record = parts_of("int4")
    with pytest.raises((ValueError, TypeError)):
        QTensor(**parts, **{**record, **change})


def test_a_convolution_s_codes_are_not_read_beyond_their_end():
    """It was a heap overflow with bytes that the file chose."""
    codes, scale = torch.ones(1000, 4000, dtype=torch.int8), torch.ones(1000, 1)
    with pytest.raises(
        ValueError, match=r"qdata is torch\.int8 \(1000, 4000\), expected torch\.int8 \(1000, 400, 1, 1\)"
    ):
        QTensor(codes, scale, qtype=qint8, shape=(1000, 400, 1, 1), dtype=torch.bfloat16)
    honest = QTensor(
        codes[:, :400].reshape(1000, 400, 1, 1), scale, qtype=qint8, shape=(1000, 400, 1, 1), dtype=torch.bfloat16
    )
    build, arguments = honest.__reduce_ex__(2)

    class Lying:
        def __reduce__(self):
            return build, (*arguments[:3], {"qdata": codes, "scale": scale}, False)

    file = io.BytesIO()
    torch.save(Lying(), file)
    file.seek(0)
    with pytest.raises(ValueError, match=r"expected torch\.int8"):
        torch.load(file, weights_only=True)


def test_pickles_of_earlier_versions_still_load():
    from requanto.qtensor import _rebuild_qtensor

    weight = quantized("int4", (64, 128))
    parts = weight.inner_tensors()
    back = _rebuild_qtensor(
        parts["qdata"], parts["scale"], parts["shift"], "qint4", (64, 128), torch.bfloat16, 0, 64, False, True, "qint8"
    )
    assert torch.equal(back.dequantize(), weight.dequantize())
    assert isinstance(back, nn.Parameter)
    assert back.activation == qint8


# ------------------------------------------------------------------ 7. caches have an owner


def test_plans_do_not_keep_a_weight_alive():
    import gc
    import weakref

    made = module("int4", packed=True)
    assert gemm_error(made, made.weight.dequantize(torch.float32)) < NEAR
    assert made.weight._storage.plans
    gone = weakref.ref(made.weight._storage)
    gc.disable()
    try:
        del made
        assert gone() is None  # no cycle: freed at once, not by the collector
    finally:
        gc.enable()


def test_a_plan_that_another_thread_made_stale_is_not_kept(monkeypatch):
    """The weight changes while its plan is being made."""
    made = module("int8", packed=True)
    evaluate(made)
    made.weight._storage.plans.clear()
    new = quantized("int8", seed=2)
    choose = registry.choose

    def meanwhile(problem, **how):
        made.weight.data.copy_(new)
        return choose(problem, **how)

    monkeypatch.setattr(registry, "choose", meanwhile)
    registry.remember_plan(x_of(), made.weight)
    assert not made.weight._storage.plans


def test_prepare_under_a_default_device():
    """A probe that runs on another device than it thinks would decide for the whole process."""
    code = (
        "import torch, requanto\n"
        "m = torch.nn.Linear(256, 320, bias=False).bfloat16()\n"
        "m.weight = torch.nn.Parameter(requanto.QTensor.quantize(m.weight.data, 'int8'), requires_grad=False)\n"
        "n = torch.nn.Linear(256, 320, bias=False).bfloat16()\n"
        "n.weight = torch.nn.Parameter(requanto.QTensor.quantize(n.weight.data, 'int8'), requires_grad=False)\n"
        "torch.set_default_device('meta'); torch.set_default_dtype(torch.float64)\n"
        "print(requanto.prepare(m, smallest=0))\n"
        "torch.set_default_device(None); torch.set_default_dtype(torch.float32)\n"
        "print(requanto.prepare(n, smallest=0))\n"
    )
    import subprocess
    import sys

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == second


def test_quantized_in_inference_mode_and_changed_later():
    """Tensors made in inference mode count no versions: what is derived from them could not notice a change."""
    with torch.inference_mode():
        weight = QTensor.quantize(torch.randn(320, 256).bfloat16(), "int4")
    made = nn.Linear(256, 320, bias=False)
    made.weight = nn.Parameter(weight, requires_grad=False)
    prepare(made, smallest=0)
    values = weight.dequantize(torch.float32)
    assert gemm_error(made, values) < NEAR
    made.weight.scale.mul_(2)
    made.weight.shift.mul_(2)
    assert gemm_error(made, 2 * values) < NEAR


# ------------------------------------------------------------------ threads and forks


def test_another_thread_derives_tensors_while_they_are_dropped():
    storage = QTensor.quantize(torch.randn(32, 32), "int8")._storage

    class Derived:
        """Another one is added where Python may run another thread."""

        nbytes = 4

        @property
        def is_read_by_graph(self):
            storage.derived[len(storage.derived)] = Derived()
            return False

    storage.derived["first"] = Derived()
    storage.changed()
    assert storage.derived == {}


def test_codes_that_were_unpacked_before_a_change_of_another_thread_are_not_those_of_later_readers(monkeypatch):
    weight = quantized("int4")
    weight.pack(STRIPS)
    new, unpack = quantized("int4", seed=2), type(STRIPS).unpack

    def meanwhile(self, spec, parts):
        codes = unpack(self, spec, parts)
        monkeypatch.undo()
        weight._storage.write(spec, new._storage.parts)
        return codes

    monkeypatch.setattr(type(STRIPS), "unpack", meanwhile)
    held, later = (weight._storage.stored(weight._spec)["qdata"] for _ in range(2))
    assert not torch.equal(held, new.qdata)
    assert torch.equal(later, new.qdata)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_while_another_thread_packs():
    """The child has no such thread: it must not wait for it."""
    held, go = threading.Event(), threading.Event()

    def pack_slowly():
        with layout.LOCK:
            held.set()
            go.wait(60)

    thread = threading.Thread(target=pack_slowly)
    thread.start()
    held.wait(60)
    made = module("int8", packed=False)
    child = os.fork()
    if child == 0:
        import signal

        signal.alarm(60)
        torch.set_num_threads(1)  # OpenMP's threads are not there after a fork
        made.weight.data.copy_(quantized("int8", seed=1))
        made.weight.unpack()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    go.set()
    thread.join()
    assert status == 0


def test_storages_of_freed_weights_are_forgotten():
    made = module("int8", packed=True)
    address = made.weight._storage.parts["qdata"].data_ptr()
    assert storage._packed[address] is made.weight._storage
    del made
    assert address not in storage._packed


def test_packed_codes_are_computed_before_other_threads_see_them(monkeypatch):
    """Threads that run on other streams read them without waiting for the stream of the thread that packs."""
    weight, seen = quantized("int8"), []
    monkeypatch.setattr(storage, "_wait_for", lambda device: seen.append((device, weight.is_packed)))
    weight.pack(REVERSED)
    assert seen == [(torch.device("cpu"), False)]


def test_waits_for_the_current_stream_of_the_device(monkeypatch):
    waited = []

    class Stream:
        def __init__(self, device):
            self.device = device

        def synchronize(self):
            waited.append(self.device)

    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    storage._wait_for(torch.device("cuda:1"))
    storage._wait_for(torch.device("cpu"))
    assert waited == [torch.device("cuda:1")]


def test_the_number_that_stands_for_a_weight_is_its_own():
    """`data_ptr` does not change when the codes move, and no later weight or tensor has it."""
    weight = torch.nn.Parameter(QTensor.quantize(torch.randn(64, 64), "int4"), False)
    number = weight.data_ptr()
    assert number == weight.detach().data_ptr() == weight.t().data_ptr() == weight.data.data_ptr()
    prepare(torch.nn.ParameterList([weight]))
    assert weight.is_packed
    assert weight.data_ptr() == number
    weight.unpack()
    assert weight.data_ptr() == number
    assert weight.clone().data_ptr() != number
    seen = {number}
    for _ in range(20):  # each is freed before the next is made
        other = QTensor.quantize(torch.randn(64, 64), "int4").data_ptr()
        assert other not in seen
        seen.add(other)
    assert min(seen) > 2**57  # addresses of processes have 57 bits at most
    assert weight.to("meta").data_ptr() == 0
