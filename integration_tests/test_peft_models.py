"""Adapter methods on whole quantized models: what needs a language model, several adapters, data, or saved files."""

import copy

import peft
import pytest
import torch
from peft.tuners.lora import config as lora_configs
from peft_methods import LANGUAGE_MODEL, METHODS
from test_peft_lora import assert_same_gradients, directories, output, quantized, relative, with_adapter  # noqa: F401
from tiny_models import TINY
from torch import nn
from torch.utils.data import DataLoader

from requanto import QTensor, QuantoConfig

pytestmark = pytest.mark.usefixtures("exact")

INPUTS = TINY["llama"].inputs()


class Target:
    """Stands for a block of `peft_methods`: adapters go to these layers of a language model."""

    kind = "linear"

    def targets(self) -> list[str]:
        """Names of layers."""
        return ["q_proj", "o_proj"]


@pytest.fixture
def llama(directories):  # noqa: F811
    return lambda weights="int4", **options: quantized(directories("llama"), "llama", weights, **options)


def pair(llama, build, **options) -> tuple:
    """The same adapter on the quantized model and on the float model of its codes."""
    models = []
    for model in (llama(**options), llama(**options).dequantize()):
        torch.manual_seed(1)
        models.append(build(model).eval())
    return tuple(models)


def adapted(base: nn.Module, method: str) -> nn.Module:
    """A model with an adapter that changes something."""
    model = peft.get_peft_model(base, METHODS[method].config(Target())).eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def count(model: nn.Module) -> int:
    return sum(isinstance(parameter, QTensor) for parameter in model.parameters())


@pytest.mark.parametrize("method", LANGUAGE_MODEL)
def test_a_method_for_language_models(llama, method):
    found = LANGUAGE_MODEL[method]
    if not found.available:
        pytest.skip(f"this PEFT has no {method}")
    with_tasks = method in ("POLY", "MULTITASK_PROMPT_TUNING")
    inputs = {**INPUTS, **({"task_ids": torch.zeros(len(INPUTS["input_ids"]), dtype=torch.long)} if with_tasks else {})}
    model, same = pair(llama, lambda base: peft.get_peft_model(base, found.config(Target())))
    assert relative(output(model, inputs), output(same, inputs)) < 1e-5
    gradients = []
    for each in (model, same):
        each(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append({name: p.grad for name, p in each.named_parameters() if p.grad is not None})
    assert gradients[0]
    assert gradients[0].keys() == gradients[1].keys()
    largest = max(gradient.norm() for gradient in gradients[1].values())
    for name, gradient in gradients[0].items():
        assert (gradient - gradients[1][name]).norm() <= 1e-4 * largest, name
    before = copy.deepcopy(model.state_dict())
    if hasattr(model.base_model, "merge_adapter"):
        with pytest.raises(NotImplementedError):
            model.merge_adapter()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("method", ["LORA", "LORA pissa", "IA3", "HRA", "VERA"])
def test_a_model_saved_after_a_merge_loads_equal(llama, method, tmp_path):
    model = adapted(llama(), method)
    before = output(model, INPUTS)
    merged = model.merge_and_unload()
    assert relative(output(merged, INPUTS), before) < 1e-5
    assert count(merged) == 14
    merged.save_pretrained(tmp_path)
    loaded = TINY["llama"].auto.from_pretrained(tmp_path)
    assert torch.equal(output(loaded, INPUTS), output(merged, INPUTS))


@pytest.mark.parametrize("method", ["OFT", "HIRA", "SHIRA", "GLORA"])
def test_a_refused_merge_is_possible_after_dequantizing(llama, method):
    if not METHODS[method].available:
        pytest.skip(f"this PEFT has no {method}")
    model = peft.get_peft_model(llama(), METHODS[method].config(Target())).eval()
    before = output(model, INPUTS)
    with pytest.raises(NotImplementedError, match=r"model.dequantize\(\)"):
        model.merge_adapter()
    model.dequantize()
    assert count(model) == 0
    assert relative(output(model, INPUTS), before) < 1e-5
    assert relative(output(model.merge_and_unload(), INPUTS), before) < 1e-5


@pytest.mark.parametrize("embeddings", [False, True])
def test_trainable_tokens_next_to_lora(llama, embeddings, tmp_path):
    def build(base):
        config = peft.LoraConfig(
            r=2, target_modules=["q_proj"], trainable_token_indices=[1, 5], init_lora_weights=False
        )
        model = peft.get_peft_model(base, config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "trainable_tokens" in name and parameter.requires_grad:
                    parameter.fill_(0.3)
        return model

    model, same = pair(llama, build, embeddings=embeddings)
    inputs = {"input_ids": torch.tensor([[1, 5, 2, 7]])}
    before = output(model, inputs)
    assert relative(before, output(same, inputs)) < 1e-5
    assert_same_gradients(model, inputs)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(llama(embeddings=embeddings), tmp_path)
    assert relative(output(loaded, inputs), before) < 1e-6
    bits = copy.deepcopy(model.state_dict())
    model.merge_adapter()
    assert relative(output(model, inputs), before) < 1e-5
    model.unmerge_adapter()
    for name, value in model.state_dict().items():
        assert torch.equal(value, bits[name]), name
    assert relative(output(model.merge_and_unload(), inputs), before) < 1e-5


def test_modules_to_save_of_quantized_modules_train_a_float_copy(llama, tmp_path, caplog):
    base = llama(lm_head=True, embeddings=True)
    plain = output(base, INPUTS)
    caplog.set_level("INFO", "requanto")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"])
    model = peft.get_peft_model(base, config)
    assert "that is trained is float" in caplog.text
    assert relative(output(model, INPUTS), plain) < 1e-5
    model(**INPUTS, labels=INPUTS["input_ids"]).loss.backward()
    trained = {n: p for n, p in model.named_parameters() if "modules_to_save" in n}
    assert len(trained) == 2
    with torch.no_grad():
        for parameter in trained.values():
            assert parameter.grad is not None
            assert not isinstance(parameter, QTensor)
            parameter -= 0.5 * parameter.grad
    after = output(model, INPUTS)
    assert relative(after, plain) > 1e-4
    with model.disable_adapter():
        assert torch.equal(output(model, INPUTS), plain)
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(llama(lm_head=True, embeddings=True), tmp_path / "adapter")
    assert relative(output(loaded, INPUTS), after) < 1e-6
    merged = model.merge_and_unload()
    assert relative(output(merged, INPUTS), after) < 1e-5
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(output(TINY["llama"].auto.from_pretrained(tmp_path / "merged"), INPUTS), output(merged, INPUTS))


def mixed(base: nn.Module, second: str) -> nn.Module:
    model = peft.get_peft_model(base, METHODS["LORA"].config(Target()), "one", mixed=True)
    model.add_adapter("two", METHODS[second].config(Target()))
    model.set_adapter(["one", "two"])
    return model


@pytest.mark.parametrize("second", ["LOHA", "LOKR", "OFT"])
def test_mixed_models(llama, second):
    model, same = pair(llama, lambda base: mixed(base, second))
    before, bits = output(model, INPUTS), copy.deepcopy(model.state_dict())
    assert relative(before, output(same, INPUTS)) < 1e-5
    try:
        goal = output(same.merge_and_unload(), INPUTS)
    except Exception:
        goal = None
    if second == "OFT":
        with pytest.raises(NotImplementedError, match="cannot be merged exactly"):
            model.merge_adapter()
        with pytest.raises(NotImplementedError, match="cannot be merged exactly"):
            model.merge_and_unload()
        assert torch.equal(output(model, INPUTS), before)
    else:
        model.merge_adapter()
        model.unmerge_adapter()
        assert goal is not None
        for name, value in model.state_dict().items():
            assert torch.equal(value, bits[name]), name
        merged = model.merge_and_unload()
        assert relative(output(merged, INPUTS), goal) < 1e-5
        assert count(merged) == 14


@pytest.mark.parametrize("method", ["LORA", "OFT", "HRA", "LORA pissa"])
def test_adapters_added_by_transformers(llama, method):
    models = pair(llama, lambda base: base)
    for model in models:
        torch.manual_seed(2)
        try:
            model.add_adapter(METHODS[method].config(Target()), adapter_name="mine")
        except ValueError as error:
            assert "version of PEFT" in str(error)  # noqa: PT017
            pytest.skip(str(error))
    assert relative(output(models[0], INPUTS), output(models[1], INPUTS)) < 1e-5
    models[0].disable_adapters()
    models[1].disable_adapters()
    assert relative(output(models[0], INPUTS), output(models[1], INPUTS)) < 1e-5
    models[0].enable_adapters()
    models[0].delete_adapter("mine")


@pytest.mark.parametrize("combination", ["linear", "cat", "svd", "ties", "dare_linear", "magnitude_prune"])
def test_weighted_adapters(llama, combination):
    def build(base):
        model = with_adapter(base, name="one", target_modules=["q_proj", "o_proj"])
        model = with_adapter(model, name="two", seed=5, target_modules=["q_proj", "o_proj"])
        torch.manual_seed(0)
        extra = {} if combination in ("linear", "cat", "svd") else {"density": 0.5}
        model.add_weighted_adapter(["one", "two"], [0.7, 0.4], "sum", combination_type=combination, **extra)
        model.set_adapter("sum")
        return model

    model, same = pair(llama, build)
    before = output(model, INPUTS)
    assert relative(before, output(same, INPUTS)) < 1e-5
    model.delete_adapter("one")
    assert torch.equal(output(model, INPUTS), before)
    model.merge_adapter()
    assert relative(output(model, INPUTS), before) < 1e-5
    with pytest.raises(ValueError, match="merged"):
        model.delete_adapter("sum")
    model.unmerge_adapter()
    assert torch.equal(output(model, INPUTS), before)


def test_switching_the_adapter_of_a_merged_model_unmerges_it(llama):
    model = adapted(llama(), "IA3")
    model.add_adapter("two", METHODS["IA3"].config(Target()))
    model.set_adapter("two")
    second, bits = output(model, INPUTS), copy.deepcopy(model.state_dict())
    model.set_adapter("default")
    assert relative(output(model, INPUTS), second) > 1e-4
    model.merge_adapter()
    with pytest.warns(UserWarning, match="merged"):
        model.set_adapter("two")
    assert torch.equal(output(model, INPUTS), second)
    for name, value in model.state_dict().items():
        assert torch.equal(value, bits[name]), name


def test_x_lora(llama, tmp_path):
    for name, seed in (("one", 3), ("two", 5)):
        adapted = with_adapter(llama(), name=name, seed=seed, target_modules=["q_proj"])
        adapted.save_pretrained(tmp_path)
    paths = {str(number): str(tmp_path / name) for number, name in enumerate(("one", "two"))}
    config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=64, xlora_size=8, adapters=paths)

    def build(base):
        base.config.use_cache = False
        return peft.get_peft_model(base, copy.deepcopy(config))

    model, same = pair(llama, build)
    assert relative(output(model, INPUTS), output(same, INPUTS)) < 1e-5
    assert count(model) == 14


def test_arrow_routes_between_saved_adapters(llama, tmp_path):
    arrow = pytest.importorskip("peft.tuners.lora.arrow")
    for name, seed in (("one", 3), ("two", 5)):
        with_adapter(llama(), name=name, seed=seed, target_modules=["q_proj"]).save_pretrained(tmp_path)
    paths = [str(tmp_path / name) for name in ("one", "two")]
    model, same = pair(
        llama, lambda base: arrow.create_arrow_model(base, paths, lora_configs.ArrowConfig(top_k=1, rng_seed=0))
    )
    before, bits = output(model, INPUTS), copy.deepcopy(model.state_dict())
    assert relative(before, output(same, INPUTS)) < 1e-5
    with pytest.raises(RuntimeError, match="Cannot merge an active Arrow router"):
        model.merge_adapter()
    for name, value in model.state_dict().items():
        assert torch.equal(value, bits[name]), name


def start_as_no_change(llama, build) -> None:
    plain = output(llama(), INPUTS)
    model, same = pair(llama, build)
    assert relative(output(model, INPUTS), output(same, INPUTS)) < 1e-4
    assert relative(output(model, INPUTS), plain) < 1e-4
    assert relative(output(model.merge_and_unload(), INPUTS), plain) < 1e-4


def test_eva_looks_at_activations(llama):
    data = DataLoader([{k: v[0] for k, v in INPUTS.items()}] * 4, batch_size=2)

    def build(base):
        eva = peft.EvaConfig(rho=1.0)
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="eva", eva_config=eva)
        model = peft.get_peft_model(base, config)
        peft.initialize_lora_eva_weights(model, data, show_progress_bar=False)
        return model

    start_as_no_change(llama, build)


def test_corda_looks_at_activations_and_rewrites_the_weight(llama):
    pytest.importorskip("attr")  # PEFT's module needs it
    from peft.tuners.lora import corda

    def build(base):
        how = lora_configs.CordaConfig(corda_method="kpm")
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="corda", corda_config=how)
        single = {name: value[:1] for name, value in INPUTS.items()}
        corda.preprocess_corda(base, config, run_model=lambda: base(**single))
        return peft.get_peft_model(base, config)

    start_as_no_change(llama, build)


@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float16, True)]
)
def test_half_precision_and_autocast(llama, dtype, autocast):
    for method in ("LORA pissa", "IA3", "HRA"):
        base, config = llama().to(dtype), METHODS[method].config(Target())
        model = peft.get_peft_model(base, config, autocast_adapter_dtype=autocast).eval()
        adapters = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
        assert adapters == {torch.float32} or not autocast
        with torch.autocast("cpu", dtype):
            before = output(model, INPUTS)
            assert relative(output(model.merge_and_unload(), INPUTS), before) < 3e-2, method


def test_peft_reports_its_backend(llama):
    model = peft.get_peft_model(llama(), METHODS["OFT"].config(Target()))
    layer = next(module for module in model.modules() if getattr(module, "quantization_backend", None) is not None)
    assert layer.quantization_backend.backend_name == "requanto"
    weight = layer.get_base_layer().weight
    value = layer.get_base_weight()
    assert type(value) is torch.Tensor
    assert torch.equal(value, weight.dequantize())
    value += torch.outer(torch.ones(len(value)), torch.ones(value.shape[1]))
    layer.set_base_weight(value)
    assert weight.rank == 1
    assert relative(weight.dequantize(), value) < 1e-6
    with pytest.raises(NotImplementedError, match="rounding it to the codes would lose most"):
        layer.set_base_weight(torch.randn_like(value))
    assert relative(weight.dequantize(), value) < 1e-6


def test_the_config_of_the_base_model_is_kept(llama):
    model = peft.get_peft_model(llama(), METHODS["OFT"].config(Target()))
    assert isinstance(model.config.quantization_config, QuantoConfig)
