"""Directories that optimum-quanto wrote, both kinds, through the libraries' own `from_pretrained`."""

import json

import pytest
import torch
from tiny_models import TINY, output

import requanto  # noqa: F401  (hooks in)
from requanto.checkpoint.foreign.quanto_directory import convert_quanto_directory, is_quanto_directory
from requanto.checkpoint.format import CheckpointError
from requanto.checkpoint.shards import SafetensorsFiles, save_shards
from requanto.integrations import optimum_quanto as compat
from requanto.integrations.optimum_quanto import models
from requanto.report.inspect import inspect_directory
from requanto.tensor.qtensor import QTensor


@pytest.fixture(params=["int8", "int4", "int2", "float8"])
def core(request, tmp_path):
    """A core directory as optimum-quanto writes it, and what the model computes."""
    directory = tmp_path / "core"
    wrapped = models.QuantizedTransformersModel.quantize(TINY["llama"].build(), weights=request.param)
    wrapped.save_pretrained(directory)
    return directory, output(wrapped._wrapped, TINY["llama"].inputs())


def test_a_core_directory_loads_in_transformers_and_saves_as_ours(core, tmp_path):
    directory, wanted = core
    auto, inputs = TINY["llama"].auto, TINY["llama"].inputs()
    before = sorted(path.name for path in directory.iterdir())
    model = auto.from_pretrained(directory)
    assert sorted(path.name for path in directory.iterdir()) == before
    assert isinstance(model.model.layers[0].mlp.up_proj.weight, QTensor)
    assert torch.equal(output(model, inputs), wanted)
    model.save_pretrained(tmp_path / "ours")
    assert not is_quanto_directory(tmp_path / "ours")
    assert torch.equal(output(auto.from_pretrained(tmp_path / "ours"), inputs), wanted)
    assert torch.equal(output(type(model).from_pretrained(directory), inputs), wanted)


def test_inspect_tells_the_weights_of_a_core_directory(core, tmp_path):
    directory, _output = core
    convert_quanto_directory(directory, tmp_path / "ours")
    report, ours = inspect_directory(directory), inspect_directory(tmp_path / "ours")
    assert report.format == "optimum-quanto"
    assert not report.would_take
    seen, wanted = (
        [(w.name, w.dtype, w.shape, w.group_size) for w in one.weights if w.name.endswith("weight")]
        for one in (report, ours)
    )
    assert seen == wanted
    assert report.quantized_bytes == ours.quantized_bytes > 0


@pytest.mark.parametrize("kind", ["core", "diffusers"])
@pytest.mark.parametrize("subfolder", [None, "unet"])
def test_a_diffusers_directory_of_either_kind_loads_in_diffusers(tmp_path, kind, subfolder):
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(32,), layers_per_block=1, norm_num_groups=8,
        down_block_types=("AttnDownBlock2D",), up_block_types=("AttnUpBlock2D",), attention_head_dim=8,
    )  # fmt: skip
    include = ["*to_*", "*time_embedding*"]  # Diffusers' integration quantizes linear layers only
    wrapped = models.QuantizedDiffusersModel.quantize(unet, weights="int8", include=include)
    noise = torch.randn(1, 1, 8, 8)
    wanted = wrapped(noise, 1).sample
    directory = tmp_path / subfolder if subfolder else tmp_path / "model"
    wrapped.save_pretrained(directory)
    if kind == "diffusers":
        (directory / "quanto_qmap.json").unlink()
        config = json.loads((directory / "config.json").read_text())
        config["quantization_config"] = {
            "quant_method": "quanto", "weights_dtype": "int8", "modules_to_not_convert": None,
        }  # fmt: skip
        (directory / "config.json").write_text(json.dumps(config))
    root = {"pretrained_model_name_or_path": tmp_path, "subfolder": subfolder} if subfolder else {}
    model = UNet2DModel.from_pretrained(**root) if root else UNet2DModel.from_pretrained(directory)
    assert isinstance(model.time_embedding.linear_1.weight, QTensor)
    assert torch.equal(model.time_embedding.linear_1.weight, wrapped.time_embedding.linear_1.weight)
    torch.testing.assert_close(model(noise, 1).sample, wanted)


def test_a_map_that_disagrees_with_its_tensors_is_refused(core, tmp_path):
    directory, _ = core
    map_file = directory / "quanto_qmap.json"
    qmap = json.loads(map_file.read_text())
    name, entry = qmap.popitem()
    map_file.write_text(json.dumps(qmap))
    with pytest.raises(CheckpointError, match=f"{name}.weight is quantized in its tensors, not in its map"):
        TINY["llama"].auto.from_pretrained(directory)
    other = "qint4" if entry["weights"] == "qint8" else "qint8"
    map_file.write_text(json.dumps({**qmap, name: {"weights": other, "activations": "none"}}))
    with pytest.raises(CheckpointError, match=f"{name}.weight is {other} according to the map|expected"):
        TINY["llama"].auto.from_pretrained(directory)


def test_a_map_that_says_static_activations_without_their_scales_is_refused(tmp_path):
    model = TINY["llama"].build()
    compat.quantize(model, weights="int8", activations="int8", include="*mlp*")
    compat.freeze(model)
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(tmp_path)
    name = "model.layers.0.mlp.up_proj"
    save_shards({key: value for key, value in model.state_dict().items() if key != f"{name}.input_scale"}, tmp_path)
    (tmp_path / "quanto_qmap.json").write_text(json.dumps(compat.quantization_map(model)))
    with pytest.raises(CheckpointError, match=f"lacks {name}.input_scale"):
        convert_quanto_directory(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_shards_are_read_one_tensor_at_a_time(tmp_path):
    state = {f"t{i}": torch.full((1000,), float(i)) for i in range(6)}
    assert len(save_shards(state, tmp_path, max_shard_size="9KB")) == 4  # three shards and the index
    files = SafetensorsFiles(tmp_path)
    assert list(files) == list(state)
    assert all(torch.equal(files[name], state[name]) for name in state)
    with pytest.raises(CheckpointError, match="holds neither"):
        SafetensorsFiles(tmp_path, "other")
