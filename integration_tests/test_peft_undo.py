"""All or nothing: what fails half-way, while merging, unmerging or adding an adapter, leaves the model as it was."""

import copy

import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from test_peft_lora import directories, output, quantized, relative, with_adapter  # noqa: F401 - a fixture
from tiny_models import TINY
from torch import nn

from requanto import QTensor


def state(model: nn.Module) -> list:
    """What a change could leave behind, other than values: modules, containers of layers, switches of gradients."""
    modules = [(name, id(module), type(module)) for name, module in model.named_modules()]
    contents = [
        (name, key, sorted(map(str, value)))
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if type(value) in (list, dict, set)
    ]
    return [modules, contents, [(name, p.requires_grad) for name, p in model.named_parameters()]]


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal, NaN too."""
    if isinstance(found, QTensor) or not found.is_floating_point():
        return torch.equal(found, expected)
    return torch.equal(found.nan_to_num(), expected.nan_to_num()) and torch.equal(found.isnan(), expected.isnan())


class Watch:
    """Compares a model with its earlier self."""

    def __init__(self, model: nn.Module, inputs: dict) -> None:
        self.model, self.inputs = model, inputs
        self.state, self.bits, self.output = state(model), copy.deepcopy(model.state_dict()), output(model, inputs)

    def unchanged(self) -> None:
        assert state(self.model) == self.state
        now = self.model.state_dict()
        assert now.keys() == self.bits.keys()
        for name, value in now.items():
            assert same(value, self.bits[name]), name
        assert same(output(self.model, self.inputs), self.output)


def layers(model: nn.Module) -> list:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


@pytest.fixture
def llama(directories):  # noqa: F811
    return lambda **options: quantized(directories("llama"), "llama", "int4", **options)


INPUTS = TINY["llama"].inputs()
TARGETS = ["q_proj", "v_proj", "down_proj", "lm_head"]  # the last one stays float


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError, RuntimeError])
@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload", "unmerge_adapter", "unload"])
def test_an_error_in_the_seventh_layer(llama, monkeypatch, call, error):
    model = with_adapter(llama(), target_modules=TARGETS)
    if call == "unmerge_adapter":
        model.merge_adapter()
    watch = Watch(model, INPUTS)
    layer = layers(model)[-1]
    name = {"unmerge_adapter": "unmerge", "unload": "get_base_layer"}.get(call, "merge")
    original = getattr(type(layer), name)

    def fails(self, *args, **kwargs):
        if self is layer:
            raise error("in the last layer")
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(type(layer), name, fails)
        with pytest.raises(error):
            getattr(model, call)()
    watch.unchanged()
    result = getattr(model, call)()
    assert relative(output(result or model, INPUTS), watch.output) < 1e-5 or call == "unload"


@pytest.mark.parametrize("safe", [False, True])
def test_a_broken_adapter_in_one_layer(llama, safe):
    model = with_adapter(llama(), target_modules=TARGETS[:-1])
    layers(model)[-1].lora_B["default"].weight.data[0, 0] = float("nan")
    watch = Watch(model, INPUTS)
    for call in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="NaN"):
            call(safe_merge=safe)
        watch.unchanged()


def test_a_second_adapter_that_cannot_be_merged_undoes_the_first(llama):
    """Two adapters in one call: the first is exact, the second is not."""
    model = with_adapter(llama(embeddings=True), target_modules=["q_proj", "embed_tokens"], name="one")
    model = with_adapter(model, target_modules=["embed_tokens"], use_dora=True, name="two", seed=5)
    model.base_model.set_adapter(["one", "two"])
    watch = Watch(model, INPUTS)
    with pytest.raises(NotImplementedError, match="cannot be merged exactly"):
        model.merge_adapter(adapter_names=["one", "two"])
    watch.unchanged()
    model.merge_adapter(adapter_names=["one"])
    merged = Watch(model, INPUTS)
    with pytest.raises(NotImplementedError, match="cannot be merged exactly"):
        model.merge_adapter(adapter_names=["two"])
    merged.unchanged()


@pytest.mark.parametrize("method", ["loftq", "wrong target", "modules_to_save", "shape"])
def test_an_adapter_that_cannot_be_built_leaves_no_trace(llama, method, monkeypatch):
    configs = {
        "loftq": peft.LoraConfig(init_lora_weights="loftq", loftq_config=peft.LoftQConfig(), target_modules=["q_proj"]),
        "wrong target": peft.LoraConfig(target_modules=["q_proj", "layers.0"]),
        "modules_to_save": peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["layers"]),
        "shape": peft.OFTConfig(oft_block_size=7, target_modules=["q_proj", "v_proj"]),
    }
    if method == "shape":  # fails in the second layer
        from peft.tuners.oft.layer import OFTLayer

        original, count = OFTLayer.update_layer, []

        def fails(self, *args, **kwargs):
            count.append(1)
            if len(count) > 1:
                raise MemoryError("no memory for the second layer")
            return original(self, *args, **kwargs)

        monkeypatch.setattr(OFTLayer, "update_layer", fails)
    model = llama()
    watch = Watch(model, INPUTS)
    with pytest.raises((NotImplementedError, ValueError, TypeError, MemoryError, ImportError)):
        peft.get_peft_model(model, configs[method])
    watch.unchanged()
    assert not hasattr(model, "peft_config")
    adapted = with_adapter(model, target_modules=["q_proj"])
    again = Watch(adapted, INPUTS)
    with pytest.raises((NotImplementedError, ValueError, TypeError, MemoryError, ImportError)):
        adapted.add_adapter("second", configs[method])
    again.unchanged()
    assert list(adapted.peft_config) == ["default"]
