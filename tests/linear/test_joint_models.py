"""Joined layers in models of Transformers: eager, compiled, with a static cache, adapters, checkpointing and offloading."""

import copy

import pytest
import torch

pytest.importorskip("transformers")

from joint_layers import launches, quantized
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import requanto
from requanto.linear import custom_ops

SIZES = {
    "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64,
}  # fmt: skip
IDS = torch.tensor([[1, 5, 9, 3]])


def llama(model=LlamaForCausalLM, config=LlamaConfig, layers=2, **how):
    torch.manual_seed(0)
    made = model(config(**SIZES, num_hidden_layers=layers)).eval()
    requanto.quantize(made, "int4", exclude="lm_head", progress=False, **how)
    requanto.freeze(made)
    return made.requires_grad_(False)


def tokens(model, **how):
    return model.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=0, **how)


@pytest.mark.parametrize("kinds", [(LlamaForCausalLM, LlamaConfig), (Qwen2ForCausalLM, Qwen2Config)])
def test_generate(kinds):
    model = llama(*kinds)
    want = tokens(model)
    found = requanto.join_layers(model)
    assert len(found) == 4  # of two layers
    assert found[0] == tuple(f"model.layers.0.self_attn.{name}_proj" for name in "qkv")
    assert found[1] == tuple(f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up"))
    with launches() as noted:
        assert torch.equal(tokens(model), want)
        assert len(noted) == 4 * 6
        assert torch.equal(tokens(model, cache_implementation="static", disable_compile=True), want)
        assert len(noted) == 4 * 12
        with torch.inference_mode():
            assert torch.equal(tokens(model), want)
        assert len(noted) == 4 * 18
    assert all(not m._joined._results for m in model.modules() if hasattr(m, "_joined"))


def operators(model, *inputs, **how):
    """The operators of Requanto in the graphs of the compiled model, and its result."""
    seen = []

    def compiler(graph, _):
        names = [node.target.__name__ for node in graph.graph.nodes if "requanto" in str(node.target)]
        seen.append([name.split(".")[0] for name in names])
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=aot_autograd(fw_compiler=compiler), fullgraph=True)
    return compiled(*inputs, **how), seen


def test_one_operator_for_a_set_in_a_graph():
    model = llama(layers=1)  # queries have a column scale, keys and values (64 rows) have none
    with torch.no_grad():
        want = model(IDS).logits
        requanto.join_layers(model)
        with launches() as noted:
            found, graphs = operators(model, IDS)
    assert graphs == [["linear_many", "linear"] * 2]  # 4 in place of 7
    assert torch.equal(found.logits, want)
    assert noted == [(3, 4), (2, 4)]


def test_a_gradient_in_a_graph():
    model, x = llama().model.layers[0].mlp, torch.randn(3, 128)
    requanto.join_layers(model, x)
    grads = []
    for run in (model, lambda x: operators(model, x)):
        x = x.detach().requires_grad_()
        out = run(x)
        if isinstance(out, tuple):
            out, graphs = out
            assert graphs[0] == ["linear"] * 3
        out.sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


def test_the_operator():
    layers = [quantized(n, column_scale=kind) for n, kind in ((64, "mean"), (33, None))]
    parts, words, shapes = [], [], []
    for layer in layers:
        its_parts, text, shape = custom_ops.arguments(layer.weight)
        parts, words, shapes = parts + its_parts, [*words, text], [*shapes, *shape, len(its_parts)]
    xs = [torch.randn(3, 128), torch.randn(3, 128)]
    arguments = (xs, [layers[0].bias, None], parts, "|".join(words), shapes)
    torch.library.opcheck(torch.ops.requanto.linear_many, arguments, test_utils=("test_schema", "test_faketensor"))
    with launches() as noted, torch.no_grad():
        outs = torch.ops.requanto.linear_many(*arguments)
        assert noted == [(2, 3)]
    torch.testing.assert_close(outs, torch.ops.requanto.linear_many(*arguments))


def test_any_number_of_rows_in_a_graph():
    mlp = llama().model.layers[0].mlp
    requanto.join_layers(mlp, torch.randn(1, 128))
    torch._dynamo.reset()
    graphs = []

    def counted(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(mlp, backend=aot_autograd(fw_compiler=counted), dynamic=True, fullgraph=True)
    with torch.no_grad():
        for rows in (3, 8, 40):
            x = torch.randn(2, rows, 128)
            torch.testing.assert_close(compiled(x), mlp(x))
    assert len(graphs) == 1
    assert "linear_many" in str(graphs[0].graph)


class Between(torch.nn.Module):
    """Changes the input of two joined layers between them, or breaks the graph there."""

    def __init__(self, mlp, what):
        super().__init__()
        self.mlp, self.what = mlp, what

    def forward(self, x):
        x = x * 1.0
        gate = self.mlp.gate_proj(x)
        if self.what == "change":
            x.add_(1)
        elif self.what == "break":
            torch._dynamo.graph_break()
        return gate * self.mlp.up_proj(x)


@pytest.mark.parametrize("what", ["nothing", "change", "break"])
def test_between_two_layers_in_a_graph(what):
    mlp = llama().model.layers[0].mlp
    model, x = Between(mlp, what), torch.randn(1, 128)
    with torch.no_grad():
        want = model(x)
        requanto.join_layers(mlp, x)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager")
        assert all(torch.equal(compiled(x), want) for _ in range(2))
        assert torch.equal(model(x), want)


def test_export_does_not_see_sets():
    model = llama().model.layers[0].mlp
    x = torch.randn(1, 128)
    requanto.join_layers(model, x)
    program = torch.export.export(model, (x,), strict=True)
    assert "linear_many" not in str(program.graph)
    assert torch.equal(program.module()(x), model(x))


def test_an_adapter_on_one_of_them():
    peft = pytest.importorskip("peft")
    model = llama()
    requanto.join_layers(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    adapted.eval()
    with torch.no_grad():
        want = adapted(IDS).logits
    with launches() as noted:
        with torch.no_grad():
            assert torch.equal(adapted(IDS).logits, want)
        assert len(noted) == 4
        noted.clear()
        adapted.train()
        adapted(IDS, labels=IDS).loss.backward()
        assert len(noted) == 1  # nothing before the first adapter, which follows these layers, needs a gradient
        grads = {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}
    assert all(grad is not None for grad in grads.values())
    merged = adapted.eval().merge_and_unload()
    with launches() as noted, torch.no_grad():
        got = merged(IDS).logits
        requanto.separate_layers(merged)
        assert torch.equal(merged(IDS).logits, got)
    torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)


def test_gradient_checkpointing():
    model = llama()
    embeds = torch.randn(1, 4, 128)

    def gradient(model):
        x = embeds.clone().requires_grad_()
        model.train()
        model(inputs_embeds=x, labels=IDS, use_cache=False).loss.backward()
        return x.grad

    want = gradient(model)
    requanto.join_layers(model.eval())
    for reentrant in (True, False):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with launches():
            torch.testing.assert_close(gradient(model), want)


def test_saved_and_copied(tmp_path):
    model = llama()
    want = model(IDS).logits
    model.save_pretrained(tmp_path / "before")
    requanto.join_layers(model)
    model.save_pretrained(tmp_path / "after")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()
    with launches() as noted, torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(IDS).logits, want)
        assert len(noted) == 4


def test_hooks_of_accelerate():
    accelerate = pytest.importorskip("accelerate")
    model = llama()
    want = model(IDS).logits
    model.model.embed_tokens.weight.requires_grad_(False)
    accelerate.cpu_offload(model.model.layers[0], torch.device("cpu"))
    assert len(requanto.join_layers(model)) >= 2
    with launches() as noted, torch.no_grad():
        assert torch.equal(model(IDS).logits, want)
        assert noted
    requanto.separate_layers(model)
    assert torch.equal(model(IDS).logits, want)


def test_explain_names_the_set():
    model = llama()
    requanto.join_layers(model)
    assert "one launch" not in str(requanto.explain(model))
    with launches():
        found = {one.name: one.reason for one in requanto.explain(model, rows=1)}
    assert found["model.layers.0.mlp.up_proj.weight"].endswith("; one launch with gate_proj")
    assert found["model.layers.0.self_attn.q_proj.weight"].endswith("; one launch with k_proj, v_proj")
    assert "one launch" not in found["model.layers.0.self_attn.o_proj.weight"]
