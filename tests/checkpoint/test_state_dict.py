"""State dicts with quantized weights: safetensors' functions, load_state_dict with and without assign, torch.save."""

import copy
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn

import requanto
from requanto import CheckpointError, QTensor
from requanto.checkpoint.state_dict import flatten_described, join_described
from requanto.tensor.lowrank import append

KINDS = ["int8", "int4", "float8", "nf4", "codebook4"]


def build(kind: str | None, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(96, 64), nn.LayerNorm(64), nn.Linear(64, 96, bias=False)).to(dtype)
    if kind is not None:
        requanto.quantize(model, weights=kind)
        requanto.freeze(model)
    return model


def assert_equal(one, two) -> None:
    assert set(one) == set(two)  # safetensors sorts them by dtype
    for name, value in one.items():
        assert type(value) is type(two[name])
        assert value.dtype == two[name].dtype
        assert torch.equal(value, two[name]), name


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(params=[False, True], ids=["plain", "packed"])
def model(request, kind):
    made = build(kind)
    if request.param:
        requanto.prepare(made)
    return made


# ---------------------------------------------------------------------- safetensors


def test_save_file_and_load_file_give_the_same_dict(model, tmp_path):
    state = model.state_dict()
    safetensors.torch.save_file(state, tmp_path / "a.safetensors", metadata={"format": "pt"})
    assert_equal(safetensors.torch.load_file(tmp_path / "a.safetensors"), state)
    assert_equal(safetensors.torch.load(safetensors.torch.save(state)), state)
    safetensors.torch.save_file(safetensors.torch.load_file(tmp_path / "a.safetensors"), tmp_path / "b.safetensors")
    safetensors.torch.save_file(state, tmp_path / "c.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "c.safetensors").read_bytes()


def test_save_model_and_load_model(model, kind, tmp_path):
    safetensors.torch.save_model(model, tmp_path / "a.safetensors")
    other = build(kind, seed=1)
    assert safetensors.torch.load_model(other, tmp_path / "a.safetensors") == (set(), [])
    assert_equal(other.state_dict(), model.state_dict())


def test_tied_weights_are_written_once_and_stay_tied(kind, tmp_path):
    def tied(seed: int) -> nn.Sequential:
        made = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(2)))
        torch.manual_seed(seed)
        made[0].weight = nn.Parameter(QTensor.quantize(torch.randn(64, 64), kind), requires_grad=False)
        made[1].weight = made[0].weight
        return made

    model, other = tied(0), tied(1)
    with pytest.raises(RuntimeError, match="share memory"):  # as for float weights
        safetensors.torch.save_file(model.state_dict(), tmp_path / "a.safetensors")
    safetensors.torch.save_model(model, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as opened:
        assert not [key for key in opened.keys() if key.startswith("1.")]  # noqa: SIM118
    assert safetensors.torch.load_model(other, tmp_path / "a.safetensors") == (set(), [])
    assert other[0].weight is other[1].weight
    assert_equal(other.state_dict(), model.state_dict())


def test_a_program_without_requanto_sees_no_tensor_of_the_weights_name(model, tmp_path):
    safetensors.torch.save_file(model.state_dict(), tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as opened:
        names = set(opened.keys())
        assert all(type(opened.get_tensor(name)) is torch.Tensor for name in names)
    assert {"0.weight_qdata", "0.weight_scale", "0.weight_spec", "0.bias", "1.weight"} <= names
    assert not {"0.weight", "2.weight"} & names


def test_functions_imported_before_requanto_work(tmp_path):
    code = (
        "import torch\n"
        "from safetensors.torch import save_file as write, load_file as read, save_model, load_model\n"
        "kept = [read]\n"  # no module holds this reference under a name
        "import requanto\n"
        "torch.manual_seed(0)\n"
        "def build():\n"
        "    model = torch.nn.Sequential(torch.nn.Linear(64, 32))\n"
        "    requanto.quantize(model, weights='int4'); requanto.freeze(model); return model\n"
        "model = build()\n"
        f"file = {str(tmp_path / 'a.safetensors')!r}\n"
        "for load in (read, kept[0]):\n"
        "    write(model.state_dict(), file)\n"
        "    other = build()\n"
        "    assert not torch.equal(other[0].weight, model[0].weight)\n"
        "    print(other.load_state_dict(load(file)))\n"
        "    assert torch.equal(other[0].weight, model[0].weight)\n"
        "save_model(model, file); other = build(); print(load_model(other, file))\n"
        "assert torch.equal(other[0].weight, model[0].weight)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "<All keys matched successfully>\n" * 2 + "(set(), [])\n"


def test_a_merged_adapter_is_saved_and_loaded(kind, tmp_path):
    model, other = build(kind), build(kind, seed=1)
    append(model[0].weight, torch.randn(64, 3), torch.randn(3, 96))
    safetensors.torch.save_model(model, tmp_path / "a.safetensors")
    append(other[2].weight, torch.randn(96, 3), torch.randn(3, 64))  # goes, since the file has none
    safetensors.torch.load_model(other, tmp_path / "a.safetensors")
    assert (other[0].weight.rank, other[2].weight.rank) == (3, 0)
    assert_equal(other.state_dict(), model.state_dict())


def test_the_name_of_a_part_may_not_be_taken():
    weight = QTensor.quantize(torch.randn(4, 64), "int8")
    with pytest.raises(ValueError, match=r"a_scale is the name of another tensor"):
        safetensors.torch.save({"a": weight, "a_scale": torch.ones(2)})


@given(
    names=st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=5, unique=True),
    kind=st.sampled_from(KINDS),
    rows=st.integers(1, 5),
    columns=st.integers(1, 70),
)
def test_any_names_and_shapes(names, kind, rows, columns):
    state = {name: torch.ones(3) for name in names}
    weight = QTensor.quantize(torch.linspace(-1, 1, rows * columns).view(rows, columns), kind)
    state[f"{names[0]}.weight"] = weight
    flat = flatten_described(state)
    assert f"{names[0]}.weight" not in flat
    assert all(type(value) is torch.Tensor for value in flat.values())
    assert_equal(join_described(flat), state)


# ---------------------------------------------------------------------- damaged dicts


def test_missing_and_foreign_parts_are_errors_whether_strict_or_not(model):
    for strict in (True, False):
        for change, message in (
            (lambda flat: flat.pop("0.weight_scale"), r"needs the tensors .*0\.weight_scale"),
            (lambda flat: flat.pop("0.weight_qdata"), r"needs the tensors 0\.weight_qdata"),
            (lambda flat: flat.pop("0.weight_spec"), r"without the 0\.weight_spec that describes it"),
            (lambda flat: flat.update({"0.weight": torch.randn(64, 96)}), r"0\.weight is there as a tensor and as"),
            (lambda flat: flat["0.weight_scale"].fill_(float("nan")), r"NaN or Inf"),
        ):
            flat, before = flatten_described(copy.deepcopy(model.state_dict())), copy.deepcopy(model.state_dict())
            change(flat)
            with pytest.raises(CheckpointError, match=message):
                model.load_state_dict(flat, strict=strict)
            assert_equal(model.state_dict(), before)


def test_a_leftover_scale_is_an_error(kind):
    model = build(kind)
    state = {key: value for key, value in model.state_dict().items() if key != "0.weight"}
    with pytest.raises(CheckpointError, match=r"holds 0\.weight_scale"):
        model.load_state_dict({**state, "0.weight_scale": torch.ones(64, 1)}, strict=False)


def test_weights_of_another_model_are_listed_as_unexpected(kind):
    flat = flatten_described(build(kind).state_dict())
    result = nn.Sequential(nn.Linear(96, 64)).load_state_dict(
        {key: value for key, value in flat.items() if not key.startswith("0")}, strict=False
    )
    assert result.missing_keys == ["0.weight", "0.bias"]
    assert result.unexpected_keys == ["1.weight", "1.bias", "2.weight"]


def test_weights_of_another_type_are_refused():
    model = build("int8")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"copy_ between unlike quantized weights"):
        model.load_state_dict(flatten_described(build("int4", seed=1).state_dict()))
    assert torch.equal(model[0].weight, before["0.weight"])


def test_requantize_takes_described_parts(kind):
    model, other = build(kind), build(None, seed=1)
    requanto.requantize(other, flatten_described(model.state_dict()), requanto.quantization_map(model))
    assert_equal(other.state_dict(), model.state_dict())


# ---------------------------------------------------------------------- assign


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("flat", [False, True])
def test_assign_makes_a_float_model_quantized(model, device, flat, exact):
    state = flatten_described(model.state_dict()) if flat else model.state_dict()
    with torch.device(device):
        other = nn.Sequential(nn.Linear(96, 64), nn.LayerNorm(64), nn.Linear(64, 96, bias=False))
    other.load_state_dict(state, assign=True)
    assert_equal(other.state_dict(), model.state_dict())
    assert [parameter.requires_grad for parameter in other.parameters()] == [False, True, True, True, False]
    x = torch.randn(3, 96)
    torch.testing.assert_close(other(x), model(x), rtol=1e-5, atol=1e-5)  # one of them may be packed


def test_assign_says_which_parameters_no_longer_train(kind, caplog):
    other = build(None)
    with caplog.at_level("INFO", logger="requanto"):
        other.load_state_dict(build(kind).state_dict(), assign=True)
    assert "2 parameters that required gradients are quantized weights now" in caplog.text


def test_assign_of_a_part_of_the_model(kind):
    state = build(kind).state_dict()
    del state["2.weight"]
    other = build(None, seed=1)
    assert other.load_state_dict(state, assign=True, strict=False).missing_keys == ["2.weight"]
    assert isinstance(other[0].weight, QTensor)
    assert type(other[2].weight) is nn.Parameter
    assert other[2].weight.requires_grad


def test_outside_of_assign_a_gradient_is_still_refused(kind):
    model = build(kind)
    build(None).load_state_dict(model.state_dict(), assign=True)
    with pytest.raises(RuntimeError, match=r"cannot require a gradient.*requanto\.QTensor"):
        model.requires_grad_(True)


def test_without_assign_a_float_model_refuses_and_says_how(kind):
    other = build(None, seed=1)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(RuntimeError, match=r"load_state_dict\(\.\.\., assign=True\)"):
        other.load_state_dict(build(kind).state_dict())
    assert torch.equal(other[0].weight, before["0.weight"])


def test_a_float_state_dict_is_quantized(model, kind):
    if kind == "codebook4":
        pytest.skip("codebooks are learned again")
    expected = build(kind, seed=1).state_dict()
    model.load_state_dict(build(None, seed=1).state_dict())
    assert_equal(model.state_dict(), expected)


# ---------------------------------------------------------------------- torch.save


def test_torch_save_and_load_with_its_default_of_weights_only(model, kind, tmp_path):
    torch.save(model.state_dict(), tmp_path / "a.pt")
    loaded = torch.load(tmp_path / "a.pt")
    assert_equal(loaded, model.state_dict())
    for other, assign in ((build(kind, seed=1), False), (build(None, seed=1), True)):
        other.load_state_dict(loaded, assign=assign)
        assert_equal(other.state_dict(), model.state_dict())


@pytest.mark.parametrize("text", ["[" * 4000, '{"a":' * 800, "{" * 4096])
def test_a_description_nested_too_deeply_is_an_ordinary_tensor(text):
    found = join_described({"a_spec": torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)})
    assert [*found] == ["a_spec"]
