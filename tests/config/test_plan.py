"""What a config quantizes: patterns, defaults and their exceptions, on a model whose names are known."""

import pytest
import torch
from torch import nn

from requanto import QuantoConfig
from requanto.config.plan import matches, plan


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(2, 16, 8))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(8, 8), nn.Linear(8, 8)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn = Attention()
        self.mlp = nn.ModuleDict({"gate": nn.Linear(8, 2), "experts": Experts()})
        self.norm = nn.LayerNorm(8)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.conv = nn.Conv2d(3, 8, 2)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.lm_head = nn.Linear(8, 10)


def names(config=None, **options):
    model = Model()
    found = plan(model, config or QuantoConfig(), output_embeddings=model.lm_head, **options)
    return {name.removesuffix(".weight") for name in found}


LAYER = {"self_attn.q_proj", "self_attn.k_proj", "mlp.experts.gate_up_proj"}
DEFAULT = {f"layers.{i}.{name}" for i in (0, 1) for name in LAYER}


def test_by_default_heads_tables_convolutions_and_routers_stay_float():
    assert names() == DEFAULT


@pytest.mark.parametrize(
    ("options", "more"),
    [
        ({"embeddings": True}, {"embed"}),
        ({"lm_head": True}, {"lm_head"}),
        ({"convolutions": True}, {"conv"}),
        ({"modules": {"lm_head": "int8"}}, {"lm_head"}),
        ({"modules": {"embed": "int4", "conv": "int8"}}, {"embed", "conv"}),
        ({"modules": {"layers.1.mlp.gate": "int8"}}, {"layers.1.mlp.gate"}),
        ({"modules": {"*lm_head": "int8"}}, set()),  # a glob does not switch a default off
        ({"default_skips": False}, {"layers.0.mlp.gate", "layers.1.mlp.gate"}),
    ],
)
def test_opt_in(options, more):
    assert names(QuantoConfig(**options)) == DEFAULT | more


@pytest.mark.parametrize(
    ("pattern", "gone"),
    [
        ("layers.0.self_attn.q_proj", {"layers.0.self_attn.q_proj"}),  # a full name
        ("layers.1", {f"layers.1.{n}" for n in LAYER}),  # a parent's
        ("self_attn", {f"layers.{i}.self_attn.{n}_proj" for i in (0, 1) for n in "qk"}),  # a parent's, anywhere
        ("q_proj", {f"layers.{i}.self_attn.q_proj" for i in (0, 1)}),  # a leaf
        ("*.k_proj", {f"layers.{i}.self_attn.k_proj" for i in (0, 1)}),  # a glob
        ("layers.?.mlp", {f"layers.{i}.mlp.experts.gate_up_proj" for i in (0, 1)}),
        ("lm_head", set()),  # float anyhow
    ],
)
def test_modules_to_not_convert(pattern, gone):
    assert names(QuantoConfig(modules_to_not_convert=[pattern])) == DEFAULT - gone


def test_a_name_is_matched_whole():
    assert not matches("layers.1", "layers.10.q_proj")
    assert not matches("proj", "layers.0.q_proj")
    assert matches("layers.1", "layers.1.q_proj")


def test_what_is_excluded_stays_excluded_whatever_modules_says():
    config = QuantoConfig(modules={"*.q_proj": "int4"}, modules_to_not_convert=["q_proj"])
    assert not [n for n in names(config) if "q_proj" in n]


def test_the_first_matching_choice_counts():
    model = Model()
    config = QuantoConfig(
        modules={"layers.0.self_attn.q_proj": "int2", "*.self_attn.*": "int4", "*.mlp.*": None}, weights="float8"
    )
    found = {n: p.options.qtype.name for n, p in plan(model, config, output_embeddings=model.lm_head).items()}
    assert found == {
        "layers.0.self_attn.q_proj.weight": "qint2",
        "layers.0.self_attn.k_proj.weight": "qint4",
        "layers.1.self_attn.q_proj.weight": "qint4",
        "layers.1.self_attn.k_proj.weight": "qint4",
    }


def test_the_librarys_skips_stay_unless_switched_off_by_name():
    assert names(default_skips=["k_proj"]) == {n for n in DEFAULT if "k_proj" not in n}
    asked = QuantoConfig(modules_to_not_convert=["q_proj"])
    assert not [n for n in names(asked, default_skips=["k_proj"]) if "k_proj" in n]
    named = QuantoConfig(modules={"layers.0.self_attn.k_proj": "int8"})
    assert [n for n in names(named, default_skips=["k_proj"]) if "k_proj" in n] == ["layers.0.self_attn.k_proj"]
    assert names(QuantoConfig(default_skips=False), default_skips=["k_proj"]) > DEFAULT


@pytest.mark.parametrize("where", ["modules_to_not_convert", "modules"])
@pytest.mark.parametrize(("pattern", "near"), [("q_prok", "q_proj"), ("self_atn", "self_attn"), ("layers.7", "layers")])
def test_a_pattern_that_matches_nothing_lists_close_names(where, pattern, near):
    value = [pattern] if where == "modules_to_not_convert" else {pattern: "int4"}
    with pytest.raises(
        ValueError, match=rf"{where}: '{pattern}' matches no module of the model\. Close names: .*{near}"
    ):
        names(QuantoConfig(**{where: value}))


def test_nothing_left_says_what_there_was():
    with pytest.raises(
        ValueError, match=r"nothing to quantize: Sequential .*\(its layers: Conv2d, ReLU\).*convolutions=True"
    ):
        plan(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()), QuantoConfig())
