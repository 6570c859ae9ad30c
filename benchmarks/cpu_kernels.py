"""Times of the C library's GEMMs alone, without Python's layers: each level, one thread, against F.linear.

    taskset -c 1 python benchmarks/cpu_kernels.py [--rows 1,4,16,128] [--levels vnni,bf16] [--kinds int4,int8] [--size 4096]

A line a weight and level: for each number of rows the CPU time in microseconds and how many times as fast it is as the
better of F.linear in bfloat16 and float32, all in the same run, each the best of several; for one row also the bytes of
codes and scales a second, beside those of a plain sum over as many bytes. Several weights take turns, so that codes come
from memory, not from a cache.
"""

from __future__ import annotations

import argparse
import ctypes
import time

import torch

import requanto_cpu
from requanto_cpu import interface as c

#: bits, group (0: one scale a row), arithmetic, whether codes are looked up in a table
KINDS = {
    "int4": (4, 64, c.BLOCKS8, False), "int4-row": (4, 0, c.BLOCKS8, False), "int4-32": (4, 32, c.BLOCKS8, False),
    "int2": (2, 64, c.BLOCKS8, False), "int3": (3, 64, c.BLOCKS8, False), "int5": (5, 64, c.BLOCKS8, False),
    "int6": (6, 64, c.BLOCKS16, False), "int8": (8, 0, c.BLOCKS16, False), "nf4": (4, 64, c.BLOCKS8, True),
    "nvfp4": (4, 16, c.BLOCKS8, True), "int8x8": (8, 0, c.CODED, False), "int4x8": (4, 64, c.CODED, False),
}  # fmt: skip


class Weight:
    """Random codes in strips with bfloat16 scales."""

    def __init__(self, size: int, bits: int, group: int, table: bool) -> None:
        groups = size // group if group else 1
        self.codes = torch.randint(0, 256, (size * size * bits // 8,), dtype=torch.uint8)
        self.scale = torch.rand(size, groups).to(torch.bfloat16)
        self.table, self.levels = torch.randn(64), torch.randint(1, 256, (64,), dtype=torch.uint8)
        self.struct = c.RqWeight(
            codes=self.codes.data_ptr(), rows=size, length=size, group=group or size, groups=groups, bits=bits,
            code=c.TABLE if table else c.INTEGER, zero_code=2 ** (bits - 1), block=min(group or 32, 32), level_scale=1.0,
            scale_kind=c.PLAIN, scale_dtype=c.BF16, scale=self.scale.data_ptr(), scale_stride_n=groups, scale_stride_g=1,
            table=self.table.data_ptr(), levels=self.levels.data_ptr(),
        )  # fmt: skip

    def bytes(self) -> int:
        return self.codes.numel() + 2 * self.scale.numel()


def calls(weights: list[Weight], x: torch.Tensor, arithmetic: int):
    """A function that multiplies x with each weight once."""
    rows, size = x.shape
    coded = arithmetic == c.CODED
    codes, steps = torch.empty(rows, size, dtype=torch.int8), torch.empty(rows)
    out = torch.empty(rows, size, dtype=x.dtype)
    dtype = c.BF16 if x.dtype == torch.bfloat16 else c.F32
    library, gemms = requanto_cpu.library(), []
    for weight in weights:
        gemm = c.RqGemm(
            weight=ctypes.pointer(weight.struct), rows=rows, x_stride=size, out_stride=size,
            x_dtype=c.NONE if coded else dtype, out_dtype=dtype, arithmetic=arithmetic, steps=steps.data_ptr(),
        )  # fmt: skip
        gemm.scratch_bytes = library.rq_gemm_scratch(gemm, rows)
        gemms.append(gemm)
    scratch = torch.empty(max(gemm.scratch_bytes for gemm in gemms), dtype=torch.uint8)

    def run() -> None:
        for gemm in gemms:
            if coded:
                library.rq_rows_to_int8(x.data_ptr(), dtype, rows, size, size, None, codes.data_ptr(), steps.data_ptr())
            source = codes if coded else x
            requanto_cpu.check(library.rq_gemm(gemm, source.data_ptr(), out.data_ptr(), scratch.data_ptr()))

    return run


def seconds(call, copies: int, most: float = 0.5) -> float:
    """CPU time of one multiplication, the best of several."""
    best, until = float("inf"), time.monotonic() + most
    while True:
        start = time.thread_time()
        call()
        best = min(best, time.thread_time() - start)
        if time.monotonic() > until:
            return best / copies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,4,16,128")
    parser.add_argument("--levels", default=",".join(requanto_cpu.levels()))
    parser.add_argument("--kinds", default="int4,int4-row,int2,int3,nf4,int8,int8x8")
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--seconds", type=float, default=0.3, help="for each measurement")
    args = parser.parse_args()
    torch.set_num_threads(1)
    size, levels, kinds = args.size, args.levels.split(","), args.kinds.split(",")
    weights = {}
    for kind in kinds:
        bits, group, _, table = KINDS[kind]
        copies = max(1, min(8, 96 * 2**20 // (size * size * bits // 8)))
        weights[kind] = [Weight(size, bits, group, table) for _ in range(copies)]
    plain = torch.rand(2**24)
    read = plain.numel() * 4 / seconds(lambda: plain.sum(), 1, args.seconds)
    print(f"{requanto_cpu.path().name}: {size} x {size}, one thread; a plain sum reads {read / 1e9:.1f} GB/s")
    for rows in map(int, args.rows.split(",")):
        floats = {}
        for dtype in (torch.bfloat16, torch.float32):
            x = torch.randn(rows, size).to(dtype)
            several = [torch.randn(size, size).to(dtype) for _ in range(2 if rows < 16 else 1)]
            floats[dtype] = seconds(
                lambda x=x, several=several: [torch.nn.functional.linear(x, w) for w in several],
                len(several),
                2 * args.seconds,
            )
        best = min(floats.values())
        names = ", ".join(f"{str(dtype)[6:]} {value * 1e6:.0f} us" for dtype, value in floats.items())
        print(f"{rows} rows: F.linear {names}")
        for kind in kinds:
            cells = []
            for level in levels:
                requanto_cpu.set_level(level)
                call = calls(weights[kind], torch.randn(rows, size).to(torch.bfloat16), KINDS[kind][2])
                found = seconds(call, len(weights[kind]), args.seconds)
                memory = f" {weights[kind][0].bytes() / found / 1e9:.1f} GB/s" if rows == 1 else ""
                cells.append(f"{level} {found * 1e6:.0f} us, {best / found:.2f} x{memory}")
            print(f"  {kind:9s} " + "; ".join(cells), flush=True)


if __name__ == "__main__":
    main()
