"""Trainer on a quantized model: an adapter learns, checkpoints hold the adapter alone, training goes on from one."""

import peft
import pytest
import torch
import transformers
from tiny_models import TINY, output, save_tiny, token_ids

from requanto import QTensor, QuantoConfig


class Texts(torch.utils.data.Dataset):
    """The same eight texts."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = token_ids(8)[index]
        return {"input_ids": ids, "labels": ids}


def arguments(directory, **options):
    settings = {
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "learning_rate": 2e-2,
        "logging_steps": 1,
        "save_steps": 3,
        "report_to": [],
        "use_cpu": True,
        "seed": 0,
        "disable_tqdm": True,
    }
    return transformers.TrainingArguments(output_dir=str(directory), **(settings | options))


def build(directory, weights: str):
    model = TINY["llama"].auto.from_pretrained(directory, quantization_config=QuantoConfig(weights=weights))
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("weights", ["int8", "int4", "int2", "float8"])
def test_an_adapter_learns(directory, tmp_path, weights):
    model = build(directory, weights)
    codes = {name: p.clone() for name, p in model.named_parameters() if isinstance(p, QTensor)}
    trainer = transformers.Trainer(model, arguments(tmp_path), train_dataset=Texts())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
    for name, before in codes.items():
        assert torch.equal(model.get_parameter(name), before), name
    saved = {path.name for path in (tmp_path / "checkpoint-6").iterdir()}
    assert "adapter_model.safetensors" in saved
    assert "model.safetensors" not in saved
    base = TINY["llama"].auto.from_pretrained(directory, quantization_config=QuantoConfig(weights=weights))
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "checkpoint-6").eval()
    inputs = TINY["llama"].inputs()
    assert torch.equal(output(loaded, inputs), output(model.eval(), inputs))


def test_training_goes_on_from_a_checkpoint(directory, tmp_path):
    whole = transformers.Trainer(build(directory, "int4"), arguments(tmp_path), train_dataset=Texts())
    whole.train()
    resumed = transformers.Trainer(build(directory, "int4"), arguments(tmp_path), train_dataset=Texts())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for one, two in zip(whole.model.parameters(), resumed.model.parameters()):
        assert torch.equal(one, two) if isinstance(one, QTensor) else torch.allclose(one, two, atol=1e-6)


def test_gradient_checkpointing_and_accumulation(directory, tmp_path):
    base = TINY["llama"].auto.from_pretrained(directory, quantization_config=QuantoConfig(weights="int4"))
    base = peft.prepare_model_for_kbit_training(base)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear"))
    options = {"gradient_checkpointing": True, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    trainer = transformers.Trainer(model, arguments(tmp_path, **options), train_dataset=Texts())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_training_all_weights_is_refused(directory, tmp_path):
    model = TINY["llama"].auto.from_pretrained(directory, quantization_config=QuantoConfig(weights="int4"))
    with pytest.raises(ValueError, match="adapters"):
        transformers.Trainer(model, arguments(tmp_path), train_dataset=Texts())
