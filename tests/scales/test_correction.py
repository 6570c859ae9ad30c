"""The low-rank correction: nearest to what is lost, counted, kept, deterministic, in products and files."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import requanto
from requanto import QTensor, QuantoConfig
from requanto.checkpoint import flatten, rebuild, spec_text
from requanto.config.config import format_version_of
from requanto.scales import correction


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(found, wanted):
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


@pytest.mark.parametrize("rotation", [None, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", ["int2", "int3", "nf4", "float8"])
def test_what_is_left_is_the_tail_of_the_spectrum(kind, transposed, rotation):
    """Eckart and Young: no term of that rank comes nearer to what the codes lose."""
    weight = random(96, 64)
    options = {"group_size": 32, "transposed": transposed, "rotation": rotation}
    tensor = QTensor.quantize(weight, kind, low_rank=8, **options)
    assert tensor.rank == 8
    lost = torch.linalg.svdvals((weight - tensor.without_lowrank().dequantize()).double())
    left = (weight - tensor.dequantize()).double().norm()
    assert left.item() == pytest.approx(lost[8:].norm().item(), rel=1e-4)
    x = random(5, 64, seed=1)
    assert relative(F.linear(x, tensor), x.double() @ tensor.dequantize(torch.float32).double().t()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "gained"), [("int2", 0.9), ("int3", 0.95), ("nf4", 0.95), ("int8", 1.0)])
def test_codes_and_term_found_in_turns_leave_less_than_once(kind, gained, dtype, monkeypatch):
    weight = random(96, 128).to(dtype)
    once = [None, None]
    for turns in (0, 1):
        monkeypatch.setattr(correction, "TURNS", 1 if turns == 0 else 5)
        once[turns] = QTensor.quantize(weight, kind, group_size=32, low_rank=8)
    squares = [(tensor.dequantize(torch.float64) - weight.double()).square().sum().item() for tensor in once]
    assert squares[1] <= gained * squares[0]
    assert once[1].scale.dtype == once[0].scale.dtype
    assert once[1].nbytes == once[0].nbytes


def test_the_best_turn_is_kept(monkeypatch):
    """Of turns that get worse again the one before is taken: rounding is made to get worse from the third on."""
    weight, seen = random(32, 64), []

    class Coarser:
        def __init__(self, values, step):
            self.values, self.step = (values / step).round() * step, step

        def values_without_lowrank(self):
            return self.values

        def set_lowrank(self, up, down):
            self.up, self.down = up, down

    def rounded(values):
        seen.append(0.1 if len(seen) < 2 else 2.0)
        return Coarser(values, seen[-1])

    best = correction.corrected(weight, 4, rounded)
    assert len(seen) == correction.TURNS
    assert best.step == 0.1


def test_bits_are_counted():
    weight = random(256, 512).bfloat16()
    plain, tensor = (QTensor.quantize(weight, "int4", low_rank=rank) for rank in (None, 16))
    assert tensor.up.dtype == tensor.down.dtype == torch.bfloat16
    assert tensor.bits_per_weight - plain.bits_per_weight == 16 * 16 * (256 + 512) / (256 * 512)


def test_experts_have_a_term_each_and_convolutions_one():
    experts = QTensor.quantize(random(3, 24, 64), "int2", low_rank=4)
    for index in range(3):
        alone = QTensor.quantize(random(3, 24, 64)[index], "int2", low_rank=4)
        assert relative(experts[index].dequantize(), alone.dequantize()) < 1e-5
    kernel, image = QTensor.quantize(random(8, 4, 3, 3), "int2", low_rank=2), random(2, 4, 6, 6)
    torch.testing.assert_close(F.conv2d(image, kernel), F.conv2d(image, kernel.dequantize()))


def test_a_rank_beyond_the_weight_is_the_whole_error():
    weight = random(6, 64)
    tensor = QTensor.quantize(weight, "int2", low_rank=100)
    assert tensor.rank == 6
    assert relative(tensor.dequantize(), weight) < 1e-6


def test_large_matrices_by_random_projection(monkeypatch):
    """Near the best there is, and the same whatever the global generator holds."""
    error = random(96, 160)
    best = torch.linalg.svdvals(error.double())[8:].norm()
    monkeypatch.setattr(correction, "FULL", 10)
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(correction.low_rank_factors(error, 8, torch.float32))
    assert torch.equal(found[0][0], found[1][0])
    assert (error.double() - found[0][0].double() @ found[0][1].double()).norm() < 1.01 * best


@pytest.mark.parametrize("value", [-1, 2.0, "8", True])
def test_what_is_no_rank_is_refused(value):
    with pytest.raises(ValueError, match="low_rank must be a rank, a positive integer"):
        QuantoConfig(weights="int4", low_rank=value)
    with pytest.raises(ValueError, match="w: low_rank must be"):
        QTensor.quantize(random(4, 64), "int4", low_rank=value, name="w")


def test_it_is_a_part_of_version_1():
    """Adapters merged into a weight were stored so from the start."""
    tensor = QTensor.quantize(random(12, 128), "int4", low_rank=4)
    line = spec_text(tensor)
    assert (line, format_version_of({"w": line})) == ("qint4 12x128 group=64 affine rank=4", 1)
    parts = {key.removeprefix("w_"): part for key, part in flatten({"w": tensor}).items()}
    assert torch.equal(rebuild("w", line, parts, torch.float32), tensor)


def test_an_adapter_comes_on_top_of_it_and_goes_again():
    tensor, up, down = (
        QTensor.quantize(random(64, 128), "int4", low_rank=4),
        random(64, 2, seed=1),
        random(2, 128, seed=2),
    )
    before = tensor.dequantize(torch.float64)
    tensor.add_(up @ down)
    assert tensor.rank == 6
    assert relative(tensor.dequantize(torch.float64), before + up.double() @ down.double()) < 1e-6
    tensor.sub_(up @ down)
    assert tensor.rank == 4
    assert relative(tensor.dequantize(torch.float64), before) < 1e-6


def test_a_corrected_weight_is_packed_for_the_cpu_too():
    layer, x = nn.Linear(1024, 1024, bias=False).requires_grad_(False), random(1, 1024)
    layer.weight = nn.Parameter(QTensor.quantize(layer.weight, "int4", low_rank=8, rotation=True), requires_grad=False)
    plain = layer.weight.clone()
    wanted = x.double() @ plain.dequantize(torch.float32).double().t()
    for _ in range(2):
        assert relative(layer(x), wanted) < 1e-2  # x is rounded
    assert torch.equal(layer.weight.clone(), plain)


def test_quantize_map_and_requantize():
    def network():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 16))

    model, x = network(), random(5, 64)
    requanto.quantize(model, weights="int2", group_size=16, low_rank=4)
    assert requanto.quantization_map(model)["0"]["low_rank"] == 4
    model(x).sum().backward()
    trained = model(x)
    requanto.freeze(model)
    torch.testing.assert_close(model(x), trained, rtol=1e-4, atol=1e-5)
    assert model[0].weight.rank == 4
    qmap = requanto.quantization_map(model)
    assert torch.equal(requanto.requantize(network(), flatten(model.state_dict()), qmap)(x), model(x))
