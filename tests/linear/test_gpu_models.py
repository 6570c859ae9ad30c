"""A tiny Llama on a GPU that only the driver pretends: what one step of decoding does on the host."""

import pytest
import torch
from torch import nn

import requanto
from requanto.linear import prepack
from requanto.tensor.qtensor import QTensor

pytest.importorskip("triton")

from fake_driver import fake_gpu_layers, watch

transformers = pytest.importorskip("transformers")

GEMM = ("wq_gemm_kernel", "scaled_mm_kernel", "scaled_mm_persistent_kernel", "w4a8_gemm_kernel")


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(prepack, "SMALLEST", 0)
    monkeypatch.setattr(prepack, "SMALLEST_ON_CPU", 0)
    with fake_gpu_layers() as found, torch.no_grad():
        torch.manual_seed(0)
        yield found


def llama(weights, **how):
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
    requanto.quantize(model, weights=weights, **how)
    requanto.freeze(model)
    return model


def linears(model):
    return sum(
        isinstance(getattr(m, "weight", None), QTensor) for m in model.modules() if not isinstance(m, nn.Embedding)
    )


def step_of(model):
    """One step of decoding with a static cache."""
    cache = transformers.StaticCache(config=model.config, max_cache_len=32)
    token, mask = torch.tensor([[5]]), torch.ones(1, 32, dtype=torch.bool)
    at = torch.tensor([3])

    def step():
        return model(token, past_key_values=cache, cache_position=at, position_ids=at[None], attention_mask=mask).logits

    return step


@pytest.mark.parametrize("weights", ["int4", "int8", "nf4", "float8"])
def test_a_step_of_decoding_only_starts_kernels(gpu, weights):
    model = llama(weights)
    step, count = step_of(model), linears(model)
    assert count == 15
    for _ in range(3):
        step()
    compiled = len(gpu.compiled)
    counts = watch(gpu, step)
    gemms = [name for name in counts.launches if name in GEMM]
    assert len(gemms) == count  # one GEMM a linear
    assert set(counts.launches) <= {*GEMM, "reduce_kernel"}
    assert counts.reads == []
    assert len(gpu.compiled) == compiled
    # The same model unquantized does all other operators: quantized linears add none but the allocation of their results.
    plans = [m.weight._storage.plans for m in model.modules() if isinstance(getattr(m, "weight", None), QTensor)]
    assert all(plans)


def test_generate_with_a_static_cache(gpu):
    model = llama("int4")
    model.generation_config.cache_implementation = "static"
    prompt = torch.randint(0, 128, (1, 5))
    how = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}  # logits are any numbers
    for _ in range(2):
        model.generate(prompt, **how)
    compiled = len(gpu.compiled)
    counts = watch(gpu, lambda: model.generate(prompt, **how))
    assert len(gpu.compiled) == compiled
    gemms = [name for name in counts.launches if name in GEMM]
    assert len(gemms) == 15 * 4


def test_a_compiled_step(gpu):
    model = llama("int4")
    requanto.prepare(model, smallest=0)
    torch._dynamo.reset()
    step = torch.compile(step_of(model), backend="aot_eager", fullgraph=True)
    for _ in range(3):
        step()
    compiled, made = len(gpu.compiled), _plans(model)
    counts = watch(gpu, step)
    assert len([name for name in counts.launches if name in GEMM]) == 15
    assert counts.reads == []
    assert len(gpu.compiled) == compiled
    assert _plans(model) == made > 0


def _plans(model):
    found = [m.weight._storage.plans for m in model.modules() if isinstance(getattr(m, "weight", None), QTensor)]
    return sum(map(len, found))
