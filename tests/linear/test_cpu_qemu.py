"""CPU kernels without Python or torch in the process: of ARM under qemu-user, of old processors, and with AddressSanitizer.

`kernels/tests/cpu_main.cpp` runs the cases of cpu_cases.py, between pages that may not be touched.
"""

import platform
import shutil
from collections.abc import Callable
from pathlib import Path

import cpu_cases
import pytest
import torch
from cpu_levels import MISSING, PROPERTY
from cpu_programs import QUICK, SANITIZE, Program, native_program, program

from requanto_cpu import build

#: Processors that qemu emulates, and the levels of kernels that they have.
ARM = {"cortex-a72": ["neon"], "cortex-a76": ["neon", "dotprod"]}
X86 = {"Nehalem": [], "SandyBridge": [], "Haswell": ["avx2"]}
EVEX = Path(__file__).resolve().parents[2] / "kernels" / "tests" / "evex.h"
TILES = EVEX.with_name("tiles.h")
is_x86 = platform.machine() in ("x86_64", "AMD64")


def needs(*commands: str) -> None:
    missing = missing_of(*commands)
    if missing:
        pytest.skip(missing)


def missing_of(*commands: str) -> str:
    """What is not installed of these, or nothing."""
    missing = [command for command in commands if shutil.which(command) is None]
    return f"{', '.join(missing)} not installed (Debian: g++-aarch64-linux-gnu, qemu-user)" if missing else ""


@pytest.fixture
def noted(record_property: Callable[[str, object], None]) -> Callable[[str, str], None]:
    """Tells the closing line of a run that a level runs by an emulator, or skips and tells it what is missing."""

    def note(level: str, how: str, *commands: str) -> None:
        if missing := missing_of(*commands):
            record_property(MISSING, f"{level}: {missing}")
            pytest.skip(missing)
        record_property(PROPERTY, f"{level} ({how})")

    return note


def arm(processor: str) -> Program:
    return program("aarch64-linux-gnu-g++", "aarch64", QUICK).emulated(
        "qemu-aarch64", "-cpu", processor, "-L", "/usr/aarch64-linux-gnu"
    )


def all_kernels(seed: int) -> list[cpu_cases.Case]:
    suites = (cpu_cases.packing_of_all_widths, cpu_cases.kernels_of_x, cpu_cases.dequantizations)
    gemms = (cpu_cases.gemms, cpu_cases.special_gemms)
    return [case for suite in (*suites, *gemms) for case in suite(seed)]


@pytest.mark.parametrize("processor", ARM)
def test_arm(processor: str, tmp_path: Path, noted: Callable[..., None]) -> None:
    noted(ARM[processor][-1], "qemu-user", "aarch64-linux-gnu-g++", "qemu-aarch64")
    emulated = arm(processor)
    assert emulated.levels() == ARM[processor]
    emulated.compare(all_kernels(1), ARM[processor][-1], tmp_path, threads=2)
    emulated.compare(cpu_cases.float8_weights(1), ARM[processor][-1], tmp_path, 2, "flush")


@pytest.mark.skipif(not is_x86, reason="this machine's own processor is no x86")
@pytest.mark.parametrize("processor", X86)
def test_nothing_beyond_the_processor_is_executed(processor: str, tmp_path: Path) -> None:
    """A processor without AVX2 has no level: the list is empty, and no illegal instruction was executed to find out."""
    needs("g++", "qemu-x86_64")
    emulated = native_program().emulated("qemu-x86_64", "-cpu", processor)
    assert emulated.levels() == X86[processor]
    if X86[processor]:
        # qemu 7.2 takes register 4 of vgatherdps for none, as it would be of other instructions.
        emulated.compare([case for case in all_kernels(2) if not case.gathers], X86[processor][-1], tmp_path)


@pytest.mark.skipif(not is_x86, reason="this machine's own processor is no x86")
def test_avx_vnni_by_the_instructions_of_avx512(
    tmp_path: Path, noted: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels of AVX-VNNI, on processors that have its dot product in the other encoding alone."""
    native = native_program().levels()
    if "avxvnni" in native:
        return  # test_cpu_sweep.py runs them
    if "vnni" not in native:
        pytest.skip("this processor has neither AVX-VNNI nor AVX-512 VNNI")
    noted("avxvnni", "by AVX-512 VNNI")
    flags = (*build.LEVELS["x86_64"]["vnni"], "-include", str(EVEX))
    monkeypatch.setitem(build.LEVELS["x86_64"], "avxvnni", flags)
    emulated = program("g++", more=("-DRQ_TEST_EVEX", *QUICK))
    assert "avxvnni" in emulated.levels()
    emulated.compare(all_kernels(4), "avxvnni", tmp_path, threads=2)


@pytest.mark.skipif(not is_x86, reason="this machine's own processor is no x86")
def test_amx_by_tiles_in_memory(tmp_path: Path, noted: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels with AMX, on processors that have all but its tiles."""
    native = native_program().levels()
    if "amx" in native:
        return  # test_cpu_sweep.py runs them
    if "bf16" not in native:
        pytest.skip("this processor has neither AMX nor AVX-512 BF16")
    noted("amx", "tiles in memory")
    compare_amx_in_memory(monkeypatch, tmp_path)


def compare_amx_in_memory(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    flags = (*build.LEVELS["x86_64"]["amx"], "-include", str(TILES))
    monkeypatch.setitem(build.LEVELS["x86_64"], "amx", flags)
    emulated = program("g++", more=("-DRQ_TEST_TILES", *QUICK))
    assert "amx" in emulated.levels()
    emulated.compare(all_kernels(5), "amx", folder, threads=2)


def test_no_access_outside_of_the_buffers(tmp_path: Path) -> None:
    """At every level: buffers lie beside pages that may not be touched."""
    needs("g++")
    native = native_program()
    for number, level in enumerate(native.levels()):
        native.compare(all_kernels(3 + number) + cpu_cases.large_gemms(3 + number), level, tmp_path, threads=2)
        native.compare(cpu_cases.float8_weights(3 + number), level, tmp_path, 2, "flush")


@pytest.mark.slow
@pytest.mark.skipif(not is_x86, reason="this machine's own processor is no x86")
def test_address_sanitizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The templates that all levels share, built for AVX2, also within buffers and on the stack."""
    needs("g++")
    monkeypatch.setitem(build.LEVELS, platform.machine().lower(), {"avx2": build.LEVELS["x86_64"]["avx2"]})
    sanitized = program("g++", more=SANITIZE)
    for level in sanitized.levels():
        sanitized.compare(all_kernels(11), level, tmp_path, threads=2)


def test_a_read_outside_is_noticed(tmp_path: Path) -> None:
    """The guard pages work: a case whose buffer is a byte too short stops the program."""
    needs("g++")
    case = cpu_cases.packing_cases(torch.Generator().manual_seed(9), 16, 32, 8)[0]
    data, result = case.buffers[2]
    case.buffers[2] = (data[:-64], result)
    cpu_cases.write([case, case], tmp_path / "cases")
    native = native_program()
    with pytest.raises(AssertionError, match="signal 11 in case 0"):
        native.run(native.levels()[0], str(tmp_path / "cases"), str(tmp_path / "results"), "1")
