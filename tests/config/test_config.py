"""QuantoConfig: names, defaults, JSON and back, and what a wrong keyword is answered."""

import copy
import json

import pytest

from requanto import QuantoConfig, qint4, qtypes

CONFIGS = [
    {},
    {"weights": "int4"},
    {"weights_dtype": "float8"},
    {"weights": qint4, "group_size": 32, "symmetric": True},
    {"weights": "int2", "group_size": -1, "modules_to_not_convert": ["lm_head", "*.mlp.*"]},
    {"activations": "int8", "embeddings": True, "lm_head": True, "convolutions": True, "default_skips": False},
    {"modules": {"*.mlp.*": "int4", "*.self_attn.*": {"weights": "int8", "group_size": 64}, "lm_head": None}},
    {"modules": {"*.mlp.*": qint4}},
]


@pytest.mark.parametrize("options", CONFIGS)
def test_to_json_and_back_to_an_equal_object(options, tmp_path):
    config = QuantoConfig(**options)
    assert QuantoConfig.from_dict(json.loads(config.to_json_string())) == config
    assert QuantoConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert QuantoConfig.from_dict(config.to_diff_dict()) == config
    config.to_json_file(tmp_path / "c.json")
    assert QuantoConfig.from_dict(json.loads((tmp_path / "c.json").read_text())) == config
    assert copy.deepcopy(config) == config
    assert dict(config) == config.to_dict()


def test_different_configs_are_not_equal():
    configs = [QuantoConfig(**options) for options in CONFIGS]
    equal = [(i, j) for i in range(len(configs)) for j in range(i) if configs[i] == configs[j]]
    assert equal == []
    assert QuantoConfig() != {"weights": "int8"}


def test_weights_dtype_is_an_alias():
    assert QuantoConfig(weights_dtype="int4") == QuantoConfig(weights="int4") == QuantoConfig("int4")
    assert QuantoConfig(weights="float8").weights_dtype == "float8"
    assert QuantoConfig(weights="qint4", weights_dtype="int4").weights == "int4"
    with pytest.raises(ValueError, match="weights='int4' and weights_dtype='int8' differ; give one of them"):
        QuantoConfig(weights="int4", weights_dtype="int8")


@pytest.mark.parametrize(
    ("keyword", "near"),
    [
        ("weight", "weights"),
        ("activation", "activations"),
        ("groupsize", "group_size"),
        ("modules_to_not_covert", "modules_to_not_convert"),
        ("embedding", "embeddings"),
        ("lmhead", "lm_head"),
    ],
)
def test_an_unknown_keyword_names_the_nearest(keyword, near):
    with pytest.raises(TypeError, match=f"unknown keyword '{keyword}'; did you mean '{near}'"):
        QuantoConfig(**{keyword: "int8"})


def test_an_unknown_keyword_that_resembles_none_lists_all():
    with pytest.raises(
        TypeError, match=r"unknown keyword 'zzz' ?.*Known: weights, activations, modules_to_not_convert"
    ):
        QuantoConfig(zzz=1)
    with pytest.raises(TypeError, match=r"modules\['\*'\] got an unknown keyword 'weight'; did you mean 'weights'"):
        QuantoConfig(modules={"*": {"weight": "int4"}})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "int9"}, "unknown quantized type 'int9'"),
        ({"weights": "fp6_e3m3"}, "take 1 . 3 . 3 bits; expected 6 in all"),
        ({"activations": "int4"}, "activations must be None, 'int8', 'float8', 'nvfp4' or an MX type .*, found 'int4'"),
        ({"group_size": 0}, "group_size must be a positive integer, -1"),
        ({"group_size": "64"}, "group_size must be a positive integer, -1"),
        ({"group_size": True}, "group_size must be a positive integer, -1"),
        ({"symmetric": "yes"}, "symmetric must be True, False or None, found 'yes'"),
        ({"modules": {"a": "int1"}}, "unknown quantized type 'int1'"),
        ({"modules": {"a": 4}}, r"modules\['a'\] must be a type, a dict or None, found 4"),
        ({"modules": {"a": {"group_size": -3}}}, r"modules\['a'\]\['group_size'\] must be a positive integer"),
    ],
)
def test_values_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        QuantoConfig(**options)


@pytest.mark.parametrize("name", sorted(qtypes))
def test_every_type_is_a_choice(name):
    config = QuantoConfig(weights=name)
    assert config == QuantoConfig(weights=name.removeprefix("q")) == QuantoConfig(weights=qtypes[name])
    assert config.choice_for(None).qtype is qtypes[name]


def test_defaults():
    config = QuantoConfig()
    assert (config.weights, config.activations, config.modules_to_not_convert) == ("int8", None, None)
    assert (config.embeddings, config.lm_head, config.convolutions) == (False, False, False)
    assert config.default_skips
    assert config.quant_method == "quanto"
    assert config.quant_method.value == "quanto"


def test_update_and_from_dict_take_what_they_know():
    config = QuantoConfig(weights="int4")
    assert config.update(weights="int2", revision="main") == {"revision": "main"}
    assert config.weights == "int2"
    made, rest = QuantoConfig.from_dict({"weights": "int4"}, return_unused_kwargs=True, group_size=32, other=1)
    assert (made.weights, made.group_size, rest) == ("int4", 32, {"other": 1})


def test_one_name_is_a_list_of_one():
    assert QuantoConfig(modules_to_not_convert="lm_head").modules_to_not_convert == ["lm_head"]
