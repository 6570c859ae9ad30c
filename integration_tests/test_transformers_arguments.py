"""``from_pretrained`` with a config and a state dict that come from a quantized model in memory."""

import copy

import pytest
import torch
import transformers as tf
from tiny_models import TINY, output, save_tiny

from requanto import QTensor, QuantoConfig

# A model that is made of another one's state dict shares its memory, so neither is packed; a loaded one would be.
pytestmark = pytest.mark.usefixtures("exact")


def quantized(model) -> dict[str, QTensor]:
    return {name: p for name, p in model.named_parameters(remove_duplicate=False) if isinstance(p, QTensor)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Returns (directory of the float model, quantized model, its directory) of a tiny model."""
    made: dict[str, tuple] = {}

    def saved(name: str, **options):
        if name not in made:
            source, target = tmp_path_factory.mktemp(name), tmp_path_factory.mktemp(f"{name}-quantized")
            config = QuantoConfig(**{"weights": "int4", "group_size": 32, **options})
            path = save_tiny(name, source)
            model = TINY[name].auto.from_pretrained(path, quantization_config=config).eval()
            model.save_pretrained(target)
            made[name] = path, model, target
        return made[name]

    return saved


def check_same(model, expected, name: str, tmp_path) -> None:
    """The weights are those of the expected model, also after saving and loading."""
    model.eval().save_pretrained(tmp_path / "again")
    for found in (model, type(model).from_pretrained(tmp_path / "again").eval()):
        assert quantized(found).keys() == quantized(expected).keys() != set()
        assert all(torch.equal(p, expected.get_parameter(n)) for n, p in found.named_parameters())
        assert torch.equal(output(found, TINY[name].inputs()), output(expected, TINY[name].inputs()))


@pytest.mark.parametrize("source", ["saved", "float"])
@pytest.mark.parametrize("copied", [False, True])
def test_the_config_of_a_model_in_memory(saved, source, copied, tmp_path):
    """The weights of a saved model load as they are; a float model is quantized by the same options."""
    path, model, target = saved("llama")
    config = copy.deepcopy(model.config) if copied else model.config
    loaded = tf.AutoModelForCausalLM.from_pretrained(target if source == "saved" else path, config=config)
    check_same(loaded, model, "llama", tmp_path)
    assert model.config.quantization_config.tensors.keys() == quantized(model).keys()  # not taken from the model


def test_another_config_than_that_of_the_model_in_memory(saved):
    path, model, _ = saved("llama")
    given = QuantoConfig(weights="int8")
    loaded = tf.AutoModelForCausalLM.from_pretrained(path, config=model.config, quantization_config=given)
    assert {weight.qtype.name for weight in quantized(loaded).values()} == {"qint8"}


@pytest.mark.parametrize("name", ["llama", "llama-tied", "t5", "gpt2", "qwen3-moe"])
@pytest.mark.parametrize("config", ["model", "float", "stored"])
def test_a_state_dict_of_quantized_weights(saved, name, config, tmp_path):
    path, model, target = saved(name, embeddings=True, lm_head=True)
    described = {
        "model": lambda: model.config,
        "float": lambda: tf.AutoConfig.from_pretrained(path),
        "stored": lambda: tf.AutoConfig.from_pretrained(target),
    }[config]()
    loaded = type(model).from_pretrained(None, config=described, state_dict=model.state_dict())
    check_same(loaded, model, name, tmp_path)


def test_a_state_dict_that_torch_saved(saved, tmp_path):
    path, model, _ = saved("llama")
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    config, state_dict = tf.AutoConfig.from_pretrained(path), torch.load(tmp_path / "weights.pt")
    check_same(type(model).from_pretrained(None, config=config, state_dict=state_dict), model, "llama", tmp_path)


def test_quantized_weights_are_not_quantized_again(saved, tmp_path, caplog):
    path, model, _ = saved("llama")
    config, given = tf.AutoConfig.from_pretrained(path), QuantoConfig(weights="int8")
    loaded = type(model).from_pretrained(None, config=config, state_dict=model.state_dict(), quantization_config=given)
    assert "quantized weights of state_dict stay as they are" in caplog.text
    check_same(loaded, model, "llama", tmp_path)


def test_quantized_weights_need_a_config(saved):
    _, model, _ = saved("llama")
    with pytest.raises(TypeError, match=r"state_dict holds quantized weights .* needs config=.*found None"):
        type(model).from_pretrained(None, state_dict=model.state_dict())
