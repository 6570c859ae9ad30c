"""PEFT on quantized models: gradients, saving, several adapters, exact merging, DoRA, adapters on fused experts."""

import copy
from pathlib import Path

import peft
import pytest
import torch
from tiny_models import TINY, output, save_tiny
from torch import nn

from requanto import QTensor, QuantoConfig
from requanto.tensor.lowrank import fold_lowrank

pytestmark = pytest.mark.usefixtures("exact")

DTYPES = ["int8", "int4", "int2", "float8", "float8_e5m2", "int3", "nf4", "codebook4"]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = save_tiny(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


def quantized(directory: Path, name: str, weights: str, **options) -> nn.Module:
    config = QuantoConfig(weights=weights, **options)
    return TINY[name].auto.from_pretrained(directory, quantization_config=config).eval()


def with_adapter(model: nn.Module, seed: int = 3, name: str = "default", **options) -> peft.PeftModel:
    """An adapter whose effect is not zero: PEFT starts with B = 0."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | options
    config = peft.LoraConfig(**settings)
    if isinstance(model, peft.PeftModel):
        model.add_adapter(name, config)
        model.set_adapter(name)
    else:
        model = peft.get_peft_model(model, config, adapter_name=name)
    randomize(model, name, seed)
    return model


def randomize(model: nn.Module, adapter: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        if f".{adapter}" in key and ("lora_B" in key or "lora_embedding_A" in key):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
        if f".{adapter}" in key and "magnitude" in key:
            parameter.data *= 1 + 0.2 * torch.rand(parameter.shape, generator=generator)


def gradients(model: nn.Module, inputs: dict) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same_gradients(model: nn.Module, inputs: dict) -> None:
    """Equal to those on the float model that the codes stand for."""
    reference = copy.deepcopy(model)
    for module in reference.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(parameter, QTensor):
                setattr(module, name, nn.Parameter(parameter.dequantize(), requires_grad=False))
    found, expected = gradients(model, inputs), gradients(reference, inputs)
    assert found.keys() == expected.keys()
    assert found
    largest = max(gradient.norm() for gradient in expected.values())
    for name, gradient in found.items():
        # A gradient that is zero in theory (the bias of keys) is all rounding.
        assert (gradient - expected[name]).norm() < 1e-4 * max(expected[name].norm(), 1e-2 * largest), name


@pytest.mark.parametrize("weights", DTYPES)
def test_adapter_gradients_are_those_of_the_float_model(directories, weights):
    model = with_adapter(quantized(directories("llama"), "llama", weights))
    assert_same_gradients(model, TINY["llama"].inputs())


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_dora_has_the_same_gradients(directories, name, weights):
    model = with_adapter(quantized(directories(name), name, weights), use_dora=True)
    assert_same_gradients(model, TINY[name].inputs())


def test_an_adapter_with_biases_merges(directories):
    model = with_adapter(quantized(directories("opt"), "opt", "int4"), lora_bias=True)
    inputs = TINY["opt"].inputs()
    assert_same_gradients(model, inputs)
    for key, parameter in model.named_parameters():
        if "lora_B" in key and key.endswith("bias"):
            parameter.data += 0.1
    before, bits = output(model, inputs), copy.deepcopy(model.state_dict())
    model.merge_adapter()
    assert relative(output(model, inputs), before) < 1e-5
    model.unmerge_adapter()
    for key, value in model.state_dict().items():
        assert torch.equal(value, bits[key]), key


@pytest.mark.parametrize("weights", DTYPES)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("safe", [False, True])
def test_merging_changes_nothing_and_unmerging_restores_every_bit(directories, name, weights, safe):
    model = with_adapter(quantized(directories(name), name, weights))
    inputs = TINY[name].inputs()
    before, bits = output(model, inputs), copy.deepcopy(model.state_dict())
    with model.disable_adapter():
        plain = output(model, inputs)
    assert relative(plain, before) > 1e-2  # the adapter does something
    model.merge_adapter(safe_merge=safe)
    assert relative(output(model, inputs), before) < 1e-5
    model.unmerge_adapter()
    for key, value in model.state_dict().items():
        assert torch.equal(value, bits[key]), key
    assert relative(output(model, inputs), before) < 1e-6


@pytest.mark.parametrize("weights", DTYPES)
def test_a_merged_model_saves_loads_and_folds(directories, weights, tmp_path):
    model = with_adapter(quantized(directories("llama"), "llama", weights))
    inputs = TINY["llama"].inputs()
    before = output(model, inputs)
    merged = model.merge_and_unload()
    assert relative(output(merged, inputs), before) < 1e-5
    merged.save_pretrained(tmp_path)
    loaded = TINY["llama"].auto.from_pretrained(tmp_path)
    assert torch.equal(output(loaded, inputs), output(merged, inputs))
    ranks = {p.rank for p in loaded.parameters() if isinstance(p, QTensor)}
    assert ranks == {4}
    assert "rank=4" in next(iter(loaded.config.quantization_config.tensors.values()))
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(output(TINY["llama"].auto.from_pretrained(tmp_path / "again"), inputs), output(merged, inputs))
    lost = fold_lowrank(loaded)
    assert len(lost) == 14
    assert not any(p.rank for p in loaded.parameters() if isinstance(p, QTensor))


@pytest.mark.parametrize("weights", DTYPES)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_dora_merges(directories, name, weights):
    model = with_adapter(quantized(directories(name), name, weights), use_dora=True)
    inputs = TINY[name].inputs()
    before, bits = output(model, inputs), copy.deepcopy(model.state_dict())
    model.merge_adapter()
    assert relative(output(model, inputs), before) < 1e-4  # the goal is 2e-2
    model.unmerge_adapter()
    for key, value in model.state_dict().items():
        assert torch.equal(value, bits[key]), key
    assert relative(output(model.merge_and_unload(), inputs), before) < 1e-4


def test_several_adapters(directories, tmp_path):
    model = with_adapter(quantized(directories("llama"), "llama", "int4"), name="one")
    inputs = TINY["llama"].inputs()
    first = output(model, inputs)
    model = with_adapter(model, seed=5, name="two", r=8, lora_alpha=8, target_modules=["q_proj", "o_proj"])
    second = output(model, inputs)
    model.set_adapter("one")
    assert torch.equal(output(model, inputs), first)
    model.base_model.set_adapter(["one", "two"])
    both = output(model, inputs)
    assert relative(both, first) > 1e-3
    assert relative(both, second) > 1e-3
    model.merge_adapter()
    assert relative(output(model, inputs), both) < 1e-5
    model.unmerge_adapter()
    model.set_adapter("two")
    assert torch.equal(output(model, inputs), second)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(
        quantized(directories("llama"), "llama", "int4"), tmp_path / "two", adapter_name="two"
    )
    assert torch.equal(output(loaded, inputs), second)
    model.add_weighted_adapter(["one", "two"], [0.5, 0.5], "mixed", combination_type="cat")
    model.set_adapter("mixed")
    mixed = output(model, inputs)
    assert relative(output(model.merge_and_unload(), inputs), mixed) < 1e-5


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_embeddings_merge(directories, weights):
    base = quantized(directories("llama"), "llama", weights, embeddings=True)
    model = with_adapter(base, target_modules=["embed_tokens", "q_proj"])
    inputs = TINY["llama"].inputs()
    before = output(model, inputs)
    model.merge_adapter()
    assert relative(output(model, inputs), before) < 1e-5


@pytest.mark.parametrize("weights", ["int8", "int4", "float8"])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", ["qwen3-moe", "gpt-oss"])
def test_adapters_on_fused_experts(directories, name, weights, implementation):
    base = quantized(directories(name), name, weights)
    base.set_experts_implementation(implementation)
    names = [n for n, p in base.named_parameters() if isinstance(p, QTensor) and p.dim() == 3]
    targets = sorted({".".join(n.split(".")[-2:]) for n in names})
    assert targets
    model = with_adapter(base, target_modules=["q_proj"], target_parameters=targets)
    inputs = TINY[name].inputs()
    assert_same_gradients(model, inputs)
    before = output(model, inputs)
    model.merge_adapter()
    assert relative(output(model, inputs), before) < 1e-4
    model.unmerge_adapter()
    assert relative(output(model, inputs), before) < 1e-6
    assert relative(output(model.merge_and_unload(), inputs), before) < 1e-4


def test_kbit_preparation_turns_checkpointing_on_and_keeps_the_gradients(directories):
    base = quantized(directories("llama"), "llama", "int4").to(torch.bfloat16)
    base = peft.prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={"use_reentrant": False})
    assert base.is_gradient_checkpointing
    floats = [p for p in base.parameters() if not isinstance(p, QTensor)]
    assert {p.dtype for p in floats} == {torch.float32}
    model = with_adapter(base).train()
    inputs = TINY["llama"].inputs()
    with_checkpoints = gradients(model, inputs)
    base.gradient_checkpointing_disable()
    without = gradients(model, inputs)
    for name, gradient in with_checkpoints.items():
        assert relative(gradient, without[name]) < 1e-5, name


def test_bfloat16_merge_is_within_its_rounding(directories):
    model = with_adapter(quantized(directories("llama"), "llama", "int4").to(torch.bfloat16))
    inputs = TINY["llama"].inputs()
    before = output(model, inputs)
    assert relative(output(model.merge_and_unload(), inputs), before) < 2e-2


class Convolutions(nn.Module):
    """Two quantized convolutions."""

    def __init__(self, weights: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 4, 1)
        for layer in (self.one, self.two):
            layer.weight = nn.Parameter(QTensor.quantize(layer.weight, weights), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Image to image."""
        return self.two(self.one(x).relu())


@pytest.mark.parametrize("weights", DTYPES)
@pytest.mark.parametrize("dora", [False, True])
def test_convolutions_merge(weights, dora):
    model = with_adapter(Convolutions(weights), target_modules=["one", "two"], use_dora=dora).eval()
    image = torch.randn(1, 8, 6, 6)
    before, bits = model(image).detach(), copy.deepcopy(model.state_dict())
    with model.disable_adapter():
        assert relative(model(image).detach(), before) > 1e-2
    model.merge_adapter()
    assert relative(model(image).detach(), before) < 1e-5
    model.unmerge_adapter()
    for key, value in model.state_dict().items():
        assert torch.equal(value, bits[key]), key


def test_a_tied_weight_merges_once_for_both_names(directories):
    base = quantized(directories("llama-tied"), "llama-tied", "int4", embeddings=True, lm_head=True)
    weight = base.get_input_embeddings().weight
    model = with_adapter(base, target_modules=["embed_tokens", "q_proj"])
    plain = weight.dequantize()
    model.merge_adapter()
    assert weight.rank == 4
    assert base.get_output_embeddings().weight is weight
    model.unmerge_adapter()
    assert torch.equal(weight.dequantize(), plain)


def test_what_is_not_right_is_refused(directories, tmp_path):
    base = quantized(directories("llama"), "llama", "int4")
    with pytest.raises(Exception, match=r"requires? a gradient|cannot require"):
        base.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    weight = base.model.layers[0].mlp.up_proj.weight
    with pytest.raises(NotImplementedError, match="rank"):
        weight.data += torch.randn(weight.shape)
    with pytest.raises(ValueError, match="shape"):
        weight.data += torch.randn(3, 4)
    model = with_adapter(base, target_modules=["q_proj"])
    model.save_pretrained(tmp_path)
    other = quantized(directories("gpt2"), "gpt2", "int4")
    with pytest.raises(Exception, match="q_proj"):
        peft.PeftModel.from_pretrained(other, tmp_path)
    wide = with_adapter(quantized(directories("llama"), "llama", "int4"), r=6, target_modules=["q_proj"])
    state = peft.get_peft_model_state_dict(wide)
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.set_peft_model_state_dict(model, state)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        model.merge_adapter()


def test_an_embedding_with_dora_is_refused_with_the_reason(directories):
    base = quantized(directories("llama"), "llama", "int4", embeddings=True)
    model = with_adapter(base, target_modules=["embed_tokens"], use_dora=True)
    before = output(model, TINY["llama"].inputs())
    with pytest.raises(NotImplementedError, match="cannot be merged exactly"):
        model.merge_adapter()
    assert torch.equal(output(model, TINY["llama"].inputs()), before)
