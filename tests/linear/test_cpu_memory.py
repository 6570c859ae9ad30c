"""Results do not depend on memory that nobody has written: they are the same bits whether it holds zeros or NaN.

Memory is new tensors, scratch buffers, packed weights with their padding, and (in a process of its own, by the C library's
allocator) what was freed. The stack of the kernels is filled by kernels/tests/cpu_main.cpp.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from cpu_reference import DTYPES, KINDS, Form, form
from torch import nn

import requanto
from requanto import QTensor
from requanto.dtypes.qtypes import qtypes
from requanto.linear import linear
from requanto.linear.cpu import library, strips
from requanto.runtime import buffers, pages

#: 0x7F is NaN in e4m3, 0xFF there and in e8m0, float16, bfloat16 and float32.
BYTES = (0x7F, 0xFF)
OPTIONS = (
    *(form(name) for name in qtypes if not name.startswith("qfp") or name in ("qfp4_e2m1", "qfp5_e2m2", "qfp7_e3m3")),
    *(form(kind, group_size=(8, 16, 48)[number % 3]) for number, kind in enumerate(KINDS)),
    *(form("int4", group_size=32, scale_bits=bits) for bits in (4, 6)),
    form("int4", group_size=32, zero_point="integer"),
    form("int8", column_scale="root"),
    form("int4", rotation=32, low_rank=3),
)
#: Forms with codes of their own in what packing frees.
FREED = [form(kind) for kind in ("int8", "uint8", "float8", "mxfp8_e4m3", "int4", "int3", "nf4", "codebook4")]
CAPPED = ("avx2", "avx512", "vnni")


class _Written(OrderedDict):
    """A thread's scratch buffers, which are filled whenever one is requested."""

    byte = 0

    def get(self, key, default=None):
        found = super().get(key, default)
        if isinstance(found, torch.Tensor):
            found.fill_(self.byte)
        return found

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        self.get(key)


@contextlib.contextmanager
def memory_of(byte: int) -> Iterator[None]:
    """Scratch buffers and packed weights hold that byte; new tensors, unless it is 0, NaN or the largest integer."""
    local, empty = type(buffers._local)(), pages.empty
    local.cached = _Written()
    local.cached.byte = byte

    def filled(shape, dtype):
        made = empty(shape, dtype)
        made.view(torch.uint8).fill_(byte)
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(buffers, "_local", local)
        patch.setattr(pages, "empty", filled)
        torch.use_deterministic_algorithms(byte != 0, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


def with_strides(weight: QTensor) -> QTensor:
    """The weight with codes that lie column by column, as nobody else holds them: packing copies them first."""
    codes = weight.inner_tensors()["qdata"]
    columns = codes.view(torch.uint8).t().contiguous().t().view(codes.dtype)
    return weight.with_inner(
        {**{name: part.clone() for name, part in weight.inner_tensors().items()}, "qdata": columns}
    )


def results(one: Form, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """What is computed with a weight, plain and packed."""
    random = torch.Generator().manual_seed(3)
    rows, length = 20, one.length(72)
    weight = one.weight(rows, length, dtype, random)
    x = torch.randn(6, length, generator=random).to(dtype)
    index = torch.tensor([[19, 0, 7], [7, 16, 15]])
    codes = weight.inner_tensors()["qdata"]
    for packed in (False, True):
        layer = nn.Linear(length, rows, dtype=dtype)
        layer.weight = nn.Parameter(with_strides(weight), requires_grad=False)
        layer.bias.data.copy_(torch.linspace(-1, 1, rows))
        if packed and (library.find() is None or not strips.fits(weight._spec)):
            break
        assert not packed or requanto.prepare(layer, smallest=0)
        layer.weight._storage.stays_plain = None if packed else "a test"
        about = "packed" if packed else "plain"
        with torch.no_grad():
            for count in (1, 3, 6):
                for call in range(2):  # the second runs a plan
                    yield f"{about}: {count} rows, call {call}", layer(x[:count])
            for kind in ("qint8", "qfloat8") if one.kind in ("qint8", "qint4", "qfloat8", "qnf4") else ():
                yield f"{about}: activations in {kind}", linear(x, layer.weight, activation=qtypes[kind])
        given = x.clone().requires_grad_()
        layer(given).sum().backward()
        yield f"{about}: gradient", given.grad
        yield f"{about}: dequantized", layer.weight.dequantize()
        yield f"{about}: rows", layer.weight[3:18].dequantize()
        yield f"{about}: lookup", nn.functional.embedding(index, layer.weight)
        yield f"{about}: codes", layer.weight.codes().contiguous().view(torch.uint8)
    back = layer.weight.inner_tensors()["qdata"]
    assert same(back.view(torch.uint8), codes.view(torch.uint8)), f"{one}: other codes, packed and unpacked"


def same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return found.shape == wanted.shape and torch.equal(
        found.detach().contiguous().view(torch.uint8), wanted.detach().contiguous().view(torch.uint8)
    )


def all_results(forms: Sequence[Form], first: int = 0) -> Iterator[tuple[str, torch.Tensor]]:
    """`results` of all forms, each in another dtype than the one before, and of GPTQ."""
    for number, one in enumerate(forms, first):
        dtype = DTYPES[number % len(DTYPES)]
        for about, value in results(one, dtype):
            yield f"{one}, {dtype}, {about}", value


def calibrated(kind: str) -> Iterator[tuple[str, torch.Tensor]]:
    """What GPTQ makes of a small model."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 16))
    samples = [torch.randn(8, 32) * torch.logspace(-1, 1, 32) for _ in range(2)]
    requanto.quantize(model, weights=kind, calibration=samples, method="gptq", progress=False)
    with torch.no_grad():
        yield f"{kind}: calibrated", model(samples[0])
    for name, weight in model.named_parameters():
        yield f"{kind}: {name}", weight.dequantize() if isinstance(weight, QTensor) else weight


def compare(made: Callable[[], Iterator[tuple[str, torch.Tensor]]]) -> None:
    with memory_of(0):
        wanted = {about: value.detach().clone() for about, value in made()}
    for about, value in wanted.items():
        assert not value.is_floating_point() or bool(value.isfinite().all()), about
    for byte in BYTES:
        with memory_of(byte):
            found = list(made())
        assert len(found) == len(wanted)
        for about, value in found:
            assert same(value, wanted[about]), f"{about}: other bits in memory that holds {byte:#x}"


def test_every_form(cpu_level):
    compare(lambda: all_results(OPTIONS, CAPPED.index(cpu_level) if cpu_level in CAPPED else 0))


@pytest.mark.parametrize("kind", ["int8", "int4", "nf4", "codebook3", "float8", "nvfp4", "mxfp8_e4m3", "mxfp4"])
def test_calibration(kind):
    compare(lambda: calibrated(kind))


def digest() -> str:
    """Of results in one process: with the allocator's own bytes in what was allocated and freed."""
    torch.set_num_threads(1)
    found = hashlib.sha256()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strips, "MAX_PADDING", 1000)
        for made in (all_results(FREED), *(calibrated(kind) for kind in ("int8", "mxfp8_e4m3"))):
            for about, value in made:
                found.update(about.encode() + value.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator has no MALLOC_PERTURB_")
def test_memory_that_was_freed():
    """glibc fills what is freed with 0x80 and what is allocated with 0x7F."""
    here = Path(__file__).parent
    places = [*sys.path, *(str(here.parents[1] / place) for place in ("tests/linear", "tests/tensor"))]
    environment = {**os.environ, "MALLOC_PERTURB_": "128", "PYTHONPATH": os.pathsep.join(places)}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == digest()


if __name__ == "__main__":
    print(digest())
