"""Safetensors files written a tensor at a time are those of safetensors' own writer."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from requanto.checkpoint.foreign.source import FilesSource
from requanto.checkpoint.stream import ShardWriter


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (3, 7), generator=generator, dtype=torch.uint8)
    return {
        "a.codes": codes,
        "a.scale": torch.randn(3, 1, generator=generator, dtype=torch.float32),
        "b": torch.randn(5, generator=generator, dtype=torch.float32).to(torch.bfloat16),
        "c": torch.randn(2, 3, generator=generator, dtype=torch.float32).to(torch.float8_e4m3fn),
        "d": torch.arange(4, dtype=torch.int64, device="cpu"),
        "e": torch.ones((), dtype=torch.float32, device="cpu"),
        "f": torch.empty(0, 4, dtype=torch.float16, device="cpu"),
        "strided": torch.randn(4, 6, generator=generator, dtype=torch.float32).t(),
        "ünïcode": torch.zeros(1, dtype=torch.int32, device="cpu"),
    }


def as_bytes(value: torch.Tensor) -> torch.Tensor:
    return value.contiguous().reshape(-1).view(torch.uint8)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert found[name].shape == value.shape
        assert torch.equal(as_bytes(found[name]), as_bytes(value)), name


def test_one_file(tmp_path):
    with ShardWriter(tmp_path, metadata={"note": "x"}) as writer:
        for name, value in tensors().items():
            writer.add(name, value)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert_same(load_file(tmp_path / "model.safetensors"), tensors())
    with safe_open(tmp_path / "model.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt", "note": "x"}
    header = (tmp_path / "model.safetensors").read_bytes()
    assert (8 + int.from_bytes(header[:8], "little")) % 8 == 0


def test_shards_with_an_index(tmp_path):
    with ShardWriter(tmp_path, "diffusion_pytorch_model", max_shard_bytes=64) as writer:
        for name, value in tensors().items():
            writer.add(name, value)
    index = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors().keys()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors().values())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 1
    assert {path.name for path in files} == set(index["weight_map"].values())
    assert_same({name: FilesSource(files)[name] for name in tensors()}, tensors())
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / file)


def test_nothing_is_left_after_an_error(tmp_path):
    def write() -> None:
        with ShardWriter(tmp_path, max_shard_bytes=4) as writer:
            writer.add("a", torch.ones(2, dtype=torch.float32, device="cpu"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert not list(tmp_path.iterdir())


def test_a_name_twice_is_refused(tmp_path):
    with ShardWriter(tmp_path) as writer:
        writer.add("a", torch.ones(2, dtype=torch.float32, device="cpu"))
        with pytest.raises(ValueError, match="two tensors are named a"):
            writer.add("a", torch.ones(2, dtype=torch.float32, device="cpu"))


def test_a_file_without_tensors(tmp_path):
    with ShardWriter(tmp_path):
        pass
    assert load_file(tmp_path / "model.safetensors") == {}
