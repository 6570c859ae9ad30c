"""Every adapter method of PEFT on quantized layers: as on the float model of the codes; merged exactly, or refused."""

import copy
import dataclasses
from pathlib import Path
from typing import get_args, get_type_hints

import peft
import pytest
import torch
from packaging.version import Version
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft_methods import ELSEWHERE, LANGUAGE_MODEL, METHODS, Block, table
from torch import nn

from requanto import QTensor

pytestmark = pytest.mark.usefixtures("exact")

TYPES = {
    "int8": {"kind": "int8"},
    "int4": {"kind": "int4", "group_size": 16},
    "nf4": {"kind": "nf4", "group_size": 16},
    "float8": {"kind": "float8"},
    "int4-low-rank": {"kind": "int4", "group_size": 16, "low_rank": 2},
    "int4-scale-bits": {"kind": "int4", "group_size": 16, "scale_bits": 6},
    "int4-rotation": {"kind": "int4", "group_size": 16, "rotation": True},
    "int4-columns": {"kind": "int4", "group_size": 16, "column_scale": "root"},
}
#: One method for each way in which weights are read and changed. The others are tried on two types, and all of them on one
#: type where the layer is no Linear.
EVERY_TYPE = ("LORA", "LORA use_dora", "LORA pissa", "IA3", "IA3 feedforward_modules", "OFT", "OSF")
#: versions in which PEFT supports fewer layers
OLDER = Version(peft.__version__) < Version("0.21")


def quantized(kind: str, weights: str) -> Block:
    block = Block(kind).eval()
    for name in block.targets():
        layer = getattr(block, name)
        weight = QTensor.quantize(layer.weight.data, transposed=kind == "conv1d", **TYPES[weights])
        layer.weight = nn.Parameter(weight, requires_grad=False)
    return block


def dequantized(block: Block) -> Block:
    for name in block.targets():
        layer = getattr(block, name)
        layer.weight = nn.Parameter(layer.weight.dequantize(), requires_grad=False)
    return block


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(model.state_dict())


def same_bits(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    now = model.state_dict()
    assert now.keys() == before.keys()
    for name, value in now.items():
        assert torch.equal(value, before[name]), name


def with_adapter(block: Block, method: str) -> nn.Module:
    torch.manual_seed(3)
    model = peft.get_peft_model(block, METHODS[method].config(block)).eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():  # some methods start as no change at all
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def take_adapter(model: nn.Module, source: nn.Module) -> None:
    """Random tensors of a method may depend on more than the seed: compare both models with the same ones."""
    have = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for name, tensor in [*source.named_parameters(), *source.named_buffers()]:
            if name in have and ".base_layer." not in name and not isinstance(have[name], QTensor):
                have[name].copy_(tensor)


def gradients(model: nn.Module, out: torch.Tensor) -> dict[str, torch.Tensor]:
    out.square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def merged_output(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The output of a float model after PEFT's merge."""
    try:
        model.merge_adapter()
    except RuntimeError as error:
        if not OLDER:
            raise
        pytest.skip(f"this PEFT cannot merge it into a float layer: {error}")
    return model(x).detach()


def outcome(method: str, kind: str, weights: str) -> str:
    """Tries one method on one kind of layer; how merging went."""
    reference = dequantized(quantized(kind, weights))
    x = reference.example()
    plain = quantized(kind, weights)(x)
    try:
        float_model = with_adapter(reference, method)
    except Exception as error:  # PEFT does not support this kind of layer
        block = quantized(kind, weights)
        before, modules = bits(block), [name for name, _ in block.named_modules()]
        with pytest.raises(type(error)):
            with_adapter(block, method)
        same_bits(block, before)
        assert [name for name, _ in block.named_modules()] == modules
        return "no such layer"
    try:
        float_model(x)
    except Exception:  # it does not say so when the model is built
        return "no such layer"
    if not any(parameter.requires_grad for parameter in float_model.parameters()):
        return "no such layer"
    expected = float_model(x)
    assert relative(plain, expected) > 1e-4, "the adapter changes nothing: the test tests nothing"

    block = quantized(kind, weights)
    model = with_adapter(block, method)
    take_adapter(model, float_model)
    found = model(x)
    assert relative(found, expected) < 1e-5
    wanted, got = gradients(float_model, expected), gradients(model, found)
    assert got.keys() == wanted.keys()
    assert got
    largest = max(gradient.norm() for gradient in wanted.values())
    for name, gradient in got.items():
        assert (gradient - wanted[name]).norm() <= 1e-5 * largest, name

    before, found = bits(model), found.detach()
    goal = merged_output(copy.deepcopy(float_model), x)
    if METHODS[method].expected(kind) == "refused":
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(NotImplementedError, match=r"cannot be merged exactly .*model.dequantize\(\)"):
                merge()
            same_bits(model, before)
            assert not any(getattr(module, "merged_adapters", None) for module in model.modules())
            assert torch.equal(model(x), found)
        return "refused"
    model.merge_adapter()
    assert relative(model(x), goal) < 1e-5
    if method == "OSF":
        with pytest.raises(NotImplementedError, match="support unmerging"):
            model.unmerge_adapter()
    else:
        model.unmerge_adapter()
        same_bits(model, before)
    merged = model.merge_and_unload()
    assert all(isinstance(getattr(merged, name).weight, QTensor) for name in merged.targets())
    assert relative(merged(x), goal) < 1e-5
    return "exact"


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d", "embedding"])
@pytest.mark.parametrize("method", METHODS)
def test_a_method_works_and_merges_exactly_or_not_at_all(method, kind):
    if not METHODS[method].available:
        pytest.skip(f"this PEFT has no {method}")
    expected = METHODS[method].expected(kind)
    types = ("int4-low-rank",)
    if kind == "linear":
        types = TYPES if method in EVERY_TYPE else ("int4-low-rank", "float8")
    for weights in types if expected != "no such layer" else types[:1]:
        found = outcome(method, kind, weights)
        assert found == expected or (found == "no such layer" and OLDER)


@pytest.mark.parametrize("method", METHODS)
def test_a_saved_adapter_loads_on_a_fresh_quantized_model(method, tmp_path):
    if not METHODS[method].available:
        pytest.skip(f"this PEFT has no {method}")
    if method == "LORA pissa_niter" or (OLDER and method == "LORA mica"):
        pytest.skip("PEFT takes another random part out of the weight (of a float one too), or does not know the word")
    kind = "linear" if METHODS[method].expected("linear") != "no such layer" else "embedding"
    model = with_adapter(quantized(kind, "int4"), method)
    x = model.get_base_model().example()
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(quantized(kind, "int4"), tmp_path).eval()
    assert relative(loaded(x), model(x)) < 1e-5


@pytest.mark.parametrize("method", ["LORA", "OFT", "HIRA"])
def test_a_method_compiles(method):
    if not METHODS[method].available:
        pytest.skip(f"this PEFT has no {method}")
    model = with_adapter(quantized("linear", "int4"), method)
    x = model.get_base_model().example()
    expected = model(x)
    torch._dynamo.reset()
    assert relative(torch.compile(model, backend="eager")(x), expected) < 1e-5


def test_every_method_of_peft_is_listed():
    known = {name.split()[0] for name in (*METHODS, *LANGUAGE_MODEL, *ELSEWHERE)}
    unknown = {name.value for name in PEFT_TYPE_TO_CONFIG_MAPPING} - known
    assert not unknown, "add them to peft_methods.py, and the new table to docs/training.md"
    fields = dataclasses.fields(peft.LoraConfig)
    variants = {field.name for field in fields if field.metadata.get("is_lora_variant")}
    inits = [word for part in get_args(get_type_hints(peft.LoraConfig)["init_lora_weights"]) for word in get_args(part)]
    words = {name.split()[-1] for name in (*METHODS, *LANGUAGE_MODEL, *ELSEWHERE) if name.startswith("LORA ")}
    assert variants | {word.split("_[")[0] for word in inits} <= words


def test_the_page_tells_what_the_tests_found():
    page = Path(__file__).parent.parent / "docs" / "training.md"
    assert table() in page.read_text(encoding="utf-8")
