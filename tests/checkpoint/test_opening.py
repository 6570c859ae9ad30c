"""config.json and the index of shards: read as data, and refused by name where they are damaged."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from requanto.checkpoint import CheckpointError
from requanto.checkpoint.files import check_all_read, check_scales_read
from requanto.checkpoint.model_class import first_architecture, named_class
from requanto.checkpoint.opening import check_directory, checked_config, read_json, stored_config, weight_map
from requanto.checkpoint.shards import SafetensorsFiles

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
STORED = {
    "quant_method": "quanto", "format": "requanto", "format_version": 1, "weights": "int4",
    "tensors": {"a.weight": "qint4 64x64 group=64 affine"}, "activation_modules": {"a": "qint8"},
    "digests": {"a.weight": "0123456789abcdef"},
}  # fmt: skip


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1]", b'"text"', b"null", b"[" * 100_000])
def test_a_file_that_is_no_json_object(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json (is no valid JSON|holds .*expected a JSON object)"):
        read_json(path)
    path.unlink()
    assert read_json(path) == {}
    with pytest.raises(CheckpointError, match="is missing: the checkpoint is incomplete"):
        read_json(path, must_exist=True)
    path.mkdir()
    with pytest.raises(CheckpointError, match="is no valid JSON"):
        read_json(path)


@pytest.mark.parametrize("value", ["quanto", 3, ["quanto"], True])
def test_a_quantization_config_of_another_kind(value):
    with pytest.raises(CheckpointError, match=r"quantization_config in config\.json is .*, expected an object"):
        stored_config({"quantization_config": value}, "here")
    assert stored_config({}, "here") == stored_config({"quantization_config": None}, "here") == {}


@given(key=st.sampled_from(sorted(STORED)), value=JSON)
def test_any_value_of_a_stored_key_is_taken_or_refused_by_name(key, value):
    try:
        checked_config({**STORED, key: value})
    except (ValueError, TypeError) as error:
        said = str(error)
        assert key.replace("_", " ") in said.replace("_", " ") or (key == "tensors" and "digests" in said)


@given(name=st.text(), value=JSON)
def test_any_entry_of_a_table_is_taken_or_refused_by_name(name, value):
    for key in ("tensors", "activation_modules", "digests"):
        try:
            checked_config({**STORED, key: {**STORED[key], name: value}})
        except (ValueError, TypeError) as error:
            assert key in str(error)  # noqa: PT017


@pytest.mark.parametrize("key", ["self", "cls", "__class__", "__init__", "kwargs", "config_dict", "auto_map"])
def test_a_key_that_means_something_to_python_only(key):
    with pytest.raises(TypeError, match=f"quantization_config has the key {key!r}, which this Requanto does not know"):
        checked_config({**STORED, key: 1})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq"}, r"quant_method is 'gptq', and its keys .* are Requanto's"),
        ({"format": "other"}, "format 'other' is unknown"),
        ({"format_version": 5}, "is of format version 5; this Requanto reads versions 1 to 4"),
        ({"format_version": True}, "format_version must be an integer from 1 on, found True"),
        ({"digests": {}}, None),
        ({"digests": {"b.weight": "0123456789abcdef"}}, r"digests has no entry for the weight 'a\.weight'"),
        ({"digests": {"a.weight": "0123"}}, r"digests\['a\.weight'\] must be 16 hexadecimal digits, found '0123'"),
        ({"tensors": {"a.weight": "qint4 64x64 group=48 affine"}}, "groups of 48 do not divide rows of 64"),
        (
            {"tensors": {"a.weight": "qint4 64x64 rotation=128"}},
            "rotation must be a power of two that divides rows of 64",
        ),
        (
            {"tensors": {"a.weight": "qint4 64x64 activation=qnf4"}},
            "activations are quantized to int8, float8, nvfp4 or an mx type, found qnf4",
        ),
        (
            {"tensors": {"a.weight": "qint4 64x64 activation=quint8"}},
            "activations are quantized to int8, float8, nvfp4",
        ),
        ({"tensors": {"a.weight": "qint4 64x64 group=6_4"}}, "'6_4' is no size"),
        ({"tensors": {"a.weight": "qint4 99999x999999999999"}}, r"no tensor has \d+ elements"),
        ({"later": 1}, r"has the key 'later', which this Requanto does not know.*pip install -U requanto"),
    ],
)
def test_keys_that_do_not_fit(change, message):
    if message is None:
        checked_config({**STORED, **change})
        return
    with pytest.raises((ValueError, TypeError), match=message):
        checked_config({**STORED, **change})


@pytest.mark.parametrize(
    "file", ["../other.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "a.bin", 3, None, ["x"], "a\0.safetensors",
             "..\\x.safetensors", "x" * 300 + ".safetensors"],
)  # fmt: skip
def test_an_index_that_leads_out_of_the_directory(tmp_path, file):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": {"a": "one.safetensors", "b": file}}))
    with pytest.raises(
        CheckpointError, match=r"weight_map\['b'\] is .*expected the name of a \.safetensors file in this"
    ):
        weight_map(path)
    with pytest.raises(CheckpointError, match=r"weight_map\['b'\]"):
        SafetensorsFiles(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": STORED}))
    with pytest.raises(CheckpointError, match=r"weight_map\['b'\]"):
        check_directory(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": STORED, "architectures": 3}))
    with pytest.raises(CheckpointError, match="architectures is 3, expected a list of class names"):
        check_directory(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    check_directory(tmp_path)  # not ours


@pytest.mark.parametrize("content", [{}, {"weight_map": []}, {"weight_map": {}, "metadata": 3}])
def test_an_index_of_another_form(tmp_path, content):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"(weight_map|metadata) is .*, expected an object"):
        weight_map(path)


def test_parts_that_no_parameter_took():
    check_all_read(["extra.bias", "head.weight_qdata"], ["norm.weight"], "Model")
    for key in ("a.weight_qdata", "a.weight_scale", "a.weight_row_scale", "a.weight._data", "a.weight._data._data"):
        with pytest.raises(
            CheckpointError, match=r"quantized weights \(.*and 0 more\).*Model would have random weights"
        ):
            check_all_read([key, "b"], ["a.weight"], "Model")


@pytest.mark.parametrize("scale", ["weight_scale", "weight_scale_inv", "SCB", "scale_weight"])
def test_scales_of_codes_that_have_the_name_of_the_weight(scale):
    check_scales_read([f"other.{scale}", "a.input_scale", "a.k_scale"], ["a.weight", "b.weight"], "Model")
    with pytest.raises(
        CheckpointError, match=rf"scales of weights \(a\.{scale} and 0 more\).*Model would take the codes"
    ):
        check_scales_read([f"a.{scale}"], ["a.weight"], "Model")


@pytest.mark.parametrize(
    "name",
    [
        "pipeline",
        "logging",
        "AutoModel",
        "LlamaConfig",
        "set_seed",
        "PreTrainedModel",
        "__name__",
        "os.system",
        "",
        3,
        None,
    ],
)
def test_a_name_that_is_no_model_class(name):
    pytest.importorskip("transformers")
    with pytest.raises(CheckpointError, match="here names"):
        named_class("transformers", name, "here")


def test_a_name_of_a_model_class():
    transformers = pytest.importorskip("transformers")
    assert named_class("transformers", "LlamaForCausalLM", "here") is transformers.LlamaForCausalLM
    assert named_class("transformers", "NoSuchModel", "here") is None
    assert first_architecture({"architectures": ["A", "B"]}, "here") == "A"
    assert first_architecture({}, "here") is None
    for value in ("LlamaModel", [3], {"a": 1}):
        with pytest.raises(CheckpointError, match=r"here: architectures is .*, expected a list of class names"):
            first_architecture({"architectures": value}, "here")
