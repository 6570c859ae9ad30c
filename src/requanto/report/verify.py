"""Reads every quantized weight of a directory and compares it with its digest, file by file and layer by layer."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from requanto.checkpoint.digests import SCALES, digest
from requanto.checkpoint.files import stored_keys
from requanto.checkpoint.format import PARTS, CheckpointError, rebuild
from requanto.checkpoint.opening import checked_config, read_json, stored_config, weight_map

#: what is said of a weight
HOLDS, UNKNOWN, DAMAGED, MISSING = "holds", "no digest", "damaged", "missing"


@dataclass(frozen=True)
class Verified:
    """One stored weight, or a module with static activation scales.

    Attributes:
        name: its name in config.json; in the files if config.json does not describe it.
        files: names of the files that hold its tensors.
        state: ``"holds"``, ``"no digest"`` (then its values were checked all the same), ``"damaged"`` or ``"missing"``.
        reason: what is wrong with it; "" otherwise.
    """

    name: str
    files: tuple[str, ...]
    state: str
    reason: str = ""


@dataclass(frozen=True)
class Verification:
    """All weights of a directory."""

    weights: list[Verified]

    @property
    def intact(self) -> bool:
        """Whether nothing is damaged or missing."""
        return all(weight.state in (HOLDS, UNKNOWN) for weight in self.weights)

    def by_file(self) -> dict[str, Counter[str]]:
        """File name -> number of weights in each state."""
        found: dict[str, Counter[str]] = {}
        for weight in self.weights:
            for file in weight.files or ("(in no file)",):
                found.setdefault(file, Counter())[weight.state] += 1
        return dict(sorted(found.items()))

    def to_json(self) -> str:
        """Returns the result as JSON text."""
        return json.dumps({"intact": self.intact, "weights": [asdict(weight) for weight in self.weights]}, indent=2)


def verify_directory(directory: str | Path) -> Verification:
    """Reads the quantized weights of a saved directory one at a time, and compares them with config.json.

    Raises:
        FileNotFoundError: no directory, or no safetensors file in it.
        CheckpointError, ValueError, TypeError: config.json or the index is damaged, or no weight is quantized by Requanto.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} is not a directory; expected one that save_pretrained wrote")
    stored = stored_config(read_json(directory / "config.json", must_exist=True), directory)
    config = checked_config(stored) if stored.get("tensors") else None
    if config is None:
        raise CheckpointError(
            f"{directory}: config.json describes no weight that Requanto quantized; there is nothing to verify"
        )
    places = _places(directory)
    weights: dict[str, dict[str, str]] = {}
    for key, file in places.items():
        part = next(
            (part for part in PARTS if key.endswith(f"_{part}") and f"{key.removesuffix(part)}qdata" in places), None
        )
        if part is not None:
            weights.setdefault(key.removesuffix(f"_{part}"), {})[part] = file
    found = []
    left = {name: text for name, text in config.tensors.items() if name not in weights}
    for name, files in sorted(weights.items()):
        parts, error = _read(directory, {part: (f"{name}_{part}", file) for part, file in files.items()})
        # On saving, the library may have changed the name: the weight is then recognized by its digest.
        known = name if name in config.tensors else _renamed(parts, left, config.digests)
        where = tuple(sorted(set(files.values())))
        if known is None:
            found.append(Verified(name, where, DAMAGED, "config.json does not describe it, or its digest differs"))
            continue
        left.pop(known, None)
        text, wanted = config.tensors[known], config.digests.get(known)
        found.append(
            Verified(known, where, *(_judged(known, text, parts, wanted) if error is None else (DAMAGED, error)))
        )
    found += [Verified(name, (), MISSING, "its tensors are in none of the files") for name in sorted(left)]
    found += _modules(directory, places, config.activation_modules, config.digests)
    return Verification(found)


def _places(directory: Path) -> dict[str, str]:
    """Tensor name -> name of its file: of the files that an index names, or of all."""
    indexes = sorted(directory.glob("*.safetensors.index.json"))
    files = {file for index in indexes for file in weight_map(index).values()}
    names = sorted(files) or sorted(path.name for path in directory.glob("*.safetensors"))
    if not names:
        raise FileNotFoundError(f"{directory} holds no .safetensors file")
    return {key: name for name in names for key in stored_keys([directory / name])}


def _read(directory: Path, places: Mapping[str, tuple[str, str]]) -> tuple[dict[str, torch.Tensor], str | None]:
    """The tensors by part, and why one could not be read."""
    parts = {}
    for part, (key, file) in places.items():
        try:
            with safe_open(str(directory / file), framework="pt") as opened:
                parts[part] = opened.get_tensor(key)
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            return parts, f"{key} cannot be read from {file}: {error}"
    return parts, None


def _renamed(parts: Mapping[str, torch.Tensor], left: Mapping[str, str], digests: Mapping[str, str]) -> str | None:
    return next((name for name, text in left.items() if name in digests and digest(text, parts) == digests[name]), None)


def _judged(name: str, text: str, parts: dict[str, torch.Tensor], wanted: str | None) -> tuple[str, str]:
    try:
        rebuild(name, text, parts, torch.float32, check_codes=wanted is None)
    except CheckpointError as error:
        return DAMAGED, str(error)
    if wanted is None:
        return UNKNOWN, ""
    found = digest(text, parts)
    return (HOLDS, "") if found == wanted else (DAMAGED, f"its digest is {found}, and config.json says {wanted}")


def _modules(
    directory: Path, places: Mapping[str, str], modules: Mapping[str, str], digests: Mapping[str, str]
) -> list[Verified]:
    found = []
    for name, kind in sorted(modules.items()):
        keys = {
            scale: (f"{name}.{scale}", places[f"{name}.{scale}"]) for scale in SCALES if f"{name}.{scale}" in places
        }
        if len(keys) < len(SCALES) or name not in digests:
            found.append(Verified(name, (), UNKNOWN))
            continue
        scales, error = _read(directory, keys)
        where = tuple(sorted({file for _, file in keys.values()}))
        same = error is None and digest(kind, scales) == digests[name]
        found.append(
            Verified(name, where, HOLDS if same else DAMAGED, "" if same else error or "its activation scales differ")
        )
    return found
