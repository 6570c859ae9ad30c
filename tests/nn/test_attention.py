"""torch's own attention and encoder layers: their fast paths read weights without calling the layers that hold them."""

import copy

import pytest
import torch
from torch import nn

from requanto import QTensor, QuantoConfig
from requanto.config.plan import plan
from requanto.model.quantize import freeze, quantize
from requanto.nn import QModuleMixin
from requanto.runtime.settings import settings

KINDS = ["int8", "int4", "float8"]


@pytest.fixture(autouse=True)
def float_arithmetic(monkeypatch):
    """x is not rounded, so that limits are float32's."""
    monkeypatch.setattr(settings, "cpu_arithmetic", "float")


def dequantized(module):
    copied = copy.deepcopy(module)
    for part in copied.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            if isinstance(parameter, QTensor):
                setattr(part, name, nn.Parameter(parameter.dequantize()))
    return copied


def encoder(**options):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, dropout=0.0, **options)
    return nn.TransformerEncoder(layer, 2).eval()


def masks():
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 4:] = True
    return {
        "none": {},
        "padding": {"src_key_padding_mask": padding},
        "causal": {"mask": torch.ones(7, 7).triu(1).bool()},
    }


def kept(out, name):
    return out[0], out[1, :4] if name == "padding" else out[1]  # what is padded holds anything


@pytest.mark.parametrize("mask", ["none", "padding", "causal"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("options", [{}, {"activation": "gelu", "norm_first": True}])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:enable_nested_tensor", "ignore:The PyTorch API of nested tensors")
def test_an_encoder_computes_with_its_rounded_weights_before_and_after_freezing(kind, options, mode, mask):
    model, x = encoder(**options), torch.randn(2, 7, 64)
    float_output = kept(model(x, **masks()[mask]), mask)
    quantize(model, weights=kind)
    with mode():
        unfrozen = kept(model(x, **masks()[mask]), mask)
        freeze(model)
        frozen = kept(model(x, **masks()[mask]), mask)
        wanted = kept(dequantized(model)(x, **masks()[mask]), mask)
    for one, two, three, float_one in zip(unfrozen, frozen, wanted, float_output, strict=True):
        torch.testing.assert_close(two, three, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(one, three, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(two, float_one, atol=1e-5)
    layer = model.layers[0]
    assert isinstance(layer.linear1.weight, QTensor)
    assert isinstance(layer.linear2.weight, QTensor)
    assert not layer.linear1._forward_pre_hooks  # gone with the quantized class


@pytest.mark.filterwarnings("ignore:enable_nested_tensor", "ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("exclude", ["layers.0.*", "layers.1.*", "*.linear1"])
def test_some_layers_of_an_encoder(exclude):
    model, x = encoder(), torch.randn(2, 7, 64)
    freeze(quantize(model, weights="int8", exclude=exclude))
    reference = dequantized(model)
    for name, arguments in masks().items():
        with torch.no_grad():
            for one, two in zip(kept(model(x, **arguments), name), kept(reference(x, **arguments), name), strict=True):
                torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)


def test_the_output_projection_of_an_attention_stays_float_in_both_ways(caplog):
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(64, 4), "plain": nn.Linear(64, 64)})
    assert set(plan(model, QuantoConfig())) == {"plain.weight"}
    quantize(model, weights="int8")
    assert not isinstance(model["attention"].out_proj, QModuleMixin)
    lines = [r.getMessage() for r in caplog.records if "nn.MultiheadAttention reads its weight" in r.getMessage()]
    assert len(lines) == 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("separate", [{}, {"kdim": 32, "vdim": 48}])
def test_an_attention_with_quantized_projections_runs(kind, separate):
    """Checkpoints of earlier versions hold them, and a full name in modules= quantizes one."""
    torch.manual_seed(0)
    model = nn.MultiheadAttention(64, 4, batch_first=True, **separate).eval()
    projections = ["in_proj_weight"] if not separate else ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
    for name in projections:
        setattr(model, name, nn.Parameter(QTensor.quantize(getattr(model, name), kind), requires_grad=False))
    model.out_proj.weight = nn.Parameter(QTensor.quantize(model.out_proj.weight, kind), requires_grad=False)
    reference = dequantized(model)
    q, k, v = (
        torch.randn(2, 7, 64),
        torch.randn(2, 5, separate.get("kdim", 64)),
        torch.randn(2, 5, separate.get("vdim", 64)),
    )
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            torch.testing.assert_close(model(q, k, v)[0], reference(q, k, v)[0], atol=1e-5, rtol=1e-5)
    gradients = []
    for attention in (model.train(), reference.train()):
        q = q.detach().requires_grad_()
        attention(q, k, v)[0].square().sum().backward()
        gradients.append(q.grad)
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(q, k, v)[0], reference(q, k, v)[0], atol=2e-2, rtol=2e-2)
    compiled = torch.compile(model.eval(), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(q, k, v)[0], reference.eval()(q, k, v)[0], atol=1e-5, rtol=1e-5)
