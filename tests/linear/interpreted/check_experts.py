"""A mixture of experts in Transformers on the GPU's part of the table, in Triton's interpreter."""

import copy

import pytest
import torch
from gpu_stand_in import take_for_a_gpu
from torch import nn

import requanto
from requanto.linear import prepack as packing
from requanto.linear import registry
from requanto.linear.gpu import paths
from requanto.tensor.qtensor import QTensor

transformers = pytest.importorskip("transformers")
SHAPE = {
    "vocab_size": 96, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2, "initializer_range": 0.1,
}  # fmt: skip


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """The table with the GPU's entries first, which take the CPU for their device."""
    take_for_a_gpu(monkeypatch)
    monkeypatch.setattr(packing, "SMALLEST", 0)
    monkeypatch.setattr(packing, "SMALLEST_ON_CPU", 0)
    torch.manual_seed(0)


def test_from_pretrained_to_the_grouped_kernel_and_back(tmp_path, monkeypatch):
    plain = transformers.MixtralForCausalLM(transformers.MixtralConfig(**SHAPE)).eval()
    plain.save_pretrained(tmp_path / "float")
    config = requanto.QuantoConfig(weights="int4", group_size=64)
    model = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config).eval()
    experts = {name: p for name, p in model.named_parameters() if p.dim() == 3}
    assert len(experts) == 2
    assert all(isinstance(p, QTensor) and not p.is_packed for p in experts.values())
    stored = {name: p.qdata.clone() for name, p in experts.items()}
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            ours = dict(model.named_parameters())[name]
            parameter.copy_(ours.dequantize() if isinstance(ours, QTensor) else ours)

    calls = []
    grouped = paths.run_grouped
    entry = next(one for one in registry._REGISTRY if one.name == "triton-wq")

    def counted(x, weight, offsets):
        calls.append((x.shape[0], weight.is_packed))
        return grouped(x, weight, offsets)

    object.__setattr__(entry, "run_grouped", counted)
    try:
        ids = torch.arange(6).reshape(1, 6)
        with torch.no_grad():
            got = model(ids, use_cache=False).logits
            torch.testing.assert_close(got, plain(ids, use_cache=False).logits, rtol=1e-4, atol=1e-4)
        assert calls == [(12, True), (12, True)]  # both products, packed before the first
        assert all(p.is_packed and p.layout_name == "exec" for p in experts.values())
        assert model.generate(ids, max_new_tokens=2, do_sample=False).shape == (1, 8)
        assert len(calls) == 6  # decoding stays on the grouped kernel
    finally:
        object.__setattr__(entry, "run_grouped", grouped)

    model.save_pretrained(tmp_path / "quantized")
    again = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "quantized")
    for name, codes in stored.items():
        assert torch.equal(dict(again.named_parameters())[name].qdata, codes)
    assert again.config._experts_implementation == "requanto"


def test_training_leaves_the_experts_as_stored():
    module = transformers.models.mixtral.modeling_mixtral.MixtralExperts(transformers.MixtralConfig(**SHAPE))
    module.config._experts_implementation = "requanto"
    for name, parameter in list(module.named_parameters()):
        nn.init.normal_(parameter, std=0.1)
        weight = QTensor.quantize(parameter.detach(), "int4", group_size=64)
        setattr(module, name, nn.Parameter(weight, requires_grad=False))
    reference = copy.deepcopy(module)
    reference.config = copy.deepcopy(module.config)
    reference.config._experts_implementation = "eager"
    for name, parameter in list(reference.named_parameters()):
        setattr(reference, name, nn.Parameter(parameter.dequantize(), requires_grad=False))
    x = torch.randn(5, 128, requires_grad=True)
    chosen, weights = torch.randint(0, 4, (5, 2)), torch.rand(5, 2)
    grads = []
    for one in (module, reference):
        out = one(x, chosen, weights)
        out.backward(torch.ones_like(out))
        grads.append(x.grad.clone())
        x.grad = None
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-4)
    assert all(not p.is_packed for p in module.parameters())
