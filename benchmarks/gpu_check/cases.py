"""What is measured, in order: each case gives one row. The first stages answer most in the least time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from gpu_check import peers

#: (N, K) of the goals: the down projection of an 8B model, the up projection of a 70B model.
SHAPES = ((4096, 14336), (28672, 8192))
GATE = (14336, 4096)
ROWS = (1, 16, 128, 4096)
#: Weights by which the stages of a run share its time; what a stage leaves, the next ones have.
STAGES = {"ceilings": 1, "goals": 30, "questions": 24, "models": 20, "peers": 20, "tune": 5}


@dataclass(frozen=True)
class Kind:
    """A type of weight, and of activations, as `QTensor.quantize` takes it; ``factor``: its matrix rate by that of bf16."""

    qtype: str
    group_size: int | None = None
    symmetric: bool | None = None
    activation: str | None = None

    @property
    def factor(self) -> int:
        return 1 if self.activation is None else 2


KINDS = {
    "int4 g128": Kind("int4", 128, True),
    "int4 g64 affine": Kind("int4", 64, False),
    "int8": Kind("int8"),
    "float8": Kind("float8"),
    "float8 x float8": Kind("float8", activation="float8"),
    "int8 x int8": Kind("int8", activation="int8"),
    "nf4": Kind("nf4", 64),
    "int4 x int8": Kind("int4", 128, True, "int8"),
}


@dataclass(frozen=True)
class Case:
    """One measurement: ``do`` names the function of `child.py` that runs it, the other fields are its arguments.

    stage, family: for `--only` and the summary. op: what is timed. kind: a key of KINDS. config: fields of the kernel's
    `Config` that differ from the shipped one. limit: seconds after which the child is taken to hang.
    """

    stage: str
    family: str
    do: str
    op: str
    kind: str = ""
    n: int = 0
    k: int = 0
    m: int = 0
    config: dict[str, Any] = field(default_factory=dict)
    limit: float = 30.0

    @property
    def key(self) -> str:
        """Names the case in the file: the same for the same measurement in any run."""
        config = ",".join(f"{name}={value}" for name, value in sorted(self.config.items()))
        return f"{self.stage}/{self.family}/{self.op}/{self.kind}/{self.n}x{self.k}/M={self.m}/{config}"

    def row(self) -> dict[str, Any]:
        """The columns that say what was measured."""
        found = {name: value for name, value in asdict(self).items() if value and name != "limit"}
        return {"case": self.key, **found}


def ceilings() -> Iterator[Case]:
    """The device, and the two ceilings that the other rows are judged by; then those of the vendor's 8-bit GEMMs."""
    yield Case("ceilings", "ceilings", "device", "device")
    for op in ("copy", "bf16", "float8", "int8"):
        yield Case("ceilings", "ceilings", "ceiling", op)


def kind_of(name: str) -> Kind | None:
    """The kind of a weight or a model; None for ``"bf16"``."""
    return KINDS.get(name.removesuffix(JOINED))


def goals() -> Iterator[Case]:
    """Each kind as users get it, through `nn.Linear`: the shapes of the goals, then the CPU time of one call."""
    for kind in KINDS:
        for n, k in SHAPES:
            for m in ROWS:
                yield Case("goals", kind, "product", "layer", kind, n, k, m)
    for kind in ("bf16", *KINDS):
        yield Case("goals", "host", "host", "host time", kind, 1024, 1024, 1)


def questions() -> Iterator[Case]:
    """Variants that decide what could not be decided without a clock, by question; what the registry needs comes first."""
    few, many = SHAPES
    # 1. From how many rows on decoding the whole weight for cuBLAS is faster: `DEQUANTIZE_ROWS`.
    for kind in ("int4 g128", "int8", "nf4"):
        for m in (256, 512, 1024, 2048, 4096):
            for op in ("fused", "dequantize"):
                yield Case("questions", "dequantize-rows", "product", op, kind, *few, m)
    # 2. From how many rows on 8-bit activations are faster than float ones.
    for kind in ("int4 g128", "int4 x int8", "int8", "int8 x int8", "float8", "float8 x float8"):
        for m in (4, 32, 64):
            yield Case("questions", "least-rows", "product", "layer", kind, *few, m)
    # 3. Whose GEMM of 8-bit codes: ours or the vendor's; x quantized in the call or before.
    for kind in ("float8 x float8", "int8 x int8"):
        fast = ("vendor codes, fast sums",) if kind.startswith("float8") else ()
        for m, (n, k) in ((32, few), (128, few), (4096, few), (4096, many)):
            for op in ("codes", "vendor codes", *fast, "vendor", "quantize x"):
                yield Case("questions", "vendor", "product", op, kind, n, k, m)
    # 4. Gate and up projection of an 8B model: one launch for both, or two.
    for kind in ("int4 g128", "int4 g64 affine", "int8"):
        for m in (1, 16):
            for op in ("together", "apart"):
                yield Case("questions", "joined", "product", op, kind, *GATE, m)
    # 5. How far K is split for one row, and which tile: a grid, since they depend on each other.
    for n, k in SHAPES:
        for split in (1, 2, 4, 8, 16):
            for block_n in (64, 128):
                for block_k in (128, 256):
                    config = {"split_k": split, "block_n": block_n, "block_k": block_k}
                    yield Case("questions", "splits", "product", "wq_gemm", "int4 g128", n, k, 1, config)
    # 6. One field at a time, from what ships.
    for kind, ms in (("int4 g128", (1, 16, 128)), ("int4 g64 affine", (1,)), ("int8", (1, 128)), ("float8", (1,))):
        for m in ms:
            for config in _one_at_a_time(m):
                yield Case("questions", "tiles", "product", "wq_gemm", kind, *few, m, config)
    for kind in ("float8 x float8", "int8 x int8"):
        for m in (4096, 128):
            for config in _tiles_of_codes(kind, m):
                yield Case("questions", "8bit-tiles", "product", "codes", kind, *few, m, config)


def _one_at_a_time(m: int) -> Iterator[dict[str, Any]]:
    """Fields of `wq_gemm`'s `Config`; "other": the opposite of what ships. scale: where scales are applied (`forms.py`)."""
    yield {}
    for name, values in (
        ("scale", ("before", "after")), ("num_stages", (2, 3, 4, 5)), ("num_warps", (4, 8)), ("block_n", (32, 64, 128)),
        ("block_k", (64, 128, 256)), ("split_k", (1, 2, 4, 8)), ("block_m", (32, 64, 128) if m > 16 else ()),
        ("left", ("other",)), ("fields", ("other",)),
    ):  # fmt: skip
        yield from ({name: value} for value in values)


def _tiles_of_codes(kind: str, m: int) -> Iterator[dict[str, Any]]:
    """Fields of `scaled_mm`'s `Config`: tiles, then one field at a time."""
    yield {}
    large = ((128, 256, 8), (256, 128, 8), (128, 128, 8), (128, 128, 4))
    for block_m, block_n, warps in large if m > 128 else ((128, 64, 4), (64, 128, 4)):
        for stages in (3, 4):
            yield {"block_m": block_m, "block_n": block_n, "num_warps": warps, "num_stages": stages}
    for name, values in (
        ("persistent", ("other",)), ("per_processor", (1, 2)), ("shrink", ("other",)), ("left", ("other",)),
        ("group_m", (4, 16)), ("exact_every", (32, 64, 128) if kind.startswith("float8") else ()),
    ):  # fmt: skip
        yield from ({name: value} for value in values)


#: Ends the kind of a model whose layers that read one tensor are joined (`requanto.join_layers`).
JOINED = " joined"
#: (step, mode) of a model; "32 layers" of a body are computed from a part of them (`models.py`).
MODEL_STEPS = (
    ("decode", "eager"), ("decode", "graph"), ("decode", "compiled"), ("prefill", "eager"), ("prefill", "graph"),
)  # fmt: skip


def models() -> Iterator[Case]:
    """Decode and prefill of an 8B-shaped model, then a denoising step of a Flux-shaped one."""
    decode = ("bf16", "int4 g128", "int4 g128 joined", "int4 g64 affine")
    for kind in (*decode, "int8", "float8 x float8", "int8 x int8"):
        for step, mode in MODEL_STEPS:
            if (mode == "compiled" and kind not in decode) or (step == "prefill" and kind.endswith(JOINED)):
                continue
            yield Case("models", "llama-8b", "model", f"{step} {mode}", kind, limit=90.0)
        if kind in ("bf16", "float8 x float8", "int8 x int8"):
            yield Case("models", "llama-8b", "model", "prefill compiled", kind, limit=90.0)
    for kind in ("bf16", "int8", "float8 x float8", "int8 x int8"):
        yield Case("models", "flux", "model", "step graph", kind, limit=60.0)


def peer_cases() -> Iterator[Case]:
    """Each operation of each peer, at the shapes of the goals."""
    for peer, ops in peers.OPS.items():
        for n, k in SHAPES:
            for op in ops:
                for m in ROWS:
                    yield Case("peers", peer, "peer", op, op, n, k, m, limit=60.0)


def tuning() -> Iterator[Case]:
    """The kernels' own tuning for the shapes of the goals; its table lands beside the rows."""
    for kind in KINDS:
        for n, k in SHAPES:
            yield Case("tune", "tune", "tune", "tune", kind, n, k, limit=120.0)


def every_case() -> list[Case]:
    """All cases, in the order in which they run."""
    parts: Iterable[Iterator[Case]] = (ceilings(), goals(), questions(), models(), peer_cases(), tuning())
    return list({case.key: case for part in parts for case in part}.values())


#: Shape and rows of a dry run: blocks of the execution layout and groups fit, the rows do not fill a tile.
DRY_SHAPE, DRY_ROWS = (32, 256), (1, 3)
#: What a dry run does of the models: every step and mode once, and a quantized one of each.
DRY_MODELS = {
    "bf16": ("decode eager", "prefill eager", "prefill graph", "step graph"),
    "int4 g128": ("decode compiled",),
    "int4 g128 joined": ("decode eager",),
    "int8 x int8": ("decode graph",),
}


def dry_cases() -> list[Case]:
    """One case for each path through the code: every family, every operation of every kind, tiny."""
    found: dict[object, Case] = {}
    families: set[str] = set()
    for case in every_case():
        if (case.do == "host" or case.family == "joined") and case.kind not in ("bf16", "int4 g128", "int8 x int8"):
            continue
        if case.stage == "tune" or (case.stage == "models" and case.op not in DRY_MODELS.get(case.kind, ())):
            continue  # tuning asks for a device
        n, k = DRY_SHAPE if case.n else (0, 0)
        m = 17 if "vendor" in case.op else DRY_ROWS[case.m >= 16] if case.m else 0  # the vendor's least
        path = (
            case.do,
            case.op,
            case.kind,
            m if case.op == "layer" else None,
            case.family if case.do != "product" else "",
        )
        if path in found and case.family in families:
            continue
        families.add(case.family)
        tiny = Case(case.stage, case.family, case.do, case.op, case.kind, n, k, m, case.config, 120.0)
        found.setdefault(path if path not in found else tiny.key, tiny)
    return list(found.values())
