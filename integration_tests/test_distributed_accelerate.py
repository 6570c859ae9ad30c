"""`accelerate launch` with two processes: Trainer and accelerate train as one process does, with DDP and with FSDP2."""

import os
import subprocess
import sys
from pathlib import Path

import _launched
import peft
import pytest
import ranks
import torch
from tiny_models import TINY, output, save_tiny

from requanto import QuantoConfig

pytestmark = pytest.mark.usefixtures("float_in_processes")

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    done, directory = launch(tmp_path_factory.mktemp("llama"))
    if done.returncode and any(f"({signal})" in done.stderr for signal in ranks.CRASHES):
        ranks.warn_of_crash(done.stderr[-8000:])
        done, directory = launch(tmp_path_factory.mktemp("llama"))
    assert done.returncode == 0, done.stderr[-8000:]
    found = [torch.load(directory / f"launched-{rank}.pt") for rank in range(2)]

    def results(task: str) -> list[dict]:
        for rank in found:
            assert "failed" not in rank[task], rank[task]["failed"]
        return [rank[task] for rank in found]

    return directory, results


def launch(directory: Path) -> tuple[subprocess.CompletedProcess, Path]:
    save_tiny("llama", directory)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--use_fsdp", "--fsdp_version", "2"]
    command += ["--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP", "--fsdp_cpu_ram_efficient_loading", "true"]
    command += ["--num_processes", "2", "--main_process_port", "0", str(HERE / "_launched.py"), str(directory)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment), directory


@pytest.fixture(scope="module")
def one_process(launched):
    directory = launched[0]
    return {
        "trainer": _launched.trainer(directory, "int4", directory / "one", 1)["losses"],
        "int4": _launched.by_hand(directory, "int4")["losses"],
        "int8": _launched.by_hand(directory, "int8")["losses"],
    }


@pytest.mark.parametrize("task", ["trainer ddp", "trainer fsdp", "trainer resumed"])
def test_trainer_has_the_losses_of_one_process(launched, one_process, task):
    directory, results = launched
    for found in results(task):
        assert found["losses"] == pytest.approx(one_process["trainer"], rel=1e-4)
        assert found["wrapped"] == ("DistributedDataParallel" if task == "trainer ddp" else "FSDPPeftModel")
        assert found["held"] == (0 if task == "trainer ddp" else 14)
    saved = directory / ("ddp" if task == "trainer ddp" else "fsdp") / "checkpoint-4"
    assert (saved / "adapter_model.safetensors").exists()
    logits = []
    for path in (saved, directory / "one" / "checkpoint-4"):
        base = TINY["llama"].auto.from_pretrained(directory, quantization_config=QuantoConfig(weights="int4"))
        logits.append(output(peft.PeftModel.from_pretrained(base, path).eval(), TINY["llama"].inputs()))
    assert (logits[0] - logits[1]).norm() < 1e-3 * logits[1].norm()


@pytest.mark.parametrize(("task", "weights"), [("every rank loads", "int4"), ("launched", "int8")])
def test_accelerate_has_the_losses_of_one_process_and_a_quantized_state_dict(launched, one_process, task, weights):
    results = launched[1](task)
    for found in results:
        assert found["kind"] == "DistributedType.FSDP"
        assert found["losses"] == pytest.approx(one_process[weights], rel=1e-5)
        assert found["held"] == 14
    assert results[0]["full state"] == (14, True, True)
