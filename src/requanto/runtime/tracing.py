"""Whether operators run at once on numbers in memory, or something else becomes of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._guards import TracingContext
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def is_tracing() -> bool:
    """True in code that is being traced, and where operators run on fake tensors on its behalf.

    For the latter, `torch.compiler.is_compiling` says False up to torch 2.11 at least: F.linear of a tensor subclass is one
    node of the graph, and its ``__torch_function__`` runs as ordinary Python while the compiler asks for the result's shape.
    """
    return torch.compiler.is_compiling() or TracingContext.try_get() is not None


def has_numbers() -> bool:
    """True where operators run at once on memory that belongs to no graph: kept buffers and kernels may be used.

    False while something traces (torch.compile, torch.export, torch.jit.trace, make_fx, fake tensors), and inside
    torch.func's transforms, which keep what a derivative needs without asking for a gradient in the usual way.
    """
    return (
        not is_tracing()  # first: a compiler that reads this needs no more
        and not transformed()
        and torch._C._len_torch_dispatch_stack() == 0
        and not is_recorded()
    )


def wants_gradient(x: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """True where a product of x, and a bias, is to be differentiated; its quantized weight never is."""
    return torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))


def is_recorded() -> bool:
    """True while torch.jit.trace records operators."""
    return torch._C._get_tracing_state() is not None


@contextlib.contextmanager
def unrecorded() -> Iterator[None]:
    """For what depends on the weight alone: torch.jit.trace keeps it as a constant. It cannot record ``.view(dtype)``."""
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)


def transformed() -> bool:
    """True inside torch.func's transforms."""
    return torch._C._functorch.peek_interpreter_stack() is not None


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """For numbers that outlive whatever watches the call they are made in: inference mode, a gradient, fake tensors,
    torch.func's transforms."""
    with contextlib.ExitStack() as stack:
        if transformed():
            stack.enter_context(temporarily_clear_interpreter_stack())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch._C._DisableTorchDispatch())
        yield


def is_fake(tensor: torch.Tensor) -> bool:
    """True for tensors without numbers to read, such as those of a tracer."""
    return is_traceable_wrapper_subclass(tensor) or type(tensor) not in (torch.Tensor, torch.nn.Parameter)


@contextlib.contextmanager
def neutral() -> Iterator[None]:
    """`unwatched`, without a default device or autocast: for what outlives the call it is made in. Factories still want a
    dtype: a default one is the whole process's, and cannot be set aside."""
    with unwatched(), torch._C.DisableTorchFunction(), without_autocast(torch.device("cpu")):
        yield


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """For GEMMs and factorizations whose float32 is meant: autocast would round both sides to 16 bits."""
    on = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else contextlib.nullcontext()
