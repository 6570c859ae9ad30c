"""What readers of several formats share: tensors by module, lines of our format, scales in our shapes."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

import torch

from requanto.checkpoint.foreign.found import ForeignActivation
from requanto.checkpoint.foreign.source import Header, Source
from requanto.checkpoint.format import CheckpointError, read_spec
from requanto.config.checks import LONGEST, shown

#: Scales of a quantized key-value cache, which belong to an attention module, in the spellings of all formats.
#: (``k_bias`` is ModelOpt's in ``k_proj`` alone: attention of DeBERTa and VideoMAE has float parameters q_bias and v_bias.)
CACHE_SCALES = re.compile(
    r"(?:^|\.)(?:[qkv]_(?:cache_)?(?:scale|zero_point|global_scale)|(?:q_proj\.q|k_proj\.k|v_proj\.v)_bias)$"
)
#: What the description of a checkpoint says of them.
CACHE_NOTE = "scales of a quantized key-value cache are left out"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def modules_of(source: Source) -> dict[str, set[str]]:
    """Name of each module -> the last parts of its tensors' names (``"weight"``, ``"bias"`` ...)."""
    found: dict[str, set[str]] = {}
    for name in source:
        module, _, part = name.rpartition(".")
        found.setdefault(module, set()).add(part)
    return found


def joined(module: str, part: str) -> str:
    """The name of a module's tensor."""
    return f"{module}.{part}" if module else part


def line(name: str, kind: str, shape: Sequence[int], *words: str, group: int | None = None) -> str:
    """A weight's line in our table.

    Args:
        name: the weight, for messages.
        kind: name of the type, such as ``"qint4"``.
        shape: the shape that the weight shows.
        words: the words after the group size, in the order of docs/format.md; empty ones are left out.
        group: group size; None: one scale for each row.

    Raises:
        CheckpointError: the words do not fit together.
    """
    size = f"group={group}" if group is not None else ""
    text = " ".join(word for word in (kind, "x".join(map(str, shape)), size, *words) if word)
    read_spec(text, name)
    return text


def float_scale(scale: torch.Tensor) -> torch.Tensor:
    """Scales in a dtype that our format has; float8 is exact in bfloat16, and e8m0 (float8_e8m0fnu) in float32."""
    if scale.dtype in FLOATS:
        return scale
    return scale.to(torch.bfloat16 if scale.dtype in (torch.float8_e4m3fn, torch.float8_e5m2) else torch.float32)


def power_of_two(codes: torch.Tensor) -> torch.Tensor:
    """float32 scales from e8m0 bytes (uint8 or float8_e8m0fnu): 2^(byte - 127), NaN for 255."""
    return codes.view(torch.float8_e8m0fnu).to(torch.float32)


def per_row(values: torch.Tensor, lead: Sequence[int]) -> torch.Tensor:
    """One value for each row.

    Args:
        values: one number; one for each matrix ``[E]``, ``[E, 1, 1]``; or one for each row ``[*lead]``, ``[*lead, 1]``.
        lead: the rows ``[N]``, or the rows of each expert ``[E, N]``.

    Returns:
        ``[*lead, 1]``, contiguous.
    """
    if values.numel() == torch.Size(lead).numel():
        return values.reshape(*lead, 1).contiguous()
    shape = (-1, *[1] * len(lead)) if values.numel() > 1 else [1] * (len(lead) + 1)
    return values.reshape(shape).expand(*lead, 1).contiguous()


def compiled(expression: str, shown_as: str) -> re.Pattern[str]:
    """A regular expression of a config.

    Raises:
        CheckpointError: it is none, or longer than any name.
    """
    if len(expression) > LONGEST:
        raise CheckpointError(
            f"quantization_config holds a pattern of {len(expression)} characters, {shown(shown_as)}; at most "
            f"{LONGEST} are read"
        )
    try:
        return re.compile(expression)
    except re.error as error:
        raise CheckpointError(
            f"quantization_config holds {shown(shown_as)}, which is no regular expression ({error})"
        ) from error


def names_in(config: Any, key: str) -> tuple[str, ...]:
    """A list of names or patterns in a config; () if the key is missing or None.

    Raises:
        CheckpointError: it is something else.
    """
    value = config.get(key)
    if value is None:
        return ()
    if not isinstance(value, (list, tuple)) or not all(isinstance(one, str) for one in value):
        raise CheckpointError(f"quantization_config.{key} is {shown(value)}, expected a list of names")
    return tuple(value)


def static_scale(source: Source, name: str, whose: str, kind: str, also: Sequence[str] = ()) -> ForeignActivation:
    """A module whose inputs are quantized with one stored number.

    Args:
        name: the number, a float.
        whose: the module's weight, for messages.
        kind: name of our type.
        also: further tensors that belong to it.

    Raises:
        CheckpointError: it is missing, or no single float.
    """
    found = source.need(name, whose)
    if found.shape.numel() != 1 or not found.dtype.is_floating_point:
        raise unfit(name, found, "one float for the tensor")
    return ForeignActivation(kind, (name, *also), functools.partial(one_number, name=name))


def one_number(source: Source, name: str) -> torch.Tensor:
    """A stored number as a float32 scalar."""
    return source[name].reshape(()).to(torch.float32)


def unfit(name: str, found: Header, expected: str) -> CheckpointError:
    """The error for a tensor of an unexpected shape or dtype."""
    return CheckpointError(
        f"{name} is {str(found.dtype).removeprefix('torch.')} {tuple(found.shape)}, expected {expected}: it is damaged, or "
        f"does not belong to this config"
    )


def require(condition: bool, message: str) -> None:
    """Raises CheckpointError with the message unless the condition holds."""
    if not condition:
        raise CheckpointError(message)
