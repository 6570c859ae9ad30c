"""The config of compressed-tensors: which modules are quantized, and how.

    config_groups    name -> targets, weights, input_activations, output_activations, format
    targets, ignore  names of modules, ``re:`` and a regular expression from the start of the name, or names of classes
    format           how weights are stored; ``mixed-precision``: each group has its own

Read in compressed-tensors 0.20 (quantization/quant_args.py, quant_scheme.py, quant_config.py, utils/match.py).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from requanto.checkpoint.foreign.pieces import compiled, names_in
from requanto.checkpoint.format import CheckpointError
from requanto.config.checks import shown

FORMATS = (
    *("pack-quantized", "int-quantized", "float-quantized", "naive-quantized"),
    *("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp6-pack-quantized", "mxfp8-quantized"),
)
#: values of ``format`` that leave the format of a weight to its description
UNSAID = ("mixed-precision", "dense", "fakequant")
SPARSE = ("marlin-24", "sparse-24-bitmask", "sparse-bitmask", "sparse-24")
STRATEGIES = ("tensor", "channel", "group", "block", "token", "tensor_group", "attn_head")
_ARGS = {
    *("num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic", "actorder"),
    *("scale_dtype", "zp_dtype", "observer", "observer_kwargs"),
}
_GROUP = {"targets", "weights", "input_activations", "output_activations", "format"}


@dataclass(frozen=True)
class Args:
    """How weights or activations are quantized.

    Attributes:
        bits: of a code.
        kind: ``"int"`` or ``"float"``.
        symmetric: True if there is no zero point.
        strategy: which numbers share a scale, see `STRATEGIES`.
        group: of the strategies ``group`` and ``tensor_group``: how many.
        block: of the strategy ``block``: rows and columns.
        dynamic: of activations: scales are computed on the fly.
    """

    bits: int
    kind: str
    symmetric: bool
    strategy: str
    group: int | None
    block: tuple[int, int] | None
    dynamic: bool


@dataclass(frozen=True)
class Group:
    """Modules that are quantized alike."""

    name: str
    targets: tuple[str, ...]
    format: str | None
    weights: Args | None
    inputs: Args | None
    outputs: Args | None


@dataclass(frozen=True)
class Config:
    """A ``quantization_config`` of compressed-tensors.

    Attributes:
        version: of the library that wrote it, for messages.
        cache: True if the key-value cache was quantized.
    """

    groups: tuple[Group, ...]
    ignore: tuple[str, ...]
    format: str | None
    status: str
    version: str
    cache: bool

    @functools.cached_property
    def _targets(self) -> dict[str, Group]:
        return {target: group for group in self.groups for target in group.targets}

    @functools.cached_property
    def _patterns(self) -> list[tuple[re.Pattern[str], Group]]:
        return [(_pattern(target), self._targets[target]) for target in sorted(self._targets) if is_pattern(target)]

    @functools.cached_property
    def _classes(self) -> dict[str, Group]:
        return {target: group for target, group in self._targets.items() if is_class(target)}

    @functools.cached_property
    def _ignore(self) -> tuple[set[str], list[re.Pattern[str]]]:
        return set(self.ignore), [_pattern(name) for name in self.ignore if is_pattern(name)]

    def ignored(self, module: str) -> bool:
        """Whether the config says that a module stays float."""
        names, patterns = self._ignore
        return module in names or any(pattern.match(module) for pattern in patterns)

    def group_of(self, module: str) -> tuple[Group, bool] | None:
        """The group of a module, and whether it was found by the name of a class; None if no group covers it.

        Names go before patterns, patterns before classes. Files do not say of which class a module is: if groups name
        several, modules whose last name contains ``embed`` are embeddings and the others linear layers.
        """
        if module in self._targets:
            return self._targets[module], False
        for pattern, group in self._patterns:
            if pattern.match(module):
                return group, False
        classes = self._classes
        if any(group != next(iter(classes.values())) for group in classes.values()):
            wanted = "Embedding" if "embed" in module.rpartition(".")[2].lower() else "Linear"
            classes = {target: group for target, group in classes.items() if target == wanted}
        return (next(iter(classes.values())), True) if classes else None


def is_pattern(target: str) -> bool:
    """Whether a target or an entry of ``ignore`` is a regular expression, for the start of a name."""
    return target.startswith("re:")


def _pattern(target: str) -> re.Pattern[str]:
    return compiled(target.removeprefix("re:"), target)


def is_class(target: str) -> bool:
    """Whether a target is the name of a class, such as ``"Linear"``."""
    return target.isidentifier() and target[0].isupper()


def read_config(config: Mapping[str, Any]) -> Config:
    """Reads the config.

    Raises:
        CheckpointError: it has another form, or something that is not known or not supported.
    """
    for key in ("quantization_config", "compression_config"):  # as older versions nested it
        if isinstance(config.get(key), Mapping):
            config = {**config, **config[key]}
    version = str(config.get("version", "unknown"))
    sparsity = config.get("sparsity_config")
    for value in (config.get("format"), sparsity.get("format") if isinstance(sparsity, Mapping) else None):
        if value in SPARSE:
            raise CheckpointError(
                f"the weights are stored as {value!r}, without the values that were pruned; Requanto has no sparse weights. "
                f"Save it dense with a version of compressed-tensors before 0.15 (run_compressed=False), and quantize that"
            )
    transforms = config.get("transform_config")
    if isinstance(transforms, Mapping) and transforms.get("config_groups"):
        raise CheckpointError(
            "quantization_config.transform_config is not empty: its layers rotate activations while they run, and Requanto "
            "does not. Load it with compressed-tensors, or apply the transforms to the weights and save again"
        )
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not (groups or config.get("kv_cache_scheme")):
        raise CheckpointError(
            f"quantization_config.config_groups is {shown(groups)}, expected an object: group -> targets and weights. "
            f"Without it the stored codes cannot be read"
        )
    return Config(
        tuple(_group(str(name), group, version) for name, group in groups.items()),
        names_in(config, "ignore"),
        _format(config.get("format"), "quantization_config.format", version),
        str(config.get("quantization_status", "compressed")),
        version,
        bool(config.get("kv_cache_scheme")),
    )


def _format(value: Any, where: str, version: str) -> str | None:
    if value is None or value in UNSAID:
        return None
    if value not in FORMATS:
        raise CheckpointError(
            f"{where} is {shown(value)} (written by compressed-tensors {version}), which this Requanto does not know; it "
            f"reads {', '.join(FORMATS)}. Install a newer one: pip install -U requanto"
        )
    return str(value)


def _group(name: str, group: Any, version: str) -> Group:
    where = f"quantization_config.config_groups[{name!r}]"
    if not isinstance(group, Mapping):
        raise CheckpointError(
            f"{where} is {shown(group)}, expected an object with targets and weights. (The name of a scheme with its "
            f"targets is for quantizing; files hold the scheme itself)"
        )
    unknown = sorted(set(group) - _GROUP)
    if unknown:
        raise CheckpointError(
            f"{where} has the key {unknown[0]!r} (written by compressed-tensors {version}), which this Requanto does not "
            f"know. Install a newer one: pip install -U requanto"
        )
    args = {key: _args(group.get(key), f"{where}.{key}", version) for key in sorted(_GROUP - {"targets", "format"})}
    return Group(
        name,
        names_in(group, "targets"),
        _format(group.get("format"), f"{where}.format", version),
        args["weights"],
        args["input_activations"],
        args["output_activations"],
    )


def _args(args: Any, where: str, version: str) -> Args | None:
    if args is None:
        return None
    if not isinstance(args, Mapping):
        raise CheckpointError(f"{where} is {shown(args)}, expected an object with num_bits, type and strategy")
    unknown = sorted(set(args) - _ARGS)
    if unknown:
        raise CheckpointError(
            f"{where} has the key {unknown[0]!r} (written by compressed-tensors {version}), which this Requanto does not "
            f"know. Install a newer one: pip install -U requanto"
        )
    group, block = args.get("group_size"), args.get("block_structure")
    strategy = args.get("strategy")
    if strategy is None:
        strategy = "tensor" if group is None else "channel" if group == -1 else "group"
    if isinstance(block, str):
        block = [int(size) if size.isdecimal() else None for size in block.split("x")]
    kind, bits = str(args.get("type", "int")).lower(), args.get("num_bits", 8)
    problems = {
        "num_bits": bits if type(bits) is not int or not 1 <= bits <= 16 else None,
        "type": kind if kind not in ("int", "float") else None,
        "strategy": strategy if str(strategy).lower() not in STRATEGIES else None,
        "group_size": group if group is not None and (type(group) is not int or group < -1) else None,
        "block_structure": block if block is not None and not _is_block(block) else None,
    }
    for key, value in problems.items():
        if value is not None:
            raise CheckpointError(f"{where}.{key} is {shown(value)}, which this Requanto does not know")
    strategy = str(strategy).lower()
    grouped = strategy in ("group", "tensor_group")
    if grouped and (group is None or group < 1):
        raise CheckpointError(f"{where} has the strategy {strategy!r} and group_size={group!r}, expected a size")
    if strategy == "block" and block is None:
        raise CheckpointError(f"{where} has the strategy 'block' and no block_structure")
    return Args(
        bits,
        kind,
        bool(args.get("symmetric", True)),
        strategy,
        group if grouped else None,
        (block[0], block[1]) if strategy == "block" else None,
        args.get("dynamic") in (True, "local"),
    )


def _is_block(block: Any) -> bool:
    return isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)
