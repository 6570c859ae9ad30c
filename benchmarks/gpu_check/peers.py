"""Other libraries' layers, for comparison: what is not installed, or fails, costs its own rows only.

Called as the releases in `wheels.VERSIONS` are, whose wheels `wheels.py` fetches; `tests/test_gpu_peers.py` runs each call
as far as a CPU goes, of those that are installed. Marlin has no wheel of its own. optimum-quanto compiles its kernels when
it is first used, so it is left out.

Weights are quantized by each peer's own method, so errors differ; times do not depend on it. What a peer's documentation has
compiled is compiled here. Its autotuning, if it tunes at the first call, happens before the clock starts.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from gpu_check.wheels import VERSIONS

Layer = Callable[[torch.Tensor], torch.Tensor]
Make = Callable[[torch.Tensor, str], Layer]


def _linear(weight: torch.Tensor) -> torch.nn.Linear:
    """A layer with a copy of the weight: some peers drop or replace that of the layer that they are given."""
    n, k = weight.shape
    layer = torch.nn.Linear(k, n, bias=False, device="meta", dtype=weight.dtype)
    layer.weight = torch.nn.Parameter(weight.detach().clone(), requires_grad=False)
    return layer


def _in_groups(weight: torch.Tensor, group: int, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """uint8 codes ``[N, K]`` of 4 bits, scales and zero points ``[N, G]`` for ``scale * (code - zero)``, to nearest."""
    n, k = weight.shape
    groups = weight.float().view(n, k // group, group)
    if symmetric:
        scale = groups.abs().amax(2) / 7
        zero = torch.full_like(scale, 8)
    else:
        low, high = groups.amin(2), groups.amax(2)
        scale = (high - low) / 15
        zero = -low / scale.clamp(min=1e-9)
    scale = scale.clamp(min=1e-9)
    codes = (groups / scale.unsqueeze(2) + zero.unsqueeze(2)).round_().clamp_(0, 15).to(torch.uint8)
    return codes.view(n, k), scale.to(weight.dtype), zero.to(weight.dtype)


# ---------------------------------------------------------------------- one function for each peer and way to quantize


def _humming(weight: torch.Tensor, device: str, *, schema: dict, inputs: str | None = None) -> Layer:
    from humming.layer import HummingLayer
    from humming.tune import get_heuristics_config

    n, k = weight.shape
    layer = HummingLayer(
        shape_n=n,
        shape_k=k,
        weight_config=dict(schema),
        input_config=None if inputs is None else {"dtype": inputs},
        torch_dtype=weight.dtype,
    ).to(device)
    layer.load_from_unquantized(weight)
    layer.transform()  # its order of codes
    tiles = get_heuristics_config(layer.humming_config)

    def product(x: torch.Tensor) -> torch.Tensor:
        # The tile that it chooses for so many rows. Without it, it compiles a kernel for every number of rows first.
        tile = next(tile for low, high, tile in tiles if low < x.shape[0] <= high)
        return layer(x, tuning_config=tile)

    return product


@functools.cache
def _gemlite_tables() -> None:
    """Has an H200 use the tiles that gemlite ships for an H100, instead of searching for half a minute a shape."""
    import gemlite

    if torch.cuda.is_available() and "H200" in torch.cuda.get_device_name():
        gemlite.load_config(str(Path(gemlite.__file__).parent / "configs" / "h100.json"))


def _gemlite_groups(weight: torch.Tensor, device: str, *, group: int, symmetric: bool) -> Layer:
    from gemlite.helper import A16W4_HQQ_INT

    _gemlite_tables()
    return A16W4_HQQ_INT(device=device, dtype=weight.dtype).from_weights(*_in_groups(weight, group, symmetric))


def _gemlite_rows(weight: torch.Tensor, device: str, *, processor: str) -> Layer:
    import gemlite.helper

    _gemlite_tables()
    # A layer of its own: `from_linear` sets its weight to None.
    return getattr(gemlite.helper, processor)(device=device, dtype=weight.dtype).from_linear(_linear(weight))


def _torchao(weight: torch.Tensor, device: str, *, config: str, compiled: bool, **options: object) -> Layer:
    from torchao import quantization
    from torchao.quantization import PerRow, quantize_

    if config == "Float8DynamicActivationFloat8WeightConfig":
        options["granularity"] = PerRow()
    model = torch.nn.Sequential(_linear(weight))
    quantize_(model, getattr(quantization, config)(**options))
    if type(model[0].weight.data) is torch.Tensor:  # torchao logs and goes on where it does not take a shape
        raise RuntimeError(f"torchao left the weight of shape {tuple(weight.shape)} as it is")
    return torch.compile(model, dynamic=False) if compiled and device != "cpu" else model


def _bitsandbytes_4bit(weight: torch.Tensor, device: str) -> Layer:
    import bitsandbytes as bnb

    n, k = weight.shape
    layer = bnb.nn.Linear4bit(k, n, bias=False, compute_dtype=weight.dtype, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(weight.detach().cpu(), requires_grad=False, quant_type="nf4", module=layer)
    return layer.to(device)  # quantizes


def _bitsandbytes_8bit(weight: torch.Tensor, device: str) -> Layer:
    import bitsandbytes as bnb

    warnings.filterwarnings("ignore", message="MatMul8bitLt: inputs will be cast")
    n, k = weight.shape
    layer = bnb.nn.Linear8bitLt(k, n, bias=False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(weight.detach().cpu(), requires_grad=False, has_fp16_weights=False)
    return layer.to(device)  # quantizes


def _sdnq(weight: torch.Tensor, device: str, *, dtype: str) -> Layer:
    from sdnq import sdnq_post_load_quant

    return sdnq_post_load_quant(
        torch.nn.Sequential(_linear(weight)),
        weights_dtype=dtype,
        group_size=-1,
        use_quantized_matmul=True,
        add_skip_keys=False,
        torch_dtype=weight.dtype,
    )


def _hqq(weight: torch.Tensor, device: str) -> Layer:
    from hqq.core.quantize import BaseQuantizeConfig, HQQBackend, HQQLinear

    config = BaseQuantizeConfig(nbits=4, group_size=64, axis=1)
    # Without its iterations: they take minutes for a large weight, and the time of a product does not depend on them.
    config["weight_quant_params"]["optimize"] = False
    layer = HQQLinear(_linear(weight), quant_config=config, compute_dtype=weight.dtype, device=device)
    layer.set_backend(HQQBackend.PYTORCH_COMPILE if device != "cpu" else HQQBackend.PYTORCH)
    return layer


_INT4 = {"dtype": "int4", "group_size": 128}
_FLOAT_SHIFT = {"dtype": "int4", "group_size": 64, "has_zero_point": True, "is_fp_zero_point": True}
_MAKE: dict[str, dict[str, Make]] = {
    "humming": {
        "int4 g128": partial(_humming, schema=_INT4),
        "int4 g64 affine": partial(_humming, schema=_FLOAT_SHIFT),
        "int8": partial(_humming, schema={"dtype": "int8"}),
        "float8": partial(_humming, schema={"dtype": "float8e4m3"}),
        "float8 x float8": partial(_humming, schema={"dtype": "float8e4m3"}, inputs="float8e4m3"),
        "int8 x int8": partial(_humming, schema={"dtype": "int8"}, inputs="int8"),
        "int4 x int8": partial(_humming, schema=_INT4, inputs="int8"),
    },
    "gemlite": {
        "int4 g128": partial(_gemlite_groups, group=128, symmetric=True),
        "int4 g64 affine": partial(_gemlite_groups, group=64, symmetric=False),
        "int8": partial(_gemlite_rows, processor="A16W8_INT8"),
        "float8": partial(_gemlite_rows, processor="A16W8_FP8"),
        "float8 x float8": partial(_gemlite_rows, processor="A8W8_fp8_dynamic"),
        "int8 x int8": partial(_gemlite_rows, processor="A8W8_int8_dynamic"),
    },
    "torchao": {
        # The default packing format needs a library that has no wheel beside torchao's (mslk).
        "int4 g128": partial(
            _torchao,
            config="Int4WeightOnlyConfig",
            compiled=False,  # one operator
            group_size=128,
            int4_packing_format="tile_packed_to_4d",
        ),
        "int8": partial(_torchao, config="Int8WeightOnlyConfig", compiled=True),
        "float8 x float8": partial(_torchao, config="Float8DynamicActivationFloat8WeightConfig", compiled=True),
        "int8 x int8": partial(_torchao, config="Int8DynamicActivationInt8WeightConfig", compiled=True),
    },
    "bitsandbytes": {"nf4": _bitsandbytes_4bit, "int8 x int8": _bitsandbytes_8bit},
    "sdnq": {"int8 x int8": partial(_sdnq, dtype="int8"), "float8 x float8": partial(_sdnq, dtype="float8_e4m3fn")},
    "hqq": {"int4 g64 affine": _hqq},
}

#: Operations of each peer, by the name that Requanto's have in `cases.py`. Each is a case of its own.
OPS: dict[str, tuple[str, ...]] = {peer: tuple(made) for peer, made in _MAKE.items()}


def missing(name: str) -> str:
    """Why a peer cannot be compared: it is not installed, or its import fails; empty if it can."""
    if name not in OPS:
        return f"{name} is not a peer"
    try:
        importlib.import_module(name)
    except Exception as error:  # also what a library raises that looks for a GPU when it is imported
        first = (str(error).strip() or "no message").splitlines()[0]
        return f"{type(error).__name__}: {first[:200]}"
    return ""


def version(name: str) -> str:
    """The installed version, and the one that the calls were written for if that is another; "" if it is not installed."""
    distribution = "humming-kernels" if name == "humming" else name
    try:
        found = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""
    expected = VERSIONS[distribution]
    return found if found == expected else f"{found} (called as {expected})"


def ops(name: str, n: int, k: int, device: str, weight: torch.Tensor | None = None) -> dict[str, Layer]:
    """The peer's layers for one shape, without a bias, by operation: those of ``OPS[name]``, all of them.

    Args:
        name: a key of `OPS`.
        n, k: rows and columns of the weight; x is bf16 ``[M, K]``, the result bf16 ``[M, N]``.
        device: ``"cuda"``; ``"cpu"`` in a dry run.
        weight: bf16 ``[n, k]`` on the device, which the peer quantizes; None: a random one. It is not changed.

    Returns:
        One function for each operation. Of an operation that cannot be made, a function that raises the reason: the other
        operations are not affected.
    """
    if name not in OPS:
        raise ValueError(f"found {name!r}, expected one of {', '.join(OPS)}")
    if weight is None:
        weight = torch.randn(n, k, dtype=torch.bfloat16, device=device) * 0.02
    return {op: _made(make, weight, device) for op, make in _MAKE[name].items()}


def _made(make: Make, weight: torch.Tensor, device: str) -> Layer:
    try:
        layer = make(weight, device)
    except Exception as error:
        reason = error

        def fails(x: torch.Tensor) -> torch.Tensor:
            raise reason

        return fails

    def product(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return layer(x)

    return product
