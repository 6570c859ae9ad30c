"""Quantized weights that the library joins or splits while it loads them: experts that are stored one by one, mostly.

Models of today keep all experts of a layer in one parameter; many checkpoints hold a weight for each expert. The library's
own conversions (stack, concatenate, chunk ...) are run on the quantized weights: codes and scales are put together, nothing
is rounded. Where the weights are too unlike for that, their values are joined, and a line in the log says so.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.core_model_loading import dot_natural_key

from requanto.checkpoint.digests import DigestChecks
from requanto.checkpoint.foreign.translated import Lazy, OnePass, lazy_parts
from requanto.checkpoint.format import PARTS, CheckpointError, expected_parts, read_spec, rebuild, spec_text
from requanto.integrations.transformers_names import Renaming, original_rename, parts_of, stems_of
from requanto.tensor.qtensor import QTensor

logger = logging.getLogger(__name__)

#: parts whose values decide whether weights can be joined
_COMPARED = frozenset({"codebook", "column", "order"})


@dataclass
class Joined:
    """Weights of the model that are made from several stored ones, or stored ones that are split.

    Attributes:
        name: the first parameter that is made.
        converter: the library's conversion, which makes one or several parameters.
        stems: stored weights with the pattern of the converter that each matches, in the library's order.
        floats: those of them that are stored as floats; the parameters are then made of values, and are floats.
        lines: name of each parameter that is made -> its line in the table; None: it becomes float.
        made: the parameters, if they had to be made to find out what they become.
    """

    name: str
    converter: Any
    stems: list[tuple[str, str]] = field(default_factory=list)
    floats: set[str] = field(default_factory=set)
    lines: dict[str, str | None] = field(default_factory=dict)
    made: dict[str, torch.Tensor] = field(default_factory=dict)

    def run(self, weight_of: Callable[[str], torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
        """Runs the conversion on weights.

        Args:
            weight_of: the stored weight of that name.
        """
        converter = copy.deepcopy(self.converter)
        for stem, pattern in self.stems:
            converter.add_tensor(self.name, stem, pattern, lambda stem=stem: weight_of(stem))
        made = converter.convert(self.name, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def values(self, stored: StoredWeights, model: Any) -> dict[str, torch.Tensor]:
        """Runs the conversion on the weights of a checkpoint."""
        if not self.floats:
            return self.run(stored.weight, model)
        return self.run(
            lambda stem: stored.float(stem) if stem in self.floats else stored.weight(stem).dequantize(), model
        )


def find_joined(model: Any, keys: Any, renaming: Renaming) -> list[Joined]:
    """Finds the stored weights that the library converts, among the keys of a checkpoint."""
    if not renaming.converters:
        return []
    by_pattern = {pattern: one for one in renaming.converters for pattern in one.source_patterns}
    found: dict[str, Joined] = {}
    rename = original_rename()
    stems = stems_of(keys)
    for stem in stems:
        if renaming(stem) is not None:
            continue
        name, pattern = rename(stem, renaming.renamings, renaming.converters, renaming.prefix, renaming.names)
        if pattern is not None and name in renaming.names:
            found.setdefault(name, Joined(name, by_pattern[pattern])).stems.append((stem, pattern))
    if found:
        parts = parts_of(keys, stems)
        for key in keys:
            name, pattern = rename(key, renaming.renamings, renaming.converters, renaming.prefix, renaming.names)
            if key not in parts and pattern is not None and name in found:
                found[name].stems.append((key, pattern))
                found[name].floats.add(key)
    for one in found.values():
        one.stems.sort(key=lambda pair: dot_natural_key(pair[0]))
    return list(found.values())


def plan_lines(joined: list[Joined], stored: StoredWeights, model: Any) -> None:
    """Fills in `Joined.lines`, from the lines of the stored weights alone where they suffice."""
    for one in joined:
        if one.floats:
            kept = sorted(one.floats)
            logger.warning(
                "%s is made of %d stored weights, of which %d are floats (e.g. %s): all of it becomes float",
                *(one.name, len(one.stems), len(kept), kept[0]),
            )
            one.lines = dict.fromkeys(one.run(lambda stem: _blank_values(stem, stored), model))
            continue
        lines = {stem: stored.table[stem] for stem, _ in one.stems}
        if any(_COMPARED & expected_parts(text, stem).keys() for stem, text in lines.items()):
            made = one.made = one.run(stored.weight, model)
        else:
            made = one.run(lambda stem: _blank(stem, stored.table[stem]), model)
        one.lines = {name: spec_text(value) if isinstance(value, QTensor) else None for name, value in made.items()}
        if None in one.lines.values():
            kinds = sorted({f"{text.split()[0]} {' '.join(text.split()[2:])}".strip() for text in lines.values()})
            logger.warning(
                "%s is made of %d stored weights that cannot be joined without rounding (%s): it becomes float",
                one.name,
                len(one.stems),
                ", ".join(kinds[:3]) if len(kinds) > 1 else f"{kinds[0]}, each with its own",
            )


def _blank(stem: str, text: str) -> QTensor:
    """A weight without values, to see what becomes of it."""
    spec, _ = read_spec(text, stem)
    parts = {
        part: torch.empty(shape, dtype=dtypes[0], device="meta")
        for part, (shape, dtypes) in expected_parts(text, stem).items()
    }
    return QTensor._of(spec, parts)


def _blank_values(stem: str, stored: StoredWeights) -> torch.Tensor:
    if stem in stored.table:
        return torch.empty(read_spec(stored.table[stem], stem)[0].seen_shape, dtype=torch.float32, device="meta")
    value = stored.state[stem]
    shape = value.shape if isinstance(value, torch.Tensor) else value.get_shape()
    return torch.empty(shape, dtype=torch.float32, device="meta")


class StoredWeights:
    """The quantized weights of a state dict of our parts, one at a time.

    Args:
        state: the state dict; values are tensors or slices.
        table: name of each weight -> its line.
        digests: checks of the weights.
    """

    def __init__(self, state: Mapping[str, Any], table: Mapping[str, str], digests: DigestChecks) -> None:
        self.state, self.table, self.digests = state, table, digests

    def weight(self, stem: str) -> QTensor:
        """Reads and checks a weight.

        Raises:
            CheckpointError: its parts do not fit its line, or hold values that no quantization writes.
        """
        text = self.table[stem]
        parts = {part: self.state[f"{stem}_{part}"][...] for part in expected_parts(text, stem)}
        found = rebuild(stem, text, parts, torch.float32, check_codes=not self.digests.covers(stem))
        self.digests.add(stem, text, parts)
        return found

    def float(self, name: str) -> torch.Tensor:
        """Reads a weight that is stored as floats."""
        return self.state[name][...]


class JoinedState(Mapping[str, Any]):
    """A state dict of our parts, in which stored weights are replaced by the parameters that are made of them.

    Args:
        stored: the state dict and its table.
        joined: what `find_joined` found and `plan_lines` completed.
        model: the model that is loaded.
    """

    def __init__(self, stored: StoredWeights, joined: list[Joined], model: Any) -> None:
        taken = {f"{stem}_{part}" for one in joined for stem, _ in one.stems for part in PARTS}
        taken |= {key for one in joined for key in one.floats}
        self._values: dict[str, Any] = {key: value for key, value in stored.state.items() if key not in taken}
        parameters = dict(model.state_dict())
        for one in joined:
            together = OnePass(lambda one=one: one.made or one.values(stored, model))  # type: ignore[misc]
            for name, text in one.lines.items():
                if text is not None:
                    self._values |= lazy_parts(name, text, lambda n=name, t=together: _parts(n, t.take(n)))
                    continue
                expected = parameters[name]
                make = lambda n=name, t=together: _as_float(t.take(n))  # noqa: E731
                self._values[name] = Lazy(make, expected.shape, expected.dtype)

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Any:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, name: object) -> bool:
        return name in self._values


def _as_float(value: torch.Tensor) -> torch.Tensor:
    return value.dequantize() if isinstance(value, QTensor) else value


def _parts(name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    if not isinstance(value, QTensor):
        raise CheckpointError(
            f"{name} is made of stored weights with different column scales, orders or codebooks, which cannot be joined "
            f"without rounding. Load it with the library that saved it, or convert it to floats first"
        )
    return value.inner_tensors()
