"""The library of CPU kernels: packing codes into strips and back, against their definition and the plain layout."""

from __future__ import annotations

import ctypes
import os
import random
import re
import signal

import pytest
import torch

import requanto_cpu
from requanto.dtypes import bit_packing
from requanto_cpu import build, interface


def strips(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Strips of uint8 codes [N, K], as csrc/requanto_cpu.h defines them."""
    rows, length = codes.shape
    strip_count, unit_count = -(-rows // 16), -(-length // 32)
    padded = torch.zeros(strip_count * 16, unit_count * 32, dtype=torch.int64, device="cpu")
    padded[:rows, :length] = codes
    units = padded.view(strip_count, 16, unit_count, 32).transpose(1, 2)
    planes, low = [], 0
    for width in [8] if bits == 8 else [width for width in (4, 2, 1) if bits & width]:
        parts = (units >> low) & (2**width - 1)
        fields = parts.view(strip_count, unit_count, 16, width, 8 // width, 4)  # row, vector, t, j
        bytes_ = sum(fields[..., t, :] << width * t for t in range(8 // width))
        planes.append(bytes_.transpose(2, 3).flatten(2))
        low += width
    return torch.cat(planes, -1).to(torch.uint8).flatten()


@pytest.mark.parametrize("bits", range(1, 9))
def test_strips_and_back(bits: int) -> None:
    library = requanto_cpu.library()
    for case in range(12):
        rows, length = (1, 1) if case == 0 else (random.randint(1, 70), random.randint(1, 200))
        start = random.randint(0, rows)
        stop = random.randint(start, rows)
        codes = torch.randint(0, 2**bits, (rows, length), dtype=torch.uint8, device="cpu")
        flip = 128 if bits == 8 and case % 2 else 0
        plain = codes if bits == 8 else bit_packing.pack(codes, bits).contiguous()
        expected = strips(codes ^ flip, bits)
        packed = torch.full_like(expected, 255)
        requanto_cpu.check(library.rq_pack(plain.data_ptr(), bits, rows, length, flip, packed.data_ptr()))
        assert torch.equal(packed, expected), (rows, length)

        back = torch.full_like(plain[start:stop], 255)
        requanto_cpu.check(library.rq_unpack(packed.data_ptr(), bits, rows, length, flip, start, stop, back.data_ptr()))
        assert torch.equal(back, plain[start:stop]), (rows, length, start, stop)

        some = torch.full_like(codes[start:stop], 255)
        where = (packed.data_ptr(), bits, rows, length, flip)
        requanto_cpu.check(library.rq_codes(*where, start, stop, None, some.data_ptr()))
        assert torch.equal(some, codes[start:stop]), (rows, length, start, stop)

        index = torch.randint(0, rows, (9,), dtype=torch.int64, device="cpu")
        chosen = torch.full((9, length), 255, dtype=torch.uint8, device="cpu")
        requanto_cpu.check(library.rq_codes(*where, 0, 9, index.data_ptr(), chosen.data_ptr()))
        assert torch.equal(chosen, codes[index]), (rows, length)


HEADER = (build.SOURCES / "requanto_cpu.h").read_text()
C_TYPES = {"int64_t": ctypes.c_int64, "int32_t": ctypes.c_int32, "float": ctypes.c_float}


@pytest.mark.parametrize("struct", [interface.RqWeight, interface.RqGemm])
def test_structs_are_those_of_the_header(struct: type[ctypes.Structure]) -> None:
    body = re.search(rf"typedef struct {struct.__name__} {{(.*?)}} {struct.__name__};", HEADER, re.DOTALL)
    assert body is not None
    expected = []
    for line in re.sub(r"//.*", "", body[1]).split(";")[:-1]:
        words = re.fullmatch(r"\s*(?:const\s+)?(\w+)(\s*\*)?\s+(.*)", line.replace("* ", " * "), re.DOTALL)
        assert words is not None, line
        for name in words[3].split(","):
            expected.append((name.strip(), None if words[2] else C_TYPES[words[1]]))
    found = [
        (name, None if ctypes.sizeof(kind) == 8 and kind is not ctypes.c_int64 else kind)
        for name, kind in struct._fields_
    ]
    assert found == expected


def test_constants_are_those_of_the_header() -> None:
    text = re.sub(r"//.*", "", HEADER)
    values = {name: int(value) for name, value in re.findall(r"RQ_(\w+) = (-?\d+)", text)}
    assert len(values) > 20
    for name, value in values.items():
        assert getattr(interface, name) == value, name


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on Windows")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_after_several_threads() -> None:
    """OpenMP waits forever for threads that a fork does not have, so loops run in one there; an alarm ends a wait."""
    library = requanto_cpu.library()
    plain = torch.randint(0, 256, (4096, 1024), dtype=torch.uint8, device="cpu")
    packed = torch.empty(4096 * 1024, dtype=torch.uint8, device="cpu")

    def pack() -> int:
        return library.rq_pack(plain.data_ptr(), 4, 4096, 2048, 0, packed.data_ptr())

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert pack() == 0
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(20)
            os._exit(pack())
        assert os.waitpid(child, 0)[1] == 0
        assert pack() == 0
    finally:
        torch.set_num_threads(before)
