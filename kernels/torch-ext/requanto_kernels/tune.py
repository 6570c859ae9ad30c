"""Finds the fastest tile for given shapes on the present GPU, and stores it in the user's table.

What is timed is what a model launches: codes of its type in its layout, scales of its dtype in the order that layers keep
them in. Nothing else in the package measures times.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

import torch

from . import _check as check
from ._device import arch_of
from .config import Config, check_user_table, families, family_bits, key, nearest_arch, served_triton, store
from .layout import group_major, to_exec_layout
from .scaled_mm import scaled_mm
from .w4a8_gemm import w4a8_gemm
from .wq_gemm import of_codebook, wq_gemm

OPS = ("wq_gemm", "scaled_mm", "w4a8_gemm")
#: Names of types of codes, as `_check.check_weight` has them, besides "" for integers: unsigned bytes, float8, a codebook.
#: Further ones are small floats, such as "e2m1".
KINDS = {"u8": torch.uint8, "e4m3fn": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "e4m3fnuz": torch.float8_e4m3fnuz}
#: Bytes of weights that are read in turn, so that no weight is still in the L2 cache, and most of them.
ROTATED_BYTES, MOST_COPIES = 256e6, 256


@dataclass(frozen=True)
class Problem:
    """What is tuned: one op for one type of weight and shape.

    kind: of codes, see `KINDS`. group: 0 for one scale per row. scale_dtype: of scales (and shifts). dtype: of x where x is
    not quantized.
    """

    op: str
    bits: int
    n: int
    k: int
    kind: str = ""
    group: int = 0
    affine: bool = False
    scale_dtype: torch.dtype = torch.float32
    layout: str = "exec"
    dtype: torch.dtype = torch.bfloat16


def candidates(problem: Problem, m: int, arch: str) -> list[Config]:
    """The shipped tiles for the architecture or for any, without duplicates; the heuristic splits K."""
    served, bits, op = nearest_arch(arch), family_bits(problem.bits), problem.op
    dtype = _x_dtype(problem)
    found: dict[Config, None] = {}
    for row in families():
        if row["op"] != op or bits not in row.get("bits", [bits]) or served not in row.get("arch", [served]):
            continue
        if served_triton() not in row.get("triton", [served_triton()]):
            continue
        # Exact fp32 runs on the ordinary units, with tiles of its own.
        if dtype not in row.get("dtype", [] if dtype == "float32" else [dtype]):
            continue
        config = Config(**row["config"])
        if config.block_m <= max(16, 2 * m):
            found[of_codebook(config) if problem.kind == "table" else config] = None
    return list(found)


def neighbours(config: Config, problem: Problem, m: int) -> list[Config]:
    """Configs that differ in one field that the op uses, and that change no result but by the order of sums."""
    op = problem.op
    whole = replace(config, shrink=False)  # a tile for one number of rows is what it says
    found = [replace(config, num_stages=stages) for stages in (config.num_stages - 1, config.num_stages + 1) if stages]
    found.append(replace(config, num_warps=12 - config.num_warps))  # 4 or 8
    found += [replace(whole, block_n=n) for n in (config.block_n // 2, config.block_n * 2) if 32 <= n <= 256]
    found += [replace(config, block_k=k) for k in (config.block_k // 2, config.block_k * 2) if 64 <= k <= 256]
    found += [
        replace(whole, block_m=b)
        for b in (config.block_m // 2, config.block_m * 2)
        if 16 <= b <= max(16, min(256, 2 * m))
    ]
    if m <= 256 and not config.persistent:
        found += [replace(config, split_k=split) for split in (1, 2, 4, 8, 16) if split != config.split_k]
    if op == "wq_gemm" and problem.bits < 8:
        found.append(replace(config, fields=not config.fields))
    if op != "w4a8_gemm" and not config.persistent:
        found.append(replace(config, left=not config.left))
    if config.persistent:
        found.append(replace(config, per_processor=3 - config.per_processor))  # 1 or 2
    return [of_codebook(one) for one in found] if problem.kind == "table" else found


def median_ms(launch: Callable[[int], object], copies: int, repeats: int) -> float:
    """Median milliseconds of a launch. All copies are in one CUDA graph, since Python launches take longer than kernels."""
    launch(0)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for copy in range(copies):
            launch(copy)
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / copies)
    return sorted(times)[len(times) // 2]


def _x_dtype(problem: Problem) -> str:
    """The dtype of x in the names of entries."""
    if problem.op == "wq_gemm":
        return str(problem.dtype)[6:]
    return "float8" if problem.kind else "int8"


def _codes(problem: Problem, device: torch.device) -> torch.Tensor:
    """Random codes in the layout that is tuned."""
    n, k, bits = problem.n, problem.k, problem.bits
    if bits == 8:
        if problem.kind in check.FP8_KINDS.values():
            return (torch.rand((n, k), dtype=torch.float32, device=device) * 8 - 4).to(KINDS[problem.kind])
        low, high = (0, 256) if problem.kind == "u8" else (-127, 128)
        return torch.randint(low, high, (n, k), dtype=KINDS.get(problem.kind, torch.int8), device=device)
    codes = torch.randint(0, 256, (n, -(-k * bits // 8)), dtype=torch.uint8, device=device)
    return to_exec_layout(codes, bits) if problem.layout == "exec" else codes


def _launcher(problem: Problem, m: int, device: torch.device) -> tuple[Callable[[Config, int], object], int, str]:
    """(launch, copies, form): launch(config, i) runs the op with copy i of a random weight; the copies exceed L2."""
    op, n, k, bits = problem.op, problem.n, problem.k, problem.bits
    copies = max(1, min(MOST_COPIES, int(ROTATED_BYTES / (n * k * bits / 8))))
    groups = k // problem.group if problem.group else 1
    scale = group_major(torch.rand((n, groups), dtype=problem.scale_dtype, device=device) * 0.01 + 0.01)
    ws = [_codes(problem, device) for _ in range(copies)]
    if op == "wq_gemm":
        x = torch.randn((m, k), dtype=problem.dtype, device=device)
    else:
        x = torch.randint(-127, 128, (m, k), dtype=torch.int8, device=device)
        xs = torch.rand(m, dtype=torch.float32, device=device)
    if op == "scaled_mm":
        x = x.to(torch.float32).div_(32).to(KINDS[problem.kind]) if problem.kind else x
        return lambda c, i: scaled_mm(x, ws[i], xs, scale[:, 0], config=c), copies, ""
    shift = group_major(scale * 8) if problem.affine else None
    common: dict = {"bits": bits, "group_size": problem.group or None, "layout": problem.layout}
    small = problem.kind if problem.kind not in ("", "table", *KINDS) else ""
    table = torch.linspace(-1, 1, 2**bits, dtype=torch.float32, device=device) if problem.kind == "table" else None
    form = check.check_weight(
        ws[0], scale, shift, k, bits, problem.group or None, problem.layout, False, small, table
    ).form()  # fmt: skip
    if op == "w4a8_gemm":
        return lambda c, i: w4a8_gemm(x, xs, ws[i], scale, shift, **common, config=c), copies, form
    common |= {"small_float": small, "codebook": table}
    return lambda c, i: wq_gemm(x, ws[i], scale, shift, **common, config=c), copies, form


def _time(launch, copies: int, repeats: int, report: Callable[[str], object], config: Config) -> float | None:
    """Milliseconds, or None if the tile does not run."""
    try:
        return median_ms(partial(launch, config), copies, repeats)
    except Exception as error:  # the tile may not fit this device
        report(f"{config} does not run ({type(error).__name__})")
        return None


def _best(
    tiles: list[Config], problem: Problem, m: int, clock: Callable[[Config], float | None]
) -> tuple[float, Config] | None:
    """(milliseconds, config) of the fastest tile, improved by neighbours as long as one is faster by 1 % or more."""
    known = {config: ms for config in tiles if (ms := clock(config)) is not None}
    if not known:
        return None
    best = min(known, key=known.__getitem__)
    seen = set(tiles)
    while True:
        fresh = [config for config in neighbours(best, problem, m) if config not in seen]
        seen.update(fresh)
        faster = {config: ms for config in fresh if (ms := clock(config)) is not None and ms < 0.99 * known[best]}
        if not faster:
            return known[best], best
        known |= faster
        best = min(faster, key=faster.__getitem__)


def tune(
    shapes: Iterable[tuple[int, int]],
    *,
    op: str = "wq_gemm",
    bits: int = 4,
    group_size: int | None = 128,
    kind: str = "",
    affine: bool = False,
    scale_dtype: torch.dtype | None = None,
    layout: str = "exec",
    rows: Iterable[int] = (1, 16, 64, 256, 1024, 4096),
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
    repeats: int = 20,
    report: Callable[[str], object] = print,
    done: Callable[[], object] = lambda: None,
) -> dict[str, Config]:
    """Times tiles for each `(N, K)` and number of rows, stores the fastest ones, and returns them by table key.

    The weight: kind is "" for integers, "u8", "e4m3fn", "e5m2" or "e4m3fnuz" for 8 bits, "table" for a codebook, or a
    small float such as "e2m1"; affine: with a shift; scale_dtype: None for fp32 with one scale per row, else dtype; layout:
    "exec", or "plain" as layers too small for packing have it. dtype: of x. done: called after each number of rows.

    Tries every shipped tile of the architecture, then neighbours of the fastest: about twenty to fifty programs per shape
    and number of rows, most of which are compiled once for all shapes.
    """
    if op not in OPS:
        check.fail("op", repr(op), "one of " + ", ".join(OPS))
    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available():
        check.fail("device", device, "a CUDA or ROCm device that is present")
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    check_user_table()  # before, not after the work
    gpu, arch = torch.cuda.get_device_name(device), arch_of(device)
    winners: dict[str, Config] = {}
    for n, k in shapes:
        group = 0 if not group_size or group_size >= k or op == "scaled_mm" else group_size
        scales = scale_dtype or (dtype if group else torch.float32)
        problem = Problem(op, bits, n, k, kind, group, affine, scales, layout, dtype)
        about = {}
        for m in rows:
            launch, copies, form = _launcher(problem, m, device)
            clock = partial(_time, launch, copies, repeats, report)
            best = _best(candidates(problem, m, arch), problem, m, clock)
            if best is not None:
                name = key(arch, op, bits, group, m, n, k, _x_dtype(problem), form)
                winners[name] = best[1]
                about[name] = {"gpu": gpu, "us": round(best[0] * 1e3, 2)}
                report(f"{name}: {best[0] * 1e3:.1f} us, {best[1]}")
            else:
                report(f"{op} {n}x{k} M={m}: no tile runs on this device; the shipped choice stays")
            del launch, clock  # the weights, before the next ones
            done()
        store({name: winners[name] for name in about}, about)  # an interruption loses one shape
    return winners
