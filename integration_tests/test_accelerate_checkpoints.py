"""accelerate's checkpoints of quantized models: save_state, save_model and what loads them; Trainer's checkpoints."""

import json
from pathlib import Path

import accelerate
import pytest
import torch
import transformers as tf
from accelerate.utils import extract_model_from_parallel
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from tiny_models import TINY, output, save_tiny, token_ids
from torch.utils.data import DataLoader

import requanto
from requanto import QTensor, QuantoConfig


def config(kind: str, name: str) -> QuantoConfig:
    return QuantoConfig(weights=kind, embeddings="tied" in name, lm_head="tied" in name)


@pytest.fixture(scope="module", params=["llama-int8", "llama-codebook4", "llama-tied-int4"])
def load(request, tmp_path_factory):
    """A function that loads a quantized model; models of other seeds have other weights."""
    name, _, kind = request.param.rpartition("-")
    directory = save_tiny(name, tmp_path_factory.mktemp("float"))

    def load(seed: int = 0, packed: bool = False):
        model = TINY[name].auto.from_pretrained(directory, quantization_config=config(kind, name)).eval()
        if seed:
            other = TINY[name].build()
            torch.manual_seed(seed)
            with torch.no_grad():
                for parameter in other.parameters():
                    parameter.normal_(0, 0.2)
            model.load_state_dict(other.state_dict())
        if packed:
            requanto.prepare(model)
        return model

    load.name, load.kind = name, kind
    return load


def with_adapter(model, seed: int = 0):
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))


def logits(model) -> torch.Tensor:
    return output(model, {"input_ids": token_ids()})


def train_step(accelerator, model, optimizer) -> None:
    model.train()
    accelerator.backward(model(input_ids=token_ids(), labels=token_ids()).loss)
    optimizer.step()
    optimizer.zero_grad()
    model.eval()


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("what", ["adapter", "norms"])
def test_save_state_and_load_state(load, what, safe, tmp_path):
    def prepared(seed: int):
        model = load(seed, packed=seed == 0)
        if what == "adapter":
            model = with_adapter(model, seed)
        else:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_("norm" in name)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        accelerator = accelerate.Accelerator(cpu=True)
        return accelerator, *accelerator.prepare(model, torch.optim.AdamW(trained, lr=1e-2))

    accelerator, model, optimizer = prepared(0)
    train_step(accelerator, model, optimizer)
    expected = logits(model)
    accelerator.save_state(tmp_path, safe_serialization=safe)
    train_step(accelerator, model, optimizer)
    after = logits(model)
    assert not torch.equal(after, expected)

    other, restored, its_optimizer = prepared(1)
    other.load_state(tmp_path)
    assert torch.equal(logits(restored), expected)
    train_step(other, restored, its_optimizer)  # the optimizer's state is there too
    torch.testing.assert_close(logits(restored), after)
    accelerator.load_state(tmp_path)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("max_shard_size", ["10GB", "40KB"])
@pytest.mark.parametrize("safe", [True, False])
def test_save_model_and_what_loads_it(load, safe, max_shard_size, tmp_path):
    model = load(packed=True)
    expected = logits(model)
    accelerate.Accelerator(cpu=True).save_model(model, tmp_path, max_shard_size=max_shard_size, safe_serialization=safe)
    assert (len(list(tmp_path.glob("*.index.json"))) == 1) == (max_shard_size == "40KB")
    if safe:
        for file in tmp_path.glob("*.safetensors"):
            with safe_open(file, "pt") as opened:
                names = set(opened.keys())
            assert not {name.removesuffix("_qdata") for name in names if name.endswith("_qdata")} & names

    same = load(seed=1)
    accelerate.load_checkpoint_in_model(same, tmp_path, strict=False)
    same.tie_weights()
    assert torch.equal(logits(same), expected)

    if load.name == "llama-tied":
        return  # with a device_map accelerate loses the tie of a model that is not on the meta device, also if it is float
    same = accelerate.load_checkpoint_and_dispatch(
        load(seed=1), tmp_path, device_map={"model": "cpu", "lm_head": "cpu"}
    )
    assert torch.equal(logits(same), expected)


def test_a_disk_entry_in_the_device_map_of_load_checkpoint_and_dispatch(load, tmp_path):
    model = load()
    expected = logits(model)
    accelerate.Accelerator(cpu=True).save_model(model, tmp_path / "saved")
    device_map = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    same = accelerate.load_checkpoint_and_dispatch(
        load(), tmp_path / "saved", device_map=device_map, offload_folder=tmp_path / "disk"
    )
    assert torch.equal(logits(same), expected)
    assert any(parameter.device.type == "meta" for parameter in same.parameters())


def test_the_same_bytes_twice(load, tmp_path):
    for place in ("a", "b"):
        accelerate.Accelerator(cpu=True).save_model(load(), tmp_path / place)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_a_float_model_takes_the_weights_on_the_meta_device(load, tmp_path):
    model = load()
    expected = logits(model)
    accelerate.Accelerator(cpu=True).save_model(model, tmp_path)
    with accelerate.init_empty_weights():
        empty = type(model)(TINY[load.name].config())
    accelerate.load_checkpoint_in_model(empty, tmp_path, device_map={"": "cpu"})
    empty.tie_weights()
    assert {n for n, p in empty.named_parameters() if isinstance(p, QTensor)} == {
        n for n, p in model.named_parameters() if isinstance(p, QTensor)
    }
    assert torch.equal(logits(empty.eval()), expected)


def test_a_float_checkpoint_in_a_quantized_model_is_quantized(load, tmp_path):
    if load.kind == "codebook4":
        pytest.skip("codebooks are learned again")
    accelerate.Accelerator(cpu=True).save_model(TINY[load.name].build(), tmp_path)
    for options in ({"strict": False}, {"device_map": {"": "cpu"}}):
        if load.name == "llama-tied" and "device_map" in options:
            continue  # see above
        model = load(seed=1)
        accelerate.load_checkpoint_in_model(model, tmp_path, **options)
        expected = dict(load().named_parameters())
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, expected[name]), name


def test_get_state_dict_and_unwrapping(load):
    accelerator = accelerate.Accelerator(cpu=True)
    model = load()
    prepared = accelerator.prepare(model)
    assert extract_model_from_parallel(prepared) is model
    assert extract_model_from_parallel(prepared, keep_fp32_wrapper=False) is model
    state = accelerator.get_state_dict(prepared)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_a_directory_of_save_model_with_the_config_loads_as_a_checkpoint(load, tmp_path):
    """`accelerator.save_model` writes no config.json; with that of the model it is a checkpoint of Requanto."""
    model = load()
    expected = logits(model)
    accelerate.Accelerator(cpu=True).save_model(model, tmp_path)
    model.config.save_pretrained(tmp_path)
    again, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert torch.equal(logits(again.eval()), expected)
    assert not report["unexpected_keys"]
    assert not report["missing_keys"]

    described = json.loads((tmp_path / "config.json").read_text())
    tensors = described["quantization_config"]["tensors"]
    name = next(iter(tensors))
    tensors[name] += " activation=qint8"
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match=r"according to the file and .* according to config\.json"):
        type(model).from_pretrained(tmp_path)


def test_trainer_checkpoints_and_resume(load, tmp_path):
    data = [{"input_ids": row, "labels": row} for row in token_ids(8)]

    def trainer(steps: int, seed: int = 0):
        arguments = tf.TrainingArguments(
            str(tmp_path),
            max_steps=steps,
            save_steps=2,
            per_device_train_batch_size=2,
            report_to=[],
            use_cpu=True,
            seed=3,
        )
        return tf.Trainer(with_adapter(load(), seed), arguments, train_dataset=data)

    whole = trainer(4)
    whole.train()
    expected = logits(whole.model.eval())
    resumed = trainer(4, seed=1)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    torch.testing.assert_close(logits(resumed.model.eval()), expected)
    names = {file.name for file in Path(tmp_path / "checkpoint-4").iterdir()}
    assert {"adapter_model.safetensors", "optimizer.pt"} <= names


def test_a_data_loader_and_a_scheduler_in_the_same_state(load, tmp_path):
    accelerator = accelerate.Accelerator(cpu=True)
    model = with_adapter(load())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    model, optimizer, scheduler, _ = accelerator.prepare(model, optimizer, scheduler, DataLoader(token_ids()))
    accelerator.save_state(tmp_path)
    scheduler.step()
    accelerator.load_state(tmp_path)
    assert scheduler.get_last_lr() == [0.1]
    assert json.dumps(sorted(file.name for file in tmp_path.iterdir())).count("model.safetensors") == 1


@pytest.mark.parametrize("device_map", [None, {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}])
def test_accelerate_refuses_parts_without_their_description(device_map, load, tmp_path):
    load().save_pretrained(tmp_path)  # its config.json describes the weights, which accelerate does not read
    model = TINY[load.name].build()
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(requanto.checkpoint.format.CheckpointError, match=r"_spec that describes it.*from_pretrained"):
        accelerate.utils.load_checkpoint_in_model(model, str(tmp_path), device_map=device_map)
    assert all(map(torch.equal, before, model.parameters()))
    accelerate.utils.load_checkpoint_in_model(
        model, str(save_tiny(load.name, tmp_path / "float")), device_map=device_map
    )


@pytest.mark.parametrize("device_map", [None, {"": "cpu"}], ids=["no-map", "map"])
def test_accelerate_refuses_a_damaged_description(load, tmp_path, device_map):
    accelerate.Accelerator(cpu=True).save_model(load(seed=1), tmp_path)
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    assert b'{"format": "requanto"' in content
    file.write_bytes(content.replace(b'{"format": "requanto"', b'{"format": "requantq"', 1))
    with pytest.raises(requanto.CheckpointError, match=r"without the .*_spec that describes it"):
        accelerate.load_checkpoint_and_dispatch(TINY[load.name].build(), str(tmp_path), device_map=device_map)


@pytest.mark.parametrize("device_map", [None, {"": "cpu"}])
def test_accelerate_makes_a_float_model_quantized(device_map, load, tmp_path):
    model = load()
    accelerate.Accelerator().save_model(model, str(tmp_path))
    again = TINY[load.name].build().eval()
    accelerate.utils.load_checkpoint_in_model(again, str(tmp_path), device_map=device_map)
    assert sum(isinstance(parameter, QTensor) for parameter in again.parameters()) > 0
    assert torch.equal(logits(again), logits(model))
