"""The rows of formats.py: a checkpoint in a format, what writes it, and which libraries are asked to open it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """A checkpoint.

    Attributes:
        name: short name, of its folder too.
        format: the format, for counting.
        label: which variant of it.
        writer: MODULE.FUNCTION of the package formats_writers.
        setting: its keywords. "GGUFS/" stands for the folder of `formats_bases.ggufs`.
        base: the float model, one of `formats_bases.BASES`.
        peers: libraries that may open it, the format's own first (`formats_peer.OPENERS`).
    """

    name: str
    format: str
    label: str
    writer: str
    setting: Mapping[str, Any] = field(default_factory=dict)
    base: str = "smollm2"
    peers: tuple[str, ...] = ()


def _compressed(scheme: str, label: str, writer: str = "compressed.write", **setting: Any) -> Row:
    setting = setting or {"scheme": scheme}
    return Row(f"ct-{scheme}", "compressed-tensors", label, writer, setting, peers=("compressed-tensors",))


def _gguf(kind: str, label: str, base: str = "smollm2", **setting: Any) -> Row:
    writer = "ggufs.real" if "file" in setting else "ggufs.k_quants" if base == "tiny-llama" else "ggufs.requantized"
    setting = setting or {"kind": kind}
    return Row(f"gguf-{kind.lower()}", "GGUF", label, writer, setting, base, ("llama.cpp", "gguf"))


def _words(name: str, label: str, writer: str, **setting: Any) -> Row:
    kind = {"gptq": "GPTQ", "awq": "AWQ"}[writer.split(".")[1]]
    return Row(name, kind, label, writer, setting, peers=("gptqmodel", "auto-round"))


def _library(name: str, format_: str, label: str, peer: str, writer: str, **setting: Any) -> Row:
    return Row(name, format_, label, writer, setting, peers=(peer,))


ROWS: tuple[Row, ...] = (
    _compressed("int4", "int4, g64"),
    _compressed("int4_asymmetric", "int4, g64, zero points"),
    _compressed("int4_order", "int4, g64, act-order", "words.compressed_order", group=64),
    _compressed("w8a8", "int8, W8A8"),
    _compressed("fp8", "fp8, dynamic"),
    _compressed("nvfp4", "nvfp4"),
    _compressed("mxfp4", "mxfp4"),
    Row("fp8-blocks", "FP8 128x128", "e4m3", "floats.fp8_blocks", base="causal", peers=("transformers",)),
    Row("fbgemm", "FBGEMM fp8", "e4m3 by rows", "floats.fbgemm", peers=("transformers",)),
    _words("gptq-v1", "4 bits, g64, v1, symmetric", "words.gptq", sym=True),
    _words("gptq-v2", "3 bits, g64, v2", "words.gptq", bits=3, v2=True),
    _words("gptq-order", "4 bits, g64, v1, desc_act", "words.gptq", act_order=True, sym=True),
    _words("awq", "4 bits, g64", "words.awq"),
    Row("auto-round", "AutoRound", "4 bits, g64", "words.auto_round", peers=("auto-round",)),
    _gguf("Q4_0", "Q4_0"),
    _gguf("Q4_1", "Q4_1, SmolLM2 as published", file="GGUFS/smollm2-Q4_1.gguf"),
    _gguf("Q5_0", "Q5_0"),
    _gguf("Q5_1", "Q5_1"),
    _gguf("Q8_0", "Q8_0"),
    *(_gguf(f"Q{n}_K", f"Q{n}_K", "tiny-llama") for n in (2, 3, 4, 5, 6)),
    _gguf("Q4_K_M", "Q4_K_M, Gemma-3-270M as published", "gemma", file="GGUFS/gemma3-270m-Q4_K_M.gguf"),
    Row(
        "gguf-diffusers",
        "GGUF",
        "Q4_0, single file of a diffusion model",
        "denoisers.gguf",
        {},
        "tiny-zimage",
        ("diffusers",),
    ),
    _library("bnb-nf4", "bitsandbytes", "nf4", "bitsandbytes", "blocks.bitsandbytes"),
    _library("bnb-nf4-double", "bitsandbytes", "nf4, double", "bitsandbytes", "blocks.bitsandbytes", double=True),
    _library("bnb-fp4", "bitsandbytes", "fp4", "bitsandbytes", "blocks.bitsandbytes", kind="fp4"),
    _library("bnb-int8", "bitsandbytes", "int8", "bitsandbytes", "blocks.bitsandbytes", bits=8),
    Row("gpt-oss", "gpt-oss MXFP4", "experts, mxfp4", "floats.gpt_oss", base="tiny-gpt-oss", peers=("transformers",)),
    _library("modelopt-nvfp4", "ModelOpt", "nvfp4", "modelopt", "floats.modelopt"),
    _library("modelopt-fp8", "ModelOpt", "fp8, static inputs", "modelopt", "floats.modelopt", kind="fp8"),
    _library("torchao-int4", "torchao", "int4, g64", "torchao", "blocks.torchao_int4"),
    _library("torchao-int8", "torchao", "int8", "torchao", "blocks.torchao", kind="int8"),
    _library("torchao-fp8", "torchao", "fp8", "torchao", "blocks.torchao", kind="float8"),
    _library("hqq", "HQQ", "4 bits, g64", "hqq", "blocks.hqq"),
    _library("sdnq", "SDNQ", "uint4", "sdnq", "blocks.sdnq"),
    _library("mlx", "MLX", "4 bits, g64", "mlx-lm", "blocks.mlx"),
    Row(
        "nunchaku", "Nunchaku", "SVDQuant int4, tiny Flux", "denoisers.nunchaku", base="tiny-flux", peers=("diffusers",)
    ),
    Row("gemma-qat", "Gemma QAT", "int4 and int2", "floats.gemma", base="tiny-gemma", peers=("transformers",)),
    Row("comfyui", "ComfyUI", "scaled fp8, single file", "denoisers.comfyui", base="tiny-zimage", peers=("diffusers",)),
    _library("quanto", "optimum-quanto", "qint4, g128", "optimum-quanto", "blocks.optimum_quanto"),
)
