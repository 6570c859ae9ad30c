"""Quantizes Linear layers with each library of accuracy.py: one function for each library, using its public API.

A function takes the model, the layers by name, the material (``path`` of the model, ``samples`` for methods that need them)
and the library's settings, and yields for each layer the dequantized weight and the bytes that the library stores.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LayerResult:
    """A quantized layer.

    Attributes:
        weight: dequantized, ``[N, K]``.
        stored: bytes of all tensors that the library stores for it.
        counted: the same with codes at their own width, for libraries that store a 4-bit code in a whole byte.
    """

    weight: Tensor
    stored: float
    counted: float


Results = Iterator[tuple[str, LayerResult]]
Layers = Mapping[str, nn.Linear]
#: package names of the libraries
PACKAGES = {"autoround": "auto-round", "llama.cpp": "libgguf"}


def version_of(library: str) -> str:
    """The version of the installed package; torch's for the float row."""
    if library == "float":
        return f"torch {torch.__version__}"
    try:
        return version(PACKAGES.get(library, library))
    except PackageNotFoundError:
        module = __import__(PACKAGES.get(library, library).replace("-", "_"))  # some wheels have no metadata
        return str(getattr(module, "__version__", "unknown"))


def nbytes(*tensors: Tensor) -> int:
    """The bytes of all tensors together."""
    return sum(t.numel() * t.element_size() for t in tensors)


def alone(layer: nn.Linear) -> nn.Sequential:
    """A model that consists of a copy of the layer, for libraries that quantize models."""
    return nn.Sequential(copy.deepcopy(layer))


def float_weights(model: nn.Module, layers: Layers, material: Any) -> Results:
    """Nothing is quantized."""
    for name, layer in layers.items():
        yield name, LayerResult(layer.weight, layer.weight.nbytes, layer.weight.nbytes)


def requanto(model: Any, layers: Layers, material: Any, **setting: Any) -> Results:
    """``requanto.quantize`` in place; with the samples if the setting says ``calibration``."""
    import requanto as library

    if setting.pop("calibration", False):
        setting |= {"calibration": material["samples"], "progress": False}
    others = [name for name, module in model.named_modules() if hasattr(module, "weight") and name not in layers]
    library.quantize(model, exclude=others, **setting)
    library.freeze(model)
    for name, layer in layers.items():
        weight: Any = layer.weight
        # As in a checkpoint: after a run, int4 weights may be prepacked.
        stored = nbytes(*weight.inner_tensors().values())
        yield name, LayerResult(weight.dequantize(), stored, stored)


def optimum_quanto(model: nn.Module, layers: Layers, material: Any, **setting: Any) -> Results:
    """``quantize`` and ``freeze``. The library chooses groups of 128, or smaller ones that divide a row."""
    from optimum.quanto import freeze, quantize

    for name, layer in layers.items():
        own = alone(layer)
        quantize(own, **setting)
        freeze(own)
        weight: Any = own[0].weight
        parts = [getattr(weight, part) for part in weight.__tensor_flatten__()[0]]
        parts = [getattr(part, "_data", part) for part in parts]  # a packed tensor contains another tensor
        yield name, LayerResult(weight.dequantize(), nbytes(*parts), nbytes(*parts))


def torchao(model: nn.Module, layers: Layers, material: Any, config: str, **setting: Any) -> Results:
    """``quantize_``. On a CPU few-bit codes take a byte each; symmetric mappings store zero points that are all 0."""
    from torchao import quantization
    from torchao.quantization.granularity import PerGroup
    from torchao.quantization.quant_primitives import MappingType
    from torchao.quantization.quantize_.workflows import IntxChooseQParamsAlgorithm

    bits = setting.pop("bits", 8)
    if config == "IntxWeightOnlyConfig":
        setting |= {"weight_dtype": getattr(torch, f"int{bits}"), "granularity": PerGroup(setting.pop("group_size"))}
        setting["mapping_type"] = MappingType[setting.pop("mapping", "SYMMETRIC")]
        setting["intx_choose_qparams_algorithm"] = IntxChooseQParamsAlgorithm[setting.pop("algorithm", "AFFINE")]
    for name, layer in layers.items():
        own = alone(layer)
        quantization.quantize_(own, getattr(quantization, config)(**setting))
        weight: Any = own[0].weight
        parts = {part: getattr(weight, part) for part in weight.tensor_data_names}
        rest = nbytes(
            *(t for part, t in parts.items() if part != "qdata" and not (part == "zero_point" and not t.any()))
        )
        counted = weight.numel() * bits / 8 + rest
        yield name, LayerResult(weight.dequantize(), nbytes(*parts.values()), counted)


def bitsandbytes(model: nn.Module, layers: Layers, material: Any, kind: str, **setting: Any) -> Results:
    """The functions behind ``Linear4bit`` and ``Linear8bitLt``; of the latter the weights only, not its activations."""
    from bitsandbytes import functional

    for name, layer in layers.items():
        weight = layer.weight.detach()
        if kind == "int8":
            codes, scales, _ = functional.int8_vectorwise_quant(weight.half())
            back, stored = functional.int8_vectorwise_dequant(codes, scales), nbytes(codes, scales)
        else:
            codes, state = functional.quantize_4bit(weight, quant_type=kind, **setting)
            back, stored = functional.dequantize_4bit(codes, state), nbytes(codes, state.absmax)
            if state.nested:
                stored += nbytes(state.state2.absmax, state.state2.code, state.offset)
        yield name, LayerResult(back, stored, stored)


def hqq(model: nn.Module, layers: Layers, material: Any, **setting: Any) -> Results:
    """``HQQLinear`` with its default solver."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    for name, layer in layers.items():
        own = HQQLinear(
            copy.deepcopy(layer), BaseQuantizeConfig(**setting), compute_dtype=layer.weight.dtype, device="cpu"
        )
        stored = nbytes(own.W_q, own.meta["scale"], own.meta["zero"])
        yield name, LayerResult(own.dequantize(), stored, stored)


def sdnq(model: nn.Module, layers: Layers, material: Any, **setting: Any) -> Results:
    """``sdnq_post_load_quant``. By default scales and zero points are float32."""
    from sdnq import SDNQConfig, sdnq_post_load_quant

    for name, layer in layers.items():
        config = SDNQConfig(add_skip_keys=False, minimum_allowed_numel=0, **setting)
        own: Any = sdnq_post_load_quant(alone(layer), quantization_config=config)[0]
        # Without the bias.
        stored = nbytes(*(t for part, t in own.named_parameters() if part != "bias"))
        yield name, LayerResult(own.dequantize().weight, stored, stored)


def sinq(model: nn.Module, layers: Layers, material: Any, **setting: Any) -> Results:
    """``SINQLinear``, data-free (Sinkhorn-normalized scales of rows and columns)."""
    from sinq.sinqlinear import SINQLinear, sinq_base_quant_config

    for name, layer in layers.items():
        config = sinq_base_quant_config(**setting)
        own: Any = SINQLinear(copy.deepcopy(layer), config, compute_dtype=layer.weight.dtype, device="cpu")
        stored = nbytes(own.W_q, *_tensors_in(own.meta))
        yield name, LayerResult(own.dequantize().reshape(layer.weight.shape), stored, stored)


def _tensors_in(value: Any) -> list[Tensor]:
    """All tensors in nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        return [value]
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for one in inside for tensor in _tensors_in(one)]


def llama_cpp(model: nn.Module, layers: Layers, material: Any, kind: str, imatrix: bool = True) -> Results:
    """llama.cpp's types by libgguf, which has its row functions, with an importance matrix of the samples.

    k-quants and i-quants have blocks of 256 weights; as llama.cpp does, rows that they do not divide get a type of blocks
    of 32, which takes more bits.
    """
    import libgguf
    import numpy as np

    smaller = {"Q4_K": "Q5_0"}
    squares = _mean_squares(model, layers, material["samples"]) if imatrix else {}
    for name, layer in layers.items():
        rows = layer.weight.detach().float().numpy()
        used = kind
        if rows.shape[1] % libgguf.GGML_QUANT_SIZES[libgguf.GGMLQuantizationType[kind]][0]:
            used = smaller.get(kind, "IQ4_NL")
        type_ = libgguf.GGMLQuantizationType[used]
        codes = libgguf.quantize_rows(rows, type_, imatrix=squares[name].numpy() if imatrix else None)
        back = np.asarray(libgguf.dequantize_rows(codes, type_, n_per_row=rows.shape[1]))
        yield name, LayerResult(torch.from_numpy(back.copy()), codes.nbytes, codes.nbytes)


@torch.no_grad()
def _mean_squares(model: nn.Module, layers: Layers, samples: Any) -> dict[str, Tensor]:
    """The importance matrix: the mean square of each column's input, ``[K]`` for each layer."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    hooks = []
    for name, layer in layers.items():

        def watch(module: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
            x = inputs[0].detach().float().reshape(-1, inputs[0].shape[-1])
            sums[name] = sums.get(name, torch.zeros(x.shape[1])) + x.square().sum(0)
            counts[name] = counts.get(name, 0) + len(x)

        hooks.append(layer.register_forward_pre_hook(watch))
    for sample in samples:
        model(
            **{key: value.to(torch.bfloat16) if value.is_floating_point() else value for key, value in sample.items()}
        )
    for hook in hooks:
        hook.remove()
    return {name: sums[name] / counts[name] for name in layers}


def gptqmodel(model: Any, layers: Layers, material: Any, **setting: Any) -> Results:
    """GPTQ on the samples, on a CPU; only decoders."""
    from gptqmodel import GPTQModel, QuantizeConfig

    loaded = GPTQModel.load(material["path"], QuantizeConfig(device="cpu", **setting))
    pieces = [sample | {"attention_mask": torch.ones_like(sample["input_ids"])} for sample in material["samples"]]
    loaded.quantize(pieces, batch_size=1)
    modules = dict(loaded.model.named_modules())
    for name in layers:
        own: Any = modules[name]
        stored = nbytes(own.qweight, own.qzeros, own.scales)
        yield name, LayerResult(own.dequantize_weight().t(), stored, stored)


def autoround(model: Any, layers: Layers, material: Any, **setting: Any) -> Results:
    """AutoRound on the samples; it puts the rounded weights into the model, and the scales into each layer's ``scale``."""
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    ids = [sample["input_ids"] for sample in material["samples"]]
    tokenizer = AutoTokenizer.from_pretrained(material["path"])
    pieces = [{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in ids]
    rounder = AutoRound(model, tokenizer, dataset=pieces, nsamples=len(ids), seqlen=ids[0].shape[1], **setting)
    rounder.quantize()
    for name, layer in layers.items():
        own: Any = model.get_submodule(name)
        zeros = 0 if setting.get("sym", True) else own.scale.numel() * setting["bits"] / 8
        stored = layer.weight.numel() * setting["bits"] / 8 + nbytes(own.scale) + zeros
        yield name, LayerResult(own.weight, stored, stored)


LIBRARIES: dict[str, Callable[..., Results]] = {
    "float": float_weights,
    "requanto": requanto,
    "optimum-quanto": optimum_quanto,
    "torchao": torchao,
    "bitsandbytes": bitsandbytes,
    "hqq": hqq,
    "sdnq": sdnq,
    "sinq": sinq,
    "llama.cpp": llama_cpp,
    "gptqmodel": gptqmodel,
    "autoround": autoround,
}
