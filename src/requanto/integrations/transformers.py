"""The Transformers quantizer.

A float checkpoint: each planned weight is quantized when it is loaded, one tensor at a time, on its device. A checkpoint of
Requanto: the stored parts of each weight are joined into a QTensor. The model's modules are not replaced.
"""

from __future__ import annotations

import copy
import functools
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer, get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import get_module_from_name

from requanto.budget.models import budget_of
from requanto.checkpoint.activation_table import activation_table, add_activation_modules, apply_loaded_scales
from requanto.checkpoint.digests import DigestChecks, check_names, digests_of
from requanto.checkpoint.files import check_files
from requanto.checkpoint.foreign.directory import recipe_for
from requanto.checkpoint.foreign.source import FilesSource
from requanto.checkpoint.format import (
    PARTS,
    CheckpointError,
    check_version,
    flatten,
    parse_spec,
    rebuild,
    table_of,
)
from requanto.checkpoint.save_id import check_ids, metadata_for
from requanto.checkpoint.state_dict import SPEC, check_described
from requanto.config.config import QuantoConfig
from requanto.config.few_bits import warn_few_bits
from requanto.config.plan import PlannedWeight, plan
from requanto.integrations import experts
from requanto.integrations.accelerate import load_offloaded
from requanto.integrations.budget import resolve_for_transformers
from requanto.integrations.conversion import as_config, dequantize_, frozen_parameter
from requanto.integrations.folding import check_fold, quantize_planned_weights
from requanto.integrations.shards import local_quantized
from requanto.integrations.tensor_parallel import LOADING, finish_sharding, full_state_dict, place_shard
from requanto.integrations.transformers_foreign import ForeignLoad
from requanto.integrations.transformers_joining import Joined, JoinedState, StoredWeights, find_joined, plan_lines
from requanto.integrations.transformers_names import Renaming, StoredNames, saved_renaming
from requanto.nn.direct_linear import use_direct_linear
from requanto.nn.float_linear import use_float_linear
from requanto.scales.columns import default_column_scale
from requanto.tensor.dispatch import implements_function
from requanto.tensor.qtensor import QTensor
from requanto.tensor.values import ReadOnlyValues
from requanto.transforms import asks_for_fold, fold_planned

logger = logging.getLogger(__name__)


def register() -> None:
    """Registers our quantizer and config under the name "quanto", replacing the built-in ones."""
    auto.AUTO_QUANTIZER_MAPPING["quanto"] = RequantoHfQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING["quanto"] = QuantoConfig
    experts.register()


class RequantoHfQuantizer(HfQuantizer):
    """Quantizes weights while they are loaded; saves and loads Requanto's format."""

    requires_calibration = False
    quantization_config: QuantoConfig

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        # A copy: this model's table of weights is written into it, and the user may use the config for other models.
        super().__init__(copy.deepcopy(as_config(quantization_config)), **kwargs)
        self.planned: dict[str, PlannedWeight] = {}
        #: errors of single weights while loading, raised at the end; Transformers would only list them in its load report
        self.problems: dict[str, Exception] = {}
        #: leaf names of the model's parameters; the files' own names must not become patterns
        self.leaves: frozenset[str] = frozenset()
        #: checks of digests, which run while weights are loaded
        self.digests = DigestChecks(self.quantization_config.digests)
        #: weights sharded by tensor parallelism, and how (`integrations.tensor_parallel`)
        self.sharded: dict[str, Any] = {}
        #: names of the stored weights in the model that is loaded; None until its files are known
        self.names: StoredNames | None = None
        # Set by `integrations.transformers_parts`: arguments of from_pretrained, and a function that reads config.json.
        self.key_mapping: dict[str, str] | None = None
        self.resizes = False
        self.whole_config: Callable[[], dict[str, Any]] = dict
        #: weights of another shape, left out with ``ignore_mismatched_sizes``
        self.resized: set[str] = set()
        #: a checkpoint of another library (`integrations.transformers_foreign`), and ``state_dict`` of from_pretrained
        self.foreign: ForeignLoad | None = None
        self.given_state: Mapping[str, Any] | None = None
        #: stored weights that the library joins or splits, and their lines (`integrations.transformers_joining`)
        self.joined: list[Joined] = []
        self.stored_table: dict[str, str] = {}

    # ------------------------------------------------------------------ before the weights

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Raises for a checkpoint of an unknown format before anything is loaded."""
        if self.pre_quantized:
            config = self.quantization_config
            if config.format is None:
                raise CheckpointError(
                    "this checkpoint has quant_method 'quanto' but was not written by Requanto (its quantization_config "
                    "has no 'format'). To load a checkpoint of optimum-quanto, use "
                    "requanto.QuantizedModelForCausalLM.from_pretrained (or the class of another kind of model)."
                )
            check_version(config.format, config.format_version, "quantization_config")

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        model.__dict__[LOADING] = self
        self.leaves = frozenset(name.rpartition(".")[2] for name, _ in model.named_parameters(remove_duplicate=False))
        if self.pre_quantized:
            config, files = self.quantization_config, kwargs.get("checkpoint_files") or []
            if self.foreign is not None:
                self._open_foreign(model, self.foreign, files)
                return
            check_names(config.digests, config.tensors)
            check_files(config.tensors, files)
            check_ids(config.save_id, files)
            config.save_id = None
            for name, text in config.tensors.items():
                parse_spec(text, name)
            stored = FilesSource((file for file in files if str(file).endswith(".safetensors")), unique=False)
            if stored:
                self.names = self.stored_names(model, self._joined_keys(model, stored))
            add_activation_modules(
                model, config.activation_modules, config.tensors, files, self._local_modules, config.digests
            )
            return
        self.planned = plan(
            model,
            self.quantization_config,
            default_skips=get_keys_to_not_convert(model),
            output_embeddings=model.get_output_embeddings(),
            always_float=model._keep_in_fp32_modules or (),
            tied=model.all_tied_weights_keys,
        )
        warn_few_bits(planned.options.qtype for planned in self.planned.values())
        check_fold(self.quantization_config, self.planned, kwargs.get("device_map"))
        self.planned = resolve_for_transformers(
            model, self.quantization_config, self.planned, kwargs.get("checkpoint_files")
        )

    def _joined_keys(self, model: Any, state: Mapping[str, Any]) -> Iterable[str]:
        """Finds stored weights that the library joins or splits; returns the keys of the state dict after that."""
        transforms = get_model_conversion_mapping(model, self.key_mapping)
        self.joined = find_joined(model, state, Renaming(model, transforms))
        if not self.joined:
            return state
        self.stored_table = dict(self.quantization_config.tensors)
        stored = StoredWeights(state, self.stored_table, self.digests)
        plan_lines(self.joined, stored, model)
        taken = {stem for one in self.joined for stem, _ in one.stems}
        table = {name: text for name, text in self.stored_table.items() if name not in taken}
        table |= {name: text for one in self.joined for name, text in one.lines.items() if text is not None}
        self.quantization_config.record(table, self.quantization_config.digests)
        return JoinedState(stored, self.joined, model)

    def joined_state(self, model: Any, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """The loader's state dict, with stored weights joined or split as the library does it."""
        if not self.joined:
            return state
        return JoinedState(StoredWeights(state, self.stored_table, self.digests), self.joined, model)

    def _open_foreign(self, model: Any, foreign: ForeignLoad, files: list[str]) -> None:
        """Finds out what a checkpoint of another library holds, and puts it into this model's config."""
        config = self.quantization_config
        where = getattr(model.config, "name_or_path", "") or type(model).__name__
        conv1d = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
        renaming = Renaming(model, get_model_conversion_mapping(model, self.key_mapping)) if conv1d else None
        keys = foreign.open(
            files, self.given_state, where, lambda name: renaming is not None and renaming(name) in conv1d
        )
        recipe = recipe_for(foreign.found)
        config.weights = recipe.weights
        config.record(dict(recipe.tensors))
        config.activation_modules = recipe.activation_modules
        self.names = self.stored_names(model, self._joined_keys(model, keys))
        add_activation_modules(model, config.activation_modules, config.tensors, (), self._local_modules)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether the weight is to be quantized."""
        return param_name in self.planned and not asks_for_fold(self.quantization_config)

    def param_element_size(self, model: Any, param_name: str, param: torch.Tensor) -> float:
        """Returns the mean bytes per element of a weight, scales included; used for device maps."""
        text = self._spec(model, param_name) if self.pre_quantized else None
        if text is not None:
            spec = parse_spec(text, param_name)
            kind, group, bits, rank = spec["qtype"], spec["group_size"], spec["scale_bits"], spec["rank"]
            column, zeros = spec["column"], spec["zeros"]
            block, order = spec["scale_block"], spec["order"]
        elif param_name in self.planned:
            block, order = None, False
            options = self.planned[param_name].options
            kind, group, bits = options.qtype, options.group_size, options.scale_bits
            rank = options.low_rank or 0
            group = 32 if group == "default" else group
            zeros = options.zero_point is not None
            asked = options.column_scale
            planned = self.planned[param_name]
            rows = param.shape[-1] if planned.transposed else param.shape[planned.axis]
            column = bool(default_column_scale(kind, rows) if asked is None else asked)
        else:
            return param.element_size()
        element = param.element_size() if bits is None else bits / 8
        second = kind.bits / 8 if zeros else element
        overhead = (element + second) / group if isinstance(group, int) else 4 / max(1, param.shape[-1])
        if rank and param.dim() > 1:
            overhead += rank * param.element_size() * (1 / max(1, param.shape[-1]) + 1 / max(1, param.shape[-2]))
        if block is not None:  # of which the files of other programs have 16 bits, and two if there is a shift
            overhead += 2 * (2 if spec["affine"] else 1) / block
        if order and param.dim() > 1:
            overhead += 4 / max(1, param.shape[-2])
        if column and param.dim() > 1:
            overhead += param.element_size() / max(1, param.shape[-2])
        return kind.bits / 8 + overhead

    # ------------------------------------------------------------------ the weights

    def get_quantize_ops(self) -> ConversionOps:
        """Returns the operation that quantizes one float weight."""
        return _Quantize(self)

    @property
    def serialized_names(self) -> dict[str, list[str]]:
        """Maps the leaf name of each stored weight to patterns of the leaf names of its parts.

        Transformers takes both for regular expressions. Only leaf names that the model has are used, and escaped.
        """
        if not self.pre_quantized:
            return {}
        names = [*self.quantization_config.tensors, *(self.names.table_name if self.names is not None else ())]
        leaves = {name.rpartition(".")[2] for name in names} & self.leaves
        return {leaf: [f"{re.escape(leaf)}_{part}" for part in (*PARTS, SPEC)] for leaf in sorted(leaves)}

    def get_load_operations(self) -> dict[str, type[ConversionOps]]:
        """Returns the operation that joins stored parts into a weight."""
        return {"deserialize": _Rebuild}

    def get_weight_conversions(self) -> list[WeightConverter]:
        """Returns one converter per leaf name.

        Transformers 5.17 calls only this method; newer versions use `serialized_names` and `get_load_operations`.
        """
        return [WeightConverter(parts, leaf, [_Rebuild(self)]) for leaf, parts in self.serialized_names.items()]

    def _spec(self, model: Any, name: str) -> str | None:
        """Returns the stored line of a weight, or None."""
        found = self._stored_name(model, name)
        return None if found is None else self.quantization_config.tensors[found]

    def _stored_name(self, model: Any, name: str) -> str | None:
        """Returns the name under which the config describes a weight of this model, or None.

        Another class may have saved it: see `transformers_names`.
        """
        tensors = self.quantization_config.tensors
        if self.names is not None:
            found = self.names.table_name.get(name)
            return found if found in tensors else None
        # The keys of a state dict are known only when it is loaded: as the library names a base model and one with a head.
        prefix = getattr(model, "base_model_prefix", "")
        candidates = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
        return next((candidate for candidate in candidates if candidate in tensors), None)

    def stored_names(self, model: Any, keys: Iterable[str]) -> StoredNames:
        """Returns the names of the weights among the keys of a checkpoint."""
        transforms = get_model_conversion_mapping(model, self.key_mapping)
        whole = self.whole_config()
        saved = functools.partial(saved_renaming, whole)
        return StoredNames(model, self.quantization_config, keys, transforms, whole.get("architectures") or [], saved)

    def _local_modules(self, name: str) -> list[str]:
        found = None if self.names is None else self.names.local_module(name)
        return [name] if found is None else [found]

    # ------------------------------------------------------------------ after the weights

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        model.__dict__.pop(LOADING, None)
        if self.sharded:
            finish_sharding(model)
        self.problems |= {n: error for n, error in self.digests.finish().items() if n not in self.problems}
        if self.problems:
            raise _combined_error(self.problems)
        _drop_converters(model)
        config = self.quantization_config
        if not self.pre_quantized and asks_for_fold(config):
            fold_planned(model, config, self.planned)
            quantize_planned_weights(model, self.planned)
        if self.pre_quantized:
            self._check_complete(model)
            if config.activation_modules and self.sharded:
                raise NotImplementedError(
                    "tensor parallelism is not supported for a model with static activation scales"
                )
            apply_loaded_scales(model)
        config.record(self._own_table(model) if self.sharded else table_of(model.named_parameters()))
        self.names = None  # the table has this model's names from here on
        self.foreign, self.given_state, self.joined, self.stored_table = None, None, [], {}  # let go of the files
        experts.use_requanto_experts(model)
        if not self.sharded:
            use_float_linear(model)
            use_direct_linear(model)
        return model

    def _own_table(self, model: Any) -> dict[str, str]:
        """Returns the table under the names of this model, which another class may have saved."""
        if self.names is None:
            return self.quantization_config.tensors
        lines = ((name, self._spec(model, name)) for name, _ in model.named_parameters())
        return {name: text for name, text in lines if text is not None}

    def _check_complete(self, model: Any) -> None:
        """Raises if the files lack a weight that the table names. `check_loaded` finds what the files have."""
        found = table_of(model.named_parameters(remove_duplicate=False))
        names = dict(model.named_parameters(remove_duplicate=False))
        stored = () if self.names is None else {*self.names.targets, *self.names.table_name.values()}
        for name in self.quantization_config.tensors:
            if name in names and name not in found and name not in stored and local_quantized(names[name]) is None:
                raise CheckpointError(
                    f"{name} is quantized according to quantization_config, but no {name}_qdata was found in the files: "
                    f"a shard is missing or belongs to another checkpoint"
                )

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        if isinstance(dtype, str):  # save_pretrained turns config.dtype into a string
            dtype = getattr(torch, dtype.removeprefix("torch."))
        return dequantize_(model, dtype)

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Returns the flat state dict and the metadata of the files; updates the config's table."""
        tied = getattr(model, "all_tied_weights_keys", {})
        sharded = any(local_quantized(parameter) is not None for parameter in model.parameters())
        found = full_state_dict(model, self.sharded) if sharded else load_offloaded(model)
        state_dict = {k: v for k, v in found.items() if not (isinstance(v, QTensor) and k in tied)}
        config, flat = self.quantization_config, flatten(state_dict)
        if getattr(model.config, "quantization_config", None) is not config:  # somebody replaced the model's config
            model.config.quantization_config = config
        config.activation_modules = activation_table(model)
        config.record(table_of(state_dict.items()), digests_of(state_dict, config.activation_modules, flat))
        return flat, metadata_for(config)

    def is_serializable(self) -> bool:
        """Always True."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True: adapters can be trained on the quantized weights."""
        return True

    @property
    def is_compileable(self) -> bool:
        """True: torch.compile works without graph breaks."""
        return True


class _Operation(ConversionOps):
    """Base of our loading operations. The loader deep-copies them for every weight; all copies share one quantizer."""

    def __init__(self, hf_quantizer: RequantoHfQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: dict) -> _Operation:
        return type(self)(self.hf_quantizer)


class _Quantize(_Operation):
    """Quantizes one float weight, or those of the several that a stored one is split into."""

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], *, full_layer_name: str, missing_keys: set[str] | None = None, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        """Returns the quantized weights under their names; an error is recorded in ``problems``."""
        quantizer, result = self.hf_quantizer, {}
        for key, value in input_dict.items():
            name = full_layer_name if len(input_dict) == 1 else key
            weight = value[0] if isinstance(value, list) else value
            if name not in quantizer.planned:
                result[name] = weight
                continue
            try:
                tensor = quantizer.planned[name].quantize(weight, name)
            except ValueError as error:
                result |= _record_problem(quantizer, name, error, missing_keys)
            else:
                result |= _loaded(quantizer, kwargs.get("model"), name, tensor, missing_keys)
        return result


class _Rebuild(_Operation):
    """Joins the stored parts of one weight into a QTensor."""

    is_rebuild = True

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        *,
        model: Any,
        full_layer_name: str,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """Returns the QTensor under the weight's name; an error is recorded in ``problems``."""
        quantizer = self.hf_quantizer
        module, leaf = get_module_from_name(model, full_layer_name)
        try:
            text = quantizer._spec(model, full_layer_name)
            if text is None:
                raise CheckpointError(
                    f"{full_layer_name}: the files hold quantized parts that quantization_config.tensors does not "
                    f"describe; restore the config.json that was saved with them"
                )
            parts = {}
            for key, value in input_dict.items():
                name = key.rpartition(".")[2].removeprefix(f"{re.escape(leaf)}_")
                parts[name] = value[0] if isinstance(value, list) else value
            if SPEC in parts:  # a file of safetensors' or accelerate's own functions
                check_described(full_layer_name, parts.pop(SPEC), text)
            expected = getattr(module, leaf)
            checked = quantizer.digests.covers(quantizer._stored_name(model, full_layer_name))
            tensor = rebuild(full_layer_name, text, parts, expected.dtype, check_codes=not checked)
            if tensor.shape != expected.shape and quantizer.resizes:
                logger.warning(
                    "%s: the checkpoint holds shape %s, the model has %s; ignore_mismatched_sizes leaves it random",
                    *(full_layer_name, tuple(tensor.shape), tuple(expected.shape)),
                )
                quantizer.resized.add(full_layer_name)
                return {}
            if tensor.shape != expected.shape:
                raise CheckpointError(
                    f"{full_layer_name}: the checkpoint holds shape {tuple(tensor.shape)}, the model expects "
                    f"{tuple(expected.shape)}"
                )
        except CheckpointError as error:
            return _record_problem(quantizer, full_layer_name, error, missing_keys)
        quantizer.digests.add(full_layer_name, text, parts, quantizer._stored_name(model, full_layer_name))
        return _loaded(quantizer, model, full_layer_name, tensor, missing_keys)


def _loaded(
    quantizer: RequantoHfQuantizer, model: Any, name: str, tensor: QTensor, missing_keys: set[str] | None
) -> dict[str, torch.Tensor]:
    """Returns the parameters for the loader to set; none for a sharded weight, which is set here."""
    if name not in quantizer.sharded:
        return {name: frozen_parameter(tensor)}
    place_shard(model, name, tensor, quantizer.sharded[name])
    if missing_keys is not None:
        missing_keys.discard(name)
    return {}


def _record_problem(
    quantizer: RequantoHfQuantizer, name: str, error: Exception, missing_keys: set[str] | None
) -> dict[str, torch.Tensor]:
    """Records an error in ``problems``; it is raised when all weights are loaded."""
    quantizer.problems[name] = error
    if missing_keys is not None:
        missing_keys.discard(name)
    return {}


def _combined_error(problems: dict[str, Exception]) -> Exception:
    first = next(iter(problems.values()))
    more = f"\n(and {len(problems) - 1} more with errors)" if len(problems) > 1 else ""
    return type(first)(f"{first}{more}")


def _drop_converters(model: Any) -> None:
    """Removes weight converters from the model, because Transformers would reverse them when saving.

    Renamings are kept: they are reversed when saving and applied again when loading.
    """
    conversions = getattr(model, "_weight_conversions", None) or []
    model._weight_conversions = [c for c in conversions if isinstance(c, WeightRenaming)]


def attach_quantizer(model: Any, config: QuantoConfig | None = None) -> RequantoHfQuantizer:
    """Attaches a quantizer to a model quantized in place by `requanto.quantize`, as if Transformers had loaded it.

    Args:
        config: the config it was quantized with; None: a config with the most frequent type of its weights.
    """
    if config is None:
        kinds = [p.qtype.name for p in model.parameters() if isinstance(p, QTensor)]
        config = QuantoConfig(weights=max(set(kinds), key=kinds.count) if kinds else None)
        config.budget = budget_of(model)
    quantizer = RequantoHfQuantizer(config, pre_quantized=False)
    if getattr(model.config, "quantization_config", None) is not None:
        model.config = copy.deepcopy(model.config)  # a part of a quantized model, whose config it shares
    model.hf_quantizer, model.config.quantization_config = quantizer, quantizer.quantization_config
    model.is_quantized, model.quantization_method = True, quantizer.quantization_config.quant_method
    _drop_converters(model)
    experts.use_requanto_experts(model)
    return quantizer


def _hook_grouped_mm_fallback() -> None:
    """Makes Transformers' fallback operator for grouped experts call `grouped_linear` if the weight is a QTensor."""
    from transformers.integrations import moe  # noqa: F401  (defines the operator)

    from requanto.linear import grouped_linear

    def fallback(input: torch.Tensor, weight: QTensor, offs: torch.Tensor) -> torch.Tensor:
        return grouped_linear(input, weight.transpose(-1, -2), offs)

    packet = torch.ops.transformers.grouped_mm_fallback
    implements_function(packet, packet.default)(fallback)


_hook_grouped_mm_fallback()

# Transformers' initialization leaves tensors with this mark alone. A loaded weight has it, but rows of it, which some models
# zero after loading, do not: those of a quantized weight were loaded too, and cannot be written.
QTensor._is_hf_initialized = True  # type: ignore[attr-defined]
ReadOnlyValues._is_hf_initialized = True  # type: ignore[attr-defined]
