"""quantize, freeze, quantization_map and requantize."""

import io

import pytest
import torch
from torch import nn

from requanto.checkpoint.format import CheckpointError, flatten
from requanto.model.quantize import freeze, quantization_map, quantize
from requanto.model.requantize import requantize
from requanto.nn import QLinear
from requanto.scales.optimizers import AbsmaxOptimizer, HqqOptimizer, MaxOptimizer
from requanto.tensor.qtensor import QTensor


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 64)
        self.block = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64))
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 20, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("counts", torch.arange(4.0))

    def forward(self, ids):
        return self.head(self.norm(self.block(self.embed(ids))))


IDS = torch.arange(10)


def test_names_and_types_given_as_strings_or_qtypes_agree():
    import requanto

    one, two = nn.Linear(64, 8), nn.Linear(64, 8)
    two.load_state_dict(one.state_dict())
    freeze(quantize(one, weights="int4"))
    freeze(quantize(two, weights=requanto.qint4))
    assert torch.equal(one.weight, two.weight)


@pytest.mark.parametrize("kind", ["int8", "int4", "int2", "float8"])
def test_a_shared_weight_is_frozen_once_and_stays_shared(kind):
    model = quantize(Tied(), weights=kind)
    before = model(IDS)
    freeze(model)
    assert isinstance(model.head.weight, QTensor)
    assert model.head.weight is model.embed.weight
    assert type(model.block[0]) is nn.Linear
    # The embedding reads the shared weight as well, and that is quantized now.
    assert (model(IDS) - before).norm() < 0.6 * before.norm()


def test_a_shared_weight_in_two_types_is_refused():
    a, b = nn.Linear(8, 8), nn.Linear(8, 8)
    b.weight = a.weight
    model = quantize(nn.Sequential(a, b), weights="int8", modules={"1": "int4"})
    with pytest.raises(ValueError, match=r"shared by '0'.*'1'"):
        freeze(model)


def test_include_exclude_and_modules_choose():
    model = Tied()
    quantize(model, weights="int8", include="block*", exclude=["*.2"])
    assert set(quantization_map(model)) == {"block.0"}
    model = Tied()
    quantize(model, weights="int8", modules={"block.*": "int4", "head": None, "embed": "float8"})
    kinds = {name: entry["weights"] for name, entry in quantization_map(model).items()}
    assert kinds == {"block.0": "qint4", "block.2": "qint4", "embed": "qfloat8_e4m3fn"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"weights": "int8", "include": "blok*"}, "include='blok\\*' matches no module"),
        ({"weights": "int8", "exclude": "heads"}, "Close names: head"),
        ({"weights": "int8", "modules": {"nothing": "int4"}}, "modules='nothing'"),
        ({"weights": "int8", "include": "norm"}, "nothing to quantize in Tied"),
        ({"weights": "int9"}, "did you mean 'int"),
        ({}, "nothing to quantize: set weights="),
        ({"weights": "int8", "activations": "int4"}, "int8, float8, nvfp4 or an MX type"),
        ({"weights": "int4", "optimizer": AbsmaxOptimizer()}, "qint4 weights need an AffineOptimizer"),
        ({"weights": "int8", "optimizer": MaxOptimizer()}, "qint8 weights need a SymmetricOptimizer"),
    ],
)
def test_bad_arguments_say_what_is_wrong(arguments, words):
    with pytest.raises(ValueError, match=words):
        quantize(Tied(), **arguments)


def test_quantizing_twice_gives_the_second_type_before_freezing_and_an_error_after():
    model = nn.Sequential(nn.Linear(64, 8))
    original = model[0].weight.detach().clone()
    quantize(model, weights="int8")
    quantize(model, weights="int4")
    assert quantization_map(model)["0"]["weights"] == "qint4"
    freeze(model)
    assert torch.equal(model[0].weight, QTensor.quantize(original, "int4"))
    quantize(model, weights="int4")  # the same again changes nothing
    with pytest.raises(ValueError, match="quantized to qint4 already and cannot become qint8"):
        quantize(model, weights="int8")
    assert quantization_map(model)["0"]["weights"] == "qint4"


def test_nan_weights_are_refused_by_name():
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].weight.data[0, 0] = float("nan")
    quantize(model, weights="int8")
    with pytest.raises(ValueError, match=r"0\.weight holds NaN"):
        freeze(model)


def test_hqq_lessens_the_error_it_is_there_to_lessen():
    torch.manual_seed(0)
    weight = torch.randn(32, 256) * torch.rand(32, 1)
    plain, hqq = nn.Linear(256, 32), nn.Linear(256, 32)
    for layer, optimizer in ((plain, MaxOptimizer()), (hqq, HqqOptimizer())):
        layer.weight.data.copy_(weight)
        freeze(quantize(layer, weights="int4", optimizer=optimizer))
    assert (hqq.weight.dequantize() - weight).abs().mean() < 0.99 * (plain.weight.dequantize() - weight).abs().mean()


def test_gpt2s_conv1d_is_quantized_along_its_inputs():
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    torch.manual_seed(0)
    layer = pytorch_utils.Conv1D(12, 64)
    x, float_weight = torch.randn(3, 64), layer.weight.detach().clone()
    model = quantize(nn.Sequential(layer), weights="int4")
    trained = model(x)
    freeze(model)
    assert type(layer) is pytorch_utils.Conv1D
    assert layer.weight.transposed
    torch.testing.assert_close(model(x), trained)
    rows = QTensor.quantize(float_weight.t().contiguous(), "int4").dequantize()
    torch.testing.assert_close(model(x), x @ rows.t() + layer.bias)


@pytest.mark.parametrize("kind", ["int8", "int4", "int2", "float8"])
@pytest.mark.parametrize("form", ["state_dict", "torch.save", "flat"])
@pytest.mark.parametrize("meta", [True, False], ids=["meta", "float"])
def test_requantize_gives_the_same_model(kind, form, meta):
    torch.manual_seed(0)
    model = freeze_of(kind)
    state, wanted = model.state_dict(), model(IDS)
    if form == "torch.save":
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
    elif form == "flat":
        state = flatten(state)
    with torch.device("meta" if meta else "cpu"):
        empty = Tied()
    assert requantize(empty, state, quantization_map(model)) is empty
    assert torch.equal(empty(IDS), wanted)
    assert empty.head.weight is empty.embed.weight
    assert quantization_map(empty) == quantization_map(model)
    assert torch.equal(empty.counts, torch.arange(4.0))


def freeze_of(kind):
    model = quantize(Tied(), weights=kind)
    freeze(model)
    return model


def test_requantize_makes_no_second_copy():
    model = freeze_of("int8")
    state = model.state_dict()
    with torch.device("meta"):
        empty = Tied()
    requantize(empty, state, quantization_map(model))
    assert empty.block[0].weight.qdata.data_ptr() == model.block[0].weight.qdata.data_ptr()


def test_an_unfrozen_model_comes_back_unfrozen():
    model = quantize(Tied(), weights="int4", include="block*")
    other = Tied()
    requantize(other, model.state_dict(), quantization_map(model))
    assert isinstance(other.block[0], QLinear)
    assert torch.equal(other(IDS), model(IDS))


def broken(change):
    model = freeze_of("int8")
    state, qmap = flatten(model.state_dict()), quantization_map(model)
    change(state, qmap)
    return lambda: requantize(Tied(), state, qmap)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s, m: s.pop("block.0.weight_qdata"), "block.0.weight is qint8 according to the map"),
        (lambda s, m: s.pop("norm.weight"), "missing norm.weight"),
        (lambda s, m: s.update(stray=torch.ones(1)), "Not in the model: stray"),
        (lambda s, m: m["block.0"].update(weights="qint4"), "block.0.weight is qint4 according to the map"),
        (lambda s, m: m["block.0"].update(weights="qint9"), "weights='qint9' for 'block.0'"),
        (lambda s, m: m.update(gone={"weights": "qint8", "activations": "none"}), "'gone', which the model"),
        (lambda s, m: m.pop("block.2"), "Not in the model: block.2.weight_qdata"),
        (lambda s, m: s.update({"block.0.weight_qdata": torch.zeros(3, 3, dtype=torch.int8)}), "expected torch.int8"),
        (lambda s, m: s.update({"norm.weight": torch.ones(3)}), "norm.weight: the model has"),
        (lambda s, m: s.update({"block.0.weight.qtype": "qint4"}), "is qint4, but the map .* has qint8"),
    ],
)
def test_a_map_and_tensors_that_disagree_are_refused(change, words):
    with pytest.raises(CheckpointError, match=words):
        broken(change)()


def test_the_type_strings_of_old_files_are_read_where_they_agree():
    broken(lambda s, m: s.update({"block.0.weight.qtype": "qint8", "block.0.weight.axis": "0"}))()
