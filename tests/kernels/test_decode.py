"""The PTX that decodes e2m1 codes, carried out word by word here: no GPU is needed to see which bits it moves."""

import re

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")
from requanto_kernels import _decode  # noqa: E402

VALUES = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def carried_out(asm, words):
    """Results of the instructions for uint32 words; the last one, an fma, gives two 16-bit floats."""
    registers = {"$1": words}

    def value(name):
        return registers[name] if name in registers else np.uint32(int(name, 0))

    for line in asm.splitlines():
        found = re.fullmatch(r"(\S+) (.+);", line.strip())
        if found is None or found[1] == ".reg":
            continue
        operation, (target, *operands) = found[1].split("."), found[2].split(", ")
        a, *rest = (value(name) for name in operands)
        match operation:
            case ["shl", "b32"]:
                registers[target] = a << rest[0]
            case ["shr", "b32"]:
                registers[target] = a >> rest[0]
            case ["and", "b32"]:
                registers[target] = a & rest[0]
            case ["mov", "b32"]:
                registers[target] = np.broadcast_to(a, words.shape).copy()
            case ["lop3", "b32"]:
                assert rest[2] == 0xEA
                registers[target] = (a & rest[0]) | rest[1]
            case ["fma", "rn", kind]:
                dtype = {"bf16x2": torch.bfloat16, "f16x2": torch.float16}[kind]
                a, b, c = (torch.from_numpy(part.view(np.int16).copy()).view(dtype).double() for part in (a, *rest))
                assert bool((c == 0).all())
                assert bool(c.signbit().all())
                return a * b, dtype
            case _:
                raise AssertionError(line)
    raise AssertionError("no fma")


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("field", range(4))
def test_ptx_of_e2m1_gives_the_values_of_both_words(field, bf16):
    words = np.arange(2**16, dtype=np.uint32)
    words = words | (np.random.default_rng(0).permutation(words) << 16)
    found, dtype = carried_out(_decode.e2m1_asm.fn(field, bf16), words)
    codes = torch.from_numpy((words.view(np.uint16) >> (4 * field) & 15).astype(np.int64))
    want = torch.tensor(VALUES + [-value for value in VALUES], dtype=torch.float64)[codes]
    assert torch.equal(found, want)
    assert torch.equal(found.signbit(), codes >= 8)
    assert torch.equal(found.to(dtype).double(), found)
