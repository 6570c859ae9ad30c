"""Counts in the machine code of a compiled program: its main loop, what is loaded and stored there, spills and registers.

The main loop is the shortest one with a matrix instruction (of exact fp32 GEMMs: that with the most FFMA). Its length is
what each turn executes; `sometimes` is what only some turns or warps execute, such as the stores of a persistent kernel.
`per weight` is the number of instructions that one lane executes for each of its weights: the length of the loop times the
threads of the program, divided by the weights that one turn multiplies. These follow from the matrix instructions in
the loop, so an unrolled loop counts right.
"""

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import triton
from aot_loops import main_loop
from aot_programs import Program

SHARED_LIMIT = {
    "sm_75": 65536, "sm_80": 166912, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376,
    "gfx90a": 65536, "gfx942": 65536, "gfx950": 163840, "gfx1100": 65536, "gfx1201": 65536,
}  # fmt: skip
MATRIX = re.compile(r"\b(HMMA|IMMA|QMMA|OMMA|HGMMA|IGMMA|QGMMA|UTC[A-Z]*MMA|v_mfma\w*|v_smfma\w*|v_wmma\w*)")
SPILL = re.compile(r"\b(STL|LDL|scratch_(?:store|load)\w*)\b")
#: Kinds of instructions that tell where a loop's time goes.
KINDS = {
    "ldg": r"LDG\b|global_load|buffer_load", "ldgsts": r"LDGSTS\b", "tma": r"UTMALDG|UBLKCP",
    "lds": r"LDS\b|LDSM\b|ds_read|ds_load", "sts": r"STS\b|STSM\b|ds_write|ds_store", "bar": r"BAR\b|s_barrier",
    "prmt": r"PRMT\b|v_perm", "f2f": r"F2F\b", "f2fp": r"F2FP\b|v_cvt_pk", "i2f": r"I2F\w*\b",
    "lop3": r"LOP3\b", "hfma2": r"H(?:FMA|MUL|ADD)2\b", "ffma": r"F(?:FMA|MUL|ADD)2?\b", "shfl": r"SHFL\b",
}  # fmt: skip


def disassemble(compiled, arch: str) -> tuple[list[str], int]:
    """(instruction lines and labels, which end in a colon; registers a thread)."""
    if arch.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        lines = (line.split(";")[0].strip() for line in text.splitlines())
        hit = re.search(r"\.vgpr_count:\s*(\d+)", text)
        return [line for line in lines if line and (not line.startswith(".") or line.endswith(":"))], int(hit[1])
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
        usage = subprocess.run(
            [tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    found = []
    for line in text.splitlines():
        line = re.sub(r"/\*.*?\*/", "", line).strip()
        if re.match(r"\.L\w+:", line) or (line and line[0] != "." and line.endswith(";")):
            found.append(line)
    hit = re.search(r"REG:(\d+)", usage.stdout + usage.stderr)
    return found, int(hit[1]) if hit else 0


def products_of(line: str, warp: int) -> float:
    """Multiplications that one warp does with a matrix instruction; 0 if its name does not say."""
    if hit := re.search(r"GMMA\.(\d+)x(\d+)x(\d+)", line):  # of a group of four warps
        return int(hit[1]) * int(hit[2]) * int(hit[3]) / 4
    if hit := re.search(r"\b[HIQ]MMA\.(?:SP\.)?16(8)(\d+)", line):
        return 16 * 8 * int(hit[2])
    if hit := re.search(r"v_(?:mfma|wmma)_\w+?_(\d+)x(\d+)x(\d+)", line):
        return int(hit[1]) * int(hit[2]) * int(hit[3])
    return 0


def per_weight(program: Program, body: list[str]) -> float:
    """Instructions a lane and weight in the loop; 0 for kernels without a tile of weights."""
    n, k, m = (program.constant(f"BLOCK_{axis}") for axis in "NKM")
    if not (n and k and m):
        return 0
    warp = 64 if program.arch.startswith("gfx9") else 32
    warps = program.options["num_warps"]
    products = warps * sum(products_of(line, warp) for line in body)
    # A matrix instruction whose name has no shape (sm_100), or none: one tile a turn.
    columns = m * (program.constant("SLOTS") or 1)
    weights = products / columns if products else n * k
    return round(len(body) * warps * warp / weights, 2)


def tile_of(program: Program) -> str:
    """`64x16x128 w4 s5`: BLOCK_N x BLOCK_M x BLOCK_K, warps and stages; without a tile only the latter."""
    sizes = [program.constant(f"BLOCK_{axis}") for axis in "NMK"]
    tile = "x".join(str(size) for size in sizes if size) + " " if any(sizes) else ""
    return f"{tile}w{program.options['num_warps']} s{program.options['num_stages']}"


def opcodes(body: list[str]) -> Counter:
    """How often each instruction is in the loop, by its full name."""
    names = (re.sub(r"^(@!?U?P\w+ )?", "", line).split()[0].rstrip(";") for line in body)
    return Counter(names)


def count(program: Program, compiled) -> tuple[dict, list[str]]:
    """(sizes, registers, and the counts in the main loop; the instructions of that loop)."""
    lines, registers = disassemble(compiled, program.arch)
    code = [line for line in lines if not line.endswith(":")]
    body, sometimes = main_loop(lines, MATRIX.search)
    row = {"shared": compiled.metadata.shared, "registers": registers, "instructions": len(code), "loop": len(body)}
    row |= {"sometimes": len(sometimes), "per_weight": per_weight(program, body)}
    row["matrix"] = sorted({hit[1] for line in code if (hit := MATRIX.search(line))})
    row["spills"] = sum(bool(SPILL.search(line)) for line in code)
    kinds = Counter()
    for line in body:
        for kind, pattern in KINDS.items():
            if re.search(rf"\b(?:{pattern})", line):
                if kind == "ldg":
                    hit = re.search(r"LDG\S*?\.(U8|S8|U16|64|128)\b", line) or re.search(
                        r"_load_(u?byte|u?short|u8|u16|b32|b64|b128|dword(?:x\d)?)", line
                    )
                    kind = f"ldg.{hit[1].lower() if hit else '32'}"
                kinds[kind] += 1
    row["in_loop"] = " ".join(f"{kind}:{number}" for kind, number in sorted(kinds.items()))
    return row, body


def needs_matrix(program: Program) -> bool:
    """Whether it is a GEMM on matrix instructions; exact fp32 GEMMs run on the ordinary units."""
    return program.constant("BLOCK_M") is not None and next(iter(program.signature.values())) != "*fp32"


def problems_of(program: Program, row: dict, plain: bool) -> list[str]:
    """What a shipped program must not have. plain: its scales are row-major, so they are loaded one by one."""
    found, matrix = [], needs_matrix(program)
    if matrix and not row["matrix"]:
        found.append("no matrix instruction")
    if row["spills"]:
        found.append(f"{row['spills']} local memory accesses")
    if row["instructions"] < 30:
        found.append(f"only {row['instructions']} instructions")
    if row["shared"] > SHARED_LIMIT[program.arch]:
        found.append(f"shared memory {row['shared']} over {SHARED_LIMIT[program.arch]}")
    if (
        matrix
        and not plain
        and program.arch.startswith("sm_")
        and (narrow := re.search(r"ldg\.u16:(\d+)", row["in_loop"]))
    ):
        found.append(f"{narrow[1]} loads of 16 bits in the main loop")
    return found
