"""Checkpoints of torchao 0.18: safetensors files whose header describes each tensor (``flatten_tensor_state_dict``).

The metadata of a file has an entry for each tensor of the model, JSON in a string:

    "layer.weight": {"_type": "Int8Tensor", "_data": {"block_size": [1, 64], ...}, "_tensor_data_names": ["qdata", "scale"]}

and the parts of such a weight are ``layer._weight_qdata``, ``layer._weight_scale`` ... `torchao_types` has the classes.
Pickled checkpoints of torchao are not read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from requanto.checkpoint.foreign.found import ForeignCheckpoint
from requanto.checkpoint.foreign.source import Source
from requanto.checkpoint.foreign.torchao_entry import Entry
from requanto.checkpoint.foreign.torchao_types import REFUSED, TYPES
from requanto.checkpoint.format import CheckpointError
from requanto.config.checks import shown


def scan(config: Mapping[str, Any], source: Source) -> ForeignCheckpoint:
    """Reads the headers of a checkpoint of torchao.

    Args:
        config: its ``quantization_config``; what it says of the types is in the headers too.
        source: its tensors.

    Raises:
        CheckpointError: the headers describe nothing, or an unknown type; or they and the tensors disagree.
    """
    entries = list(_entries(source))
    if not entries:
        raise CheckpointError(
            "quantization_config.quant_method is 'torchao', but no header of a safetensors file describes a quantized "
            "tensor: an old version of torchao wrote them. Load the checkpoint with torchao 0.16 or newer and save it again "
            "as safetensors"
        )
    found = ForeignCheckpoint(f"torchao, {', '.join(sorted({entry.kind for entry in entries}))}")
    for entry in entries:
        TYPES[entry.kind](entry, found)
    return found


def recognize(description: Mapping[str, Any], source: Source) -> dict[str, Any] | None:
    """A config for files that ``flatten_tensor_state_dict`` wrote without one."""
    if "tensor_names" not in source.metadata:
        return None
    kinds = (_described(text) for text in source.metadata.values())
    return {"quant_method": "torchao"} if any(kind and kind["_type"] in TYPES | REFUSED for kind in kinds) else None


def _entries(source: Source) -> Iterator[Entry]:
    """The quantized tensors that the metadata describes."""
    for name, text in source.metadata.items():
        described = _described(text)
        if described is None or described["_type"] == "Tensor":
            continue
        kind = described["_type"]
        if kind in REFUSED:
            raise CheckpointError(f"{name} is a torchao {kind}: {REFUSED[kind]}")
        if kind not in TYPES:
            raise CheckpointError(
                f"{name} is a torchao {shown(kind)}, which torchao 0.18 does not have: a newer version wrote it. Known are "
                f"{', '.join(TYPES)}"
            )
        entry = Entry(name, kind, described["_data"], source)
        _check_parts(entry, described.get("_tensor_data_names"), source)
        yield entry


def _check_parts(entry: Entry, parts: Any, source: Source) -> None:
    """Compares the parts that the header lists with those that are stored: some of them are optional."""
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise CheckpointError(
            f"{entry.name}: the header has _tensor_data_names={shown(parts)}, expected the names of its parts"
        )
    for part in parts:
        source.need(entry.tensor(part), entry.name)
    if surplus := sorted(set(entry.sources()) - {entry.tensor(part) for part in parts}):
        raise CheckpointError(
            f"{surplus[0]} is in the files, and the header says that {entry.name} consists of {', '.join(parts)}: files of "
            f"two checkpoints are mixed"
        )


def _described(text: str) -> dict[str, Any] | None:
    """An entry of the metadata as JSON; None: it describes no tensor."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    if not isinstance(found, dict) or not isinstance(found.get("_type"), str):
        return None
    if found["_type"] != "Tensor" and not isinstance(found.get("_data"), dict):
        return None
    return found
