"""Which weight files of an earlier save go: those of the same model and variant, by name and index, and no others."""

import json
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from requanto.checkpoint.directory import replaced_directory
from requanto.checkpoint.format import CheckpointError
from requanto.checkpoint.weight_files import Family, entry_file, model_files, obsolete

FOREIGN = (
    "adapter_model.safetensors",
    "optimizer.bin",
    "scheduler.bin",
    "training_args.bin",
    "pytorch_lora_weights.safetensors",
    "flux1-dev.safetensors",
    "learned_embeds.bin",
    "model.fp16.safetensors",
    "model.fp16-00001-of-00002.safetensors",
    "model.safetensors.index.fp16.json",
    "model-00001-of-00009.safetensors",
    "model_other-00001-of-00002.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "pytorch_model-00001-of-00002.bin",
    "diffusion_pytorch_model.bin",
    "other.gguf",
    "__0_0.distcp",
    ".metadata",
    "quanto_qmap.json.old",
    "consolidated.00.pth",
)


def fill(directory, names):
    directory.mkdir(parents=True, exist_ok=True)
    for name in names:
        (directory / name).write_text("{}" if name.endswith("json") else "")


def shards(directory, stem, count, variant=""):
    names = [f"{stem}{variant}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    fill(directory, names)
    index = {"metadata": {}, "weight_map": {f"w{i}": name for i, name in enumerate(names)}}
    (directory / f"{stem}.safetensors.index{variant}.json").write_text(json.dumps(index))
    return [*names, f"{stem}.safetensors.index{variant}.json"]


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model"])
@pytest.mark.parametrize("variant", ["", ".x", ".a.b"])
def test_one_file_after_shards_and_shards_after_one_file(tmp_path, stem, variant):
    old = shards(tmp_path, stem, 3, variant)
    fill(tmp_path, [name for name in FOREIGN if name not in old])
    assert sorted(obsolete(tmp_path, ["config.json", f"{stem}{variant}.safetensors"])) == sorted(old)
    single = f"{stem}{variant}.safetensors"
    fill(tmp_path, [single])
    new = [f"{stem}{variant}-00001-of-00002.safetensors", f"{stem}.safetensors.index{variant}.json"]
    assert set(obsolete(tmp_path, new)) == {single, *old} - set(new)


def test_the_older_names_of_a_variant_in_diffusers(tmp_path):
    shard = "diffusion_pytorch_model-00001-of-00001.fp16.safetensors"
    index = "diffusion_pytorch_model.safetensors.fp16.index.json"
    fill(tmp_path, [shard])
    (tmp_path / index).write_text(json.dumps({"weight_map": {"w": shard}}))
    assert set(obsolete(tmp_path, ["diffusion_pytorch_model.fp16.safetensors"])) == {shard, index}


def test_files_that_an_index_cannot_mean_stay(tmp_path):
    fill(tmp_path, ["flux1-dev.safetensors", "tokenizer.json"])
    outside = tmp_path.parent / "model-00001-of-00001.safetensors"
    outside.write_text("somebody's")
    listed = ["flux1-dev.safetensors", "tokenizer.json", f"../{outside.name}", str(outside), "", 3, None]
    index = {"weight_map": {str(i): name for i, name in enumerate(listed)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert obsolete(tmp_path, ["model.safetensors"]) == ["model.safetensors.index.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"weight_map": 3}', "null"])
@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model"])
def test_an_index_that_cannot_be_read(tmp_path, caplog, text, stem):
    shards(tmp_path, stem, 2)
    index = f"{stem}.safetensors.index.json"
    (tmp_path / index).write_text(text)
    # Diffusers would look for it first and fail.
    assert obsolete(tmp_path, [f"{stem}.safetensors"]) == ([] if stem == "model" else [index])
    assert "no readable index" in caplog.text


def test_a_bin_file_is_not_hidden_by_old_safetensors(tmp_path):
    fill(tmp_path, ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"])
    assert obsolete(tmp_path, ["diffusion_pytorch_model.bin"]) == ["diffusion_pytorch_model.safetensors"]


def test_the_map_of_optimum_quanto_goes_with_its_model(tmp_path):
    fill(tmp_path, ["quanto_qmap.json"])
    assert obsolete(tmp_path, ["config.json", "model.safetensors"]) == ["quanto_qmap.json"]
    assert obsolete(tmp_path, ["adapter_model.safetensors"]) == []
    assert obsolete(tmp_path, ["config.json", "model.safetensors", "quanto_qmap.json"]) == []


def test_fewer_ranks_of_a_distributed_checkpoint(tmp_path):
    fill(tmp_path, [".metadata", "__0_0.distcp", "__1_0.distcp", "my.distcp"])
    assert obsolete(tmp_path, [".metadata", "__0_0.distcp"]) == ["__1_0.distcp"]


_WORDS = st.text(string.ascii_letters + string.digits + "-_", min_size=1, max_size=8)
_NAMES = st.one_of(
    st.sampled_from(FOREIGN),
    st.builds("{}.{}".format, _WORDS, st.sampled_from(["safetensors", "bin", "json", "safetensors.index.json", "txt"])),
    st.builds("model.{}.safetensors".format, _WORDS),
    st.builds("model-{:05d}-of-{:05d}.safetensors".format, st.integers(1, 9), st.integers(10, 19)),
)


@given(names=st.lists(_NAMES, max_size=12, unique=True), count=st.integers(0, 3))
def test_only_what_the_index_lists_and_the_model_itself_go(tmp_path_factory, names, count):
    target = tmp_path_factory.mktemp("target")
    own = {"model.safetensors", "model.safetensors.index.json", "config.json"}
    fill(target, [name for name in names if name not in own])
    if count:
        own |= set(shards(target, "model", count))
    before = {p.name: p.stat().st_ino for p in target.iterdir() if p.name not in own}
    with replaced_directory(target) as scratch:
        fill(scratch, ["config.json", "model.safetensors"])
    after = {p.name: p.stat().st_ino for p in target.iterdir()}
    assert {n: after.pop(n, None) for n in before if n != "quanto_qmap.json"} == before
    assert after.keys() == {"config.json", "model.safetensors"}


def test_the_files_that_a_library_loads(tmp_path):
    names = [tmp_path / name for name in shards(tmp_path, "model", 2)[:2]]
    fill(tmp_path, ["adapter_model.safetensors", "model.x.safetensors"])
    assert model_files(tmp_path) == names
    fill(tmp_path, ["model.safetensors"])
    assert model_files(tmp_path) == [tmp_path / "model.safetensors"]  # Transformers looks for it first
    other = tmp_path / "other"
    names = [other / name for name in shards(other, "diffusion_pytorch_model", 2)[:2]]
    fill(other, ["diffusion_pytorch_model.safetensors"])
    assert model_files(other) == names  # Diffusers looks for the index first
    assert entry_file(other, "model") is None
    (other / "diffusion_pytorch_model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="weight_map"):
        model_files(other)


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("model.safetensors", Family("model", "", "safetensors")),
        ("model.fp16.safetensors", Family("model", ".fp16", "safetensors")),
        ("model.fp16-00001-of-00002.safetensors", Family("model", ".fp16", "safetensors")),
        ("model-00001-of-00002.safetensors", Family("model", "", "safetensors")),
        ("config.json", None),
        ("model.safetensors.index.json", None),
    ],
)
def test_families(name, family):
    assert Family.of(name) == family
