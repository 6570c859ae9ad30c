"""Every architecture: load quantized, run, save, load without config, save again."""

from pathlib import Path

import pytest
import torch
from tiny_diffusers import TINY, Tiny, relative_error

import requanto
from requanto.checkpoint.format import table_of

#: Largest relative error of the output against the float model. Tiny random models: fewer weights average out.
TOLERANCE = {"int8": 0.01, "float8": 0.06, "int4": 0.12, "int2": 0.8}
BF16 = 0.02
WEIGHTS = "diffusion_pytorch_model.safetensors"


def _quantized_error(tiny: Tiny, folder: Path, dtype: torch.dtype, weights: str) -> float:
    config = requanto.QuantoConfig(weights=weights)
    model = tiny.cls.from_pretrained(folder / "float", torch_dtype=dtype, quantization_config=config)
    assert config.tensors == {}, "the user's config was written into"
    out = tiny.run(model, dtype)
    model.save_pretrained(folder / "one")
    again = tiny.cls.from_pretrained(folder / "one", torch_dtype=dtype)
    first, second = dict(model.named_parameters()), dict(again.named_parameters())
    assert table_of(first.items()) == table_of(second.items()) != {}
    for name, parameter in first.items():
        assert torch.equal(parameter, second[name]), name
    # The same weights at another place in memory may take another path through the CPU's vector units.
    torch.testing.assert_close(tiny.run(again, dtype), out, rtol=1e-4, atol=1e-4)
    again.save_pretrained(folder / "two")
    for file in (folder / "one").iterdir():
        # model_index and config name the directory a model came from; its weights must be the same bytes
        if file.name == WEIGHTS:
            assert file.read_bytes() == (folder / "two" / file.name).read_bytes()
    assert {f.name for f in (folder / "one").iterdir()} == {f.name for f in (folder / "two").iterdir()}
    float_model = tiny.cls.from_pretrained(folder / "float", torch_dtype=dtype)
    return relative_error(out, tiny.run(float_model, dtype))


@pytest.mark.parametrize("name", TINY)
def test_load_save_reload_save_again(name: str, tmp_path: Path) -> None:
    tiny = TINY[name]
    tiny.make().save_pretrained(tmp_path / "float")
    for dtype, extra in ((torch.float32, 0.0), (torch.bfloat16, BF16)):
        for weights, tolerance in TOLERANCE.items():
            error = _quantized_error(tiny, tmp_path, dtype, weights)
            assert 0 < error < tolerance + extra, (name, weights, dtype)


@pytest.mark.parametrize("name", ["unet", "vae"])
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_convolutions_on_request(name: str, weights: str, tmp_path: Path) -> None:
    tiny = TINY[name]
    model = tiny.make()
    expected = tiny.run(model)
    model.save_pretrained(tmp_path / "float")
    config = requanto.QuantoConfig(weights=weights, convolutions=True)
    quantized = tiny.cls.from_pretrained(tmp_path / "float", quantization_config=config)
    kinds = {n: m for n, m in quantized.named_modules() if isinstance(m, torch.nn.Conv2d)}
    done = [n for n, m in kinds.items() if isinstance(m.weight, requanto.QTensor)]
    assert done
    assert not [n for n in done if n.rpartition(".")[2] in ("conv_in", "conv_out")]
    error = relative_error(tiny.run(quantized), expected)
    assert 0 < error < {"int8": 0.05, "int4": 0.5}[weights]
    quantized.save_pretrained(tmp_path / "q")
    again = tiny.cls.from_pretrained(tmp_path / "q")
    torch.testing.assert_close(tiny.run(again), tiny.run(quantized), rtol=1e-4, atol=1e-4)
    assert again.get_memory_footprint() < 0.5 * model.get_memory_footprint()


#: per architecture: layers that must stay float by default, and one of a block that must not
SKIPPED = {
    "flux": ("x_embedder context_embedder time_text_embed.timestep_embedder.linear_1 norm_out.linear proj_out",
             "single_transformer_blocks.0.proj_out"),
    "sd3": ("context_embedder time_text_embed.text_embedder.linear_1 norm_out.linear proj_out",
            "transformer_blocks.0.attn.to_q"),
    "pixart": ("adaln_single.linear caption_projection.linear_1 proj_out", "transformer_blocks.0.attn1.to_q"),
    "unet": ("time_embedding.linear_1", "up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"),
    "hunyuandit": ("time_extra_emb.timestep_embedder.linear_1 text_embedder.linear_1 norm_out.linear proj_out",
                   "blocks.0.attn1.to_q"),
    "lumina2": ("x_embedder time_caption_embed.timestep_embedder.linear_1 norm_out.linear_1",
                "noise_refiner.0.attn.to_q"),
    "auraflow": ("context_embedder time_step_proj.linear_1 norm_out.linear proj_out",
                 "single_transformer_blocks.0.attn.to_q"),
    "latte": ("adaln_single.linear proj_out", "temporal_transformer_blocks.0.attn1.to_q"),
    "cogvideox": ("time_embedding.linear_1 patch_embed.text_proj norm_out.linear proj_out",
                  "transformer_blocks.0.norm1.linear"),
    "wan": ("condition_embedder.time_proj condition_embedder.text_embedder.linear_1 proj_out",
            "blocks.0.ffn.net.2"),
    "ltx": ("proj_in time_embed.linear caption_projection.linear_1 proj_out", "transformer_blocks.0.attn1.to_q"),
    "qwenimage": ("img_in txt_in time_text_embed.timestep_embedder.linear_1 norm_out.linear proj_out",
                  "transformer_blocks.0.img_mod.1"),
}  # fmt: skip


@pytest.mark.parametrize("name", SKIPPED)
def test_delicate_layers_stay_float_unless_asked_for(name: str, tmp_path: Path) -> None:
    tiny = TINY[name]
    tiny.make().save_pretrained(tmp_path)
    skipped, block = SKIPPED[name][0].split(), SKIPPED[name][1]

    def kinds(**options: object) -> dict[str, bool]:
        config = requanto.QuantoConfig(weights="int8", **options)  # type: ignore[arg-type]
        model = tiny.cls.from_pretrained(tmp_path, quantization_config=config)
        return {n: isinstance(model.get_submodule(n).weight, requanto.QTensor) for n in (*skipped, block)}

    assert kinds() == {**dict.fromkeys(skipped, False), block: True}
    # Wan itself keeps its time embedder in float32.
    assert kinds(default_skips=False) == dict.fromkeys((*skipped, block), True)
    assert kinds(modules={skipped[0]: "int4"})[skipped[0]]


def test_what_a_model_keeps_in_float32_stays_so(tmp_path: Path) -> None:
    """Wan's time embedder, even where nothing is skipped by default and everything else is bfloat16."""
    tiny = TINY["wan"]
    tiny.make().save_pretrained(tmp_path / "float")
    config = requanto.QuantoConfig(weights="int8", default_skips=False)
    model = tiny.cls.from_pretrained(tmp_path / "float", torch_dtype=torch.bfloat16, quantization_config=config)
    model.save_pretrained(tmp_path / "int8")
    for loaded in (model, tiny.cls.from_pretrained(tmp_path / "int8", torch_dtype=torch.bfloat16)):
        kept = loaded.condition_embedder.time_embedder.linear_1.weight
        assert not isinstance(kept, requanto.QTensor)
        assert kept.dtype == torch.float32
        assert isinstance(loaded.condition_embedder.time_proj.weight, requanto.QTensor)
