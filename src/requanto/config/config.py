"""QuantoConfig: the configuration class for both Transformers and Diffusers."""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

from requanto.config import checks
from requanto.config.checks import AUTO
from requanto.config.limit import Limit, parse_candidates
from requanto.config.stored_weights import is_stored, plain_type, stored_text
from requanto.dtypes.qtypes import qtype, qtypes, resolve_qtype
from requanto.scales.columns import check_column_scale
from requanto.scales.compact import check_scale_bits, check_zero_point, has_whole_zeros
from requanto.scales.correction import check_low_rank
from requanto.scales.rotation import FOLD, check_rotation
from requanto.scales.search import check_method

FORMAT = "requanto"
#: newest checkpoint format version that can be read; a checkpoint is written as the first version that has what it needs
FORMAT_VERSION = 4
_VERSION_4_WORDS = frozenset({"signed", "block", "order"})
_VERSION_3_WORDS = frozenset({"columns", "zeros"})
_VERSION_2_WORDS = frozenset({"scales", "rotation"})
_VERSION_3_TYPES = frozenset(kind.name for kind in qtypes.values() if kind.blocks is not None)
_VERSION_1_TYPES = frozenset({"qint2", "qint4", "qint8", "qfloat8_e4m3fn", "qfloat8_e4m3fnuz", "qfloat8_e5m2"})


def format_version_of(tensors: Mapping[str, str]) -> int:
    """The format version that stored weights (name -> `WeightSpec.text`) need."""
    return max((_version_of(*text.split()) for text in tensors.values()), default=1)


def _version_of(kind: str, _shape: str, *words: str) -> int:
    found = {word.partition("=")[0] for word in words}
    types = {kind, *(word.partition("activation=")[2] for word in words)}
    if found & _VERSION_4_WORDS:
        return 4
    if found & _VERSION_3_WORDS or types & _VERSION_3_TYPES:
        return 3
    return 2 if found & _VERSION_2_WORDS or kind not in _VERSION_1_TYPES else 1


class QuantizationMethod(str, Enum):
    """The name under which both libraries look up the quantizer; Diffusers reads its ``.value``."""

    QUANTO = "quanto"

    __hash__ = str.__hash__  # it is equal to "quanto", so its hash must be the same
    __str__ = str.__str__


#: How one layer is quantized: a type, or a dict of ``_LAYER_KEYS``; None leaves it float.
LayerChoice = str | dict[str, Any] | None

_BUDGET_KEYS = ("bits", "max_memory", "candidates")
_LAYER_KEYS = (
    "weights",
    "group_size",
    "symmetric",
    "activations",
    "scale_bits",
    "method",
    "rotation",
    "low_rank",
    "column_scale",
    "zero_point",
)
#: keys that are stored only if they are not None, so that earlier versions can read configs that do not use them
_LATER_KEYS = frozenset(
    {"scale_bits", "method", "rotation", "low_rank", "column_scale", "zero_point", "fold", *_BUDGET_KEYS}
)
#: of the files, not of the choice
_OF_FILES = ("digests", "save_id")
_STORED_KEYS = ("quant_method", "format", "format_version", "tensors", "activation_modules", "budget", *_OF_FILES)


class QuantoConfig:
    """How a model is quantized.

    Args:
        weights: type of the weights: ``"int8"``, ``"int4"``, ``"nf4"``, ``"float8"`` (e4m3fn) ... (docs/types.md).
        activations: None, ``"int8"`` or ``"float8"``: inputs of quantized layers are quantized per token on the fly; or
            ``"nvfp4"``, ``"mxfp4"`` and other MX types: rounded in blocks, then multiplied as floats (docs/activations.md).
        modules_to_not_convert: modules left float. An entry matches a full dotted name, a parent's name, a leaf name or a
            glob; one that matches no module is an error. The library's default skips (lm_head ...) apply as well.
        group_size: number of adjacent weights of a row that share a scale; None: 64 for 4 to 7 bits, 32 below, one scale
            per row for 8 bits, 16 for NVFP4, 32 for MX types; -1: one scale per row. A size that does not divide a row is
            halved until it does.
        modules: options for single modules: glob on the dotted name -> type, None for float, or a dict with the keys
            ``weights``, ``group_size``, ``symmetric``, ``activations``, ``scale_bits``, ``method``, ``rotation``,
            ``low_rank``, ``column_scale``. The first match is used. A full name (no glob) also overrides the library's
            default skips: ``modules={"lm_head": "int8"}``.
        symmetric: codes without a shift; None: integers below 8 bits and unsigned ones have a shift, other types none.
        method: how scales are chosen, without data: ``"minmax"``, ``"mse"``, ``"weighted"``, ``"aligned"`` or ``"hqq"``;
            None: the most accurate one for the type as measured (docs/accuracy.md). Methods that need calibration samples
            are options of `requanto.quantize`.
        embeddings: quantize ``nn.Embedding`` tables too.
        lm_head: quantize the output embeddings too.
        convolutions: quantize Conv1d, Conv2d and Conv3d too.
        scale_bits: 4 to 8: bits in which the scale and the shift of a group are stored (docs/accuracy.md); None or 16: as
            floats.
        rotation: True, ``"hadamard"`` or the largest block (a power of two): rows are rotated by a block Hadamard matrix
            before rounding, and inputs are rotated alike. None: no rotation. ``"fold"``: the float model is rotated before
            its weights are rounded, at no cost at run time (docs/accuracy.md).
        low_rank: rank of a low-rank term, two thin matrices in addition to the codes, that corrects most of the rounding
            error; None: no term.
        column_scale: ``"mean"``, ``"std"`` or ``"root"``: weights are divided by a scale of each column before rounding, and
            inputs multiplied by it (docs/accuracy.md); True: the type's best one; False: no column scale; None: the type's
            default, which is none for 1 and 8 bits.
        zero_point: ``"integer"``: the shift of a group is stored as the code that stands for 0, in as many bits as the code
            of a weight (docs/accuracy.md); None or ``"float"``: as a float, or in ``scale_bits``.
        fold: column scales are put into the norms and layers before, where a trial shows that exact, so that they cost
            nothing at run time (docs/accuracy.md).
        default_skips: leave float what the library or this package skips by default. False clears that list.
        weights_dtype: Diffusers' name for ``weights``.
        bits, max_memory: with ``weights="auto"``, one of the two: a budget within which each layer's type is chosen
            (docs/accuracy.md). Bits per weight over all weights to quantize, including scales; or bytes of the whole model,
            ``"80MB"``.
        candidates: with ``weights="auto"``, the types to choose from: ``["int4:64", "int8:row"]``; None: all widths.

    Raises:
        TypeError: a keyword is unknown; the message names the nearest known one.
        ValueError: a type is unknown or a value is out of range.
    """

    def __init__(
        self,
        weights: str | qtype | None = None,
        activations: str | qtype | None = None,
        modules_to_not_convert: list[str] | str | None = None,
        group_size: int | None = None,
        modules: dict[str, LayerChoice] | None = None,
        symmetric: bool | None = None,
        embeddings: bool = False,
        lm_head: bool = False,
        convolutions: bool = False,
        default_skips: bool = True,
        scale_bits: int | None = None,
        rotation: bool | str | int | None = None,
        low_rank: int | None = None,
        column_scale: bool | str | None = None,
        zero_point: str | None = None,
        fold: bool | None = None,
        weights_dtype: str | qtype | None = None,
        method: str | None = None,
        bits: float | None = None,
        max_memory: int | str | None = None,
        candidates: list[str] | None = None,
        **unknown: Any,
    ) -> None:
        stored = {key: unknown.pop(key) for key in _STORED_KEYS if key in unknown}
        refuse_unknown(unknown, type(self).parameters(), "QuantoConfig", stored)
        if is_stored(weights_dtype):  # a copy of `weights`, which is the one that counts
            weights_dtype = None
        given, other = (
            None if value is None else checks.type_name(value, key)
            for key, value in (("weights", plain_type(weights)), ("weights_dtype", weights_dtype))
        )
        if given is not None and other is not None and given != other:
            raise ValueError(f"weights={weights!r} and weights_dtype={weights_dtype!r} differ; give one of them")
        self.quant_method = QuantizationMethod.QUANTO
        self.weights = given or other or "int8"
        self.activations = checks.activation_name(activations, "activations")
        self.modules_to_not_convert = checks.patterns(modules_to_not_convert, "modules_to_not_convert")
        self.group_size = checks.group_size_value(group_size, "group_size")
        chosen = checks.mapping(modules, "modules")
        self.modules = {pattern: _checked_choice(pattern, choice) for pattern, choice in chosen.items()}
        self.symmetric = checks.symmetric_value(symmetric, "symmetric")
        self.method = checks.method_name(method, "method")
        self.embeddings = checks.flag(embeddings, "embeddings")
        self.lm_head = checks.flag(lm_head, "lm_head")
        self.convolutions = checks.flag(convolutions, "convolutions")
        self.default_skips = checks.flag(default_skips, "default_skips")
        self.scale_bits = check_scale_bits(scale_bits)
        self.rotation: int | str | None = (
            FOLD if rotation == FOLD else check_rotation(checks.small(rotation, "rotation"))
        )
        self.low_rank = check_low_rank(checks.small(low_rank, "low_rank"))
        self.column_scale = check_column_scale(checks.small(column_scale, "column_scale"))
        self.zero_point = check_zero_point(checks.small(zero_point, "zero_point"))
        #: None where nothing is folded, and once it was
        self.fold: bool | None = None if fold is None else checks.flag(fold, "fold") or None
        #: name of a stored weight -> its spec (`requanto.checkpoint.format`); empty until a model was quantized
        self.tensors: dict[str, str] = checks.table(stored.get("tensors"), "tensors", "the description of a weight")
        #: name of a module that holds activation scales -> their type (`requanto.checkpoint.activation_table`)
        self.activation_modules: dict[str, str] = checks.table(
            stored.get("activation_modules"), "activation_modules", "a type"
        )
        #: name of a stored weight or module with activation scales -> digest (`requanto.checkpoint.digests`)
        self.digests: dict[str, str] = checks.digests(stored.get("digests"))
        #: True if several models (components of a pipeline) use this config: patterns may match in another. Not stored.
        self.shared = False
        #: None if the checkpoint was not written by Requanto
        self.format: str | None = checks.text_or_none(stored.get("format"), "format")
        self.format_version: int | None = stored.get("format_version")
        #: of the save that wrote the config (`requanto.checkpoint.save_id`); only while a checkpoint is loaded or saved
        self.save_id: str | bool | None = stored.get("save_id")
        if self.save_id is not False:
            checks.text_or_none(self.save_id, "save_id")
        check_method(self.method)
        for pattern in (None, *self.modules):
            self.choice_for(pattern)
        self.bits, self.max_memory = bits, max_memory
        self.candidates = checks.strings(candidates, "candidates")
        self._check_budget()
        #: result of a budget, with each layer's error (`requanto.budget.Choice.record`); None: no budget was given
        self.budget: dict[str, Any] | None = copy.deepcopy(checks.budget(stored.get("budget")))

    @classmethod
    def parameters(cls) -> tuple[str, ...]:
        """Keywords of the constructor."""
        return (
            "weights",
            "activations",
            "modules_to_not_convert",
            "group_size",
            "modules",
            "symmetric",
            "embeddings",
            "lm_head",
            "convolutions",
            "default_skips",
            "scale_bits",
            "rotation",
            "low_rank",
            "column_scale",
            "zero_point",
            "fold",
            "weights_dtype",
            "method",
            *_BUDGET_KEYS,
        )

    @property
    def weights_dtype(self) -> str:
        """``weights``, under Diffusers' name."""
        return self.weights

    def _check_budget(self) -> None:
        choices = [c if isinstance(c, str) else (c or {}).get("weights") for c in self.modules.values()]
        if AUTO in (self.weights, *choices):
            Limit.of(self.bits, self.max_memory)
            parse_candidates(self.candidates or ())
        elif self.bits is not None or self.max_memory is not None or self.candidates is not None:
            raise ValueError(
                f"bits, max_memory and candidates belong to weights='auto', found weights={self.weights!r} with "
                f"bits={self.bits!r}, max_memory={self.max_memory!r}, candidates={self.candidates!r}"
            )

    def resolve_budget(self, modules: dict[str, LayerChoice], budget: dict[str, Any]) -> None:
        """Replaces the budget by its result, a choice for every layer, so that reloading needs no budget."""
        kinds = [c["weights"] for c in modules.values() if isinstance(c, dict)]
        if self.weights == AUTO:
            self.weights = max(sorted(set(kinds)), key=kinds.count) if kinds else "int8"
        self.modules, self.budget = {**modules, **self.modules}, budget
        for pattern, choice in list(self.modules.items()):
            if (choice if isinstance(choice, str) else (choice or {}).get("weights")) == AUTO:
                del self.modules[pattern]
        self.bits = self.max_memory = self.candidates = None

    def record(self, tensors: dict[str, str], digests: Mapping[str, str] | None = None) -> None:
        """Records the specs of a model's quantized weights (`requanto.checkpoint.format`) in the config.

        Args:
            tensors: name -> spec.
            digests: of the tensors that are being saved; None while the model is in memory, where they may change.
        """
        self.tensors, self.format, self.format_version = tensors, FORMAT, format_version_of(tensors)
        self.digests = dict(digests or {})

    def choice_for(self, pattern: str | None) -> LayerOptions:
        """The options of layers that match ``pattern`` of ``modules``; None: of layers without a match."""
        options = {
            "weights": self.weights,
            "group_size": self.group_size,
            "symmetric": self.symmetric,
            "activations": self.activations,
            "scale_bits": self.scale_bits,
            "method": self.method,
            "rotation": None if self.rotation == FOLD else self.rotation,
            "low_rank": self.low_rank,
            "column_scale": self.column_scale,
            "zero_point": self.zero_point,
        }
        choice = self.modules[pattern] if pattern is not None else options
        if isinstance(choice, str):
            choice = {"weights": choice}
        options.update(choice or {})
        where = "method" if pattern is None else f"modules[{pattern!r}]['method']"
        kind = None if options["weights"] == AUTO else resolve_qtype(options["weights"])
        check_method(options["method"], kind, where)
        check_scale_bits(options["scale_bits"], where.replace("method", "scale_bits"), kind)
        if options["zero_point"] is not None and kind is not None and not has_whole_zeros(kind, options["symmetric"]):
            if pattern is None or (choice or {}).get("zero_point") is not None:
                raise ValueError(
                    f"{where.replace('method', 'zero_point')}='integer' needs a type with a shift, such as int4 without "
                    f"symmetric=True; found {kind.name}"
                )
            options["zero_point"] = None  # of the other layers
        return LayerOptions(**options)

    # ------------------------------------------------------------------ methods that the libraries call

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, from which :meth:`from_dict` makes an equal object.

        Of a quantized model, ``weights`` also says that Requanto is needed to load it; the attribute is the plain type.
        """
        values: dict[str, Any] = {"quant_method": self.quant_method.value}
        for key in self.parameters():
            if key != "weights_dtype" and (key not in _LATER_KEYS or getattr(self, key) is not None):
                values[key] = copy.deepcopy(getattr(self, key))
        if self.budget is not None:
            values["budget"] = copy.deepcopy(self.budget)
        if self.format is not None or self.tensors:
            values |= {
                "format": self.format or FORMAT,
                "format_version": self.format_version or format_version_of(self.tensors),
                "tensors": dict(self.tensors),
            }
            # What the libraries' own QuantoConfigs read: without Requanto they stop with this text.
            values |= {key: stored_text(self.weights) for key in ("weights", "weights_dtype")}
        if self.save_id is not None:
            values["save_id"] = self.save_id
        if self.activation_modules:
            values["activation_modules"] = dict(self.activation_modules)
        if self.digests:
            values["digests"] = dict(self.digests)
        return values

    def to_diff_dict(self) -> dict[str, Any]:
        """The entry of a model's config.json: all values, so that checkpoints do not depend on defaults of a version."""
        return self.to_dict()

    def to_json_string(self, use_diff: bool = True) -> str:
        """JSON text of :meth:`to_dict`."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def to_json_file(self, json_file_path: str) -> None:
        """Writes :meth:`to_json_string`."""
        with open(json_file_path, "w", encoding="utf-8") as file:
            file.write(self.to_json_string())

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The config that a dict describes. Keywords that name a known parameter replace the dict's value."""
        known = {key: kwargs.pop(key) for key in list(kwargs) if key in cls.parameters()}
        fields = {**config_dict, **known}
        refuse_unknown({key: fields[key] for key in ("self",) if key in fields}, cls.parameters(), "", config_dict)
        config = cls(**fields)
        return (config, kwargs) if return_unused_kwargs else config

    def update(self, **kwargs: Any) -> dict[str, Any]:
        """Sets known attributes; returns the unknown keywords."""
        known = {key: value for key, value in kwargs.items() if key in self.parameters()}
        if known:
            self.__init__(**{**self.to_dict(), **known})  # type: ignore[misc]
        return {key: value for key, value in kwargs.items() if key not in known}

    def __iter__(self) -> Any:
        """Makes ``dict(config)`` work, which Transformers calls to print a config."""
        yield from self.to_dict().items()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, QuantoConfig):
            return False
        own, others = ({k: v for k, v in c.to_dict().items() if k not in _OF_FILES} for c in (self, other))
        return own == others

    __hash__ = None  # type: ignore[assignment]  # mutable

    def __repr__(self) -> str:
        hidden = ("tensors", "quant_method", "budget", "weights_dtype", "digests")
        shown = {k: v for k, v in self.to_dict().items() if k not in hidden and v not in (None, {})}
        shown["weights"] = self.weights
        return f"QuantoConfig({', '.join(f'{k}={v!r}' for k, v in shown.items())})"


class LayerOptions:
    """The options for one layer, as arguments of `QTensor.quantize`."""

    def __init__(
        self,
        weights: str,
        group_size: int | None = None,
        symmetric: bool | None = None,
        activations: str | None = None,
        scale_bits: int | None = None,
        method: str | None = None,
        rotation: int | None = None,
        low_rank: int | None = None,
        column_scale: bool | str | None = None,
        zero_point: str | None = None,
    ) -> None:
        #: True while a budget has not chosen the type; qtype is int8 until then
        self.auto = weights == AUTO
        self.qtype = resolve_qtype("int8" if self.auto else weights)
        self.group_size: int | str | None = (
            "default" if group_size is None else None if group_size == -1 else group_size
        )
        self.symmetric = symmetric
        self.activations = None if activations is None else resolve_qtype(activations)
        self.scale_bits, self.rotation, self.low_rank = scale_bits, rotation, low_rank
        #: kind of column scale; False: none; None: the type's default
        self.column_scale = column_scale
        #: "integer": whole zero points
        self.zero_point = zero_point
        #: name of the scale search; None: the type's default
        self.method = method

    def __repr__(self) -> str:
        return f"LayerOptions({self.qtype.name}, group_size={self.group_size}, symmetric={self.symmetric})"


def refuse_unknown(
    unknown: dict[str, Any], known: tuple[str, ...], where: str, stored: Mapping[str, Any] | None = None
) -> None:
    for key in unknown:
        if stored:  # what a newer version wrote
            raise TypeError(
                f"quantization_config has the key {checks.shown(key)}, which this Requanto does not know. If the checkpoint "
                f"is not damaged, a newer version wrote it: pip install -U requanto. Known: "
                f"{', '.join((*known, *_STORED_KEYS))}"
            )
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise TypeError(f"{where} got an unknown keyword {key!r}{hint} Known: {', '.join(known)}")


def _checked_choice(pattern: str, choice: LayerChoice) -> LayerChoice:
    where = f"modules[{pattern!r}]"
    if choice is None:
        return None
    if isinstance(choice, (str, qtype)):
        return checks.type_name(choice, where)
    if not isinstance(choice, dict):
        raise ValueError(f"{where} must be a type, a dict or None, found {checks.shown(choice)}")
    refuse_unknown({k: v for k, v in choice.items() if k not in _LAYER_KEYS}, _LAYER_KEYS, where)
    checked = dict(choice)
    for key, check in _LAYER_CHECKS.items():
        if key in checked:
            checked[key] = check(checks.small(checked[key], f"{where}[{key!r}]"), f"{where}[{key!r}]")
    return checked


_LAYER_CHECKS: dict[str, Callable[[Any, str], Any]] = {
    "weights": checks.type_name,
    "activations": checks.activation_name,
    "group_size": checks.group_size_value,
    "symmetric": checks.symmetric_value,
    "method": checks.method_name,
    "scale_bits": check_scale_bits,
    "rotation": check_rotation,
    "low_rank": check_low_rank,
    "column_scale": check_column_scale,
    "zero_point": check_zero_point,
}
