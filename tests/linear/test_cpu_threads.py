"""Threads of Python and of torch, and forks, that share a model on a CPU."""

import concurrent.futures
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from ambient import threads
from cpu_reference import Fresh, form, quantized_layer, reference

import requanto_cpu
from requanto import QTensor, prepare, qint8, unpack
from requanto.linear.cpu import library
from requanto.runtime import buffers
from requanto.runtime.settings import settings

KINDS = ("int8", "int4", "int3", "nf4", "float8")
needs_library = pytest.mark.skipif(library.find() is None, reason="the CPU kernels are not available here")


def model(draw: Fresh, dtype: torch.dtype = torch.float32, width: int = 320) -> torch.nn.Sequential:
    """Layers of several types, one of them with quantized activations; nothing is packed yet."""
    layers = []
    for kind in KINDS:
        values = torch.randn(width, width, generator=draw) * width**-0.5
        layer = quantized_layer(form(kind).quantized(values.to(dtype)), torch.randn(width, generator=draw).to(dtype))
        layers += [layer, torch.nn.Tanh()]
    layers[0].weight.activation = qint8
    return torch.nn.Sequential(*layers)


@pytest.mark.parametrize("torch_threads", [1, 2])
def test_eight_threads_in_one_model(torch_threads):
    """The first calls, which prepack and make plans, at once; then others with as many rows and with more or fewer."""
    draw = Fresh()
    shared, alone = model(draw), None
    alone = torch.nn.Sequential(*(one if isinstance(one, torch.nn.Tanh) else twin(one) for one in shared))
    xs = [torch.randn(rows, 320, generator=draw) for rows in (1, 1, 3, 8, 1, 40, 2, 1)]
    start = threading.Barrier(8)

    def work(number: int) -> list[torch.Tensor]:
        start.wait(60)
        with torch.inference_mode():
            return [shared(xs[(number + step) % 8]) for step in range(16)]

    with threads(torch_threads), torch.inference_mode():
        want = [alone(x) for x in xs]
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            found = list(pool.map(work, range(8)))
    for number, outs in enumerate(found):
        for step, out in enumerate(outs):
            x = xs[(number + step) % 8]
            wanted = want[(number + step) % 8]
            assert torch.equal(out, wanted) or (len(x) > 16 and torch.allclose(out, wanted, rtol=1e-3, atol=1e-3)), draw


def twin(layer: torch.nn.Linear) -> torch.nn.Linear:
    made = quantized_layer(layer.weight.clone(), layer.bias)
    made.weight.activation = layer.weight.activation
    return made


def test_threads_beside_one_that_unpacks_changes_settings_and_reads(monkeypatch):
    draw = Fresh()
    shared = model(draw, torch.bfloat16)
    x = torch.randn(3, 320, generator=draw).bfloat16()
    stored = [one.weight.qdata.view(torch.uint8).clone() for one in shared[::2]]
    with torch.no_grad():
        want = shared(x).float()
    stop, wrong = threading.Event(), []

    def disturb() -> None:
        while not stop.is_set():
            unpack(shared)
            for one, codes in zip(shared[::2], stored):
                if not torch.equal(one.weight.qdata.view(torch.uint8), codes):
                    wrong.append("codes")
            for arithmetic in ("float", "auto"):
                settings.cpu_arithmetic = arithmetic
            buffers.release()
            prepare(shared, smallest=0)
            time.sleep(0.001)  # else no other thread gets the lock of weights that are being packed

    def multiply() -> None:
        with torch.inference_mode():
            for _ in range(40):
                if not (shared(x).float() - want).norm() < 5e-2 * want.norm():
                    wrong.append("result")

    monkeypatch.setattr(settings, "cpu_arithmetic", "auto")
    other = threading.Thread(target=disturb)
    other.start()
    try:
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            for done in [pool.submit(multiply) for _ in range(3)]:
                done.result()
    finally:
        stop.set()
        other.join()
    assert not wrong, draw


@pytest.mark.parametrize("kind", KINDS)
def test_the_number_of_torch_s_threads_changes_at_any_time(cpu_level, kind):
    """Between calls of one plan, and while other threads are in it."""
    draw = Fresh()
    layer = quantized_layer(form(kind).weight(700, 512, torch.float32, draw))
    prepare(layer, smallest=0)
    xs = [torch.randn(rows, 512, generator=draw) for rows in (1, 4, 70)]
    wants = [reference(x, layer.weight) for x in xs]
    stop = threading.Event()

    def change() -> None:
        while not stop.is_set():
            for count in (2, 1, 3):
                torch.set_num_threads(count)
                time.sleep(0.0005)

    other = threading.Thread(target=change)
    other.start()
    try:
        with torch.no_grad():
            for step in range(30):
                torch.set_num_threads(1 + step % 3)
                for x, want in zip(xs, wants):
                    want.check(layer(x), f"{kind} ({draw})")
    finally:
        stop.set()
        other.join()
        torch.set_num_threads(1)


def test_a_plan_that_was_made_for_one_thread_gives_room_to_more():
    if library.find() is None:
        pytest.skip("the CPU kernels are not available here")
    layer = quantized_layer(form("float8").weight(700, 512, torch.float32, Fresh()))
    prepare(layer, smallest=0)
    room = []
    with torch.no_grad():
        try:
            for count in (1, 2, 1):
                torch.set_num_threads(count)
                for _ in range(2):
                    layer(torch.randn(70, 512))
                (plan,) = layer.weight._storage.plans.values()
                room.append(plan.gemm._plain.scratch_bytes)
        finally:
            torch.set_num_threads(1)
    assert room[0] < room[1] == room[2]


# ---------------------------------------------------------------------- forks


def in_child(function) -> int:
    """The exit status of a fork that runs it; it is ended after 20 seconds."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(20)
            function()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


forks = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on Windows"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]


class TestForks:
    pytestmark = forks

    @needs_library
    @pytest.mark.parametrize("kind", KINDS)
    def test_after_use_with_several_threads(self, kind):
        """OpenMP waits forever for threads that a fork does not have; the kernels do not ask it for them."""
        draw = Fresh()
        layer = quantized_layer(form(kind).weight(1024, 1024, torch.float32, draw))
        x = torch.randn(2, 1024, generator=draw)
        with threads(2), torch.no_grad():
            want = [layer(x) for _ in range(2)][1]

            def child() -> None:
                assert torch.equal(layer(x), want)  # the plan of the parent
                assert torch.allclose(layer(x[:1]), want[:1], rtol=1e-3, atol=1e-3)
                layer.weight.unpack()  # and packed again
                assert torch.equal(layer(x), want)

            assert in_child(child) == 0
            assert torch.equal(layer(x), want)

    def test_beside_threads_that_multiply(self):
        draw = Fresh()
        shared = model(draw)
        x = torch.randn(2, 320, generator=draw)
        with torch.no_grad():
            want = shared(x)
        stop = threading.Event()

        def work() -> None:
            with torch.no_grad():
                while not stop.is_set():
                    shared(x)
                    unpack(shared)

        others = [threading.Thread(target=work) for _ in range(3)]
        for other in others:
            other.start()
        try:

            def child() -> None:
                with torch.no_grad():
                    for _ in range(2):
                        assert torch.allclose(shared(x), want, rtol=1e-2, atol=1e-2)
                    prepare(shared, smallest=0)
                    assert torch.allclose(shared(x), want, rtol=1e-2, atol=1e-2)

            for _ in range(5):
                assert in_child(child) == 0
        finally:
            stop.set()
            for other in others:
                other.join()


# ---------------------------------------------------------------------- the file of the library


REPLACED = """
import os, torch, requanto_cpu
from requanto import QTensor
from requanto.linear import linear
weight, x = QTensor.quantize(torch.randn(64, 96), "int4"), torch.randn(3, 96)
layer = torch.nn.Linear(96, 64, bias=False)
layer.weight = torch.nn.Parameter(weight, requires_grad=False)
with torch.no_grad():
    want = layer(x)
    path = requanto_cpu.path()
    assert str(path).startswith(os.environ["REQUANTO_CACHE"])
    other = path.with_name("other")
    other.write_bytes(os.urandom(path.stat().st_size))
    os.replace(other, path)
    assert torch.equal(layer(x), want)
    path.unlink()
    layer.weight.unpack()
    assert torch.equal(layer(x), want)
    assert torch.equal(layer(x[:1]), want[:1])
"""


@needs_library
def test_a_file_that_is_replaced_or_removed_while_it_is_loaded(tmp_path):
    """Builds write a new file in place of the old one, as does whoever damages it; the code that runs stays as it is."""
    kept = requanto_cpu.path()
    for file in kept.parent.glob(f"{kept.name}*"):
        shutil.copy2(file, tmp_path)
    # A library that was built into the package is taken from there: the child gets a copy of the package.
    package = Path(requanto_cpu.__file__).parent
    shutil.copytree(package, tmp_path / "packages" / package.name)
    paths = os.pathsep.join([str(tmp_path / "packages"), *filter(None, sys.path)])
    environment = {**os.environ, "REQUANTO_CACHE": str(tmp_path), "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", REPLACED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_weights_that_other_processes_share():
    """Memory that several processes map is not replaced by a packed copy; the result is the same."""
    draw = Fresh()
    weight = form("int4").weight(64, 96, torch.float32, draw)
    weight.qdata.share_memory_()
    layer = quantized_layer(weight)
    x = torch.randn(3, 96, generator=draw)
    with torch.no_grad():
        for _ in range(2):
            reference(x, layer.weight).check(layer(x), draw)
    assert isinstance(layer.weight, QTensor)
