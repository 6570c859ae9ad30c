"""The libraries that benchmarks/cpu.py compares: for each, layers of a weight by type, ready to be called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

#: Types of Requanto's weights that are measured; "a x b": activations in b.
KINDS = ("int8", "int4", "int3", "int2", "float8", "nf4", "codebook4", "int8 x int8")


class Layer:
    """One quantized weight: ``layer(layer.prepare(x))`` is x @ weight.T.

    Attributes:
        nbytes: bytes that the weight takes now; 0 if the library does not tell.
    """

    def __init__(self, call: Callable[[Any], object], size: Callable[[], int] = lambda: 0) -> None:
        self._call, self._size = call, size

    def prepare(self, x: torch.Tensor) -> Any:
        """What the layer is called with; the conversion is not timed."""
        return x

    def __call__(self, x: Any) -> object:
        return self._call(x)

    @property
    def nbytes(self) -> int:
        return self._size()


Layers = dict[str, list[Layer]]


def requanto_layers(whole: torch.Tensor, dtype: torch.dtype, copies: int, kinds: list[str], threads: int) -> Layers:
    import requanto
    from requanto.linear import linear

    found: Layers = {}
    for kind in kinds:
        name, _, activation = kind.partition(" x ")
        made = requanto.QTensor.quantize(whole, name).to(dtype)
        own = []
        for _ in range(copies):
            weight = made.clone()
            weight.activation = requanto.qint8 if activation else None
            parameter = torch.nn.Parameter(weight, requires_grad=False)
            own.append(Layer(lambda x, w=parameter: linear(x, w), lambda w=parameter: w.nbytes))
        found[kind] = own
    return found


def _module(weight: torch.Tensor) -> torch.nn.Sequential:
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype, device="meta")
    linear.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    return torch.nn.Sequential(linear)


def _each(makers: dict[str, Callable[[], Any]], copies: int, layer: Callable[[Any], Layer] = Layer) -> Layers:
    found: Layers = {}
    for name, make in makers.items():
        try:
            found[name] = [layer(make()) for _ in range(copies)]
        except Exception as error:  # a type or size that a library lacks on this machine leaves its cells empty
            print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:200]}", flush=True)
    return found


def quanto_layers(whole: torch.Tensor, dtype: torch.dtype, copies: int, kinds: list[str], threads: int) -> Layers:
    from optimum import quanto

    def make(kind: Any) -> torch.nn.Module:
        module = _module(whole.to(dtype))
        quanto.quantize(module, weights=kind)
        quanto.freeze(module)
        return module

    types = {"int8": quanto.qint8, "int4": quanto.qint4, "int2": quanto.qint2, "float8": quanto.qfloat8}
    return _each({name: (lambda kind=kind: make(kind)) for name, kind in types.items()}, copies)


def torchao_layers(whole: torch.Tensor, dtype: torch.dtype, copies: int, kinds: list[str], threads: int) -> Layers:
    from torchao import quantization as ao
    from torchao.prototype.quantization import int4

    def make(config: Callable[[], Any]) -> torch.nn.Module:
        module = _module(whole.to(dtype))
        ao.quantize_(module, config())
        return module

    configs: dict[str, Callable[[], Any]] = {
        "int8": ao.Int8WeightOnlyConfig,
        # Its layouts for CPUs: torch's int4pack operator, and a kernel of its own where its wheel has one.
        "int4": lambda: int4.PrototypeInt4WeightOnlyConfig(group_size=64),
        "int4 x int8": lambda: int4.Int8DynamicActivationInt4WeightConfig(group_size=64),
        "float8": ao.Float8WeightOnlyConfig,
        "int8 x int8": ao.Int8DynamicActivationInt8WeightConfig,
    }
    return _each({name: (lambda config=config: make(config)) for name, config in configs.items()}, copies)


def bitsandbytes_layers(whole: torch.Tensor, dtype: torch.dtype, copies: int, kinds: list[str], threads: int) -> Layers:
    import bitsandbytes as bnb

    def make() -> torch.nn.Module:
        layer = bnb.nn.Linear4bit(whole.shape[1], whole.shape[0], bias=False, compute_dtype=dtype, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(whole.to(dtype), requires_grad=False, quant_type="nf4")
        return layer.to("cpu")

    return _each({"nf4": make}, copies)


class _ArrayLayer(Layer):
    """A layer that takes float32 in numpy's arrays, which are made before the clock starts."""

    def prepare(self, x: torch.Tensor) -> Any:
        return x.float().numpy()


def openvino_layers(whole: torch.Tensor, dtype: torch.dtype, copies: int, kinds: list[str], threads: int) -> Layers:
    """Compressed weights as OpenVINO's compressor writes them: codes, zero points and scales as constants of the model."""
    from cpu_openvino import compiled

    makers = {kind: (lambda kind=kind: compiled(whole, kind, threads)) for kind in ("int8", "int4")}
    return _each(makers, copies, _ArrayLayer)


def llama_layers(whole: torch.Tensor, dtype: torch.dtype, copies: int, kinds: list[str], threads: int) -> Layers:
    """llama.cpp's matrix multiplication, with the order of codes that it uses for models."""
    from cpu_ggml import Product

    kinds = ["Q8_0", "Q4_0", "Q4_K", "Q3_K", "Q2_K"]
    return _each({kind: (lambda kind=kind: Product(whole, kind, threads)) for kind in kinds}, copies, _GgmlLayer)


class _GgmlLayer(Layer):
    def __init__(self, product: Any) -> None:
        super().__init__(lambda run: run(), lambda: product.nbytes)
        self._product = product

    def prepare(self, x: torch.Tensor) -> Any:
        return self._product.bound(x)


LIBRARIES: dict[str, Callable[..., Layers]] = {
    "requanto": requanto_layers,
    "llama.cpp": llama_layers,
    "optimum-quanto": quanto_layers,
    "torchao": torchao_layers,
    "bitsandbytes": bitsandbytes_layers,
    "openvino": openvino_layers,
}
