"""The launches that are compiled: what real models have.

A type is written `int4g64a`: codes, `g` and the group size (or `row`: one group a row), `a` with a shift. Codes: int1 to
int8, uint8, float8 (e4m3fn), float8e5m2, float8e4m3fnuz, nf4, mxfp4 (e2m1), mxfp6 (e3m2). Scale and shift have the
activation's dtype and are stored group-major, `[G, N]` in memory; with `/plain` after the type, row-major.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from aot_programs import requanto_kernels as rk

#: N and K of the linear layers: divisible by every tile, as in real models. Few rows take a split of K here.
N, K = 4096, 14336
FLOAT8 = {
    "float8": torch.float8_e4m3fn, "float8e5m2": torch.float8_e5m2, "float8e4m3fnuz": torch.float8_e4m3fnuz,
}  # fmt: skip
SMALL_FLOATS = {"mxfp4": (4, "e2m1"), "mxfp6": (6, "e3m2")}


@dataclass(frozen=True)
class Case:
    """One call of a launcher. op: its name. rows: of x, or of tokens for experts."""

    op: str
    type: str
    rows: int = 1
    dtype: torch.dtype = torch.bfloat16
    n: int = N
    k: int = K

    @property
    def name(self) -> str:
        shape = "" if (self.n, self.k) == (N, K) else f" {self.n}x{self.k}"
        rows = "" if self.op == "wq_dequant" else f" M={self.rows}"
        return f"{self.op} {self.type}{rows}{shape}{'' if self.dtype == torch.bfloat16 else f' {str(self.dtype)[6:]}'}"


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def groups_of(lead: tuple[int, ...], groups: int, dtype: torch.dtype, plain: bool) -> torch.Tensor:
    """Scale or shift `[N, G]`, or `[E, N, G]`; group-major unless plain."""
    if plain:
        return empty(*lead, groups, dtype=dtype)
    return empty(*lead[:-1], groups, lead[-1], dtype=dtype).transpose(-1, -2)


def weight(text: str, n: int, k: int, dtype: torch.dtype, experts: int = 0) -> tuple[list, dict]:
    """(codes, scale, shift) without data, and the keywords that describe them."""
    hit = re.fullmatch(r"([a-z]+\d(?:e\dm\d\w*?)?)(row|g\d+)(a?)(/plain)?", text)
    if not hit:
        raise ValueError(
            f"type {text!r}: expected one like int4g64a, int8row, nf4g64, float8row, mxfp4g32 or int4g64a/plain"
        )
    codes, grouping, affine, plain = hit.groups()
    lead = (experts, n) if experts else (n,)
    group = k if grouping == "row" else int(grouping[1:])
    keywords = {"group_size": group, "layout": "exec"}
    scales = [groups_of(lead, -(-k // group), dtype, bool(plain)) for _ in range(1 + bool(affine))]
    if codes in FLOAT8:
        bits, q = 8, empty(*lead, k, dtype=FLOAT8[codes])
    elif codes in ("int8", "uint8"):
        bits, q = 8, empty(*lead, k, dtype=getattr(torch, codes))
    else:
        bits = SMALL_FLOATS[codes][0] if codes in SMALL_FLOATS else int(codes[-1])
        q = empty(*lead, -(-k * bits // 8), dtype=torch.uint8)
    if codes in SMALL_FLOATS:
        keywords["small_float"] = SMALL_FLOATS[codes][1]
    if codes.startswith("nf"):
        keywords["codebook"] = empty(1 << bits, dtype=torch.float32)
    return [q, *scales, *([] if affine else [None])], keywords | {"bits": bits}


def call_of(case: Case, config: "rk.Config | None" = None) -> Callable[[], object]:
    """The launch, on tensors without data; run it inside `aot_programs.device`."""
    n, k, rows, dtype = case.n, case.k, case.rows, case.dtype
    keywords = {} if config is None else {"config": config}
    if case.op in ("quant_rows", "round_rows"):
        code, _, form = case.type.partition("/")
        more = {"column": empty(k, dtype=dtype), "static_scale": empty(1, dtype=torch.float32)} if form else {}
        return lambda: getattr(rk, case.op)(empty(rows, k, dtype=dtype), FLOAT8.get(code, torch.int8), **more)
    if case.op in ("scaled_mm", "int_mm"):
        code = FLOAT8.get(case.type, torch.int8)
        scales = empty(rows, 1, dtype=torch.float32), empty(n, 1, dtype=dtype)
        x, w = empty(rows, k, dtype=code), empty(n, k, dtype=code)
        return lambda: getattr(rk, case.op)(x, w, *scales, **keywords, out_dtype=dtype)
    experts = 64 if case.op in ("wq_gemm_grouped", "wq_gemm_dx_grouped") else 0
    parts, described = weight(case.type, n, k, dtype, experts)
    keywords |= described
    if case.op == "wq_dequant":
        return lambda: rk.wq_dequant(*parts, k=k, dtype=dtype, **described)
    if case.op == "w4a8_gemm":
        x, xs = empty(rows, k, dtype=torch.int8), empty(rows, dtype=torch.float32)
        return lambda: rk.w4a8_gemm(x, xs, *parts, out_dtype=dtype, **keywords)
    if case.op == "wq_gemm_many":  # queries, keys and values of n rows in all
        several = [tuple(weight(case.type, size, k, dtype)[0]) for size in (n // 2, n // 4, n // 4)]
        return lambda: rk.wq_gemm_many(empty(rows, k, dtype=dtype), several, **keywords)
    offsets = empty(experts + 1, dtype=torch.int32)
    if case.op == "wq_gemm_grouped":
        return lambda: rk.wq_gemm_grouped(empty(rows, k, dtype=dtype), offsets, *parts, **keywords)
    if case.op.startswith("wq_gemm_dx"):
        more = {"offsets": offsets} if experts else {}
        return lambda: rk.wq_gemm_dx(empty(rows, n, dtype=dtype), *parts, k=k, **more, **keywords)
    if case.op == "wq_gemm":
        return lambda: rk.wq_gemm(empty(rows, k, dtype=dtype), *parts, **keywords)
    raise ValueError(f"op {case.op!r}: none of those in benchmarks/aot_cases.py")


#: (op, types, rows) that every architecture with matrix instructions compiles.
COMMON = (
    ("wq_gemm", "int4g64a", (1, 16, 64, 256, 4096)),
    ("wq_gemm", "int4g128", (1, 16, 4096)),
    ("wq_gemm", "int4row", (1, 4096)),
    ("wq_gemm", "nf4g64", (1, 64, 4096)),
    ("wq_gemm", "int2g64a", (1, 256)),
    ("wq_gemm", "int3g64a", (1, 256)),
    ("wq_gemm", "int8row", (1, 64, 4096)),
    ("wq_gemm", "float8row", (1, 64, 4096)),
    ("wq_gemm_grouped", "int4g64a", (64, 4096)),
    ("wq_gemm_dx", "int4g64a", (16, 4096)),
    ("wq_gemm_many", "int4g64a", (1, 16)),
    ("scaled_mm", "int8", (16, 128, 256, 4096)),
    ("scaled_mm", "float8", (16, 128, 256, 4096)),
    ("w4a8_gemm", "int4g64a", (4096,)),
    ("w4a8_gemm", "int4g128", (16, 4096)),
    ("w4a8_gemm", "int4row", (16, 4096)),
)  # fmt: skip
#: On every architecture, also on those without matrix instructions.
SMALL = (
    ("wq_dequant", ("int4g64a", "nf4g64", "int8row", "float8row", "int3g64a", "int5g64a", "mxfp4g32"), (1,)),
    ("quant_rows", ("int8", "float8", "int8/column and static scale"), (1,)),
    ("round_rows", ("int8", "float8"), (1,)),
    ("int_mm", "int8", (17,)),
)  # fmt: skip
#: On the goal's architecture: the other types, widths, dtypes and strides.
MORE = (
    ("wq_gemm", ("int4g32", "mxfp4g32", "float8g128", "int8g128a", "uint8g64a"), (1, 4096)),
    ("wq_gemm", ("int1g64a", "int2g32a", "int5g64a", "int6g64a", "int7row", "nf3g64", "mxfp6g32", "float8e5m2row"), (1,)),
    ("wq_gemm", ("int4g64a/plain", "int4g128/plain"), (1, 4096)),
    ("wq_gemm_grouped", ("nf4g64", "int8row", "float8row"), (64, 4096)),
    ("wq_gemm_dx", ("int4g128", "nf4g64", "int8row", "float8row"), (4096,)),
    ("wq_gemm_dx_grouped", ("int4g64a",), (4096,)),
    ("scaled_mm", ("float8e5m2",), (4096,)),
    ("w4a8_gemm", ("int3g256", "int8row"), (4096,)),
    ("wq_dequant", ("int1g64a", "int2g64a", "int6g64a", "int7row", "uint8g64a", "mxfp6g32", "float8e5m2row"), (1,)),
)  # fmt: skip
#: On AMD GPUs whose families are the general ones.
FEW = (
    ("wq_gemm", ("int4g64a", "nf4g64", "int8row", "float8row"), (1, 4096)),
    ("wq_gemm_dx", ("int4g64a",), (4096,)),
    ("scaled_mm", ("int8",), (16, 4096)),
    ("w4a8_gemm", ("int4g128",), (4096,)),
    ("wq_dequant", ("int4g64a", "nf4g64", "float8row"), (1,)),
    ("quant_rows", ("int8",), (1,)),
)  # fmt: skip


def _expand(groups) -> Iterator[Case]:
    for op, types, rows in groups:
        for text in (types,) if isinstance(types, str) else types:
            for m in rows:
                yield Case(op, text, m)


def cases(arch: str) -> Iterator[Case]:
    """All launches that are compiled for this architecture."""
    if arch == "sm_75":  # Triton emits no matrix instruction there: only the kernels that decode and quantize are used.
        yield from _expand(SMALL)
        return
    if arch.startswith("gfx") and arch != "gfx942":
        yield from _expand(FEW)
        return
    native = "float8e4m3fnuz" if arch == "gfx942" else "float8"
    for case in _expand(COMMON + SMALL):
        yield replace(case, type=native) if case.op == "scaled_mm" and case.type == "float8" else case
    if arch == "sm_90":
        yield from _expand(MORE)
        for m in (1, 4096):
            yield Case("wq_gemm", "int4g64a", m, torch.float16)
            yield Case("wq_gemm", "int4g64a", m, torch.float32)
        yield Case("wq_gemm", "int4g64a", 1, n=128256, k=4096)  # an output head: no split
        yield Case("wq_dequant", "int4g64a", 1, torch.float16)
