"""Fetches the peers' wheels for a machine without a network, where `make gpu-check` takes them with `--wheels DIR`.

    python benchmarks/gpu_check/wheels.py DIR

Sources without a wheel (gemlite, hqq) are built into one here, which needs no compiler: their kernels are Triton's or
torch's. Of bitsandbytes, whose wheel holds a library for every version of CUDA, ROCm and XPU, those for the CPU and
`--cuda` stay.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

#: The releases that `peers.py` calls.
VERSIONS = {
    "humming-kernels": "0.1.20", "gemlite": "0.6.0.post2", "torchao": "0.18.0", "bitsandbytes": "0.50.2", "sdnq": "0.2.8",
    "hqq": "0.2.8.post1",
}  # fmt: skip
#: Small packages that the peers import and that a machine with torch and transformers may lack.
ALSO = ("termcolor", "tabulate")
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_24_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def fetch(requirement: str, python: str, folder: Path) -> None:
    """Downloads a wheel for Linux on x86-64 into a folder, or builds it from its source if there is none."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    options = ["--only-binary=:all:", "--python-version", python, "--implementation", "cp"]
    options += [word for name in PLATFORMS for word in ("--platform", name)]
    done = subprocess.run(
        [*pip, "download", "-q", "--no-deps", *options, "-d", str(folder), requirement], capture_output=True, text=True
    )
    if done.returncode == 0:
        return
    done = subprocess.run(
        [*pip, "wheel", "-q", "--no-deps", "-w", str(folder), requirement],
        capture_output=True,
        text=True,
        env={**os.environ, "DISABLE_CUDA": "1"},  # hqq
    )
    if done.returncode:
        raise RuntimeError(f"{requirement}: {done.stderr.strip()[-500:]}")


def slim(wheel: Path, cuda: str) -> None:
    """Drops bitsandbytes' libraries for other devices than the CPU and that version of CUDA, such as "130"."""
    unused = re.compile(rf"bitsandbytes/libbitsandbytes_(?!cpu|cuda{cuda}\.)\w+\.so")
    with tempfile.TemporaryDirectory(dir=wheel.parent) as folder:
        smaller = Path(folder) / wheel.name
        with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(smaller, "w", zipfile.ZIP_DEFLATED) as target:
            for entry in source.infolist():
                if unused.fullmatch(entry.filename):
                    continue
                data = source.read(entry)
                if entry.filename.endswith(".dist-info/RECORD"):
                    lines = data.decode().splitlines(keepends=True)
                    data = "".join(line for line in lines if not unused.fullmatch(line.split(",")[0])).encode()
                target.writestr(entry, data)
        smaller.replace(wheel)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", help="version of Python on the other machine")
    parser.add_argument(
        "--cuda", default="130", help="CUDA of its torch, without a point; empty: keep all of bitsandbytes"
    )
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    failed = 0
    for requirement in (*(f"{name}=={version}" for name, version in VERSIONS.items()), *ALSO):
        try:
            fetch(requirement, args.python, args.folder)
        except RuntimeError as error:
            failed += 1
            print(f"not fetched: {error}", file=sys.stderr)
    if args.cuda:
        for wheel in args.folder.glob("bitsandbytes-*.whl"):
            slim(wheel, args.cuda)
    total = 0
    for wheel in sorted(args.folder.glob("*.whl")):
        total += wheel.stat().st_size
        print(f"{wheel.stat().st_size / 2**20:7.2f} MiB  {wheel.name}")
    print(f"{total / 2**20:7.2f} MiB  in all")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
