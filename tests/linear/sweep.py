"""Every weight type x shape x dtype on this CPU, against float64 of the same dequantized weights.

    python sweep.py [TYPE ...]      all types, unless some are named

A script, run by `test_sweep.py` in a process of its own: an operator that crashes is a failure, not the end of the tests.
Prints the largest error by path and dtype; exits with 1 when one is too large.
"""

import itertools
import sys

import torch

from requanto import QTensor, qint8
from requanto.linear import choose, linear
from requanto.linear.activations import quantize_activations
from requanto.linear.cpu.gemm import FLOAT, PARTS, arithmetic_of, is_narrowed
from requanto.linear.prepack import prepare
from requanto.linear.registry import problem_of

LIMITS = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
#: Of GEMMs that round x, in blocks of 32 columns, to 8 and to 16 bits. test_cpu_sweep.py has bounds for each element.
ROUNDED = {"cpu-integer": 1.5e-2, "cpu-integer-16": 1e-4, "x in bfloat16": 4e-3, "x in two parts": 1e-5}
KINDS = ("int8", "int4", "int2", "float8", "fp8_e4m3fnuz", "fp8_e5m2")
KINDS += ("int3", "int6", "uint1", "uint4", "uint8", "nf4", "fp7_e3m3", "codebook3")
# rows, N, K
SHAPES = (
    (1, 1, 1), (1, 16, 16), (1, 17, 33), (2, 3, 300), (3, 64, 64), (5, 128, 192), (7, 300, 77), (16, 256, 256),
    (17, 96, 160), (33, 64, 128), (65, 192, 96), (129, 32, 32), (300, 48, 272), (300, 300, 300),
    (1, 128, 192), (2, 320, 64), (4, 64, 320), (300, 320, 256),
)  # fmt: skip
worst: dict[tuple[str, torch.dtype], tuple[float, str]] = {}


def inputs(rows: int, length: int, dtype: torch.dtype, form: str) -> torch.Tensor:
    """x of ``rows`` rows: as it comes, off its alignment, strided, or with a row of zeros."""
    if form == "unaligned":
        return torch.randn(rows * length + 1).to(dtype)[1:].view(rows, length)
    if form == "strided":
        return torch.randn(length, rows).to(dtype).t()
    x = torch.randn(rows, length).to(dtype)
    if form == "zero row":
        x[0] = 0
    return x


def unaligned(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers, 8 bytes past an aligned address, as files hold them."""
    data = torch.empty(tensor.nbytes + 72, dtype=torch.uint8)
    start = -data.data_ptr() % 64 + 8
    data = data[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    data.view(torch.uint8).copy_(tensor.view(torch.uint8))
    return data


def check(kind: str, shape: tuple[int, int, int], dtype: torch.dtype, form: str, pack: bool, **how: object) -> None:
    rows, out_features, length = shape
    activation = how.pop("activation", None)
    weight = QTensor.quantize(torch.randn(out_features, length).to(dtype), kind, **how)
    if form == "unaligned":
        weight.qdata = unaligned(weight.qdata)
    layer = torch.nn.Linear(1, 1, bias=False)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    stored = weight.qdata.clone()
    float_weight = weight.dequantize(torch.float32).double()
    layer.weight.activation = activation
    if pack:
        prepare(layer, smallest=0)
    x = inputs(rows, length, dtype, form)
    bias = torch.randn(out_features).to(dtype) * 0.1 if rows % 2 else None
    with torch.no_grad():
        got = linear(x.view(1, rows, length) if form == "plain" else x, layer.weight, bias).view(rows, out_features)
    path = choose(problem_of(layer.weight, dtype, rows, activation)).implementation.name  # packed now, if it is to be
    if path == "cpu-float" and is_narrowed(weight.qtype, rows, dtype, FLOAT):
        path = "x in bfloat16"
    elif path == "cpu-float" and arithmetic_of(weight, rows, dtype) == PARTS:
        path = "x in two parts"
    exact = x.double()
    if activation is not None:
        codes, scale = quantize_activations(x, activation)
        exact = codes.double() * scale.double()
    want = exact @ float_weight.t()
    # A bias that cancels the product, or hides it, is no fault of the product.
    size = want.norm().item()
    want += 0 if bias is None else bias.double()
    size = max(size, want.norm().item())
    error = (got.double() - want).norm().item() / size if size else got.double().norm().item()
    assert got.dtype == dtype
    assert torch.equal(layer.weight.qdata.view(torch.uint8), stored.view(torch.uint8)), (kind, shape, "codes changed")
    key = (path, dtype)
    # not >: NaN counts as the worst
    if key not in worst or not error <= worst[key][0]:
        worst[key] = (error, f"{kind} {shape} {form} {how} pack={pack}")


def main() -> int:
    torch.manual_seed(0)
    forms = itertools.cycle(("plain", "unaligned", "strided", "zero row"))
    for kind, shape, dtype, pack in itertools.product(sys.argv[1:] or KINDS, SHAPES, LIMITS, (False, True)):
        for symmetric in (True, False) if kind in ("int4", "int2", "int3") else (None,):
            check(kind, shape, dtype, next(forms), pack, symmetric=symmetric)
        if kind == "int4":
            check(kind, shape, dtype, next(forms), pack, group_size=32)
            check(kind, shape, dtype, next(forms), pack, group_size=None)
        if kind in ("int8", "int4"):
            check(kind, shape, dtype, next(forms), pack, activation=qint8)
            check(kind, shape, dtype, next(forms), pack, group_size=16, symmetric=True)
    failed = False
    for (path, dtype), (error, where) in sorted(worst.items(), key=str):
        bad = not error <= max(LIMITS[dtype], ROUNDED.get(path, 0))
        failed |= bad
        print(f"{'FAIL' if bad else 'ok  '} {path:18} {dtype!s:15} {error:.1e}  {where}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
