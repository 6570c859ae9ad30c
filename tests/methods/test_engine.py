"""Whole models gone through block by block: every kind of model, sharing, resuming, and what is refused."""

import copy
import json
import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("transformers")
pytest.importorskip("diffusers")
import tiny_diffusers
import tiny_models
from whole_models import error, logits, nearest, quiet, token_samples, vector_samples

import requanto
from requanto.config.config import QuantoConfig
from requanto.config.plan import plan
from requanto.methods import layer_moments, text_samples
from requanto.methods.chains import Chain, find_lists
from requanto.methods.samples import Samples
from requanto.tensor.qtensor import QTensor


class Root(nn.Module):
    """No blocks, no list: only layers."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.unused = nn.Linear(32, 64), nn.Linear(64, 16), nn.Linear(8, 8)

    def forward(self, x):
        return self.last(F.gelu(self.first(x)))


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_language_models_and_encoders(name):
    model, samples = tiny_models.TINY[name].build(), token_samples()
    expected = logits(model, samples)
    skip = {"exclude": [p for p in ("lm_head", "classifier") if any(n == p for n, _ in model.named_modules())] or None}
    plain = error(nearest(copy.deepcopy(model), weights="int2", **skip), samples, expected)
    requanto.quantize(model, weights="int2", calibration=samples, method="gptq", **skip, **quiet)
    quantized = [n for n, p in model.named_parameters() if isinstance(p, QTensor)]
    assert len(quantized) >= 8
    assert error(model, samples, expected) < 0.75 * plain
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


@pytest.mark.parametrize("name", ["pixart", "flux", "sd3", "unet", "wan"])
def test_diffusion_models_run_by_a_function(name):
    tiny = tiny_diffusers.TINY[name]
    model = tiny.make()
    expected = tiny.run(model)
    only = {"exclude": [n for n, m in model.named_modules() if isinstance(m, nn.modules.conv._ConvNd)] or None}
    plain = nearest(copy.deepcopy(model), weights="int2", group_size=16, **only)
    requanto.quantize(
        model, weights="int2", group_size=16, method="gptq", calibration=lambda model: tiny.run(model), **only, **quiet
    )
    found = tiny_diffusers.relative_error(tiny.run(model), expected)
    assert found < 0.8 * tiny_diffusers.relative_error(tiny.run(plain), expected)


def test_a_pipeline_runs_around_the_model():
    pipe = tiny_diffusers.tiny_pipeline()
    expected = tiny_diffusers.run_pipeline(pipe)
    runs = []
    requanto.quantize(
        pipe.transformer,
        weights="int4",
        method="gptq",
        calibration=lambda model: runs.append(tiny_diffusers.run_pipeline(pipe)),
        **quiet,
    )
    assert len(runs) >= 1
    assert tiny_diffusers.relative_error(tiny_diffusers.run_pipeline(pipe), expected) < 0.2


def test_a_model_without_blocks(caplog):
    torch.manual_seed(0)
    model, samples = Root(), vector_samples()
    expected = logits(model, samples)
    plain = error(nearest(copy.deepcopy(model), weights="int2", group_size=16), samples, expected)
    requanto.quantize(model, weights="int2", group_size=16, calibration=samples, method="gptq", **quiet)
    assert error(model, samples, expected) < 0.6 * plain
    # A layer that no sample reaches is named, and quantized all the same.
    assert "unused.weight never saw an input" in caplog.text
    assert isinstance(model.unused.weight, QTensor)


def test_a_linear_root_and_all_kinds_of_samples():
    torch.manual_seed(0)
    weights = []
    inputs = vector_samples()
    for samples in (inputs, [{"input": x} for x in inputs], [(x,) for x in inputs], iter(inputs), torch.cat(inputs)):
        torch.manual_seed(0)
        layer = requanto.quantize(nn.Linear(32, 8), weights="int4", calibration=samples, **quiet)
        weights.append(layer.weight.dequantize())
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0])


@pytest.mark.parametrize("weights", ["int3", "uint4", "nf4", "fp6_e3m2", "codebook3", "nvfp4", "mxfp4", "mxfp8_e4m3"])
def test_types_of_every_kind(weights):
    torch.manual_seed(0)
    model = Root()
    samples = [torch.randn(8, 32) * torch.logspace(-1, 1, 32) for _ in range(4)]
    want = logits(model, samples)
    plain = error(nearest(copy.deepcopy(model), weights=weights), samples, want)
    calibrated = requanto.quantize(copy.deepcopy(model), weights=weights, calibration=samples, method="gptq", **quiet)
    assert calibrated.first.weight.qtype.name == f"q{weights}"
    assert calibrated.first.weight.inner_tensors()["qdata"].is_contiguous()
    assert error(calibrated, samples, want) < 0.9 * plain


def test_group_size_symmetric_modules_and_patterns_count():
    model = tiny_models.TINY["llama"].build()
    requanto.quantize(
        model,
        weights="int4",
        group_size=32,
        symmetric=True,
        activations="int8",
        modules={"*.mlp.*": "int8", "*.down_proj": None},
        exclude=["lm_head", "*.v_proj"],
        calibration=token_samples(),
        **quiet,
    )
    layer = model.model.layers[0]
    kinds = {
        n: m.weight.qtype.name for n, m in layer.named_modules() if isinstance(getattr(m, "weight", None), QTensor)
    }
    assert kinds["self_attn.q_proj"] == "qint4"
    assert kinds["mlp.up_proj"] == "qint8"
    assert "self_attn.v_proj" not in kinds
    weight = layer.self_attn.q_proj.weight
    assert (weight.group_size, weight.shift, weight.activation.name) == (32, None, "qint8")


def test_the_blocks_see_the_errors_of_those_before():
    """With the errors of earlier blocks corrected, the output is nearer to the float model's than without."""
    model, samples = tiny_models.TINY["llama"].build(), token_samples(12, 32)
    expected, errors = logits(model, samples), {}
    for correct in (True, False):
        copied = copy.deepcopy(model)
        options = {"correct": correct, "sequential": correct}
        requanto.quantize(copied, "int2", exclude="lm_head", calibration=samples, method_options=options, **quiet)
        errors[correct] = error(copied, samples, expected)
    assert errors[True] < errors[False]


def test_a_tied_weight_is_one_layer():
    config = tiny_models.TINY["llama"].config()
    config.tie_word_embeddings = True
    model = tiny_models.TINY["llama"].auto.from_config(config).eval()
    requanto.quantize(model, weights="int8", calibration=token_samples(), **quiet)
    assert isinstance(model.lm_head.weight, QTensor)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert logits(model, token_samples()).isfinite().all()


def test_a_state_dict_brings_the_chosen_values_back():
    for name in ("llama", "gpt2"):
        model, samples = tiny_models.TINY[name].build(torch.bfloat16), token_samples()
        exclude = "lm_head"
        requanto.quantize(model, weights="int4", group_size=32, exclude=exclude, calibration=samples, **quiet)
        state = model.state_dict()
        again = tiny_models.TINY[name].build(torch.bfloat16)
        nearest(again, weights="int4", group_size=32, exclude=exclude)
        again.load_state_dict(state)
        assert torch.equal(logits(again, samples), logits(model, samples))


# ---------------------------------------------------------------------- chains


def test_chains_are_found_and_run_as_the_model_runs():
    model = tiny_models.TINY["llama"].build()
    linears = {m for m in model.model.layers.modules() if isinstance(m, nn.Linear)}
    ((name, blocks),) = find_lists(model, linears)
    assert name == "model.layers"
    samples = token_samples(3)
    records = Chain(name, blocks).capture(model, Samples(samples))
    assert len(records) == 3
    hidden = []
    hook = blocks[-1].register_forward_hook(lambda m, a, out: hidden.append(out if torch.is_tensor(out) else out[0]))
    logits(model, samples)
    hook.remove()
    chain = Chain(name, blocks)
    for record, expected in zip(records, hidden, strict=True):
        carried = []
        for index, block in enumerate(blocks):
            args, kwargs = chain.inputs(record, index, carried)
            with torch.no_grad():
                out = block(*args, **kwargs)
            carried = [(leaf, leaf.device) for leaf in ([out] if torch.is_tensor(out) else out)]
        assert torch.equal(carried[0][0], expected)


def test_blocks_that_do_not_feed_one_another_run_in_the_whole_model(caplog):
    class Parallel(nn.Module):
        def __init__(self):
            super().__init__()
            self.branches = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.ReLU()) for _ in range(3))

        def forward(self, x):
            return sum(branch(x * (1 + i)) for i, branch in enumerate(self.branches))

    torch.manual_seed(0)
    model, samples = Parallel(), vector_samples()
    expected = logits(model, samples)
    plain = error(nearest(copy.deepcopy(model), weights="int2", group_size=16), samples, expected)
    with caplog.at_level(logging.INFO, "requanto"):
        requanto.quantize(model, weights="int2", group_size=16, calibration=samples, **quiet)
    assert "do not run on each other's outputs" in caplog.text
    assert error(model, samples, expected) < 0.7 * plain


# ---------------------------------------------------------------------- resuming


class Interrupted(Exception):
    pass


def interrupted(samples, after):
    """A method that stops before the (after + 1)th weight."""
    from requanto.methods import Gptq

    class Stopping(Gptq):
        name = "gptq"
        count = 0

        def round(self, *args, **kwargs):
            Stopping.count += 1
            if Stopping.count > after:
                raise Interrupted
            return super().round(*args, **kwargs)

        __repr__ = Gptq.__repr__

    Stopping.__qualname__ = "Gptq"
    return Stopping()


@pytest.mark.parametrize("after", [3, 8, 14])
def test_an_interrupted_run_goes_on_and_ends_with_the_same_bits(tmp_path, after):
    model, samples = tiny_models.TINY["llama"].build(), token_samples()
    straight = requanto.quantize(copy.deepcopy(model), weights="int4", calibration=samples, **quiet)
    options = {"calibration": samples, "resume": tmp_path / "r", **quiet}
    with pytest.raises(Interrupted):
        requanto.quantize(copy.deepcopy(model), weights="int4", method=interrupted(samples, after), **options)
    kept = sorted(p.name for p in (tmp_path / "r").glob("*.safetensors"))
    assert len(kept) == after // 7
    resumed = copy.deepcopy(model)
    requanto.quantize(resumed, weights="int4", **options)
    one, two = straight.state_dict(), resumed.state_dict()
    for name in one:
        for part in ("qdata", "scale", "shift") if isinstance(one[name], QTensor) else (None,):
            a, b = (one[name], two[name]) if part is None else (getattr(one[name], part), getattr(two[name], part))
            assert torch.equal(a, b), name
    assert not list((tmp_path / "r").glob(".*"))


def test_a_directory_of_another_run_is_refused(tmp_path):
    model, samples = tiny_models.TINY["llama"].build(), token_samples()
    options = {"calibration": samples, "resume": tmp_path, **quiet}
    requanto.quantize(copy.deepcopy(model), weights="int4", **options)
    with pytest.raises(ValueError, match="blocks of another run: samples changed"):
        requanto.quantize(copy.deepcopy(model), weights="int4", **options | {"calibration": token_samples(5)})
    with pytest.raises(ValueError, match="layers changed"):
        requanto.quantize(copy.deepcopy(model), weights="int2", **options)
    with pytest.raises(ValueError, match="method changed"):
        requanto.quantize(copy.deepcopy(model), weights="int4", method_options={"damping": 0.2}, **options)
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    with pytest.raises(ValueError, match="model changed"):
        requanto.quantize(model, weights="int4", **options)
    assert json.loads((tmp_path / "state.json").read_text())["fingerprint"]


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibration": []}, "holds no samples"),
        ({"calibration": "a text"}, "calibration is text"),
        ({"calibration": ["a text"]}, "calibration is text"),
        ({"method": "gptq"}, "needs samples"),
        ({"calibration": [torch.ones(2, 32)], "optimizer": requanto.HqqOptimizer()}, "belong together"),
        ({"calibration": [torch.ones(2, 32)], "method": "gpqt"}, "unknown method 'gpqt'"),
        ({"calibration": lambda model: None}, "reached none of the 3 layers"),
        ({"calibration": [torch.full((2, 32), torch.nan)]}, r"first\.weight hold NaN"),
        ({"calibration": [torch.ones(2, 32)], "method_options": {"damping": 0}}, "damping must be above 0"),
        ({"calibration": [torch.ones(2, 32)], "method_options": {"order": "up"}}, "order must be"),
    ],
)
def test_what_cannot_work_says_why(options, message):
    with pytest.raises(ValueError, match=message):
        requanto.quantize(Root(), weights="int4", **options, **quiet)


def test_types_of_arguments():
    with pytest.raises(TypeError, match="no option 'dampign'; did you mean 'damping'"):
        requanto.quantize(Root(), "int4", calibration=vector_samples(), method_options={"dampign": 1})
    with pytest.raises(TypeError, match="found int"):
        requanto.quantize(Root(), "int4", calibration=5)
    with pytest.raises(TypeError, match="sample must be a tensor"):
        requanto.quantize(Root(), "int4", calibration=[5])


def test_a_quantized_model_is_refused():
    model = nearest(Root(), weights="int4")
    with pytest.raises(ValueError, match="already quantized"):
        requanto.quantize(model, weights="int4", calibration=vector_samples(), **quiet)


def test_an_error_leaves_hooks_and_settings_as_they_were():
    model = tiny_models.TINY["llama"].build().train()
    model.config.use_cache = True
    with pytest.raises(IndexError):
        requanto.quantize(model, weights="int4", calibration=[torch.full((1, 4), 10_000)], **quiet)
    assert model.training
    assert model.config.use_cache is True
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


def test_text_becomes_samples():
    tokenizer = tiny_models.tiny_tokenizer()
    text = "".join(chr(97 + i % 26) for i in range(1000))
    samples = text_samples(tokenizer, text, samples=5, length=100)
    assert [s.shape for s in samples] == [(1, 100)] * 5
    assert len({tuple(s[0].tolist()) for s in samples}) > 1
    with pytest.raises(ValueError, match="give a longer text"):
        text_samples(tokenizer, "short", samples=5, length=100)


@pytest.mark.parametrize("full", [True, False])
def test_moments_of_a_float_model(full):
    model, samples = Root(), vector_samples()
    weights = {name: copy.deepcopy(p) for name, p in model.named_parameters()}
    planned = plan(model, QuantoConfig(weights="int4"))
    found = layer_moments(model, planned, samples, full=full)
    inputs = torch.cat(samples)
    inside = F.gelu(model.first(inputs)).detach()
    for name, x in (("first.weight", inputs), ("last.weight", inside)):
        assert found[name].rows == 64
        torch.testing.assert_close(found[name].square, x.square().sum(0))
        assert (found[name].hessian is not None) == full
        if full:
            torch.testing.assert_close(found[name].hessian, x.t() @ x, rtol=1e-4, atol=1e-3)
    assert found["unused.weight"].rows == 0
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


def test_a_model_without_such_layers_is_told_that_samples_are_of_no_use():
    model = nn.Sequential(nn.Embedding(8, 16), nn.ReLU())
    with pytest.raises(
        ValueError, match=r"none of the 1 weights .*0\.weight.* belongs to a Linear layer.*leave calibration"
    ):
        requanto.quantize(
            model,
            modules={"0": "int4"},
            method="gptq",
            calibration=[torch.zeros(1, 8, dtype=torch.int64)],
            weights="int4",
        )
