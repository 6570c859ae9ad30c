"""Compiles every shipped kernel family for every architecture, without a GPU, and counts the instructions.

    python benchmarks/kernel_aot.py            # all cases; writes benchmarks/results/kernel_aot.json
    python benchmarks/kernel_aot.py --quick    # the selection that the tests compile; writes nothing
    python benchmarks/kernel_aot.py --stale    # only what changed since the stored table; updates that table
    python benchmarks/kernel_aot.py --check    # compiles nothing: is every case in the stored table up to date?

A case passes if there is a matrix instruction, no access to local memory (STL/LDL: register spills), more than a
single trap, and shared memory fits the device. `loop` is the number of instructions in the innermost loop with a
matrix instruction; `quant_rows` and `wq_dequant` need no matrix instruction.
"""

import argparse
import ast
import functools
import hashlib
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from requanto_kernels import _check as check
from requanto_kernels._device import fp8_decoder
from requanto_kernels.config import Config, families, family_bits, nearest_arch
from requanto_kernels.quant_rows import quant_rows_kernel
from requanto_kernels.scaled_mm import scaled_mm_kernel, scaled_mm_persistent_kernel
from requanto_kernels.w4a8_gemm import tile_k, w4a8_gemm_kernel
from requanto_kernels.wq_dequant import wq_dequant_kernel
from requanto_kernels.wq_gemm import constants, of_codebook, reduce_kernel, wq_gemm_kernel
from requanto_kernels.wq_gemm_dx import wq_gemm_dx_kernel
from requanto_kernels.wq_gemm_grouped import wq_gemm_grouped_kernel

TABLE = Path(__file__).parent / "results" / "kernel_aot.json"
ARCHS = ("sm_90", "sm_80", "sm_89", "sm_100", "sm_120", "gfx942", "sm_75")
SHARED_LIMIT = {
    "sm_80": 166912, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376, "gfx942": 65536,
    "sm_75": 65536,
}  # fmt: skip
MATRIX = re.compile(r"\b(HMMA|IMMA|QMMA|OMMA|HGMMA|IGMMA|QGMMA|UTC[A-Z]*MMA|v_mfma\w*)")
SHORT = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}


@dataclass
class Case:
    """One kernel with all its constants; `pointers` maps pointer arguments to element types."""

    name: str
    arch: str
    kernel: object
    pointers: dict[str, str]
    constants: dict
    config: Config
    matrix: bool = True
    descriptors: dict[str, str] = field(default_factory=dict)


def target(arch: str) -> GPUTarget:
    return GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)


def _weight(bits: int, kind: str, group: int, affine: bool, is_exec: bool) -> check.Weight:
    some, is_exec = torch.empty(0), is_exec and bits in check.EXEC_BITS
    return check.Weight(some, some, some if affine else None, some, 4096, 4096, bits, kind, group, is_exec, 0)


def _name(bits: int, kind: str) -> str:
    return f"{kind}{bits}" if kind == "table" else kind or f"w{bits}"


def _storage(weight: check.Weight) -> str:
    return "*i16" if weight.exec else "*u8" if weight.bits < 8 or weight.kind else "*i8"


def _rows(arch: str, op: str, bits: int, dtype: str):
    """The families for this architecture, each once, with the greatest M that it is used for."""
    served, bits, seen = nearest_arch(arch), family_bits(bits), 0
    for row in families():
        fits = row["op"] == op and ("arch" not in row or served in row["arch"])
        fits = fits and ("bits" not in row or bits in row["bits"]) and ("dtype" not in row or dtype in row["dtype"])
        if fits and row.get("m_max", 1 << 30) > seen:
            seen = row.get("m_max", 1 << 30)
            yield row.get("m_max", "any"), Config(**row["config"])


def _gemm_cases(
    arch: str, bits: int, kind: str, group: int, affine: bool, is_exec: bool, dtype: str, full: bool = True
):  # fmt: skip
    """wq_gemm's tiles; full: also the split, grouped and gradient kernels, which decode in the same way."""
    weight = _weight(bits, kind, group, affine, is_exec)
    label = (
        f"{_name(bits, kind)} g{group or 'K'} {'affine' if affine else 'sym'} {'exec' if is_exec else 'plain'} {dtype}"
    )
    act = "*" + SHORT[dtype]
    pointers = {"x_ptr": act, "q_ptr": _storage(weight), "s_ptr": "*fp32", "z_ptr": "*fp32", "bias_ptr": "*fp32"}
    pointers["t_ptr"] = "*fp32"
    smallest = True
    for m_max, config in _rows(arch, "wq_gemm", bits, dtype):
        config = of_codebook(config) if kind == "table" else config
        const = constants(weight, config, arch, getattr(torch, dtype))
        for split in (False, True) if full and m_max != "any" else (False,):
            out = {"out_ptr": "*fp32" if split else act}
            more = {"BIAS": not split, "SPLIT": split, "GROUP_M": config.group_m, "stride_xk": 1}
            name = f"wq_gemm {label} M<={m_max}{' split' if split else ''}"
            yield Case(name, arch, wq_gemm_kernel, pointers | out, const | more, config)
        if not full:
            continue
        if smallest:  # decoding: Triton compiles another program for M = 1
            more = {"BIAS": False, "SPLIT": True, "GROUP_M": config.group_m, "stride_xk": 1, "M": 1}
            one = f"wq_gemm {label} M=1 split"
            yield Case(one, arch, wq_gemm_kernel, pointers | {"out_ptr": "*fp32"}, const | more, config)
            smallest = False
        more = {"BIAS": True, "E_BLOCK": 64, "stride_xk": 1}
        extra = {"out_ptr": act, "offsets_ptr": "*i32"}
        yield Case(f"grouped {label} M<={m_max}", arch, wq_gemm_grouped_kernel, pointers | extra, const | more, config)
    for m_max, config in _rows(arch, "wq_gemm_dx", bits, dtype) if full else ():
        block_k = max(config.block_k, check.exec_block(bits)) if weight.exec else config.block_k
        const = {k: v for k, v in constants(weight, config, arch, getattr(torch, dtype)).items()
                 if k not in ("LEFT", "BY_FIELD")}  # fmt: skip
        const |= {"BLOCK_K": block_k, "GROUPED": False, "E_BLOCK": 1, "stride_yn": 1}
        p = {"dy_ptr": act, "dx_ptr": act, "offsets_ptr": "*i32"} | {
            k: pointers[k] for k in ("q_ptr", "s_ptr", "z_ptr", "t_ptr")
        }
        yield Case(f"dx {label} M<={m_max}", arch, wq_gemm_dx_kernel, p, const, config)


def _scaled_cases(arch: str, kind: str):
    native = kind == "int8" or arch != "sm_80"
    element = {"int8": "i8", "e4m3fn": "fp8e4nv", "e4m3fnuz": "fp8e4b8", "e5m2": "fp8e5"}[kind] if native else "u8"
    for m_max, config in _rows(arch, "scaled_mm", 8, "int8" if kind == "int8" else "float8"):
        shared = {
            "X_ROWS": True, "W_ROWS": True, "BIAS": True, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k, "GROUP_M": config.group_m,
        }  # fmt: skip
        pointers = {"xs_ptr": "*fp32", "ws_ptr": "*fp32", "bias_ptr": "*bf16", "out_ptr": "*bf16"}
        const = shared | {"X_KIND": kind, "W_KIND": kind, "LEFT": config.left, "EVEN_K": True, "DECODE": not native}
        operands = {"x_ptr": f"*{element}", "w_ptr": f"*{element}"}
        yield Case(f"scaled_mm {kind} M<={m_max}", arch, scaled_mm_kernel, operands | pointers, const, config)
        if config.persistent:
            descriptors = {
                "x_desc": f"tensordesc<{element}[{config.block_m}, {config.block_k}]>",
                "w_desc": f"tensordesc<{element}[{config.block_n}, {config.block_k}]>",
            }
            const = shared | {"INT8": kind == "int8", "PROGRAMS": 132}
            yield Case(f"scaled_mm {kind} persistent M<={m_max}", arch, scaled_mm_persistent_kernel, pointers, const,
                       config, descriptors=descriptors)  # fmt: skip


def _small_cases(arch: str):
    for kind, limit in (("int8", 127.0), ("e4m3fn", 448.0), ("e5m2", 57344.0)):
        const = {"KIND": kind, "LIMIT": limit, "BLOCK": 4096, "ONE_PASS": True, "stride_xk": 1}
        pointers = {"x_ptr": "*bf16", "q_ptr": "*i8" if kind == "int8" else "*u8", "s_ptr": "*fp32"}
        yield Case(f"quant_rows {kind}", arch, quant_rows_kernel, pointers, const, Config(num_warps=8), matrix=False)
    for bits, kind in (
        *((bits, "") for bits in range(1, 9)),
        (8, "u8"),
        (8, "e4m3fn"),
        (4, "e2m1"),
        (4, "table"),
        (6, "e3m2"),
    ):
        affine = kind in ("", "u8", "e4m3fn")
        weight = _weight(bits, kind, 128, affine, True)
        block_k = max(128, check.exec_block(bits)) if bits < 8 else 128
        const = {"BITS": bits, "KIND": fp8_decoder(kind, arch), "GROUP": 128, "AFFINE": affine, "EXEC": weight.exec,
                 "EVEN_K": True, "BLOCK_K": block_k, "BLOCK_N": 4096 // block_k}  # fmt: skip
        pointers = {"q_ptr": _storage(weight), "s_ptr": "*fp32", "z_ptr": "*fp32", "t_ptr": "*fp32", "out_ptr": "*bf16"}
        yield Case(f"wq_dequant {_name(bits, kind)}", arch, wq_dequant_kernel, pointers, const, Config(), matrix=False)
    const = {"SPLITS": 8, "BIAS": True, "BLOCK": 1024}
    pointers = {"work_ptr": "*fp32", "bias_ptr": "*bf16", "out_ptr": "*bf16"}
    yield Case("split reduce", arch, reduce_kernel, pointers, const, Config(), matrix=False)
    for group, affine in ((0, False), (128, True), (32, False)):
        is_exec = group != 32
        weight = _weight(4, "", group, affine, is_exec)
        for m_max, config in _rows(arch, "w4a8_gemm", 4, "int8"):
            block_k, read_exec = tile_k(weight, config.block_k)
            const = {"BITS": 4, "GROUP": group, "AFFINE": affine, "EXEC": read_exec, "BIAS": True, "EVEN_K": True,
                     "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": block_k}  # fmt: skip
            pointers = {"x_ptr": "*i8", "xs_ptr": "*fp32", "q_ptr": _storage(weight), "s_ptr": "*fp32",
                        "z_ptr": "*fp32", "bias_ptr": "*bf16", "out_ptr": "*bf16"}  # fmt: skip
            name = f"w4a8 g{group or 'K'} {'affine' if affine else 'sym'} M<={m_max}"
            yield Case(name, arch, w4a8_gemm_kernel, pointers, const, config)


def cases(quick: bool = False, archs=ARCHS):
    """All cases; quick: on each architecture the int4 family in bf16 (all its tiles on sm_90, else those of one row and of
    most rows), one float8 and one int8 GEMM."""
    for arch in archs:
        if arch == "sm_75":
            # Triton emits no matrix instruction there: only the kernels that decode and quantize are used.
            yield from (case for case in _small_cases(arch) if not case.matrix)
            continue
        if quick:
            tiles = [c for c in _gemm_cases(arch, 4, "", 128, False, True, "bfloat16") if c.name.startswith("wq")]
            yield from tiles if arch == "sm_90" else (c for c in tiles if "M=1" in c.name or c is tiles[-1])
            kind = "e4m3fnuz" if arch == "gfx942" else "e4m3fn"
            yield from list(_scaled_cases(arch, kind))[-1:]
            yield from list(_small_cases(arch))[-2:-1]
            continue
        for i, (bits, kind, group, affine, is_exec, dtype) in enumerate(
            (
                (4, "", 128, False, True, "bfloat16"),
                (4, "", 128, True, True, "bfloat16"),
                (4, "", 64, True, True, "float16"),
                (4, "", 32, False, True, "bfloat16"),
                (4, "", 0, False, True, "bfloat16"),
                (4, "", 128, False, False, "bfloat16"),
                (4, "", 128, False, True, "float32"),
                (2, "", 64, True, True, "bfloat16"),
                (8, "", 0, False, False, "bfloat16"),
                (8, "", 128, True, False, "float16"),
                (8, "e4m3fn", 0, False, False, "bfloat16"),
                (8, "e4m3fn", 0, False, False, "float16"),
                (8, "e5m2", 0, False, False, "bfloat16"),
                (4, "e2m1", 16, False, True, "bfloat16"),
                (4, "e2m1", 32, False, True, "float16"),
                (4, "table", 64, False, True, "bfloat16"),
                (4, "table", 64, False, True, "float32"),
                (3, "", 64, True, True, "bfloat16"),
                (3, "", 64, True, False, "bfloat16"),
                (8, "u8", 64, True, False, "bfloat16"),
            )
        ):
            # The other kernels for one variant of each number of bits; all of them would take a quarter of an hour.
            yield from _gemm_cases(arch, bits, kind, group, affine, is_exec, dtype, full=i in (0, 6, 7, 8, 15))
        for kind in ("int8", "e4m3fnuz" if arch == "gfx942" else "e4m3fn"):
            yield from _scaled_cases(arch, kind)
        yield from _small_cases(arch)


def disassemble(compiled, arch: str) -> list[str]:
    """Instruction lines, and labels (they end in a colon)."""
    if arch.startswith("gfx"):
        lines = (line.split(";")[0].strip() for line in compiled.asm["amdgcn"].splitlines())
        return [line for line in lines if line and (not line.startswith(".") or line.endswith(":"))]
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [tools / "nvdisasm", "-c", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = []
    for line in text.splitlines():
        line = re.sub(r"/\*.*?\*/", "", line).strip()
        if re.match(r"\.L\w+:", line) or (line and line[0] != "." and line.endswith(";")):
            found.append(line)
    return found


def innermost_loop(lines: list[str]) -> int:
    """Instructions of the shortest backward branch around a matrix instruction; 0 if there is none."""
    places = {line[:-1]: i for i, line in enumerate(lines) if line.endswith(":")}
    best = 0
    for i, line in enumerate(lines):
        hit = re.search(r"(?:BRA\S*|s_cbranch\w+|s_branch)\b.*?(\.L\w+)", line)
        if hit and (start := places.get(hit[1], i)) < i:
            body = [text for text in lines[start:i] if not text.endswith(":")]
            if any(MATRIX.search(text) for text in body) and (not best or len(body) < best):
                best = len(body)
    return best


def compile_case(case: Case) -> dict:
    """Compiles and checks one case; `problems` is empty if it passes."""
    signature, constexprs, attributes = {}, {}, {}
    for index, name in enumerate(case.kernel.arg_names):
        if name in case.constants:
            signature[name] = "constexpr"
            constexprs[(index,)] = case.constants[name]
        elif name in case.descriptors:
            signature[name] = case.descriptors[name]
        else:
            signature[name] = case.pointers.get(name, "i32")
            # Rows of scales need not be multiples of 16; everything else is, in the shapes of real models.
            if name not in ("stride_sn", "stride_sg", "stride_zn", "stride_zg", "E", "total"):
                attributes[(index,)] = [["tt.divisibility", 16]]
    row = {"case": case.name, "arch": case.arch, "key": key_of(case), "problems": []}
    options = {"num_warps": case.config.num_warps, "num_stages": case.config.num_stages}
    try:
        source = ASTSource(case.kernel, signature, constexprs, attributes)
        compiled = triton.compile(source, target=target(case.arch), options=options)
    except Exception as error:
        text = " ".join(str(error.__cause__ or error).split())[-300:]
        row["problems"].append(f"does not compile: {type(error).__name__}: {text}")
        return row
    lines = disassemble(compiled, case.arch)
    code = [line for line in lines if not line.endswith(":")]
    row["shared"] = compiled.metadata.shared
    row["instructions"] = len(code)
    row["loop"] = innermost_loop(lines)
    kinds = sorted({hit[1] for line in code if (hit := MATRIX.search(line))})
    row["matrix"] = kinds
    spills = sum(bool(re.search(r"\b(STL|LDL|scratch_(store|load)\w*)\b", line)) for line in code)
    row["spills"] = spills
    fp32 = "float32" in case.name  # exact fp32 GEMMs run on the ordinary units
    if case.matrix and not kinds and not fp32:
        row["problems"].append("no matrix instruction")
    if spills:
        row["problems"].append(f"{spills} local memory accesses")
    if len(code) < 30:
        row["problems"].append(f"only {len(code)} instructions")
    if row["shared"] > SHARED_LIMIT[case.arch]:
        row["problems"].append(f"shared memory {row['shared']} over {SHARED_LIMIT[case.arch]}")
    return row


@functools.cache
def sources_of(path: Path) -> str:
    """Source of the device functions of a file and of those it imports, without comments and docstrings."""
    tree = ast.parse(path.read_text())
    found = []
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
            found.append(sources_of(path.parent / f"{node.module}.py"))
        if isinstance(node, ast.FunctionDef) and any("triton" in ast.unparse(d) for d in node.decorator_list):
            if isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant):
                node.body = node.body[1:]
            found.append(ast.unparse(node))
    return "\n".join(found)


def key_of(case: Case) -> str:
    """A digest of everything that the machine code depends on, except Triton's version."""
    config = {name: getattr(case.config, name) for name in ("num_warps", "num_stages")}
    parts = (sources_of(Path(inspect.getfile(case.kernel.fn))), case.pointers, case.constants, case.descriptors, config)
    text = "\n".join(part if isinstance(part, str) else repr(sorted(part.items())) for part in parts)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def stored_rows() -> dict[tuple[str, str], dict]:
    """Rows of the table on disk."""
    return {(row["arch"], row["case"]): row for row in json.loads(TABLE.read_text())["rows"]} if TABLE.exists() else {}


def stale() -> list[Case]:
    """Cases that are missing in the stored table or have changed since."""
    table = stored_rows()
    return [case for case in cases() if table.get((case.arch, case.name), {}).get("key") != key_of(case)]


def check_stored() -> int:
    """Prints all problems of the stored table; returns 1 if there are any."""
    bad = [f"not compiled as it is now: {case.arch} {case.name}" for case in stale()]
    known = {(case.arch, case.name) for case in cases()}
    bad += [f"no longer a case: {arch} {name}" for arch, name in stored_rows() if (arch, name) not in known]
    bad += [f"{row['arch']} {row['case']}: {problem}" for row in stored_rows().values() for problem in row["problems"]]
    print("\n".join([*bad, f"{len(known)} cases, {len(bad)} with problems in {TABLE.name}"]))
    return bool(bad)


def write(rows: list[dict], keep: bool) -> None:
    """Writes the table, one row on each line for readable diffs; keep: rows that were not compiled now stay."""
    table = stored_rows() if keep else {}
    table |= {(row["arch"], row["case"]): row for row in rows}
    order = {(case.arch, case.name): i for i, case in enumerate(cases())}
    ordered = [table[place] for place in sorted(table.keys() & order.keys(), key=order.__getitem__)]
    head = {"command": "python benchmarks/kernel_aot.py", "triton": triton.__version__}
    TABLE.parent.mkdir(exist_ok=True)
    body = ",\n".join("  " + json.dumps(row) for row in ordered)
    TABLE.write_text(json.dumps(head)[:-1] + ', "rows": [\n' + body + "\n]}\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only what the tests compile; writes nothing")
    parser.add_argument("--only", default="", help="only cases whose 'arch name' contains this text")
    parser.add_argument("--arch", action="append", choices=ARCHS, help="only this architecture; may be repeated")
    parser.add_argument("--merge", action="store_true", help="put the rows of --only or --arch into the stored table")
    parser.add_argument(
        "--stale", action="store_true", help="only cases that are missing in the stored table or have changed since"
    )
    parser.add_argument(
        "--check", action="store_true", help="compile nothing, compare the stored table with the sources"
    )
    args = parser.parse_args()
    if args.check:
        return check_stored()
    rows, partial = [], args.quick or args.only or args.arch or args.stale
    for case in stale() if args.stale else cases(args.quick, args.arch or ARCHS):
        if args.only in f"{case.arch} {case.name}":
            rows.append(compile_case(case))
            row = rows[-1]
            verdict = "; ".join(row["problems"]) or "ok"
            print(f"{row['arch']:7} {row['case']:52} loop {row.get('loop', 0):5} shared {row.get('shared', 0):7} "
                  f"{','.join(row.get('matrix', [])):14} {verdict}", flush=True)  # fmt: skip
            if args.stale and len(rows) % 20 == 0:  # a run that is ended goes on where it was
                write(rows, keep=True)
    if args.merge or args.stale or not partial:
        write(rows, keep=bool(partial))
    bad = sum(bool(row["problems"]) for row in rows)
    print(f"{len(rows)} cases, {bad} with problems")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
