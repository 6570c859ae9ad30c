"""Ways into and out of a Diffusers model: shards, variants, device maps, single files, .bin, and what must be refused."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_diffusers import TINY, relative_error

import requanto
from requanto.checkpoint.format import CheckpointError, table_of
from requanto.integrations.conversion import true_bytes
from requanto.model.quantize import freeze, quantize
from requanto.report.inspect import inspect_directory

TINY_FLUX = TINY["flux"]
FLUX = TINY_FLUX.cls


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory with a float model in ``float`` and the same, int8, in ``int8``."""
    TINY_FLUX.make().save_pretrained(tmp_path / "float")
    _load(tmp_path / "float", "int8").save_pretrained(tmp_path / "int8")
    return tmp_path


def _load(path: Path, weights: str | None = None, **kwargs: Any) -> Any:
    config = None if weights is None else requanto.QuantoConfig(weights=weights)
    return FLUX.from_pretrained(path, quantization_config=config, **kwargs)


def _same(one: Any, two: Any) -> None:
    first, second = dict(one.named_parameters()), dict(two.named_parameters())
    assert table_of(first.items()) == table_of(second.items()) != {}
    for name, parameter in first.items():
        assert torch.equal(parameter, second[name]), name


def _edit_config(path: Path, change: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    change(config)
    (path / "config.json").write_text(json.dumps(config))


def test_the_built_in_config_runs_on_requanto_without_a_deprecation_warning(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        config = diffusers.QuantoConfig(weights_dtype="float8")
        model = FLUX.from_pretrained(folder / "float", quantization_config=config)
        ours = _load(folder / "float", "float8")
        ours.save_pretrained(folder / "again")
    assert type(model.hf_quantizer).__module__ == "requanto.integrations.diffusers"
    _same(model, ours)
    assert not any("optimum" in name for name in sys.modules if name.startswith("optimum.quanto"))


def test_without_diffusers_own_quanto_the_plugin_stands() -> None:
    program = (
        "import sys, diffusers.quantizers.auto as auto\n"
        "del auto.AUTO_QUANTIZER_MAPPING['quanto'], auto.AUTO_QUANTIZATION_CONFIG_MAPPING['quanto']\n"
        "import requanto\n"
        "assert auto.AUTO_QUANTIZER_MAPPING['quanto'].__module__ == 'requanto.integrations.diffusers'\n"
        "assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING['quanto'] is requanto.QuantoConfig\n"
        "import diffusers.quantizers.quanto as built_in\n"
        "assert not issubclass(auto.AUTO_QUANTIZER_MAPPING['quanto'], built_in.QuantoQuantizer)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_importing_requanto_does_not_import_diffusers() -> None:
    subprocess.run(
        [sys.executable, "-c", "import sys, requanto; assert 'diffusers' not in sys.modules"], check=True, timeout=120
    )


def test_sharded_files_with_a_weights_parts_in_different_ones(folder: Path) -> None:
    model = _load(folder / "float", "int4")
    model.save_pretrained(folder / "shards", max_shard_size=2000)
    index = json.loads((folder / "shards" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    where = index["weight_map"]
    split = [n for n in table_of(model.named_parameters()) if where[f"{n}_qdata"] != where[f"{n}_shift"]]
    assert split, "no weight is split between files: the test tests nothing"
    _same(FLUX.from_pretrained(folder / "shards"), model)
    # and sharded float files, quantized on the way in
    FLUX.from_pretrained(folder / "float").save_pretrained(folder / "float shards", max_shard_size="60KB")
    _same(_load(folder / "float shards", "int4"), model)


@pytest.mark.parametrize("weights", ["int3", "uint8", "nf4", "codebook3"])
def test_types_of_format_version_2(folder: Path, weights: str) -> None:
    config = requanto.QuantoConfig(weights=weights, column_scale=False)  # column scales make it version 3
    model = FLUX.from_pretrained(folder / "float", quantization_config=config)
    model.save_pretrained(folder / "new", max_shard_size=2000)
    config = json.loads((folder / "new" / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == 2
    _same(FLUX.from_pretrained(folder / "new"), model)
    assert inspect_directory(folder / "new").quantized_bytes > 0


def test_threads_may_read_the_shards(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _load(folder / "float", "int4")
    model.save_pretrained(folder / "shards", max_shard_size="20KB")
    monkeypatch.setattr("diffusers.models.modeling_utils.HF_ENABLE_PARALLEL_LOADING", True)
    _same(FLUX.from_pretrained(folder / "shards"), model)


def test_variant_and_bin(folder: Path) -> None:
    model = _load(folder / "int8")
    model.save_pretrained(folder / "v", variant="int8")
    assert (folder / "v" / "diffusion_pytorch_model.int8.safetensors").is_file()
    _same(FLUX.from_pretrained(folder / "v", variant="int8"), model)
    model.save_pretrained(folder / "bin", safe_serialization=False)
    _same(FLUX.from_pretrained(folder / "bin", use_safetensors=False), model)


@pytest.mark.parametrize("device_map", [{"": "cpu"}, "auto", "balanced"])
def test_device_maps(folder: Path, device_map: Any) -> None:
    model = _load(folder / "float", "int8", device_map=device_map)
    _same(model, _load(folder / "int8", device_map=device_map))
    assert relative_error(TINY_FLUX.run(model), TINY_FLUX.run(_load(folder / "float"))) < 0.01


def test_disk_in_a_device_map_is_refused(folder: Path) -> None:
    device_map = {"": "cpu", "proj_out": "disk"}
    for path, weights in (("float", "int8"), ("int8", None)):
        with pytest.raises(ValueError, match="enable_group_offload"):
            _load(folder / path, weights, device_map=device_map, offload_folder=folder / "offload")


def test_the_dtype_asked_for(folder: Path) -> None:
    for path, weights in (("float", "int4"), ("int8", None)):
        model = _load(folder / path, weights, torch_dtype=torch.bfloat16)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_memory_footprint_is_what_is_held(folder: Path) -> None:
    model = _load(folder / "float", "int4")
    held = sum(t.nbytes for p in model.parameters() for t in (
        p.inner_tensors().values() if isinstance(p, requanto.QTensor) else [p.data]
    ))  # fmt: skip
    buffers = sum(b.nbytes for b in model.buffers())
    assert model.get_memory_footprint() == held + buffers == true_bytes(model)
    assert model.get_memory_footprint(return_buffers=False) == held
    plain = _load(folder / "float")
    assert plain.get_memory_footprint() == sum(p.nbytes for p in plain.parameters()) + buffers


def test_inspect_shows_what_stayed_float(folder: Path) -> None:
    kinds = {weight.name: weight.dtype for weight in inspect_directory(folder / "int8").weights}
    assert kinds["transformer_blocks.0.attn.to_q.weight"] == "int8"
    assert kinds["proj_out.weight"] not in ("int8", "int4")
    assert inspect_directory(folder / "int8").total_bytes <= _load(folder / "int8").get_memory_footprint()


def test_single_file_on_the_fly(folder: Path) -> None:
    file = str(folder / "float" / "diffusion_pytorch_model.safetensors")
    for config in (requanto.QuantoConfig(weights="int4"), diffusers.QuantoConfig(weights_dtype="int4")):
        model = FLUX.from_single_file(file, config=str(folder / "float"), quantization_config=config)
        _same(model, _load(folder / "float", "int4"))
    model.save_pretrained(folder / "saved")
    _same(FLUX.from_pretrained(folder / "saved"), model)


def test_single_file_of_original_names(folder: Path) -> None:
    """A VAE with Stable Diffusion's own names, converted by the library and quantized on the way."""
    tiny = TINY["vae"]
    tiny.make().save_pretrained(folder / "vae")
    state = {f"first_stage_model.{k}": v for k, v in _original_vae(tiny.make().state_dict()).items()}
    save_file(state, folder / "original.safetensors")
    config = requanto.QuantoConfig(weights="int8")
    model = diffusers.AutoencoderKL.from_single_file(
        str(folder / "original.safetensors"), config=str(folder / "vae"), quantization_config=config
    )
    _same(model, tiny.cls.from_pretrained(folder / "vae", quantization_config=config))


def _original_vae(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = {
        "mid_block.resnets.0.": "mid.block_1.",
        "mid_block.resnets.1.": "mid.block_2.",
        "mid_block.attentions.0.group_norm": "mid.attn_1.norm",
        "mid_block.attentions.0.to_q": "mid.attn_1.q",
        "mid_block.attentions.0.to_k": "mid.attn_1.k",
        "mid_block.attentions.0.to_v": "mid.attn_1.v",
        "mid_block.attentions.0.to_out.0": "mid.attn_1.proj_out",
        "conv_norm_out": "norm_out",
        "conv_shortcut": "nin_shortcut",
        "downsamplers.0.": "downsample.",
        "upsamplers.0.": "upsample.",
        ".resnets.": ".block.",
        "down_blocks.": "down.",
        "up_blocks.0": "up.1",
        "up_blocks.1": "up.0",
    }
    converted = {}
    for name, value in state.items():
        new = name
        for ours, theirs in names.items():
            new = new.replace(ours, theirs)
        if ".attn_1." in new and new.endswith("weight") and value.dim() == 2:
            value = value[..., None, None]
        converted[new] = value.contiguous()
    return converted


def test_single_file_already_quantized(folder: Path) -> None:
    model = _load(folder / "int8")
    file = folder / "int8" / "diffusion_pytorch_model.safetensors"
    _same(FLUX.from_single_file(str(file), config=str(folder / "int8")), model)
    moved = shutil.copy(file, folder / "moved.safetensors")
    # whatever else is asked for, the file is what it is
    config = requanto.QuantoConfig(weights="int4")
    _same(FLUX.from_single_file(moved, config=str(folder / "int8"), quantization_config=config), model)
    _same(FLUX.from_single_file(load_file(file), config=str(folder / "int8")), model)
    with pytest.raises(CheckpointError, match=r"no config\.json that describes them"):
        FLUX.from_single_file(moved, config=str(folder / "float"))


def test_quantized_by_quantize_alone_then_saved(folder: Path) -> None:
    model = _load(folder / "float")
    quantize(model, weights="int4")
    with pytest.raises(ValueError, match="freeze"):
        model.save_pretrained(folder / "early")
    assert not (folder / "early").exists()
    freeze(model)
    out = TINY_FLUX.run(model)
    model.save_pretrained(folder / "mine")
    again = FLUX.from_pretrained(folder / "mine")
    _same(again, model)
    torch.testing.assert_close(TINY_FLUX.run(again), out, rtol=1e-4, atol=1e-4)
    again.dequantize()


def test_dequantize_leaves_a_plain_model(folder: Path) -> None:
    for model in (_load(folder / "int8"), _load(folder / "float", "int8")):
        out = TINY_FLUX.run(model)
        model.dequantize()
        assert not any(isinstance(p, requanto.QTensor) for p in model.parameters())
        torch.testing.assert_close(TINY_FLUX.run(model), out, rtol=1e-4, atol=1e-4)
        model.to(torch.bfloat16)  # refused on quantized models
        model.float().save_pretrained(folder / "plain")
        config = json.loads((folder / "plain" / "config.json").read_text())
        assert "quantization_config" not in config
        torch.testing.assert_close(TINY_FLUX.run(FLUX.from_pretrained(folder / "plain")), out, rtol=0.05, atol=0.05)


def test_a_process_that_is_not_the_main_one_writes_nothing(folder: Path) -> None:
    model = _load(folder / "int8")
    model.save_pretrained(folder / "two", is_main_process=False)
    assert not any((folder / "two").iterdir())
    model.save_pretrained(folder / "two")
    _same(FLUX.from_pretrained(folder / "two"), model)


def test_a_failed_save_leaves_the_old_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _load(folder / "float", "int4")
    before = {p.name: p.read_bytes() for p in (folder / "int8").iterdir()}

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(folder / "int8")
    assert {p.name: p.read_bytes() for p in (folder / "int8").iterdir()} == before
    assert sorted(os.listdir(folder)) == ["float", "int8"]
    monkeypatch.undo()
    model.save_pretrained(folder / "int8", max_shard_size="20KB")
    _same(FLUX.from_pretrained(folder / "int8"), model)


# ---------------------------------------------------------------------- refused


def test_nan_in_a_weight_names_it(folder: Path) -> None:
    file = folder / "float" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["transformer_blocks.0.attn.to_q.weight"][0, 0] = float("nan")
    save_file(state, file)
    with pytest.raises(ValueError, match=r"transformer_blocks\.0\.attn\.to_q\.weight holds NaN"):
        _load(folder / "float", "int8")


def test_a_name_that_matches_nothing(folder: Path) -> None:
    config = requanto.QuantoConfig(weights="int8", modules_to_not_convert=["proj_ouy"])
    with pytest.raises(ValueError, match=r"'proj_ouy' matches no module.*proj_out"):
        FLUX.from_pretrained(folder / "float", quantization_config=config)


def test_modules_to_not_convert_takes_names_parents_leaves_and_globs(folder: Path) -> None:
    for pattern, kept in (
        ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_q"),
        ("transformer_blocks.0", "transformer_blocks.0.ff.net.2"),
        ("to_q", "single_transformer_blocks.1.attn.to_q"),
        ("single_*.attn.*", "single_transformer_blocks.0.attn.to_v"),
    ):
        config = diffusers.QuantoConfig(weights_dtype="int8", modules_to_not_convert=[pattern])
        model = FLUX.from_pretrained(folder / "float", quantization_config=config)
        assert not isinstance(model.get_submodule(kept).weight, requanto.QTensor), pattern
        assert isinstance(model.single_transformer_blocks[0].proj_mlp.weight, requanto.QTensor), pattern
        assert not isinstance(model.proj_out.weight, requanto.QTensor), "the default skips stay"


def test_parts_missing_from_the_files(folder: Path) -> None:
    file = folder / "int8" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    del state["transformer_blocks.0.attn.to_q.weight_scale"]
    save_file(state, file)
    with pytest.raises(CheckpointError, match=r"to_q\.weight_scale is described .* not in the files"):
        _load(folder / "int8")


def test_codes_that_the_config_does_not_describe(folder: Path) -> None:
    name = "transformer_blocks.0.attn.to_q.weight"
    _edit_config(folder / "int8", lambda c: c["quantization_config"]["tensors"].pop(name))
    with pytest.raises(CheckpointError, match=r"to_q\.weight"):
        _load(folder / "int8")


def test_a_config_of_another_shape(folder: Path) -> None:
    name = "transformer_blocks.0.attn.to_q.weight"
    _edit_config(folder / "int8", lambda c: c["quantization_config"]["tensors"].update({name: "qint8 32x16"}))
    with pytest.raises(CheckpointError, match="do not belong together"):
        _load(folder / "int8")
    _edit_config(folder / "int8", lambda c: c["quantization_config"]["tensors"].update({name: "qint8 32x32"}))
    _edit_config(folder / "int8", lambda c: c.update(num_attention_heads=4))
    with pytest.raises((CheckpointError, ValueError), match="expect"):
        _load(folder / "int8")


def test_a_newer_or_foreign_format(folder: Path) -> None:
    _edit_config(folder / "int8", lambda c: c["quantization_config"].update(format_version=99))
    with pytest.raises(CheckpointError, match="99"):
        _load(folder / "int8")
    _edit_config(folder / "int8", lambda c: c.update(quantization_config={"quant_method": "quanto", "weights": "int8"}))
    with pytest.raises(CheckpointError, match="not written by Requanto"):
        _load(folder / "int8")


def test_a_checkpoint_of_another_backend(folder: Path) -> None:
    _edit_config(folder / "float", lambda c: c.update(quantization_config={"quant_method": "new"}))
    with pytest.raises(ValueError, match="quantized by 'new', a format that Requanto does not read"):
        _load(folder / "float", "int8")


def test_low_cpu_mem_usage_false_is_refused_by_the_library(folder: Path) -> None:
    with pytest.raises(ValueError, match="low_cpu_mem_usage"):
        _load(folder / "float", "int8", low_cpu_mem_usage=False)


def test_flashpack_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="use_flashpack"):
        _load(folder / "float", "int8", use_flashpack=True)
    with pytest.raises(ValueError, match="use_flashpack"):
        _load(folder / "int8").save_pretrained(folder / "flash", use_flashpack=True)


def test_a_model_with_nothing_to_quantize(tmp_path: Path) -> None:
    TINY["vae"].make().save_pretrained(tmp_path)
    config = requanto.QuantoConfig(weights="int8", modules_to_not_convert=["mid_block"])
    with pytest.raises(ValueError, match=r"nothing to quantize.*convolutions=True"):
        TINY["vae"].cls.from_pretrained(tmp_path, quantization_config=config)


def test_a_model_that_was_not_frozen_cannot_be_saved(folder: Path, tmp_path: Path) -> None:
    model = _load(folder / "float")
    quantize(model, weights="int8", activations="int8")
    with pytest.raises(ValueError, match=r"under quantization but still float: call requanto\.freeze"):
        model.save_pretrained(tmp_path / "mine")
    assert not (tmp_path / "mine").exists()
