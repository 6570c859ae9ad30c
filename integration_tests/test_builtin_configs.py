"""The libraries' own QuantoConfig with the plugin: every keyword means what it says, or is refused."""

import itertools
import json
import subprocess
import sys

import diffusers
import pytest
import transformers
from diffusers import PipelineQuantizationConfig
from tiny_diffusers import TINY

import requanto
from requanto.integrations.conversion import as_config

LIBRARIES = [transformers.QuantoConfig, diffusers.QuantoConfig]
NAMES = ["weights", "weights_dtype"]
TYPES = ["float8", "int8", "int4", "int2"]  # all that either library accepts
by_library = pytest.mark.parametrize("library", LIBRARIES, ids=["transformers", "diffusers"])


@by_library
@pytest.mark.parametrize(("name", "kind"), list(itertools.product(NAMES, TYPES)))
def test_a_type_by_either_name(library, name, kind):
    assert as_config(library(**{name: kind})).weights == kind
    assert as_config(library(kind)).weights == kind
    again = library.from_dict(library(**{name: kind}).to_dict())
    assert as_config(again).weights == kind


@by_library
@pytest.mark.parametrize("activations", [None, "int8", "float8"])
@pytest.mark.parametrize("skipped", [None, [], ["lm_head"]])
def test_every_other_value_that_they_accept(library, activations, skipped):
    found = as_config(library(activations=activations, modules_to_not_convert=skipped))
    assert found == requanto.QuantoConfig(weights="int8", activations=activations, modules_to_not_convert=skipped)


@by_library
def test_our_own_keywords(library):
    options = {"group_size": 16, "symmetric": True, "modules": {"*.q": "int8"}, "scale_bits": 4, "method": "mse"}
    config = library(weights="int4", **options)
    assert as_config(config) == requanto.QuantoConfig(weights="int4", **options)
    assert as_config(library.from_dict(config.to_dict())) == as_config(config)


@by_library
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weight": "int4"}, TypeError, "unknown keyword 'weight'; did you mean 'weights'"),
        ({"tensors": {}}, TypeError, "unknown keyword 'tensors'"),
        ({"weights": "int4", "weights_dtype": "float8"}, ValueError, "'int4'.*differ|'float8'.*differ"),
        ({"weights": "int4", "group_size": 0}, ValueError, "group_size must be"),
        ({"activations": "int3"}, ValueError, "int3"),
        ({"weights": "int9"}, ValueError, "int9"),
    ],
)
def test_what_is_refused(library, options, error, message):
    with pytest.raises(error, match=message):
        library(**options)


@pytest.mark.parametrize("name", NAMES)
def test_a_diffusers_model_gets_the_type(name, tmp_path):
    TINY["sd3"].make().save_pretrained(tmp_path)
    load = diffusers.SD3Transformer2DModel.from_pretrained
    for config in (
        diffusers.QuantoConfig(**{name: "float8"}),
        PipelineQuantizationConfig(
            quant_mapping={"transformer": diffusers.QuantoConfig(**{name: "float8"})}
        ).quant_mapping["transformer"],
        PipelineQuantizationConfig(quant_backend="quanto", quant_kwargs={name: "float8"})._resolve_quant_config(
            True, "x"
        ),
    ):
        model = load(tmp_path, quantization_config=config)
        kinds = {p.qtype.name for p in model.parameters() if isinstance(p, requanto.QTensor)}
        assert kinds == {"qfloat8_e4m3fn"}


def test_patched_before_any_model_is_imported():
    """`transformers.QuantoConfig` imports neither models nor quantizers. (This file imports the libraries first.)"""
    program = (
        "import requanto, transformers, diffusers, json\n"
        "first = transformers.QuantoConfig(weights_dtype='float8'), diffusers.QuantoConfig(weights='float8')\n"
        "from requanto.integrations.conversion import as_config\n"
        "print(json.dumps([as_config(config).weights for config in first]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert json.loads(done.stdout) == ["float8", "float8"], done.stderr
