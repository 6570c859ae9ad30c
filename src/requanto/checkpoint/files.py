"""Looking at checkpoint files before they are read: what is missing or damaged is said before memory is spent."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from requanto.checkpoint.format import CheckpointError


def stored_keys(files: Iterable[str | Path]) -> set[str]:
    """Names of all tensors in safetensors files; only headers are read.

    Raises:
        CheckpointError: a file is missing, truncated or no safetensors file.
    """
    keys: set[str] = set()
    for file in files:
        try:
            with safe_open(str(file), framework="pt") as opened:
                keys.update(opened.keys())
        except FileNotFoundError as error:
            raise CheckpointError(f"{file} is missing: the checkpoint is not complete") from error
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file} cannot be read as safetensors ({error}): it is truncated or damaged, take it from its source again"
            ) from error
    return keys


def check_files(tensors: dict[str, str], files: Iterable[str | Path]) -> None:
    """Refuses files that hold fewer quantized weights than the config describes, or more.

    Names may differ by a library's renamings, so their number decides when they do.

    Raises:
        CheckpointError: a file is damaged, or weights are missing or not described.
    """
    files = [str(f) for f in files if str(f).endswith(".safetensors")]
    if not files:
        return
    stored = {key.removesuffix("_qdata") for key in stored_keys(files) if key.endswith("_qdata")}
    missing = [name for name in tensors if name not in stored]
    unknown = sorted(name for name in stored if name not in tensors)
    if unknown and len(stored) > len(tensors):
        raise CheckpointError(
            f"the files hold {len(stored)} quantized weights, of which quantization_config.tensors does not describe "
            f"{len(stored) - len(tensors)}, e.g. {unknown[0]}; restore the config.json that was saved with these files"
        )
    if missing and len(stored) < len(tensors):
        raise CheckpointError(
            f"{len(tensors) - len(stored)} of {len(tensors)} quantized weights are not in the files, e.g. "
            f"{missing[0]}_qdata: a shard is missing, or the files belong to another checkpoint "
            f"({', '.join(Path(f).name for f in files[:4])})"
        )
