"""Storage of finished blocks on disk, from which an interrupted run continues.

The directory holds ``state.json`` (a fingerprint of model, samples and options) and one safetensors file per finished block,
whose metadata describe its weights. Files are written atomically.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from requanto.checkpoint.directory import replace_file
from requanto.checkpoint.format import flatten, rebuild, spec_text
from requanto.config.plan import PlannedWeight
from requanto.methods.layers import Layer
from requanto.methods.method import Method
from requanto.methods.samples import Samples, tensor_bytes
from requanto.tensor.qtensor import QTensor

#: Number of values of each parameter that are hashed.
_SAMPLE = 4096


class Resume:
    """The finished blocks of one run.

    Args:
        directory: where they are stored; created if it does not exist.
        fingerprint: the run's fingerprint, by part (see :func:`fingerprint`).

    Raises:
        ValueError: the directory belongs to another run.
    """

    def __init__(self, directory: str | os.PathLike, fingerprint: Mapping[str, str]) -> None:
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / "state.json"
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))["fingerprint"]
            changed = [part for part in fingerprint if found.get(part) != fingerprint[part]]
            if changed:
                raise ValueError(
                    f"{self.directory} holds blocks of another run: {', '.join(changed)} changed. Run with the original "
                    f"arguments, or use another directory (or delete this one) to start again."
                )
        else:
            text = json.dumps({"fingerprint": dict(fingerprint)}, indent=2)
            replace_file(path, lambda scratch: scratch.write_text(text, encoding="utf-8"))

    def path(self, key: str) -> Path:
        """Returns the path of a block's file."""
        return self.directory / f"{key}.safetensors"

    def save(self, key: str, layers: list[Layer], block: nn.Module | None) -> None:
        """Writes a finished block: its quantized weights, and its other parameters, which the method may have changed."""
        named: dict[str, torch.Tensor] = {layer.name: layer.parameter for layer in layers}
        specs = {name: spec_text(tensor) for name, tensor in named.items() if isinstance(tensor, QTensor)}
        tensors = flatten({name: tensor.detach() for name, tensor in named.items()})
        tensors |= {f":{name}": p.detach() for name, p in _others(block)}
        tensors = {name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}
        replace_file(
            self.path(key), lambda scratch: save_file(tensors, scratch, metadata={"tensors": json.dumps(specs)})
        )

    def restore(self, key: str, layers: list[Layer], block: nn.Module | None = None) -> bool:
        """Loads a finished block's weights into the model; returns False if it is not finished."""
        path = self.path(key)
        if not path.exists():
            return False
        with safe_open(path, framework="pt") as file:
            specs = json.loads(file.metadata()["tensors"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
        for layer in layers:
            device, prefix = layer.parameter.device, f"{layer.name}_"
            parts = {n.removeprefix(prefix): t.to(device) for n, t in tensors.items() if n.startswith(prefix)}
            layer.set_parameter(rebuild(layer.name, specs[layer.name], parts, layer.parameter.dtype))
        for name, parameter in _others(block):
            parameter.data.copy_(tensors[f":{name}"])
        return True


def _others(block: nn.Module | None) -> list[tuple[str, nn.Parameter]]:
    return [] if block is None else [(n, p) for n, p in block.named_parameters() if not isinstance(p, QTensor)]


def fingerprint(
    model: nn.Module, planned: Mapping[str, PlannedWeight], samples: Samples, method: Method
) -> dict[str, str]:
    """Returns hashes of everything that affects the quantized weights, by part.

    At least `_SAMPLE` evenly spaced values of every (larger) parameter are hashed; of a calibration function, only its name.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(tensor_bytes(flat[:: max(1, flat.numel() // _SAMPLE)]))
    choices = "\n".join(
        f"{name}: {vars(choice.options)} {choice.axis} {choice.transposed}" for name, choice in planned.items()
    )
    return {
        "model": digest.hexdigest(),
        "samples": samples.fingerprint(),
        "method": repr(method),
        "layers": hashlib.sha256(choices.encode()).hexdigest(),
    }
