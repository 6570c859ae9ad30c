"""The formats of other libraries, and which reader reads each.

A reader is a module of this folder with

    scan(config, source) -> ForeignCheckpoint

``config`` is the checkpoint's ``quantization_config``. ``scan`` looks at names, shapes and dtypes, and reads small tensors
only where the description of a weight depends on them. It raises CheckpointError where config and tensors disagree; no
format is guessed from the values of tensors.

A format that writes no ``quantization_config`` also has ``recognize(description, source)``, which returns such a config from
the content of config.json and the names of the tensors, or None.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from requanto.checkpoint.foreign.found import ForeignCheckpoint
from requanto.checkpoint.foreign.source import Source
from requanto.checkpoint.format import CheckpointError
from requanto.config.checks import shown

#: quant_method -> module of the reader
READERS: dict[str, str] = {
    "gptq": "gptq",
    "awq": "awq",
    "auto-round": "auto_round",
    "intel/auto-round": "auto_round",
    "compressed-tensors": "compressed_tensors",
    "fp8": "fp8",
    "mxfp8": "fp8",
    "fbgemm_fp8": "fp8",
    "modelopt": "modelopt",
    "mxfp4": "gpt_oss",
    "gemma": "gemma",
    "bitsandbytes": "bitsandbytes",
    "hqq": "hqq",
    "torchao": "torchao",
    "sdnq": "sdnq",
    "mlx": "mlx",
    "nunchaku": "nunchaku",
    "nunchaku_lite": "nunchaku",
    "comfyui": "comfyui",
}
#: modules with ``recognize``, in the order in which they are asked
RECOGNIZERS: tuple[str, ...] = (
    "gptq",
    "compressed_tensors",
    "modelopt",
    "mlx",
    "hqq",
    "torchao",
    "nunchaku",
    "comfyui",
)
#: quant_method of formats whose codes stand for vectors or paths, and what reads them
OUT_OF_REACH: dict[str, str] = {
    "aqlm": "the package aqlm, with a GPU",
    "vptq": "the package vptq, with a GPU",
    "quip": "quip-sharp, with a GPU",
    "exl2": "exllamav2, with a GPU",
    "exl3": "exllamav3, with a GPU",
    "qtip": "the code of QTIP, with a GPU",
    "spqr": "the package spqr_quant, with a GPU",
    "higgs": "the package flute-kernel, with a GPU",
}


#: What a reader raises where a damaged config or tensor is not what it took for granted.
UNFORESEEN = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError)


def scan(config: Mapping[str, Any], source: Source) -> ForeignCheckpoint:
    """Reads a foreign checkpoint's headers.

    Args:
        config: its ``quantization_config``, or what `recognize` returned.
        source: its tensors.

    Raises:
        CheckpointError: the format is unknown or out of reach, or config and tensors disagree.
    """
    method = config.get("quant_method")
    if method in OUT_OF_REACH:
        raise CheckpointError(
            f"quantization_config.quant_method is {method!r}. Its codes stand for vectors, not for single weights, so they "
            f"have no place in Requanto's format. What reads it: {OUT_OF_REACH[method]}. To use it here, save it as a float "
            f"model with that, and quantize that"
        )
    if method not in READERS:
        raise CheckpointError(
            f"quantization_config.quant_method is {shown(method)}, which Requanto does not know; it reads "
            f"{', '.join(sorted(READERS))}"
        )
    reader = importlib.import_module(f"{__package__}.{READERS[method]}")
    try:
        return reader.scan(config, source)
    except CheckpointError:
        raise
    except UNFORESEEN as error:
        raise CheckpointError(
            f"a checkpoint of {method!r} cannot be read ({type(error).__name__}: {error}): a value of quantization_config "
            f"or a tensor is of a kind or shape that the format does not have. It is damaged, or a newer version wrote it"
        ) from error


def recognize(description: Mapping[str, Any], source: Source) -> dict[str, Any] | None:
    """A ``quantization_config`` for a checkpoint without one; None if no reader knows its tensors.

    Args:
        description: content of config.json; {} if there is none.
        source: its tensors.
    """
    for name in RECOGNIZERS:
        found = importlib.import_module(f"{__package__}.{name}").recognize(description, source)
        if found is not None:
            return found
    return None
