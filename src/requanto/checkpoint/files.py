"""Checks of safetensors headers, so that missing or damaged files are reported before any weight is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from requanto.checkpoint.format import PARTS, CheckpointError
from requanto.runtime.settings import settings

#: what a quantized weight's name is followed by in a file: Requanto's parts, and those of optimum-quanto
_SUFFIXES = (*(f"_{part}" for part in PARTS), "._data", "._data._data")
#: last words of the names of codes in files of GPTQ, AWQ and AutoRound, HQQ, compressed-tensors
_CODES = frozenset({"qweight", "W_q", "weight_packed"})

#: last words of the names of scales of codes that are stored under the weight's own name: float8 and int8 of
#: compressed-tensors, DeepSeek, ModelOpt and FBGEMM; LLM.int8() of bitsandbytes; ComfyUI's scaled float8
_SCALES = (".weight_scale", ".weight_scale_inv", ".SCB", ".scale_weight")


def stored_keys(files: Iterable[str | Path]) -> set[str]:
    """Returns the names of all tensors in the safetensors files; only headers are read.

    Raises:
        CheckpointError: a file is missing, truncated or not a safetensors file.
    """
    keys: set[str] = set()
    for file in files:
        try:
            with safe_open(str(file), framework="pt") as opened:
                keys.update(opened.keys())
        except FileNotFoundError as error:
            raise CheckpointError(f"{file} is missing: the checkpoint is incomplete") from error
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                f"{file} cannot be read as safetensors ({error}): it is truncated or damaged, download or save it again"
            ) from error
    return keys


def check_files(tensors: dict[str, str], files: Iterable[str | Path]) -> None:
    """Raises CheckpointError if the files hold fewer or more quantized weights than the config describes.

    The library may rename tensors on loading, so differing names alone are accepted; only their number is compared.

    Raises:
        CheckpointError: a file is damaged, or weights are missing or not described.
    """
    files = [str(f) for f in files if str(f).endswith(".safetensors")]
    if not files:
        return
    keys = stored_keys(files)
    plain = next((name for name in tensors if name in keys), None)
    if plain is not None:
        raise CheckpointError(
            f"the files hold a tensor {plain}, which quantization_config.tensors describes as quantized: its parts are "
            f"{plain}_qdata, {plain}_scale ... The files belong to another checkpoint, or were damaged"
        )
    stored = {key.removesuffix("_qdata") for key in keys if key.endswith("_qdata")}
    missing = [name for name in tensors if name not in stored]
    unknown = sorted(name for name in stored if name not in tensors)
    if unknown and len(stored) > len(tensors):
        raise CheckpointError(
            f"the files hold {len(stored)} quantized weights; quantization_config.tensors does not describe "
            f"{len(stored) - len(tensors)} of them, e.g. {unknown[0]}; restore the config.json saved with these files"
        )
    if missing and len(stored) < len(tensors):
        raise CheckpointError(
            f"{len(tensors) - len(stored)} of {len(tensors)} quantized weights are not in the files, e.g. "
            f"{missing[0]}_qdata: a shard is missing, or the files belong to another checkpoint "
            f"({', '.join(Path(f).name for f in files[:4])})"
        )


def check_all_read(unread: Iterable[str], missing: Iterable[str], model: str) -> None:
    """Raises if a model lacks weights whose quantized parts are in the files, because nothing describes them.

    Args:
        unread: names of stored tensors that no parameter of the model took.
        missing: names of parameters that got no value.
        model: its class, for the message.

    Raises:
        CheckpointError: see above.
    """
    absent, unread = set(missing), list(unread)
    lost = sorted(
        key for key in unread if any(key.endswith(end) and key.removesuffix(end) in absent for end in _SUFFIXES)
    )
    if lost:
        raise CheckpointError(
            f"the files hold quantized weights ({lost[0]} and {len(lost) - 1} more), but the config does not "
            f"describe them, so {model} would have random weights. Use the config.json (or "
            f"quanto_qmap.json) that was saved with the files, and do not pass quantization_config=None."
        )
    foreign = sorted(key for key in unread if _weight_of(key) in absent)
    if foreign:
        raise CheckpointError(
            f"the files hold weights that another library quantized ({foreign[0]} and {len(foreign) - 1} more), but "
            f"config.json does not say so, so {model} would have random weights. Pass quantization_config=QuantoConfig(): "
            f"Requanto then looks at the tensors. Or use the config.json that was saved with the files."
        )


def check_scales_read(unread: Iterable[str], has: Iterable[str], model: str) -> None:
    """Raises if scales of weights that the model has were not read: their codes would be taken for the weights.

    For models that no quantizer loads from quantized files, unless ``requanto.settings.foreign`` is ``"never"``.

    Args:
        unread: names of stored tensors that no parameter of the model took.
        has: names of the model's parameters.
        model: its class, for the message.

    Raises:
        CheckpointError: see above.
    """
    if settings.foreign == "never":
        return
    has = set(has)
    lost = sorted(key for key in unread for end in _SCALES if key.endswith(end) and _weight_beside(key, end) in has)
    if lost:
        raise CheckpointError(
            f"the files hold scales of weights ({lost[0]} and {len(lost) - 1} more), so the weights are codes of another "
            f"library, but config.json does not say so and {model} would take the codes for weights. Use the config.json "
            f"that was saved with the files. (If the weights are floats after all, take the scales out of the files.)"
        )


def _weight_beside(key: str, end: str) -> str:
    return f"{key.removesuffix(end)}.weight"


def _weight_of(key: str) -> str | None:
    """The weight whose codes another library stores under ``key``; None if the key is that of no codes."""
    module, _, leaf = key.rpartition(".")
    if leaf in _CODES:
        return f"{module}.weight"
    return key.removesuffix("_blocks") if key.endswith("_blocks") else None
