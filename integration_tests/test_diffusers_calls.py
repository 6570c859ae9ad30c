"""Common calls on quantized Diffusers models: fused projections, casts, from_pipe, models made from them, averages."""

import copy
import json
import logging
from pathlib import Path
from typing import Any

import diffusers
import pytest
import safetensors.torch
import torch
from diffusers.training_utils import EMAModel
from peft import LoraConfig
from tiny_diffusers import TINY, relative_error, run_pipeline, tiny_pipeline

import requanto
from requanto import QTensor, QuantoConfig
from requanto.tensor.lowrank import append

pytestmark = pytest.mark.usefixtures("exact")

KINDS = ["int8", "int4", "float8", "nf4"]
MOTION_ADAPTER = {
    "block_out_channels": (32, 64),
    "motion_layers_per_block": 1,
    "motion_norm_num_groups": 8,
    "motion_num_attention_heads": 2,
}


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Loads a tiny model that is quantized on loading; ``kind=None``: float."""
    saved: dict[str, Path] = {}

    def load(name: str, kind: str | None = "int4", **options: Any) -> Any:
        if name not in saved:
            saved[name] = tmp_path_factory.mktemp(name)
            TINY[name].make().save_pretrained(saved[name])
        config = None if kind is None else QuantoConfig(weights=kind, **options)
        return TINY[name].cls.from_pretrained(saved[name], quantization_config=config).eval()

    return load


def quantized(model: Any) -> set[str]:
    return {name for name, p in model.named_parameters() if isinstance(p, QTensor)}


def codes(model: Any) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        if isinstance(parameter, QTensor):
            found |= {f"{name}_{part}": inner.clone() for part, inner in parameter.inner_tensors().items()}
    return found


# ---------------------------------------------------------------------- fuse_qkv_projections

FUSED = ["flux", "sd3", "pixart", "unet", "vae", "hunyuandit", "auraflow", "cogvideox", "wan"]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", FUSED)
def test_fused_projections_are_quantized_and_exact(load, name, packed, tmp_path):
    model, tiny = load(name), TINY[name]
    if packed:
        requanto.prepare(model)
    expected, before = tiny.run(model), quantized(model)
    if hasattr(model, "fuse_qkv_projections"):
        model.fuse_qkv_projections()
    else:  # Wan
        for module in model.modules():
            if hasattr(module, "fuse_projections"):
                module.fuse_projections()
    fused = quantized(model) - before
    assert fused
    assert all("qkv" in layer or "to_kv" in layer or "added_kv" in layer for layer in fused)
    assert not [n for n, p in model.named_parameters() if ("qkv.w" in n or "kv.w" in n) and not isinstance(p, QTensor)]
    torch.testing.assert_close(tiny.run(model), expected, rtol=1e-4, atol=1e-5)

    model.save_pretrained(tmp_path)  # the fused layers are copies
    again = tiny.cls.from_pretrained(tmp_path).eval()
    assert quantized(again) == before
    torch.testing.assert_close(tiny.run(again), expected)
    torch.testing.assert_close(tiny.run(model), expected, rtol=1e-4, atol=1e-5)  # still fused

    if hasattr(model, "unfuse_qkv_projections"):
        model.unfuse_qkv_projections()
    else:
        for module in model.modules():
            if hasattr(module, "unfuse_projections"):
                module.unfuse_projections()
    assert torch.equal(tiny.run(model), expected)


@pytest.mark.parametrize("kind", ["int8", "float8", "nf4", "int3"])
def test_fused_projections_of_each_type(load, kind):
    model = load("flux", kind)
    append(model.transformer_blocks[0].attn.to_k.weight, torch.randn(32, 2), torch.randn(2, 32))  # a merged adapter
    expected = TINY["flux"].run(model)
    model.fuse_qkv_projections()
    assert isinstance(model.transformer_blocks[0].attn.to_qkv.weight, QTensor)
    torch.testing.assert_close(TINY["flux"].run(model), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [{"kind": "codebook4"}, {"column_scale": "root"}, {"modules": {"*.to_v": "int8"}}])
def test_projections_of_unlike_weights_stay_unfused_and_are_logged(load, config, caplog):
    model = load("flux", **config)
    expected, before = TINY["flux"].run(model), dict(model.named_modules())
    with caplog.at_level(logging.WARNING, logger="requanto"):
        model.fuse_qkv_projections()
    assert "stays unfused" in caplog.text
    unfused = [m for m in model.modules() if getattr(m, "fused_projections", None) is False]
    assert unfused
    assert not any(isinstance(p, torch.nn.Parameter) and "to_qkv" in n for n, p in model.named_parameters())
    assert torch.equal(TINY["flux"].run(model), expected)
    assert set(dict(model.named_modules())) >= set(before)


@pytest.mark.parametrize("name", ["sd3", "pixart", "unet", "vae", "hunyuandit", "auraflow", "cogvideox"])
@pytest.mark.parametrize("how", [{"column_scale": "root"}, {"activations": "int8"}])
def test_models_whose_attention_stays_unfused_keep_its_processors(load, name, how):
    model = load(name, "int8", **how)
    expected = TINY[name].run(model)
    model.fuse_qkv_projections()
    torch.testing.assert_close(TINY[name].run(model), expected, rtol=1e-4, atol=1e-5)
    model.unfuse_qkv_projections()
    torch.testing.assert_close(TINY[name].run(model), expected, rtol=1e-4, atol=1e-5)


def test_projections_with_an_unfused_adapter_say_what_to_do(load):
    model = load("flux")
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    with pytest.raises(ValueError, match=r"fuse_lora\(\) first"):
        model.fuse_qkv_projections()
    model.fuse_lora()
    expected = TINY["flux"].run(model)
    model.fuse_qkv_projections()
    torch.testing.assert_close(TINY["flux"].run(model), expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------- casts, from_pipe


@pytest.mark.parametrize("name", ["flux", "unet", "wan", "ltx"])
@pytest.mark.parametrize("cast", ["to", "half", "float", "bfloat16", "device and dtype"])
def test_a_cast_keeps_codes_and_scales(load, name, cast):
    model = load(name)
    expected, before = TINY[name].run(model), codes(model)
    change, dtype = {
        "to": (lambda: model.to(dtype=torch.bfloat16), torch.bfloat16),
        "half": (lambda: model.half(), torch.float16),
        "float": (lambda: model.float(), torch.float32),
        "bfloat16": (lambda: model.bfloat16(), torch.bfloat16),
        "device and dtype": (lambda: model.to("cpu", torch.float32), torch.float32),
    }[cast]
    assert change() is model
    after = codes(model)
    assert all(after[key].dtype == value.dtype and torch.equal(after[key], value) for key, value in before.items())
    assert model.dtype == dtype
    assert model.is_quantized
    if dtype != torch.float16:
        assert relative_error(TINY[name].run(model, dtype), expected) < (0.1 if dtype != torch.float32 else 1e-9)


def test_a_cast_to_few_bits_is_refused_before_anything_changes(load):
    model = load("flux")
    with pytest.raises(ValueError, match=r"cannot be cast to torch\.float8_e4m3fn"):
        model.to(torch.float8_e4m3fn)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_cast_model_is_saved_and_loaded(load, tmp_path):
    model = load("flux").to(torch.bfloat16)
    expected = TINY["flux"].run(model, torch.bfloat16)
    model.save_pretrained(tmp_path)
    again = TINY["flux"].cls.from_pretrained(tmp_path, torch_dtype=torch.bfloat16).eval()
    assert torch.equal(TINY["flux"].run(again, torch.bfloat16), expected)


def stable_diffusion(load) -> Any:
    pipe = diffusers.StableDiffusionPipeline(
        vae=load("vae"),
        text_encoder=tiny_pipeline().text_encoder,
        tokenizer=None,
        unet=load("unet"),
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    requanto.quantize(pipe.text_encoder, weights="int4")
    requanto.freeze(pipe.text_encoder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


FLUX_IMAGE = ("FluxImg2ImgPipeline", "FluxInpaintPipeline")


@pytest.mark.parametrize("options", [{}, {"torch_dtype": None}, {"torch_dtype": torch.bfloat16}])
def test_from_pipe(load, options):
    pipe = tiny_pipeline(transformer=load("flux"))
    expected, before = run_pipeline(pipe), codes(pipe.transformer)
    for name in FLUX_IMAGE:
        other = getattr(diffusers, name).from_pipe(pipe, **options)
        assert other.transformer is pipe.transformer
    assert isinstance(diffusers.AutoPipelineForImage2Image.from_pipe(pipe, **options), diffusers.FluxImg2ImgPipeline)
    assert all(torch.equal(value, before[key]) for key, value in codes(pipe.transformer).items())
    if options.get("torch_dtype") is None:
        assert torch.equal(run_pipeline(pipe.to(torch.float32)), expected)
    else:
        assert pipe.transformer.dtype == torch.bfloat16
        assert relative_error(run_pipeline(pipe, torch.bfloat16), expected) < 0.1


def test_from_pipe_of_stable_diffusion(load):
    pipe = stable_diffusion(load)
    other = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    assert other.unet is pipe.unet
    other.set_progress_bar_config(disable=True)
    embeds = torch.randn(1, 5, 32)
    image = torch.rand(1, 3, 16, 16)
    assert other(prompt_embeds=embeds, negative_prompt_embeds=embeds, image=image, num_inference_steps=2).images
    pipe.to("cpu", torch.float32)
    pipe.fuse_qkv_projections(vae=True)
    pipe.unfuse_qkv_projections(vae=True)


# ---------------------------------------------------------------------- models made from a quantized model


def float_like(model: Any) -> Any:
    """The float model with the values of a quantized one."""
    return copy.deepcopy(model).dequantize()


MADE = {
    "ControlNetModel": ("unet", lambda model: diffusers.ControlNetModel.from_unet(model)),
    "ControlNetXSAdapter": ("unet", lambda model: diffusers.ControlNetXSAdapter.from_unet(model, size_ratio=1.0)),
    "FluxControlNetModel": (
        "flux",
        lambda model: diffusers.FluxControlNetModel.from_transformer(
            model, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2
        ),
    ),
    "SD3ControlNetModel": ("sd3", lambda model: diffusers.SD3ControlNetModel.from_transformer(model, num_layers=1)),
}


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("name", MADE)
def test_a_controlnet_is_float_with_the_dequantized_values(load, name, kind, tmp_path, caplog):
    source, make = MADE[name]
    model = load(source, kind, **({"convolutions": True} if source == "unet" else {}))
    torch.manual_seed(0)
    expected = make(float_like(model)).state_dict()
    torch.manual_seed(0)
    with caplog.at_level(logging.INFO, logger="requanto"):
        made = make(model)
    assert not quantized(made)
    assert made.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in made.state_dict().items())
    assert all(parameter.requires_grad for parameter in made.parameters())
    assert "quantization_config" not in made.config
    if name != "ControlNetXSAdapter":  # which takes only the sizes over
        assert "dequantized, since the new model is to be trained" in caplog.text
    made.save_pretrained(tmp_path)
    again = type(made).from_pretrained(tmp_path)
    assert all(torch.equal(value, expected[key]) for key, value in again.state_dict().items())
    assert quantized(model)


def test_a_controlnet_xs_of_a_quantized_unet(tmp_path):
    """`UNetControlNetXSModel.from_unet` wants two layers per block."""
    TINY["unet"].cls(**{**TINY["unet"].config, "layers_per_block": 2}).save_pretrained(tmp_path)
    config = QuantoConfig(weights="int8", convolutions=True)
    model = TINY["unet"].cls.from_pretrained(tmp_path, quantization_config=config)
    make = diffusers.UNetControlNetXSModel.from_unet
    torch.manual_seed(0)
    expected = make(float_like(model), size_ratio=1.0, ctrl_optional_kwargs={}).state_dict()
    torch.manual_seed(0)
    made = make(model, size_ratio=1.0, ctrl_optional_kwargs={})
    assert not quantized(made)
    assert all(torch.equal(value, expected[key]) for key, value in made.state_dict().items())
    made.freeze_unet_params()


@pytest.mark.parametrize("kind", ["int8", "int4", "codebook4"])
def test_a_motion_unet_stays_quantized(load, kind, tmp_path):
    model = load("unet", kind, convolutions=True)
    adapter = diffusers.MotionAdapter(**MOTION_ADAPTER)
    expected = diffusers.UNetMotionModel.from_unet2d(float_like(model), adapter).eval()
    made = diffusers.UNetMotionModel.from_unet2d(model, adapter).eval()
    assert len(quantized(made)) == len(quantized(model))
    names = dict(made.named_parameters())
    for name, parameter in expected.named_parameters():
        mine = names[name].dequantize() if isinstance(names[name], QTensor) else names[name]
        assert torch.equal(mine, parameter), name
    one = model.conv_in.weight if isinstance(model.conv_in.weight, QTensor) else model.mid_block.resnets[0].conv1.weight
    assert one.data_ptr() not in {p.data_ptr() for p in made.parameters()}
    x = {
        "sample": torch.randn(1, 4, 2, 8, 8),
        "timestep": torch.tensor([1]),
        "encoder_hidden_states": torch.randn(2, 5, 32),
    }
    with torch.no_grad():
        found = made(**x).sample
        assert relative_error(found, expected(**x).sample) < 0.02
    made.save_pretrained(tmp_path)
    again = diffusers.UNetMotionModel.from_pretrained(tmp_path).eval()
    assert all(torch.equal(value, codes(made)[key]) for key, value in codes(again).items())
    with torch.no_grad():
        torch.testing.assert_close(again(**x).sample, found)
    made.freeze_unet2d_params()


@pytest.mark.parametrize("name", ["flux", "unet", "wan", "ltx"])
def test_a_float_state_dict_is_quantized(load, name):
    other = TINY[name].make(seed=1)
    model = load(name)
    model.load_state_dict(other.state_dict())
    fresh = load(name)
    assert quantized(model) == quantized(fresh)
    weight = next(iter(quantized(model)))
    expected = fresh.get_parameter(weight)._quantize_like(other.get_parameter(weight), same_column=False)
    assert torch.equal(model.get_parameter(weight).detach(), expected)


# ---------------------------------------------------------------------- adapters


@pytest.mark.parametrize("upcast", [False, True])
@pytest.mark.parametrize(("name", "target"), [("flux", "to_q"), ("wan", "to_k"), ("ltx", "to_v"), ("unet", "to_q")])
def test_save_lora_adapter_and_load_it(load, name, target, upcast, tmp_path):
    model = load(name)
    plain = TINY[name].run(model)
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=4, target_modules=[target], init_lora_weights=False))
    expected = TINY[name].run(model)
    assert not torch.equal(expected, plain)
    before = codes(model)
    with pytest.raises(ValueError, match=r"save_lora_adapter"):
        model.save_pretrained(tmp_path / "whole")
    model.save_lora_adapter(tmp_path, upcast_before_saving=upcast)
    assert [file.name for file in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]
    assert all(torch.equal(value, before[key]) for key, value in codes(model).items())
    other = load(name)
    other.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    assert torch.equal(TINY[name].run(other), expected)
    other.unload_lora()
    assert torch.equal(TINY[name].run(other), plain)


def test_an_ip_adapter_on_a_quantized_unet(load):
    unet, tiny = load("unet"), TINY["unet"]
    before = codes(unet)
    state = {"image_proj": {}, "ip_adapter": {}}
    torch.manual_seed(0)
    state["image_proj"] = {
        "proj.weight": torch.randn(4 * 32, 24),
        "proj.bias": torch.zeros(4 * 32),
        "norm.weight": torch.ones(32),
        "norm.bias": torch.zeros(32),
    }
    key = 1
    for name in unet.attn_processors:
        if "attn2" in name:
            width = unet.get_submodule(name.removesuffix(".processor")).to_k.weight.shape[0]
            state["ip_adapter"] |= {
                f"{key}.to_k_ip.weight": torch.randn(width, 32),
                f"{key}.to_v_ip.weight": torch.randn(width, 32),
            }
            key += 2
    plain = float_like(unet)
    images = {"added_cond_kwargs": {"image_embeds": [torch.randn(1, 1, 24)]}}
    outputs = []
    for model in (unet, plain):
        model._load_ip_adapter_weights([state])
        with torch.no_grad():
            outputs.append(model(**tiny.inputs(torch.float32), **images, return_dict=False)[0])
    assert relative_error(outputs[0], outputs[1]) < 0.02
    assert all(torch.equal(value, before[key]) for key, value in codes(unet).items())


# ---------------------------------------------------------------------- offloading, checkpointing and adapters together


@pytest.mark.parametrize("name", ["flux", "wan", "sd3"])
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_group_offloading_with_gradient_checkpointing_and_an_adapter(load, name, kind):
    gradients = []
    for offload in (None, "block_level", "leaf_level"):
        model = load(name, kind)
        torch.manual_seed(1)
        model.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False))
        model.enable_gradient_checkpointing()
        model.train()
        if offload:
            blocks = {"num_blocks_per_group": 1} if offload == "block_level" else {}
            model.enable_group_offload(
                onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type=offload, **blocks
            )
        model(**TINY[name].inputs(torch.float32), return_dict=False)[0].pow(2).mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    assert gradients[0].abs().max() > 0
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0])


def test_attention_processors_and_layerwise_casting(load):
    model = load("unet")
    expected = TINY["unet"].run(model)
    model.set_attn_processor(diffusers.models.attention_processor.AttnProcessor())
    torch.testing.assert_close(TINY["unet"].run(model), expected, rtol=1e-3, atol=1e-4)
    model.set_default_attn_processor()
    before = codes(model)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    TINY["unet"].run(model)
    assert all(torch.equal(value, before[key]) for key, value in codes(model).items())


@pytest.mark.parametrize("kind", ["int8", "codebook4"])
def test_a_file_of_safetensors_own_functions_loads_as_a_checkpoint(load, kind, tmp_path):
    model = load("flux", kind)
    safetensors.torch.save_model(model, tmp_path / "diffusion_pytorch_model.safetensors")
    model.save_config(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert all(torch.equal(value, codes(model)[key]) for key, value in codes(again).items())
    torch.testing.assert_close(TINY["flux"].run(again), TINY["flux"].run(model))

    described = json.loads((tmp_path / "config.json").read_text())
    tensors = described["quantization_config"]["tensors"]
    name = next(iter(tensors))
    tensors[name] += " activation=qint8"
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match=r"according to the file and .* according to config\.json"):
        type(model).from_pretrained(tmp_path)


# ---------------------------------------------------------------------- EMAModel


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("kind", [*KINDS, "codebook4"])
def test_ema_averages_adapters_and_copies_quantized_weights(load, kind, foreach):
    model = load("flux", kind)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    parameters = list(model.parameters())
    ema = EMAModel(parameters, foreach=foreach, decay=0.5)
    trained = [p for p in parameters if p.requires_grad]
    assert trained
    start = [p.detach().clone() for p in trained]
    for _ in range(3):
        with torch.no_grad():
            for parameter in trained:
                parameter.add_(1)
        ema.step(parameters)
    for shadow, parameter in zip(ema.shadow_params, parameters, strict=True):
        if isinstance(parameter, QTensor):
            assert torch.equal(shadow, parameter)
            assert shadow.data_ptr() != parameter.data_ptr()
    before = codes(model)
    ema.store(parameters)
    ema.copy_to(parameters)
    assert all(bool((p < first + 3).all()) for p, first in zip(trained, start))
    ema.restore(parameters)
    assert all(torch.allclose(p, first + 3) for p, first in zip(trained, start))
    assert all(torch.equal(value, before[key]) for key, value in codes(model).items())
    ema.to(dtype=torch.bfloat16)
    EMAModel(parameters).load_state_dict(ema.state_dict())


@pytest.mark.parametrize("name", ["flux", "unet"])
def test_ema_is_saved_and_loaded(load, name, tmp_path):
    model = load(name)
    ema = EMAModel(model.parameters(), model_cls=type(model), model_config=model.config, decay=0.9)
    with torch.no_grad():
        for parameter in model.parameters():
            if not isinstance(parameter, QTensor):
                parameter.add_(0.01)
    ema.step(model.parameters())
    ema.save_pretrained(tmp_path)
    again = EMAModel.from_pretrained(tmp_path, type(model))
    assert (again.decay, again.optimization_step) == (0.9, 1)
    for mine, theirs in zip(again.shadow_params, ema.shadow_params, strict=True):
        assert type(mine) is type(theirs) or not isinstance(theirs, QTensor)
        assert torch.equal(mine, theirs.detach())
