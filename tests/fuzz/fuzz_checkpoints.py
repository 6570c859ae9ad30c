"""The undamaged checkpoints that the harness mutates: every stored form, writer and reader, each from a tiny model.

case = CASES["int4"]
case.build(directory)
seen = case.load(directory)          # what the loaded model holds and computes, as digests
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers as tf
from made_weights import with_foreign_weights
from tiny_diffusers import TINY as DIFFUSERS
from tiny_models import TINY as TRANSFORMERS
from tiny_models import output

import requanto
from requanto import Calibration, QTensor, QuantoConfig
from requanto.checkpoint import flatten
from requanto.checkpoint.shards import SafetensorsFiles, save_shards
from requanto.integrations.optimum_quanto import models as quanto_models


class NotOurs(Exception):
    """What a program reads by itself, before it calls Requanto, could not be read."""


@dataclass(frozen=True)
class Case:
    """One checkpoint.

    Attributes:
        build: writes it into a directory.
        load: loads it and returns what was loaded (see `seen`).
    """

    build: Callable[[Path], None]
    load: Callable[[Path], dict[str, str]]


def digest(tensor: torch.Tensor) -> str:
    """A digest of the bits of a tensor."""
    plain = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(plain.numpy().tobytes()).hexdigest()[:16]


def seen(model: Any, answer: torch.Tensor) -> dict[str, str]:
    """Digests of all that a model holds, and numbers of its answer; keys start with ``q:`` (quantized), ``f:`` (float) "
    "or are ``answer``."""
    found = {"answer": " ".join(f"{value:.6g}" for value in answer.float().flatten()[:200].tolist())}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        if isinstance(tensor, QTensor):
            text = tensor._spec.text(tensor.rank)
            parts = [f"{part}={digest(value)}" for part, value in sorted(tensor.inner_tensors().items())]
            found[f"q:{name}"] = " ".join([text, *parts])
        elif name.endswith(("input_scale", "output_scale")):
            found[f"q:{name}"] = digest(tensor)
        else:
            found[f"f:{name}"] = digest(tensor)
    return found


# ------------------------------------------------------------------ Transformers


def _small(name: str) -> Any:
    """The tiny model of that name with one layer, where its config has layers."""
    tiny = TRANSFORMERS[name]
    config = tiny.config()
    for key in ("num_hidden_layers", "n_layer"):
        if hasattr(config, key):
            setattr(config, key, 1)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tiny.auto.from_config(config).eval()


def transformers_case(
    name: str, shard: str = "5GB", calibrate: bool = False, foreign: bool = False, **options: Any
) -> Case:
    """A model that Transformers quantizes, saves and loads; ``foreign``: with weights as other programs make them."""
    tiny = TRANSFORMERS[name]

    def build(directory: Path) -> None:
        model = _small(name)
        if calibrate:
            requanto.quantize(model, weights=options["weights"], activations="int8")
            with torch.no_grad(), Calibration():
                model(**tiny.inputs())
            requanto.freeze(model)
        else:
            model.save_pretrained(directory / "float")
            model = tiny.auto.from_pretrained(directory / "float", quantization_config=QuantoConfig(**options))
        model = with_foreign_weights(model) if foreign else model
        model.save_pretrained(directory / "model", max_shard_size=shard)

    def load(directory: Path) -> dict[str, str]:
        model = tiny.auto.from_pretrained(directory).eval()
        return seen(model, output(model, tiny.inputs()))

    return Case(build, load)


# ------------------------------------------------------------------ Diffusers


def diffusers_case(name: str, shard: str = "5GB", calibrate: bool = False, **options: Any) -> Case:
    """A model that Diffusers quantizes, saves and loads."""
    tiny = DIFFUSERS[name]

    def build(directory: Path) -> None:
        model = tiny.make()
        if calibrate:
            requanto.quantize(model, weights=options["weights"], activations="int8")
            with torch.no_grad(), Calibration():
                tiny.run(model)
            requanto.freeze(model)
        else:
            model.save_pretrained(directory / "float")
            model = tiny.cls.from_pretrained(directory / "float", quantization_config=QuantoConfig(**options))
        model.save_pretrained(directory / "model", max_shard_size=shard)

    def load(directory: Path) -> dict[str, str]:
        model = tiny.cls.from_pretrained(directory).eval()
        return seen(model, tiny.run(model))

    return Case(build, load)


def single_file_case(name: str, **options: Any) -> Case:
    """A model that Diffusers loads from one file with the config beside it."""
    made = diffusers_case(name, **options)
    tiny = DIFFUSERS[name]

    def load(directory: Path) -> dict[str, str]:
        file = directory / "diffusion_pytorch_model.safetensors"
        model = tiny.cls.from_single_file(str(file), config=str(directory)).eval()
        return seen(model, tiny.run(model))

    return Case(made.build, load)


# ------------------------------------------------------------------ optimum-quanto's directories


def quanto_case(wrapper: bool = False, **options: Any) -> Case:
    """A directory in optimum-quanto's form, read by Transformers or by optimum-quanto's class."""
    tiny = TRANSFORMERS["llama"]

    def build(directory: Path) -> None:
        quanto_models.QuantizedTransformersModel.quantize(_small("llama"), **options).save_pretrained(
            directory / "model"
        )

    def load(directory: Path) -> dict[str, str]:
        if wrapper:
            model = quanto_models.QuantizedModelForCausalLM.from_pretrained(directory)._wrapped
        else:
            model = tiny.auto.from_pretrained(directory).eval()
        return seen(model, output(model, tiny.inputs()))

    return Case(build, load)


def quanto_unet(diffusers_form: bool) -> Case:
    """optimum-quanto's own directory of a UNet, or the one that Diffusers writes with optimum-quanto."""

    def make() -> Any:
        torch.manual_seed(0)
        return diffusers.UNet2DModel(
            sample_size=8, in_channels=1, out_channels=1, block_out_channels=(32,), layers_per_block=1, norm_num_groups=8,
            down_block_types=("AttnDownBlock2D",), up_block_types=("AttnUpBlock2D",), attention_head_dim=8,
        )  # fmt: skip

    def build(directory: Path) -> None:
        include = ["*to_*", "*time_embedding*"]
        wrapped = quanto_models.QuantizedDiffusersModel.quantize(make(), weights="int8", include=include)
        target = directory / "model"
        wrapped.save_pretrained(target)
        if diffusers_form:
            (target / "quanto_qmap.json").unlink()
            config = json.loads((target / "config.json").read_text())
            config["quantization_config"] = {
                "quant_method": "quanto", "weights_dtype": "int8", "modules_to_not_convert": None,
            }  # fmt: skip
            (target / "config.json").write_text(json.dumps(config))

    @torch.no_grad()
    def load(directory: Path) -> dict[str, str]:
        model = diffusers.UNet2DModel.from_pretrained(directory).eval()
        return seen(model, model(torch.ones(1, 1, 8, 8), 1).sample)

    return Case(build, load)


# ------------------------------------------------------------------ own writers


def requantize_case(pickled: bool = False, **options: Any) -> Case:
    """Flat tensors and a map, or a pickled state dict, read by `requanto.requantize`."""
    inputs = TRANSFORMERS["llama"].inputs()

    def build(directory: Path) -> None:
        target = directory / "model"
        model = _small("llama")
        model.config.save_pretrained(target)
        requanto.quantize(model, exclude="lm_head", **options)
        requanto.freeze(model)
        (target / "map.json").write_text(json.dumps(requanto.quantization_map(model, digests=True)))
        if pickled:
            torch.save(model.state_dict(), target / "state.pt")
        else:
            save_shards(flatten(dict(model.state_dict())), target)

    def load(directory: Path) -> dict[str, str]:
        try:
            model = tf.AutoModelForCausalLM.from_config(tf.AutoConfig.from_pretrained(directory)).eval()
            types = json.loads((directory / "map.json").read_text())
            state = torch.load(directory / "state.pt", weights_only=True) if pickled else None
        except Exception as error:
            raise NotOurs(repr(error)) from error
        requanto.requantize(model, SafetensorsFiles(directory) if state is None else state, types)
        return seen(model, output(model, inputs))

    return Case(build, load)


#: every checkpoint by its name
CASES: dict[str, Case] = {
    "int2": transformers_case("llama", weights="int2"),
    "int3": transformers_case("llama", weights="int3"),
    "int4": transformers_case("llama", weights="int4"),
    "int4-symmetric": transformers_case("llama", weights="int4", symmetric=True, group_size=32),
    "int4-activations": transformers_case("llama", weights="int4", activations="int8"),
    "int5": transformers_case("llama", weights="int5"),
    "int6": transformers_case("llama", weights="int6"),
    "int7": transformers_case("llama", weights="int7"),
    "int8": transformers_case("llama", weights="int8"),
    "uint8": transformers_case("llama", weights="uint8"),
    "float8": transformers_case("llama", weights="float8"),
    "float8-e5m2": transformers_case("llama", weights="float8_e5m2"),
    "nf4": transformers_case("llama", weights="nf4"),
    "fp6": transformers_case("llama", weights="fp6_e3m2"),
    "codebook4": transformers_case("llama", weights="codebook4"),
    "scale-bits": transformers_case("llama", weights="int4", scale_bits=6, group_size=16),
    "scale-bits-nf4": transformers_case("llama", weights="nf4", scale_bits=8, group_size=16),
    "rotation": transformers_case("llama", weights="int4", rotation=32),
    "foreign": transformers_case("llama", weights="int4", foreign=True),
    "low-rank": transformers_case("llama", weights="int4", low_rank=4),
    "shards": transformers_case("llama", weights="int4", shard="20KB"),
    "tied": transformers_case("llama-tied", weights="int8", embeddings=True, lm_head=True),
    "gpt2": transformers_case("gpt2", weights="int4"),
    "experts": transformers_case("mixtral", weights="int4"),
    "static": transformers_case("opt", weights="int8", calibrate=True),
    "unet": diffusers_case("unet", weights="int8", convolutions=True),
    "sd3-shards": diffusers_case("sd3", weights="int4", shard="60KB"),
    "pixart": diffusers_case("pixart", weights="nf4", low_rank=2),
    "unet-static": diffusers_case("unet", weights="int8", calibrate=True),
    "single-file": single_file_case("sd3", weights="int4"),
    "quanto-int8": quanto_case(weights="int8"),
    "quanto-int4": quanto_case(weights="int4"),
    "quanto-wrapper": quanto_case(wrapper=True, weights="int4"),
    "quanto-unet": quanto_unet(diffusers_form=False),
    "quanto-diffusers": quanto_unet(diffusers_form=True),
    "map": requantize_case(weights="int4"),
    "pickle": requantize_case(weights="int8", pickled=True),
}


def build_all(directory: Path, names: list[str] | None = None) -> dict[str, dict[str, str]]:
    """Builds the checkpoints under ``directory`` (``NAME/model``); returns what each loads as, undamaged."""
    wanted = {}
    for name in names or list(CASES):
        place = directory / name
        if not (place / "model").is_dir():
            os.makedirs(place, exist_ok=True)
            CASES[name].build(place)
        wanted[name] = copy.copy(CASES[name].load(place / "model"))
    return wanted
