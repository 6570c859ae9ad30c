"""The package gguf's reader of headers, in little memory, for as long as Transformers reads a config with it.

The package makes two numpy arrays for each text of a vocabulary, of a kind that keeps a dictionary. For 262,144 texts, and
their scores and types, that is 700 MB and a minute of a slow CPU, more than all weights of a small model.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np


def register() -> None:
    """Patches the function that reads a model's config; it is not patched twice."""
    from transformers.configuration_utils import PreTrainedConfig

    if not hasattr(PreTrainedConfig.get_config_dict, "_requanto_gguf"):
        PreTrainedConfig.get_config_dict = classmethod(_wrap_get_config(PreTrainedConfig.get_config_dict.__func__))


def _wrap_get_config(original: Any) -> Any:
    """Reads headers in little memory; says what is wrong with a damaged file, where the library has an error of numpy."""

    @functools.wraps(original)
    def get_config_dict(cls: Any, path: Any, **kwargs: Any) -> Any:
        name = kwargs.get("gguf_file")
        if not name:
            return original(cls, path, **kwargs)
        options = dict(kwargs)
        try:
            with light_reader():
                return original(cls, path, **kwargs)
        except Exception:
            file = found_file(path, name, options)
            if file is not None:
                from requanto.checkpoint.foreign.gguf_header import read_header

                read_header(file)
            raise

    get_config_dict._requanto_gguf = True  # type: ignore[attr-defined]
    return get_config_dict


def found_file(path: Any, name: str, options: Mapping[str, Any]) -> str | None:
    """A file of the checkpoint on this machine, downloaded if need be; None if there is none."""
    from transformers.utils import cached_file

    if os.path.isfile(name):
        return name
    if not isinstance(path, (str, os.PathLike)):
        return None
    place = ("subfolder", "revision", "cache_dir", "token", "proxies", "force_download", "local_files_only")
    given = {key: options[key] for key in place if options.get(key) is not None}
    try:
        return cached_file(str(path), name, **given)
    except OSError:  # the library itself reports what it cannot find
        return None


@contextlib.contextmanager
def light_reader() -> Iterator[None]:
    """Puts the reader in the place of ``gguf.GGUFReader``; without the package nothing happens."""
    try:
        import gguf
    except ImportError:
        yield
        return
    original = gguf.GGUFReader
    gguf.GGUFReader = _light(original)
    try:
        yield
    finally:
        gguf.GGUFReader = original


@functools.cache
def _light(original: Any) -> Any:
    from gguf import GGUFValueType

    class LightReader(original):
        """Fields have the same values under the same indices of ``field.data``; ``field.parts`` has no lengths of texts."""

        def _get(self, offset: int, *arguments: Any, **options: Any) -> Any:
            if isinstance(self.data, np.memmap):
                self.data = np.asarray(self.data)  # the same bytes; its slices are plain arrays
            return super()._get(offset, *arguments, **options)

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
            found = self._array(orig_offs) if raw_type == GGUFValueType.ARRAY else None
            return super()._get_field_parts(orig_offs, raw_type) if found is None else found

        def _array(self, start: int) -> tuple[int, list[Any], list[int], list[Any]] | None:
            """An array of texts or numbers; None: the package reads it."""
            head = [self._get(start, np.uint32), self._get(start + 4, np.uint64)]
            kind, count, at = GGUFValueType(int(head[0][0])), int(head[1][0]), start + 12
            number = self.gguf_scalar_to_np.get(kind)
            if count == 0 or (number is None and kind != GGUFValueType.STRING):
                return None
            if count > len(self.data) - at:
                raise ValueError(f"an array of {count} values at byte {start} does not fit in the file")
            if number is not None:
                parts = list(self._get(at, number, count).reshape(-1, 1))
                at += sum(part.nbytes for part in parts)
            else:
                parts, at = self._texts(at, count)
            return at - start, [*head, *parts], list(range(2, 2 + count)), [GGUFValueType.ARRAY, kind]

        def _texts(self, at: int, count: int) -> tuple[list[Any], int]:
            order: Any = sys.byteorder if self.byte_order == "I" else {"little": "big", "big": "little"}[sys.byteorder]
            texts = []
            for _ in range(count):
                length = int.from_bytes(self.data[at : at + 8].tobytes(), order)
                at += 8
                if length > len(self.data) - at:
                    raise ValueError(f"a text of {length} bytes at byte {at} does not fit in the file")
                texts.append(self.data[at : at + length])
                at += length
            return texts, at

    return LightReader
