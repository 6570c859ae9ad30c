"""Signed scales, scales in blocks and columns in another order in files: version, round trips, damage."""

import copy
import json

import pytest
import torch
from made_weights import ACT_ORDER, EVERY, MIXED, Q2_K, Q3_K, Q4_0, Q4_K, Q6_K, made
from torch import nn

import requanto
from requanto.checkpoint import CheckpointError, flatten, rebuild, spec_text, table_of
from requanto.checkpoint.digests import digest
from requanto.checkpoint.foreign.quanto_files import from_qtensor
from requanto.checkpoint.format import check_version
from requanto.checkpoint.state_dict import flatten_described, join_described
from requanto.config.config import FORMAT_VERSION, format_version_of


def stored(weight, name="w"):
    flat = flatten({name: weight})
    return {key.removeprefix(f"{name}_"): part.clone() for key, part in flat.items()}


@pytest.mark.parametrize("form", EVERY)
@pytest.mark.parametrize("words", ["", "transposed", "rank=2", "axis=1"])
def test_flattened_and_rebuilt(form, words):
    shape = {"transposed": (256, 6), "axis=1": (2, 6, 256)}.get(words, (6, 256))
    weight = made(form, *shape, words=words, dtype=torch.bfloat16)
    assert torch.equal(rebuild("w", spec_text(weight), stored(weight), weight.dtype), weight)
    described = flatten_described({"w": weight, "b": torch.ones(2)})
    assert json.loads(bytes(described["w_spec"].tolist()))["format_version"] == 4
    assert torch.equal(join_described(described)["w"], weight)


def test_only_weights_with_these_words_need_version_4(monkeypatch):
    for form in EVERY:
        assert format_version_of(table_of({"a": made(form, 4, 256)}.items())) == 4 <= FORMAT_VERSION
        plain = " ".join(w for w in form.split() if w not in ("signed", "order") and not w.startswith("block="))
        assert format_version_of(table_of({"a": made(plain, 4, 256)}.items())) < 4
    monkeypatch.setattr("requanto.checkpoint.format.FORMAT_VERSION", 3)  # as it was before these words
    with pytest.raises(CheckpointError, match=r"of format version 4; .* reads versions 1 to 3\. Install a newer one"):
        check_version("requanto", 4, "quantization_config")


def test_negative_scales_are_damage_unless_they_are_signed():
    weight = made(Q4_0, 4, 256)
    assert float(weight.scale.min()) < 0
    with pytest.raises(CheckpointError, match="w_scale holds the negative scale"):
        rebuild("w", spec_text(weight).replace(" signed", ""), stored(weight), weight.dtype)
    for form in (Q4_K, Q2_K):
        weight = made(form, 16, 256)
        assert float(weight.row_shift.min()) < 0  # of any sign
        parts = stored(weight)
        parts["row_scale"][0, 0] = -0.5
        with pytest.raises(CheckpointError, match=r"w_row_scale holds the negative scale -0\.5"):
            rebuild("w", spec_text(weight), parts, weight.dtype)


@pytest.mark.parametrize("form", [Q4_K, Q6_K, Q3_K, Q4_0])
def test_a_scale_of_zero_beside_any_codes_is_no_damage(form):
    """Other programs choose codes before the scale is rounded to 0."""
    weight = made(form, 4, 256)
    parts = stored(weight)
    parts["row_scale" if "row_scale" in parts else "scale"][0] = 0
    again = rebuild("w", spec_text(weight), parts, weight.dtype)
    assert torch.isfinite(again.dequantize()).all()


@pytest.mark.parametrize(
    ("form", "part", "value", "message"),
    [
        (Q4_K, "row_shift", float("nan"), "w_row_shift holds NaN or Inf"),
        (Q6_K, "row_scale", float("inf"), "w_row_scale holds NaN or Inf"),
        (Q4_K, "row_shift", 6e4, "w_row_shift makes weights of"),
        (Q6_K, "row_scale", -6e4, "w_scale makes weights of"),
        (Q4_0, "scale", -1e9, "w_scale makes weights of"),
    ],
)
def test_damaged_numbers(form, part, value, message):
    weight = made(form, 4, 512)
    parts = stored(weight)
    parts["row_scale" if "row_scale" in parts else "scale"].div_(2**12)
    rebuild("w", spec_text(weight), parts, weight.dtype)
    parts[part][0, 1] = value
    with pytest.raises(CheckpointError, match=message):
        rebuild("w", spec_text(weight), parts, weight.dtype)


@pytest.mark.parametrize("value", [-1, 256, 2**31 - 1, "twice"])
@pytest.mark.parametrize("axis", [0, 1])
def test_an_order_that_is_no_permutation(value, axis):
    weight = made(ACT_ORDER, *((2, 4, 256) if axis else (4, 256)), words=f"axis={axis}" if axis else "")
    parts = stored(weight)
    last = parts["order"].view(-1, 256)[-1]
    last[9] = last[3] if value == "twice" else value
    where = "w_order of expert 1" if axis else "w_order"
    message = (
        rf"{where} holds {int(last[9])} a second time at 9"
        if value == "twice"
        else (rf"{where} holds {value} at 9, and the columns are 0 to 255")
    )
    with pytest.raises(CheckpointError, match=message):
        rebuild("w", spec_text(weight), parts, weight.dtype)


@pytest.mark.parametrize("form", [Q4_K, Q4_0, ACT_ORDER])
def test_missing_parts_and_other_shapes_are_named(form):
    weight = made(form, 4, 256)
    for part, tensor in stored(weight).items():
        parts = stored(weight)
        del parts[part]
        with pytest.raises(CheckpointError, match=rf"w is described as .* and needs the tensors .*w_{part}"):
            rebuild("w", spec_text(weight), parts, weight.dtype)
        parts[part] = torch.cat([tensor, tensor], -1)
        with pytest.raises(CheckpointError, match=rf"w_{part}: found"):
            rebuild("w", spec_text(weight), parts, weight.dtype)


@pytest.mark.parametrize("form", [Q4_K, ACT_ORDER])
def test_a_digest_covers_every_part(form):
    weight = made(form, 4, 256)
    wanted = digest(spec_text(weight), stored(weight))
    for part in stored(weight):
        parts = stored(weight)
        parts[part].view(torch.uint8).view(-1)[0] ^= 1
        assert digest(spec_text(weight), parts) != wanted


def test_optimum_quanto_has_no_order():
    with pytest.raises(CheckpointError, match="no columns in another order"):
        from_qtensor(made("qint8 {} order", 4, 256, dtype=torch.float32), "w")


@pytest.mark.parametrize("form", [Q4_K, Q6_K, Q4_0, ACT_ORDER, *(form for form in MIXED if "rotation" not in form)])
@pytest.mark.parametrize("flat", [False, True])
def test_requantize(form, flat):
    model = nn.Sequential(nn.Linear(256, 12))
    twin = copy.deepcopy(model)
    requanto.quantize(model, "int8")
    requanto.freeze(model)
    model[0].weight = nn.Parameter(made(form, 12, 256), requires_grad=False)
    found = json.loads(json.dumps(requanto.quantization_map(model, digests=True)))
    state = flatten(model.state_dict()) if flat else model.state_dict()
    requanto.requantize(twin, state, found)
    assert torch.equal(twin[0].weight, model[0].weight)
