"""CPU kernels without Python or torch in the process: of ARM under qemu-user, of old processors, and with AddressSanitizer.

`kernels/tests/cpu_main.cpp` runs the cases of cpu_cases.py, between pages that may not be touched.
"""

import platform
import shutil
from pathlib import Path

import cpu_cases
import pytest
import torch
from cpu_programs import SANITIZE, Program, program

#: Processors that qemu emulates, and the levels of kernels that they have.
ARM = {"cortex-a72": ["neon"], "cortex-a76": ["neon", "dotprod"]}
X86 = {"Nehalem": [], "SandyBridge": [], "Haswell": ["avx2"]}
is_x86 = platform.machine() in ("x86_64", "AMD64")


def needs(*commands: str) -> None:
    missing = [command for command in commands if shutil.which(command) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed (Debian: g++-aarch64-linux-gnu, qemu-user)")


def arm(processor: str) -> Program:
    needs("aarch64-linux-gnu-g++", "qemu-aarch64")
    return program("aarch64-linux-gnu-g++", "aarch64").emulated(
        "qemu-aarch64", "-cpu", processor, "-L", "/usr/aarch64-linux-gnu"
    )


def packing(seed: int) -> list[cpu_cases.Case]:
    random = torch.Generator().manual_seed(seed)
    shapes = ((1, 8), (2, 1), (5, 33), (16, 32), (17, 40), (33, 104))
    return [case for bits in range(1, 9) for shape in shapes for case in cpu_cases.packing_cases(random, *shape, bits)]


@pytest.mark.parametrize("processor", ARM)
def test_arm(processor: str, tmp_path: Path) -> None:
    emulated = arm(processor)
    assert emulated.levels() == ARM[processor]
    emulated.compare(packing(1), ARM[processor][-1], tmp_path, threads=2)


@pytest.mark.skipif(not is_x86, reason="this machine's own processor is no x86")
@pytest.mark.parametrize("processor", X86)
def test_nothing_beyond_the_processor_is_executed(processor: str, tmp_path: Path) -> None:
    """A processor without AVX2 has no level: the list is empty, and no illegal instruction was executed to find out."""
    needs("g++", "qemu-x86_64")
    emulated = program("g++").emulated("qemu-x86_64", "-cpu", processor)
    assert emulated.levels() == X86[processor]
    if X86[processor]:
        emulated.compare(packing(2), X86[processor][-1], tmp_path)


def test_no_access_outside_of_the_buffers(tmp_path: Path) -> None:
    needs("g++")
    sanitized = program("g++", more=SANITIZE)
    for number, level in enumerate(sanitized.levels()):
        sanitized.compare(packing(3 + number), level, tmp_path, threads=2)


def test_a_read_outside_is_noticed(tmp_path: Path) -> None:
    """The guard pages work: a case whose buffer is a byte too short stops the program."""
    needs("g++")
    case = cpu_cases.packing_cases(torch.Generator().manual_seed(9), 16, 32, 8)[0]
    data, result = case.buffers[2]
    case.buffers[2] = (data[:-64], result)
    cpu_cases.write([case, case], tmp_path / "cases")
    with pytest.raises(AssertionError, match="signal 11 in case 0"):
        program("g++").run(program("g++").levels()[0], str(tmp_path / "cases"), str(tmp_path / "results"), "1")
