"""Folds leave what a model computes as it is, and change the weights that are rounded: every architecture here."""

import copy
import logging

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
import tiny_models
from tiny_models import TINY

from requanto.transforms import fold_model
from requanto.transforms.weights import float_weights

#: model -> (rotations that are exact, parts of names of the weights that take no column scale)
EXPECTED = {
    "llama": (["rotation", "value_rotation"], []),
    "llama-tied": (["rotation", "value_rotation"], []),
    "qwen3": (["rotation", "value_rotation"], []),  # norms of queries and keys
    "gemma3": (["value_rotation"], []),  # 1 + weight; norms after attention and MLP
    "mixtral": (["rotation", "value_rotation"], []),
    "qwen3-moe": (["rotation", "value_rotation"], []),
    "gpt-oss": (["rotation", "value_rotation"], ["experts.down_proj"]),  # clamped
    "olmoe": (["rotation", "value_rotation"], []),
    "gpt2": (["rotation", "value_rotation"], ["mlp.c_proj"]),  # LayerNorm with biases, Conv1D, q k v in one; GELU
    "opt": (["rotation", "value_rotation"], []),  # LayerNorm, ReLU
    "bert": (["value_rotation"], ["query", "key", "value", "intermediate", "output.dense", "pooler"]),
    "vit": (["value_rotation"], ["fc2", "classifier"]),
    "t5": (["value_rotation"], ["EncDecAttention"]),
}


def uneven(name, dtype=torch.float64):
    """A tiny model with norms and biases that are not those of an initialization."""
    model = TINY[name].build(dtype)
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if getattr(getattr(module, "config", None), "_experts_implementation", None) is not None:
            module.config._experts_implementation = "eager"  # the default has no float64
        for parameter in module._parameters.values():
            if parameter is not None and parameter.dim() == 1:
                parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model


def inputs_of(name, dtype=torch.float64):
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in TINY[name].inputs().items()}


def to_quantize(model):
    """All weights but embeddings, routers and heads."""
    kinds = ("linear", "conv1d", "experts")
    return {w.name for w in float_weights(model) if w.kind in kinds and not w.name.startswith("lm_head")}


def spread(matrix):
    """Scale of columns, geometric mean 1: the size of each."""
    size = matrix.double().square().mean(0).sqrt()
    size = torch.where(size > 0, size, torch.ones_like(size))
    return size / size.log().mean().exp()


def evenness(weight):
    """Largest ratio of the sizes of two columns."""
    size = weight.matrix.double().square().mean(-2).sqrt()
    return float((size.amax(-1) / size.amin(-1)).max())


def assert_same(after, before):
    assert float((after - before).norm() / before.norm()) < 2e-6  # norms compute in float32


@pytest.mark.parametrize("name", EXPECTED)
def test_rotations_leave_the_answer_as_it_is(name):
    model, inputs = uneven(name), inputs_of(name)
    before, weights = tiny_models.output(model, inputs), copy.deepcopy(model.state_dict())
    found = fold_model(model, rotation=True, inputs=inputs)
    assert found.done == EXPECTED[name][0]
    assert_same(tiny_models.output(model, inputs), before)
    changed = [key for key, value in model.state_dict().items() if not torch.equal(value, weights[key])]
    values = [
        key for key in changed if ("v_proj" in key or "value" in key or "c_attn" in key or "SelfAttention.v" in key)
    ]
    assert values
    if "rotation" in found.done:
        assert {w.name for w in float_weights(model)} <= set(changed)
        norms = [
            m
            for n, m in model.named_modules()
            if ("norm" in n or "ln_" in n) and "q_norm" not in n and "k_norm" not in n
        ]
        assert norms
        assert all(bool((norm.weight == 1).all()) for norm in norms)
    assert model.config.requanto_folded == found.done


@pytest.mark.parametrize("name", EXPECTED)
def test_column_scales_leave_the_answer_as_it_is_and_make_columns_even(name):
    model, inputs = uneven(name), inputs_of(name)
    before, names = tiny_models.output(model, inputs), to_quantize(model)
    were = {w.name: evenness(w) for w in float_weights(model)}
    found = fold_model(model, column_scale=spread, names=names, inputs=inputs)
    assert_same(tiny_models.output(model, inputs), before)
    assert found.columns | found.left == names
    assert not found.columns & found.left
    expected = EXPECTED[name][1]
    assert all(any(part in key for part in expected) for key in found.left), sorted(found.left)
    assert all(any(part in key for key in found.left) for part in expected), sorted(found.left)
    are = {w.name: evenness(w) for w in float_weights(model)}
    assert found.columns
    assert sum(are[n] < 0.999 * were[n] for n in found.columns) > 0.6 * len(found.columns)
    assert model.config.requanto_folded == ["column_scale"]


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "mixtral"])
def test_both_together_in_the_order_that_works(name):
    model, inputs = uneven(name), inputs_of(name)
    before = tiny_models.output(model, inputs)
    found = fold_model(model, rotation=True, column_scale=spread, names=to_quantize(model), inputs=inputs)
    assert found.done == ["rotation", "value_rotation", "column_scale"]
    assert_same(tiny_models.output(model, inputs), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_other_dtypes_and_inputs_made_here(dtype):
    model, inputs = uneven("llama", dtype), inputs_of("llama", dtype)
    before = tiny_models.output(model, inputs).float()
    parameters = dict(model.named_parameters())
    fold_model(model, rotation=True, column_scale=spread, names=to_quantize(model))
    assert all(parameters[n] is p and p.dtype == dtype for n, p in model.named_parameters())
    error = float((tiny_models.output(model, inputs).float() - before).norm() / before.norm())
    assert error < {torch.bfloat16: 0.05, torch.float16: 0.01, torch.float32: 1e-5}[dtype]


def test_a_tied_head_gets_a_weight_of_its_own_that_is_saved(tmp_path, caplog):
    model, inputs = uneven("llama-tied", torch.float32), inputs_of("llama-tied", torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    before = tiny_models.output(model, inputs)
    with caplog.at_level(logging.WARNING, "requanto.transforms"):
        fold_model(model, rotation=True)
    assert "lm_head.weight had one tensor with the embedding table" in caplog.text
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert not model.config.tie_word_embeddings
    model.save_pretrained(tmp_path)
    loaded = TINY["llama-tied"].auto.from_pretrained(tmp_path)
    assert torch.equal(tiny_models.output(loaded, inputs), tiny_models.output(model, inputs))
    torch.testing.assert_close(tiny_models.output(loaded, inputs), before, rtol=1e-3, atol=1e-4)
    assert loaded.config.requanto_folded == ["rotation", "value_rotation"]


def test_folded_norms_of_gemma_keep_their_offset():
    model = uneven("gemma3")
    norm = model.model.layers[0].input_layernorm
    scale = spread(torch.cat([getattr(model.model.layers[0].self_attn, f"{x}_proj").weight for x in "qkv"]))
    old = 1 + norm.weight.detach()
    fold_model(model, column_scale=spread, names=to_quantize(model))
    assert not torch.equal(1 + norm.weight, old)
    # v_proj's rows were scaled before, for o_proj, so the scale is near that of the first weights, not the same.
    logs = ((1 + norm.weight.detach()) / old).log(), scale.detach().log()
    assert float(torch.corrcoef(torch.stack(logs))[0, 1]) > 0.9


class Residual(nn.Module):
    """Attention without attention: what tests change in one place."""

    def __init__(self, post=False, leak=False, factor=None):
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 32), nn.Linear(32, 50, bias=False)
        self.layers = nn.ModuleList([nn.ModuleDict(self.parts(post)) for _ in range(2)])
        self.norm, self.post, self.leak, self.factor = nn.RMSNorm(32), post, leak, factor
        self.main_input_name = "input_ids"
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape) * 0.3 + (p.dim() == 1))

    def parts(self, post):
        one = {"norm": nn.RMSNorm(32), "up": nn.Linear(32, 48), "down": nn.Linear(48, 32)}
        return {**one, "post": nn.RMSNorm(32)} if post else one

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for layer in self.layers:
            normed = layer["norm"](x)
            out = layer["down"](torch.tanh(layer["up"](normed)))
            x = x + (layer["post"](out) if self.post else out) + (normed if self.leak else 0)
        x = self.norm(x)
        return self.head(x if self.factor is None else x * self.factor)


IDS = {"input_ids": torch.arange(24).view(2, 12)}


@pytest.mark.parametrize("factor", [None, 0.25])  # T5 and others multiply before the head
def test_a_model_of_ones_own_is_rotated(factor):
    torch.manual_seed(0)
    model = Residual(factor=factor).double()
    before = model(**IDS)
    assert fold_model(model, rotation=True, inputs=IDS).done == ["rotation"]
    torch.testing.assert_close(model(**IDS), before, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"post": True}, r"layers.0.post multiplies 32 channels by its weight and no layer reads the result"),
        ({"leak": True}, r"rotating the residual stream .* changes the model's output by"),
    ],
)
def test_a_rotation_that_is_not_exact_is_refused_and_nothing_changes(options, message):
    torch.manual_seed(0)
    model = Residual(**options)
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"Residual was left as it was: .*{message}"):
        fold_model(model, rotation=True, inputs=IDS)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_what_has_no_exact_fold_is_left_out_with_its_name(caplog):
    torch.manual_seed(0)
    model = Residual(leak=True).double()
    before, names = model(**IDS), {f"layers.{i}.{x}.weight" for i in (0, 1) for x in ("up", "down")}
    with caplog.at_level(logging.INFO, "requanto.transforms"):
        found = fold_model(model, column_scale=spread, names=names | {"head.weight"}, inputs=IDS)
    assert found.columns == {"head.weight"}
    assert found.left == names
    assert all(f"{name}: no norm and no layer" in caplog.text for name in names)
    assert "column scales of 1 of 5 weights are folded" in caplog.text
    torch.testing.assert_close(model(**IDS), before, rtol=1e-9, atol=1e-9)
