"""Values of a config from Python or a file: taken, or refused with the key, what was found and what is expected."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from requanto import QuantoConfig

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
LAYER = ("weights", "group_size", "symmetric", "activations", "scale_bits", "method", "rotation", "low_rank")


@given(key=st.sampled_from(QuantoConfig.parameters()), value=VALUES)
def test_any_value_is_taken_or_refused_by_name(key, value):
    try:
        config = QuantoConfig(**{key: value})
    except (ValueError, TypeError) as error:
        assert key in str(error)  # noqa: PT017
        return
    assert QuantoConfig.from_dict(config.to_dict()) == config


@given(key=st.sampled_from(LAYER), value=VALUES)
def test_any_value_for_one_layer_is_taken_or_refused_by_name(key, value):
    try:
        config = QuantoConfig(modules={"*.mlp.*": {key: value}})
    except (ValueError, TypeError) as error:
        assert "modules['*.mlp.*']" in str(error)  # noqa: PT017
        assert key in str(error)  # noqa: PT017
        return
    assert QuantoConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"modules": {"*": {"symmetric": "no"}}},
            r"modules\['\*'\]\['symmetric'\] must be True, False or None, found 'no'",
        ),
        ({"lm_head": "False"}, "lm_head must be True or False, found 'False'"),
        ({"embeddings": 1}, "embeddings must be True or False, found 1"),
        ({"modules": "auto"}, "modules must be a dict from a pattern to a type, found 'auto'"),
        ({"modules": {"": "int4"}}, "the keys of modules must be module names or globs of 1 to 1000 characters"),
        ({"modules_to_not_convert": 3}, "modules_to_not_convert must be a list of module names or globs, found 3"),
        ({"modules_to_not_convert": ["a", None]}, "modules_to_not_convert must be module names or globs.*found None"),
        ({"modules_to_not_convert": ["x" * 2000]}, "modules_to_not_convert must be .*1 to 1000 characters, found 'x+"),
        ({"group_size": 10**30}, "group_size must be a positive integer"),
        ({"rotation": 2**100}, "rotation must be at most 2147483647"),
        ({"low_rank": 10**30}, "low_rank must be at most"),
        ({"method": {"a": 1}}, "method must be the name of a method or None, found {'a': 1}"),
        ({"weights": ["int4"]}, "weights: a quantized type is given as a string or a qtype, found list"),
        ({"candidates": 3, "weights": "auto", "bits": 4}, "candidates must be a list of strings, found 3"),
        (
            {"tensors": "int4"},
            r"quantization_config\.tensors must be a dict from a name to the description of a weight",
        ),
        ({"tensors": {"a": 3}}, r"quantization_config\.tensors\['a'\] must be the description of a weight, found 3"),
        ({"activation_modules": {"a": None}}, r"activation_modules\['a'\] must be a type, found None"),
        ({"budget": "x"}, r"quantization_config\.budget must be the record of a budget"),
        ({"format": 3}, r"quantization_config\.format must be a string, found 3"),
    ],
)
def test_what_is_said(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        QuantoConfig(**options)
