"""Quantized modules against the float product of the dequantized weight."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from requanto.model.calibrate import Calibration
from requanto.model.quantize import freeze, quantize
from requanto.nn import QConv2d, QLinear, QModuleMixin, register_qmodule
from requanto.nn.registry import modules as registry
from requanto.tensor.qtensor import QTensor

KINDS = ["int8", "int4", "int2", "float8", "int3", "uint8", "nf4", "codebook4", "nvfp4"]


def inputs_for(module: nn.Module) -> torch.Tensor:
    torch.manual_seed(1)
    if isinstance(module, nn.Embedding):
        return torch.randint(0, module.num_embeddings, (2, 5))
    if isinstance(module, nn.Linear):
        return torch.randn(3, module.in_features)
    dims = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3, nn.ConvTranspose2d: 2}[type(module)]
    return torch.randn(2, module.in_channels, *[6] * dims)


MODULES = {
    "linear": lambda: nn.Linear(32, 12),
    "conv1d": lambda: nn.Conv1d(4, 6, 3, padding=1),
    "conv2d": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),
    "conv2d-reflect": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    "conv3d": lambda: nn.Conv3d(2, 4, 3),
    "conv-transpose2d": lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1),
    "embedding": lambda: nn.Embedding(11, 16, padding_idx=0),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES.keys())
def test_a_module_computes_with_its_rounded_weight_before_and_after_freezing(make, kind):
    torch.manual_seed(0)
    module = make()
    float_cls, original = type(module), copy.deepcopy(module)
    x = inputs_for(module)
    assert quantize(module, weights=kind) is module
    assert isinstance(module, QModuleMixin)
    rounded = QTensor.quantize(original.weight, kind, axis=0).dequantize()
    assert not torch.equal(rounded, original.weight)
    original.weight.data.copy_(rounded)
    torch.testing.assert_close(module(x), original(x))
    freeze(module)
    assert type(module) is float_cls
    assert isinstance(module.weight, QTensor)
    torch.testing.assert_close(module(x), original(x))


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES.keys())
def test_gradients_pass_straight_through_the_rounding(make):
    torch.manual_seed(0)
    module = make()
    reference = copy.deepcopy(module)
    x = inputs_for(module)
    quantize(module, weights="int8")
    reference.weight.data.copy_(QTensor.quantize(reference.weight, "int8", axis=0).dequantize())
    module(x).square().sum().backward()
    reference(x).square().sum().backward()
    torch.testing.assert_close(module.weight.grad, reference.weight.grad)


def test_a_step_of_training_moves_the_float_weight_under_quantization():
    torch.manual_seed(0)
    module = quantize(nn.Linear(16, 4), weights="int4")
    before = module.weight.detach().clone()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module(torch.randn(8, 16)).square().mean().backward()
    optimizer.step()
    assert not torch.equal(module.weight, before)
    trained = module.weight.detach().clone()
    freeze(module)
    torch.testing.assert_close(module.weight.dequantize(), QTensor.quantize(trained, "int4").dequantize())


def test_a_users_own_module_is_quantized_once_it_is_registered():
    class Doubled(nn.Linear):
        def forward(self, input):
            return F.linear(input, 2 * self.weight, self.bias)

    module = nn.Sequential(Doubled(8, 8), nn.Linear(8, 8))
    quantize(module, weights="int8")
    assert type(module[0]) is Doubled  # its forward is its own: quantizing it as a Linear would change what it computes

    @register_qmodule(Doubled)
    class QDoubled(QModuleMixin, Doubled):
        @classmethod
        def qcreate(cls, module, weights, activations=None, optimizer=None, device=None):
            return cls(
                module.in_features, module.out_features, device=device, weights=weights, activations=activations,
                optimizer=optimizer,
            )  # fmt: skip

        def forward(self, input):
            return 2 * F.linear(input, self.qweight) + self.bias

    try:
        module = Doubled(8, 8)
        x = torch.randn(2, 8)
        expected = 2 * F.linear(x, QTensor.quantize(module.weight, "int8").dequantize()) + module.bias
        quantize(module, weights="int8")
        assert type(module) is QDoubled
        torch.testing.assert_close(module(x), expected)
    finally:
        del registry._table[Doubled]


def test_qmodules_are_made_directly_as_in_optimum_quanto():
    linear = QLinear(16, 8, weights="qint8", activations="qint8")
    assert linear.weight_qtype.name == "qint8"
    assert linear.activation_qtype.name == "qint8"
    assert float(linear.input_scale) == 1
    linear.freeze()
    assert linear.frozen
    assert QConv2d(3, 4, 3, weights="int8").weight_qtype.name == "qint8"


def test_the_mixin_must_stand_before_the_module():
    class Wrong(nn.Linear, QModuleMixin):
        def __init__(self):
            QModuleMixin.__init__(self, weights="int8")

    with pytest.raises(TypeError, match="before"):
        Wrong()


def test_hooks_and_attributes_survive_the_change_of_class_and_back():
    linear = nn.Linear(8, 8)
    calls = []
    linear.register_forward_hook(lambda *_: calls.append(1))
    linear.mine = "kept"
    quantize(linear, weights="int8", activations="int8")
    linear(torch.randn(1, 8))
    assert calls == [1]
    assert linear.mine == "kept"
    other = nn.Linear(8, 8)
    quantize(other, weights="int8")
    freeze(other)
    assert "weight_qtype" not in other.__dict__
    assert not other._forward_hooks


def test_a_deepcopy_quantizes_with_its_own_scales():
    linear = quantize(nn.Linear(8, 8), weights="int8", activations="int8")
    other = copy.deepcopy(linear)
    linear.input_scale.fill_(0.5)
    linear.calibrated = True
    assert float(other.input_scale) == 1
    assert not other.calibrated
    x = torch.randn(2, 8)
    assert not torch.equal(linear(x), other(x))


@pytest.mark.parametrize("kind", ["int8", "float8"])
@pytest.mark.parametrize("static", [False, True], ids=["on the fly", "static"])
def test_quantized_activations_compile_without_graph_breaks(kind, static):
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.LayerNorm(16), nn.Linear(16, 4))
    x = torch.randn(5, 16)
    quantize(model, weights="int8", activations=kind)
    if static:
        with torch.no_grad(), Calibration():
            model(x)
    freeze(model)
    with torch.no_grad():
        wanted = model(x)
        torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), wanted)
