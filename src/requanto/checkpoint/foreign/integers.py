"""Integer weights in groups, as GPTQ, AWQ and AutoRound store them: ``w = scale * (code - zero)``.

What a config says of a layer (bits, group size, symmetric or not) is a `Scheme`. Configs name exceptions by regular
expressions; these are not evaluated, because the shapes of the tensors tell which scheme a layer has. The config must allow
what the tensors say: one of its schemes has to fit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from requanto.checkpoint.foreign.found import Parts
from requanto.checkpoint.foreign.packing import common_group, group_indices, packed_rows, signed_bytes
from requanto.checkpoint.foreign.source import Source
from requanto.checkpoint.format import CheckpointError
from requanto.config.checks import shown

#: dtypes of scales that are taken over as they are
SCALES = (torch.float16, torch.bfloat16, torch.float32)
#: bits of codes that GPTQ and its relatives write
BITS = tuple(range(2, 9))


@dataclass(frozen=True)
class Scheme:
    """What a config says of a layer.

    Attributes:
        bits: bits of a code.
        group: weights that share a scale; -1: those of a row.
        symmetric: True if all zero points are 2^(bits - 1); None: the zero points themselves tell.
    """

    bits: int
    group: int
    symmetric: bool | None

    def groups(self, length: int) -> int:
        """Number of scales of a row of ``length`` weights."""
        return 1 if self.group == -1 else -(-length // self.group)


def read_scheme(
    config: Mapping[str, Any],
    default: Scheme | None,
    where: str,
    symmetric: Any = None,
    bits: Iterable[int] = (2, 3, 4, 8),
) -> Scheme:
    """The scheme in a config, or in what it says of some layers.

    Args:
        config: has ``bits`` and ``group_size``.
        default: where a key is missing.
        where: the config's name, for messages.
        symmetric: what the config says of zero points.
        bits: what the format can hold.

    Raises:
        CheckpointError: a key is missing, or its value is no such number.
    """
    found_bits = config.get("bits", None if default is None else default.bits)
    group = config.get("group_size", None if default is None else default.group)
    bits = tuple(bits)
    if type(found_bits) is not int or found_bits not in bits:
        raise CheckpointError(f"{where}: bits is {shown(found_bits)}, expected one of {', '.join(map(str, bits))}")
    if type(group) is not int or not (group == -1 or 1 <= group < 2**31):
        raise CheckpointError(
            f"{where}: group_size is {shown(group)}, expected a positive integer, or -1 for whole rows"
        )
    if symmetric is not None and type(symmetric) is not bool:
        raise CheckpointError(f"{where}: the word for symmetric weights is {shown(symmetric)}, expected true or false")
    if symmetric is None and default is not None:
        symmetric = default.symmetric
    return Scheme(found_bits, group, symmetric)


def modules(source: Source) -> list[str]:
    """Names of the modules with packed codes.

    Raises:
        CheckpointError: there are none, or one has zero points only.
    """
    found = sorted(name.removesuffix(".qweight") for name in source if name.endswith(".qweight"))
    if not found:
        raise CheckpointError(
            "the config says that weights are quantized by GPTQ or AWQ, and no file holds a qweight: it is another "
            "checkpoint's config, or the weights are a pickle (.bin, .pt), which Requanto does not open; save them as "
            "safetensors with the library that wrote them"
        )
    need_codes(source, ("qweight",), "qzeros", "g_idx")
    return found


def need_codes(source: Source, codes: tuple[str, ...], *others: str) -> None:
    """Checks that no module has scales or zero points and no codes: its weight would be missing.

    Args:
        codes: last parts of names, one of which a module has.
        others: last parts of the names of what belongs to them.

    Raises:
        CheckpointError: a module has no codes.
    """
    for name in source:
        module, _, part = name.rpartition(".")
        if part in others and not any(f"{module}.{one}" in source for one in codes):
            source.need(f"{module}.{codes[0]}", f"{module}.weight")


def read_schemes(
    config: Mapping[str, Any], exceptions: Any, key: str, symmetric: Any = None, bits: Iterable[int] = BITS
) -> list[Scheme]:
    """The schemes of a config: that of most layers, then those of exceptions.

    Args:
        exceptions: name or pattern -> keys that differ for such layers; None: there are none.
        key: where the config has them.
        symmetric: overrides ``config["sym"]``.
        bits: what the format can hold.

    Raises:
        CheckpointError: a value is none that the format knows.
    """
    symmetric = config.get("sym") if symmetric is None else symmetric
    default = read_scheme(config, None, "quantization_config", symmetric, bits)
    schemes = [default]
    if exceptions is not None and not isinstance(exceptions, Mapping):
        raise CheckpointError(
            f"quantization_config.{key} is {shown(exceptions)}, expected an object: layers -> settings"
        )
    for pattern, changes in (exceptions or {}).items():
        where = f"quantization_config.{key}[{shown(pattern)}]"
        if changes is not None and not isinstance(changes, Mapping):
            raise CheckpointError(f"{where} is {shown(changes)}, expected an object")
        if not changes or str(pattern).startswith("-:") or _is_float(changes):  # layers that stay float
            continue
        schemes.append(read_scheme(changes, default, where, changes.get("sym"), bits))
    return schemes


def _is_float(changes: Mapping[str, Any]) -> bool:
    bits = changes.get("bits")
    return type(bits) is int and bits >= 16


def fitting_scheme(schemes: Iterable[Scheme], bits: int, length: int, groups: int, name: str) -> Scheme:
    """The one of a config's schemes that a layer's tensors have.

    Args:
        bits, length, groups: of the tensors: bits of a code, and the number of codes and scales of a row.

    Raises:
        CheckpointError: none fits.
    """
    schemes = list(schemes)
    fitting = [one for one in schemes if one.bits == bits and one.groups(length) == groups]
    if not fitting:
        allowed = " or ".join(sorted({f"{one.bits} bits in groups of {one.group}" for one in schemes}))
        raise CheckpointError(
            f"{name}: its tensors hold codes of {bits} bits, {length} in a row with {groups} scales, and the config says "
            f"{allowed}: config and files do not belong together"
        )
    symmetric = {one.symmetric for one in fitting}
    return Scheme(bits, fitting[0].group, symmetric.pop() if len(symmetric) == 1 else None)


class Stored(NamedTuple):
    """An integer weight as it was read.

    Attributes:
        rows: codes 0 .. 2^bits - 1, packed as ours: uint8 ``[N, bytes]``.
        scale: ``[N, groups]``.
        zeros: int16 ``[N, groups]``, 0 .. 2^bits; None: 2^(bits - 1) everywhere.
    """

    rows: torch.Tensor
    scale: torch.Tensor
    zeros: torch.Tensor | None


@dataclass(frozen=True)
class Form:
    """How a weight is stored here.

    Attributes:
        bits: bits of a code.
        shape: N, K.
        group: size of the format's groups.
        zeros: ``"symmetric"``; ``"whole"``: zero points of ``bits`` bits; ``"float"``: shifts, where a zero point is 2^bits.
        signed: True if scales may be negative.
        order: True if columns are permuted.
    """

    bits: int
    shape: tuple[int, int]
    group: int
    zeros: str
    signed: bool = False
    order: bool = False
    columns: bool = False

    @property
    def text(self) -> str:
        """The line of our table."""
        kind = "quint" if self.bits == 8 and self.zeros != "symmetric" else "qint"
        words = [f"{kind}{self.bits}", "x".join(map(str, self.shape))]
        group = common_group(self.shape[1], self.group)
        words += [f"group={group}"] if group is not None else []
        words += ["affine"] if self.zeros != "symmetric" else []
        words += ["columns"] if self.columns else []
        words += ["zeros"] if self.zeros == "whole" else []
        words += ["signed"] if self.signed else []
        words += ["order"] if self.order else []
        return " ".join(words)

    def parts(self, stored: Stored, name: str) -> Parts:
        """The parts of our format.

        Raises:
            CheckpointError: the weight should be symmetric, and its zero points are not in the middle.
        """
        rows, scale, zeros = stored
        middle = 2 ** (self.bits - 1)
        index = group_indices(self.shape[1], self.group, scale.device)
        if index is not None:
            scale = scale[:, index]
            zeros = None if zeros is None else zeros[:, index]
        if self.zeros == "symmetric":
            if zeros is not None and bool((zeros != middle).any()):
                wrong = zeros[zeros != middle]
                raise CheckpointError(
                    f"{name}: the config says that it is symmetric, so every zero point is {middle}; found "
                    f"{int(wrong[0])} and {wrong.numel() - 1} others of {zeros.numel()}. The config's sym (or zero_point) "
                    f"is wrong, or the zero points are damaged: with the wrong one all weights are shifted"
                )
            return {"qdata": signed_bytes(rows) if self.bits == 8 else rows, "scale": scale.contiguous()}
        assert zeros is not None
        if self.zeros == "whole":
            shift = packed_rows(zeros.to(torch.uint8), self.bits)
        else:
            shift = scale.float() * zeros
        return {"qdata": rows, "scale": scale.contiguous(), "shift": shift}


def form_of_zeros(zeros: torch.Tensor, bits: int) -> str:
    """`Form.zeros` for zero points that are not said to be symmetric."""
    smallest, largest = (int(value) for value in zeros.aminmax())
    if smallest == largest == 2 ** (bits - 1):
        return "symmetric"
    return "whole" if largest < 2**bits else "float"


def has_negative(scale: torch.Tensor) -> bool:
    """True if scales are negative, which AutoRound writes where the smallest weight of a group is the largest in size."""
    return bool((scale < 0).any())
