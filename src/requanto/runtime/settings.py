"""Settings of the process. None of them changes a result, except by rounding (``humming``, ``cpu_arithmetic``).

requanto.settings.workspace_bytes = 256 * 2**20
"""

from __future__ import annotations

import difflib
import math
import operator
import os
from dataclasses import dataclass, fields

_MEGABYTE = 2**20
#: values of ``settings.foreign``
FOREIGN = ("auto", "always", "never")
#: values of ``settings.cpu_arithmetic``
CPU_ARITHMETIC = ("auto", "float")
_MOST_BYTES = 2**63 - 1  # torch counts bytes in int64


def parse_compiled(text: str) -> bool | None:
    """The value of ``settings.compiled`` for a text of REQUANTO_COMPILE.

    Raises:
        ValueError: the text is not "1", "0" or "".
    """
    expected = (
        "1 (the library of CPU kernels, or an error), 0 (torch's operators) or nothing (the library, where it loads)"
    )
    return _switch("REQUANTO_COMPILE", text, None, expected)


def parse_packing(text: str) -> bool:
    """The value of ``settings.pack_on_first_use`` for a text of REQUANTO_PACK.

    Raises:
        ValueError: the text is not "1", "0" or "".
    """
    expected = "1 or nothing (weights are prepacked in their first GEMM) or 0 (they are not)"
    return bool(_switch("REQUANTO_PACK", text, True, expected))


def parse_digests(variable: str, text: str) -> bool:
    """The value of ``settings.write_digests`` and ``check_digests`` for a text of their variables.

    Raises:
        ValueError: the text is not "1", "0" or "".
    """
    what = "are written when saving" if "WRITE" in variable else "are checked when loading"
    return bool(_switch(variable, text, True, f"1 or nothing (digests of weights {what}) or 0 (they are not)"))


def parse_humming(text: str) -> bool | None:
    """The value of ``settings.humming`` for a text of REQUANTO_HUMMING.

    Raises:
        ValueError: the text is not "1", "0" or "".
    """
    expected = "1 (humming's GPU kernels wherever they can run), 0 (never) or nothing (where a measurement says faster)"
    return _switch("REQUANTO_HUMMING", text, None, expected)


def parse_foreign(text: str) -> str:
    """The value of ``settings.foreign`` for a text of REQUANTO_FOREIGN.

    Raises:
        ValueError: the text is none of its values.
    """
    if text not in ("", *FOREIGN):
        raise ValueError(f"REQUANTO_FOREIGN is {text!r}, expected {', '.join(FOREIGN)} or nothing (auto)")
    return text or "auto"


def parse_cpu_arithmetic(text: str) -> str:
    """The value of ``settings.cpu_arithmetic`` for a text of REQUANTO_CPU_ARITHMETIC.

    Raises:
        ValueError: the text is none of its values.
    """
    if text not in ("", *CPU_ARITHMETIC):
        raise ValueError(
            f"REQUANTO_CPU_ARITHMETIC is {text!r}, expected auto (x is rounded where that is faster), float (never) or "
            f"nothing (auto)"
        )
    return text or "auto"


def _switch(variable: str, text: str, default: bool | None, expected: str) -> bool | None:
    known = {"": default, "0": False, "1": True}
    if text not in known:
        raise ValueError(f"{variable} is {text!r}, expected {expected}")
    return known[text]


def parse_workspace(text: str) -> int:
    """Bytes for a text of REQUANTO_WORKSPACE_MB.

    Raises:
        ValueError: the text is not a number of megabytes.
    """
    try:
        size = float(text or "64")
    except ValueError:
        size = math.nan
    if not 0 <= size <= _MOST_BYTES // _MEGABYTE:
        raise ValueError(
            f"REQUANTO_WORKSPACE_MB is {text!r}, expected a number of megabytes without a unit, 0 or more, such as 64"
        )
    return int(size * _MEGABYTE)


class RegistryState:
    """Version of everything that decides which implementation the registry selects. Cached plans are valid for one version.

    Attributes:
        version: a number for the current settings, registered implementations and compile failures. Setting a value back
            gives its former number.
    """

    def __init__(self) -> None:
        self.version = 0
        self._seen: dict[tuple[object, ...], int] = {}
        self._settings: tuple[object, ...] = ()
        self._events = 0

    def changed(self, settings: tuple[object, ...] | None = None) -> None:
        """Updates `version`.

        Args:
            settings: all values of the settings; None: an implementation was registered or could not be compiled.
        """
        if settings is None:
            self._events += 1
        else:
            self._settings = settings
        self.version = self._seen.setdefault((self._events, *self._settings), len(self._seen) + 1)


registry_state = RegistryState()


@dataclass
class Settings:
    """Settings, which can be assigned at any time.

    Attributes:
        workspace_bytes: the most memory that one thread caches in scratch buffers (for dequantized weights); 0 or more.
            (environment: REQUANTO_WORKSPACE_MB; default 64 MB)
        pack_on_first_use: on a CPU, prepack a layer's weight for its kernel in the first GEMM. The prepacked codes replace
            the plain ones, and are converted back when the plain ones are needed.
            (environment: REQUANTO_PACK=0 turns it off; `requanto.prepare(model)` prepacks regardless)
        compiled: on a CPU, use the C library of kernels (docs/cpu.md). A wheel carries it; a source checkout builds it at
            the first use, in a few seconds, with a C++ compiler. None: where it can be loaded; else one line is logged and
            torch's operators run. True: a failure raises. False: never.
            (environment: REQUANTO_COMPILE=1 or 0; default None)
        cpu_arithmetic: how a CPU multiplies float x with packed weights. ``"auto"``: x is rounded in blocks of 32 columns,
            to int8 for weights of up to 5 bits and to 16 bits for those of 6 to 8, and multiplied as integers; the error
            is below that of the weights themselves (docs/cpu.md). ``"float"``: x is never rounded.
            (environment: REQUANTO_CPU_ARITHMETIC)
        write_digests: write a digest of each quantized weight into config.json when saving (docs/format.md).
            (environment: REQUANTO_WRITE_DIGESTS=0 turns it off)
        check_digests: compare these digests with the stored tensors when loading.
            (environment: REQUANTO_CHECK_DIGESTS=0 turns it off)
        foreign: who opens a checkpoint that another library quantized (docs/formats.md). ``"auto"``: that library where it
            is installed and runs on the device, else Requanto, which says so in a line of the log. ``"always"``: Requanto,
            wherever it knows the format. ``"never"``: never Requanto. A ``quantization_config=QuantoConfig()`` asks for
            Requanto whatever the setting is. (environment: REQUANTO_FOREIGN)
        humming: on NVIDIA GPUs, run weights with 16-bit activations by humming's kernels (``requanto[humming]``) instead of
            the Triton ones. None: where a table of measurements says that they are faster on this GPU. True: wherever they
            can. False: never. Their results differ in rounding: scales and zero points are rounded to the dtype of x
            (docs/kernels.md). Applies to weights that are not prepacked yet. (environment: REQUANTO_HUMMING=1 or 0)

    Raises:
        AttributeError: there is no setting of that name.
        TypeError, ValueError: the value is not valid. The setting stays unchanged.
    """

    workspace_bytes: int = parse_workspace(os.environ.get("REQUANTO_WORKSPACE_MB", ""))
    pack_on_first_use: bool = parse_packing(os.environ.get("REQUANTO_PACK", ""))
    compiled: bool | None = parse_compiled(os.environ.get("REQUANTO_COMPILE", ""))
    cpu_arithmetic: str = parse_cpu_arithmetic(os.environ.get("REQUANTO_CPU_ARITHMETIC", ""))
    write_digests: bool = parse_digests("REQUANTO_WRITE_DIGESTS", os.environ.get("REQUANTO_WRITE_DIGESTS", ""))
    check_digests: bool = parse_digests("REQUANTO_CHECK_DIGESTS", os.environ.get("REQUANTO_CHECK_DIGESTS", ""))
    foreign: str = parse_foreign(os.environ.get("REQUANTO_FOREIGN", ""))
    humming: bool | None = parse_humming(os.environ.get("REQUANTO_HUMMING", ""))

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, _checked(name, value))
        registry_state.changed(tuple(self.__dict__.values()))

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"requanto.settings.{name} cannot be deleted; set it to another value")


_TEXTS = {"foreign": FOREIGN, "cpu_arithmetic": CPU_ARITHMETIC}


def _checked(name: str, value: object) -> object:
    if name == "workspace_bytes":
        return _bytes(value)
    if name in ("pack_on_first_use", "write_digests", "check_digests"):
        return _one_of(name, value, (True, False))
    if name in ("compiled", "humming"):
        return _one_of(name, value, (None, True, False))
    if name in _TEXTS:
        if value not in _TEXTS[name]:
            expected = ", ".join(map(repr, _TEXTS[name]))
            raise ValueError(f"requanto.settings.{name} is {value!r}, expected one of {expected}")
        return value
    known = [field.name for field in fields(Settings)]
    near = difflib.get_close_matches(name, known, 1, 0.5)
    meant = f"did you mean {near[0]!r}? " if near else ""
    raise AttributeError(f"requanto.settings has no {name!r}; {meant}There are {', '.join(known)}")


def _bytes(value: object) -> int:
    expected = "expected a whole number of bytes, such as 64 * 2**20 for 64 MB"
    if isinstance(value, bool):
        raise TypeError(f"requanto.settings.workspace_bytes is {value!r}, {expected}")
    try:
        size = operator.index(value)  # type: ignore[arg-type]
    except TypeError as error:
        raise TypeError(f"requanto.settings.workspace_bytes is {value!r}, {expected}") from error
    if not 0 <= size <= _MOST_BYTES:
        raise ValueError(
            f"requanto.settings.workspace_bytes is {value!r}, {expected}, from 0 (nothing is cached) to 2**63 - 1"
        )
    return size


def _one_of(name: str, value: object, allowed: tuple[object, ...]) -> object:
    if not any(value is one for one in allowed):
        raise TypeError(f"requanto.settings.{name} is {value!r}, expected one of {', '.join(map(repr, allowed))}")
    return value


settings = Settings()
