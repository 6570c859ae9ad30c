"""Processes of one torch.distributed group (gloo, CPU) that a test starts: `run(function, 2, *arguments)`.

Most of their time is imports, so a test file starts as few as it can and lets them do all of its checks.

A rank that a crash ends (in three runs of this suite so far; twice the kernel's log named gloo's thread, pt_gloo_runloop,
inside malloc) is reported as a warning, with where each thread stood, and all ranks are started once more. What Requanto did
wrong would end them again.
"""

import faulthandler
import os
import shutil
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

#: Signals that say that memory was damaged, not that a test was.
CRASHES = ("SIGABRT", "SIGBUS", "SIGSEGV")


def warn_of_crash(what: str) -> None:
    """Says in pytest's summary that ranks are started a second time, and why."""
    warnings.warn(f"ranks are started once more, since one crashed: {what}", stacklevel=2)


def _worker(rank: int, world: int, directory: Path, function: Callable, arguments: tuple) -> None:
    faulthandler.enable()
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    # A file to meet at: a port that is free now may be taken when the processes get there.
    dist.init_process_group("gloo", init_method=f"file://{directory}/meeting", rank=rank, world_size=world)
    torch.save(function(rank, directory, *arguments), directory / f"found-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def run(function: Callable[..., Any], world: int, directory: Path, *arguments: Any) -> list[Any]:
    """What ``function(rank, directory, *arguments)`` returned on each rank."""
    before = set(directory.iterdir())
    try:
        mp.spawn(_worker, args=(world, directory, function, arguments), nprocs=world)
    except mp.ProcessExitedException as error:
        if error.signal_name not in CRASHES:
            raise
        warn_of_crash(str(error))
        for path in set(directory.iterdir()) - before:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        mp.spawn(_worker, args=(world, directory, function, arguments), nprocs=world)
    return [torch.load(directory / f"found-{rank}.pt") for rank in range(world)]


def attempt(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns, or the text of what it raised under ``"failed"``: the other checks go on."""
    try:
        return function(*arguments)
    except BaseException:
        return {"failed": traceback.format_exc()}


def start(function: Callable[..., Any], world: int, directory: Path, *arguments: Any) -> list[int]:
    """The same for processes of which some are to be killed: the exit code of each, a signal's as a negative number."""
    context = mp.spawn(_worker, args=(world, directory, function, arguments), nprocs=world, join=False)
    for process in context.processes:
        process.join(120)
    return [process.exitcode for process in context.processes]
