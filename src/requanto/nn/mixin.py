"""QModuleMixin: base of modules that round a float weight in each forward, or quantize activations."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from requanto.dtypes.qtypes import qtype, resolve_qtype
from requanto.nn.activation import QActivation, quantize_activation
from requanto.nn.ste import round_per_token, straight_through
from requanto.runtime.tracing import is_tracing
from requanto.scales import fit_group_size
from requanto.scales.columns import default_column_scale
from requanto.scales.optimizers import Optimizer, check_optimizer, quantize_as_quanto
from requanto.scales.order import inverse
from requanto.scales.quanto import group_size_rule, symmetric_codes
from requanto.tensor.qtensor import QTensor


class QModuleMixin:
    """Base of the quantized modules; must come before the float module class: ``class QLinear(QModuleMixin, nn.Linear)``.

    While the weight is float, each forward quantizes it, with a straight-through gradient, so that training uses the values
    that :meth:`freeze` will store. Activations, if they have a type:

    - before a :class:`requanto.Calibration`, inputs are quantized on the fly with one scale per token; outputs stay float;
    - afterwards inputs and outputs use the static ``input_scale`` and ``output_scale``; a scale of exactly 1 means "not
      calibrated". Outputs are then `QActivation` tensors, which the next module uses without quantizing again.

    Attributes:
        weight_qtype, activation_qtype: type of weight and activations, or None for float.
        weight_group_size, weight_symmetric: as in :func:`requanto.quantize`.
        weight_options: further keywords of `QTensor.quantize` (``scale_bits``, ``search``).
        optimizer: chooses scales; None: Requanto's search in float32.
        input_scale, output_scale: scalar buffers; exist if activations are quantized.
    """

    #: number of last axes that share one scale when inputs are quantized on the fly
    token_dims = 1
    #: True if forward, with a frozen weight, runs a GEMM that quantizes the input itself
    fuses_input = False
    #: False if activations stay float, or if streamlining found that only float operators consume the output
    quantizes_output = False
    #: cache of the quantized weight while `reuse_quantized` is on: an empty list until the first use; None if it is off
    _reused: list[QTensor] | None = None
    #: True if the weight is [in, out], as in GPT-2's Conv1D
    transposed_weight = False

    def __init__(
        self,
        *args: Any,
        weights: str | qtype | None = None,
        activations: str | qtype | None = None,
        optimizer: Optimizer | None = None,
        quantize_input: bool = False,
        device: torch.device | None = None,
        group_size: int | str | None = "default",
        symmetric: bool | None = None,
        **kwargs: Any,
    ) -> None:
        mro = type(self).__mro__
        if nn.Module not in mro:
            raise TypeError(f"{type(self).__name__}: a quantized module must inherit from a torch.nn.Module class")
        if mro.index(QModuleMixin) > mro.index(nn.Module):
            raise TypeError(f"{type(self).__name__}: QModuleMixin must come before the torch.nn.Module class")
        super().__init__(*args, device=device, **kwargs)
        self.weight_qtype = None if weights is None else resolve_qtype(weights)
        self.activation_qtype = None if activations is None else resolve_qtype(activations)
        if self.activation_qtype is not None and not self.activation_qtype.fits_activations:
            raise ValueError(
                f"activations are quantized to int8, float8, nvfp4 or an MX type, found {self.activation_qtype.name}"
            )
        self.weight_group_size = group_size
        self.weight_symmetric = symmetric
        self.weight_options: dict[str, Any] = {}
        self.optimizer = optimizer
        self.quantizes_input = bool(quantize_input)
        if optimizer is not None and self.weight_qtype is not None:
            check_optimizer(optimizer, self.weight_qtype)
        self.calibrated = False
        self._quantize_hooks: dict[str, Any] = {}
        if self.activation_qtype is not None:
            self._add_scales(device)
        elif self.weight_qtype is not None:
            # A layer with a hook keeps nn.TransformerEncoderLayer off its fast path, which would read the float weight.
            self._quantize_hooks["seen"] = self.register_forward_pre_hook(_nothing)

    def _add_scales(self, device: torch.device | None = None) -> None:
        weight = getattr(self, "weight", None)
        dtype = torch.float32 if weight is None else weight.dtype
        self.register_buffer("input_scale", torch.ones((), dtype=dtype, device=device))
        self.register_buffer("output_scale", torch.ones((), dtype=dtype, device=device))
        self.quantizes_output = True
        # Functions, not bound methods: the hooks of a copied module must not call methods of the original.
        self._quantize_hooks = {
            "input": self.register_forward_pre_hook(_quantize_input),
            "output": self.register_forward_hook(_quantize_output),
        }

    # ------------------------------------------------------------------ construction

    @classmethod
    def qcreate(
        cls,
        module: nn.Module,
        weights: qtype | None,
        activations: qtype | None = None,
        optimizer: Optimizer | None = None,
        device: torch.device | None = None,
    ) -> QModuleMixin | None:
        """A quantized module with the options of ``module``, without its parameters; None if nothing is to be quantized.

        Subclasses define it.
        """
        raise NotImplementedError(
            f"{cls.__name__} must define qcreate(module, weights, activations, optimizer, device)"
        )

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        weights: str | qtype | None = None,
        activations: str | qtype | None = None,
        optimizer: Optimizer | None = None,
    ) -> Any:
        """A quantized module that shares the parameters of ``module``; None if nothing is to be quantized."""
        weights = None if weights is None else resolve_qtype(weights)
        activations = None if activations is None else resolve_qtype(activations)
        qmodule = cls.qcreate(module, weights, activations, optimizer, device=torch.device("meta"))
        if qmodule is None:
            return None
        # After this only tensors that the float module lacks, the scales, are on the meta device.
        for name, parameter in module.named_parameters(recurse=False):
            setattr(qmodule, name, parameter)
        for name, buffer in module.named_buffers(recurse=False):
            qmodule.register_buffer(name, buffer, persistent=name not in module._non_persistent_buffers_set)
        weight = getattr(module, "weight", None)
        device = torch.device("cpu") if weight is None else weight.device
        for name in ("input_scale", "output_scale"):
            if name in qmodule._buffers:
                qmodule._buffers[name] = torch.ones((), dtype=qmodule._buffers[name].dtype, device=device)
        return qmodule.train(module.training)

    # ------------------------------------------------------------------ the weight

    @property
    def frozen(self) -> bool:
        """True if the weight is a QTensor."""
        return isinstance(self.weight, QTensor)

    @property
    def qweight(self) -> Any:
        """The weight for forward: the QTensor, or the rounded float weight with a straight-through gradient."""
        if self.weight_qtype is None or self.weight is None or self.frozen:
            return self.weight
        if self._reused is not None and not torch.is_grad_enabled():
            if not self._reused:
                self._reused.append(self.quantized(self.weight))
            return self._reused[0]
        return straight_through(self.weight, lambda weight: self.quantized(weight).dequantize())

    def reuse_quantized(self, reuse: bool) -> None:
        """Turns on or off that forwards without gradients reuse the quantized weight; it must not change meanwhile."""
        self._reused = ([] if self._reused is None else self._reused) if reuse else None

    def quantized(self, weight: torch.Tensor) -> QTensor:
        """``weight`` quantized with the options of this module."""
        name = getattr(self, "name", None) or type(self).__name__
        if self.optimizer is None:
            return QTensor.quantize(
                weight,
                self.weight_qtype,
                group_size=self.weight_group_size,
                symmetric=self.weight_symmetric,
                axis=0,
                transposed=self.transposed_weight,
                name=f"{name}.weight",
                **{"column_scale": "default", **self.weight_options},
            )
        shape = weight.mT.shape if self.transposed_weight else weight.shape
        group = None
        if self.weight_qtype.bits < 8:
            wanted = self.weight_group_size
            # With an optimizer everything is as in optimum-quanto, including the default group size.
            rule = wanted == "default"
            group = group_size_rule(shape) if rule else fit_group_size(wanted, shape[1:].numel(), name)
        return quantize_as_quanto(
            weight, self.weight_qtype, self.optimizer, group, transposed=self.transposed_weight, name=f"{name}.weight"
        )

    def freeze(self) -> None:
        """Replaces the float weight by a QTensor."""
        if self.weight_qtype is None or self.weight is None or self.frozen:
            return
        self.weight = nn.Parameter(self.quantized(self.weight), requires_grad=False)
        self.sync_activation()

    def sync_activation(self) -> None:
        """Sets the activation type of a frozen weight: inputs are quantized on the fly only without static scales."""
        if self.frozen:
            on_the_fly = self.quantizes_input and not self.calibrated
            self.weight.activation = self.activation_qtype if on_the_fly else None

    # ------------------------------------------------------------------ activations

    @property
    def input_column(self) -> torch.Tensor | None:
        """What the input is multiplied by before it is quantized: the weight's column scale ``[K]``; None: nothing."""
        if not self.fuses_input or self.weight_qtype is None or self.weight is None:
            return None
        if self.frozen:
            column, order = self.weight.column, self.weight.order
            return column if column is None or order is None else column.index_select(-1, inverse(order))
        asked = self.weight_options.get("column_scale")
        if asked is None:
            rows = self.weight.shape[-1] if self.transposed_weight else self.weight.shape[0]
            asked = default_column_scale(self.weight_qtype, rows)
        if self.optimizer is not None or not asked:
            return None
        if self._reused is None:
            return self.quantized(self.weight.detach()).column
        if not self._reused:
            self._reused.append(self.quantized(self.weight))
        return self._reused[0].column

    def quantize_input(self, input: torch.Tensor) -> torch.Tensor:
        """The input for forward: quantized, rounded, or unchanged."""
        if isinstance(input, QActivation):
            if input.qtype != self.activation_qtype:
                raise ValueError(
                    f"this module expects {self.activation_qtype.name} activations, found {input.qtype.name}: modules that "
                    f"follow one another must quantize activations to the same type"
                )
            return input if self.input_column is None else self.quantize_input(input.dequantize())
        if not self.quantizes_input or not input.is_floating_point():
            return input
        if self.frozen and self.fuses_input:
            return input  # the GEMM quantizes it, with the static scale or one per token
        column = self.input_column
        if column is not None:  # rounded as the GEMM of the frozen weight will do, then as x again for the float weight
            column = column.to(input.dtype)
            return self._rounded(input * column) / column
        if self.calibrated:
            return _quantized(input, self.activation_qtype, self.input_scale)
        return round_per_token(input, self.activation_qtype, self.token_dims)

    def _rounded(self, input: torch.Tensor) -> torch.Tensor:
        """The input rounded to the activation type, as floats, with a straight-through gradient."""
        if not self.calibrated:
            return round_per_token(input, self.activation_qtype, self.token_dims)
        quantized = _quantized(input, self.activation_qtype, self.input_scale)
        return quantized.dequantize() if isinstance(quantized, QActivation) else quantized

    def quantize_output(self, output: torch.Tensor) -> torch.Tensor:
        """The output for the next module: quantized if there is a static scale, else unchanged."""
        if not self.calibrated or not self.quantizes_output or isinstance(output, QActivation):
            return output
        return _quantized(output, self.activation_qtype, self.output_scale)

    def disable_output_quantization(self) -> None:
        """Stops quantizing outputs."""
        if self.quantizes_output:
            self.quantizes_output = False
            self._quantize_hooks.pop("output").remove()
            self.output_scale = torch.ones_like(self.output_scale)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)  # type: ignore[misc]
        if self.activation_qtype is not None:
            self.refresh_calibrated()

    def refresh_calibrated(self) -> None:
        """Updates `calibrated` and output quantization after the scale buffers were loaded."""
        self.calibrated = bool(self.input_scale != 1) or bool(self.output_scale != 1)
        if self.calibrated and bool(self.output_scale == 1):
            self.disable_output_quantization()
        self.sync_activation()

    def extra_repr(self) -> str:
        weights = "float" if self.weight_qtype is None else self.weight_qtype.name
        activations = "float" if self.activation_qtype is None else self.activation_qtype.name
        base = super().extra_repr()  # type: ignore[misc]
        return f"{base}, weights={weights}, activations={activations}, frozen={self.frozen}"


def _quantized(values: torch.Tensor, kind: qtype, scale: torch.Tensor) -> torch.Tensor:
    """``values`` as QActivation; in a compiled graph the rounded floats, from which the next module gets the same codes."""
    if not is_tracing():
        return quantize_activation(values, kind, scale)
    rounded = scale * symmetric_codes(values, kind.dtype, scale).to(scale.dtype)
    return values + (rounded - values).detach() if torch.is_grad_enabled() else rounded


def _nothing(module: QModuleMixin, args: tuple) -> None:
    """A hook that changes nothing."""


def _quantize_input(module: QModuleMixin, args: tuple) -> Any:
    return (module.quantize_input(args[0]), *args[1:]) if args else None


def _quantize_output(module: QModuleMixin, args: tuple, output: Any) -> Any:
    return module.quantize_output(output)
