"""GPTQ: files written from the specification, whose codes compressed-tensors unpacked (writers/gptq.py)."""

import json

import pytest
import torch
from safetensors.torch import load_file

from requanto.checkpoint.foreign import gptq, packing, readers
from requanto.checkpoint.foreign.source import FilesSource, TensorsSource
from requanto.checkpoint.format import CheckpointError

LINES = {
    "asym2": "qint2 32x64 group=32 affine zeros",
    "asym3": "qint3 32x64 group=32 affine zeros",
    "asym4": "qint4 32x64 group=32 affine zeros",
    "asym5": "qint5 32x64 group=32 affine zeros",
    "asym6": "qint6 32x64 group=32 affine zeros",
    "asym7": "qint7 32x64 group=32 affine zeros",
    "asym8": "quint8 32x64 group=32 affine zeros",
    "sym2": "qint2 32x64 group=32",
    "sym3": "qint3 32x64 group=32",
    "sym4": "qint4 32x64 group=32",
    "sym8": "qint8 32x64 group=32",
    "v1": "qint4 32x64 group=16 affine zeros",
    "v1_zero_16": "qint4 32x64 group=32 affine",
    "v1_zero_256": "quint8 32x64 group=32 affine",
    "row": "qint4 32x64",
    "short_group": "qint4 32x96 group=32 affine zeros",
    "order": "qint4 32x64 group=16 affine zeros order",
    "order3_sym": "qint3 32x64 group=32 order",
    "order_short": "quint8 32x96 group=32 affine zeros order",
}


@pytest.fixture
def case(written):
    folder = written("gptq")
    configs = json.loads((folder / "configs.json").read_text())

    def load(name):
        tensors = load_file(folder / f"{name}.safetensors")
        return configs[name], tensors, load_file(folder / f"{name}.expected.safetensors")["m.weight"]

    return load


def scan(config, tensors):
    return gptq.scan(config, TensorsSource(tensors))


@pytest.mark.parametrize("name", LINES)
def test_weights_equal_the_kernels(case, made, name):
    config, tensors, expected = case(name)
    found = scan(config, tensors)
    assert found.table == {"m.weight": LINES[name]}
    assert found.consumed == set(tensors)
    weight = made(found, TensorsSource(tensors))["m.weight"]
    assert weight.inner_tensors()["scale"].dtype == expected.dtype
    assert torch.equal(weight.dequantize(expected.dtype), expected)


@pytest.mark.parametrize("name", ["order", "order3_sym", "order_short"])
def test_columns_are_put_in_order_in_pieces(case, made, monkeypatch, name):
    monkeypatch.setattr(packing, "_AT_A_TIME", 300)
    config, tensors, expected = case(name)
    weight = made(scan(config, tensors), TensorsSource(tensors))["m.weight"]
    assert torch.equal(weight.dequantize(torch.float16), expected)


def test_one_word_for_a_row(case, made):
    config, tensors, expected = case("sym4")
    short = {
        "m.qweight": tensors["m.qweight"][:1],
        "m.qzeros": tensors["m.qzeros"][:1],
        "m.scales": tensors["m.scales"][:1],
    }
    weight = made(scan(config, short), TensorsSource(short))["m.weight"]
    assert torch.equal(weight.dequantize(torch.float16), expected[:, :8])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", ["1.9.0", "7.3.4"])
def test_zero_points_of_gptqmodel_survive_its_subtraction_of_words(bits, version):
    zeros = torch.arange(64, dtype=torch.int16).remainder(2**bits).view(2, 32)  # 0 among them
    words = _words(zeros, bits)
    stored = gptq.stored_zeros({"meta": {"quantizer": ["optimum:1.25", f"gptqmodel:{version}"]}})
    if bits == 3 and version == "7.3.4":
        written = _words((zeros - 1) & 7, bits)
    elif bits == 3:  # gptqmodel 1.8 to 6, utils/model.py
        constants = [0b00100100100100100100100100100100, -(2**32) + 0b10010010010010010010010010010010]
        constants.append(0b01001001001001001001001001001001)
        written = words - torch.tensor(constants, dtype=torch.int32)
    else:
        written = words - {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}[bits]
    assert torch.equal(gptq.zero_points(written, bits, 32, stored), zeros)


def _words(codes, bits):
    rows = []
    for row in codes.tolist():
        stream = sum(int(code) << (bits * j) for j, code in enumerate(row))
        rows.append([(stream >> start) & 0xFFFFFFFF for start in range(0, bits * len(row), 32)])
    return torch.tensor(rows, dtype=torch.int64).to(torch.int32)


def test_layers_may_differ_as_dynamic_says(case, made):
    config, tensors, _ = case("asym4")
    other = {f"lm_head.{key.removeprefix('m.')}": value for key, value in case("sym8")[1].items()}
    source = TensorsSource({**tensors, **other})
    # sym8 is v1; of a v2 file its zero points are 127
    with pytest.raises(
        CheckpointError, match=r"lm_head.weight: its tensors hold codes of 8 bits.*4 bits in groups of 32"
    ):
        gptq.scan(config, source)
    rules = {"-:.*attn.*": {}, "+:lm_head": {"bits": 8, "sym": True}}
    found = gptq.scan({**config, "checkpoint_format": "gptq", "dynamic": rules, "lm_head": True}, source)
    assert found.table["lm_head.weight"] == "qint8 32x64 group=32"
    assert torch.equal(made(found, source)["lm_head.weight"].dequantize(torch.float16), case("sym8")[2])


def test_small_words_of_gptqmodel(case, made):
    config, tensors, expected = case("asym4")
    small = tensors | {
        "m.qweight": tensors["m.qweight"].t().contiguous().view(torch.int16).t(),
        "m.qzeros": tensors["m.qzeros"].view(torch.int16),
    }
    weight = made(scan(config, small), TensorsSource(small))["m.weight"]
    assert torch.equal(weight.dequantize(torch.float16), expected)


def test_config_of_an_old_checkpoint(case):
    config, tensors, _ = case("sym4")
    old = {key: config[key] for key in ("bits", "group_size", "desc_act", "sym")}
    found = readers.recognize({"model_type": "llama", "quantize_config": old}, TensorsSource(tensors))
    assert scan(found, tensors).table == {"m.weight": LINES["sym4"]}
    assert gptq.recognize({"model_type": "llama"}, TensorsSource(tensors)) is None
    awq = gptq.recognize(
        {"quantize_config": {"w_bit": 4, "q_group_size": 64, "version": "GEMM"}}, TensorsSource(tensors)
    )
    assert (awq["quant_method"], awq["bits"], awq["group_size"]) == ("awq", 4, 64)


# ---------------------------------------------------------------------- bad input


def test_symmetric_in_the_config_only(case, made):
    config, tensors, _ = case("asym4")
    found = scan({**config, "sym": True}, tensors)
    with pytest.raises(
        CheckpointError, match=r"m.weight: the config says that it is symmetric, so every zero point is 8"
    ):
        made(found, TensorsSource(tensors))


@pytest.mark.parametrize("name", ["sym4", "asym4"])
def test_a_missing_sym_is_seen_from_the_zero_points(case, name):
    config, tensors, _ = case(name)
    del config["sym"]
    assert scan(config, tensors).table == {"m.weight": LINES[name]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: g.fill_(0), r"m.g_idx does not divide 64 inputs into 4 groups of 16.*group 0 64 times"),
        (lambda g: g.add_(1), r"numbers from 1 to 4, and group 0 0 times"),
        (lambda g: g.sub_(1), r"numbers from -1 to 2"),
        (lambda g: g[:16].fill_(1), r"group 0 0 times"),
    ],
)
def test_g_idx_that_is_no_grouping(case, change, message):
    config, tensors, _ = case("asym4")
    tensors["m.scales"] = tensors["m.scales"].repeat(2, 1)
    tensors["m.qzeros"] = tensors["m.qzeros"].repeat(2, 1)
    tensors["m.g_idx"] = (torch.arange(64) // 16).int()
    change(tensors["m.g_idx"])
    with pytest.raises(CheckpointError, match=message):
        scan({**config, "group_size": 16, "desc_act": True}, tensors)


def test_an_order_that_the_config_denies(case):
    config, tensors, _ = case("order")
    with pytest.raises(CheckpointError, match=r"m.g_idx permutes the inputs, and the config says desc_act=false"):
        scan({**config, "desc_act": False}, tensors)


def test_an_order_that_is_missing(case):
    config, tensors, _ = case("order")
    del tensors["m.g_idx"]
    with pytest.raises(CheckpointError, match=r"m.weight needs the tensor m.g_idx"):
        scan(config, tensors)


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales"])
def test_missing_tensors(case, part):
    config, tensors, _ = case("asym4")
    tensors |= {f"other.{key.removeprefix('m.')}": value for key, value in tensors.items()}
    del tensors[f"m.{part}"]
    with pytest.raises(CheckpointError, match=rf"m.weight needs the tensor m.{part}"):
        scan(config, tensors)


def test_scales_that_are_nan(case, made):
    config, tensors, _ = case("asym4")
    tensors["m.scales"][1, 5] = float("nan")
    with pytest.raises(CheckpointError, match=r"m.weight_scale holds NaN or Inf"):
        made(scan(config, tensors), TensorsSource(tensors))


def test_cut_tensors(case):
    config, tensors, _ = case("asym4")
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        cut = tensors | {f"m.{part}": tensors[f"m.{part}"][:-1].contiguous()}
        with pytest.raises(CheckpointError):
            scan(config, cut)
        if part != "g_idx":
            with pytest.raises(CheckpointError):
                scan(config, tensors | {f"m.{part}": tensors[f"m.{part}"][:, :-1].contiguous()})


def test_a_truncated_file(written, tmp_path):
    content = (written("gptq") / "asym4.safetensors").read_bytes()
    file = tmp_path / "model.safetensors"
    file.write_bytes(content[: len(content) - 100])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        FilesSource([file])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"checkpoint_format": "marlin"},
            "checkpoint_format is 'marlin', which stores codes in the order of a GPU kernel",
        ),
        ({"is_marlin_format": True}, "'marlin'"),
        ({"checkpoint_format": "gptq_p"}, "'gptq_p', which stores the bits of a code in several planes"),
        ({"checkpoint_format": "gptq_v3"}, "'gptq_v3', which is not known here"),
        ({"rotation": "hadamard"}, "rotation is 'hadamard'"),
        ({"bits": 9}, "bits is 9, expected one of 2, 3, 4, 5, 6, 7, 8"),
        ({"bits": "4"}, "bits is '4'"),
        ({"group_size": 0}, "group_size is 0"),
        ({"group_size": 16}, "codes of 4 bits, 64 in a row with 2 scales, and the config says 4 bits in groups of 16"),
        ({"sym": "yes"}, "symmetric weights is 'yes'"),
        ({"desc_act": 1}, "desc_act is 1"),
        ({"dynamic": ["x"]}, "dynamic is"),
        ({"dynamic": {"x": 3}}, r"dynamic\['x'\] is 3"),
    ],
)
def test_unknown_configs(case, changes, message):
    config, tensors, _ = case("asym4")
    with pytest.raises(CheckpointError, match=message):
        scan({**config, **changes}, tensors)


def test_no_tensors_of_the_format(case):
    config, _, _ = case("asym4")
    with pytest.raises(CheckpointError, match=r"no file holds a qweight.*a pickle \(.bin, .pt\)"):
        scan(config, {"m.weight": torch.zeros(2, 2)})
