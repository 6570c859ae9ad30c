"""Damaged checkpoints and wrong wishes: a clear error that says what was found, and old files that stay as they were."""

import errno
import json

import pytest
import torch
import transformers as tf
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_models import TINY, output, save_tiny

from requanto import QuantoConfig


@pytest.fixture(scope="module")
def float_dir(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("float"))


@pytest.fixture
def quantized_dir(float_dir, tmp_path):
    """A saved int4 model in three shards or more, to be damaged."""
    model = load(float_dir, quantization_config=QuantoConfig(weights="int4"))
    model.save_pretrained(tmp_path / "int4", max_shard_size="60KB")
    assert len(list((tmp_path / "int4").glob("*.safetensors"))) >= 3
    return tmp_path / "int4"


def load(directory, **options):
    return TINY["llama"].auto.from_pretrained(directory, **options).eval()


def edit_config(directory, change):
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


def edit_tensor(directory, ending, change):
    """Changes the first stored tensor whose name ends so; returns its name."""
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(str(file), "pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            metadata = opened.metadata()
        key = next((k for k in sorted(tensors) if k.endswith(ending)), None)
        if key is not None:
            tensors[key] = change(tensors[key])
            save_file({k: v for k, v in tensors.items() if v is not None}, file, metadata)
            return key
    raise KeyError(ending)


def contents(directory):
    return {p.name: p.read_bytes() for p in directory.iterdir()}


# ------------------------------------------------------------------ damaged checkpoints


def test_a_config_that_is_switched_off_leaves_no_random_weights(quantized_dir):
    with pytest.raises(
        ValueError, match=r"hold quantized weights \(.*_qdata and \d+ more\).*neither quantization_config=None"
    ):
        load(quantized_dir, quantization_config=None)


def test_a_missing_shard(quantized_dir):
    shard = sorted(quantized_dir.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises((OSError, ValueError), match=shard.name):
        load(quantized_dir)


def test_a_missing_shard_that_the_index_does_not_name(quantized_dir):
    index = quantized_dir / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    shard = next(f for key, f in sorted(table["weight_map"].items()) if key.endswith("_qdata"))
    (quantized_dir / shard).unlink()
    table["weight_map"] = {key: file for key, file in table["weight_map"].items() if file != shard}
    index.write_text(json.dumps(table))
    with pytest.raises(
        ValueError, match=r"quantized weights are not in the files, e\.g\. .*_qdata: a shard is missing"
    ):
        load(quantized_dir)


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, 0.99])
def test_a_truncated_or_half_written_shard(quantized_dir, kept):
    shard = sorted(quantized_dir.glob("*.safetensors"))[0]
    whole = shard.read_bytes()
    shard.write_bytes(whole[: int(kept * len(whole)) if kept < 1 else kept])
    with pytest.raises(ValueError, match=rf"{shard.name} cannot be read as safetensors .*truncated or damaged"):
        load(quantized_dir)


def test_a_wrong_shape(quantized_dir):
    key = edit_tensor(quantized_dir, "up_proj.weight_qdata", lambda t: t[:, :-1].contiguous())
    with pytest.raises(ValueError, match=rf"{key}: found torch\.uint8 \(128, 31\), expected torch\.uint8 \(128, 32\)"):
        load(quantized_dir)


def test_a_shape_that_the_model_does_not_have(quantized_dir):
    path = quantized_dir / "config.json"
    config = json.loads(path.read_text())
    config["intermediate_size"] = 96
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"the checkpoint holds shape .*128.*, the model expects .*96"):
        load(quantized_dir)


@pytest.mark.parametrize("version", [0, -1, None, "1", 1.0, True])
def test_a_format_version_that_is_none(quantized_dir, version):
    edit_config(quantized_dir, lambda c: c.update(format_version=version))
    with pytest.raises(ValueError, match=rf"must be an integer from 1 on, found {version!r}\. Restore the config"):
        load(quantized_dir)


@pytest.mark.parametrize("version", [5, 99])
def test_an_unknown_format_version(quantized_dir, version):
    edit_config(quantized_dir, lambda c: c.update(format_version=version))
    with pytest.raises(ValueError, match=rf"format version {version!r}.*reads versions 1 to 4.*pip install -U"):
        load(quantized_dir)


def test_an_unknown_format(quantized_dir):
    edit_config(quantized_dir, lambda c: c.update(format="parquet"))
    with pytest.raises(ValueError, match=r"format 'parquet' is unknown, expected 'requanto': .*Restore the config"):
        load(quantized_dir)


@pytest.mark.parametrize("other", ["qint8", "qint2", "qfloat8_e4m3fn"])
def test_a_config_edited_to_another_type(quantized_dir, other):
    def change(config):
        config["tensors"] = {name: line.replace("qint4", other) for name, line in config["tensors"].items()}

    edit_config(quantized_dir, change)
    with pytest.raises(
        ValueError, match=r"The config and the tensors do not belong together: restore the config\.json"
    ):
        load(quantized_dir)


def test_a_config_edited_to_a_type_of_the_same_size(float_dir, tmp_path):
    load(float_dir, quantization_config=QuantoConfig(weights="int8")).save_pretrained(tmp_path)

    def change(config):
        config["tensors"] = {n: line.replace("qint8", "qfloat8_e5m2") for n, line in config["tensors"].items()}

    edit_config(tmp_path, change)
    with pytest.raises(ValueError, match=r"found torch\.int8 .*, expected torch\.float8_e5m2"):
        load(tmp_path)


def test_only_the_headline_of_a_config_edited_changes_nothing(quantized_dir):
    """What is stored stands in ``tensors``; the model's own wish is history."""
    before = output(load(quantized_dir), TINY["llama"].inputs())
    edit_config(quantized_dir, lambda c: c.update(weights="int8"))
    assert torch.equal(output(load(quantized_dir), TINY["llama"].inputs()), before)


@pytest.mark.parametrize(
    "line", ["", "qint4", "qint9 128x64", "qint4 axb", "qint4 128x64 group=x", "qint4 128x64 tall"]
)
def test_a_description_that_is_none(quantized_dir, line):
    def change(config):
        config["tensors"][next(iter(config["tensors"]))] = line

    edit_config(quantized_dir, change)
    with pytest.raises(
        ValueError, match=r"which is no description of a quantized weight .*; expected e\.g\. 'qint4"
    ) as found:
        load(quantized_dir)
    assert "unpack" not in str(found.value)


@pytest.mark.parametrize("kept", [0, 1])
def test_a_table_that_was_lost(quantized_dir, kept):
    edit_config(quantized_dir, lambda c: c.update(tensors=dict(list(c["tensors"].items())[:kept])))
    with pytest.raises(ValueError, match=r"quantization_config\.tensors does not describe .*restore the config\.json"):
        load(quantized_dir)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["scale", "shift"])
def test_scales_that_are_not_finite(quantized_dir, part, value):
    def change(tensor):
        tensor[0, 0] = value
        return tensor

    key = edit_tensor(quantized_dir, f"down_proj.weight_{part}", change)
    with pytest.raises(ValueError, match=rf"{key} holds NaN or Inf: the checkpoint is damaged"):
        load(quantized_dir)


@pytest.mark.parametrize("part", ["scale", "shift"])
def test_a_part_that_is_missing(quantized_dir, part):
    key = edit_tensor(quantized_dir, f"down_proj.weight_{part}", lambda tensor: None)
    index = quantized_dir / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    del table["weight_map"][key]
    index.write_text(json.dumps(table))
    with pytest.raises(ValueError, match=rf"needs the tensors .*{key}.*; the checkpoint has"):
        load(quantized_dir)


def test_a_checkpoint_of_optimum_quanto_names_its_reader(float_dir, tmp_path):
    for file in float_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "quanto", "weights": "int8"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"not written by Requanto.*no 'format'.*optimum-quanto"):
        load(tmp_path)


# ------------------------------------------------------------------ wrong wishes


def test_a_model_without_quantizable_layers(tmp_path):
    config = tf.ResNetConfig(num_channels=3, embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")
    tf.ResNetModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"nothing to quantize: ResNetModel has no Linear.*Conv2d.*convolutions=True"):
        tf.ResNetModel.from_pretrained(tmp_path, quantization_config=QuantoConfig(weights="int8"))


def test_everything_excluded_is_nothing_to_quantize(float_dir):
    with pytest.raises(ValueError, match=r"nothing to quantize.*modules_to_not_convert"):
        load(float_dir, quantization_config=QuantoConfig(modules_to_not_convert=["model"]))


@pytest.mark.parametrize("name", ["int9", "nf5", "bfloat16", "8"])
def test_an_unsupported_type(name):
    with pytest.raises(ValueError, match=f"unknown quantized type '{name}'.*Known: .*int4.*int8"):
        QuantoConfig(weights=name)


def test_a_pattern_that_matches_nothing_lists_close_names(float_dir):
    with pytest.raises(ValueError, match=r"modules_to_not_convert: 'q_prok' matches no module.*Close names: .*q_proj"):
        load(float_dir, quantization_config=QuantoConfig(modules_to_not_convert=["q_prok"]))
    with pytest.raises(ValueError, match=r"modules: '\*\.mpl\.\*' matches no module of the model"):
        load(float_dir, quantization_config=QuantoConfig(modules={"*.mpl.*": "int4"}))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_float_weight_that_is_not_finite_is_named(tmp_path, value):
    model = TINY["llama"].build()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = value
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN or Inf in 1 of"):
        load(tmp_path, quantization_config=QuantoConfig(weights="int4"))


# ------------------------------------------------------------------ disk full


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_disk_full_while_saving_leaves_nothing_half_written(
    float_dir, quantized_dir, monkeypatch, existing, after, tmp_path
):
    target = quantized_dir if existing else tmp_path / "new"
    before = contents(quantized_dir)
    answer = output(load(quantized_dir), TINY["llama"].inputs())
    model = load(float_dir, quantization_config=QuantoConfig(weights="int8"))
    real, written = tf.modeling_utils.safe_save_file, []

    def full(tensors, filename, **options):
        if len(written) == after:
            with open(filename, "wb") as file:  # what a full disk leaves: a piece of the file
                file.write(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
            raise OSError(errno.ENOSPC, "No space left on device", str(filename))
        written.append(filename)
        return real(tensors, filename, **options)

    monkeypatch.setattr(tf.modeling_utils, "safe_save_file", full)
    with pytest.raises(OSError, match="No space left on device"):
        model.save_pretrained(target, max_shard_size="60KB")
    assert len(written) == after
    assert sorted(p.name for p in tmp_path.iterdir()) == ["int4"]  # neither a new directory nor a scratch one
    assert contents(quantized_dir) == before
    assert torch.equal(output(load(quantized_dir), TINY["llama"].inputs()), answer)


def test_saving_to_a_file_is_refused(float_dir, tmp_path):
    (tmp_path / "file").write_text("mine")
    model = load(float_dir, quantization_config=QuantoConfig())
    with pytest.raises(NotADirectoryError, match="it is a file, expected a directory"):
        model.save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
