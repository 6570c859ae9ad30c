"""Static activation scales in checkpoints: ours through both libraries, and optimum-quanto's, read and written."""

import json

import pytest
import torch
from quanto_process import run_oracle
from safetensors.torch import load_file, save_file
from tiny_models import TINY, output, save_tiny
from transformers import AutoModel

import requanto
from requanto.checkpoint.format import CheckpointError
from requanto.checkpoint.shards import SafetensorsFiles
from requanto.config.config import QuantoConfig
from requanto.nn import QActivation, QConv2d, QLayerNorm, QLinear
from requanto.tensor.qtensor import QTensor

CAUSAL = TINY["llama"].auto


def calibrated(name="llama", weights="int8", activations="int8", **arguments):
    """A frozen model with static scales, and what it computes."""
    model, inputs = TINY[name].build(), TINY[name].inputs()
    requanto.quantize(model, weights=weights, activations=activations, exclude="lm_head")
    with requanto.Calibration(**arguments):
        output(model, inputs)
    requanto.freeze(model)
    return model, output(model, inputs)


def same_state(one, two):
    first, second = one.state_dict(), two.state_dict()
    assert first.keys() == second.keys()
    assert any(key.endswith("input_scale") for key in first)
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


@pytest.mark.parametrize(
    ("name", "weights", "activations"),
    [("llama", "int8", "int8"), ("llama", "float8", "float8"), ("opt", "int4", "int8"), ("opt", None, "int8")],
)
def test_a_calibrated_model_is_saved_and_loaded_by_transformers(tmp_path, name, weights, activations):
    model, wanted = calibrated(name, weights, activations)
    model.save_pretrained(tmp_path)
    loaded = CAUSAL.from_pretrained(tmp_path)
    same_state(model, loaded)
    assert torch.equal(output(loaded, TINY[name].inputs()), wanted)
    static = [m for m in loaded.modules() if isinstance(m, QLinear)]
    assert static
    assert all(m.calibrated for m in static)
    assert any(isinstance(m, QLayerNorm) for m in loaded.modules()) == (name == "opt")
    loaded.save_pretrained(tmp_path / "again")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / file).read_bytes()


def test_a_model_loaded_with_a_config_is_calibrated_saved_and_loaded(tmp_path):
    save_tiny("llama", tmp_path / "float")
    config = QuantoConfig(weights="int4", activations="int8")
    model = CAUSAL.from_pretrained(tmp_path / "float", quantization_config=config)
    inputs, other = TINY["llama"].inputs(), {"input_ids": torch.randint(3, 160, (2, 9))}
    on_the_fly = output(model, other)
    with requanto.Calibration(observer="mse"):
        output(model, inputs)
    wanted = output(model, other)
    assert not torch.equal(wanted, on_the_fly)
    assert float((wanted - on_the_fly).norm() / on_the_fly.norm()) < 0.5
    model.save_pretrained(tmp_path / "static")
    loaded = CAUSAL.from_pretrained(tmp_path / "static")
    same_state(model, loaded)
    assert torch.equal(output(loaded, other), wanted)
    base = AutoModel.from_pretrained(
        tmp_path / "static"
    )  # the model without its head knows the modules by shorter names
    assert float(base.layers[0].mlp.up_proj.input_scale) == float(model.model.layers[0].mlp.up_proj.input_scale)
    loaded.dequantize()
    assert not any(isinstance(m, QLinear) for m in loaded.modules())
    assert type(loaded.model.layers[0].mlp.up_proj) is torch.nn.Linear


def test_a_weight_only_model_made_in_place_is_saved_too(tmp_path):
    model = TINY["llama"].build()
    requanto.quantize(model, weights="int4")
    with pytest.raises(ValueError, match=r"under quantization but still float: call requanto\.freeze"):
        model.save_pretrained(tmp_path)
    requanto.freeze(model)
    model.save_pretrained(tmp_path)
    loaded = CAUSAL.from_pretrained(tmp_path)
    assert isinstance(loaded.lm_head.weight, QTensor)
    assert torch.equal(output(loaded, TINY["llama"].inputs()), output(model, TINY["llama"].inputs()))


def tiny_unet():
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(32,), layers_per_block=1, norm_num_groups=8,
        down_block_types=("AttnDownBlock2D",), up_block_types=("AttnUpBlock2D",), attention_head_dim=8,
    ).eval()  # fmt: skip


def test_a_calibrated_model_is_saved_and_loaded_by_diffusers(tmp_path):
    unet, noise = tiny_unet(), torch.randn(1, 1, 8, 8)
    requanto.quantize(unet, weights="int8", activations="int8", exclude="conv_out")
    with requanto.Calibration(), torch.no_grad():
        unet(noise, 1)
    requanto.freeze(unet)
    wanted = unet(noise, 1).sample
    unet.save_pretrained(tmp_path)
    loaded = type(unet).from_pretrained(tmp_path)
    same_state(unet, loaded)
    assert any(isinstance(m, QConv2d) for m in loaded.modules())
    assert torch.equal(loaded(noise, 1).sample, wanted)
    loaded.save_pretrained(tmp_path / "again")
    same_state(unet, type(unet).from_pretrained(tmp_path / "again"))


def test_files_and_config_that_disagree_are_refused(tmp_path):
    calibrated()[0].save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    state = load_file(tmp_path / "model.safetensors")

    def write(activation_modules, tensors):
        stored = {**config["quantization_config"], "activation_modules": activation_modules}
        (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": stored}))
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})

    table = config["quantization_config"]["activation_modules"]
    scale = "model.layers.1.mlp.up_proj.input_scale"
    write(table, {key: value for key, value in state.items() if key != scale})
    with pytest.raises(CheckpointError, match=f"{scale} is not in the files"):
        CAUSAL.from_pretrained(tmp_path)
    write({name: kind for name, kind in table.items() if "layers.1.mlp.up" not in name}, state)
    with pytest.raises(CheckpointError, match=f"the files hold {scale}, which"):
        CAUSAL.from_pretrained(tmp_path)
    write({**table, "model.layers.1.mlp.act_fn": "qint8"}, state)
    with pytest.raises(CheckpointError, match=r"act_fn', a SiLU\w*, which has no quantized counterpart"):
        CAUSAL.from_pretrained(tmp_path)
    write({**table, "model.layers.1.mlp.up_proj": "qint4"}, state)
    with pytest.raises(CheckpointError, match=r"quantized to int8, float8.*found qint4"):
        CAUSAL.from_pretrained(tmp_path)
    write(table, {**state, scale: torch.tensor(float("nan"))})
    with pytest.raises(CheckpointError, match=r"an activation scale of .*up_proj is nan"):
        CAUSAL.from_pretrained(tmp_path)
    write(table, state)
    CAUSAL.from_pretrained(tmp_path)


# ---------------------------------------------------------------------- the real optimum-quanto


CASES = ["llama:qint8:qint8", "llama:qint4:qint8", "opt:qfloat8:qfloat8", "opt:qint8:qint8"]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    out = tmp_path_factory.mktemp("theirs")
    run_oracle("_quanto_oracle_static.py", "write", out, *CASES)
    return out


@pytest.mark.parametrize("case", CASES)
def test_its_static_checkpoint_loads_in_transformers_and_computes_the_same(theirs, tmp_path, case):
    name, theirs = case.split(":")[0], theirs / case.replace(":", "-")
    stored = SafetensorsFiles(theirs)
    qmap = json.loads((theirs / "quanto_qmap.json").read_text())
    loaded = CAUSAL.from_pretrained(theirs)
    for module, entry in qmap.items():
        found = loaded.get_submodule(module)
        assert found.activation_qtype.name == entry["activations"]
        assert torch.equal(found.output_scale, stored[f"{module}.output_scale"])
        if found.quantizes_input:
            assert torch.equal(found.input_scale, stored[f"{module}.input_scale"])
    inputs = TINY[name].inputs()
    wanted = torch.load(theirs / "logits.pt", weights_only=True)
    found = output(loaded, inputs)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5
    loaded.save_pretrained(tmp_path / "ours")
    again = CAUSAL.from_pretrained(tmp_path / "ours")
    same_state(loaded, again)
    assert torch.equal(output(again, inputs), found)


def test_it_loads_static_core_directories_that_requanto_wrote(tmp_path):
    tiny, written = TINY["llama"], {}
    for weights in ("int8", "int4"):
        directory = tmp_path / weights
        wrapped = requanto.QuantizedModelForCausalLM.quantize(
            tiny.build(), weights=weights, activations="int8", exclude="lm_head"
        )
        with pytest.raises(CheckpointError, match="no activations quantized on the fly"):
            wrapped.save_pretrained(directory)
        with requanto.Calibration(streamline=False):
            output(wrapped._wrapped, tiny.inputs())
        wrapped.save_pretrained(directory)
        written[directory] = output(wrapped._wrapped, tiny.inputs())
    run_oracle("_quanto_oracle_static.py", "load", "llama", *written)
    for directory, found in written.items():
        wanted = torch.load(directory / "logits.pt", weights_only=True)
        found = found.dequantize() if isinstance(found, QActivation) else found
        assert float((found - wanted).norm() / wanted.norm()) < 1e-5


def test_streamlined_activations_are_not_written_in_its_format(tmp_path):
    tiny = TINY["llama"]
    wrapped = requanto.QuantizedModelForCausalLM.quantize(tiny.build(), weights="int8", activations="int8")
    with requanto.Calibration():
        output(wrapped._wrapped, tiny.inputs())
    with pytest.raises(CheckpointError, match=r"cannot say that its output stays float.*streamline=False"):
        wrapped.save_pretrained(tmp_path / "core")
    assert not (tmp_path / "core").exists()
