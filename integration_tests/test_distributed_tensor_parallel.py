"""Transformers' tensor and expert parallelism in two processes: the numbers of one process, half of the memory."""

from itertools import pairwise
from pathlib import Path

import pytest
import ranks
import torch
from foreign_files import write_gptq
from tiny_models import TINY, output, save_tiny
from transformers.distributed import DistributedConfig

from requanto import QTensor, QuantoConfig
from requanto.tensor.lowrank import append
from requanto.tensor.sharding import join_weights, slice_weight, with_groups

ALL = {"embeddings": True, "lm_head": True}
# Row groups of 64 and, in qwen3's attention, heads of 32: some cuts fall inside a group.
MODELS = {
    "llama-int4": ("llama", {"weights": "int4"}),
    "qwen3-int8": ("qwen3", {"weights": "int8"}),
    "gemma3-tied-int4": ("gemma3", {"weights": "int4", **ALL}),
    "llama-heads-float8": ("llama", {"weights": "float8", "column_scale": "std", **ALL}),
    "mixtral-int4": ("mixtral", {"weights": "int4", "column_scale": "root"}),
    "qwen3-moe-int2": ("qwen3-moe", {"weights": "int2", **ALL}),
}
PLANS = {"tp": {"tp_plan": "auto"}, "ep": {"distributed_config": {"tp_size": 2, "ep_size": 2}}}
CASES = [(name, how, "tp") for name in MODELS for how in ("fly", "saved")]
CASES += [(name, how, "ep") for name in ("mixtral-int4", "qwen3-moe-int2") for how in ("fly", "saved")]


def load(directory: Path, case: str, how: str, plan: str | None = None):
    name, config = MODELS[case]
    options = {} if plan is None else {k: DistributedConfig(**v) if k[0] == "d" else v for k, v in PLANS[plan].items()}
    if how == "saved":
        return TINY[name].auto.from_pretrained(directory / case, **options)
    return TINY[name].auto.from_pretrained(directory / name, quantization_config=QuantoConfig(**config), **options)


def one(directory: Path, case: str, how: str, plan: str) -> dict:
    model = load(directory, case, how, plan)
    local = [getattr(p, "_local_tensor", None) for p in model.parameters()]
    found = {
        "logits": output(model, TINY[MODELS[case][0]].inputs()),
        "bytes": sum(t.nbytes for t in local if isinstance(t, QTensor)),
        "footprint": model.get_memory_footprint(),
    }
    model.save_pretrained(directory / f"{case}-{how}-{plan}")
    with pytest.raises(NotImplementedError, match="sharded over ranks"):
        model.dequantize()
    with pytest.raises(NotImplementedError, match="refuses to load"):
        model.save_pretrained(directory / "sharded", distributed_checkpoint=True)
    return found


def of_another_library(directory: Path) -> dict:
    model = TINY["llama"].auto.from_pretrained(directory / "gptq", tp_plan="auto")
    local = [getattr(p, "_local_tensor", None) for p in model.parameters()]
    return {
        "logits": output(model, TINY["llama"].inputs()),
        "bytes": sum(t.nbytes for t in local if isinstance(t, QTensor)),
    }


def unlike(directory: Path, rank: int) -> dict:
    """Each rank with another type, on the fly and from another checkpoint."""
    found = {}
    config = QuantoConfig(weights="int8" if rank else "int4")
    cases = {
        "fly": (directory / "llama", {"quantization_config": config}),
        "saved": (directory / ("llama-heads-float8" if rank else "llama-int4"), {}),
    }
    for name, (path, options) in cases.items():
        with pytest.raises(ValueError, match="differently quantized") as error:
            TINY["llama"].auto.from_pretrained(path, tp_plan="auto", **options)
        found[name] = str(error.value)
    return found


def fully_sharded(directory: Path) -> dict:
    config = DistributedConfig(fsdp_size=2)
    with pytest.raises(NotImplementedError, match="fully_shard") as error:
        TINY["llama"].auto.from_pretrained(directory / "llama-int4", distributed_config=config)
    return {"error": str(error.value)}


def worker(rank: int, directory: Path) -> dict:
    found = {case: ranks.attempt(one, directory, *case) for case in CASES}
    found["gptq"] = ranks.attempt(of_another_library, directory)
    found["unlike"] = ranks.attempt(unlike, directory, rank)
    found["fully sharded"] = ranks.attempt(fully_sharded, directory)
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory, float_in_processes):
    return run_all(tmp_path_factory.mktemp("tp"))


def run_all(directory: Path) -> tuple:
    expected = {}
    for case, (name, _) in MODELS.items():
        if not (directory / name).exists():
            save_tiny(name, directory / name)
        model = load(directory, case, "fly")
        model.save_pretrained(directory / case)
        size = sum(p.nbytes for p in model.parameters() if isinstance(p, QTensor))
        expected[case] = (output(model, TINY[name].inputs()), size, model.get_memory_footprint())
    save_tiny("llama", directory / "gptq")
    write_gptq(directory / "gptq")
    model = TINY["llama"].auto.from_pretrained(directory / "gptq")
    size = sum(p.nbytes for p in model.parameters() if isinstance(p, QTensor))
    expected["gptq"] = output(model, TINY["llama"].inputs()), size
    found = ranks.run(worker, 2, directory)

    def results(case) -> list[dict]:
        for rank in found:
            assert "failed" not in rank[case], rank[case]["failed"]
        return [rank[case] for rank in found]

    return directory, expected, results


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_logits_of_one_process_at_half_the_memory(run, case):
    _, expected, results = run
    logits, size, footprint = expected[case[0]]
    for result in results(case):
        assert (result["logits"] - logits).norm() < 1e-5 * logits.norm()
        # A group cut in two keeps its scale on both ranks.
        assert 0.45 * size < result["bytes"] < 0.6 * size
        assert result["bytes"] < result["footprint"] < footprint


def test_a_checkpoint_of_another_library_is_cut_alike(run):
    _, expected, results = run
    logits, size = expected["gptq"]
    for result in results("gptq"):
        assert (result["logits"] - logits).norm() < 1e-5 * logits.norm()
        assert 0.45 * size < result["bytes"] < 0.6 * size


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_saved_from_its_ranks_it_is_the_whole_model(run, case):
    """Bit for bit the weights that one process saves, in as many groups."""
    directory, expected, results = run
    results(case)
    name, how, plan = case
    saved = (directory / f"{name}-{how}-{plan}" / "model.safetensors").read_bytes()
    assert saved == (directory / name / "model.safetensors").read_bytes()
    if how == "fly":
        model = TINY[MODELS[name][0]].auto.from_pretrained(directory / f"{name}-{how}-{plan}")
        assert torch.equal(output(model, TINY[MODELS[name][0]].inputs()), expected[name][0])


def test_ranks_with_different_configs_are_refused(run):
    for found in run[2]("unlike"):
        for how, kind in (("fly", "int4"), ("fly", "int8"), ("saved", "int4"), ("saved", "float8")):
            assert kind in found[how]


def test_sharding_by_the_library_is_refused_with_the_way_out(run):
    for found in run[2]("fully sharded"):
        assert "fsdp_version=2" in found["error"]


@pytest.mark.parametrize("kind", ["int8", "int4", "int2", "float8"])
@pytest.mark.parametrize("pieces", [2, 3, 4, 8])
def test_pieces_are_the_whole(kind, pieces):
    """Cut between groups, inside groups, and with a low-rank term; joined, it is the weight again."""
    weight = QTensor.quantize(torch.randn(24, 192), kind)
    append(weight, torch.randn(24, 2), torch.randn(2, 192))
    for dim in (0, 1):
        size = weight.shape[dim] // pieces
        found = [slice_weight(weight, dim, i * size, (i + 1) * size) for i in range(pieces)]
        assert torch.allclose(torch.cat([f.dequantize() for f in found], dim), weight.dequantize(), atol=1e-6)
        whole = join_weights(found, dim)
        assert torch.equal(whole if weight.group_size is None else with_groups(whole, weight.group_size), weight)


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_in_pieces(transposed):
    weight = QTensor.quantize(torch.randn(4, 64, 128), "int4", transposed=transposed, group_size=32)
    append(weight, torch.randn(*weight.lead, 2), torch.randn(4, 2, weight.row_length))
    for dim in (0, 1, 2):
        cuts = [0, weight.shape[dim] // 4, weight.shape[dim]]
        found = [slice_weight(weight, dim, start, end) for start, end in pairwise(cuts)]
        assert torch.allclose(torch.cat([f.dequantize() for f in found], dim), weight.dequantize(), atol=1e-6)
        assert torch.equal(with_groups(join_weights(found, dim), 32), weight)


def test_unlike_scales_are_not_seen_as_one():
    weight = QTensor.quantize(torch.randn(8, 128), "int4", group_size=32)
    with pytest.raises(ValueError, match="different scales"):
        with_groups(weight, 64)


def test_a_cut_inside_a_byte_is_refused():
    weight = QTensor.quantize(torch.randn(8, 66), "int4")
    with pytest.raises(NotImplementedError, match="inside a byte"):
        slice_weight(weight, 1, 0, 33)
