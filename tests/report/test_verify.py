"""`requanto inspect --verify`: which weights of a directory are what they were when they were saved."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from requanto import QTensor, QuantoConfig
from requanto.checkpoint import CheckpointError, flatten, table_of
from requanto.checkpoint.digests import digests_of
from requanto.report.verify import DAMAGED, HOLDS, MISSING, UNKNOWN, verify_directory


@pytest.fixture
def directory(tmp_path):
    """Three weights in two files, a float tensor, and a module with activation scales."""
    torch.manual_seed(0)
    state = {f"{name}.weight": QTensor.quantize(torch.randn(8, 64), kind) for name, kind in KINDS.items()}
    floats = {"norm.weight": torch.ones(8), "a.input_scale": torch.tensor(0.5), "a.output_scale": torch.tensor(1.0)}
    config = QuantoConfig(weights="int4")
    config.activation_modules = {"a": "qint8"}
    config.record(table_of(state.items()), digests_of(state | floats, config.activation_modules))
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config.to_dict()}))
    flat = flatten(state | floats)
    first = {key: value for key, value in flat.items() if not key.startswith("c")}
    save_file(first, tmp_path / "model-1.safetensors")
    save_file({key: value for key, value in flat.items() if key not in first}, tmp_path / "model-2.safetensors")
    return tmp_path


KINDS = {"a": "int8", "b": "int4", "c": "float8"}


def states(directory):
    return {weight.name: weight.state for weight in verify_directory(directory).weights}


def edit(directory, file, change):
    tensors = {key: value.clone() for key, value in load_file(directory / file).items()}
    change(tensors)
    save_file(tensors, directory / file)


def edit_config(directory, change):
    path = directory / "config.json"
    content = json.loads(path.read_text())
    change(content["quantization_config"])
    path.write_text(json.dumps(content))


def test_an_intact_directory(directory):
    found = verify_directory(directory)
    assert found.intact
    assert states(directory) == {"a.weight": HOLDS, "b.weight": HOLDS, "c.weight": HOLDS, "a": HOLDS}
    assert found.by_file() == {"model-1.safetensors": {HOLDS: 3}, "model-2.safetensors": {HOLDS: 1}}
    assert json.loads(found.to_json())["intact"]


def test_a_flipped_bit_is_found_in_its_layer_and_file(directory):
    edit(directory, "model-1.safetensors", lambda t: t["b.weight_qdata"].view(-1)[5].bitwise_xor_(1))
    found = verify_directory(directory)
    assert not found.intact
    (damaged,) = [weight for weight in found.weights if weight.state == DAMAGED]
    assert (damaged.name, damaged.files) == ("b.weight", ("model-1.safetensors",))
    assert "its digest is" in damaged.reason


def test_values_without_a_digest(directory):
    edit_config(directory, lambda stored: stored.pop("digests"))
    assert set(states(directory).values()) == {UNKNOWN}
    edit(directory, "model-2.safetensors", lambda t: t["c.weight_scale"].fill_(-1))
    assert states(directory)["c.weight"] == DAMAGED


def test_what_is_missing_or_not_described(directory):
    edit(directory, "model-1.safetensors", lambda t: [t.pop(key) for key in list(t) if key.startswith("b.")])
    assert states(directory)["b.weight"] == MISSING
    edit_config(directory, lambda stored: stored["tensors"].pop("c.weight"))
    assert states(directory)["c.weight"] == DAMAGED
    edit(directory, "model-1.safetensors", lambda t: t["a.input_scale"].fill_(2))
    assert states(directory)["a"] == DAMAGED


def test_names_that_a_library_changed(directory):
    def rename(tensors):
        for key in [key for key in tensors if key.startswith("b.")]:
            tensors[f"old.{key}"] = tensors.pop(key)

    edit(directory, "model-1.safetensors", rename)
    assert states(directory) == {"a.weight": HOLDS, "b.weight": HOLDS, "c.weight": HOLDS, "a": HOLDS}
    edit(directory, "model-1.safetensors", lambda t: t["old.b.weight_qdata"].fill_(0))
    assert states(directory)["old.b.weight"] == DAMAGED
    assert states(directory)["b.weight"] == MISSING


def test_a_directory_without_quantized_weights(directory):
    (directory / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="describes no weight that Requanto quantized"):
        verify_directory(directory)
    with pytest.raises(FileNotFoundError, match="is not a directory"):
        verify_directory(directory / "nowhere")


def test_the_command(directory, capsys):
    from requanto.cli import main

    def run(*more):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", ["requanto", "inspect", str(directory), "--verify", *more])
            with pytest.raises(SystemExit) as ended:
                main()
        return ended.value.code, capsys.readouterr()

    assert run()[0] == 0
    code, said = run("--json")
    assert (code, json.loads(said.out)["intact"]) == (0, True)
    edit(directory, "model-2.safetensors", lambda t: t["c.weight_scale"].mul_(2))
    code, said = run()
    assert code == 1
    assert "damaged: c.weight (model-2.safetensors): its digest is" in said.out
    assert said.err == ""
    (directory / "config.json").write_text("{")
    code, said = run()
    assert code == 1
    assert "is no valid JSON" in " ".join(said.err.split())
