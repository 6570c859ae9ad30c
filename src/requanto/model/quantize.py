"""quantize, freeze and quantization_map: optimum-quanto's three steps, in place on any torch model.

    model = ...                                            # float
    requanto.quantize(model, weights="int8")               # weights are float and rounded in each forward: train here
    requanto.freeze(model)                                 # weights become QTensor

`requanto.requantize` loads a saved model.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatch
from typing import Any, TypeVar

from torch import nn
from tqdm import tqdm

from requanto.budget.models import auto_limit, choose_in_memory
from requanto.checkpoint.digests import digest_of
from requanto.config.few_bits import warn_few_bits
from requanto.config.plan import parameter_holders
from requanto.dtypes.qtypes import qint8, qtype, resolve_qtype
from requanto.methods import find_method, quantize_with_samples
from requanto.methods.samples import Samples
from requanto.model.select import (
    check_patterns,
    chosen_modules,
    foldable_names,
    listed,
    nothing_chosen,
    planned_weights,
    restore_or_refuse,
)
from requanto.nn.mixin import QModuleMixin
from requanto.nn.registry import modules as qmodules
from requanto.nn.swap import quantize_in_place, restore_float_class
from requanto.scales.columns import best_column_scale, check_column_scale
from requanto.scales.compact import check_scale_bits, check_zero_point
from requanto.scales.correction import check_low_rank
from requanto.scales.optimizers import Optimizer, check_optimizer
from requanto.scales.rotation import FOLD, check_rotation
from requanto.scales.search import CALIBRATED, SEARCHES, check_method
from requanto.tensor.qtensor import QTensor
from requanto.transforms import fold_asked

Module = TypeVar("Module", bound=nn.Module)

#: Least number of weights for a progress bar: with fewer, the work takes less than a second or two.
PROGRESS_FROM = 100_000_000


def quantize(
    model: Module,
    weights: str | qtype | None = None,
    activations: str | qtype | None = None,
    optimizer: Optimizer | None = None,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    *,
    group_size: int | str | None = "default",
    symmetric: bool | None = None,
    modules: Mapping[str, str | qtype | None] | None = None,
    bits: float | None = None,
    max_memory: int | str | None = None,
    candidates: list[str] | None = None,
    method: str | None = None,
    calibration: Any = None,
    method_options: Mapping[str, Any] | None = None,
    resume: str | os.PathLike | None = None,
    progress: bool = True,
    scale_bits: int | None = None,
    rotation: bool | str | int | None = None,
    low_rank: int | None = None,
    column_scale: bool | str | None = None,
    zero_point: str | None = None,
    fold: bool = False,
    fold_inputs: Any = None,
) -> Module:
    """Turns a model's modules into quantized modules, in place.

    Linear layers, convolutions and GPT-2's Conv1D are quantized; LayerNorm if ``activations`` are; Embedding only if
    ``modules`` names it or it is the root. Weights stay float until :func:`freeze`: each forward rounds them, with a
    straight-through gradient.

    Module objects stay the same and only change their class, so ``model`` may also be a single ``nn.Linear``.

    Args:
        model: any module, also on the meta device.
        weights: ``"int2"``, ``"int4"``, ``"int8"``, ``"float8"`` ..., a qtype, or None: weights stay float; ``"auto"``:
            a type for each layer, chosen within ``bits`` or ``max_memory``.
        activations: ``"int8"``, ``"float8"``, or None. Quantized on the fly, per token, until `Calibration` sets static
            scales. Or ``"nvfp4"``, ``"mxfp4"`` and other MX types: rounded in blocks, always on the fly.
        optimizer: optimum-quanto's scales, e.g. `HqqOptimizer()`; None: Requanto's, chosen by ``method``.
        include, exclude: shell patterns on full dotted names; a module must match one of ``include``, if given, and none of
            ``exclude``.
        group_size: number of weights of a row that share a scale (below 8 bits); None: one scale per row. See
            `QTensor.quantize`.
        symmetric: codes around zero, without a shift; None: below 8 bits affine, else symmetric.
        modules: other types for some modules, ``{"*.mlp.*": "int4", "lm_head": None}``; the first matching pattern is used,
            and overrides include and exclude.
        bits, max_memory, candidates: the budget for ``weights="auto"``, as in `QuantoConfig`. The error of a layer is, with
            ``calibration``, that of the model's output on samples, else that of its weights.
        method: how scales are chosen: ``"minmax"``, ``"mse"``, ``"weighted"``, ``"aligned"``, ``"hqq"``, or None: the type's
            default. With ``calibration``, how codes are computed from samples: ``"gptq"`` ... (`requanto.methods`); the
            weights are then frozen already.
        calibration: samples: an iterable of the model's inputs, a function ``f(model)`` that runs the model, or a pipeline.
        method_options: options of the method.
        resume: directory for finished blocks, from which an interrupted run continues.
        progress: show a progress bar while samples run.
        scale_bits, rotation, low_rank, column_scale: storage of scales, rotation of rows, correction of errors, scales of
            columns; see `QTensor.quantize`. ``rotation="fold"``: the float model is rotated first, at no cost at run time.
        zero_point: ``"integer"``: whole zero points, see `QTensor.quantize`.
        fold: column scales (of kind ``column_scale``) are put into the norms and layers before, where a trial shows that
            exact, so that they cost nothing at run time.
        fold_inputs: inputs with which folds are tried, as ``calibration``; None: samples if there are some, else random
            tokens or pixels.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: a type is unknown; a pattern matches no module; no module is selected; a weight is already quantized to
            another type; the ``calibration`` samples reach no layer; no rotation can be folded exactly.
    """
    rotate_model, rotation = rotation == FOLD, None if rotation == FOLD else rotation
    limit = auto_limit(weights, bits, max_memory, candidates)
    kind = qint8 if limit is not None else None if weights is None else resolve_qtype(weights)
    activation = None if activations is None else resolve_qtype(activations)
    special = {p: None if v is None else resolve_qtype(v) for p, v in (modules or {}).items()}
    if kind is None and activation is None and not any(special.values()):
        raise ValueError("nothing to quantize: set weights=, activations= or modules=, e.g. weights='int8'")
    if activation is not None and not activation.fits_activations:
        raise ValueError(
            f"activations are quantized to int8, float8, nvfp4 or an MX type such as mxfp4, found {activation.name}"
        )
    if optimizer is not None:
        for asked in {kind, *special.values()} - {None}:
            check_optimizer(optimizer, asked)
    if calibration is None:
        check_method(method)
        for asked in {kind if limit is None else None, *special.values()} - {None}:
            check_method(method, asked)
    elif method in SEARCHES:
        raise ValueError(
            f"method={method!r} uses no samples: leave out calibration=, or use one of {', '.join(CALIBRATED)}"
        )
    options = weight_options(
        scale_bits=scale_bits,
        search=method if calibration is None else None,
        rotation=rotation,
        low_rank=low_rank,
        column_scale=column_scale,
        zero_point=zero_point,
    )
    refused = [name for name, value in options.items() if value is not False]
    if optimizer is not None and refused:
        raise ValueError(f"an optimizer's codes are optimum-quanto's, which does not support {', '.join(refused)}")
    include, exclude = listed(include), listed(exclude)
    named = list(model.named_modules())
    check_patterns({"include": include, "exclude": exclude, "modules": list(special)}, [name for name, _ in named])

    folded: set[str] = set()
    if optimizer is not None and (limit is not None or calibration is not None):
        raise ValueError(_SAMPLES_OR_NOT if limit is None else "optimizer= needs one type, not weights='auto'")
    chosen = list(chosen_modules(model, named, kind, special, include, exclude))
    # Checked before a fold changes the model, and read once: an iterator cannot be read again.
    samples = None if calibration is None else Samples(calibration)
    by = find_method("gptq") if samples is None else find_method(method or "gptq", method_options)
    if fold or rotate_model:
        best = {best_column_scale(one, scale_bits) for _, _, one in chosen if one is not None}
        folded = fold_asked(
            model,
            foldable_names(chosen),
            rotation=rotate_model,
            columns=fold,
            kind=column_scale,
            best=best if limit is None else (),
            inputs=samples if fold_inputs is None else fold_inputs,
        ).columns

    if limit is not None or samples is not None:
        planned = planned_weights(chosen, activation, group_size, symmetric, options)
        if not planned:
            raise nothing_chosen(model, named, include, exclude)
        for name in folded & planned.keys():
            planned[name].options.column_scale = False
    if limit is not None:
        undecided = {name for name, _, _ in chosen if not any(fnmatch(name, pattern) for pattern in special)}
        search = {key: value for key, value in options.items() if key == "search"}  # the plan has the others
        planned = choose_in_memory(model, planned, undecided, limit, candidates, samples, search, progress, by)
        if samples is None:
            for name, module, _ in chosen:
                choice = planned.get(f"{name}.weight" if name else "weight")
                if choice is not None:
                    o = choice.options
                    more = weight_options(
                        scale_bits=o.scale_bits,
                        search=o.method,
                        rotation=o.rotation,
                        low_rank=o.low_rank,
                        column_scale=False if f"{name}.weight" in folded else o.column_scale,
                        zero_point=o.zero_point,
                    )
                    _quantize_module(module, name, o.qtype, activation, None, o.group_size, o.symmetric, more)
            return model
    if samples is not None:
        quantize_with_samples(model, planned, samples, by, resume=resume, progress=progress)
        return model
    warn_few_bits((kind, *special.values()))
    touched = 0
    for name, module, asked in chosen:
        own = {**options, "column_scale": False} if f"{name}.weight" in folded else options
        if _quantize_module(module, name, asked, activation, optimizer, group_size, symmetric, own):
            touched += 1
    if not touched:
        raise nothing_chosen(model, named, include, exclude)
    return model


_SAMPLES_OR_NOT = (
    "method= and calibration= belong together: give the samples for the method, and no optimizer=, whose scales would not "
    "be used"
)


def _quantize_module(
    module: nn.Module,
    name: str,
    kind: qtype | None,
    activation: qtype | None,
    optimizer: Optimizer | None,
    group_size: int | str | None,
    symmetric: bool | None,
    options: Mapping[str, Any],
) -> bool:
    weight = module._parameters.get("weight")
    label = name or type(module).__name__
    if isinstance(weight, QTensor):
        if kind is None or weight.qtype == kind:
            if activation is None or getattr(module, "activation_qtype", weight.activation) == activation:
                return True
            raise ValueError(
                f"{label} is already frozen; set activations={activation.name} before freeze(), in the same call of "
                f"quantize() as the weights"
            )
        raise ValueError(
            f"{label} is quantized to {weight.qtype.name} already and cannot become {kind.name}: the float weights are "
            f"gone. Load the float model again and quantize that."
        )
    if isinstance(module, QModuleMixin):  # its weight is still float, so it can be quantized to another type
        restore_or_refuse(module, label)
    return quantize_in_place(module, kind, activation, optimizer, group_size, symmetric, name, options=options)


def freeze(model: nn.Module) -> None:
    """Replaces the float weights of quantized modules by QTensors, one at a time, in place.

    A weight that several modules share is quantized once and stays shared. A module without quantized activations gets its
    original float class back, since a QTensor needs no special module.

    Raises:
        ValueError: modules that share a weight have different options, or a weight contains NaN or Inf.
    """
    holders = parameter_holders(model)
    pending = [m for m in model.modules() if isinstance(m, QModuleMixin) and m.weight_qtype is not None]
    pending = [m for m in pending if m.weight is not None and not m.frozen]
    done: dict[int, tuple[QModuleMixin, nn.Parameter]] = {}
    keep: list[Any] = []  # keeps weights alive, since an id is only unique among live objects
    for module in progress(pending, "freezing", sum(m.weight.numel() for m in pending)):
        weight = module.weight
        if id(weight) in done:
            first, frozen = done[id(weight)]
            if _choice(first) != _choice(module):
                raise ValueError(
                    f"one weight is shared by {first.name!r} ({_choice(first)}) and {module.name!r} ({_choice(module)}): "
                    f"quantize both alike, or exclude one"
                )
            module.weight = frozen
        else:
            module.freeze()
            if not isinstance(module.weight, QTensor):
                raise TypeError(f"{type(module).__name__}.freeze left {module.name!r} float")
            others = [(m, leaf) for m, leaf in holders.get(id(weight), ()) if m is not module]
            for other, leaf in others:
                if not isinstance(other, QModuleMixin):
                    other._parameters[leaf] = module.weight
            if others:
                done[id(weight)] = (module, module.weight)
                keep.append(weight)
    for module in model.modules():
        if isinstance(module, QModuleMixin) and module.activation_qtype is None and module.weight_qtype is not None:
            restore_float_class(module)


def _choice(module: QModuleMixin) -> tuple:
    kind = None if module.weight_qtype is None else module.weight_qtype.name
    return kind, module.weight_group_size, module.weight_symmetric, module.weight_options


def quantization_map(model: nn.Module, digests: bool = False) -> dict[str, dict[str, Any]]:
    """The quantized types by module name, as plain JSON; :func:`requantize` needs it in addition to the tensors.

    Each entry has ``weights`` and ``activations`` (a type's name or ``"none"``), as in optimum-quanto, and ``group_size``,
    ``symmetric`` and further options if they apply. The key of a parameter not named ``weight`` is its full name.

    Args:
        model: a quantized model.
        digests: add a digest of each weight, which :func:`requantize` compares (docs/format.md).
    """
    found: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules():
        if isinstance(module, QModuleMixin):
            found[name] = _entry(module.weight, module.weight_qtype, module.activation_qtype, digests)
            if module.weight_qtype is not None and not module.frozen and module.weight_qtype.bits < 8:
                found[name] |= {"group_size": module.weight_group_size, "symmetric": module.weight_symmetric}
            if module.weight_qtype is not None and not module.frozen:
                found[name] |= module.weight_options
            continue
        for leaf, parameter in module._parameters.items():
            if isinstance(parameter, QTensor):
                key = name if leaf == "weight" else f"{name}.{leaf}".lstrip(".")
                found[key] = _entry(parameter, parameter.qtype, parameter.activation, digests)
    return found


def _entry(weight: Any, kind: qtype | None, activation: qtype | None, digests: bool) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "weights": "none" if kind is None else kind.name,
        "activations": "none" if activation is None else activation.name,
    }
    if isinstance(weight, QTensor) and weight.qtype.bits < 8:
        entry |= {"group_size": weight.group_size, "symmetric": not weight.affine}
    if isinstance(weight, QTensor) and weight.scale_bits is not None:
        entry |= {"group_size": weight.group_size, "scale_bits": weight.scale_bits}
    if isinstance(weight, QTensor) and weight.rotation is not None:
        entry["rotation"] = weight.rotation
    if isinstance(weight, QTensor) and weight.column is not None:
        entry["column_scale"] = True
    if isinstance(weight, QTensor) and weight.zeros:
        entry["zero_point"] = "integer"
    if isinstance(weight, QTensor) and weight.signed:
        entry["signed"] = True
    if isinstance(weight, QTensor) and weight.scale_block is not None:
        entry["scale_block"] = weight.scale_block
    if isinstance(weight, QTensor) and digests:
        entry["digest"] = digest_of(weight, activation)
    return entry


def weight_options(
    *,
    scale_bits: int | None = None,
    search: str | None = None,
    rotation: bool | str | int | None = None,
    low_rank: int | None = None,
    column_scale: bool | str | None = None,
    zero_point: str | None = None,
) -> dict[str, Any]:
    """Checks further keywords of `QTensor.quantize`, and returns those that are not None.

    Raises:
        ValueError: a value is out of range.
    """
    found = {
        "scale_bits": check_scale_bits(scale_bits),
        "search": check_method(search, where="search"),
        "rotation": check_rotation(rotation),
        "low_rank": check_low_rank(low_rank),
        "column_scale": check_column_scale(column_scale),
        "zero_point": check_zero_point(zero_point),
    }
    return {name: value for name, value in found.items() if value is not None}


def quantize_module(
    module: nn.Module,
    weights: str | qtype | None = None,
    activations: str | qtype | None = None,
    optimizer: Optimizer | None = None,
) -> Any:
    """The quantized counterpart of one module, which shares its parameters; None if its class has none."""
    qmodule_cls = qmodules.find(module)
    if qmodule_cls is None:
        return None
    return qmodule_cls.from_module(module, weights=weights, activations=activations, optimizer=optimizer)


def progress(items: list, what: str, size: int) -> Iterator[Any]:
    """Iterates over items, with a progress bar if they have many weights (``size``)."""
    return iter(tqdm(items, desc=what, unit="layer", disable=size < PROGRESS_FROM))
