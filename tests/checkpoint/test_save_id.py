"""The save id: the same for the same content, whatever the files are, and an error where files of two saves meet."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from requanto.checkpoint.format import CheckpointError
from requanto.checkpoint.save_id import KEY, PLACEHOLDER, Watched, check_ids, read_metadata, stamp
from requanto.checkpoint.shards import SafetensorsFiles, save_shards

STATE = {"a": torch.arange(6.0), "ä": torch.ones(3, dtype=torch.int8), "empty": torch.zeros(0)}


def saved(directory, state=STATE, config=None, **options):
    save_shards(state, directory, metadata={KEY: PLACEHOLDER, "more": 'a "quoted" word'}, **options)
    content = {"quantization_config": {"tensors": {}, **(config or {}), KEY: PLACEHOLDER}}
    (directory / "config.json").write_text(json.dumps(content))
    stamp(directory)
    return json.loads((directory / "config.json").read_text())["quantization_config"][KEY]


def test_it_is_in_every_file_and_the_tensors_are_untouched(tmp_path):
    found = saved(tmp_path, max_shard_size=20)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == 2
    assert {read_metadata(file)[KEY] for file in files} == {found}
    for file in files:
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt", "more": 'a "quoted" word', KEY: found}
    loaded = dict(SafetensorsFiles(tmp_path))
    assert all(torch.equal(loaded[name], tensor) for name, tensor in STATE.items())
    check_ids(found, files)


def test_the_same_content_has_the_same_id_and_bytes(tmp_path):
    ids = [saved(tmp_path / str(n)) for n in range(8)]  # safetensors draws the order of metadata keys anew each time
    assert len(set(ids)) == 1
    assert len({(tmp_path / str(n) / "model.safetensors").read_bytes() for n in range(8)}) == 1
    assert saved(tmp_path / "shards", max_shard_size=20) == ids[0]
    assert saved(tmp_path / "order", dict(reversed(STATE.items()))) == ids[0]


@pytest.mark.parametrize(
    ("state", "config"),
    [
        ({**STATE, "a": torch.arange(6.0) + 1e-6}, None),
        ({**STATE, "a": torch.arange(6.0).view(2, 3)}, None),
        ({**STATE, "ä": torch.ones(3, dtype=torch.uint8)}, None),
        ({"b" if n == "a" else n: t for n, t in STATE.items()}, None),
        (STATE, {"tensors": {"a": "qint8 2x3"}}),
    ],
)
def test_other_content_has_another_id(tmp_path, state, config):
    assert saved(tmp_path / "one") != saved(tmp_path / "other", state, config)


def test_stamping_again_changes_nothing(tmp_path):
    saved(tmp_path)
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.iterdir()}
    stamp(tmp_path)
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.iterdir()} == before


def test_files_of_two_saves(tmp_path):
    one = saved(tmp_path / "one", max_shard_size=20)
    other = saved(tmp_path / "other", {n: t + 1 for n, t in STATE.items()}, max_shard_size=20)
    mixed = sorted((tmp_path / "one").glob("*.safetensors"))
    with pytest.raises(CheckpointError, match=f"save_id {one}: .*; save_id {other}: config.json.*load again"):
        check_ids(other, mixed)
    shutil.copy(tmp_path / "other" / mixed[1].name, mixed[1])
    for expected in (one, other, None):
        with pytest.raises(CheckpointError, match=f"different saves .*save_id {other}: .*{mixed[1].name}"):
            check_ids(expected, mixed)
    check_ids(False, mixed)


def test_files_without_an_id(tmp_path, caplog):
    found = saved(tmp_path, max_shard_size=20)
    files = sorted(tmp_path.glob("*.safetensors"))
    check_ids(None, files)  # the config was written again
    for file in files:
        with pytest.raises(CheckpointError, match="save_id none") if file is files[1] else torch.no_grad():
            check_ids(found, files)
        save_file(load_file(file), file)
    check_ids(found, files)  # rewritten by another tool
    assert "no save_id" in caplog.text
    check_ids(None, files)
    check_ids(found, ["model.bin"])


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 7, b"\xff" * 100, b"\x20" + b"\0" * 7 + b'{"__metadata__":{"format":']
)
def test_a_damaged_file_has_no_id(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    assert read_metadata(tmp_path / "model.safetensors") == {}
    assert read_metadata(tmp_path / "missing") == {}


def test_a_long_header(tmp_path):
    state = {f"{'long.name.' * 10}{n}": torch.ones(1) for n in range(1000)}
    found = saved(tmp_path, state)
    assert read_metadata(tmp_path / "model.safetensors")[KEY] == found


def test_a_directory_that_changes_while_it_is_read(tmp_path):
    saved(tmp_path, max_shard_size=20)
    watched = Watched.start(tmp_path, None, "model")
    (tmp_path / "adapter_model.safetensors").write_text("somebody's")
    assert watched.changed() is None
    saved(tmp_path, max_shard_size=20)
    assert "config.json, model-00001-of-00002.safetensors" in watched.changed()


@pytest.mark.parametrize("metadata", [b"3", b"[]", b'"x"', b"null", b"[" * 50_000, b'{"a":' * 50_000])
def test_metadata_of_another_kind_are_none(tmp_path, metadata):
    header = b'{"__metadata__":' + metadata + b"}"
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert read_metadata(tmp_path / "model.safetensors") == {}


@pytest.mark.parametrize(
    "text",
    ['{"weight_map": {"a": "a\\u0000b.safetensors"}}', "[" * 100_000, '{"weight_map": {"a": "' + "x" * 5000 + '"}}'],
)
def test_a_damaged_index_is_left_to_the_check_that_names_it(tmp_path, text):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    Watched.start(tmp_path, None, "model")
    with pytest.raises(CheckpointError, match=r"index\.json"):
        SafetensorsFiles(tmp_path)


@pytest.mark.parametrize("value", [["a"], {"a": 1}, 3, True])
def test_an_id_of_another_kind_is_named(tmp_path, value):
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors", metadata={"save_id": "x"})
    with pytest.raises(CheckpointError, match=r"quantization_config\.save_id is .*, expected a text"):
        check_ids(value, [tmp_path / "model.safetensors"])


def test_a_weight_with_a_digest_counts_by_it(tmp_path):
    """Its bytes were read for the digest already."""
    found = {}
    for name, codes, digest in (("a", 1, "0" * 16), ("b", 1, "1" * 16), ("c", 2, "0" * 16), ("d", 1, None)):
        (tmp_path / name).mkdir()
        digests = {} if digest is None else {"digests": {"w": digest}}
        found[name] = saved(tmp_path / name, {"w_qdata": torch.full((4,), codes), "b": torch.ones(2)}, digests)
    assert found["a"] != found["b"], "another digest"
    assert found["a"] == found["c"], "codes are not read again"
    assert found["d"] not in found["a"] + found["b"]
