"""What `accelerate launch` starts in test_distributed_accelerate.py: LoRA over quantized weights, with Trainer and by hand.

    accelerate launch --use_fsdp --fsdp_version 2 --num_processes 2 integration_tests/_launched.py DIRECTORY

accelerate turns FSDP on for accelerators only: on a CPU the same configuration would be DDP. For those parts the processes
are called a group of GPUs; its backend stays gloo, its device the CPU.
"""

import contextlib
import os
import sys
import traceback
from pathlib import Path

import accelerate
import peft
import torch
import torch.distributed as dist
import transformers
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from tiny_models import TINY, token_ids

from requanto import QTensor, QuantoConfig

FSDP = {"version": 2, "transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}


class Texts(torch.utils.data.Dataset):
    """The same eight texts."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = token_ids(8)[index]
        return {"input_ids": ids, "labels": ids}


def make(directory: Path, weights: str):
    model = TINY["llama"].auto.from_pretrained(directory, quantization_config=QuantoConfig(weights=weights))
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))


def held(model) -> int:
    """Quantized weights that are spread over the ranks."""
    return sum(isinstance(getattr(p, "_local_tensor", None), QTensor) for p in model.parameters())


def trainer(directory: Path, weights: str, out: Path, world: int, resume: bool = False, **options) -> dict:
    if "fsdp_config" in options:  # TrainingArguments changes the one it is given
        options["fsdp_config"] = dict(options["fsdp_config"])
    arguments = transformers.TrainingArguments(
        output_dir=str(out),
        per_device_train_batch_size=4 // world,
        max_steps=4,
        learning_rate=2e-2,
        logging_steps=1,
        save_steps=2,
        report_to=[],
        use_cpu=True,
        seed=0,
        disable_tqdm=True,
        **options,
    )
    made = transformers.Trainer(make(directory, weights), arguments, train_dataset=Texts())
    made.train(resume_from_checkpoint=str(out / "checkpoint-2") if resume else None)
    return {
        "losses": [entry["loss"] for entry in made.state.log_history if "loss" in entry],
        "kind": str(made.accelerator.distributed_type),
        "wrapped": type(made.model_wrapped).__name__,
        "held": held(made.model_wrapped),
    }


def by_hand(directory: Path, weights: str, plugin=None) -> dict:
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True, fsdp_plugin=plugin)
    model = make(directory, weights)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    world, rank = accelerator.num_processes, accelerator.process_index
    ids, losses = token_ids(4).chunk(world)[rank], []
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(accelerator.gather(loss.detach()).mean()))
    found = {"losses": losses, "kind": str(accelerator.distributed_type), "held": held(model)}
    state = accelerator.get_state_dict(model)
    if rank == 0:
        expected = make(directory, weights).state_dict()
        same = [torch.equal(state[k], v) for k, v in expected.items() if isinstance(v, QTensor)]
        found["full state"] = (len(same), all(same), len(state) == len(expected))
    return found


@contextlib.contextmanager
def called_gpus():
    original = PartialState.__init__

    def __init__(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = __init__
    try:
        yield
    finally:
        PartialState.__init__ = original


def without_launcher() -> None:
    """As torchrun would have started the process."""
    for name in [name for name in os.environ if name.startswith(("FSDP_", "ACCELERATE_"))]:
        del os.environ[name]


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    plugin = accelerate.FullyShardedDataParallelPlugin
    options = {"fsdp_version": 2, "auto_wrap_policy": "transformer_based_wrap"}
    fsdp = {"fsdp": True, "fsdp_config": FSDP}
    tasks = {
        "launched": lambda: by_hand(directory, "int8"),  # what the command line says, in the environment
        "every rank loads": lambda: by_hand(directory, "int4", plugin(cpu_ram_efficient_loading=False, **options)),
        "trainer fsdp": lambda: trainer(directory, "int4", directory / "fsdp", 2, **fsdp),
        "trainer resumed": lambda: trainer(directory, "int4", directory / "fsdp", 2, resume=True, **fsdp),
        "trainer ddp": lambda: trainer(directory, "int4", directory / "ddp", 2),
    }
    found = {}
    for name, task in tasks.items():
        with contextlib.nullcontext() if name == "trainer ddp" else called_gpus():
            try:
                found[name] = task()
            except BaseException:
                found[name] = {"failed": traceback.format_exc()}
        without_launcher()
    torch.save(found, directory / f"launched-{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
