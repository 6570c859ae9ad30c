"""Quantized operands and their float64 meaning, computed without the package under test."""

from dataclasses import dataclass

import torch

FP8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Unsigned codes to bytes along the last axis, low bits first: the bits of a row are one stream."""
    stream = (codes.unsqueeze(-1) >> torch.arange(bits) & 1).flatten(-2)
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (stream << torch.arange(8)).sum(-1).to(torch.uint8)


def decode_fp8(data: torch.Tensor) -> torch.Tensor:
    """Float8 to float64 by the formats' definitions, from the bits."""
    kind = data.dtype
    u = data.view(torch.uint8).long()
    mantissa, bias = {FP8[0]: (3, 7), FP8[1]: (3, 8), FP8[2]: (2, 15)}[kind]
    m, e = u & ((1 << mantissa) - 1), (u & 0x7F) >> mantissa
    fraction = m.double() / (1 << mantissa)
    value = torch.where(e == 0, fraction * 2.0 ** (1 - bias), (1 + fraction) * torch.exp2((e - bias).double()))
    return torch.where(u >= 128, -value, value)


@dataclass
class Weight:
    """A random quantized weight; `meaning` is W[N, K] (or [E, N, K]) in float64, `equal` says which are of equal groups.

    what: bits, group_size, and codebook or small_float, as the kernels take them.
    """

    qdata: torch.Tensor
    scale: torch.Tensor
    shift: torch.Tensor | None
    meaning: torch.Tensor
    bits: int
    group: int | None
    equal: torch.Tensor | None = None
    codebook: torch.Tensor | None = None
    small_float: str = ""

    @property
    def what(self) -> dict:
        found = {"bits": self.bits, "group_size": self.group}
        found |= {} if self.codebook is None else {"codebook": self.codebook}
        return found | ({"small_float": self.small_float} if self.small_float else {})


def small_float_values(form: str) -> torch.Tensor:
    """Values of all codes of a float such as "e2m1": sign, exponent, mantissa; subnormal at exponent 0."""
    exponents, mantissas = int(form[1]), int(form[3])
    bias = 2 ** (exponents - 1) - 1
    values = []
    for e in range(2**exponents):
        fractions = [m / 2**mantissas for m in range(2**mantissas)]
        values += [f * 2.0 ** (1 - bias) if e == 0 else (1 + f) * 2.0 ** (e - bias) for f in fractions]
    values = torch.tensor(values, dtype=torch.float64)
    return torch.cat([values, -values])


def weight(
    n: int, k: int, bits: int, group: int | None = None, affine: bool = False, fp8: torch.dtype | None = None,
    scale_dtype: torch.dtype = torch.float32, experts: int = 0, device: str = "cpu", equal: float = 0.0,
    unsigned: bool = False, codebook: torch.Tensor | None = None, small_float: str = "",
) -> Weight:  # fmt: skip
    """equal: the share of groups whose weights are all equal, as the quantizer stores them: scale 1 and codes 0.

    unsigned: codes of 8 bits that are uint8. codebook: float32 value of each code. small_float: codes are such floats.
    """
    lead = (experts, n) if experts else (n,)
    size = group or k
    groups = -(-k // size)
    scale = (torch.rand(*lead, groups) * 0.05 + 0.01).to(scale_dtype)
    shift = (torch.rand(*lead, groups) * 0.3 - 0.1).to(scale_dtype) if affine else None
    of = torch.arange(k) // size
    same = torch.rand(*lead, groups) < equal
    if affine and equal:
        value = 10 ** (torch.rand(same.shape) * 5 - 4)  # 0.0001 .. 10, some of them 0
        value = value * torch.randint(-1, 2, same.shape)
        scale = scale.masked_fill(same, 1)
        shift = torch.where(same, value.to(scale_dtype), shift)
    if fp8 is not None:
        qdata = (torch.randn(*lead, k) * 2).to(fp8)
        values = decode_fp8(qdata)
    elif bits == 8 and unsigned:
        qdata = torch.randint(0, 256, (*lead, k), dtype=torch.uint8).masked_fill(same[..., of], 0)
        values = qdata.double()
    elif bits == 8:
        qdata = torch.randint(-128, 128, (*lead, k), dtype=torch.int8).masked_fill(same[..., of], 0)
        values = qdata.double()
    else:
        codes = torch.randint(0, 1 << bits, (*lead, k)).masked_fill(same[..., of], 0 if affine else 1 << (bits - 1))
        qdata = pack(codes, bits)
        values = codes.double() - (0 if affine else 1 << (bits - 1))
        if codebook is not None or small_float:
            values = (small_float_values(small_float) if small_float else codebook.double())[codes]
    meaning = scale.double()[..., of] * values
    if shift is not None:
        meaning = meaning - shift.double()[..., of]
    move = lambda t: None if t is None else t.to(device)  # noqa: E731
    return Weight(
        move(qdata), move(scale), move(shift), move(meaning), bits, group, move(same[..., of]), move(codebook), small_float
    )  # fmt: skip


def draw(kind: str, affine: bool, n: int, k: int, group: int | None = None, **more) -> Weight:
    """A weight of a kind: "5" or, of unsigned bytes, "u8"; "e3m2" for small floats, "table4" for a codebook of 4 bits."""
    if kind.startswith("table"):
        return weight(n, k, int(kind[5:]), group, codebook=torch.randn(2 ** int(kind[5:])), **more)
    if kind.startswith("e"):
        return weight(n, k, 1 + int(kind[1]) + int(kind[3]), group, small_float=kind, **more)
    return weight(n, k, int(kind[-1]), group, affine, unsigned=kind == "u8", **more)


def check_equal_groups(rebuilt: torch.Tensor, w: Weight, bound: float) -> None:
    """What a kernel makes of w's weights (found by a product with ones and zeros): groups of equal weights are `-shift`
    rounded once, or twice where scale and shift are wider than the result; the others are right as a whole."""
    assert w.equal.any()
    found, want = rebuilt[w.equal], w.meaning[w.equal]
    if rebuilt.dtype in (w.scale.dtype, torch.float32):
        assert torch.equal(found, want.to(rebuilt.dtype))
    step = torch.finfo(rebuilt.dtype)
    far = (found.double() - want).abs() - step.eps * want.abs() - step.eps * step.tiny
    assert far.amax() <= 0, (want[far.argmax()], found[far.argmax()])
    if not w.equal.all():
        assert error(rebuilt[~w.equal], w.meaning[~w.equal]) <= bound


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative error in the Frobenius norm; NaN and wrong shapes count as infinite."""
    if found.shape != expected.shape or not torch.isfinite(found).all():
        return float("inf")
    return ((found.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


#: What a product may lose. fp32: a sum of K terms in blocks loses a few ulp (6e-8 each); fp16 and bf16: one rounding of
#: each weight and one of the result.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
