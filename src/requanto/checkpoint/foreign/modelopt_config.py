"""The config of ModelOpt: the algorithm of each layer.

hf_quant_config.json has ``quantization: {quant_algo, group_size, exclude_modules, quantized_layers, kv_cache_quant_algo}``;
``quantization_config`` in config.json holds the same as ``quant_algo``, ``ignore``, ``kv_cache_scheme``. Excluded modules
are patterns with ``*``.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from requanto.checkpoint.foreign.pieces import names_in
from requanto.checkpoint.format import CheckpointError
from requanto.config.checks import shown

#: the algorithm of files of Black Forest Labs, whose tensors say which of two forms they have
BFL = "BFL"
ANY = "MIXED_PRECISION"
ALGORITHMS = (
    *("NVFP4", "W4A16_NVFP4", "W4A8_NVFP4_FP8", "NVFP4_AWQ", "NVFP4_SVD"),
    *("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "FP8_PB_REAL"),
    *("W4A8_MXFP4_FP8", "MXFP4", "MXFP8"),
    *("W8A8_SQ_PER_CHANNEL", "W8A16", "W4A16_AWQ"),
)
#: why an algorithm is not read
REFUSED = {
    "W4A8_AWQ": "its weights are int4 rounded to float8 a second time, which no single scale can hold",
}


@dataclass(frozen=True)
class Config:
    """A config of ModelOpt.

    Attributes:
        algorithm: of all layers, or `ANY`.
        group: number of weights that share a scale, where the algorithm has groups.
        layers: name -> algorithm and group, of mixed precision.
        excluded: patterns for modules that stay float.
        cache: True if the key-value cache was quantized.
    """

    algorithm: str
    group: int | None
    layers: Mapping[str, tuple[str, int | None]]
    excluded: tuple[str, ...]
    cache: bool

    def algorithm_of(self, module: str) -> str:
        """The algorithm of a module that has codes.

        Raises:
            CheckpointError: the config says that it has none.
        """
        pattern = next((one for one in self.excluded if fnmatch.fnmatchcase(module, one)), None)
        if pattern is not None:
            raise CheckpointError(
                f"the files hold a quantized weight of {module}, which the config excludes ({pattern!r}): config and files "
                f"do not belong together"
            )
        if self.algorithm != ANY:
            return self.algorithm
        if module not in self.layers:
            raise CheckpointError(
                f"the files hold a quantized weight of {module}, which quantized_layers of the config does not name (it "
                f"names {len(self.layers)}, e.g. {next(iter(self.layers), 'none')}): config and files do not belong together"
            )
        return self.layers[module][0]

    def group_of(self, module: str) -> int | None:
        """The group size of a module."""
        return self.layers[module][1] if module in self.layers else self.group


def read_config(config: Mapping[str, Any]) -> Config:
    """Reads the config.

    Raises:
        CheckpointError: an algorithm is unknown or not supported, or a value is of another kind.
    """
    stored = config.get("quantization")
    stored = {**config, **stored} if isinstance(stored, Mapping) else config
    algorithm = stored.get("quant_algo")
    producer = stored.get("producer")
    version = str(producer.get("version", "unknown")) if isinstance(producer, Mapping) else "unknown"
    layers = stored.get("quantized_layers") or {}
    if not isinstance(layers, Mapping) or not all(isinstance(value, Mapping) for value in layers.values()):
        raise CheckpointError(f"quantized_layers is {shown(layers)}, expected an object: layer -> quant_algo")
    if algorithm not in (ANY, BFL):
        algorithm = _known(algorithm, "quant_algo", version)
    elif algorithm == ANY and not layers:
        raise CheckpointError("quant_algo is 'MIXED_PRECISION', and the config names no quantized_layers")
    found = {
        str(name): (_known(layer.get("quant_algo"), f"quantized_layers[{name!r}].quant_algo", version), _group(layer))
        for name, layer in layers.items()
    }
    return Config(
        str(algorithm),
        _group(stored),
        found if algorithm == ANY else {},
        (*names_in(stored, "exclude_modules"), *names_in(stored, "ignore")),
        bool(stored.get("kv_cache_quant_algo") or stored.get("kv_cache_scheme")),
    )


def _known(algorithm: Any, where: str, version: str) -> str:
    name = str(algorithm).upper() if isinstance(algorithm, str) else ""
    if name in REFUSED:
        raise CheckpointError(
            f"{where} is {algorithm!r}: {REFUSED[name]}. Export the model with another algorithm, or quantize its float "
            f"weights"
        )
    if name not in ALGORITHMS:
        raise CheckpointError(
            f"{where} is {shown(algorithm)} (written by ModelOpt {version}), which this Requanto does not know; it reads "
            f"{', '.join(ALGORITHMS)}. Install a newer one: pip install -U requanto"
        )
    return name


def _group(config: Mapping[str, Any]) -> int | None:
    group = config.get("group_size")
    if group is not None and (type(group) is not int or group < 0):
        raise CheckpointError(f"group_size is {shown(group)}, expected the number of weights that share a scale")
    return group or None
