"""What `parallel_report` computes is what a rank holds."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from requanto import QTensor, QuantoConfig
from requanto.report.parallel import llama, parallel_report, parse_parallel
from requanto.tensor.sharding import slice_weight


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=96))


@pytest.mark.parametrize("weights", ["int8", "int4", "int2", "float8"])
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("column_scale", [False, "root"])
def test_bytes_are_those_of_the_cut_weights(model, weights, tp, column_scale):
    held = 0
    for name, parameter in model.named_parameters():
        if "proj" in name:
            whole = QTensor.quantize(parameter.data, weights, column_scale=column_scale)
            dim = 1 if "o_proj" in name or "down_proj" in name else 0
            held += slice_weight(whole, dim, 0, whole.shape[dim] // tp).nbytes
    report = parallel_report(model, QuantoConfig(weights=weights, column_scale=column_scale), tp=tp)
    # A group cut in two costs a scale on both sides; the report counts one, the cut may need finer groups.
    assert report.quantized <= held
    assert report.quantized == pytest.approx(held, rel=0 if tp == 1 else 0.15)
    assert report.total == report.quantized + report.floats


def test_shards_add_up(model):
    one = parallel_report(model, QuantoConfig(weights="int4"))
    four = parallel_report(model, QuantoConfig(weights="int4"), fsdp=4)
    assert abs(four.quantized * 4 - one.quantized) < 4
    assert four.gathered > 0
    assert four.sent_per_step == one.total * 3 // 4
    assert one.sent_per_token == one.sent_per_step == 0


def test_known_sizes():
    report = parallel_report(llama("8B"), QuantoConfig(weights="int4"), tp=8)
    assert 0.7e9 < report.total < 0.8e9
    assert report.cache_per_token == 2 * 32 * 1 * 128 * 2
    # Two sums of 4096 16-bit numbers in each of 32 layers, 2 * 7 / 8 of each sent in a ring.
    assert report.sent_per_token == 32 * 2 * 4096 * 2 * 2 * 7 // 8


def test_bad_input():
    assert parse_parallel("tp=8, fsdp=2") == {"tp": 8, "fsdp": 2}
    for text in ("", "tp", "tp=0", "pp=2", "tp=x", "tp=-1"):
        with pytest.raises(ValueError, match="expected e"):
            parse_parallel(text)
    with pytest.raises(ValueError, match="1 or more"):
        parallel_report(llama("8B"), None, tp=0)
    with pytest.raises(ValueError, match="unknown"):
        llama("7T")
