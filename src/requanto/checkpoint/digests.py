"""Digests of stored weights. They find damage that leaves valid numbers: flipped bits, exchanged tensors, edited lines.

``quantization_config.digests`` maps the name of each weight to the first 16 hexadecimal digits of a SHA-256 over its line
and its parts as they are stored. A module with static activation scales has one over the type and the two scales.

A digest finds damage. It does not protect against somebody who changes weights on purpose and computes digests anew.

SHA-256 is in every language's library and 1.8 GB/s fast on a processor with instructions for it. A checksum such as CRC-32
is faster, but two of its values can be equal for two weights on purpose, and 32 bits are few for millions of weights.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections import deque
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from safetensors import safe_open

from requanto.checkpoint.format import CheckpointError, spec_text
from requanto.dtypes.qtypes import qtype
from requanto.runtime.settings import settings
from requanto.tensor.qtensor import QTensor

logger = logging.getLogger(__name__)

#: hexadecimal digits of a stored digest
LENGTH = 16
#: static activation scales of a module
SCALES = ("input_scale", "output_scale")


def digest(text: str, parts: Mapping[str, torch.Tensor]) -> str:
    """The digest of a weight.

    Args:
        text: its line in ``quantization_config.tensors``.
        parts: its tensors by part name, in the plain layout, as they are stored.
    """
    made = hashlib.sha256(text.encode())
    for name in sorted(parts):
        part = parts[name].detach().to("cpu").contiguous()
        made.update(f"\n{name} {str(part.dtype).removeprefix('torch.')} {list(part.shape)}\n".encode())
        made.update(part.reshape(-1).view(torch.uint8).numpy())
    return made.hexdigest()[:LENGTH]


def digest_of(tensor: QTensor, activation: qtype | None) -> str:
    """The digest of one weight for `requanto.quantization_map`.

    Args:
        tensor: the weight.
        activation: the type of the activations that the map has for it; its own is set only after it was loaded.
    """
    line = tensor._spec.replace(activation=None).text(tensor.rank)
    return digest(f"{line} activations={None if activation is None else activation.name}", tensor.inner_tensors())


def digests_of(
    state: Mapping[str, Any], modules: Mapping[str, str] | None = None, flat: Mapping[str, torch.Tensor] | None = None
) -> dict[str, str]:
    """The digests of a state dict's quantized weights and activation scales; {} if `settings.write_digests` is off.

    Args:
        state: tensors by name; QTensors among them.
        modules: ``quantization_config.activation_modules``.
        flat: the same tensors flattened (`checkpoint.format.flatten`), if the caller has them: the codes of a prepacked
            weight are not converted a second time then.
    """
    if not settings.write_digests:
        return {}
    work: dict[str, tuple[str, Mapping[str, torch.Tensor]]] = {}
    for name, value in state.items():
        if isinstance(value, QTensor) and value.device.type != "meta":
            parts = value.inner_tensors() if flat is None else _parts_in(flat, name, value)
            work[name] = (spec_text(value), parts)
    for name, kind in (modules or {}).items():
        scales = {scale: state[f"{name}.{scale}"] for scale in SCALES if f"{name}.{scale}" in state}
        if len(scales) == len(SCALES):
            work[name] = (kind, scales)
    if not work:
        return {}
    with ThreadPoolExecutor(_workers()) as pool:  # hashlib releases the GIL
        return dict(zip(work, pool.map(lambda item: digest(*item), work.values())))


def _parts_in(flat: Mapping[str, torch.Tensor], name: str, value: QTensor) -> dict[str, torch.Tensor]:
    return {part: flat[f"{name}_{part}"] for part in QTensor.tensor_data_names if f"{name}_{part}" in flat}


def check_scales(modules: Mapping[str, str], digests: Mapping[str, str], files: Iterable[str | os.PathLike]) -> None:
    """Checks the static activation scales in safetensors files against their digests, if `settings.check_digests` is on.

    They are read here because a library casts them to the model's dtype when it loads them.

    Args:
        modules: ``quantization_config.activation_modules``.
        digests: ``quantization_config.digests``.
        files: the files; their headers were checked before.

    Raises:
        CheckpointError: a scale or a type is not the one that was saved.
    """
    wanted = {name: digests[name] for name in modules if name in digests}
    if not settings.check_digests or not wanted:
        return
    found: dict[str, dict[str, torch.Tensor]] = {}
    for file in files:
        with safe_open(str(file), framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118  (not a dict)
                name, _, leaf = key.rpartition(".")
                if leaf in SCALES and name in wanted:
                    found.setdefault(name, {})[leaf] = opened.get_tensor(key)
    for name, scales in found.items():
        for scale, value in scales.items():
            if not bool((torch.isfinite(value) & (value > 0)).all()):
                raise CheckpointError(
                    f"an activation scale of {name} is {value.tolist()}: {name}.{scale} is damaged, download or save the "
                    f"checkpoint again"
                )
        error = mismatch(name, modules[name], scales, wanted[name])
        if error is not None:
            raise error
    if len(found) < len(wanted):
        logger.info(
            "%d of %d activation digests have other names in the files: not checked",
            len(wanted) - len(found),
            len(wanted),
        )


def check_names(digests: Mapping[str, str], tensors: Iterable[str]) -> None:
    """Checks that each weight has a digest, unless there are none at all.

    Raises:
        CheckpointError: one is missing.
    """
    lost = sorted({*tensors} - digests.keys()) if digests else []
    if lost:
        raise CheckpointError(
            f"quantization_config.digests has no entry for the weight {lost[0]!r}: config.json was damaged or "
            "edited. Restore "
            f"the one that was saved with these files, or delete the key 'digests' to load without them"
        )


def mismatch(
    name: str, text: str, parts: Mapping[str, torch.Tensor], wanted: str, where: str = "quantization_config.digests"
) -> CheckpointError | None:
    """The error for stored tensors whose digest is not ``wanted``, which ``where`` holds; None if it is."""
    found = digest(text, parts)
    if found == wanted:
        return None
    return CheckpointError(
        f"{name}: its tensors in the files have the digest {found}, but {where} says {wanted!r}. A file or "
        f"config.json is damaged, was edited, or belongs to another save: download or save it again. If it was changed on "
        f"purpose, load it with REQUANTO_CHECK_DIGESTS=0 and save it anew"
    )


def _workers() -> int:
    return min(4, os.cpu_count() or 1)


class DigestChecks:
    """Checks of digests that run in other threads while weights are loaded.

    Args:
        digests: ``quantization_config.digests``.
    """

    #: Checks under way at a time. Their tensors stay in memory, so this bounds it while weights are offloaded to disk.
    MOST = 8

    def __init__(self, digests: Mapping[str, str]) -> None:
        self._digests = digests if settings.check_digests else {}
        self._pool: ThreadPoolExecutor | None = None
        self._waiting: deque[tuple[str, Future[CheckpointError | None]]] = deque()
        self._errors: dict[str, CheckpointError] = {}

    def covers(self, stored_name: str | None) -> bool:
        """Whether a weight, by its name in the config, has a digest that is checked."""
        return stored_name in self._digests

    def add(self, name: str, text: str, parts: Mapping[str, torch.Tensor], stored_name: str | None = None) -> None:
        """Starts the check of one weight; it runs here and now for tensors that are not on the CPU.

        Args:
            name: the weight's name in the model, for messages.
            text: its line.
            parts: its tensors as they are stored.
            stored_name: its name in the config, if that differs.
        """
        wanted = self._digests.get(stored_name or name)
        if wanted is None or any(part.is_meta for part in parts.values()):
            return
        if any(part.device.type != "cpu" for part in parts.values()):
            self._finished(name, mismatch(name, text, parts, wanted))
            return
        self._pool = self._pool or ThreadPoolExecutor(_workers())
        self._waiting.append((name, self._pool.submit(mismatch, name, text, dict(parts), wanted)))
        while len(self._waiting) > self.MOST:
            self._take()

    def _take(self) -> None:
        name, future = self._waiting.popleft()
        self._finished(name, future.result())

    def _finished(self, name: str, error: CheckpointError | None) -> None:
        if error is not None:
            self._errors[name] = error

    def finish(self) -> dict[str, CheckpointError]:
        """Waits for all checks; returns the errors by name."""
        while self._waiting:
            self._take()
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
        errors, self._errors = self._errors, {}
        return errors
