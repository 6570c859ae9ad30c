"""Routers of experts stay float in every family of the installed Transformers, judged by what a float model computes.

The judge knows no names: a float model runs with gradients, and from each input of `topk`, `argmax` or another choice the
autograd graph is followed back to the first product. The weight of that product is a router's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import diffusers
import pytest
import torch
import transformers as tf
from shrunk_models import cases, families, inputs
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers.quantizers.base import get_keys_to_not_convert

from requanto import QuantoConfig
from requanto.config import routers as routers_module
from requanto.config.plan import plan
from requanto.integrations.diffusers import plan_model

CHOICES = {"topk", "argmax", "max", "sort", "argsort", "multinomial", "kthvalue"}
PRODUCTS = ("MmBackward0", "AddmmBackward0", "BmmBackward0", "LinearBackward0", "ConvolutionBackward0")
# Of a family named so, a class holds experts; others may too, by the names of their modules.
EXPERTS = ("expert", "moe", "router")


class Chosen(TorchFunctionMode):
    """Collects the inputs of choices by score, with the size of the axis."""

    def __init__(self):
        super().__init__()
        self.scores: list[tuple[torch.Tensor, int]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in CHOICES and args and isinstance(args[0], torch.Tensor):
            scores = args[0]
            if scores.grad_fn is not None and scores.dim():
                position = 2 if func.__name__ in ("topk", "kthvalue") else 1
                dim = kwargs.get("dim", args[position] if len(args) > position else -1)
                if isinstance(dim, int) and scores.shape[dim] > 1:
                    self.scores.append((scores, scores.shape[dim]))
        return func(*args, **kwargs)


@contextlib.contextmanager
def with_gradients() -> Iterator[None]:
    """Gradients everywhere, also where a model switches them off."""
    patch = pytest.MonkeyPatch()
    patch.setattr(torch.no_grad, "__enter__", lambda self: None)
    patch.setattr(torch.no_grad, "__exit__", lambda self, *args: None)
    patch.setattr(torch.Tensor, "detach", lambda self: self)
    try:
        with torch.enable_grad():
            yield
    finally:
        patch.undo()


def first_products(node: Any, seen: set[Any]) -> Iterator[Any]:
    """The products nearest to a node of the autograd graph."""
    waiting = [node]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() in PRODUCTS:
            yield node
        else:
            waiting += [following for following, _ in node.next_functions]


def parameters_of(product: Any) -> Iterator[torch.Tensor]:
    """The parameters that a product multiplies with, directly or as a view or a cast."""
    for node, _ in product.next_functions:
        while node is not None and node.name() != "torch::autograd::AccumulateGrad" and len(node.next_functions) == 1:
            node = node.next_functions[0][0]
        if node is not None and node.name() == "torch::autograd::AccumulateGrad" and node.variable.dim() > 1:
            yield node.variable


def routers_of(model: nn.Module, arguments: dict[str, torch.Tensor]) -> set[str]:
    """Names of the layers whose scores a float model chooses experts by."""
    mode = Chosen()
    with with_gradients(), mode:
        model(**arguments)
    names = {id(module.weight): name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    found = set()
    for scores, size in mode.scores:
        for product in first_products(scores.grad_fn, set()):
            for weight in parameters_of(product):
                name = names.get(id(weight))
                if name is not None and weight.shape[0] % size == 0:
                    found.add(name)
    return {name for name in found if about_experts(model, name)}


def about_experts(model: nn.Module, name: str) -> bool:
    """True if the layer or a module around it, up to the decoder layer, has a name that tells of experts."""
    parts = name.split(".")
    for length in range(max(1, len(parts) - 3), len(parts)):
        block = model.get_submodule(".".join(parts[:length]))
        words = [type(block).__name__, *(child for child, _ in block.named_children()), *parts[length:]]
        if any(word in text.lower() for text in words for word in EXPERTS):
            return True
    return False


def planned(model: nn.Module, **options: Any) -> set[str]:
    """Names of the layers that loading quantizes."""
    found = plan(
        model,
        QuantoConfig(weights="int4", **options),
        default_skips=get_keys_to_not_convert(model),
        output_embeddings=model.get_output_embeddings(),
    )
    return {name.removesuffix(".weight") for name in found}


def has_experts(family: str) -> bool:
    """True if the config of a family, or a part of it, has a number of experts."""
    try:
        config = next(cases(family)).cls.config_class()
    except Exception:
        return False
    parts = [config, *(getattr(config, name, None) for name in getattr(type(config), "sub_configs", {}))]
    return any("expert" in name for part in parts if part is not None for name in part.to_dict())


PARTS = 4


@pytest.mark.parametrize("part", range(PARTS))
def test_routers_stay_float_in_every_family_with_experts(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ran, with_layers, missed, others = 0, 0, {}, {}
    for family in sorted(filter(has_experts, families()))[part::PARTS]:
        for case in list(cases(family))[-1:]:
            try:
                model = case.build()
                routers = routers_of(model, inputs(model))
            except Exception:  # not to be made small by rules, or wants other inputs
                continue
            ran += 1
            with_layers += bool(routers)
            quantized = planned(model)
            with monkeypatch.context() as patch:
                patch.setattr("requanto.config.routers.Routers.has", lambda *args: False)
                left = planned(model) - quantized
            if routers & quantized:
                missed[case.class_name] = routers & quantized
            # Besides the routers: gates of a shared expert, with one output, and the first layers of a router.
            beside = {name.rpartition(".")[0] for name in routers}
            left = {n for n in left - routers if n.rpartition(".")[0] not in beside}
            left = {n for n in left if model.get_submodule(n).out_features > 1}
            if left:
                others[case.class_name] = left
    assert not missed
    assert not others
    assert ran >= 10
    assert with_layers >= 2


def test_a_large_model_has_no_more_trials_than_a_small_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """94 layers of 128 experts, as in the largest Qwen3: on the meta device, as when it is loaded."""
    trials, counts = [], []
    original = routers_module.choices_of
    monkeypatch.setattr(routers_module, "choices_of", lambda *args: (trials.append(args), original(*args))[1])
    for layers in (4, 94):
        config = tf.HunYuanMoEV1Config(
            num_hidden_layers=layers,
            num_experts=128,
            moe_topk=8,
            hidden_size=512,
            head_dim=64,
            vocab_size=1000,
        )
        with torch.device("meta"):
            model = tf.HunYuanMoEV1ForCausalLM(config)
        trials.clear()
        quantized = planned(model)
        assert not any("gate.wg" in name for name in quantized)
        counts.append(len(trials))
    assert counts[0] == counts[1] > 0


@pytest.mark.skipif(not hasattr(diffusers, "NucleusMoEImageTransformer2DModel"), reason="not in this Diffusers")
def test_diffusers_routers_by_which_experts_choose_their_tokens() -> None:
    with torch.device("meta"):
        model = diffusers.NucleusMoEImageTransformer2DModel(
            in_channels=16,
            num_layers=6,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(4, 6, 6),
            num_experts=8,
            moe_intermediate_dim=32,
        )
    quantized = {name.removesuffix(".weight") for name in plan_model(model, QuantoConfig("int8"))}
    gates = {
        name for name, module in model.named_modules() if name.endswith("mlp.gate") and isinstance(module, nn.Linear)
    }
    assert gates
    assert not gates & quantized
    assert any("shared_expert" in name for name in quantized)
