"""Cached plans: a call of a launcher is recorded once, then repeated for other tensors by its launches alone.

    with record(x=x, bias=bias, constants=[qdata, scale]) as recording:
        y = wq_gemm(x, qdata, scale, None, bias, bits=4)
    plan = recording.plan(y)      # None, with the reason in recording.problem, if the call cannot be repeated
    y = plan(x, bias)             # for inputs of the same `traits`: allocates, and starts the kernels

So a launcher is written once, in the form that checks everything; what it checked, looked up and computed holds for every
call with inputs of the same shapes, strides, dtypes and alignment. Every tensor that a launch gets must be one of the
inputs, one of the constants (a weight's tensors, which the plan keeps) or one that the launcher allocated by `torch.empty`.
An operator of torch that computes something is not recorded: then there is no plan.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode

from . import config
from ._launch import Compiled, by_triton, compiled, known, local, settings, whole

#: ROCm compiles tensors of less than 2 GB differently.
_SIZE_MATTERS = torch.version.hip is not None
_aten = torch.ops.aten
_ALLOCATE = (_aten.empty.memory_format, _aten.new_empty.default, _aten.empty_like.default, _aten.empty_strided.default)


def traits(tensor: torch.Tensor | None) -> tuple:
    """What a plan depends on in an input, besides its values: inputs with equal traits can share a plan."""
    if tensor is None:
        return ()
    found = tensor.stride(), tensor.data_ptr() & 15, tensor.get_device(), tensor.dtype, tensor.shape
    return (*found, tensor.untyped_storage().size() < 2**31) if _SIZE_MATTERS else found


class _Step:
    """One launch. slots: `(place, source, dtype)` for each argument that changes; dtype None: that of the source."""

    __slots__ = ("args", "compiled", "constexprs", "grid", "kernel", "slots")

    def __init__(
        self, kernel: Any, grid: tuple, args: list, constexprs: dict, slots: list, found: Compiled | None
    ) -> None:
        self.kernel, self.grid, self.args, self.constexprs, self.slots = kernel, whole(grid), args, constexprs, slots
        self.compiled = found


class Plan:
    """The launches of one call, for other inputs of the same `traits`. Several threads may call it."""

    def __init__(
        self, steps: list[_Step], made: list[tuple], results: list[tuple], several: bool, device: torch.device,
        constants: list,
    ) -> None:  # fmt: skip
        self._steps, self._made, self._device = steps, made, device
        self._results, self._several = results, several
        self._constants = constants  # kept: the steps know their addresses
        self._settings, self._changes, self._driver = settings(), config.changes, triton.runtime.driver
        self.launches = len(steps)

    def holds(self) -> bool:
        """False once tiles were selected anew, since a tuned table was stored: then record the call again."""
        return self._changes == config.changes

    def __call__(self, *inputs: torch.Tensor | None) -> Any:
        """The result for these inputs, in the order in which `record` got them; a list if the call returned one."""
        if self._device.type in ("cuda", "xpu"):
            module = getattr(torch, self._device.type)
            if module.current_device() != self._device.index:  # Triton launches on the current device
                with module.device(self._device):
                    return self._run(inputs)
        return self._run(inputs)

    def _run(self, inputs: tuple) -> Any:
        values = [*inputs]
        for shape, dtype in self._made:
            values.append(torch.empty(shape, dtype=dtype, device=self._device))
        stream: int | None = None
        as_recorded = settings() == self._settings
        for step in self._steps:
            args = step.args.copy()
            for place, source, dtype in step.slots:
                value = values[source]
                value = value if dtype is None else value.view(dtype)
                descriptor = args[place]
                args[place] = value if descriptor is None else _with_base(descriptor, value)
            found = step.compiled
            if found is None or step.kernel.pre_run_hooks or not as_recorded:
                by_triton(step.kernel, step.grid, args, step.constexprs)
                continue
            if stream is None:
                driver = self._driver.active
                stream = driver.get_current_stream(driver.get_current_device())
            found.start(step.grid, stream, args)
        outs = [values[i] if dtype is None else values[i].view(dtype) for i, dtype in self._results]
        return outs if self._several else outs[0]


def _with_base(descriptor: Any, tensor: torch.Tensor) -> Any:
    """The tensor descriptor for another tensor."""
    found = copy.copy(descriptor)
    found.base = tensor
    return found


class Recording:
    """The launches of one call. problem: why there is no plan for it; empty if there is."""

    def __init__(self, inputs: dict[str, torch.Tensor | None], constants: list[torch.Tensor]) -> None:
        self.problem = ""
        self.inputs, self.constants, self.buffers = inputs, constants, []
        self.launches: list[tuple[Any, tuple, tuple, dict, Compiled | None]] = []

    def launch(self, kernel: Any, grid: tuple, args: tuple, constexprs: dict) -> None:
        """Launches, and adds it to the recording."""
        with torch._C._DisableTorchDispatch():  # the interpreter computes with operators of torch
            found = compiled(kernel, grid, args, constexprs)
            if found is not None:
                driver = triton.runtime.driver.active
                found.start(whole(grid), driver.get_current_stream(driver.get_current_device()), args)
            else:
                found = known(kernel, args, constexprs)  # now: later another device may be the current one
        self.launches.append((kernel, grid, args, constexprs, found))

    def plan(self, result: torch.Tensor | list[torch.Tensor]) -> Plan | None:
        """The plan for the recorded call, which returned `result`."""
        sources = [*self.inputs.values(), *self.buffers]
        kept = {tensor.untyped_storage()._cdata for tensor in self.constants}
        steps = []
        for kernel, grid, args, constexprs, found in self.launches:
            places, slots = list(args), []
            for place, arg in enumerate(args):
                tensor = getattr(arg, "base", arg) if not isinstance(arg, torch.Tensor) else arg
                if not isinstance(tensor, torch.Tensor):
                    continue
                source = self._source(tensor, sources)
                if source is not None:
                    dtype = None if tensor.dtype == sources[source].dtype else tensor.dtype
                    places[place] = None if tensor is arg else _with_base(arg, None)
                    slots.append((place, source, dtype))
                elif tensor.untyped_storage()._cdata not in kept:
                    self._fail(f"argument {kernel.fn.__name__}.{kernel.arg_names[place]} is a tensor made in the call")
            steps.append(_Step(kernel, grid, places, constexprs, slots, found))
        made: list[tuple] = [(buffer.shape, buffer.dtype) for buffer in self.buffers]
        outs = result if isinstance(result, list) else [result]
        results = [self._result(out, sources, made) for out in outs]
        if self.problem:
            return None
        return Plan(steps, made, results, outs is result, outs[0].device, self.constants)

    def _result(self, out: torch.Tensor, sources: list, made: list[tuple]) -> tuple[int | None, torch.dtype | None]:
        """Index and dtype (None: that of the source) of a result, which is then allocated in its own shape."""
        source = self._source(out, sources)
        if source is None or not out.is_contiguous() or out.nbytes != sources[source].nbytes:
            self._fail("the result is no tensor that the call allocated")
            return None, None
        dtype = None if sources[source].dtype == out.dtype else out.dtype
        mine = source - len(self.inputs)
        if 0 <= mine < len(made) and dtype is None:
            made[mine] = out.shape, made[mine][1]  # kernels see an address, no shape
        elif sources[source].shape != out.shape:
            self._fail("the result is a view of another shape")
        return source, dtype

    def _source(self, tensor: torch.Tensor, sources: list) -> int | None:
        """Index of the input or buffer that the tensor is, or is a view of from its start."""
        here = [
            i
            for i, one in enumerate(sources)
            if one is not None and one.untyped_storage()._cdata == tensor.untyped_storage()._cdata
        ]
        if not here:
            return None
        if len(here) > 1 or sources[here[0]].data_ptr() != tensor.data_ptr():
            self._fail("inputs share memory, or a kernel gets a view that starts elsewhere")
        return here[0]

    def _fail(self, problem: str) -> None:
        self.problem = self.problem or problem


class _Watch(TorchDispatchMode):
    """Notes the tensors that a call allocates, and any operator that computes something."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self.recording = recording

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _ALLOCATE and out.is_contiguous():
            self.recording.buffers.append(out)
        elif not all(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns):
            self.recording._fail(f"{func} runs in the call")
        return out


@contextmanager
def record(*, constants: Iterable[torch.Tensor | None] = (), **inputs: torch.Tensor | None) -> Iterator[Recording]:
    """Records the launches of one call, which runs as ever.

    inputs: the tensors that another call has others of. constants: tensors that stay the same, whose views the launcher may
    make.
    """
    recording = Recording(inputs, [tensor for tensor in constants if tensor is not None])
    local.recording = recording
    try:
        with _Watch(recording):
            yield recording
    finally:
        local.recording = None
