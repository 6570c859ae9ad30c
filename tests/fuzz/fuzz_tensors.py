"""Mutations of safetensors files: bits, numbers, whole tensors, headers."""

from __future__ import annotations

import json
import math
import random
import struct
from pathlib import Path
from typing import Any

from fuzz_words import HOSTILE_NAMES, HOSTILE_VALUES, NotPossible

_NUMBERS = (math.nan, math.inf, -math.inf, 0.0, -0.0, -1.0, 1e30, 1e38, 1e4, 1e-30, 1e-45, 3.0)
_DTYPES = (
    "F64",
    "F32",
    "F16",
    "BF16",
    "I64",
    "I32",
    "I16",
    "I8",
    "U8",
    "BOOL",
    "F8_E4M3",
    "F8_E5M2",
    "Q4",
    "",
    None,
    3,
)
_SIZES = (0, 1, 2, 3, 7, 64, 2**16, 2**31, 2**32, 2**62, 2**63, 2**64, -1, 10**30, 0.5, None, "8", [], True)


class Safetensors:
    """A safetensors file in pieces: header (dict) and data (bytes)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        raw = path.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        self.header: dict[str, Any] = json.loads(raw[8 : 8 + length])
        self.data = bytearray(raw[8 + length :])

    @property
    def names(self) -> list[str]:
        return [name for name in self.header if name != "__metadata__"]

    def span(self, name: str) -> tuple[int, int]:
        start, end = self.header[name]["data_offsets"]
        return start, end

    def write(self) -> None:
        text = json.dumps(self.header).encode("utf-8", "surrogatepass")
        self.path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(self.data))

    def set(self, tensors: dict[str, tuple[dict[str, Any], bytes]]) -> None:
        """Replaces all tensors: name -> (dtype and shape, bytes)."""
        metadata = {"__metadata__": self.header["__metadata__"]} if "__metadata__" in self.header else {}
        self.header, self.data = metadata, bytearray()
        for name, (info, content) in tensors.items():
            start = len(self.data)
            self.data += content
            self.header[name] = {**info, "data_offsets": [start, len(self.data)]}

    def tensors(self) -> dict[str, tuple[dict[str, Any], bytes]]:
        found = {}
        for name in self.names:
            start, end = self.span(name)
            info = {key: self.header[name][key] for key in ("dtype", "shape")}
            found[name] = (info, bytes(self.data[start:end]))
        return found


def _files(directory: Path, rng: random.Random) -> Safetensors:
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise NotPossible
    return Safetensors(rng.choice(files))


_PARTS = ("_qdata", "_scale", "_shift", "_up", "_down", "_codebook", "_row_scale", "._data", "._scale", "._shift")


def is_part(name: str) -> bool:
    """Whether a tensor belongs to a quantized weight or is an activation scale."""
    return name.endswith(_PARTS)


def _pick(names: list[str], rng: random.Random) -> str:
    """A tensor's name, a quantized weight's three times out of four."""
    if not names:
        raise NotPossible
    quantized = [name for name in names if is_part(name)]
    return rng.choice(quantized if quantized and rng.random() < 0.75 else names)


def data_flip(directory: Path, rng: random.Random) -> str:
    file = _files(directory, rng)
    name = _pick(file.names, rng)
    start, end = file.span(name)
    if start == end:
        raise NotPossible
    for _ in range(rng.choice((1, 1, 2, 8))):
        file.data[rng.randrange(start, end)] ^= 1 << rng.randrange(8)
    file.write()
    return name


def data_fill(directory: Path, rng: random.Random) -> str:
    file = _files(directory, rng)
    name = _pick(file.names, rng)
    start, end = file.span(name)
    value = rng.choice((0, 255, 127, rng.randrange(256)))
    if rng.random() < 0.5:
        start, end = sorted((rng.randint(start, end), rng.randint(start, end)))
    file.data[start:end] = bytes([value]) * (end - start)
    file.write()
    return f"{name} {value}"


_FORMATS = {"F64": ("d", 8), "F32": ("f", 4), "F16": ("e", 2)}


def _bits(value: float, dtype: str) -> bytes:
    if dtype == "BF16":
        return struct.pack("<f", value)[2:]
    try:
        return struct.pack("<" + _FORMATS[dtype][0], value)
    except OverflowError:
        return struct.pack("<" + _FORMATS[dtype][0], math.copysign(60000.0, value))


def number(directory: Path, rng: random.Random) -> str:
    """A special number in a float tensor: NaN, Inf, 0, a negative, absurd or tiny one."""
    file = _files(directory, rng)
    names = [n for n in file.names if file.header[n]["dtype"] in ("F64", "F32", "F16", "BF16")]
    name = _pick(names, rng)
    dtype, (start, end) = file.header[name]["dtype"], file.span(name)
    value = rng.choice(_NUMBERS)
    bits = _bits(value, dtype)
    count = (end - start) // len(bits)
    if not count:
        raise NotPossible
    for place in range(count) if rng.random() < 0.2 else [rng.randrange(count)]:
        file.data[start + place * len(bits) : start + (place + 1) * len(bits)] = bits
    file.write()
    return f"{name} {value}"


def factor(directory: Path, rng: random.Random) -> str:
    """The scales of a weight times an absurd factor."""
    file = _files(directory, rng)
    names = [n for n in file.names if is_part(n) and file.header[n]["dtype"] in ("F32", "F16", "BF16")]
    if not names:
        raise NotPossible
    name, times = rng.choice(names), rng.choice((-1.0, 1e-6, 1e-3, 0.5, 2.0, 100.0, 1e4, 1e20))
    dtype, (start, end) = file.header[name]["dtype"], file.span(name)
    width = 2 if dtype != "F32" else 4
    for place in range(start, end, width):
        old = bytes(file.data[place : place + width])
        (value,) = (
            struct.unpack("<f", bytes(2) + old) if dtype == "BF16" else struct.unpack(f"<{_FORMATS[dtype][0]}", old)
        )
        try:
            file.data[place : place + width] = _bits(value * times, dtype)
        except OverflowError:
            file.data[place : place + width] = _bits(math.inf, dtype)
    file.write()
    return f"{name} x {times}"


def exchange(directory: Path, rng: random.Random) -> str:
    """Two tensors of one size and dtype exchanged, or one written over the other; in one file."""
    file = _files(directory, rng)
    alike: dict[Any, list[str]] = {}
    for name in file.names:
        info = file.header[name]
        alike.setdefault((info["dtype"], tuple(info["shape"])), []).append(name)
    groups = [names for names in alike.values() if len(names) > 1]
    quantized = [names for names in groups if any(map(is_part, names))]
    if not groups:
        raise NotPossible
    first, second = rng.sample(rng.choice(quantized if quantized and rng.random() < 0.8 else groups), 2)
    a, b = bytes(file.data[slice(*file.span(first))]), bytes(file.data[slice(*file.span(second))])
    file.data[slice(*file.span(first))] = b
    if rng.random() < 0.6:
        file.data[slice(*file.span(second))] = a
    file.write()
    return f"{first} {second}"


def rows(directory: Path, rng: random.Random) -> str:
    """Two rows of one tensor exchanged."""
    file = _files(directory, rng)
    names = [n for n in file.names if len(file.header[n]["shape"]) > 1 and file.header[n]["shape"][0] > 1]
    name = _pick(names, rng)
    count, (start, end) = file.header[name]["shape"][0], file.span(name)
    size = (end - start) // count
    i, j = rng.sample(range(count), 2)
    a, b = (bytes(file.data[start + k * size : start + (k + 1) * size]) for k in (i, j))
    file.data[start + i * size : start + (i + 1) * size], file.data[start + j * size : start + (j + 1) * size] = b, a
    file.write()
    return f"{name} rows {i} {j}"


def tensor_names(directory: Path, rng: random.Random) -> str:
    """A tensor deleted, renamed, doubled, or an additional one."""
    file = _files(directory, rng)
    tensors = file.tensors()
    if not tensors:
        raise NotPossible
    name = _pick(list(tensors), rng)
    action = rng.choice(("delete", "rename", "part", "copy", "hostile", "weight"))
    if action == "delete":
        del tensors[name]
        told = "deleted"
    else:
        new = {
            "rename": name[: rng.randrange(len(name) + 1)] + rng.choice("xyz._0") + name[rng.randrange(len(name)) :],
            "part": name.rpartition("_")[0] + rng.choice(("_qdata", "_scale", "_shift", "_up", "_codebook", "_x", "")),
            "copy": name.replace("0", "1", 1) if "0" in name else f"extra.{name}",
            "hostile": rng.choice(HOSTILE_NAMES) + rng.choice(("", "_qdata", "_scale")),
            "weight": name.rpartition("_")[0],
        }[action]
        tensors[new] = tensors[name]
        if new != name and action != "copy" and rng.random() < 0.7:
            del tensors[name]
        told = new[:100]
    file.set(tensors)
    file.write()
    return f"{name} {action}: {told}"


def tensor_form(directory: Path, rng: random.Random) -> str:
    """dtype, shape or place of a tensor changed in the header; the data stays."""
    file = _files(directory, rng)
    name = _pick(file.names, rng)
    info = file.header[name]
    action = rng.choice(("dtype", "shape", "transposed", "size", "offsets", "key", "junk"))
    if action == "dtype":
        info["dtype"] = rng.choice(_DTYPES)
    elif action == "shape":
        info["shape"] = rng.choice(
            ([], [1], [*info["shape"], 1], info["shape"][:-1], [0], info["shape"] * 2, None, "8x8")
        )
    elif action == "transposed":
        info["shape"] = info["shape"][::-1]
    elif action == "size":
        if not info["shape"]:
            raise NotPossible
        info["shape"][rng.randrange(len(info["shape"]))] = rng.choice(_SIZES)
    elif action == "offsets":
        info["data_offsets"][rng.randrange(2)] = rng.choice(_SIZES)
    elif action == "key":
        del info[rng.choice(list(info))]
    else:
        file.header[name] = rng.choice(HOSTILE_VALUES)
    file.write()
    return f"{name} {action}: {str(file.header[name])[:100]}"


def header_bytes(directory: Path, rng: random.Random) -> str:
    """Bytes of the header changed."""
    path = _files(directory, rng).path
    raw = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", raw[:8])
    for _ in range(rng.choice((1, 1, 1, 4, 30))):
        raw[8 + rng.randrange(length)] = rng.randrange(256)
    path.write_bytes(raw)
    return path.name


def header_length(directory: Path, rng: random.Random) -> str:
    """The length of the header changed."""
    path = _files(directory, rng).path
    raw = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", raw[:8])
    new = rng.choice((0, 1, length - 1, length + 1, length * 2, 10**8, 10**9, 2**32, 2**40, 2**63, 2**64 - 1))
    raw[:8] = struct.pack("<Q", new)
    path.write_bytes(raw)
    return f"{path.name} {new}"
