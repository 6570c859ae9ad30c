"""The PTX that decodes codes, carried out word by word here: no GPU is needed to see which bits it moves."""

import re

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")
from reference import small_float_values  # noqa: E402

from requanto_kernels import _fields  # noqa: E402

DTYPES = {"bf16x2": torch.bfloat16, "f16x2": torch.float16}


def halves(words):
    """The two 16-bit numbers of each uint32, in order."""
    return words.view(np.uint16)


def prmt(a, b, selector):
    """Bytes of a (0 to 3) and b (4 to 7), chosen by the 4 lowest nibbles of the selector."""
    both = np.stack(np.broadcast_arrays(a, b), -1).astype(np.uint32).view(np.uint8).reshape(-1, 8)
    selector = np.broadcast_to(selector, both.shape[:1])
    assert not ((selector & 0x8888) != 0).any()  # would replicate a sign
    picked = [np.take_along_axis(both, (selector >> (4 * i) & 7)[:, None].astype(np.int64), 1) for i in range(4)]
    return np.concatenate(picked, 1).copy().view(np.uint32)[:, 0]


def carried_out(asm, *operands):
    """`$0` of the instructions for uint32 operands `$1`, `$2` ...; an fma gives two 16-bit floats and ends them."""
    registers = {f"${i + 1}": operand for i, operand in enumerate(operands)}
    words = operands[0]

    def value(name):
        return registers[name] if name in registers else np.uint32(int(name, 0))

    for line in asm.splitlines():
        found = re.fullmatch(r"(\S+) (.+);", line.strip())
        if found is None or found[1] == ".reg":
            continue
        operation, (target, *names) = found[1].split("."), found[2].split(", ")
        a, *rest = (value(name) for name in names)
        match operation:
            case ["shl", "b32"]:
                registers[target] = a << rest[0]
            case ["shr", "u32" | "b32"]:
                registers[target] = a >> rest[0]
            case ["and", "b32"]:
                registers[target] = a & rest[0]
            case ["mov", "b32"]:
                registers[target] = np.broadcast_to(a, words.shape).copy()
            case ["lop3", "b32"]:
                assert rest[2] == 0xEA
                registers[target] = (a & rest[0]) | rest[1]
            case ["prmt", "b32"]:
                registers[target] = prmt(a, *rest)
            case ["fma", "rn", kind]:
                a, b, c = (torch.from_numpy(part.view(np.int16).copy()).view(DTYPES[kind]) for part in (a, *rest))
                if bool((c == 0).all()):
                    assert bool(c.signbit().all())  # which keeps the sign of a zero
                    return a.double() * b.double(), DTYPES[kind]
                return a.double() * b.double() + c.double(), DTYPES[kind]
            case _:
                raise AssertionError(line)
    return registers["$0"]


def every_word():
    words = np.arange(2**16, dtype=np.uint32)
    return words | (np.random.default_rng(0).permutation(words) << 16)


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("kind", ["e1m2", "e2m1", "e3m0"])
@pytest.mark.parametrize("field", range(4))
def test_small_floats_of_4_bits(field, kind, bf16):
    words = every_word()
    found, dtype = carried_out(_fields.small_float_asm(field, kind, bf16), words)
    codes = torch.from_numpy((halves(words) >> (4 * field) & 15).astype(np.int64))
    assert torch.equal(found, small_float_values(kind)[codes])
    assert torch.equal(found.signbit(), codes >= 8)
    assert torch.equal(found.to(dtype).double(), found)


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("form", ["plain", "centred", "magic"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7])
def test_integers(bits, form, bf16):
    low = 2 if bits < 4 else 4
    words, random = every_word(), np.random.default_rng(1)
    bytes_, two = (random.integers(0, most, (2**16, 2)).astype(np.uint16) for most in (256, 2**16))
    planes = {3: [(1, bytes_)], 5: [(1, bytes_)], 6: [(2, bytes_)], 7: [(2, two), (1, bytes_)]}.get(bits, [])
    for field in range(8 if bits in (2, 3, 5, 7) else 4):
        codes = (halves(words) >> (low * field % 16) & ((1 << low) - 1)).astype(np.int64)
        place = low
        for width, plane in planes:
            codes |= (plane.ravel() >> (width * field) & ((1 << width) - 1)).astype(np.int64) << place
            place += width
        if planes:
            operands = [plane.view(np.uint32)[:, 0] for _, plane in planes]
            found = carried_out(_fields.planes_asm(field, bits, bf16, form), words, *operands)
        else:
            found = carried_out(_fields.lop3_asm(field, bits, bf16, form), words)
        codes = torch.from_numpy(codes)
        if form == "magic":
            dtype, magic = (torch.bfloat16, 128) if bf16 else (torch.float16, 1024)
            found, want = torch.from_numpy(found.view(np.int16).copy()).view(dtype).double(), codes + magic
        else:
            found, want = found[0], codes - (1 << (bits - 1) if form == "centred" else 0)
        assert torch.equal(found, want.double())


@pytest.mark.parametrize("field", range(4))
def test_codebooks_by_permutation(field):
    """Bytes of 16 values in 8 registers, as `open_table` leaves them; each is an operand twice, one for each word."""
    words, values = every_word(), np.random.default_rng(2).integers(0, 2**16, 16).astype(np.uint32)
    table = [
        sum((values[i + j] >> shift & 0xFF) << (8 * j) for j in range(4)) for shift in (0, 8) for i in range(0, 16, 4)
    ]
    operands = [np.broadcast_to(np.uint32(part), words.shape) for part in table for _ in range(2)]
    found = carried_out(_fields.lookup_asm(field), words, *operands)
    assert np.array_equal(halves(found), values.astype(np.uint16)[halves(words) >> (4 * field) & 15])
