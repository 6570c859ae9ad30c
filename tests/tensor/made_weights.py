"""Weights of random parts for any description, and what they mean: float64 from the stored bytes, by docs/format.md."""

from __future__ import annotations

import itertools

import numpy as np
import torch

from requanto import QTensor
from requanto.tensor.spec import WeightSpec, parse_text

#: The descriptions that files of other programs need: K types of llama.cpp, signed scales, columns in another order.
Q2_K = "qint2 {} group=16 affine scales=4 block=256"
Q3_K = "qint3 {} group=16 scales=6 signed block=256"
Q4_K = "qint4 {} group=32 affine scales=6 block=256"
Q5_K = "qint5 {} group=32 affine scales=6 block=256"
Q6_K = "qint6 {} group=16 scales=8 signed block=256"
K_TYPES = (Q2_K, Q3_K, Q4_K, Q5_K, Q6_K)
Q4_0 = "qint4 {} group=32 signed"
ACT_ORDER = "qint4 {} group=32 affine zeros order"
#: Together with other words.
MIXED = (
    "qint4 {} group=64 affine scales=6 rotation=64 columns block=128 order",
    "qint3 {} group=32 scales=5 columns signed block=64 order",
    "qint8 {} signed order",
    "qnf4 {} group=64 columns signed order",
    "qint4 {} affine order",
    "qint8 {} group=32 affine scales=8 signed block=64",
)
#: For rows of a few weights.
SMALL = (
    "qint4 {} group=32 affine scales=6 block=64",
    "qint6 {} group=16 scales=8 signed block=64",
    "qint4 {} group=32 signed",
    "qint4 {} group=32 affine zeros order",
)
EVERY = (*K_TYPES, Q4_0, ACT_ORDER, *MIXED)
ORDERED = tuple(form for form in EVERY if "order" in form)


def made(form: str, *shape: int, dtype=torch.float32, seed=0, words="", **how) -> QTensor:
    """A weight of the description ``form``, with random parts.

    Args:
        words: further words of the description, such as ``"axis=1 transposed"``.
        how: fields of the spec that no word sets.
    """
    spec, rank = parse_text(f"{form.format('x'.join(map(str, shape)))} {words}".strip(), dtype)
    return QTensor._of(spec.replace(**how), random_parts(spec.replace(**how), rank, seed))


def with_foreign_weights(model: torch.nn.Module) -> torch.nn.Module:
    """The model, whose quantized weights become weights of `SMALL`, one form after the other."""
    forms = itertools.cycle(SMALL)
    for index, (name, parameter) in enumerate(list(model.named_parameters())):
        if isinstance(parameter, QTensor):
            owner, _, leaf = name.rpartition(".")
            weight = made(next(forms), *parameter.shape, dtype=parameter.dtype, seed=index)
            setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(weight, requires_grad=False))
    return model


def random_parts(spec: WeightSpec, rank: int = 0, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    parts = {}
    for name, (shape, dtypes) in spec.expected.items():
        if dtypes[0].is_floating_point and dtypes[0].itemsize > 1:
            values = torch.rand(shape, generator=generator) + 0.5
            if name == "row_shift" or (spec.signed and name in ("scale", "row_scale")):
                values *= torch.randint(2, shape, generator=generator) * 2 - 1
            if name.startswith("row"):  # weights of about 1, so that sums stay within float16
                values /= 2**spec.scale_bits
            if name in ("scale", "row_scale") and not spec.qtype.is_codebook:
                values /= 2 ** (spec.qtype.bits - 1)
            # Dtypes as in files: float16 numbers of blocks, others as they come.
            parts[name] = values.to(torch.float16 if name.startswith("row") else torch.float32)
        elif name == "order":
            one = [torch.randperm(shape[-1], generator=generator) for _ in range(shape[:-1].numel())]
            parts[name] = torch.stack(one).to(torch.int32).view(shape) if one else torch.zeros(shape, dtype=torch.int32)
        else:
            low, high = (-128, 128) if dtypes[0] == torch.int8 else (0, 256)
            parts[name] = torch.randint(low, high, shape, generator=generator).to(dtypes[0])
    parts["qdata"] = padded_with_zeros(parts["qdata"], spec.qtype.bits, spec.row_length)
    for name, bits in spec.code_bits.items():
        if name in parts:
            parts[name] = padded_with_zeros(parts[name], bits, spec.groups)
    for name, shape in spec.low_rank_shapes(rank).items() if rank else ():
        parts[name] = torch.randn(shape, generator=generator) * 0.3
    return parts


def padded_with_zeros(stored: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The packed bytes with zeros after the last code of a row, as everything writes them."""
    left = count * bits % 8
    if bits < 8 and left and stored.numel():
        stored[..., -1] &= 2**left - 1
    return stored


def bits_of(stored: torch.Tensor, bits: int, count: int) -> np.ndarray:
    """Codes ``[..., count]`` from their bytes: one stream of bits a row, low bits first."""
    stream = np.unpackbits(stored.numpy(), axis=-1, bitorder="little")[..., : count * bits]
    return (stream.reshape(*stored.shape[:-1], count, bits) * 2.0 ** np.arange(bits)).sum(-1)


def meaning(weight: QTensor) -> torch.Tensor:
    """float64 values of a weight, as it shows itself."""
    spec, parts = weight._spec, {name: part.cpu() for name, part in weight.inner_tensors().items()}
    lead, length, bits = tuple(spec.lead), spec.row_length, spec.qtype.bits
    double = {n: p.double().numpy() for n, p in parts.items() if p.is_floating_point()}
    codes = (
        bits_of(parts["qdata"].reshape(*lead, spec.codes_shape[spec.axis + 1 :].numel()), bits, length)
        if bits < 8
        else parts["qdata"].numpy()
    )
    codes = codes.reshape(*lead, length).astype(np.float64)
    groups, group = spec.groups, length // spec.groups

    def each(numbers: np.ndarray, times: int) -> np.ndarray:
        return np.repeat(numbers, times, -1)

    def scale_of(name: str, row: str, offset: int = 0) -> np.ndarray:
        found = bits_of(parts[name], spec.scale_bits, groups) - offset
        return found * each(double[row], groups // double[row].shape[-1])

    if spec.scale_bits is None:
        scale = double["scale"]
    else:
        scale = scale_of("scale", "row_scale", 2 ** (spec.scale_bits - 1) if spec.signed else 0)
    scale = each(scale, group)
    if spec.qtype.is_codebook:
        values = np.array(spec.qtype.values)[codes.astype(np.int64)] * scale
    elif not spec.affine:
        values = (codes - (2 ** (bits - 1) if bits < 8 else 0)) * scale
    elif spec.zeros:
        values = (codes - each(bits_of(parts["shift"], bits, groups), group)) * scale
    elif spec.scale_block is not None:
        values = codes * scale - each(scale_of("shift", "row_shift"), group)
    else:
        values = codes * scale - each(double["shift"], group)
    if spec.rotation is not None:
        size = spec.rotation
        bits_in_common = np.array([[bin(i & j).count("1") for j in range(size)] for i in range(size)])
        values = values.reshape(*lead, length // size, size) @ ((-1.0) ** bits_in_common / size**0.5)
        values = values.reshape(*lead, length)
    if spec.column:
        values = values * double["column"][..., None, :]
    if spec.order:
        moved = np.empty_like(values)
        order = np.broadcast_to(parts["order"].numpy()[..., None, :], values.shape)
        np.put_along_axis(moved, order.astype(np.int64), values, -1)
        values = moved
    if "up" in parts:
        values = values + double["up"] @ double["down"]
    found = torch.from_numpy(values.reshape(tuple(spec.shape)))
    return found.mT if spec.transposed else found
