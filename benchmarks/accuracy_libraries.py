"""Quantizes Linear layers with each library of accuracy.py: one function for each library, using its public API.

A function takes the model, the layers by name, the material (``samples`` of token ids for methods with samples) and
the library's settings, and yields for each layer the dequantized weight and the bytes that the library stores.
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
PACKAGES = {"requanto": "requanto", "autoround": "auto-round", "gptqmodel": "gptqmodel"}


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


def requanto(model: Any, layers: Layers, material: Any, method: str | None = None, **setting: Any) -> Results:
    """As ``from_pretrained(quantization_config=QuantoConfig(...))`` quantizes; gptq on the samples."""
    from requanto import QuantoConfig
    from requanto.methods import quantize_with_samples
    from requanto.report.calibrated import planned_for

    sampled = method == "gptq"
    planned = planned_for(model, QuantoConfig(**setting, **({} if sampled else {"method": method})))
    if sampled:
        quantize_with_samples(model, planned, list(material["samples"].split(1)), "gptq")
    for name, layer in layers.items():
        weight = (
            layer.weight if sampled else planned[f"{name}.weight"].quantize(layer.weight.detach(), f"{name}.weight")
        )
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


def gptqmodel(model: Any, layers: Layers, material: Any, **setting: Any) -> Results:
    """GPTQ on the samples, on a CPU; only decoders."""
    from gptqmodel import GPTQModel, QuantizeConfig

    loaded = GPTQModel.load(material["path"], QuantizeConfig(device="cpu", **setting))
    pieces = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in material["samples"]]
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

    samples = material["samples"]
    tokenizer = AutoTokenizer.from_pretrained(material["path"])
    pieces = [{"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]} for ids in samples]
    rounder = AutoRound(model, tokenizer, dataset=pieces, nsamples=len(samples), seqlen=samples.shape[1], **setting)
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
    "gptqmodel": gptqmodel,
    "autoround": autoround,
}
