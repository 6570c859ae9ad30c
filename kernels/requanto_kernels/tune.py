"""Finds the fastest tile for given shapes on the present GPU, and stores it in the user's table.

Nothing else in the package measures times.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

import torch

from . import _check as check
from ._device import arch_of
from .config import Config, families, family_bits, key, nearest_arch, store
from .layout import to_exec_layout
from .scaled_mm import scaled_mm
from .w4a8_gemm import w4a8_gemm
from .wq_gemm import wq_gemm

OPS = ("wq_gemm", "scaled_mm", "w4a8_gemm")


def candidates(op: str, bits: int, m: int, arch: str) -> list[Config]:
    """The shipped tiles for the architecture or for any, without duplicates; the heuristic splits K."""
    served, bits = nearest_arch(arch), family_bits(bits)
    found: dict[Config, None] = {}
    for row in families():
        if row["op"] != op or bits not in row.get("bits", [bits]) or served not in row.get("arch", [served]):
            continue
        config = Config(**row["config"])
        if "float32" not in row.get("dtype", ()) and config.block_m <= max(16, 2 * m):
            found[config] = None
    return list(found)


def neighbours(config: Config, op: str, bits: int, m: int) -> list[Config]:
    """Configs that differ in one field that the op uses."""
    found = [replace(config, num_stages=stages) for stages in (config.num_stages - 1, config.num_stages + 1) if stages]
    found.append(replace(config, num_warps=12 - config.num_warps))  # 4 or 8
    found += [replace(config, block_n=n) for n in (config.block_n // 2, config.block_n * 2) if 32 <= n <= 256]
    found += [
        replace(config, block_m=b)
        for b in (config.block_m // 2, config.block_m * 2)
        if 16 <= b <= max(16, min(256, 2 * m))
    ]
    if op == "wq_gemm" and m <= 256:
        found += [replace(config, split_k=split) for split in (1, 2, 4, 8) if split != config.split_k]
    if op == "wq_gemm" and bits < 8:
        found.append(replace(config, fields=not config.fields))
    if op != "w4a8_gemm" and not config.persistent:
        found.append(replace(config, left=not config.left))
    return found


def _median_ms(launch: Callable[[int], object], copies: int, repeats: int) -> float:
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


def _launcher(op, bits, group, m, n, k, dtype, device) -> tuple[Callable[[Config, int], object], int]:
    """(launch, copies): launch(config, i) runs the op with copy i of a random weight; the copies exceed the L2 cache."""
    copies = max(1, min(64, int(256e6 / (n * k * bits / 8))))
    groups = k // group if group else 1
    scale = torch.rand((n, groups), dtype=torch.float32, device=device) * 0.01 + 0.01
    if op == "scaled_mm":
        ws = [torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device) for _ in range(copies)]
        x = torch.randint(-127, 128, (m, k), dtype=torch.int8, device=device)
        xs = torch.rand(m, dtype=torch.float32, device=device)
        return lambda c, i: scaled_mm(x, ws[i], xs, scale[:, 0], config=c), copies
    if bits == 8:
        ws = [torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device) for _ in range(copies)]
    else:
        ws = [torch.randint(0, 256, (n, k * bits // 8), dtype=torch.uint8, device=device) for _ in range(copies)]
        ws = [to_exec_layout(w, bits) for w in ws]
    common = {"bits": bits, "group_size": group or None, "layout": "exec"}
    if op == "w4a8_gemm":
        x = torch.randint(-127, 128, (m, k), dtype=torch.int8, device=device)
        xs = torch.rand(m, dtype=torch.float32, device=device)
        return lambda c, i: w4a8_gemm(x, xs, ws[i], scale, **common, config=c), copies
    x = torch.randn((m, k), dtype=dtype, device=device)
    return lambda c, i: wq_gemm(x, ws[i], scale, **common, config=c), copies


def _time(launch, copies: int, repeats: int, report: Callable[[str], object], config: Config) -> float | None:
    """Milliseconds, or None if the tile does not run."""
    try:
        return _median_ms(partial(launch, config), copies, repeats)
    except Exception as error:  # the tile may not fit this device
        report(f"{config} does not run ({type(error).__name__})")
        return None


def _best(
    tiles: list[Config], op: str, bits: int, m: int, clock: Callable[[Config], float | None]
) -> tuple[float, Config] | None:
    """(milliseconds, config) of the fastest tile, improved by neighbours as long as one is faster by 1 % or more."""
    known = {config: ms for config in tiles if (ms := clock(config)) is not None}
    if not known:
        return None
    best = min(known, key=known.__getitem__)
    seen = set(tiles)
    while True:
        fresh = [config for config in neighbours(best, op, bits, m) if config not in seen]
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
    rows: Iterable[int] = (1, 16, 64, 256, 1024, 4096),
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cuda",
    repeats: int = 20,
    report: Callable[[str], object] = print,
) -> dict[str, Config]:
    """Times tiles for each `(N, K)` and number of rows, stores the fastest ones, and returns them by table key.

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
    winners: dict[str, Config] = {}
    for n, k in shapes:
        group = 0 if not group_size or group_size >= k or op == "scaled_mm" else group_size
        for m in rows:
            launch, copies = _launcher(op, bits, group, m, n, k, dtype, device)
            best = _best(
                candidates(op, bits, m, arch_of(device)), op, bits, m, partial(_time, launch, copies, repeats, report)
            )
            if best is not None:
                name = key(arch_of(device), op, bits, group, m, n, k)
                winners[name] = best[1]
                report(f"{name}: {best[0] * 1e3:.1f} us, {best[1]}")
            else:
                report(f"{op} {n}x{k} M={m}: no tile runs on this device; the shipped choice stays")
    store(winners)
    return winners
