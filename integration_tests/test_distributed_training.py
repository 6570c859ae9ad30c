"""LoRA on quantized weights in two processes (gloo, CPU): DDP and FSDP2 train as one process does."""

from pathlib import Path

import peft
import pytest
import ranks
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tiny_models import TINY, save_tiny, token_ids

import requanto
from requanto import QTensor, QuantoConfig

pytestmark = pytest.mark.usefixtures("float_in_processes")

WORLD = 2


def make(directory: Path, weights: str):
    config = QuantoConfig(weights=weights, column_scale="root" if weights == "codebook3" else None)
    model = TINY["llama"].auto.from_pretrained(directory, quantization_config=config)
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))


def train(model, ids: torch.Tensor, steps: int = 3) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        if dist.is_initialized():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        losses.append(float(mean))
    return losses


def sharded(directory: Path, weights: str):
    from torch.distributed.fsdp import fully_shard

    model = make(directory, weights)
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def ddp(directory: Path, weights: str, rank: int) -> dict:
    model = torch.nn.parallel.DistributedDataParallel(make(directory, weights))
    return {"losses": train(model, token_ids(4)[rank * 2 : rank * 2 + 2])}


def packed(directory: Path, weights: str, rank: int) -> dict:
    """Every rank starts with other numbers, and in another layout, after a forward: DDP gives all of them rank 0's."""
    torch.manual_seed(rank)
    layer = torch.nn.Linear(256, 320).bfloat16()
    layer.weight = torch.nn.Parameter(QTensor.quantize(layer.weight.data, weights), requires_grad=False)
    x = torch.arange(512).reshape(2, 256).remainder(7).sub(3).bfloat16()
    if rank == 0:
        requanto.prepare(layer, smallest=0)
    layouts = layer.weight.layout_name
    with torch.no_grad():
        layer(x)
    model = torch.nn.parallel.DistributedDataParallel(layer)
    model(x).float().sum().backward()
    with torch.no_grad():
        out = model(x)
    values = layer.weight.dequantize(torch.float64)
    error = (out.double() - x.double() @ values.t() - layer.bias.double()).norm() / out.double().norm()
    # And by hand, as trainers do: rank 1's weight for all.
    torch.manual_seed(10 + rank)
    layer.weight.data.copy_(torch.randn(320, 256).bfloat16())
    torch.distributed.broadcast(layer.weight.data, 1)
    with torch.no_grad():
        again = layer(x)
    return {"layout": layouts, "out": out, "error": float(error), "again": again}


def fsdp(directory: Path, weights: str, rank: int) -> dict:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    model, ids = sharded(directory, weights), token_ids(4)[rank * 2 : rank * 2 + 2]
    local = [p.to_local() for p in model.parameters()]
    quantized = [t for t in local if isinstance(t, QTensor)]
    found = {
        "losses": train(model, ids),
        "local bytes": sum(t.nbytes for t in quantized),
        "quantized": len(quantized),
    }
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    expected = make(directory, weights).state_dict()
    if rank == 0:
        same = [torch.equal(full[k], v) for k, v in expected.items() if isinstance(v, QTensor)]
        found["full state"] = (len(same), all(same))
        found["full bytes"] = sum(v.nbytes for v in full.values() if isinstance(v, QTensor))
    # Saved, and loaded into a model whose codes are gone; then what one process saved, in two.
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        dcp.save({"model": model.state_dict()}, checkpoint_id=directory / f"dcp-{weights}")
        for source in ("dcp", "dcp-one"):
            other = make(directory, weights)
            for parameter in other.parameters():
                if isinstance(parameter, QTensor):
                    parameter.qdata.zero_()
                else:
                    parameter.zero_()
            fully_shard(other)
            state = other.state_dict()
            dcp.load({"model": state}, checkpoint_id=directory / f"{source}-{weights}")
            other.load_state_dict(state)
            found[source] = other(input_ids=ids).logits
        found["dcp"] = torch.equal(found["dcp"], logits)
    return found


def unlike(directory: Path, weights: str, rank: int) -> dict:
    try:
        ddp(directory, "int8" if rank else "int4", rank)
    except ValueError as error:
        return {"error": str(error)}
    return {"error": "none"}


def uneven(directory: Path, weights: str, rank: int) -> dict:
    from torch.distributed.fsdp import fully_shard

    layer = torch.nn.Linear(64, 33, bias=False)
    layer.weight = torch.nn.Parameter(QTensor.quantize(layer.weight, weights), requires_grad=False)
    try:
        fully_shard(layer)(torch.randn(2, 64))
    except NotImplementedError as error:
        return {"error": str(error)}
    return {"error": "none"}


def unlike_fsdp(directory: Path, weights: str, rank: int) -> dict:
    with pytest.raises(ValueError, match="differently quantized") as error:
        sharded(directory, "int8" if rank else "int4")(input_ids=token_ids(1))
    return {"error": str(error.value)}


def saved_by_all(directory: Path, weights: str, rank: int) -> dict:
    """``save_pretrained`` of a model that fully_shard has spread, every rank calling it."""
    from torch.distributed.fsdp import fully_shard

    config = QuantoConfig(weights=weights)
    model = fully_shard(TINY["llama"].auto.from_pretrained(directory, quantization_config=config))
    model.save_pretrained(directory / "by-all")
    return {}


TASKS = [("ddp", "int4"), ("ddp", "int8"), ("fsdp", "int4"), ("fsdp", "int8"), ("fsdp", "codebook3")]
TASKS += [("packed", "int4"), ("packed", "int8")]
TASKS += [("unlike", "both"), ("unlike_fsdp", "both"), ("uneven", "int4"), ("saved_by_all", "int4")]


def worker(rank: int, directory: Path) -> dict:
    return {task: ranks.attempt(globals()[task[0]], directory, task[1], rank) for task in TASKS}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def run(directory):
    for weights in ("int4", "int8", "codebook3"):
        dcp.save(
            {"model": make(directory, weights).state_dict()},
            checkpoint_id=directory / f"dcp-one-{weights}",
            no_dist=True,
        )
    found_by_rank = ranks.run(worker, WORLD, directory)

    def results(task: str, weights: str) -> list[dict]:
        found = [rank[task, weights] for rank in found_by_rank]
        for result in found:
            assert "failed" not in result, result["failed"]
        return found

    return results


@pytest.fixture(scope="module")
def one_process(directory):
    return {weights: train(make(directory, weights), token_ids(4)) for weights in ("int4", "int8", "codebook3")}


@pytest.mark.parametrize("weights", ["int4", "int8"])
def test_ddp_trains_as_one_process(run, one_process, weights):
    for found in run("ddp", weights):
        assert found["losses"] == pytest.approx(one_process[weights], rel=1e-5)


@pytest.mark.parametrize("weights", ["int4", "int8"])
def test_ddp_after_a_forward_gives_all_ranks_the_same_weight(run, weights):
    one, two = run("packed", weights)
    assert two["layout"] == "plain"
    assert torch.equal(one["out"].isfinite(), two["out"].isfinite())
    for what in ("out", "again"):
        assert (one[what].float() - two[what].float()).norm() <= 1e-2 * one[what].float().norm(), what
    assert max(one["error"], two["error"]) < 1e-2


@pytest.mark.parametrize("weights", ["int4", "int8", "codebook3"])
def test_fsdp2_trains_as_one_process_and_saves(directory, run, one_process, weights):
    both = run("fsdp", weights)
    for found in both:
        assert found["losses"] == pytest.approx(one_process[weights], rel=1e-5)
        assert found["quantized"] == 14
        # Every rank holds the codebook and the column scale of each weight.
        whole = [p for p in make(directory, weights).parameters() if isinstance(p, QTensor)]
        shared = sum(part.nbytes for p in whole for part in (p.codebook, p.column) if part is not None)
        assert (shared > 14 * 64 * 4) == (weights == "codebook3")
        assert found["local bytes"] * 2 == both[0]["full bytes"] + shared
        assert found["dcp"]
    model = make(directory, weights)
    with torch.no_grad():
        expected = model(input_ids=token_ids(4)).logits.chunk(WORLD)
    for found, logits in zip(both, expected, strict=True):
        assert (found["dcp-one"] - logits).norm() < 1e-5 * logits.norm()
    assert both[0]["full state"] == (14, True)


def test_all_ranks_save_the_whole_model(directory, run):
    run("saved_by_all", "int4")
    one = TINY["llama"].auto.from_pretrained(directory, quantization_config=QuantoConfig(weights="int4"))
    one.save_pretrained(directory / "by-one")
    for name in ("model.safetensors", "config.json"):
        assert (directory / "by-all" / name).read_bytes() == (directory / "by-one" / name).read_bytes()


def test_a_distributed_checkpoint_loads_in_one_process(directory, run):
    """Saved by two ranks, read by one."""
    path = directory / "dcp-int4"
    run("fsdp", "int4")
    model = make(directory, "int4")
    expected = {name: p.clone() for name, p in model.named_parameters() if isinstance(p, QTensor)}
    for name in expected:
        model.get_parameter(name).qdata.zero_()
    state = model.state_dict()
    dcp.load({"model": state}, checkpoint_id=path, no_dist=True)
    model.load_state_dict(state)
    for name, value in expected.items():
        assert torch.equal(model.get_parameter(name), value), name


@pytest.mark.parametrize("task", ["unlike", "unlike_fsdp"])
def test_ranks_with_different_types_are_refused(run, task):
    for found in run(task, "both"):
        assert "differently quantized" in found["error"]
        assert "int4" in found["error"]
        assert "int8" in found["error"]


def test_rows_that_do_not_divide_are_refused(run):
    for found in run("uneven", "int4"):
        assert "33 rows" in found["error"]
