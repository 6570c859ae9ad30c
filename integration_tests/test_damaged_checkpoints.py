"""Damage that leaves valid numbers, hostile names and lost descriptions, through the libraries' own `from_pretrained`."""

import json
import shutil
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_diffusers import TINY as DIFFUSERS
from tiny_models import TINY, output

import requanto
from requanto import QuantoConfig
from requanto.checkpoint import CheckpointError
from requanto.checkpoint.foreign.quanto_directory import convert_quanto_directory

LLAMA, SD3 = TINY["llama"], DIFFUSERS["sd3"]


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """An int4 checkpoint of each library, in shards."""
    base = tmp_path_factory.mktemp("originals")
    LLAMA.build().save_pretrained(base / "float")
    model = LLAMA.auto.from_pretrained(base / "float", quantization_config=QuantoConfig(weights="int4"))
    model.save_pretrained(base / "transformers", max_shard_size="60KB")
    SD3.make().save_pretrained(base / "float-sd3")
    model = SD3.cls.from_pretrained(base / "float-sd3", quantization_config=QuantoConfig(weights="int4"))
    model.save_pretrained(base / "diffusers", max_shard_size="60KB")
    return base


@pytest.fixture(params=["transformers", "diffusers"])
def damaged(request, originals, tmp_path):
    """A copy of a checkpoint, to be damaged, and the function that loads it."""
    shutil.copytree(originals / request.param, tmp_path / "model")
    cls = LLAMA.auto if request.param == "transformers" else SD3.cls
    return tmp_path / "model", lambda **options: cls.from_pretrained(tmp_path / "model", **options)


def edit_config(directory, change):
    path = directory / "config.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_tensors(directory, change):
    """Calls ``change`` with the tensors of each file; writes back those of files that it changes."""
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(str(file), "pt") as opened:
            tensors = {key: opened.get_tensor(key).clone() for key in opened.keys()}  # noqa: SIM118
            metadata = opened.metadata()
        if change(tensors) is not False:
            save_file(tensors, file, metadata)


def flip(tensors):
    key = next((key for key in sorted(tensors) if key.endswith("_qdata")), None)
    if key is None:
        return False
    tensors[key].view(-1)[3] ^= 4
    return True


def exchange(tensors):
    alike = {}
    for key, value in sorted(tensors.items()):
        if key.endswith("_qdata"):
            alike.setdefault(value.shape, []).append(key)
    pair = next((keys for keys in alike.values() if len(keys) > 1), None)
    if pair is None:
        return False
    tensors[pair[0]], tensors[pair[1]] = tensors[pair[1]].clone(), tensors[pair[0]].clone()
    return True


@pytest.mark.parametrize("change", [flip, exchange])
def test_damage_that_leaves_valid_codes(damaged, change, monkeypatch):
    directory, load = damaged
    load()
    edit_tensors(directory, change)
    with pytest.raises(
        CheckpointError, match=r"its tensors in the files have the digest \w{16}, but quantization_config"
    ):
        load()
    monkeypatch.setattr(requanto.settings, "check_digests", False)
    load()


def test_an_edited_word_of_a_line(damaged):
    directory, load = damaged

    def change(content):
        tensors = content["quantization_config"]["tensors"]
        name = next(iter(tensors))
        tensors[name] += " activation=qint8"

    edit_config(directory, change)
    with pytest.raises(CheckpointError, match="have the digest"):
        load()


def test_without_digests_as_earlier_versions_wrote(damaged):
    directory, load = damaged
    edit_config(directory, lambda content: content["quantization_config"].pop("digests"))
    load()
    edit_tensors(
        directory, lambda t: [v.mul_(-1) for k, v in t.items() if k.endswith("_scale") and "weight_" in k] or False
    )
    with pytest.raises(CheckpointError, match="holds the negative scale"):
        load()


def test_digests_are_of_what_is_saved(damaged, tmp_path, monkeypatch):
    directory, load = damaged
    model = load()
    config = getattr(model.config, "quantization_config", None) or model.config["quantization_config"]
    assert config.digests == {}  # in memory weights may change
    weight = next(p for p in model.parameters() if isinstance(p, requanto.QTensor))
    with torch.no_grad():
        weight.copy_(weight.dequantize() * 0.5)
    model.save_pretrained(tmp_path / "changed")
    model.save_pretrained(tmp_path / "again")
    stored = [
        json.loads((p / "config.json").read_text())["quantization_config"] for p in (directory, tmp_path / "changed")
    ]
    differ = [name for name in stored[0]["digests"] if stored[0]["digests"][name] != stored[1]["digests"][name]]
    assert len(differ) == 1
    assert stored[0]["digests"].keys() == stored[1]["tensors"].keys()
    type(model).from_pretrained(tmp_path / "changed")
    assert (tmp_path / "changed" / "config.json").read_bytes() == (tmp_path / "again" / "config.json").read_bytes()
    monkeypatch.setattr(requanto.settings, "write_digests", False)
    model.save_pretrained(tmp_path / "without")
    assert "digests" not in json.loads((tmp_path / "without" / "config.json").read_text())["quantization_config"]


def test_loaded_at_another_dtype(damaged):
    directory, load = damaged
    key = "torch_dtype" if "_class_name" in json.loads((directory / "config.json").read_text()) else "dtype"
    load(**{key: torch.bfloat16})


def test_loaded_with_layers_on_disk(originals, tmp_path):
    names = ("model.embed_tokens", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
    place = {**dict.fromkeys(names, "cpu"), "model.layers.0": "disk"}
    wanted = output(LLAMA.auto.from_pretrained(originals / "transformers"), LLAMA.inputs())
    model = LLAMA.auto.from_pretrained(
        originals / "transformers", device_map=place, offload_folder=tmp_path / "offload"
    )
    assert torch.equal(output(model, LLAMA.inputs()), wanted)


@pytest.mark.parametrize(
    "name", ["lm_head.(x+x+)+y", "model.(a|a)*b", "a.[", "b.*", "c.(?P<g0>.)", "d.\\", "e.weight)|(.*"]
)
def test_names_are_no_patterns(damaged, name):
    directory, load = damaged

    def change(content):
        stored = content["quantization_config"]
        first = next(iter(stored["tensors"]))
        stored["tensors"][name] = stored["tensors"].pop(first)
        stored["digests"][name] = stored["digests"].pop(first)

    edit_config(directory, change)
    edit_tensors(
        directory, lambda tensors: tensors.update({"xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx": torch.ones(1)})
    )
    started = time.process_time()
    with pytest.raises(CheckpointError, match=r"quantization_config|described"):
        load()
    assert time.process_time() - started < 20, "a name was tried as a pattern"


def test_a_description_that_was_lost(damaged):
    directory, load = damaged
    edit_config(directory, lambda content: content.pop("quantization_config"))
    with pytest.raises(CheckpointError, match=r"the files hold quantized weights \(.*does not describe them"):
        load()


@pytest.mark.parametrize("value", ["int4", ["quanto"], 3])
def test_a_description_of_another_kind(damaged, value):
    directory, load = damaged
    edit_config(directory, lambda content: content.update(quantization_config=value))
    with pytest.raises(CheckpointError, match=r"quantization_config in config\.json is"):
        load()


def test_an_index_that_leads_out_of_the_directory(damaged, tmp_path):
    directory, load = damaged
    path = next(directory.glob("*.index.json"))
    content = json.loads(path.read_text())
    content["weight_map"][next(iter(content["weight_map"]))] = "../other.safetensors"
    path.write_text(json.dumps(content))
    with pytest.raises(
        CheckpointError, match=r"is '\.\./other\.safetensors', expected the name of a \.safetensors file"
    ):
        load()


def test_a_float_tensor_that_is_missing(damaged):
    directory, load = damaged
    if "_class_name" not in json.loads((directory / "config.json").read_text()):
        pytest.skip("Transformers reports it itself and initializes the tensor")
    edit_tensors(
        directory, lambda tensors: [tensors.pop(key) for key in list(tensors) if key.endswith("proj_out.bias")] or False
    )
    with pytest.raises((CheckpointError, ValueError), match=r"lack|proj_out\.bias|do not contain"):
        load()


@pytest.mark.parametrize("name", ["pipeline", "set_seed", "LlamaConfig", "os", "GPT2LMHeadModel"])
def test_a_quanto_directory_that_names_another_class(tmp_path, name):
    from requanto.integrations.optimum_quanto import models

    models.QuantizedTransformersModel.quantize(LLAMA.build(), weights="int8").save_pretrained(tmp_path)
    edit_config(tmp_path, lambda content: content.update(architectures=[name]))
    with pytest.raises(CheckpointError, match="model class"):
        convert_quanto_directory(tmp_path, tmp_path / "out")


def test_a_quanto_directory_without_its_map(tmp_path):
    from requanto.integrations.optimum_quanto import models

    models.QuantizedTransformersModel.quantize(LLAMA.build(), weights="int8").save_pretrained(tmp_path)
    (tmp_path / "quanto_qmap.json").unlink()
    with pytest.raises(CheckpointError, match=r"quantized weights \(.*_data and \d+ more\).*quanto_qmap\.json"):
        LLAMA.auto.from_pretrained(tmp_path)


def test_a_line_of_activation_modules_that_was_lost(tmp_path):
    tiny = TINY["opt"]
    model = tiny.build()
    requanto.quantize(model, weights="int8", activations="int8")
    with torch.no_grad(), requanto.Calibration():
        model(**tiny.inputs())
    requanto.freeze(model)
    model.save_pretrained(tmp_path)

    def change(content):
        table = content["quantization_config"]["activation_modules"]
        table["model.decoder.extra"] = table.pop("model.decoder.final_layer_norm")

    edit_config(tmp_path, change)
    with pytest.raises(
        CheckpointError, match=r"hold model\.decoder\.final_layer_norm\.\w+_scale, which .* does not describe"
    ):
        tiny.auto.from_pretrained(tmp_path)
