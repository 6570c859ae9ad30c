"""A float copy of a model on which transformations are tried; the model itself changes only when all is proven."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from requanto.methods.chains import find_lists
from requanto.methods.samples import Stop
from requanto.nn.mixin import QModuleMixin
from requanto.runtime.tracing import without_autocast
from requanto.tensor.qtensor import QTensor

logger = logging.getLogger(__name__)

#: Models of up to this many weights are copied in float64, larger ones in float32.
FLOAT64_WEIGHTS = 20_000_000


class Inexact(Exception):
    """A transformation that changes what the model computes; the message says which and where."""


@dataclass
class Part:
    """A block of the copy.

    Attributes:
        module: the block.
        name: its full name; "" is the whole model.
        inputs: arguments of its forward.
    """

    module: nn.Module
    name: str
    inputs: tuple[tuple, dict[str, Any]]


class Twin:
    """A copy of a float model in float32 or float64, with an input.

    Args:
        model: a float model, all of it in memory.
        inputs: arguments of its forward.

    Attributes:
        model: the copy.
        untied: names of parameters of the copy that shared a tensor in the original and no longer do.
    """

    def __init__(self, model: nn.Module, inputs: tuple[tuple, dict[str, Any]]) -> None:
        self.original, self.untied = model, set[str]()
        floats = [p for p in model.parameters() if p.is_floating_point()]
        count = sum(p.numel() for p in floats)
        wide = count <= FLOAT64_WEIGHTS or any(p.dtype == torch.float64 for p in floats)
        self.dtype = torch.float64 if wide else torch.float32
        logger.info(
            "%s is copied in %s to try folds: %.2f GB in addition to the model",
            *(type(model).__name__, str(self.dtype).removeprefix("torch."), count * self.dtype.itemsize / 1e9),
        )
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        _set_up(self.model)
        devices = {p.device for p in self.model.parameters()}
        one = next(iter(devices)) if len(devices) == 1 else torch.device("cpu")
        self.device = torch.device("cpu") if one.type == "mps" else one  # MPS has no float64
        self.model.to(self.device).to(self.dtype)
        self.inputs = self._converted(inputs, self.dtype)
        self._dtypes = {
            id(twin): parameter.dtype
            for (_, twin), (_, parameter) in zip(
                self.model.named_parameters(remove_duplicate=False),
                model.named_parameters(remove_duplicate=False),
                strict=True,
            )
        }
        self.names = {id(module): name for name, module in self.model.named_modules()}

    def stored(self, parameter: nn.Parameter, values: torch.Tensor) -> torch.Tensor:
        """Values of a parameter of the copy after rounding to the dtype of the original."""
        return values.to(self._dtypes[id(parameter)]).to(values.dtype)

    def run(self) -> list[torch.Tensor]:
        """Runs the copy; returns the float tensors of its output."""
        return self._run(self.model, *self.inputs)

    def _run(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> list[torch.Tensor]:
        args, kwargs = pytree.tree_map_only(torch.Tensor, torch.clone, (args, kwargs))
        with torch.no_grad(), without_autocast(self.device), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            try:
                leaves = pytree.tree_leaves(_plain(module(*args, **kwargs)))
            except Stop:
                return []
        return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]

    def check(self, before: list[torch.Tensor], what: str, reason: str = "") -> None:
        """Compares the output with an earlier one.

        Raises:
            Inexact: they differ by more than rounding.
        """
        tolerance = 1e-5 if self.dtype == torch.float64 else 1e-3
        after = self.run()
        error = difference(before, after)
        if not error <= tolerance:
            raise Inexact(
                f"{what} changes the model's output by {error:.2g} of its norm (rounding: below {tolerance:g}){reason}"
            )

    # ------------------------------------------------------------------ parts

    @contextlib.contextmanager
    def part(self, block: Part) -> Iterator[Callable[[], list[torch.Tensor]]]:
        """Gives a function that runs one block on its input in float64 (the whole model: in the copy's dtype)."""
        if block.module is self.model:
            yield self.run
            return
        block.module.double()
        try:
            yield lambda: self._run(block.module, *block.inputs)
        finally:
            block.module.to(self.dtype)

    def parts(self, holds: set[nn.Module]) -> list[Part]:
        """The blocks that hold some of the modules and that the input reaches, and last the whole model."""
        blocks = [
            block
            for _, members in find_lists(self.model, holds)
            for block in members
            if any(module in holds for module in block.modules())
        ]
        found: dict[nn.Module, Any] = {}

        def take(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if module not in found:
                found[module] = pytree.tree_map_only(
                    torch.Tensor, torch.clone, self._converted((args, kwargs), torch.float64)
                )

        hooks = [block.register_forward_pre_hook(take, with_kwargs=True) for block in blocks]
        try:
            self.run()
        finally:
            for hook in hooks:
                hook.remove()
        for block in blocks:
            if block not in found:
                logger.info("%s: the input of the trial does not reach it", self.names[id(block)])
        reached = [Part(block, self.names[id(block)], found[block]) for block in blocks if block in found]
        return [*reached, Part(self.model, "", self.inputs)]

    def _converted(self, inputs: Any, dtype: torch.dtype) -> Any:
        def convert(t: torch.Tensor) -> torch.Tensor:
            t = t.detach().to(self.device)
            return t.to(dtype) if t.is_floating_point() else t

        return pytree.tree_map_only(torch.Tensor, convert, inputs)

    # ------------------------------------------------------------------ the result

    def write_back(self) -> None:
        """Gives the original model the values of the copy, which is used up; all of them, or after an error none."""
        twins = dict(self.model.named_parameters(remove_duplicate=False))
        changed: list[tuple[nn.Parameter, torch.Tensor]] = []
        untied: list[tuple[nn.Module, str, nn.Parameter]] = []
        seen: set[int] = set()
        for name, parameter in self.original.named_parameters(remove_duplicate=False):
            if name not in self.untied and id(parameter) in seen:
                continue
            values = twins[name].data.to(parameter.device, parameter.dtype)
            twins[name].data = values.new_empty(0, dtype=self.dtype)  # frees the copy
            if not torch.isfinite(values).all():
                raise Inexact(f"{name} would overflow {str(parameter.dtype).removeprefix('torch.')}")
            if name in self.untied:
                parent, _, leaf = name.rpartition(".")
                fresh = nn.Parameter(values.clone(), requires_grad=parameter.requires_grad)
                untied.append((self.original.get_submodule(parent), leaf, fresh))
                continue
            seen.add(id(parameter))
            if not torch.equal(values, parameter.data):
                changed.append((parameter, values))
        old = [(parameter, parameter.data) for parameter, _ in changed]
        places = [(module, leaf, module._parameters[leaf]) for module, leaf, _ in untied]
        try:
            for parameter, values in changed:
                parameter.data = values
            for module, leaf, fresh in untied:
                module._parameters[leaf] = fresh
        except BaseException:
            for parameter, values in old:
                parameter.data = values
            for module, leaf, parameter in places:
                module._parameters[leaf] = parameter  # type: ignore[assignment]
            raise


def check_float(model: nn.Module) -> None:
    """Refuses a model that cannot be folded.

    Raises:
        ValueError: a weight is quantized, on the meta device (offloaded), or split over several processes.
    """
    for name, parameter in model.named_parameters():
        if isinstance(parameter, QTensor):
            raise ValueError(f"{name} is quantized; folding changes float weights, so fold before quantizing")
        if parameter.is_meta or isinstance(parameter, nn.parameter.UninitializedTensorMixin):
            raise ValueError(f"{name} is not in memory (meta or offloaded to disk), and folding runs the model")
        if hasattr(parameter, "_local_tensor"):
            raise ValueError(f"{name} is split over several processes (a DTensor); fold on one, and save the result")
    for name, module in model.named_modules():
        if isinstance(module, QModuleMixin) and module.weight_qtype is not None:
            raise ValueError(f"{name or type(module).__name__} is to be quantized already; fold before quantizing")
        if hasattr(module, "_hf_hook"):
            raise ValueError(
                "folding runs a copy of the model, which is not possible while accelerate moves its weights between "
                "devices: load it on one device (device_map='cuda' or 'cpu')"
            )


def difference(before: list[torch.Tensor], after: list[torch.Tensor]) -> float:
    """The largest relative difference (of norms) between pairs of tensors; NaN if a tensor holds NaN."""
    if len(before) != len(after) or any(a.shape != b.shape for a, b in zip(before, after, strict=True)):
        return float("inf")
    errors = [
        float((a - b).double().norm() / a.double().norm().clamp(min=1e-30)) for a, b in zip(before, after, strict=True)
    ]
    return float("nan") if any(e != e for e in errors) else max(errors, default=float("nan"))


def _set_up(model: nn.Module) -> None:
    """Turns off, in Transformers' models, the KV cache, and attention and experts that need 16-bit dtypes."""
    configs = {id(c): c for module in model.modules() if (c := getattr(module, "config", None)) is not None}
    for config in configs.values():
        if getattr(config, "use_cache", False):
            config.use_cache = False
        if getattr(config, "_experts_implementation", None) not in (None, "eager"):
            config._experts_implementation = "eager"
        if "flash" in str(getattr(config, "_attn_implementation", None)):
            config._attn_implementation = "eager"


def _plain(output: Any) -> Any:
    """A library's output object as a dict, if it is one that pytree does not know."""
    return dict(output) if hasattr(output, "items") and not isinstance(output, dict) else output
