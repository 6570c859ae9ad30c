"""Levels of the CPU kernels (REQUANTO_CPU), and the threads and forks of torch. test_cpu_qemu.py emulates processors."""

import os
import platform
import subprocess
import sys
import threading

import pytest
import torch
from kernel_cache import fresh, in_child, kept, needs_compiler, never, original, torch_and_one_line

import requanto_cpu
from requanto.linear.cpu import library
from requanto.runtime.settings import settings
from requanto_cpu import build, cache, load

pytestmark = [needs_compiler(), pytest.mark.usefixtures("fresh")]
__all__ = ["fresh"]
X86 = platform.machine() in ("x86_64", "AMD64")


def test_the_best_level_is_used():
    kept()
    assert load.levels()
    assert load.level() == load.levels()[-1]


def test_a_level_can_be_chosen(monkeypatch):
    kept(cache.path_of(build.compilers()[0]))  # that of all levels
    for name in load.levels():
        monkeypatch.setattr(load, "_loaded", None)
        monkeypatch.setenv("REQUANTO_CPU", name)
        assert load.library().rq_level() == name.encode()
        load.set_level(load.levels()[0])
        assert load.level() == load.levels()[0]
    with pytest.raises(ValueError, match=rf"set_level is 'mmx', but .* There are {', '.join(load.levels())} and torch"):
        load.set_level("mmx")
    assert load.level() == load.levels()[0]
    load.set_level(load.levels()[-1])


def test_a_level_that_does_not_exist(monkeypatch):
    """An error, whatever the settings: a typo must not choose another level. It lists what there is."""
    kept()
    monkeypatch.setenv("REQUANTO_CPU", "avx9")
    for compiled in (None, True):
        monkeypatch.setattr(settings, "compiled", compiled)
        for _ in range(2):
            with pytest.raises(ValueError, match=r"REQUANTO_CPU is 'avx9', expected one of avx2, .*, neon, .*, torch"):
                library.find()


@pytest.mark.skipif(not X86, reason="names of another processor")
def test_levels_that_are_not_here(monkeypatch):
    """Whether the library would have them or not."""
    kept()
    here = load.levels()
    for name in {"avx512", "vnni", "bf16", "amx", "avxvnni", "neon"} - {*here}:
        for asked in (build.processor_levels, lambda: None):
            monkeypatch.setattr(build, "processor_levels", asked)
            monkeypatch.setattr(load, "_loaded", None)
            monkeypatch.setenv("REQUANTO_CPU", name)
            with pytest.raises(ValueError, match=f"REQUANTO_CPU is '{name}', but .*{', '.join(here)}.*torch"):
                library.find()


def test_what_the_processor_has_by_the_kernel_and_by_its_own_word():
    """The first decides what is built, the second what runs."""
    kept()
    listed = build.processor_levels()
    if listed is None:
        pytest.skip("not run: no /proc/cpuinfo")
    built = load.library().rq_built().decode().split(",")
    assert load.levels() == [name for name in listed if name in built]


#: A process to which Linux gives no tiles: a filter of system calls answers ARCH_REQ_XCOMP_PERM with EPERM.
REFUSED = """
import ctypes, struct, sys
import requanto_cpu
from requanto_cpu import build
one = struct.Struct("HBBI").pack
load_word, equal, answer = 0x20, 0x15, 0x06
code = b"".join([
    one(load_word, 0, 0, 0), one(equal, 0, 3, 158), one(load_word, 0, 0, 16), one(equal, 0, 1, 0x1023),
    one(answer, 0, 0, 0x00050001), one(answer, 0, 0, 0x7FFF0000),
])
kept = ctypes.create_string_buffer(code)
program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(code) // 8, ctypes.addressof(kept)))
prctl = ctypes.CDLL(None).prctl
if prctl(38, 1, 0, 0, 0) or prctl(22, 2, program, 0, 0):
    sys.exit("no filters of system calls")
found = ctypes.CDLL(sys.argv[1])
found.rq_levels.restype = ctypes.c_char_p
print(*build.processor_levels(), "|", *found.rq_levels().decode().split(","))
"""


def test_no_tiles_where_linux_refuses_them():
    """Else a first use would build the level amx alone, and torch's operators would run."""
    if "amx" not in (build.processor_levels() or ()):
        pytest.skip("not run: this processor has no AMX, or Linux refuses it")
    kept(cache.path_of(build.compilers()[0]))  # that of all levels
    done = subprocess.run(
        [sys.executable, "-c", REFUSED, str(load.path())], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    listed, offered = done.stdout.split("|")
    here = build.processor_levels()
    assert listed.split() == [name for name in here if name != "amx"]
    assert offered.split() == [name for name in load.levels() if name != "amx"]


def test_a_first_use_builds_one_level(fresh, monkeypatch):
    built = []

    def builds(target, compiler, only=None):
        built.append(only)
        target.write_bytes(original())
        return ["avx2"]

    monkeypatch.setattr(build, "build", builds)
    best = load._needed("")
    cache.find(best)
    assert cache.found(best).stem.endswith(best)
    cache.find()
    assert cache.found(best) == cache.found() != cache.found(best).with_stem(f"{cache.found().stem}-{best}")
    assert built == [(best,), None]


def test_a_compiler_that_lacks_the_level(monkeypatch):
    """All others are built."""
    built = []

    def builds(target, compiler, only=None):
        built.append(only)
        if only:
            raise build.UnknownLevels("it does not know them")
        target.write_bytes(original())
        return ["avx2"]

    monkeypatch.setattr(build, "build", builds)
    assert library.find() is not None
    assert built == [(load._needed(""),), None]


def test_no_kernels_at_all(monkeypatch, caplog):
    """Neither built nor loaded."""
    monkeypatch.setattr(cache, "find", never)
    monkeypatch.setenv("REQUANTO_CPU", "torch")
    torch_and_one_line(caplog, "REQUANTO_CPU=torch")
    monkeypatch.setattr(settings, "compiled", True)
    with pytest.raises(RuntimeError, match="REQUANTO_CPU is 'torch'"):
        library.find()


def test_an_old_processor(monkeypatch, caplog):
    """Nothing is built for it; and a library that somebody else has built is loaded and says so itself."""
    with monkeypatch.context() as context:
        context.setattr(build, "processor_levels", lambda: [])
        context.setattr(cache, "find", never)
        torch_and_one_line(caplog, "this processor has none of the instruction sets that they are built for: ")
        context.setenv("REQUANTO_CPU", "avx2")
        with pytest.raises(ValueError, match=r"does not have its instructions. There are torch"):
            load.library()
    caplog.clear()
    monkeypatch.setattr(library, "why_not", None)
    kept()
    usual = load.interface.declare

    def declare(found):
        usual(found)
        found.rq_levels = lambda: b""

    monkeypatch.setattr(load.interface, "declare", declare)
    monkeypatch.setenv("REQUANTO_CACHE", os.environ["REQUANTO_CACHE"] + "/")
    torch_and_one_line(caplog, "this processor has none of the instruction sets that they are built for: ")


# Threads.


def packed(codes: torch.Tensor) -> torch.Tensor:
    """Strips of codes, and from these codes again."""
    rows, length = codes.shape
    strips = torch.empty(-(-rows // 16) * -(-length // 32) * 512, dtype=torch.uint8, device="cpu")
    found = requanto_cpu.library()
    requanto_cpu.check(found.rq_pack(codes.data_ptr(), 8, rows, length, 0, strips.data_ptr()))
    back = torch.empty_like(codes)
    requanto_cpu.check(found.rq_unpack(strips.data_ptr(), 8, rows, length, 0, 0, rows, back.data_ptr()))
    return back


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_the_number_of_threads_may_change(threads):
    """Also between one call and the next, and to more than there are processors."""
    kept()
    codes = torch.randint(0, 256, (1000, 1500), dtype=torch.uint8, device="cpu")
    for count in (1, 2, 5, 1, 3):
        threads(count)
        assert torch.equal(packed(codes), codes)


def test_many_python_threads(threads):
    """Each of eight uses torch's threads, while another one changes their number."""
    kept()
    load.library()
    codes = [torch.randint(0, 256, (200 + 16 * i, 1500), dtype=torch.uint8, device="cpu") for i in range(8)]
    wrong, stop = [], threading.Event()

    def work(own):
        for _ in range(20):
            if not torch.equal(packed(own), own):
                wrong.append(own.shape)

    def change():
        count = 1
        while not stop.wait(0.001):
            count = count % 3 + 1
            threads(count)

    changing = threading.Thread(target=change)
    changing.start()
    workers = [threading.Thread(target=work, args=(own,)) for own in codes]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    stop.set()
    changing.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on Windows")
def test_a_fork_computes(threads):
    """As torch itself, with one thread: OpenMP's threads are not there after a fork."""
    kept()
    codes = torch.randint(0, 256, (1000, 1500), dtype=torch.uint8, device="cpu")
    threads(2)
    assert torch.equal(packed(codes), codes)

    def child():
        torch.set_num_threads(1)
        return torch.equal(packed(codes), codes)

    assert in_child(child) == 0


def test_wrong_arguments():
    kept()
    found = load.library()
    memory = torch.zeros(4096, dtype=torch.uint8, device="cpu").data_ptr()
    for call in (
        lambda: found.rq_pack(memory, 9, 16, 32, 0, memory),
        lambda: found.rq_pack(memory, 0, 16, 32, 0, memory),
        lambda: found.rq_pack(memory, 4, -1, 32, 0, memory),
        lambda: found.rq_unpack(memory, 4, 16, 32, 0, 3, 2, memory),
        lambda: found.rq_unpack(memory, 4, 16, 32, 0, 0, 17, memory),
        lambda: found.rq_codes(memory, 4, 16, 32, 0, -1, 2, None, memory),
    ):
        with pytest.raises(RuntimeError, match=r"does not take these arguments \(code -3"):
            requanto_cpu.check(call())
