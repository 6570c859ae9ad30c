"""Pipelines: both forms of PipelineQuantizationConfig, saving and reloading, modular pipelines, and wrong names."""

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from diffusers.quantizers import PipelineQuantizationConfig
from tiny_diffusers import relative_error, run_pipeline, tiny_pipeline

import requanto
from requanto.model.quantize import freeze, quantize

MODELS = ("transformer", "text_encoder", "vae")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float pipeline."""
    path = tmp_path_factory.mktemp("pipeline")
    tiny_pipeline().save_pretrained(path)
    return path


def _load(path: Path, **kwargs: Any) -> Any:
    config = PipelineQuantizationConfig(**kwargs) if kwargs else None
    return _from_pretrained(path, quantization_config=config)


def _from_pretrained(path: Path, **kwargs: Any) -> Any:
    absent = dict.fromkeys(("tokenizer", "text_encoder_2", "tokenizer_2"))
    return diffusers.FluxPipeline.from_pretrained(path, **absent, **{"dtype": torch.float32, **kwargs})


def _kinds(model: torch.nn.Module) -> set[str]:
    return {p.qtype.name for p in model.parameters() if isinstance(p, requanto.QTensor)}


def _all_kinds(pipe: Any) -> dict[str, set[str]]:
    return {name: _kinds(getattr(pipe, name)) for name in MODELS}


@pytest.mark.parametrize("key", ["weights", "weights_dtype"])
def test_one_backend_for_components_of_both_libraries(folder: Path, tmp_path: Path, key: str) -> None:
    expected = run_pipeline(_load(folder))
    pipe = _load(
        folder,
        quant_backend="quanto",
        quant_kwargs={key: "int8"},
        components_to_quantize=["transformer", "text_encoder"],
    )
    assert _all_kinds(pipe) == {"transformer": {"qint8"}, "text_encoder": {"qint8"}, "vae": set()}
    out = run_pipeline(pipe)
    assert 0 < relative_error(out, expected) < 0.02

    pipe.save_pretrained(tmp_path / "one")
    again = _load(tmp_path / "one")
    assert _all_kinds(again) == _all_kinds(pipe)
    torch.testing.assert_close(run_pipeline(again), out, rtol=1e-3, atol=1e-3)
    again.save_pretrained(tmp_path / "two")
    for name in MODELS:
        for file in (tmp_path / "one" / name).glob("*.safetensors"):
            assert file.read_bytes() == (tmp_path / "two" / name / file.name).read_bytes(), file
    assert json.loads((tmp_path / "two" / "model_index.json").read_text())["transformer"][0] == "diffusers"


def test_every_component_where_none_is_named(folder: Path) -> None:
    pipe = _load(folder, quant_backend="quanto", quant_kwargs={"weights": "int4"})
    assert _all_kinds(pipe) == {name: {"qint4"} for name in MODELS}


def test_a_name_to_leave_float_need_not_be_in_every_component(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    kwargs = {"weights": "int8", "modules_to_not_convert": ["proj_mlp"]}
    pipe = _load(folder, quant_backend="quanto", quant_kwargs=kwargs)
    assert not isinstance(pipe.transformer.single_transformer_blocks[0].proj_mlp.weight, requanto.QTensor)
    assert _kinds(pipe.text_encoder) == {"qint8"}
    assert "'proj_mlp' matches no module" in caplog.text


def test_a_type_for_each_component_with_configs_of_three_libraries(folder: Path, tmp_path: Path) -> None:
    shared = requanto.QuantoConfig(weights="int4")
    for transformer, text_encoder, vae, expected in (
        (
            diffusers.QuantoConfig("float8"),
            transformers.QuantoConfig(weights="int8"),
            shared,
            "float8_e4m3fn int8 int4",
        ),
        (shared, shared, shared, "int4 int4 int4"),
        (transformers.QuantoConfig(weights="int2"), diffusers.QuantoConfig("int4"), shared, "int2 int4 int4"),
    ):
        pipe = _load(folder, quant_mapping={"transformer": transformer, "text_encoder": text_encoder, "vae": vae})
        found = " ".join("/".join(_kinds(getattr(pipe, name))).removeprefix("q") for name in MODELS)
        assert found == expected
    pipe.save_pretrained(tmp_path)
    assert _all_kinds(_load(tmp_path)) == _all_kinds(pipe)
    assert shared.tensors == {}


def test_beside_configs_of_other_backends(folder: Path) -> None:
    """They reach the library untouched; loading with them needs a package that is not among our dependencies."""
    from diffusers.quantizers.quantization_config import BitsAndBytesConfig

    mapping = {
        "transformer": requanto.QuantoConfig(weights="int8"),
        "text_encoder": transformers.BitsAndBytesConfig(load_in_8bit=True),
        "vae": BitsAndBytesConfig(load_in_8bit=True),
    }
    config = PipelineQuantizationConfig(quant_mapping=mapping)
    assert config._resolve_quant_config(is_diffusers=True, module_name="vae") is mapping["vae"]
    assert config._resolve_quant_config(is_diffusers=False, module_name="text_encoder") is mapping["text_encoder"]
    resolved = config._resolve_quant_config(is_diffusers=True, module_name="transformer")
    assert resolved == mapping["transformer"]
    assert config._resolve_quant_config(is_diffusers=True, module_name="other") is None


def test_a_pipeline_in_bfloat16(folder: Path) -> None:
    config = PipelineQuantizationConfig(quant_backend="quanto", quant_kwargs={"weights": "int4"})
    pipe = _from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16)
    expected = run_pipeline(_load(folder))
    assert relative_error(run_pipeline(pipe, torch.bfloat16), expected) < 0.1


def test_quantized_after_loading(folder: Path, tmp_path: Path) -> None:
    pipe = _load(folder)
    expected = run_pipeline(pipe)
    quantize(pipe.transformer, weights="int8")
    freeze(pipe.transformer)
    out = run_pipeline(pipe)
    assert 0 < relative_error(out, expected) < 0.02
    pipe.save_pretrained(tmp_path)
    again = _load(tmp_path)
    assert _kinds(again.transformer) == {"qint8"}
    torch.testing.assert_close(run_pipeline(again), out, rtol=1e-3, atol=1e-3)


def test_a_quantized_transformer_given_to_a_float_pipeline(folder: Path, tmp_path: Path) -> None:
    config = requanto.QuantoConfig(weights="float8")
    transformer = diffusers.FluxTransformer2DModel.from_pretrained(
        folder, subfolder="transformer", quantization_config=config
    )
    transformer.save_pretrained(tmp_path / "t")
    for given in (transformer, diffusers.AutoModel.from_pretrained(str(tmp_path / "t"))):
        pipe = _from_pretrained(folder, transformer=given)
        assert relative_error(run_pipeline(pipe), run_pipeline(_load(folder))) < 0.1


def test_dequantize_in_a_pipeline(folder: Path) -> None:
    pipe = _load(folder, quant_backend="quanto", quant_kwargs={"weights": "int4"})
    out = run_pipeline(pipe)
    pipe.transformer.dequantize()
    assert not _kinds(pipe.transformer)
    torch.testing.assert_close(run_pipeline(pipe), out, rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------------- modular


def _modular(folder: Path, tmp_path: Path) -> Any:
    from diffusers import ComponentSpec
    from diffusers.modular_pipelines import FluxAutoBlocks

    pipe = FluxAutoBlocks().init_pipeline()
    for name, hint in (
        ("transformer", diffusers.FluxTransformer2DModel),
        ("vae", diffusers.AutoencoderKL),
        ("text_encoder", transformers.CLIPTextModel),
    ):
        spec = ComponentSpec(name=name, type_hint=hint, pretrained_model_name_or_path=str(folder), subfolder=name)
        pipe._component_specs[name] = spec
    return pipe


def test_modular_pipelines(folder: Path, tmp_path: Path) -> None:
    int8, int4 = requanto.QuantoConfig(weights="int8"), requanto.QuantoConfig(weights="int4")
    for given, expected in (
        ({"transformer": int8, "vae": int4}, {"transformer": {"qint8"}, "vae": {"qint4"}, "text_encoder": set()}),
        (
            PipelineQuantizationConfig(quant_mapping={"transformer": int4, "text_encoder": int8}),
            {"transformer": {"qint4"}, "vae": set(), "text_encoder": {"qint8"}},
        ),
        (
            PipelineQuantizationConfig(quant_backend="quanto", quant_kwargs={"weights": "int8"}),
            {name: {"qint8"} for name in MODELS},
        ),
    ):
        pipe = _modular(folder, tmp_path)
        pipe.load_components(names=list(MODELS), quantization_config=given)
        assert _all_kinds(pipe) == expected
    with pytest.raises(ValueError, match=r"'transfomer'.*transformer"):
        _modular(folder, tmp_path).load_components(quantization_config={"transfomer": int8})


# ---------------------------------------------------------------------- refused


def test_a_component_that_does_not_exist(folder: Path) -> None:
    for kwargs in (
        {"quant_mapping": {"unet": requanto.QuantoConfig(weights="int8")}},
        {"quant_backend": "quanto", "quant_kwargs": {"weights": "int8"}, "components_to_quantize": ["unet"]},
        {"quant_backend": "quanto", "quant_kwargs": {"weights": "int8"}, "components_to_quantize": "unet"},
    ):
        with pytest.raises(ValueError, match=r"'unet', which the pipeline does not have.*text_encoder.*transformer"):
            _load(folder, **kwargs)


def test_a_component_without_weights(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"scheduler is a FlowMatchEulerDiscreteScheduler, which has no weights"):
        _load(folder, quant_mapping={"scheduler": requanto.QuantoConfig(weights="int8")})


def test_a_config_class_of_the_wrong_library(folder: Path) -> None:
    mapping = {
        "text_encoder": requanto.QuantoConfig(weights="int8"),
        "transformer": transformers.BitsAndBytesConfig(load_in_8bit=True),
    }
    with pytest.raises(TypeError, match=r"transformers\.BitsAndBytesConfig, and transformer is a model of diffusers"):
        _load(folder, quant_mapping=mapping)
    with pytest.raises(ValueError, match="could not be found"):
        PipelineQuantizationConfig(quant_mapping={"transformer": "int8"})


def test_an_unknown_keyword(folder: Path) -> None:
    with pytest.raises(TypeError, match=r"weight_dtype.*weights_dtype"):
        _load(folder, quant_backend="quanto", quant_kwargs={"weight_dtype": "int8"})


def test_a_missing_component_file(folder: Path, tmp_path: Path) -> None:
    pipe = _load(folder, quant_backend="quanto", quant_kwargs={"weights": "int8"})
    pipe.save_pretrained(tmp_path)
    (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(OSError, match=r"diffusion_pytorch_model|no file named"):
        _load(tmp_path)
