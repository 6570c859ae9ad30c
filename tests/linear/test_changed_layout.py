"""Another thread packs or unpacks a weight between the choice of an implementation and its run: the result is the same."""

import pytest
import torch
import torch.nn.functional as F

from requanto import QTensor, qint8
from requanto.linear import custom_ops, registry
from requanto.linear.columns import column_for
from requanto.linear.cpu.strips import STRIPS
from requanto.linear.cpu.weights import described

KINDS = [
    ("int4", None),
    ("int8", None),
    ("nf4", None),
    ("float8", None),
    ("int8", qint8),
    ("int4", qint8),
    ("int2", None),
]


@pytest.fixture(params=["pack", "unpack"])
def changes(request, monkeypatch):
    """What the other thread does to the weight after each choice of an implementation, and the list of those weights."""
    weights, original = [], registry.choose

    def choose(problem, **options):
        found = original(problem, **options)
        for weight in weights:
            weight.unpack() if request.param == "unpack" else weight.pack(STRIPS)
        return found

    monkeypatch.setattr(registry, "choose", choose)
    monkeypatch.setattr(custom_ops, "choose", choose)
    return request.param, weights


def test_a_gemm_reads_the_codes_in_the_layout_it_was_selected_for(changes, float_arithmetic):
    what, weights = changes
    for kind, activation in KINDS:
        for rows in (1, 5, 300):
            for gradient in (False, True):
                weight = QTensor.quantize(torch.randn(96, 128).bfloat16(), kind)
                weight.activation = activation
                weight = torch.nn.Parameter(weight, False)
                if what == "unpack":
                    weight.pack(STRIPS)
                    assert weight.is_packed
                else:
                    weight._storage.stays_plain = "so that the layer does not pack it"
                x = torch.randn(rows, 128).bfloat16().requires_grad_(gradient)
                want = x.detach().double() @ weight.dequantize(torch.float64).t()
                weights[:] = [weight]
                got = F.linear(x, weight)
                assert weight.is_packed is (what == "pack"), (kind, activation)
                weights.clear()
                for out in (got, F.linear(x, weight)):
                    distance = (out.detach().double() - want).norm() / want.norm()
                    assert distance < (2e-2 if activation else 1e-2), (kind, activation, rows, gradient)


def test_a_plan_whose_copies_are_out_of_date_meets_an_unpacked_weight(float_arithmetic):
    """Scales in float64 are copied for the library, and copied anew after a change in place."""
    weight = torch.nn.Parameter(QTensor.quantize(torch.randn(96, 128).double(), "int4"), False)
    weight.pack(STRIPS)
    x = torch.randn(3, 128)
    with torch.no_grad():
        for _ in range(3):
            F.linear(x, weight)
        (plan,) = weight._storage.plans.values()
        weight.unpack()
        weight.scale.mul_(2)
        got = plan.gemm(x, weight, None)
    want = x.double() @ weight.dequantize(torch.float64).t()
    assert (got - want).norm() < 1e-2 * want.norm()


def replaced(weight):
    weight._storage.set(QTensor.quantize(torch.randn(3, 64, 128), "int4", axis=1, group_size=32)._storage.parts)


def unpacked_and_copied(weight):
    weight.unpack()
    weight.copy_(QTensor.quantize(torch.randn(3, 64, 128), "int4", axis=1, group_size=32))


@pytest.mark.parametrize("change", [replaced, unpacked_and_copied, lambda weight: weight.unpack()])
def test_a_plan_of_an_expert_goes_with_the_tensors_of_the_whole_weight(change, float_arithmetic):
    weight = torch.nn.Parameter(QTensor.quantize(torch.randn(3, 64, 128), "int4", axis=1, group_size=32), False)
    weight.pack(STRIPS)
    expert, x = weight[1], torch.randn(2, 128)
    with torch.no_grad():
        for _ in range(2):
            F.linear(x, expert)
        change(weight)
        want = x.double() @ weight.dequantize(torch.float64)[1].t()
        for _ in range(2):
            assert (F.linear(x, expert) - want).norm() < 1e-3 * want.norm()
    assert expert._storage.plans is not weight._storage.plans


def test_a_snapshot_does_not_take_what_another_thread_read_after_a_change():
    """Both put what they derive into one dictionary."""
    weight = QTensor.quantize(torch.randn(96, 128), "int4")
    weight.pack(STRIPS)
    before, derived = weight.snapshot(), weight._storage.derived
    weight.unpack()
    derived["cpu"] = described(weight)  # the other thread had asked for the dictionary before the change
    found = described(before)
    if found is not None:  # there is a library
        assert found.strips


def test_a_copy_of_a_column_scale_that_another_thread_made_before_a_change():
    weight = QTensor.quantize(torch.randn(96, 128), "int8", column_scale=torch.rand(128) + 1)
    old = column_for(weight, torch.bfloat16)
    stale = weight._storage.derived["column"]
    weight._storage.set({**weight._storage.parts, "column": torch.rand(128) + 5})
    weight._storage.derived["column"] = stale
    assert not torch.equal(column_for(weight, torch.bfloat16), old)
    assert torch.equal(column_for(weight, torch.bfloat16), weight.column.bfloat16())
