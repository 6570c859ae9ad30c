"""A process that dies while several save together: the checkpoint that was there stays, and loads."""

import os
import signal
from pathlib import Path

import pytest
import ranks
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from requanto import QuantoConfig
from requanto.checkpoint.directory import replaced_by_all_ranks

STATE = {"one": torch.arange(6.0), "two": torch.ones(3)}


def kill(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def dies_while_putting_weights_together(rank: int, directory: Path) -> str:
    """Rank 1, with half of the weights gathered."""
    from tiny_models import TINY  # Transformers: the other test's processes do without it

    from requanto.integrations import tensor_parallel

    config = QuantoConfig(weights="int8")
    model = TINY["llama"].auto.from_pretrained(directory / "llama", quantization_config=config, tp_plan="auto")
    gathered, seen = tensor_parallel.gather_weight, []

    def dying(*args):
        seen.append(args)
        return kill() if rank == 1 and len(seen) == 7 else gathered(*args)

    tensor_parallel.gather_weight = dying
    try:
        model.save_pretrained(directory / "saved")
    except RuntimeError as error:
        return _leave(directory, str(error))
    return _leave(directory, "saved")


def dies_while_writing(rank: int, directory: Path) -> str:
    """Rank 0, its own file written and the other's not waited for."""
    with replaced_by_all_ranks(directory / "dcp") as scratch:
        dcp.save(dict(STATE), checkpoint_id=scratch)
    assert (directory / "dcp" / ".metadata").exists()
    try:
        with replaced_by_all_ranks(directory / "dcp") as scratch:
            dist.barrier()
            if rank == 0:
                (scratch / "__0_0.distcp").write_bytes(b"half")
                kill()
            dcp.save({name: value + 1 for name, value in STATE.items()}, checkpoint_id=scratch)
    except Exception as error:
        return _leave(directory, str(error))
    return _leave(directory, "saved")


def _leave(directory: Path, text: str) -> str:
    """Ends this process at once: the other is gone, and with it every barrier."""
    (directory / "survivor").write_text(text)
    os._exit(0)


def test_the_old_model_stays_when_a_rank_dies(tmp_path):
    from tiny_models import TINY, output, save_tiny

    save_tiny("llama", tmp_path / "llama")
    model = TINY["llama"].auto.from_pretrained(tmp_path / "llama", quantization_config=QuantoConfig(weights="int4"))
    model.save_pretrained(tmp_path / "saved")
    before = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    codes = ranks.start(dies_while_putting_weights_together, 2, tmp_path)
    assert codes == [0, -signal.SIGKILL]
    assert (tmp_path / "survivor").read_text() != "saved"
    assert {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()} == before
    assert not list(tmp_path.glob(".saved*")), "the unfinished directory is still there"
    loaded = TINY["llama"].auto.from_pretrained(tmp_path / "saved")
    assert torch.equal(output(loaded, TINY["llama"].inputs()), output(model, TINY["llama"].inputs()))


def test_the_old_distributed_checkpoint_stays_when_a_rank_dies(tmp_path):
    codes = ranks.start(dies_while_writing, 2, tmp_path)
    assert codes == [-signal.SIGKILL, 0]
    assert (tmp_path / "survivor").read_text() != "saved"
    found = {name: torch.zeros_like(value) for name, value in STATE.items()}
    dcp.load(found, checkpoint_id=tmp_path / "dcp", no_dist=True)
    for name, value in STATE.items():
        assert torch.equal(found[name], value), name


def test_an_impossible_place_is_an_error_on_every_rank(tmp_path):
    (tmp_path / "file").write_text("in the way")
    store = dist.FileStore(str(tmp_path / "meeting"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with pytest.raises(NotADirectoryError, match="it is a file"), replaced_by_all_ranks(tmp_path / "file"):
            pass
        with replaced_by_all_ranks(tmp_path / "new") as scratch:
            dcp.save(dict(STATE), checkpoint_id=scratch)
        assert (tmp_path / "new" / ".metadata").exists()
    finally:
        dist.destroy_process_group()
