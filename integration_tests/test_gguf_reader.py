"""The reader of GGUF headers that takes the package's place while a config is read: the same values, in little memory."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import gguf
import gguf_files as files
import numpy as np
import pytest
from transformers import AutoConfig

import requanto  # noqa: F401
from requanto.integrations.gguf_reader import light_reader


@pytest.fixture
def written(tmp_path: Path) -> Path:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_block_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_token_list([f"token {i}" for i in range(4000)] + ["", "ß ☃"])
    writer.add_token_scores([i / 2 for i in range(4002)])
    writer.add_token_types([1] * 4002)
    writer.add_array("x.flags", [True, False, True])
    writer.add_array("x.nested", [[1, 2], [3]])
    writer.add_array("x.one", ["alone"])
    writer.add_tensor("t", np.arange(64, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "x.gguf"


def read(path: Path) -> tuple[gguf.GGUFReader, int]:
    """The reader, and the most bytes that it took."""
    tracemalloc.start()
    found = gguf.GGUFReader(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return found, peak


def test_fields_are_those_of_the_package(written):
    original, much = read(written)
    with light_reader():
        found, little = read(written)
    assert type(found) is not type(original)
    assert type(gguf.GGUFReader(written)) is type(original), "outside, the package is as it was"
    assert list(found.fields) == list(original.fields)
    for name, field in original.fields.items():
        own = found.fields[name]
        assert own.types == field.types, name
        assert own.contents() == field.contents(), name
        assert [own.parts[i].tolist() for i in own.data] == [field.parts[i].tolist() for i in field.data], name
    assert [t.name for t in found.tensors] == ["t"]
    assert np.array_equal(found.tensors[0].data, original.tensors[0].data)
    assert little < much / 3


def test_a_file_that_ends_in_an_array_is_an_error(written):
    content = written.read_bytes()
    for end in (content.index(b"token 3999"), content.index(b"tokenizer.ggml.tokens") + 30):
        written.write_bytes(content[:end])
        with light_reader(), pytest.raises((ValueError, IndexError)):
            gguf.GGUFReader(written)


def test_configs_are_read_with_it(tmp_path, monkeypatch):
    made = []
    original = gguf.GGUFReader.__init__
    monkeypatch.setattr(
        gguf.GGUFReader, "__init__", lambda self, *args: (made.append(type(self).__name__), original(self, *args))[1]
    )
    files.write(tmp_path / "x.gguf", "gemma3", {"block_count": 1, "tokenizer.ggml.tokens": ["a", "b", "c"]}, {})
    config = AutoConfig.from_pretrained(tmp_path, gguf_file="x.gguf")
    assert set(made) == {"LightReader"}
    assert (config.num_hidden_layers, config.vocab_size) == (1, 3)
