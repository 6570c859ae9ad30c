"""QTensor as a tensor: making, reading, copying, moving, saving, slicing, for every type and orientation."""

import copy
import gc
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from requanto import QTensor, QuantoConfig, qtypes

KINDS = ["int2", "int4", "int8", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2"]
NUMBERS = [*KINDS, "int3", "int6"]  # codes that are numbers; tests/dtypes/test_types.py has the values of the others
KINDS = [*NUMBERS, "uint8", "nf4", "fp6_e2m3", "codebook3"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(kind="int4", shape=(6, 64), dtype=torch.float32, seed=0, **options) -> QTensor:
    generator = torch.Generator().manual_seed(seed)
    return QTensor.quantize((torch.randn(*shape, generator=generator) * 0.1).to(dtype), kind, **options)


def same_bytes(one: torch.Tensor, two: torch.Tensor) -> bool:
    raw = [t.contiguous().view(torch.uint8) for t in (one, two)]
    return one.dtype == two.dtype and one.shape == two.shape and torch.equal(*raw)


def assert_same(one: QTensor, two: QTensor, *, shared: bool) -> None:
    """Same codes, scales, shifts and description, in the same memory or in memory of their own."""
    assert type(two) is QTensor
    assert one.spec() == two.spec()
    first, second = one.inner_tensors(), two.inner_tensors()
    assert first.keys() == second.keys()
    for name in first:
        assert same_bytes(first[name], second[name]), name
        assert (first[name].data_ptr() == second[name].data_ptr()) == shared, name


def values_by_hand(tensor: QTensor) -> torch.Tensor:
    """What the format says the stored tensors mean, weight by weight, in Python floats; 2D, rows along the first axis."""
    bits, rows = tensor.qtype.bits, []
    length = tensor.row_length
    group = tensor.group_size or length
    for r in range(tensor.qdata.shape[0]):
        stored, row = tensor.qdata[r].flatten(), []
        stream = 0 if bits == 8 else int.from_bytes(bytes(stored.tolist()), "little")
        for k in range(length):
            if bits == 8:
                code = float(stored[k])
            else:
                code = (stream >> (k * bits)) % 2**bits
                code = code if tensor.shift is not None else code - 2 ** (bits - 1)
            shift = 0.0 if tensor.shift is None else float(tensor.shift[r, k // group])
            row.append(code * float(tensor.scale[r, k // group]) - shift)
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64).reshape(tensor.canonical_shape)


# ------------------------------------------------------------------ making and reading


@given(
    kind=st.sampled_from(NUMBERS),
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 4),
    length=st.integers(1, 40),
    group=st.sampled_from([None, 1, 4, 8, 16]),
    symmetric=st.booleans(),
    transposed=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_dequantize_means_what_the_format_says(kind, dtype, rows, length, group, symmetric, transposed, seed):
    shape = (length, rows) if transposed else (rows, length)
    options = {"symmetric": True} if symmetric or qtypes[f"q{kind}"].bits == 8 else {"symmetric": False}
    tensor = make(kind, shape, dtype, seed, group_size=group, transposed=transposed, **options)
    wanted = values_by_hand(tensor)
    wanted = wanted.t() if transposed else wanted
    for found in (tensor.dequantize(torch.float32), tensor.dequantize()):
        assert found.shape == shape
        assert type(found) is torch.Tensor
        resolution = torch.finfo(found.dtype).eps
        size = tensor.scale.float().abs().max().item() * max(1.0, abs(tensor.qtype.qmax)) if kind[0] == "i" else 1.0
        torch.testing.assert_close(found.double(), wanted, rtol=2 * resolution, atol=4e-7 * size)
    assert tensor.dequantize().dtype == dtype
    assert tensor.dequantize(torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(3, 8, 32), (4, 3, 2, 2), (4, 3, 5), (4, 2, 3, 2, 2), (2, 2)])
def test_shapes_of_more_axes(kind, shape):
    experts = len(shape) == 3
    tensor = make(kind, shape)
    assert tensor.shape == shape
    assert tensor.axis == (1 if experts else 0)
    assert tensor.scale.shape[:-1] == (shape[:2] if experts else shape[:1])
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(*shape, generator=generator) * 0.1
    # Quantized as the matrix that it is, nothing else: rows are the leading axes, a row is all the rest.
    flat = QTensor.quantize(weight.reshape(tensor.lead.numel(), -1), kind)
    assert torch.equal(tensor.dequantize().reshape(flat.shape), flat.dequantize())
    if tensor.qtype.bits == 8:
        assert tensor.qdata.shape == shape  # 8-bit codes keep the weight's shape


def test_a_convolution_of_three_axes_says_axis_0():
    assert make(shape=(4, 3, 8), axis=0).lead == (4,)


@pytest.mark.parametrize("kind", KINDS)
def test_experts_stored_in_out_are_quantized_along_in(kind):
    weight = torch.randn(3, 32, 8) * 0.1
    seen = QTensor.quantize(weight, kind, transposed=True)
    stored = QTensor.quantize(weight.transpose(1, 2).contiguous(), kind)
    assert same_bytes(seen.qdata, stored.qdata)
    assert torch.equal(seen.dequantize(), stored.dequantize().transpose(1, 2))
    assert (seen.shape, seen.canonical_shape) == (weight.shape, stored.shape)
    assert seen.stride() == weight.transpose(1, 2).contiguous().transpose(1, 2).stride()


def test_it_answers_as_the_float_weight_did():
    weight = torch.randn(6, 64).bfloat16()
    tensor = QTensor.quantize(weight, "int4")
    for name in ("shape", "dtype", "device", "ndim", "layout", "is_floating_point", "numel", "element_size", "stride"):
        one, two = getattr(weight, name), getattr(tensor, name)
        assert (one() if callable(one) else one) == (two() if callable(two) else two), name
    assert len(tensor) == 6
    assert not tensor.requires_grad
    assert isinstance(tensor, torch.Tensor)


@pytest.mark.parametrize(
    ("kind", "group", "bytes_held"),
    [
        ("int8", None, 6 * 64 + 6 * 4),
        ("float8_e5m2", None, 6 * 64 + 6 * 4),
        ("int4", 32, 6 * 32 + 6 * 2 * 2 * 2),
        ("int2", 32, 6 * 16 + 6 * 2 * 2 * 2),
        ("int4", None, 6 * 32 + 6 * 2 * 4),
    ],
)
def test_bytes_are_those_of_codes_scales_and_shifts(kind, group, bytes_held):
    tensor = make(kind, dtype=torch.bfloat16, group_size=group)
    assert tensor.nbytes == bytes_held
    assert tensor.bits_per_weight == pytest.approx(bytes_held * 8 / (6 * 64))


def test_repr_says_what_it_is_and_prints_no_weights():
    assert repr(make("int4", (4, 128), group_size=64)) == (
        "QTensor(qint4, shape=(4, 128), dtype=torch.float32, group 64, affine, device=cpu, 5.00 bits a weight)"
    )
    assert "row, symmetric" in str(make("int8"))
    assert "qint8" in repr(nn.Parameter(make("int8"), requires_grad=False))


def test_what_cannot_be_made_says_why():
    with pytest.raises(ValueError, match=r"q_proj: a weight to quantize needs two axes or more, found shape \(8,\)"):
        QTensor.quantize(torch.ones(8), "int8", name="q_proj")
    with pytest.raises(ValueError, match=r"quantized already \(qint8\); call \.dequantize\(\)"):
        QTensor.quantize(make("int8"), "int4")
    with pytest.raises(ValueError, match=r"axis must lie in 0\.\.0, found 1"):
        QTensor.quantize(torch.ones(4, 4), "int8", axis=1)
    with pytest.raises(ValueError, match="unknown quantized type 'int9'"):
        QTensor.quantize(torch.ones(4, 4), "int9")
    with pytest.raises(TypeError, match=r"needs all of them; see QTensor\.quantize"):
        QTensor(torch.ones(4, 4))


# ------------------------------------------------------------------ state_dict and load_state_dict


def model(kind="int4", seed=0, dtype=torch.float32) -> nn.Sequential:
    made = nn.Sequential(nn.Linear(64, 6), nn.Linear(6, 3)).to(dtype)
    made[0].weight = nn.Parameter(make(kind, dtype=dtype, seed=seed), requires_grad=False)
    return made.requires_grad_(False)


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_holds_the_quantized_weight(kind):
    made = model(kind)
    state = made.state_dict()
    assert list(state) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert_same(made[0].weight, state["0.weight"], shared=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict(kind, assign):
    source, target = model(kind, 1), model(kind, 2)
    x = torch.randn(5, 64)
    before = target(x)
    assert target.load_state_dict(source.state_dict(), assign=assign) == ([], [])
    assert_same(source[0].weight, target[0].weight, shared=assign)
    assert isinstance(target[0].weight, nn.Parameter)
    assert torch.equal(target(x), source(x))
    assert not torch.equal(before, source(x))


@pytest.mark.parametrize("kind", KINDS)
def test_assign_into_a_float_model_and_onto_the_meta_device(kind):
    source = model(kind, 1)
    with torch.device("meta"):
        target = nn.Sequential(nn.Linear(64, 6), nn.Linear(6, 3))
    target.requires_grad_(False).load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(5, 64)
    assert torch.equal(target(x), source(x))


def test_float_weights_loaded_into_a_quantized_model_are_quantized():
    source = nn.Sequential(nn.Linear(64, 6), nn.Linear(6, 3))
    target = model("int4")
    target.load_state_dict(source.state_dict())
    assert_same(QTensor.quantize(source[0].weight, "int4"), target[0].weight, shared=False)


def test_load_state_dict_refuses_what_does_not_fit():
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.weight"):
        model().load_state_dict({**model().state_dict(), "0.weight": make(shape=(6, 32))})
    with pytest.raises(RuntimeError, match=r"copy_ between unlike quantized weights: .*qint8.* into .*qint4"):
        model("int4").load_state_dict(model("int8").state_dict())
    float_model = nn.Sequential(nn.Linear(64, 6), nn.Linear(6, 3))
    with pytest.raises(RuntimeError, match=r"copy_ of a quantized weight into a float tensor: call \.dequantize\(\)"):
        float_model.load_state_dict(model().state_dict())


# ------------------------------------------------------------------ copies


@pytest.mark.parametrize("kind", KINDS)
def test_clone_and_deepcopy_have_memory_of_their_own(kind):
    tensor = make(kind)
    assert_same(tensor, tensor.clone(), shared=False)
    assert_same(tensor, copy.deepcopy(tensor), shared=False)
    assert_same(tensor, tensor.detach(), shared=True)
    assert_same(tensor, tensor.contiguous(), shared=True)


def test_deepcopy_of_a_model_keeps_parameters_and_ties():
    made = model()
    made.tied = nn.Linear(64, 6, bias=False)
    made.tied.weight = made[0].weight
    copied = copy.deepcopy(made)
    assert isinstance(copied[0].weight, nn.Parameter)
    assert copied.tied.weight is copied[0].weight
    assert_same(made[0].weight, copied[0].weight, shared=False)
    assert [n for n, _ in copied.named_parameters()] == [n for n, _ in made.named_parameters()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("as_parameter", [False, True])
def test_pickle_and_torch_save_with_weights_only(kind, as_parameter, tmp_path):
    tensor = make(kind, (3, 4, 32), torch.bfloat16, group_size=8, transposed=True)
    tensor.activation = qtypes["qint8"]
    if as_parameter:
        tensor = nn.Parameter(tensor, requires_grad=False)
    pickled = pickle.loads(pickle.dumps(tensor))
    torch.save({"w": tensor, "again": tensor}, tmp_path / "w.pt")
    loaded = torch.load(tmp_path / "w.pt", weights_only=True)
    for back in (pickled, loaded["w"]):
        assert_same(tensor, back, shared=False)
        assert isinstance(back, nn.Parameter) == as_parameter
        assert not back.requires_grad
    assert loaded["again"] is loaded["w"]  # one tensor saved once


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_state_dict_gives_the_same_outputs(kind, tmp_path):
    source, target = model(kind, 1), model(kind, 2)
    torch.save(source.state_dict(), tmp_path / "model.pt")
    target.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True, map_location="cpu"))
    x = torch.randn(3, 64)
    assert torch.equal(source(x), target(x))
    meta = torch.load(tmp_path / "model.pt", weights_only=True, map_location="meta")["0.weight"]
    assert (meta.device.type, meta.qdata.device.type, meta.scale.device.type) == ("meta",) * 3


def test_shared_memory_for_other_processes():
    tensor = make()
    assert not tensor.is_shared()
    model_ = model()
    model_.share_memory()
    assert tensor.share_memory_() is tensor
    assert tensor.is_shared()
    assert all(inner.is_shared() for inner in model_[0].weight.inner_tensors().values())


def test_a_deleted_tensor_frees_its_memory():
    tensor = make(shape=(64, 64))
    codes = tensor.qdata
    copied = tensor.detach()
    del tensor, copied
    gc.collect()
    assert len(gc.get_referrers(codes)) <= 1  # this frame only


# ------------------------------------------------------------------ dtype, device, gradient


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "change", [lambda t: t.to(torch.bfloat16), lambda t: t.bfloat16(), lambda t: t.half(), lambda t: t.double()]
)
def test_a_dtype_changes_what_is_computed_in_never_the_codes(kind, change):
    tensor = make(kind)
    cast = change(tensor)
    assert cast.dtype != tensor.dtype
    assert cast.dequantize().dtype == cast.dtype
    for name, inner in tensor.inner_tensors().items():
        assert same_bytes(inner, cast.inner_tensors()[name])
    assert_same(tensor, cast.to(torch.float32), shared=cast.qdata.data_ptr() == tensor.qdata.data_ptr())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_cast_to_a_dtype_computes_in_it(kind, dtype):
    made = model(kind)
    x = torch.randn(4, 64)
    wanted = made(x)
    made.to(dtype)
    assert isinstance(made[0].weight, nn.Parameter)
    assert made[0].weight.dtype == dtype
    out = made(x.to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), wanted, rtol=0.05, atol=0.02)


def test_a_dtype_that_is_no_float_is_refused():
    for dtype in (torch.int8, torch.float8_e4m3fn, torch.uint8):
        with pytest.raises(NotImplementedError, match=rf"{dtype} was asked for\. Call \.dequantize\(\) first"):
            make().to(dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_meta_device(kind):
    tensor = make(kind, dtype=torch.bfloat16)
    meta = tensor.to("meta")
    assert (meta.device.type, meta.shape, meta.dtype, meta.spec()) == ("meta", (6, 64), torch.bfloat16, tensor.spec())
    assert all(inner.device.type == "meta" for inner in meta.inner_tensors().values())
    made = QTensor.quantize(torch.empty(6, 64, device="meta", dtype=torch.bfloat16), kind)
    assert made.spec() == tensor.spec()
    for name, inner in tensor.inner_tensors().items():
        assert (made.inner_tensors()[name].shape, made.inner_tensors()[name].dtype) == (inner.shape, inner.dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_a_product_on_the_meta_device_has_a_shape(kind):
    weight = make(kind, dtype=torch.bfloat16).to("meta")
    out = nn.functional.linear(torch.empty(3, 64, device="meta", dtype=torch.bfloat16), weight)
    assert (out.shape, out.dtype, out.device.type) == ((3, 6), torch.bfloat16, "meta")


def test_modules_move_to_meta_and_back_empty():
    made = model().to("meta")
    assert made[0].weight.qdata.is_meta
    made.to_empty(device="cpu")
    assert made[0].weight.qdata.device.type == "cpu"
    made.load_state_dict(model(seed=5).state_dict())
    assert torch.equal(made[0].weight, make(seed=5))


def test_cpu_and_to_of_the_own_device_and_dtype():
    tensor = make()
    assert tensor.to("cpu") is tensor
    assert tensor.to(torch.float32) is tensor
    assert_same(tensor, tensor.to("cpu", copy=True), shared=False)


def test_a_gradient_is_refused_with_the_way_out():
    tensor = make()
    for ask in (
        lambda: tensor.requires_grad_(),
        lambda: setattr(tensor, "requires_grad", True),
        lambda: nn.Parameter(tensor),
        lambda: model().requires_grad_(True),
    ):
        with pytest.raises(RuntimeError, match=r"cannot require a gradient.*LoRA.*requanto\.quantize"):
            ask()
    assert tensor.requires_grad_(False) is tensor
    tensor.requires_grad = False
    assert not nn.Parameter(tensor, requires_grad=False).requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_inference_mode(kind):
    with torch.inference_mode():
        tensor = make(kind)
        out = nn.functional.linear(torch.ones(2, 64), tensor)
        copied = copy.deepcopy(tensor)
    assert torch.equal(out, nn.functional.linear(torch.ones(2, 64), make(kind)))
    assert_same(make(kind), copied, shared=False)
    made = model(kind)
    with torch.inference_mode():
        assert torch.equal(made(torch.ones(2, 64)), made(torch.ones(2, 64)))
        copy.deepcopy(made)
        made.to(torch.bfloat16)
    assert made[0].weight.dtype == torch.bfloat16


def test_data_gives_and_takes_quantized_weights():
    """accelerate and Diffusers move weights by ``parameter.data = moved``; torch alone would leave the codes behind."""
    parameter = nn.Parameter(make(seed=1), requires_grad=False)
    assert_same(parameter, parameter.data, shared=True)
    other = make("int8", (3, 32), torch.bfloat16, seed=2)
    parameter.data = other
    assert_same(other, parameter, shared=True)
    assert (parameter.shape, parameter.dtype, parameter.qtype.name) == ((3, 32), torch.bfloat16, "qint8")
    assert isinstance(parameter, nn.Parameter)
    with pytest.raises(NotImplementedError, match=r"`\.data = \.\.\.` of a QTensor with a Tensor"):
        parameter.data = torch.zeros(3, 32)
    assert_same(other, parameter, shared=True)


def test_accelerate_rebuilds_a_moved_parameter_from_itself():
    tensor = nn.Parameter(make(), requires_grad=False)
    assert_same(tensor, QTensor(tensor, requires_grad=False), shared=True)
    torch.utils.swap_tensors(first := make(seed=1), second := make(seed=2))
    assert torch.equal(first, make(seed=2))
    assert torch.equal(second, make(seed=1))


# ------------------------------------------------------------------ slices

SLICES = [
    ((5, 6, 64), lambda w: w[0]),
    ((5, 6, 64), lambda w: w[-1]),
    ((5, 6, 64), lambda w: w[1:3]),
    ((5, 6, 64), lambda w: w[::2]),
    ((5, 6, 64), lambda w: w[torch.tensor([4, 0, 0])]),
    ((5, 6, 64), lambda w: w[[1, 2]]),
    ((5, 6, 64), lambda w: w[torch.tensor([True, False, True, False, True])]),
    ((5, 6, 64), lambda w: w.index_select(0, torch.tensor([3, 1]))),
    ((5, 6, 64), lambda w: w[2][1:4]),
    ((5, 6, 64), lambda w: w[:, 2:5]),
    ((5, 6, 64), lambda w: w[1].t()),
    ((5, 6, 64), lambda w: w.transpose(1, 2)),
    ((5, 6, 64), lambda w: w.transpose(-1, -2)[3]),
    ((5, 6, 64), lambda w: w.permute(0, 2, 1)),
    ((5, 6, 64), lambda w: w.unbind(0)[2]),
    ((5, 6, 64), lambda w: list(w)[4]),
    ((5, 6, 64), lambda w: w.split([2, 3])[1]),
    ((6, 64), lambda w: w[2:]),
    ((6, 64), lambda w: w[4:2]),
    ((6, 64), lambda w: w[torch.tensor([5, 5, 0])]),
    ((6, 64), lambda w: w.t()),
    ((6, 64), lambda w: w.T.mT),
    ((6, 64), lambda w: w.chunk(3)[1]),
    ((6, 64), lambda w: w.chunk(2, dim=-1)[1]),
    ((6, 64), lambda w: w[:, 16:48]),
    ((6, 64), lambda w: w.t()[16:32]),
    ((6, 64), lambda w: w.t()[:, 1:3]),
    ((6, 64), lambda w: w.narrow(0, 1, 2)),
    ((6, 64), lambda w: w.view(6, 64)),
    ((6, 64), lambda w: w.view(-1, 64)),
    ((4, 4, 4, 4), lambda w: w[1:3]),
]


@pytest.mark.parametrize("kind", ["int2", "int4", "int8", "float8_e4m3fn"])
@pytest.mark.parametrize("cut", range(len(SLICES)))
def test_slices_are_those_of_the_float_weight(kind, cut):
    shape, take = SLICES[cut]
    tensor = make(kind, shape, group_size=16)
    part = take(tensor)
    assert isinstance(part, QTensor)
    assert torch.equal(part.dequantize(), take(tensor.dequantize()))
    assert part.shape == take(tensor.dequantize()).shape


def test_slices_are_views():
    tensor = make(shape=(5, 6, 64))
    tensor[1] = make(shape=(6, 64), seed=9)
    assert torch.equal(tensor[1], make(shape=(6, 64), seed=9))
    assert torch.equal(tensor[0], make(shape=(5, 6, 64))[0])


@pytest.mark.parametrize(
    "take",
    [
        lambda w: w[0],
        lambda w: w[:, :3],
        lambda w: w[:, ::2],
        lambda w: w[:, 0],
        lambda w: w[torch.tensor([0]), torch.tensor([1])],
        lambda w: w.view(-1),
        lambda w: w.reshape(12, 32),
        lambda w: w.t()[torch.tensor([0])],
        lambda w: w[:, None].transpose(0, 1),
        lambda w: w.split([5, 59], 1)[1],
    ],
)
def test_a_cut_through_groups_or_axes_gives_values(take):
    weight = make(group_size=16)
    assert not isinstance(take(weight), QTensor)
    assert torch.equal(take(weight), take(weight.dequantize()))


def test_an_expert_that_is_not_there():
    with pytest.raises(IndexError):
        make(shape=(2, 3, 64))[2]


@pytest.mark.parametrize("kind", KINDS)
def test_equal_compares_codes_and_description(kind):
    assert torch.equal(make(kind), make(kind))
    assert not torch.equal(make(kind), make(kind, seed=1))
    assert not torch.equal(make(kind), make("int4" if kind != "int4" else "int2"))
    changed = make(kind)
    changed.scale.mul_(2)
    assert not torch.equal(make(kind), changed)


def test_the_config_and_the_tensor_agree_on_names():
    assert {QuantoConfig(weights=kind).weights for kind in KINDS} == {
        *("int3", "int6", "uint8", "nf4", "fp6_e2m3", "codebook3"),
        "int2",
        "int4",
        "int8",
        "float8",
        "float8_e4m3fnuz",
        "float8_e5m2",
    }
