"""One load in a forked child with limits on time and memory, and what came of it.

Outcomes:

right         the model is the undamaged one, bit for bit
clear         an error that names what was found: raised by Requanto, or by a library with the file's or key's name
not_ours      torch.load or json.loads, which the program calls before it calls Requanto, raised
obscure       any other exception, with the place that raised it
foreign_bits  as wrong, after a change of stored values or types in optimum-quanto's format, which has no digest
float_bits    no error, and only tensors that are stored as floats differ (there is no digest of those)
model_config  no error and the same weights, but another answer: config.json describes another model
wrong         no error, and a quantized weight or an activation scale differs
code_run      something was started, connected to, or deleted outside of the scratch directory
crash, hang, memory
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Limits of one load.
SECONDS = 20
BYTES = 8 * 2**30

#: Changes of stored values and types that may leave valid ones.
_VALUES = ("data_flip", "data_fill", "number", "factor", "exchange", "rows", "quanto_map")

_WATCHED = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect", "os.fork", "pty.spawn")


@dataclass(frozen=True)
class Outcome:
    """What came of a load.

    Attributes:
        kind: see the module.
        place: of an obscure error: file:line that raised it.
        text: of an error: its type and message.
    """

    kind: str
    place: str = ""
    text: str = ""


def run(load: Callable[[Path], dict[str, str]], directory: Path, wanted: dict[str, str]) -> Outcome:
    """Loads ``directory`` in a forked child and compares with ``wanted``."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        _child(load, directory, wanted, write)  # does not return
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        told = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        kind = (
            "hang" if number in (signal.SIGALRM, signal.SIGXCPU) else "memory" if number == signal.SIGKILL else "crash"
        )
        return Outcome(kind, text=signal.Signals(number).name)
    if not told:
        return Outcome("crash", text=f"exit status {os.WEXITSTATUS(status)} without a word")
    return Outcome(**json.loads(told))


def _child(load: Callable[[Path], dict[str, str]], directory: Path, wanted: dict[str, str], pipe: int) -> None:
    outcome = Outcome("crash", text="no outcome")
    try:
        faulthandler.disable()  # a crash is an outcome like others
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(SECONDS)
        resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        os.chdir(directory.parent)
        started: list[str] = []
        sys.addaudithook(lambda event, args: started.append(event) if event in _WATCHED else None)
        outcome = _outcome(load, directory, wanted)
        if started or (directory.parent / "requanto-fuzz-was-here").exists():
            outcome = Outcome("code_run", text=f"{started}; {outcome}")
    except BaseException as error:
        outcome = Outcome("obscure", "harness", repr(error)[:300])
    finally:
        content = json.dumps(outcome.__dict__).encode()
        while content:
            content = content[os.write(pipe, content) :]
        os._exit(0)


def _outcome(load: Callable[[Path], dict[str, str]], directory: Path, wanted: dict[str, str]) -> Outcome:
    try:
        found = load(directory)
    except MemoryError:
        return Outcome("memory", text="MemoryError")
    except Exception as error:
        return judged(error, directory)
    except SystemExit as error:
        return Outcome("obscure", "SystemExit", repr(error))
    return compared(found, wanted)


def without_digest(outcome: Outcome, checkpoint: str, mutation: str) -> Outcome:
    """The outcome, with wrong values in a format without digests told apart."""
    if outcome.kind == "wrong" and checkpoint.startswith("quanto") and mutation in _VALUES:
        return Outcome("foreign_bits", outcome.place, outcome.text)
    return outcome


def compared(found: dict[str, str], wanted: dict[str, str]) -> Outcome:
    """The outcome of a load without an error."""
    if found == wanted:
        return Outcome("right")
    differ = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
    if differ == ["answer"] and _near(found["answer"], wanted["answer"]):
        return Outcome("right")
    told = ", ".join(differ[:4])
    if all(key.startswith("f:") or key == "answer" for key in differ):
        return Outcome("model_config" if differ == ["answer"] else "float_bits", text=told)
    return Outcome("wrong", text=told)


def _near(found: str, wanted: str) -> bool:
    """Whether two answers differ by rounding only: a tensor at another address may be summed in another order."""
    pairs = list(zip(map(float, found.split()), map(float, wanted.split()), strict=True))
    size = max(abs(value) for _, value in pairs)
    return all(abs(a - b) <= 1e-4 * size for a, b in pairs)


_MEMORY = re.compile(r"can't allocate memory|out of memory|Cannot allocate memory", re.IGNORECASE)
_OURS = f"{os.sep}requanto{os.sep}"


def judged(error: BaseException, directory: Path) -> Outcome:
    """Sorts an exception: clear or obscure.

    One that a ``raise`` of Requanto raised is clear. One of a library is clear if it is an OSError or a ValueError and names
    a file of the directory, or what config.json says.
    """
    text = f"{type(error).__name__}: {error}"
    if type(error).__name__ == "NotOurs":
        return Outcome("not_ours", text=text[:300])
    if _MEMORY.search(text):
        return Outcome("memory", text=text[:300])
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1]
    place = f"{_short(last.filename)}:{last.lineno}"
    ours = [frame for frame in frames if _OURS in frame.filename]
    if _OURS in last.filename and (last.line or "").startswith("raise"):
        return Outcome("clear", place, text[:300])
    if isinstance(error, (OSError, ValueError, EnvironmentError)) and not ours_caused(last) and _names(text, directory):
        return Outcome("clear", place, text[:300])
    if ours and ours[-1] is not last:
        place += f" (from {_short(ours[-1].filename)}:{ours[-1].lineno})"
    return Outcome("obscure", place, text[:300])


def ours_caused(frame: Any) -> bool:
    """Whether Requanto's own code, other than a ``raise``, raised it."""
    return _OURS in frame.filename


def _names(text: str, directory: Path) -> bool:
    names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    said = (
        "config.json",
        "quantization_config",
        "quantization config",
        "safetensors",
        "model type",
        "quantization type",
        "_class_name",
        "expected shape",
    )
    return any(name in text for name in (*names, str(directory), *said))


def _short(filename: str) -> str:
    for mark in (f"{os.sep}src{os.sep}", f"{os.sep}site-packages{os.sep}"):
        if mark in filename:
            return filename.rpartition(mark)[2]
    return os.path.basename(filename)
