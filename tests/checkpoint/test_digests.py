"""Digests of stored weights: what changes them, and what is refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from requanto import QTensor
from requanto.checkpoint import CheckpointError, spec_text
from requanto.checkpoint.digests import DigestChecks, check_names, digest, digests_of, mismatch
from requanto.checkpoint.state_dict import flatten_described, join_described
from requanto.runtime.settings import settings

KINDS = ["int2", "int3", "int4", "int8", "uint8", "float8", "nf4", "codebook4", "nvfp4"]


def weight(kind="int4", **options):
    torch.manual_seed(0)
    return QTensor.quantize(torch.randn(8, 64), kind, **options)


def stored(tensor):
    return {name: part.clone() for name, part in tensor.inner_tensors().items()}


@given(kind=st.sampled_from(KINDS), data=st.data())
def test_every_bit_of_every_part_counts(kind, data):
    tensor = weight(kind)
    parts = stored(tensor)
    before = digest(spec_text(tensor), parts)
    name = data.draw(st.sampled_from(sorted(parts)))
    raw = parts[name].view(-1).view(torch.uint8)
    place, bit = data.draw(st.integers(0, raw.numel() - 1)), data.draw(st.integers(0, 7))
    raw[place] ^= 1 << bit
    assert digest(spec_text(tensor), parts) != before
    raw[place] ^= 1 << bit
    assert digest(spec_text(tensor), parts) == before


def test_the_line_and_the_names_of_the_parts_count():
    tensor = weight()
    parts = stored(tensor)
    texts = ["qint4 8x64 affine", "qint4 8x64 group=64 affine", "qint4 8x64 affine activation=qint8"]
    swapped = {**parts, "scale": parts["shift"], "shift": parts["scale"]}
    found = {digest(text, parts) for text in texts} | {digest(texts[0], swapped)}
    assert len(found) == 4
    assert all(len(one) == 16 for one in found)


def test_the_layout_in_memory_does_not_count():
    tensor = weight("int8")
    before = digest(spec_text(tensor), tensor.inner_tensors())
    transposed = {name: part.t().contiguous().t() for name, part in tensor.inner_tensors().items()}
    assert digest(spec_text(tensor), transposed) == before


def test_a_known_digest_stays_what_it_is():
    # Files hold these: another algorithm or order would refuse every checkpoint that was saved before.
    parts = {"qdata": torch.arange(8, dtype=torch.int8).view(2, 4), "scale": torch.tensor([[0.5], [2.0]])}
    assert digest("qint8 2x4", parts) == "444551f7a603fd35"


def test_tables_of_digests():
    state = {"a.weight": weight(), "b.weight": weight("int8"), "b.bias": torch.zeros(8)}
    found = digests_of(state)
    assert set(found) == {"a.weight", "b.weight"}
    scales = {"m.input_scale": torch.tensor(0.5), "m.output_scale": torch.tensor(1.0)}
    assert set(digests_of({**state, **scales}, {"m": "qint8"})) == {"a.weight", "b.weight", "m"}
    assert digests_of(scales, {"m": "qint8"}) != digests_of(scales, {"m": "qfloat8_e4m3fn"})
    check_names(found, ["a.weight", "b.weight"])
    check_names({}, ["a.weight"])  # a checkpoint without digests
    with pytest.raises(CheckpointError, match=r"digests has no entry for the weight 'c'"):
        check_names(found, ["a.weight", "b.weight", "c"])


def test_both_switches(monkeypatch):
    tensor = weight()
    wrong = DigestChecks({"w": "0" * 16})
    wrong.add("w", spec_text(tensor), stored(tensor))
    assert list(wrong.finish()) == ["w"]
    monkeypatch.setattr(settings, "check_digests", False)
    off = DigestChecks({"w": "0" * 16})
    off.add("w", spec_text(tensor), stored(tensor))
    assert not off.covers("w")
    assert off.finish() == {}
    monkeypatch.setattr(settings, "write_digests", False)
    assert digests_of({"w": tensor}) == {}


def test_many_checks_at_once_find_the_wrong_one():
    tensors = {f"w{i}": weight(symmetric=bool(i % 2)) for i in range(40)}
    digests = digests_of(tensors)
    checks = DigestChecks(digests | {"w17": "0" * 16})
    for name, tensor in tensors.items():
        checks.add(name, spec_text(tensor), stored(tensor))
    errors = checks.finish()
    assert list(errors) == ["w17"]
    assert "w17: its tensors in the files have the digest" in str(errors["w17"])
    assert "says '0000000000000000'" in str(errors["w17"])
    assert checks.finish() == {}


def test_a_weight_on_the_meta_device_has_no_digest():
    meta = weight().to("meta")
    assert digests_of({"w": meta}) == {}
    checks = DigestChecks({"w": "0" * 16})
    checks.add("w", spec_text(meta), meta.inner_tensors())
    assert checks.finish() == {}
    assert mismatch("w", spec_text(weight()), stored(weight()), digests_of({"w": weight()})["w"]) is None


def test_weights_that_describe_themselves_have_one_too(monkeypatch):
    flat = flatten_described({"w": weight()})
    assert torch.equal(join_described(flat)["w"], weight())
    flat["w_qdata"] = flat["w_qdata"].clone()
    flat["w_qdata"][3, 3] ^= 1
    with pytest.raises(CheckpointError, match=r"have the digest .* but w_spec says"):
        join_described(flat)
    monkeypatch.setattr(settings, "check_digests", False)
    join_described(flat)
    monkeypatch.setattr(settings, "write_digests", False)
    assert b"digest" not in bytes(flatten_described({"w": weight()})["w_spec"].tolist())
