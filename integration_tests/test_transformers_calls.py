"""Common calls on quantized Transformers models: new tokens, casts, averages, and what training loops do with parameters."""

import copy
import pickle

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from tiny_models import TINY, output, save_tiny
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

import requanto
from requanto import QTensor, QuantoConfig
from requanto.tensor.lowrank import append

pytestmark = pytest.mark.usefixtures("exact")

KINDS = ["int8", "int4", "float8", "codebook4"]


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Loads a tiny model with quantized tables and output layers."""
    saved: dict[str, object] = {}

    def load(name: str, kind: str = "int4", **options):
        if name not in saved:
            saved[name] = save_tiny(name, tmp_path_factory.mktemp(name))
        config = QuantoConfig(weights=kind, **{"embeddings": True, "lm_head": True, **options})
        return TINY[name].auto.from_pretrained(saved[name], quantization_config=config).eval()

    return load


def inputs(name: str) -> dict[str, torch.Tensor]:
    return TINY[name].inputs()


# ---------------------------------------------------------------------- resize_token_embeddings

#: models whose tables and heads differ: untied, tied, a scaled embedding, encoder-decoder, masked, Conv1D
RESIZED = ["llama", "llama-tied", "gemma3", "t5", "whisper", "bert", "gpt2", "opt", "qwen3-moe"]


def check_resized(model, name: str, size: int, mean: bool, tmp_path) -> None:
    before = {n: p.detach().clone() for n, p in model.named_parameters(remove_duplicate=False)}
    tied = model.get_output_embeddings() is not None and model.get_output_embeddings().weight is (
        model.get_input_embeddings().weight
    )
    old = model.get_input_embeddings().weight.shape[0]
    assert model.resize_token_embeddings(size, mean_resizing=mean) is model.get_input_embeddings()
    assert model.config.get_text_config().vocab_size == size
    kept, resized = min(old, size), 0
    for parameter_name, parameter in model.named_parameters(remove_duplicate=False):
        earlier = before[parameter_name]
        assert isinstance(parameter, QTensor) == isinstance(earlier, QTensor)
        if parameter.shape == earlier.shape:
            assert torch.equal(parameter, earlier)
            continue
        resized += 1
        assert parameter.shape == (size, *earlier.shape[1:])
        if isinstance(parameter, QTensor):
            new, stored = parameter.inner_tensors(), earlier.inner_tensors()
            for part in new.keys() - {"codebook", "down", "up", "column"}:
                assert torch.equal(new[part][:kept].view(torch.uint8), stored[part][:kept].view(torch.uint8))
            assert parameter.qtype == earlier.qtype
            assert parameter.dequantize()[kept:].isfinite().all()
        assert torch.equal(
            parameter[:kept].dequantize() if isinstance(parameter, QTensor) else parameter[:kept],
            earlier[:kept].dequantize() if isinstance(earlier, QTensor) else earlier[:kept],
        )
    assert resized >= 1
    if tied:
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    ids = {k: v if v.is_floating_point() else v.clamp(max=size - 1) for k, v in inputs(name).items()}
    found = output(model, ids)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(output(again, ids), found)
    assert again.get_input_embeddings().weight.shape[0] == size


@pytest.mark.parametrize("name", RESIZED)
@pytest.mark.parametrize(("size", "mean"), [(170, True), (168, False), (140, True)])
def test_new_tokens(load, name, size, mean, tmp_path):
    check_resized(load(name), name, size, mean, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{"lm_head": False}, {"embeddings": False}, {}, {"rotation": True}])
def test_new_tokens_of_each_type(load, kind, options, tmp_path):
    if "rotation" in options and kind == "float8":
        options = {"scale_bits": 6, "group_size": 16}
    elif "rotation" in options:
        options = {**options, "column_scale": "root"}
    check_resized(load("llama", kind, **options), "llama", 171, True, tmp_path)


def test_new_tokens_after_a_forward_and_with_a_merged_adapter(load, tmp_path):
    model = load("llama")
    head = model.lm_head.weight
    append(head, torch.randn(160, 2), torch.randn(2, 64))
    requanto.prepare(model)
    expected = output(model, inputs("llama"))
    check_resized(model, "llama", 170, True, tmp_path)
    torch.testing.assert_close(output(model, inputs("llama"))[..., :160], expected)


def test_new_rows_are_those_of_a_float_model_quantized(load):
    model = load("llama", "int8")
    plain = load("llama", "int8").dequantize()
    torch.manual_seed(0)
    plain.resize_token_embeddings(176, mean_resizing=True)
    torch.manual_seed(0)
    model.resize_token_embeddings(176, mean_resizing=True)
    for mine, theirs in zip((model.model.embed_tokens, model.lm_head), (plain.model.embed_tokens, plain.lm_head)):
        rows = mine.weight.dequantize()[160:]
        step = theirs.weight[160:].abs().amax(1, keepdim=True) / 127
        assert ((rows - theirs.weight[160:]).abs() <= 0.51 * step).all()


def test_pad_to_multiple_of_and_training_of_a_resized_model(load):
    model = load("llama")
    model.resize_token_embeddings(162, pad_to_multiple_of=32)
    assert (model.model.embed_tokens.num_embeddings, model.lm_head.out_features) == (192, 192)
    peft = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "embed_tokens", "lm_head"]))
    ids = torch.randint(0, 192, (2, 8))
    peft(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in peft.parameters() if p.requires_grad)


# ---------------------------------------------------------------------- casts


def codes(model) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        if isinstance(parameter, QTensor):
            found |= {f"{name}_{part}": inner.clone() for part, inner in parameter.inner_tensors().items()}
    return found


CASTS = {
    "to": (lambda m: m.to(torch.bfloat16), torch.bfloat16),
    "to by name": (lambda m: m.to(dtype=torch.bfloat16), torch.bfloat16),
    "to a device too": (lambda m: m.to("cpu", torch.bfloat16), torch.bfloat16),
    "to the same": (lambda m: m.to(torch.float32), torch.float32),
    "half": (lambda m: m.half(), torch.float16),
    "float": (lambda m: m.float(), torch.float32),
    "bfloat16": (lambda m: m.bfloat16(), torch.bfloat16),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("name", ["llama-tied", "t5", "gpt2"])
def test_a_cast_changes_float_parameters_and_keeps_codes_and_scales(load, name, cast, packed):
    model = load(name)
    if packed:
        requanto.prepare(model)
    expected, before = output(model, inputs(name)), codes(model)
    change, dtype = CASTS[cast]
    assert change(model) is model
    after = codes(model)
    assert after.keys() == before.keys()
    assert all(after[key].dtype == value.dtype and torch.equal(after[key], value) for key, value in before.items())
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model.is_quantized
    assert model.dtype == dtype
    found = output(model, {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs(name).items()})
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.15 * expected.abs().max().item())
    if dtype == torch.float32:
        assert torch.equal(found, expected)
    if name == "llama-tied":
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_cast_model_is_saved_and_loaded(load, tmp_path):
    model = load("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    for name, value in again.state_dict().items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, model.state_dict()[name]), name


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_cast_to_few_bits_is_refused_before_anything_changes(load, dtype):
    model = load("llama")
    before = codes(model)
    with pytest.raises(ValueError, match=r"cannot be cast to torch\..*16 bits or more.*QuantoConfig"):
        model.to(dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(torch.equal(value, before[key]) for key, value in codes(model).items())


# ---------------------------------------------------------------------- averages


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [{}, {"multi_avg_fn": get_ema_multi_avg_fn(0.5)}, {"avg_fn": get_ema_avg_fn(0.5)}, {"use_buffers": True}],
)
def test_averaged_model_averages_adapters_and_copies_quantized_weights(load, kind, options):
    model = get_peft_model(load("llama", kind), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    averaged = AveragedModel(model, **options)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    first = {name: p.detach().clone() for name, p in trained.items()}
    averaged.update_parameters(model)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(1)
    averaged.update_parameters(model)
    for name, parameter in averaged.module.named_parameters():
        if name in trained:
            torch.testing.assert_close(parameter, first[name] + 0.5)
        elif isinstance(parameter, QTensor):
            original = model.get_parameter(name)
            assert torch.equal(parameter, original)
            assert parameter.data_ptr() != original.data_ptr()
    assert int(averaged.n_averaged) == 2
    assert len(list(averaged.parameters())) == len(list(model.parameters()))
    output(averaged.module, inputs("llama"))
    assert averaged.state_dict().keys() == {"n_averaged", *(f"module.{key}" for key in model.state_dict())}


def test_an_adapter_merged_between_two_averages_is_told(load):
    model = load("llama")
    averaged = AveragedModel(model)
    weight = model.model.layers[0].mlp.up_proj.weight
    append(weight, torch.randn(128, 2), torch.randn(2, 64))
    averaged.update_parameters(model)  # the first one copies
    assert torch.equal(averaged.module.model.layers[0].mlp.up_proj.weight, weight)
    append(weight, torch.randn(128, 2), torch.randn(2, 64))
    before = copy.deepcopy(averaged.module.state_dict())
    with pytest.raises(ValueError, match=r"up_proj\.weight is a quantized weight that has changed.*before merging"):
        averaged.update_parameters(model)
    assert all(torch.equal(value, before[key]) for key, value in averaged.module.state_dict().items())


# ---------------------------------------------------------------------- what training loops and tools do


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packed", [False, True])
def test_loops_over_parameters(load, kind, packed):
    model = get_peft_model(load("llama-tied", kind), LoraConfig(r=2, target_modules=["q_proj"]))
    if packed:
        requanto.prepare(model)
    expected = output(model, inputs("llama"))
    model.zero_grad()
    assert model.num_parameters() == sum(p.numel() for p in model.parameters())
    assert all(p.numel() * p.element_size() == p.numel() * 4 for p in model.parameters())
    copies = {name: p.data.clone() for name, p in model.named_parameters()}
    assert all(torch.equal(value, model.get_parameter(name)) for name, value in copies.items())
    by_pointer: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_pointer.setdefault(parameter.data_ptr(), []).append(name)
    assert [len(names) for names in by_pointer.values() if len(names) > 1] == [2]
    model(**inputs("llama"), labels=inputs("llama")["input_ids"]).loss.backward()
    assert nn.utils.clip_grad_norm_(model.parameters(), 1.0) > 0
    trained = [p for p in model.parameters() if p.requires_grad]
    assert nn.utils.parameters_to_vector(trained).numel() == sum(p.numel() for p in trained)
    with pytest.raises(RuntimeError, match=r"cannot require a gradient.*not isinstance\(p, requanto\.QTensor\)"):
        model.requires_grad_(True)
    for parameter in model.parameters():
        parameter.requires_grad_(not isinstance(parameter, QTensor))
    model.requires_grad_(False)
    assert torch.equal(output(model, inputs("llama")), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packed", [False, True])
def test_copies_pickles_and_ties(load, kind, packed):
    model = load("llama-tied", kind)
    if packed:
        requanto.prepare(model)
    expected = output(model, inputs("llama"))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        # What was pickled is plain, and packed weights' sums have another order.
        torch.testing.assert_close(output(other, inputs("llama")), expected, rtol=1e-4, atol=1e-4)
        assert other.lm_head.weight is other.model.embed_tokens.weight
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone(), requires_grad=False)
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.share_memory() is model
    assert all(parameter.is_shared() for parameter in model.parameters())
    torch.testing.assert_close(output(model, inputs("llama")), expected, rtol=1e-4, atol=1e-4)
