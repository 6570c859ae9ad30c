"""Parts of a weight, copies of it, and operators that are called by hand: a write is whole, refused, or somewhere else."""

import copy
import gc
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from requanto import QTensor, prepare, qint8
from requanto.linear import custom_ops, grouped_linear, linear
from requanto.tensor.sharding import with_groups

KINDS = ["int8", "int4", "int2", "float8", "nf4"]


def quantized(kind: str, shape=(320, 256), seed: int = 0, **how) -> QTensor:
    generator = torch.Generator().manual_seed(seed)
    return QTensor.quantize((torch.randn(shape, generator=generator) * (1 + seed)).bfloat16(), kind, **how)


def module(kind: str, packed: bool, **how) -> nn.Linear:
    made = nn.Linear(256, 320, bias=False)
    made.weight = nn.Parameter(quantized(kind, **how), requires_grad=False)
    if packed:
        prepare(made, smallest=0)
    return made


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def gemm_error(made: nn.Linear, values: torch.Tensor) -> float:
    x = torch.randn(5, 256).bfloat16()
    with torch.no_grad():
        return max(error(made(x), x.double() @ values.double().t()) for _ in range(3))


# ------------------------------------------------------------------ slices


def written(part: QTensor, source: QTensor) -> str | None:
    """Copies, and returns the message if that is refused."""
    try:
        part.copy_(source)
    except (ValueError, NotImplementedError) as error:
        return str(error)
    return None


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("how", [{}, {"scale_bits": 6, "group_size": 32}, {"low_rank": 4}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_write_into_a_slice_is_whole_or_refused(kind, how, packed):
    made = module(kind, packed, **how)
    weight, other = made.weight, quantized(kind, seed=3, **how)
    for part in (lambda w: w[:64], lambda w: w[64:], lambda w: w[::2], lambda w: w[:, :128], lambda w: w[32:][:, 128:]):
        before, new = weight.dequantize(torch.float32), other.dequantize(torch.float32)
        wanted = before.clone()
        part(wanted).copy_(part(new))
        refused = written(part(weight), part(other))
        assert refused is None or "Write the whole weight" in refused
        wanted = before if refused else wanted
        assert torch.equal(weight.dequantize(torch.float32), wanted)
        assert gemm_error(made, wanted) < 2e-2


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["int8", "codebook4"])
def test_what_is_picked_or_regrouped_is_a_copy(kind, packed):
    made = module(kind, packed, low_rank=4)
    before = made.weight.dequantize(torch.float32)
    picked = made.weight[torch.arange(64)]
    picked.copy_(quantized(kind, (64, 256), seed=3, low_rank=4))
    assert torch.equal(made.weight.dequantize(torch.float32), before)
    fine = module("int4", packed)
    before = fine.weight.dequantize(torch.float32)
    with_groups(fine.weight, 32).copy_(quantized("int4", seed=3, group_size=32))
    assert torch.equal(fine.weight.dequantize(torch.float32), before)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_slices_follow_each_other_when_the_whole_is_gone(kind):
    with torch.inference_mode():
        made = module(kind, packed=True)
        one, two = made.weight[:64], made.weight[:64]
        del made
        gc.collect()
        new = quantized(kind, (64, 256), seed=3)
        one.copy_(new)
        assert torch.equal(two.dequantize(), new.dequantize())


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_slices_of_a_packed_weight_hold_no_more_than_themselves(kind):
    made = module(kind, packed=True)
    parts = made.weight.split(64)
    held = sum(part._storage.parts["qdata"].untyped_storage().nbytes() for part in parts)
    assert held == made.weight.qdata.nbytes
    assert torch.equal(torch.cat([part.dequantize() for part in parts]), made.weight.dequantize())


def test_without_the_low_rank_term_it_is_the_same_weight():
    made = module("int4", packed=True, low_rank=4)
    plain = made.weight.without_lowrank()
    made.weight.unpack()
    new = quantized("int4", seed=3, low_rank=4)
    made.weight.copy_(new)
    assert torch.equal(plain.dequantize(), new.without_lowrank().dequantize())


def test_a_slice_without_rows():
    made = module("int4", packed=True)
    assert F.linear(torch.randn(3, 256), made.weight[:0]).shape == (3, 0)
    empty = nn.Linear(256, 0, bias=False)
    empty.weight = nn.Parameter(QTensor.quantize(torch.empty(0, 256), "int8"), requires_grad=False)
    assert prepare(empty, smallest=0) == {}


# ------------------------------------------------------------------ copies


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_aliases_of_a_weight(kind, packed):
    made = module(kind, packed)
    new = quantized(kind, seed=3)
    for again in (copy.deepcopy(made.weight), pickle.loads(pickle.dumps(made.weight)), made.weight.clone()):
        before = made.weight.dequantize(torch.float32)
        again.copy_(new)
        assert torch.equal(made.weight.dequantize(torch.float32), before)
        again.scale.mul_(2)
        assert gemm_error(made, before) < 1e-2
    alias = copy.copy(made.weight)  # as of a float tensor: the same memory
    alias.copy_(new)
    assert torch.equal(made.weight.dequantize(), new.dequantize())
    assert gemm_error(made, new.dequantize(torch.float32)) < 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_a_clone_of_a_packed_weight_stores_its_codes_once(kind):
    made = copy.deepcopy(module(kind, packed=True))
    made.weight.activation = qint8
    with torch.no_grad():
        for rows in (1, 40, 40):
            linear(torch.randn(rows, 256).bfloat16(), made.weight)
    described = made.weight._storage.derived.get("cpu")
    assert described is None or described.nbytes == 0


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_the_matrix_of_a_convolution_can_be_copied(kind):
    weight = QTensor.quantize(torch.randn(64, 16, 3, 3), kind, axis=0)
    matrix = weight.as_matrix()
    for again in (matrix.clone(), copy.deepcopy(matrix), pickle.loads(pickle.dumps(matrix))):
        assert torch.equal(again.dequantize(), weight.dequantize().flatten(1))


def test_tensors_that_a_caller_holds_are_not_packed_away():
    made = module("int4", packed=False)
    inner = made.weight.inner_tensors()
    assert prepare(made, smallest=0) == {}
    inner["qdata"].zero_()
    assert not made.weight.codes().any()
    codes = torch.randint(0, 256, (320, 128), dtype=torch.uint8)
    other = quantized("int4")
    again = nn.Linear(256, 320, bias=False)
    weight = QTensor(
        codes, other.scale, other.shift, qtype=other.qtype, shape=(320, 256), dtype=torch.bfloat16, group_size=64
    )
    again.weight = nn.Parameter(weight, requires_grad=False)
    assert prepare(again, smallest=0) == {}
    del codes, inner
    assert prepare(again, smallest=0)


@pytest.mark.parametrize("packed", [False, True])
def test_scales_in_few_bits_cannot_be_changed_without_effect(packed):
    weight = module("int4", packed, scale_bits=6, group_size=32).weight
    for computed in (weight.scale, weight.shift):
        with pytest.raises(RuntimeError, match="nference"):
            computed.mul_(2)


@pytest.mark.parametrize("change", ["deepcopy", "assigned", "scaled rows"])
@pytest.mark.parametrize("kind", ["int4", "int2", "int8", "float8"])
def test_what_inference_mode_made_is_watched_all_the_same(kind, change):
    from requanto.tensor.lowrank import scale_rows

    made = module(kind, packed=True)
    with torch.inference_mode():
        if change == "deepcopy":
            made = copy.deepcopy(made)
        elif change == "assigned":
            made.weight.scale = made.weight.scale * 1
        else:
            scale_rows(made.weight, torch.ones(320))
    values = made.weight.dequantize(torch.float32)
    assert gemm_error(made, values) < 1e-2
    for part in (made.weight.scale, made.weight.shift):
        if part is not None:
            part.mul_(2)
    assert gemm_error(made, 2 * values) < 1e-2


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_backward_through_values_that_were_overwritten_is_refused(kind, packed):
    made = module(kind, packed)
    out = made(torch.randn(5, 256).bfloat16().requires_grad_())
    made.weight.data.copy_(quantized(kind, seed=3))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


# ------------------------------------------------------------------ operators called by hand


@pytest.mark.parametrize("kind", ["int8", "int4", "int3", "float8"])
def test_operators_check_what_a_packed_weight_is_said_to_be(kind):
    made = module(kind, packed=True)
    values = made.weight.dequantize(torch.float32)
    parts, words, shape = custom_ops.arguments(made.weight)
    x = torch.randn(1, 256).bfloat16()
    assert error(torch.ops.requanto.linear(x, None, parts, words, shape, None), x.double() @ values.double().t()) < 1e-2
    shapes = ([320, 0], [1, 256], [3200, 256], [256, 320], [320, 1 << 40], [-1, 256])
    wrong = [(parts, words, changed) for changed in shapes]
    for old, new in (("group=64", "group=32"), ("group=32", "group=64"), ("qint4", "qnf4"), ("qint8", "qint7")):
        if old in words:
            wrong.append((parts, words.replace(old, new), shape))
    wrong += [(parts, words.replace(" layout=", " layout=un"), shape), (parts[:-1], words, shape)]
    for place, part in enumerate(parts):
        for bad in (part[:1], part.flip(0) if part.dim() == 0 else part[..., :1], part.to(torch.int64)):
            if bad.shape != part.shape or bad.dtype != part.dtype:
                wrong.append(([*parts[:place], bad, *parts[place + 1 :]], words, shape))
        strided = torch.stack([part, part], -1)[..., 0]
        if place == 0 and part.dim() > 0:
            wrong.append(([strided, *parts[1:]], words, shape))
    for bad in wrong:
        with pytest.raises((ValueError, RuntimeError, KeyError)):
            torch.ops.requanto.linear(x, None, *bad, None)
        with pytest.raises((ValueError, RuntimeError, KeyError)):
            torch.ops.requanto.stored_codes(*bad)
    assert gemm_error(made, values) < 1e-2  # nothing of it was cached


@pytest.mark.parametrize("kind", ["float8", "int8", "int4"])
def test_packed_codes_with_other_strides_are_refused(kind):
    weight = module(kind, packed=True).weight
    if not weight.is_packed:
        pytest.skip("this processor has no layout for it")
    names, context = weight.__tensor_flatten__()
    parts = {name: getattr(weight, name) for name in names}
    codes = parts["_qdata"]
    for bad in (torch.stack([codes, codes], -1)[..., 0], codes[:1].expand(codes.shape)):
        with pytest.raises(ValueError, match="not contiguous"):
            QTensor.__tensor_unflatten__({**parts, "_qdata": bad}, context, weight.shape, None)


def test_sparse_parts_are_refused():
    weight = quantized("int8")
    with pytest.raises(ValueError, match="expected a strided one"):
        QTensor(weight.qdata, weight.scale.to_sparse(), qtype=qint8, shape=(320, 256), dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", [None, qint8])
@pytest.mark.parametrize("rows", [1, 5])
def test_scales_and_biases_with_gaps(rows, activation, dtype):
    """Operators read their memory whatever its strides."""
    table = torch.rand(320, 3) + 0.5
    whole = quantized("int8")
    x = torch.randn(rows, 256).to(dtype)
    for scale in (table[:, :1], torch.full((1, 1), 0.02).expand(320, 1), whole.scale):
        weight = QTensor(whole.qdata, scale, qtype=qint8, shape=(320, 256), dtype=torch.bfloat16)
        made = nn.Linear(256, 320, bias=False)
        made.weight = nn.Parameter(weight, requires_grad=False)
        made.weight.activation = activation
        for _ in range(2):
            for bias in (None, torch.randn(320, 2)[:, 0], torch.ones(1).expand(320)):
                wide = x.double()
                if activation is not None:
                    step = wide.abs().amax(-1, keepdim=True) / 127
                    wide = (wide / step).round() * step
                want = wide @ made.weight.dequantize(torch.float64).t() + (0 if bias is None else bias.double())
                with torch.no_grad():
                    assert error(linear(x, made.weight, bias), want) < 1e-2
            prepare(made, smallest=0)


def test_offsets_of_experts_beyond_the_rows():
    experts = QTensor.quantize(torch.randn(4, 64, 128), "int4")
    x = torch.randn(9, 128)
    want = grouped_linear(x, experts, torch.tensor([2, 2, 5, 9]))
    assert torch.equal(grouped_linear(x, experts, torch.tensor([2, 2, 5, 40])), want)


# ------------------------------------------------------------------ threads


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_writes_while_other_threads_pack_and_multiply(kind):
    """Every GEMM sees the old values or the new ones, and no write is lost."""
    made = module(kind, packed=True)
    choices = [quantized(kind, seed=seed) for seed in range(3)]
    values = [choice.dequantize(torch.float64) for choice in choices]
    wrong: list[str] = []
    stop = threading.Event()

    def repack():
        while not stop.is_set():
            made.weight.unpack()
            prepare(made, smallest=0)

    def multiply():
        while not stop.is_set():
            x = torch.randn(5, 256).bfloat16()
            with torch.inference_mode():
                out = made(x)
            if min(error(out, x.double() @ each.t()) for each in values) > 2e-2:
                wrong.append("a GEMM saw neither the old values nor the new ones")

    made.weight.data.copy_(choices[0])
    threads = [threading.Thread(target=repack), threading.Thread(target=multiply)]
    for thread in threads:
        thread.start()
    for step in range(60):
        new = choices[step % 3]
        made.weight.data.copy_(new)
        if not torch.equal(made.weight.dequantize(), new.dequantize()):
            wrong.append("a write was lost")
    stop.set()
    for thread in threads:
        thread.join()
    assert "a write was lost" not in wrong
    assert gemm_error(made, made.weight.dequantize(torch.float32)) < 1e-2


# ------------------------------------------------------------------ training outside of graphs


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_gradients(kind, packed, monkeypatch):
    """A gradient penalty: the first gradient is built with create_graph=True and differentiated again."""
    monkeypatch.setattr(custom_ops, "run", torch.no_grad()(custom_ops.run))  # a kernel records nothing for autograd
    made = module(kind, packed)
    dense = made.weight.dequantize().double()
    x = torch.randn(4, 256)
    found = []
    for values, weight in ((x.clone(), made.weight), (x.double(), dense)):
        values.requires_grad_()
        loss = F.linear(values, weight).pow(2).sum()
        (slope,) = torch.autograd.grad(loss, values, create_graph=True)
        slope.pow(2).sum().backward()
        found.append(values.grad)
    assert error(*found) < 2e-2


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_written_between_the_forward_and_the_backward_pass_is_noticed(kind):
    made = module(kind, packed=False)
    x = torch.randn(4, 256, requires_grad=True)
    out = F.linear(x, made.weight)
    with torch.no_grad():
        made.weight.copy_(quantized(kind, seed=1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_packed_between_the_forward_and_the_backward_pass(kind):
    made = module(kind, packed=False)
    want = torch.ones(4, 320, dtype=torch.double) @ made.weight.dequantize().double()
    x = torch.randn(4, 256, requires_grad=True)
    out = F.linear(x, made.weight)
    prepare(made, smallest=0)
    out.sum().backward()
    assert error(x.grad, want) < 2e-2
