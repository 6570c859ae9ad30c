"""Transformers' tensor parallelism in two processes: the numbers of one process, half of the memory."""

import os
import socket
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny_models import TINY, output, save_tiny

from requanto import QTensor, QuantoConfig
from requanto.integrations.tensor_parallel import cut
from requanto.lowrank import append

CASES = [
    (name, weights, how) for name in ("llama", "qwen3") for weights in ("int4", "int8") for how in ("fly", "saved")
]


def load(directory: Path, name: str, weights: str, how: str, **options):
    if how == "saved":
        return TINY[name].auto.from_pretrained(directory / f"{name}-{weights}", **options)
    config = QuantoConfig(weights=weights)
    return TINY[name].auto.from_pretrained(directory / name, quantization_config=config, **options)


def one(directory: Path, name: str, weights: str, how: str) -> dict:
    model = load(directory, name, weights, how, tp_plan="auto")
    local = [getattr(p, "_local_tensor", None) for p in model.parameters()]
    quantized = [t for t in local if isinstance(t, QTensor)]
    found = {"logits": output(model, TINY[name].inputs()), "bytes": sum(t.nbytes for t in quantized)}
    try:
        model.save_pretrained(directory / f"tp-{name}-{weights}")
    except NotImplementedError as error:
        found["save"] = str(error)
    return found


def worker(rank: int, port: int, directory: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    found = {}
    for case in CASES:
        try:
            found[case] = one(directory, *case)
        except BaseException:
            found[case] = {"failed": traceback.format_exc()}
    try:
        config = QuantoConfig(weights="int4")
        TINY["qwen3-moe"].auto.from_pretrained(directory / "qwen3-moe", quantization_config=config, tp_plan="auto")
    except NotImplementedError as error:
        found["experts"] = str(error)
    except BaseException:
        found["experts"] = traceback.format_exc()
    torch.save(found, directory / f"found-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tp")
    expected = {}
    save_tiny("qwen3-moe", directory / "qwen3-moe")
    for name in ("llama", "qwen3"):
        save_tiny(name, directory / name)
        for weights in ("int4", "int8"):
            model = load(directory, name, weights, "fly")
            model.save_pretrained(directory / f"{name}-{weights}")
            size = sum(p.nbytes for p in model.parameters() if isinstance(p, QTensor))
            expected[name, weights] = (output(model, TINY[name].inputs()), size)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, args=(port, directory), nprocs=2)
    return expected, [torch.load(directory / f"found-{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_logits_of_one_process_at_half_the_memory(ranks, case):
    expected, found = ranks
    logits, size = expected[case[:2]]
    for rank in found:
        result = rank[case]
        assert "failed" not in result, result["failed"]
        assert (result["logits"] - logits).norm() < 1e-5 * logits.norm()
        # A group cut in two keeps its scale on both ranks.
        assert 0.45 * size < result["bytes"] < 0.6 * size
        assert "cannot be saved" in result["save"]


def test_experts_are_refused_with_the_reason(ranks):
    for rank in ranks[1]:
        assert "only Linear weights are covered" in rank["experts"]


@pytest.mark.parametrize("kind", ["int8", "int4", "int2", "float8"])
@pytest.mark.parametrize("pieces", [2, 3, 4, 8])
def test_pieces_are_the_whole(kind, pieces):
    """Cut between groups, inside groups, and with a low-rank term."""
    weight = QTensor.quantize(torch.randn(24, 192), kind)
    append(weight, torch.randn(24, 2), torch.randn(2, 192))
    for dim in (0, 1):
        size = weight.shape[dim] // pieces
        found = [cut(weight, dim, i * size, (i + 1) * size).dequantize() for i in range(pieces)]
        assert torch.allclose(torch.cat(found, dim), weight.dequantize(), atol=1e-6)


def test_a_cut_inside_a_byte_is_refused():
    weight = QTensor.quantize(torch.randn(8, 66), "int4")
    with pytest.raises(NotImplementedError, match="inside a byte"):
        cut(weight, 1, 0, 33)
