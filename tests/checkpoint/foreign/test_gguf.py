"""GGUF files: what is read of them, and which damaged ones are refused."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import gguf_files as files
import numpy as np
import pytest
import torch
from gguf_files import blocks, values

from requanto.checkpoint.foreign import gguf as reader
from requanto.checkpoint.foreign.gguf import Rows, scan, weight_of
from requanto.checkpoint.foreign.gguf_header import GGML_TYPES
from requanto.checkpoint.foreign.gguf_source import GgufSource
from requanto.checkpoint.foreign.source import TensorsSource
from requanto.checkpoint.foreign.translated import Translated, built
from requanto.checkpoint.format import CheckpointError
from requanto.report.inspect import inspect_directory


def write(path: Path, tensors: dict[str, tuple[str, np.ndarray]], **fields: int) -> Path:
    """Writes a file of blocks or numbers."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc", "ü"])
    writer.add_array("tokenizer.ggml.scores", [0.5, 1.5])
    for key, value in fields.items():
        writer.add_uint16(key.replace("__", "."), value)
    for name, (kind, data) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def mixed(tmp_path: Path) -> tuple[Path, dict[str, tuple[str, np.ndarray]]]:
    """A file with a tensor of several types."""
    numbers = np.random.default_rng(0).normal(size=(6, 64)).astype(np.float32)
    tensors = {
        "blk.0.attn_q.weight": ("Q4_1", blocks("Q4_1", (6, 64))),
        "blk.0.attn_k.weight": ("Q6_K", blocks("Q6_K", (5, 256))),
        "blk.0.ffn_down_exps.weight": ("Q8_0", blocks("Q8_0", (2, 4, 32))),
        "blk.0.attn_norm.weight": ("F32", numbers[0]),
        "token_embd.weight": ("F16", numbers.astype(np.float16)),
        "output.weight": ("BF16", gguf.quants.quantize(numbers, gguf.GGMLQuantizationType.BF16)),
        "blk.0.ffn_up.weight": ("IQ3_S", blocks("IQ3_S", (6, 256))),
    }
    return write(tmp_path / "mixed.gguf", tensors), tensors


def test_what_is_in_a_file(mixed):
    path, tensors = mixed
    source = GgufSource(path)
    assert source.architecture == "llama"
    assert set(source) == set(tensors)
    assert source.fields["tokenizer.ggml.scores"] == [0.5, 1.5]
    assert source.header("token_embd.weight") == (torch.Size([6, 64]), torch.float16)
    assert source.header("blk.0.attn_q.weight") == (torch.Size([6, 40]), torch.uint8)
    found = scan({}, source)
    assert found.table == {
        "blk.0.attn_q.weight": "qint4 6x64 group=32 affine",
        "blk.0.attn_k.weight": "qint6 5x256 group=16 scales=8 signed block=256",
        "blk.0.ffn_down_exps.weight": "qint8 2x4x32 group=32 axis=1",
    }
    assert list(found.floats) == ["blk.0.ffn_up.weight"]
    assert "1 IQ3_S" in found.floats["blk.0.ffn_up.weight"].reason
    assert "1 IQ3_S" in found.format


def test_values_are_those_of_gguf(mixed, monkeypatch):
    path, tensors = mixed
    monkeypatch.setattr(reader, "_STEP", 64)  # a few rows at a time
    source = GgufSource(path)
    found = scan({}, source)
    for name, (kind, data) in tensors.items():
        expected = values(data, kind)
        if name in found.weights:
            assert torch.equal(built(name, found.weights[name], source).dequantize(), expected), name
            assert torch.equal(reader.float_of(source, name), expected), name
        elif name in found.floats:
            assert torch.equal(found.floats[name].build(source), expected), name
        else:
            assert torch.equal(source[name].float(), expected), name
    state = Translated(found, source)
    assert state["blk.0.attn_q.weight_qdata"][...].shape == (6, 32)
    assert state["blk.0.ffn_up.weight"][...].dtype == torch.float32


@pytest.mark.parametrize("step", [200, 1200])
def test_rows_of_several_tensors_in_any_order(step, tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "_STEP", step)  # one row at a time, or four
    data = {name: blocks("Q4_K", (rows, 512), seed) for seed, (name, rows) in enumerate((("a", 5), ("b", 7)))}
    source = GgufSource(write(tmp_path / "x.gguf", {name: ("Q4_K", one) for name, one in data.items()}))
    expected = torch.cat([values(data["a"], "Q4_K"), values(data["b"], "Q4_K")])
    index = torch.tensor([11, 0, 3, 7, 5, 4, 8, 2], dtype=torch.int64, device="cpu")  # four rows have no place
    rows = Rows(("a", "b"), torch.Size([8, 512]), index)
    assert torch.equal(built("w", weight_of(source, rows), source).dequantize(), expected[index])
    other = Rows(("a", "b"), torch.Size([2, 4, 512]), index, transposed=True)
    weight = built("w", weight_of(source, other), source)
    assert torch.equal(weight.dequantize(), expected[index].view(2, 4, 512).transpose(1, 2))


def test_columns_in_another_order(tmp_path):
    data = blocks("Q5_0", (4, 64))
    source = GgufSource(write(tmp_path / "x.gguf", {"a": ("Q5_0", data)}))
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0), device="cpu")
    rows = Rows(("a",), torch.Size([4, 64]), order=order.to(torch.int32))
    weight = built("w", weight_of(source, rows), source).dequantize()
    assert torch.equal(weight[:, order], values(data, "Q5_0"))


def test_weights_in_another_shape(tmp_path):
    raw = blocks("Q4_K", (9, 256))
    path = files.write(
        tmp_path / "x.gguf",
        "sdxl",
        {"general.note": "x", "comfy.gguf.orig_shape.conv.weight": [8, 32, 3, 3]},
        {"conv.weight": ("Q4_K", (9, 256)), "linear.weight": ("Q4_K", (9, 256))},
        {"conv.weight": raw},
    )
    source = GgufSource(path)
    found = scan({}, source)
    assert list(found.weights) == ["linear.weight"]
    assert torch.equal(found.floats["conv.weight"].build(source), values(raw, "Q4_K").view(8, 32, 3, 3))
    assert "another shape" in found.floats["conv.weight"].reason
    source.fields["comfy.gguf.orig_shape.conv.weight"] = [8, 33, 3, 3]
    with pytest.raises(CheckpointError, match=r"is \(8, 33, 3, 3\), but the tensor has shape \(9, 256\)"):
        scan({}, source)


def test_types_are_those_of_gguf():
    assert {int(kind): tuple(size) for kind, size in gguf.GGML_QUANT_SIZES.items()} == {
        number: (kind.count, kind.size) for number, kind in GGML_TYPES.items()
    }
    assert {int(kind): kind.name for kind in gguf.GGMLQuantizationType} == {n: k.name for n, k in GGML_TYPES.items()}


def test_split_files(tmp_path):
    data = {name: ("Q8_0", blocks("Q8_0", (3, 32), seed)) for seed, name in enumerate("abc")}
    paths = [tmp_path / f"m-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    for number, (path, name) in enumerate(zip(paths, data, strict=True)):
        write(path, {name: data[name]}, split__no=number, split__count=3, split__tensors__count=3)
    source = GgufSource(paths[1])
    assert sorted(source) == ["a", "b", "c"]
    assert torch.equal(reader.float_of(source, "c"), values(data["c"][1], "Q8_0"))
    write(paths[2], {"a": data["a"]}, split__no=2, split__count=3, split__tensors__count=3)
    with pytest.raises(CheckpointError, match=r"both m-00001.* hold a: files of two checkpoints"):
        GgufSource(paths[0])
    write(paths[2], {"c": data["c"], "d": data["a"]}, split__no=2, split__count=3, split__tensors__count=3)
    with pytest.raises(CheckpointError, match=r"split.tensors.count is 3, found 4"):
        GgufSource(paths[0])
    paths[2].unlink()
    with pytest.raises(CheckpointError, match=r"m-00003-of-00003.gguf is missing"):
        GgufSource(paths[0])


# ---------------------------------------------------------------------- damaged files


def entry(data: bytes, name: str) -> int:
    """Where the entry of a tensor in the table goes on after its name."""
    return data.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name)


def test_damaged_heads_are_refused(mixed, tmp_path):
    data = mixed[0].read_bytes()
    first, second = entry(data, "blk.0.attn_q.weight"), entry(data, "blk.0.attn_k.weight")
    start = len(data) - sum(-(-one.nbytes // 32) * 32 for _, one in mixed[1].values())

    def refused(changed: bytes, message: str) -> None:
        path = tmp_path / "damaged.gguf"
        path.write_bytes(changed)
        with pytest.raises(CheckpointError, match=message):
            GgufSource(path)

    def changed(at: int, form: str, *numbers: int) -> bytes:
        new = struct.pack(form, *numbers)
        return data[:at] + new + data[at + len(new) :]

    refused(b"GGML" + data[4:], r"begins with b'GGML', expected b'GGUF'")
    refused(changed(4, "<I", 9), r"GGUF version 9; this Requanto reads 2 and 3")
    refused(changed(4, ">I", 3), r"big-endian")
    refused(data[:10], r"has 10 bytes, less than")
    refused(data[: first + 4], r"ends at byte \d+, within its head")
    refused(data[: start + 100], r"blk.0.attn_q.weight \(Q4_1 \(6, 64\)\) goes on to byte \d+")
    refused(data[:-200], r"damaged.gguf has \d+ bytes, but blk.0.ffn_up.weight")
    refused(changed(8, "<Q", 2**40), r"within its head|has \d+ axes|not UTF-8")
    refused(changed(first, "<I", 99), r"blk.0.attn_q.weight has 99 axes")
    refused(changed(first + 4, "<Q", 63), r"has shape \(6, 63\), but rows of Q4_1 consist of blocks of 32")
    refused(changed(first + 12, "<Q", 2**60), r"has shape \(1152921504606846976, 64\)")
    refused(changed(first + 20, "<I", 77), r"is of GGUF's type 77, which Requanto does not know; it knows BF16")
    refused(
        changed(second + 24, "<Q", 33), r"blk.0.attn_k.weight begins at byte 33 of the data, expected a multiple of 32"
    )
    refused(changed(second + 24, "<Q", 0), r"a wrong offset")
    refused(changed(second + 24, "<Q", 2**30), r"damaged.gguf has \d+ bytes, but blk.0.attn_k.weight")
    refused(data.replace(b"attn_k", b"attn_q"), r"two tensors of the name blk.0.attn_q.weight")
    # an array of one array of one array ...
    deep = struct.pack("<Q", 1) + b"k" + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000
    refused(data[:16] + struct.pack("<Q", 1) + deep, r"'k' has a value of more than 8 arrays in each other")


def test_damaged_numbers_are_refused(tmp_path):
    data = blocks("Q4_1", (2, 64))
    data[1, 20:22] = np.float16(np.nan)[None].view(np.uint8)
    source = GgufSource(write(tmp_path / "x.gguf", {"a.weight": ("Q4_1", data)}))
    with pytest.raises(CheckpointError, match=r"a.weight_scale holds NaN or Inf"):
        built("a.weight", scan({}, source).weights["a.weight"], source)


def test_truncated_while_it_is_read(mixed):
    source = GgufSource(mixed[0])
    mixed[0].write_bytes(mixed[0].read_bytes()[:-200])
    with pytest.raises(CheckpointError, match=r"ends within blk.0.ffn_up.weight"):
        source["blk.0.ffn_up.weight"]


def test_other_files_are_refused():
    with pytest.raises(CheckpointError, match=r"that of a .gguf file"):
        scan({}, TensorsSource({}))
    with pytest.raises(CheckpointError, match=r"nowhere.gguf is missing"):
        GgufSource("nowhere.gguf")


def test_inspect(mixed):
    report = inspect_directory(mixed[0])
    assert report.format.startswith("GGUF, llama: ")
    weights = {weight.name: weight for weight in report.weights}
    assert (weights["blk.0.attn_q.weight"].dtype, weights["blk.0.attn_q.weight"].bits) == ("int4", 5.0)
    assert weights["blk.0.ffn_down_exps.weight"].shape == (2, 4, 32)
    assert weights["blk.0.ffn_up.weight"].bytes == 6 * 110
    assert weights["token_embd.weight"].dtype == "float16"
