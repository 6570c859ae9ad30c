"""Checkpoints of SDNQ: ``quant_method`` is "sdnq" (read from the files and sources of SDNQ 0.2.8).

Tensors of a module ``m``: ``m.weight`` (codes), ``m.scale``, ``m.zero_point`` of unsigned types, ``m.svd_up`` and
``m.svd_down``; with ``scale_dtype`` the scales are codes too, and there are ``m.scale_2``, ``m.scale_zero_point``,
``m.zero_point_scale``, ``m.zero_point_2``.

    weight = zero_point + scale * code (+ svd_up @ svd_down) (times a block Hadamard matrix)

Which type the codes of a layer have is in the config alone: in ``weights_dtype``, for some layers in ``modules_dtype_dict``
or ``modules_quant_config``. `sdnq_shapes` has the layouts, `sdnq_codes` the types.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch

from requanto.checkpoint.foreign.found import ForeignCheckpoint, ForeignFloat, ForeignWeight
from requanto.checkpoint.foreign.integers import need_codes
from requanto.checkpoint.foreign.sdnq_codes import Kind, kind_of
from requanto.checkpoint.foreign.sdnq_layers import Layer
from requanto.checkpoint.foreign.sdnq_shapes import PARTS, short
from requanto.checkpoint.foreign.source import Source
from requanto.checkpoint.format import CheckpointError
from requanto.config.checks import shown

#: versions up to this one store alike; in a later one something may differ that shapes do not show
_NEWEST = (0, 2)
#: before, the codes of the smallest exponent of packed floats stood for other numbers
_FLOATS_SINCE = (0, 2, 2)


class Settings(NamedTuple):
    """What the config says of one layer.

    Attributes:
        kind: type of the codes.
        scale, zero: types of the codes of scales and zero points; None: they are floats.
        codebook: True if the scales are codebooks, into which the codes are indices.
        scale_codebook: the same of the codes of scales.
        matmul: True if the layer's GEMM is quantized, for which some tensors are stored transposed.
        hadamard: largest block of the Hadamard matrix; None: no rotation.
    """

    kind: Kind
    scale: Kind | None
    zero: Kind | None
    codebook: bool
    scale_codebook: bool
    matmul: bool
    hadamard: int | None


def scan(config: Mapping[str, Any], source: Source) -> ForeignCheckpoint:
    """Reads the headers of a checkpoint of SDNQ.

    Args:
        config: its ``quantization_config``.
        source: its tensors.

    Raises:
        CheckpointError: config and tensors disagree, or a newer version wrote them.
    """
    version = _version(config)
    found = ForeignCheckpoint(f"SDNQ, {config.get('weights_dtype')}")
    usual = functools.cache(lambda: _usual_dtype(source))
    for name in sorted(key for key in source if key == "weight" or key.endswith(".weight")):
        module = name.removesuffix("weight")
        parts = {part: f"{module}{part}" for part in PARTS if f"{module}{part}" in source}
        settings, dtype = settings_of(config, name), source.header(name).dtype
        if "scale" not in parts:
            if dtype.itemsize == 1 or not dtype.is_floating_point:
                source.need(f"{module}scale", name)
            continue
        if dtype not in settings.kind.stored:
            raise CheckpointError(
                f"{name} is {short(dtype)} and has a scale; quantization_config says that its codes are "
                f"{settings.kind.name}, stored as {short(settings.kind.stored[0])}. Restore the config that was saved with "
                f"these files"
            )
        _check_floats(settings.kind, name, version)
        layer = Layer(name, settings, {"weight": name, **parts}, source, usual)
        sources = (name, *parts.values())
        if layer.reason:
            build = functools.partial(Layer.values, layer)
            found.floats[name] = ForeignFloat(layer.shape, layer.float_dtype(), sources, build, layer.reason)
        else:
            found.weights[name] = ForeignWeight(layer.text(), sources, functools.partial(Layer.parts, layer))
    _check_no_rest(source)
    if not found.weights and not found.floats:
        raise CheckpointError(
            "quantization_config.quant_method is 'sdnq', but no weight has a scale beside it: the files are not those that "
            "were saved with this config"
        )
    return found


def _check_no_rest(source: Source) -> None:
    """Raises CheckpointError where a module has scales and no codes. (``scale`` alone may be a norm's vector.)"""
    need_codes(source, ("weight",), *(part for part in PARTS if part != "scale"))
    for name in source:
        module = name.removesuffix(".scale")
        if module != name and len(source.header(name).shape) > 1 and f"{module}.weight" not in source:
            source.need(f"{module}.weight", f"{module}.weight")


def _flag(config: Mapping[str, Any], key: str) -> bool:
    if not isinstance(found := config.get(key), (bool, type(None))):
        raise CheckpointError(f"quantization_config.{key} is {shown(found)}, expected true or false")
    return bool(found)


def settings_of(config: Mapping[str, Any], name: str) -> Settings:
    """What SDNQ's config says of a weight.

    Raises:
        CheckpointError: it names a type that SDNQ does not have.
    """
    own = dict(config)
    patterns = config.get("modules_quant_config") or {}
    if (pattern := _match(name, patterns)) is not None:
        own |= patterns[pattern]
    types = config.get("modules_dtype_dict") or {}
    weights = own.get("weights_dtype", "int8")
    key = next((key for key, names in types.items() if _match(name, names) is not None), None)
    if key is not None:
        weights = _least(weights, key.lower())
    kind = _kind(weights, "weights_dtype", name)
    scale = own.get("scale_dtype")
    zero = scale if own.get("zero_point_dtype") is None else own["zero_point_dtype"]
    floats = (None, "none")
    apart = config.get("modules_to_not_use_matmul") or ()
    return Settings(
        kind=kind,
        scale=None if scale in floats else _kind(scale, "scale_dtype", name),
        zero=None if zero in floats or not kind.unsigned else _kind(zero, "zero_point_dtype", name),
        codebook=_flag(own, "use_codebook"),
        scale_codebook=_flag(own, "use_codebook_scale"),
        matmul=_flag(own, "use_quantized_matmul") and _match(name, apart) is None,
        hadamard=int(own.get("hadamard_group_size", 256)) if _flag(own, "use_hadamard") else None,
    )


def _match(name: str, patterns: Iterable[str]) -> str | None:
    """The first pattern that SDNQ finds in a name.

    ".x" is the beginning of names, "x" a name or one of its words, and "*" in it stands for any text.
    """
    words = name.split(".")
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        if pattern.startswith("."):
            if name.startswith(pattern[1:]):
                return pattern
        elif name == pattern or pattern in words or ("*" in pattern and _wild(pattern).match(name)):
            return pattern
    return None


@functools.lru_cache(maxsize=1024)
def _wild(pattern: str) -> re.Pattern[str]:
    # Only "*" is special: what a config says never becomes an expression.
    return re.compile(".*".join(re.escape(piece) for piece in pattern.split("*")))


def _least(weights: str, key: str) -> str:
    """The type that a key of ``modules_dtype_dict`` stands for: a type, or "minimum_6bit" and the like."""
    found = re.fullmatch(r"(?:minimum[-_]?)?(u?int)?[-_]?(\d+)[-_]?(?:bits?)?", key)
    if found is None or not (key.startswith("minimum") or key.endswith(("bit", "bits"))):
        return key
    kind, bits = kind_of(weights), int(found[2])
    if kind is not None and kind.bits >= bits:
        return weights
    return f"{'uint' if found[1] == 'uint' or bits <= 4 else 'int'}{bits}"


def _kind(name: Any, key: str, weight: str) -> Kind:
    kind = kind_of(name)
    if kind is None:
        raise CheckpointError(
            f"quantization_config.{key} is {shown(name)} for {weight}, which is no type of SDNQ up to 0.2: a newer version "
            f"wrote it, or it was edited"
        )
    return kind


def _usual_dtype(source: Source) -> torch.dtype:
    """The float dtype that most tensors have which are no parts of quantized weights."""
    headers = (source.header(key) for key in source if key.rpartition(".")[2] not in PARTS)
    counts = Counter(found.dtype for found in headers if found.dtype.is_floating_point and found.dtype.itemsize > 1)
    return counts.most_common(1)[0][0] if counts else torch.float32


def _version(config: Mapping[str, Any]) -> tuple[int, ...]:
    """The version of SDNQ that wrote the files; the newest known one if the config does not say.

    Raises:
        CheckpointError: it is newer than what this reader knows.
    """
    text = config.get("sdnq_version")
    if text is None:
        return (*_NEWEST, 99)
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", str(text))
    if found is None:
        raise CheckpointError(f"quantization_config.sdnq_version is {shown(text)}, expected a version such as '0.2.8'")
    version = tuple(int(number or 0) for number in found.groups())
    if version[:2] > _NEWEST:
        raise CheckpointError(
            f"SDNQ {text} wrote these files; this Requanto reads those of versions up to {'.'.join(map(str, _NEWEST))}. "
            f"Install a newer one (pip install -U requanto), or read them with sdnq"
        )
    return version


def _check_floats(kind: Kind, name: str, version: tuple[int, ...]) -> None:
    if kind.exponent is not None and version < _FLOATS_SINCE:
        raise CheckpointError(
            f"{name} holds {kind.name} codes of SDNQ {'.'.join(map(str, version))}. Before "
            f"{'.'.join(map(str, _FLOATS_SINCE))} its packed floats stood for other numbers, and nothing reads them now: "
            f"quantize the model again"
        )
