"""Weights of every type and form, and how far a GEMM on a CPU may be from float64: for each element, and as a whole."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from made_weights import EVERY, made

from requanto import QTensor
from requanto.dtypes.bit_packing import unpack
from requanto.dtypes.qtypes import qtype, qtypes
from requanto.linear.activations import quantize_activations
from requanto.linear.columns import as_stored, scale_columns
from requanto.linear.cpu import gemm, library
from requanto.linear.cpu.weights import table_of
from requanto.scales.rotation import rotate

T = TypeVar("T")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROWS = (1, 2, 3, 4, 5, 7, 16, 17, 33, 130)
#: Types with kernels of different kinds: each number of planes that codes have, tables, floats.
KINDS = (
    "int2",
    "int3",
    "int4",
    "int5",
    "int6",
    "int7",
    "int8",
    "uint1",
    "uint8",
    "nf4",
    "codebook3",
    "fp6_e3m2",
    "float8",
)
#: Half of the distance between two numbers of a dtype at 1.
HALF_STEP = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
#: Steps up to the largest element of a block of x, if it is rounded: with codes of up to 5 bits, and with more.
STEPS8, STEPS16 = 127, 32000
#: Columns of a block of x, at most.
BLOCK = 32


class Fresh(torch.Generator):
    """A generator with another seed in each run, unless $REQUANTO_SEED or the caller names it; as text it says which."""

    def __new__(cls, seed: int | None = None) -> Fresh:
        return super().__new__(cls)

    def __init__(self, seed: int | None = None) -> None:
        asked = os.environ.get("REQUANTO_SEED") or random.SystemRandom().randrange(2**31)
        self.seed_ = int(asked) if seed is None else seed
        self.manual_seed(self.seed_)

    def __str__(self) -> str:
        return f"REQUANTO_SEED={self.seed_}"

    def number(self, count: int) -> int:
        return int(torch.randint(count, (), generator=self))

    def one_of(self, values: Sequence[T]) -> T:
        return values[self.number(len(values))]


@dataclass(frozen=True)
class Form:
    """A type of weights and how it is stored.

    Attributes:
        kind: of `QTensor.quantize`, or a description of `made_weights.made`.
        options: further arguments of `QTensor.quantize`.
    """

    kind: str
    options: tuple[tuple[str, object], ...] = field(default=())

    def __str__(self) -> str:
        return " ".join([self.kind, *(f"{name}={value}" for name, value in self.options)])

    def length(self, about: int) -> int:
        """K near ``about`` with whole groups and blocks of groups."""
        unit = 1
        for word in self.kind.split():
            name, _, number = word.partition("=")
            unit = math.lcm(unit, int(number) if name in ("group", "block", "rotation") else 1)
        for name, value in self.options:
            if name in ("group_size", "rotation") and isinstance(value, int) and value > 0:
                unit = math.lcm(unit, value)
        return max(1, round(about / unit)) * unit

    def weight(self, rows: int, length: int, dtype: torch.dtype, generator: torch.Generator) -> QTensor:
        if "{}" in self.kind:
            return made(self.kind, rows, length, dtype=dtype, seed=int(torch.randint(2**31, (), generator=generator)))
        values = torch.randn(rows, length, generator=generator)
        values *= 0.2 + torch.rand(rows, 1, generator=generator)
        values += 0.1 * torch.randn(rows, 1, generator=generator)
        return self.quantized(values.to(dtype))

    def quantized(self, values: torch.Tensor) -> QTensor:
        return QTensor.quantize(values, self.kind, **dict(self.options))


def form(kind: str, **options: object) -> Form:
    return Form(kind, tuple(options.items()))


def every_form() -> list[Form]:
    """Every type; every size of groups; every way to store scales; what surrounds the codes."""
    found = [form(kind.name) for kind in dict.fromkeys(qtypes.values())]
    found += [form(kind, group_size=size) for kind in KINDS for size in (4, 8, 16, 24, 32, 48, 64, 128, 160, None)]
    found += [form(f"int{bits}", group_size=size, symmetric=True) for bits in range(2, 8) for size in (16, 64, None)]
    for bits in (4, 5, 6, 7, 8):
        found += [form(kind, group_size=32, scale_bits=bits) for kind in ("int4", "int2", "nf4", "uint8")]
        found += [
            form("int3", group_size=16, scale_bits=bits, symmetric=True),
            form("int4", group_size=16, scale_bits=bits, zero_point="integer"),
        ]
    found += [
        form(kind, group_size=size, zero_point="integer")
        for kind in ("int2", "int3", "int4", "int5", "int6", "int7", "uint8")
        for size in (32, None)
    ]
    for kind in ("int2", "int4", "int8", "nf4", "float8", "nvfp4"):
        found += [
            form(kind, column_scale="root"),
            form(kind, rotation=32),
            form(kind, low_rank=3),
            form(kind, column_scale="root", rotation=32, low_rank=2),
        ]
    return found + [form(text) for text in EVERY]


def inputs(rows: int, length: int, dtype: torch.dtype, generator: torch.Generator, how: str = "normal") -> torch.Tensor:
    """x ``[rows, length]``: normal, heavy-tailed, sparse (as after a ReLU), spiky, with a row of zeros, or tiny; "channels":
    columns of different size, as in language models."""
    x = torch.randn(rows, length, generator=generator)
    if how == "heavy":
        x = x * torch.exp(1.5 * torch.randn(rows, length, generator=generator))
    elif how == "channels":
        x = x * torch.exp(0.9 * torch.randn(length, generator=generator))
    elif how == "sparse":
        x = x.clamp_min(0) * (torch.rand(rows, length, generator=generator) < 0.4)
    elif how == "spiky":
        large = 1e3 if dtype == torch.float16 else 1e4  # whose result stays within float16
        x.scatter_(1, torch.randint(length, (rows, 1), generator=generator), large)
    elif how == "zero row":
        x[int(torch.randint(rows, (), generator=generator))] = 0
    elif how == "tiny":
        x = x * 1e-3
    elif how != "normal":
        raise ValueError(how)
    return x.to(dtype)


INPUTS = ("normal", "heavy", "channels", "sparse", "spiky", "zero row", "tiny")


def laid_out(x: torch.Tensor, how: str) -> torch.Tensor:
    """The same numbers with other strides or at another address."""
    rows, length = x.shape
    if how == "transposed":
        return x.t().contiguous().t()
    if how == "every second":
        return x.repeat_interleave(2, 1)[:, ::2]
    if how == "rows apart":
        return torch.cat([x, x.new_full((rows, 5), math.nan)], 1)[:, :length]
    if how == "misaligned":
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(rows, length)
    if how == "three axes":
        return x.view(rows, 1, length)
    if how != "plain":
        raise ValueError(how)
    return x


LAID_OUT = ("plain", "transposed", "every second", "rows apart", "misaligned", "three axes")


def codes_only(weight: QTensor) -> QTensor:
    """The weight without what is applied to x or to the result: order, column scale, rotation, low-rank term."""
    spec = weight._spec.replace(rotation=None, column=False, order=False)
    parts = {
        name: part for name, part in weight.inner_tensors().items() if name not in ("order", "column", "up", "down")
    }
    return QTensor._of(spec, parts)


def values_of(weight: QTensor) -> torch.Tensor:
    """float64 values ``[N, K]`` of codes without anything around them, from the stored bytes and the float scales."""
    kind, codes = weight.qtype, codes_of(weight)
    if kind.is_codebook:
        own = weight.inner_tensors().get("codebook")
        table = torch.tensor(kind.values, dtype=torch.float64) if own is None else own.double()
        return scaled(weight, table[codes.long()])
    numbers = (codes.float() if kind.is_floating_point else codes).double()
    if not weight.affine:
        return scaled(weight, numbers - kind.zero_code)
    return scaled(weight, numbers) - scaled(weight, torch.ones_like(numbers), "shift")


def codes_of(weight: QTensor) -> torch.Tensor:
    """The codes ``[N, K]``, one a element."""
    kind, (rows, length) = weight.qtype, weight._spec.matrix_shape
    codes = weight.qdata.reshape(rows, -1)
    return unpack(codes, kind.bits, length) if kind.is_packed else codes


def scaled(weight: QTensor, numbers: torch.Tensor, by: str = "scale") -> torch.Tensor:
    """float64 ``numbers`` ``[N, K]`` times the scales, or shifts, of their groups."""
    rows, length = numbers.shape
    each = getattr(weight, by).double().reshape(rows, weight.groups)
    return numbers * each.repeat_interleave(length // weight.groups, 1)


def steps_of(kind: qtype) -> float:
    """Steps from 0 to the largest element of a block of x to which it may be rounded; infinity: it is not."""
    if kind.is_floating_point or (kind.is_codebook and kind.bits > 6):
        return math.inf
    return STEPS8 if kind.bits <= 5 else STEPS16


@dataclass
class Reference:
    """The result in float64, and limits of errors.

    Attributes:
        out: float64 ``[rows, N]``.
        each: limit of each element's error, ``[rows, N]``; infinite where x or the result is transformed in its own dtype.
        whole: limit of the error's norm.
    """

    out: torch.Tensor
    each: torch.Tensor
    whole: float

    def check(self, got: torch.Tensor, about: object = "") -> None:
        found = got.detach().double().reshape(self.out.shape)
        error = (found - self.out).abs()
        worst = float((error / self.each).nan_to_num(math.inf, math.inf).max()) if error.numel() else 0.0
        norm = float(error.norm())
        assert worst <= 1, f"{about}: an element is off by {worst:.3g} times of what rounding explains"
        assert norm <= self.whole, f"{about}: the error is {norm:.3g}, what rounding explains {self.whole:.3g}"


def reference(
    x: torch.Tensor,
    weight: QTensor,
    bias: torch.Tensor | None = None,
    *,
    arithmetic: str = "auto",
    activation: qtype | None = None,
    input_scale: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Reference:
    """``x @ weight.T + bias`` in float64, from the stored bytes.

    Args:
        x: ``[rows, K]``.
        weight: ``[N, K]``.
        arithmetic: ``"auto"``: x may be rounded to 8 or 16 bits, a block at a time, for the types that kernels multiply as
            integers. ``"float"``: it may not.
        dtype: of the result; None: of x.
    """
    dtype = dtype or x.dtype
    step, wide = HALF_STEP[dtype], HALF_STEP[x.dtype]
    plain = codes_only(weight)
    values = values_of(plain)
    seen = scale_columns(as_stored(x.double(), weight), weight)
    seen = seen if weight.rotation is None else rotate(seen, weight.rotation)
    transformed = weight.rotation is not None or weight.column is not None
    kind, ragged = weight.qtype, weight.groups > 1 and bool(weight.group_size % BLOCK)
    steps = steps_of(kind) if arithmetic == "auto" and not ragged else math.inf
    if activation is not None:
        codes, scale = quantize_activations(seen.float(), activation, input_scale)
        seen, steps = codes.double() * scale.double(), math.inf
    out = seen @ values.t()
    # Sums in float32, of weights computed in float32 from numbers as large as their row's largest.
    magnitude = values.abs() + values.abs().amax(1, keepdim=True) if values.numel() else values
    size = seen.abs() @ magnitude.t()
    each = 3e-6 * size + 1e-37 * (1 + magnitude.sum(1))
    spread = (seen.square() @ values.square().t()).sqrt()
    whole = 1e-6 * float((seen.square() @ magnitude.square().t()).sqrt().norm()) + 1e-37 * float(magnitude.sum())
    # Many rows of few-bit weights are multiplied as bfloat16 where integers do not pay and the processor has it.
    used = library.find()
    tiles = used is not None and used.has_tiles and len(x) > gemm.MOST_ROWS_BESIDE_TILES[gemm.BLOCKS8]
    narrow = len(x) > 4 and (kind.is_floating_point or ((ragged or tiles) and kind.bits <= 5)) and arithmetic == "auto"
    steps = math.inf if narrow else steps
    if dtype == torch.bfloat16 or narrow:  # both factors of a product rounded to bfloat16
        # Where a single product makes the result, both factors may be off by half a step.
        each, whole = each + 2 * 2**-9 * size, whole + (4.5e-3 if narrow else 2.5e-3) * float(spread.norm())
        if kind.bits <= 5:  # few values, each rounded in the same direction wherever it is
            whole += 2**-9 * float((seen.abs() @ values.abs().t()).norm())
    if transformed:
        each, whole = torch.full_like(each, math.inf), whole + 3 * wide * float(spread.norm())
    if math.isfinite(steps):
        blocks = seen.abs()
        blocks = torch.nn.functional.pad(blocks, (0, -blocks.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
        rounding = (blocks.amax(2, keepdim=True) / steps).expand_as(blocks).flatten(1)[:, : seen.shape[1]]
        each = each + 0.51 * rounding @ values.abs().t()
        variance = rounding.square() / 12 @ values.square().t()
        if weight.qtype.is_codebook:  # the table's values as integers of 8 bits
            table = table_of(weight)
            wrong = (table.step * (table.levels.double() - 128) - table.values.double()).abs()
            off = scaled(plain, wrong[codes_of(plain).long()])
            each = each + 1.01 * (seen.abs() + rounding) @ off.t()
            variance = variance + seen.square() @ off.square().t()
        # The same rounding of x meets all rows of the weight, so errors of few rows of x vary more than independent ones.
        whole += 2.5 * float(variance.sum().sqrt()) * (1 + 2 / math.sqrt(min(max(1, x.numel()), 400)))
    if "up" in weight.inner_tensors():
        parts = weight.inner_tensors()
        more = x.double() @ parts["down"].double().t() @ parts["up"].double().t()
        each = each + 4 * wide * (x.double().abs() @ parts["down"].double().abs().t() @ parts["up"].double().abs().t())
        whole += 8 * wide * float(more.norm()) + 2 * step * float(out.norm())
        each, out = each + 2 * step * out.abs(), out + more
    if bias is not None:
        each, whole = each + step * out.abs(), whole + step * float(out.norm())
        out = out + bias.double()
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    each = 1.01 * (each + step * out.abs()) + smallest
    whole += step * float(out.norm()) + smallest * math.sqrt(max(1, out.numel()))
    return Reference(out, each, whole)


def quantized_layer(weight: QTensor, bias: torch.Tensor | None = None) -> torch.nn.Linear:
    """A Linear with that weight."""
    layer = torch.nn.Linear(1, 1, bias=False, dtype=weight.dtype)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    layer.bias = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)
    return layer
