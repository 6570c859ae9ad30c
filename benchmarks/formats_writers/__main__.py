"""Runs one writer; see the package."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from pathlib import Path

import torch

from formats_writers.common import finish


def main() -> None:
    """Fills a folder next to OUT and renames it when it is complete."""
    writer, out, base, setting = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    work = out.with_name(f".{out.name}.part")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    module, function = writer.split(".")
    made = getattr(importlib.import_module(f"formats_writers.{module}"), function)(work, base, **setting)
    finish(work, base, made)
    shutil.rmtree(out, ignore_errors=True)
    work.rename(out)


main()
