"""Compiles the kernels for every architecture, without a GPU, as real models start them, and counts instructions.

    python benchmarks/kernel_aot.py            # all programs; writes benchmarks/results/kernel_aot/<version of Triton>.json
    python benchmarks/kernel_aot.py --stale    # only what changed since the stored table; updates that table
    python benchmarks/kernel_aot.py --check    # compiles nothing: are the stored tables up to date and without problems?
    python benchmarks/kernel_aot.py --quick    # the selection that the tests compile; writes nothing

To compare variants, in seconds; nothing is written (`--loop` also prints the instructions of the main loop by kind):

    python benchmarks/kernel_aot.py --only wq_gemm --arch sm_90 --types int4g64a int4g128 --rows 1 16 --print
    python benchmarks/kernel_aot.py --only wq_gemm --arch sm_90 --types int4row --config block_n=128,num_warps=4 --print

`aot_cases.py` has the launches, `aot_programs.py` records what they start, `aot_counts.py` counts. Launches that start
the same program are one row. A row has a problem if a GEMM has no matrix instruction or loads single 16-bit values in its
main loop, if there is an access to local memory (a register spill), or more shared memory than the device has.
"""

import argparse
import ast
import functools
import inspect
import json
import sys
from dataclasses import fields
from pathlib import Path

import aot_counts as counts
import torch
import triton
from aot_cases import Case, call_of, cases
from aot_programs import ARCHS, TRITON, Program, record

from requanto_kernels.config import TRITONS, Config, family, nearest_arch

TABLES = Path(__file__).parent / "results" / "kernel_aot"
TABLE = TABLES / f"{TRITON}.json"
COLUMNS = (
    "arch", "launches", "program", "key", "tile", "loop", "sometimes", "per_weight", "registers", "shared", "instructions",
    "spills", "matrix", "in_loop", "problems",
)  # fmt: skip


@functools.cache
def sources_of(path: Path) -> str:
    """Source of the device functions of a file and of those it imports, without comments and docstrings."""
    found = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
            found.append(sources_of(path.parent / f"{node.module}.py"))
        if isinstance(node, ast.FunctionDef) and any("triton" in ast.unparse(d) for d in node.decorator_list):
            if isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant):
                node.body = node.body[1:]
            found.append(ast.unparse(node))
    return "\n".join(found)


def key_of(program: Program) -> str:
    return program.key(sources_of(Path(inspect.getfile(program.kernel.fn))))


def programs(
    chosen: list[tuple[str, Case]], config: Config | None = None, version: str = TRITON
) -> dict[str, tuple[Program, list[str]]]:
    """What the launches start, each program once: key -> (program, names of its launches)."""
    found: dict[str, tuple[Program, list[str]]] = {}
    for arch, case in chosen:
        for program in record(arch, call_of(case, config), version):
            names = found.setdefault(key_of(program), (program, []))[1]
            if case.name not in names:
                names.append(case.name)
    return found


def all_cases(archs=ARCHS) -> list[tuple[str, Case]]:
    return [(arch, case) for arch in archs for case in cases(arch)]


def quick_cases() -> list[tuple[str, Case]]:
    """One row and most rows of the default type, a float8 GEMM and one decoder for each architecture of users."""
    wanted = {("wq_gemm", "int4g64a", 1), ("wq_gemm", "int4g64a", 4096), ("scaled_mm", "float8", 4096),
              ("wq_dequant", "nf4g64", 1)}  # fmt: skip
    archs = ("sm_90", "sm_80", "sm_89", "sm_100", "sm_120", "gfx942")
    return [(a, c) for a, c in all_cases(archs) if (c.op, c.type, c.rows) in wanted and c.dtype == torch.bfloat16]


def row_of(key: str, program: Program, names: list[str]) -> tuple[dict, list[str]]:
    """(the row of the table, the instructions of its main loop)."""
    row = {
        "arch": program.arch,
        "program": program.name,
        "key": key,
        "launches": names,
        "tile": counts.tile_of(program),
    }
    try:
        compiled = program.compile()
    except Exception as error:
        text = " ".join(str(error.__cause__ or error).split())[-300:]
        return row | {"problems": [f"does not compile: {type(error).__name__}: {text}"]}, []
    counted, body = counts.count(program, compiled)
    return row | counted | {
        "problems": counts.problems_of(program, counted, all("/plain" in name for name in names))
    }, body


def head() -> str:
    sizes = f"{'loop':>5} {'a weight':>8} {'regs':>4} {'shared':>6} {'spills':>6}"
    return f"{'':7} {'launch':44} {'tile':18} {sizes}  in the loop"


def line_of(row: dict) -> str:
    names = row["launches"][0] + (f" +{len(row['launches']) - 1}" if len(row["launches"]) > 1 else "")
    name = names if row["program"].startswith(names.split()[0]) else f"{row['program']} of {names}"
    text = f"{row['arch']:7} {name:44} {row['tile']:18} {row.get('loop', 0):5} {row.get('per_weight') or '':>8} "
    text += f"{row.get('registers', 0):4} {row.get('shared', 0):6} {row.get('spills', 0):6}  "
    return (
        text
        + ",".join([*row.get("matrix", []), row.get("in_loop", "")])
        + "".join(f"\n{'':8}! {text}" for text in row["problems"])
    )


def stored(table: Path) -> dict[str, dict]:
    """Rows of a table on disk, by key."""
    if not table.exists():
        return {}
    content = json.loads(table.read_text())
    rows = (dict(zip(content["columns"], values, strict=True)) for values in content["rows"])
    return {row["key"]: row for row in rows}


def check_stored() -> int:
    """Prints all problems of the stored tables; returns 1 if there are any."""
    bad, total = [], 0
    for version in TRITONS:
        rows, known = stored(TABLES / f"{version}.json"), programs(all_cases(), version=version)
        total += len(known)
        missing = [(known[key][0].arch, known[key][1][0]) for key in known.keys() - rows]
        gone = [(rows[key]["arch"], rows[key]["launches"][0]) for key in rows.keys() - known]
        bad += [f"{version}: not compiled as it is now: {arch} {name}" for arch, name in missing]
        bad += [f"{version}: no longer a program: {arch} {name}" for arch, name in gone]
        bad += [
            f"{version}: {row['arch']} {row['launches'][0]}: {text}"
            for row in rows.values()
            for text in row["problems"]
        ]
    print("\n".join([*sorted(bad), f"{total} programs in {len(TRITONS)} tables, {len(bad)} with problems"]))
    return bool(bad)


def write(rows: dict[str, dict], order: list[str]) -> None:
    """Writes the table, one row on each line for readable diffs."""
    top = {"command": "python benchmarks/kernel_aot.py", "triton": triton.__version__, "columns": COLUMNS}
    TABLES.mkdir(parents=True, exist_ok=True)
    lines = ([rows[key].get(name) for name in COLUMNS] for key in order if key in rows)
    body = ",\n".join(json.dumps(line, separators=(",", ":")) for line in lines)
    TABLE.write_text(json.dumps(top)[:-1] + ', "rows": [\n' + body + "\n]}\n")


def parsed_config(text: str, arch: str, case: Case) -> Config:
    """The shipped tile for this launch, with the given fields replaced."""
    kinds = {field.name: type(field.default) for field in fields(Config)}
    bits = int(case.type.lstrip("abcdefghijklmnopqrstuvwxyz")[0]) if case.op.startswith(("wq", "w4")) else 8
    base = family(
        nearest_arch(arch), case.op.replace("_grouped", "").replace("_many", ""), bits, case.rows, str(case.dtype)[6:]
    )
    values = {name: getattr(base, name) for name in kinds}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name not in kinds:
            raise SystemExit(f"--config: found {name!r}, expected one of {', '.join(kinds)}")
        values[name] = value.lower() in ("1", "true") if kinds[name] is bool else int(value)
    return Config(**values)


def chosen_cases(args: argparse.Namespace) -> list[tuple[str, Case]]:
    """The launches that the command line names."""
    archs = args.arch or ARCHS
    if not (args.types or args.config or args.shape or args.dtype != "bfloat16"):
        base = quick_cases() if args.quick else all_cases(archs)
        return [
            (a, c) for a, c in base if a in archs and args.only in c.name and (not args.rows or c.rows in args.rows)
        ]
    n, k = (int(size) for size in (args.shape or "4096x14336").split("x"))
    op = args.only or "wq_gemm"
    return [
        (arch, Case(op, text, m, getattr(torch, args.dtype), n, k))
        for arch in archs for text in args.types or ["int4g64a"] for m in args.rows or [1, 16]
    ]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only what the tests compile; writes nothing")
    parser.add_argument(
        "--only", default="", help="only launches whose name contains this; with --types, the op itself"
    )
    parser.add_argument("--arch", nargs="+", choices=ARCHS, help="only these architectures")
    parser.add_argument("--types", nargs="+", help="these types, e.g. int4g64a int8row nf4g64 mxfp4g32 float8row")
    parser.add_argument("--rows", nargs="+", type=int, help="these numbers of rows")
    parser.add_argument("--shape", help="N x K of the weight, e.g. 4096x14336")
    parser.add_argument("--dtype", default="bfloat16", help="of the activations")
    parser.add_argument("--config", help="fields of the tile to replace, e.g. block_m=16,block_n=128,num_stages=4")
    parser.add_argument("--print", action="store_true", help="write nothing")
    parser.add_argument("--loop", action="store_true", help="print the instructions of each main loop by kind")
    parser.add_argument("--sass", type=Path, help="a folder for the disassembled main loops")
    parser.add_argument("--stale", action="store_true", help="only what is missing in the stored table or has changed")
    parser.add_argument(
        "--check", action="store_true", help="compile nothing, compare the stored tables with the sources"
    )
    args = parser.parse_args()
    if args.check:
        return check_stored()
    found: dict[str, tuple[Program, list[str]]] = {}
    for arch, case in chosen_cases(args):
        config = parsed_config(args.config, arch, case) if args.config else None
        for key, (program, names) in programs([(arch, case)], config).items():
            found.setdefault(key, (program, []))[1].extend(names)
    before = stored(TABLE) if args.stale else {}
    writes = len(found) > 0 and not (args.print or args.quick or args.only or args.arch or args.types or args.config)
    rows = {key: before[key] | {"launches": found[key][1]} for key in found.keys() & before.keys()}
    print(head())
    fresh = [key for key in found if key not in rows]
    for number, key in enumerate(fresh, 1):
        rows[key], body = row_of(key, *found[key])
        print(line_of(rows[key]), flush=True)
        if args.loop:
            print("         " + " ".join(f"{name}:{times}" for name, times in counts.opcodes(body).most_common()))
        if args.sass:
            args.sass.mkdir(parents=True, exist_ok=True)
            (args.sass / f"{key}.txt").write_text("\n".join([line_of(rows[key]), *body]) + "\n")
        if writes and number % 20 == 0:  # a run that is ended goes on with --stale
            write(rows, list(found))
    if writes:
        write(rows, list(found))
    bad = sum(bool(row["problems"]) for row in rows.values())
    print(f"{len(rows)} programs, {bad} with problems")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
