"""requanto compare on what draws: the digits model with a function, pipelines by directory, a pipeline in memory."""

import json
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from tiny_diffusers import run_pipeline, tiny_pipeline
from typer.testing import CliRunner

import requanto
from requanto.cli.app import app
from requanto.report import compare
from requanto.report.lockstep import Lockstep

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "digits_diffusion"


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_digits_by_directory_and_function(tmp_path):
    sys.path.insert(0, str(EXAMPLE))
    import sample

    sample.load("int4").save_pretrained(tmp_path / "int4")
    arguments = ["--run", f"{EXAMPLE}/sample.py:digits", "--seeds", 2, "--out", tmp_path / "out", "--json"]
    done = run("compare", EXAMPLE / "model", tmp_path / "int4", *arguments)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    images = [sample.digits(sample.load(kind), seed) for kind in (None, "int4") for seed in (0, 1)]
    expected = [sample.psnr(b, a) for a, b in zip(torch.cat(images[:2]), torch.cat(images[2:]))]
    assert found["summary"]["images"] == 20
    assert found["summary"]["psnr_mean"] == pytest.approx(sum(expected) / 20, abs=0.05)
    assert found["summary"]["psnr_min"] == pytest.approx(min(expected), abs=0.05)
    assert any(layer["output_error"] for layer in found["layers"])
    assert (tmp_path / "out" / "compare.png").stat().st_size > 10_000


def test_a_diffusion_model_alone_needs_a_function():
    with pytest.raises(ValueError, match=r"neither .* has a tokenizer.*run="):
        compare(EXAMPLE / "model", EXAMPLE / "model", progress=False)


def _unconditional() -> diffusers.DDIMPipeline:
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )
    return diffusers.DDIMPipeline(unet=unet.eval(), scheduler=diffusers.DDIMScheduler())


def test_pipelines_by_directory(tmp_path):
    _unconditional().save_pretrained(tmp_path / "float")
    quantized = _unconditional()
    requanto.quantize(quantized.unet, weights="int8")
    requanto.freeze(quantized.unet)
    quantized.save_pretrained(tmp_path / "int8")
    found = compare(tmp_path / "float", tmp_path / "int8", seeds=3, steps=2, progress=False)
    assert found.kind == "pipeline"
    assert found.summary["images"] == 3 == len(found.images)
    assert 20 < found.summary["psnr_min"] < 200
    assert any(layer.name.startswith("unet.") and layer.type_b == "int8" for layer in found.layers)
    found.plot(tmp_path / "out" / "grid.png")
    with pytest.raises(ValueError, match="takes no prompt"):
        compare(tmp_path / "float", tmp_path / "int8", prompts=["a cat"], progress=False)


def _with_text(folder: Path, dtype: torch.dtype) -> diffusers.StableDiffusionPipeline:
    """A pipeline of parts of both libraries, with a tokenizer of letters."""
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    torch.manual_seed(0)
    ends = {"bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53}
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    return diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
        ),
        text_encoder=transformers.CLIPTextModel(transformers.CLIPTextConfig(vocab_size=len(words), **sizes, **ends)),
        tokenizer=transformers.CLIPTokenizer(
            str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77
        ),
        unet=diffusers.UNet2DConditionModel(
            block_out_channels=(8, 16),
            layers_per_block=1,
            sample_size=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=4,
            norm_num_groups=4,
        ),
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_pipeline_runs_in_the_dtype_that_it_is_stored_in(dtype, tmp_path, monkeypatch):
    """Diffusers alone loads its models in float32 beside a text encoder in the stored dtype, and the run fails."""
    pipe = _with_text(tmp_path / "tokenizer", dtype)
    pipe.save_pretrained(tmp_path / "float")
    requanto.quantize(pipe.unet, weights="int8", progress=False)
    requanto.freeze(pipe.unet)
    pipe.save_pretrained(tmp_path / "int8")
    dtypes = set()
    monkeypatch.setattr(Lockstep, "run", _observed(Lockstep.run, dtypes))
    arguments = ["--prompt", "a", "--seeds", 1, "--steps", 1, "--json", "--out", tmp_path / "out"]
    done = run("compare", tmp_path / "float", tmp_path / "int8", *arguments)
    assert done.exit_code == 0, done.output
    assert 20 < json.loads(done.stdout)["summary"]["psnr_mean"] < 100
    assert dtypes == {dtype}
    done = run("compare", tmp_path / "float", tmp_path / "int8", "--seeds", 1)
    assert (done.exit_code, done.stdout) == (1, "")
    assert "needs a prompt" in done.stderr


def _observed(original: Any, dtypes: set[torch.dtype]) -> Any:
    def lockstep_run(self: Any, first: Any, second: Any) -> Any:
        dtypes.update(one.weight.dtype for pair in self.pairs.values() for one in pair)
        return original(self, first, second)

    return lockstep_run


def test_a_pipeline_with_prompts_asks_for_one_and_runs_by_function():
    a, b = tiny_pipeline(), tiny_pipeline()
    requanto.quantize(b.transformer, weights="int8")
    requanto.freeze(b.transformer)
    with pytest.raises(ValueError, match="none is given: prompts="):
        compare(a, b, progress=False)
    found = compare(a, b, run=lambda pipe, seed: run_pipeline(pipe), seeds=1, progress=False)
    assert 10 < found.summary["psnr_mean"] < 100
    assert any(x.name.startswith("transformer.") and x.output_error for x in found.layers)
