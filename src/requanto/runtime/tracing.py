"""Checks whether operators run eagerly or are traced, and contexts that leave the caller's modes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._guards import _TLS, TracingContext
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_functorch_level = torch._C._functorch.peek_interpreter_stack
_dispatch_modes = torch._C._len_torch_dispatch_stack
_tracing_state = torch._C._get_tracing_state


def is_tracing() -> bool:
    """True while a compiler traces, also while it runs operators on fake tensors to find a result's shape.

    In the second case `torch.compiler.is_compiling` returns False (up to torch 2.11 at least): F.linear of a tensor subclass
    is one node of the graph, and its ``__torch_function__`` runs as ordinary Python.
    """
    return torch.compiler.is_compiling() or TracingContext.try_get() is not None


def runs_eagerly() -> bool:
    """True where operators run at once on real memory, so that scratch buffers and kernels can be used.

    False under tracing (torch.compile, torch.export, torch.jit.trace, make_fx, fake tensors), and inside torch.func's
    transforms and forward-mode derivatives, which need every operator without setting requires_grad.

    It runs before every GEMM, so it reads what `is_tracing`, `in_functorch_transform` and `in_jit_trace` read without their
    calls.
    """
    return (
        not torch.compiler.is_compiling()  # first: Dynamo then traces nothing else of this function
        and _TLS.__dict__.get("tracing_context") is None  # `TracingContext.try_get` takes 0.4 us
        and forward_ad._current_level < 0
        and _functorch_level() is None
        and _dispatch_modes() == 0
        and _tracing_state() is None
    )


def needs_gradient(x: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """True where autograd records a GEMM of x and bias. A quantized weight itself has no gradient."""
    return torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))


def in_jit_trace() -> bool:
    """True while torch.jit.trace records operators."""
    return torch._C._get_tracing_state() is not None


@contextlib.contextmanager
def jit_trace_paused() -> Iterator[None]:
    """Hides operators from torch.jit.trace, which stores their result as a constant; for values of the weight alone.

    torch.jit.trace cannot record ``.view(dtype)``.
    """
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)


def in_functorch_transform() -> bool:
    """True inside torch.func's transforms, and inside ``torch.autograd.forward_ad.dual_level``."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


@contextlib.contextmanager
def outside_tracing() -> Iterator[None]:
    """Runs operators outside the caller's inference mode, autograd, dispatch modes (fake tensors) and torch.func transforms.

    For tensors that outlive the call in which they are made.
    """
    with contextlib.ExitStack() as stack:
        if in_functorch_transform():
            stack.enter_context(temporarily_clear_interpreter_stack())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch._C._DisableTorchDispatch())
        yield


def is_fake(tensor: torch.Tensor) -> bool:
    """True for tensors whose values cannot be read, such as fake tensors."""
    return is_traceable_wrapper_subclass(tensor) or type(tensor) not in (torch.Tensor, torch.nn.Parameter)


_no_dispatch = torch.Tensor.__torch_dispatch__


def is_wrapper(tensor: torch.Tensor | None) -> bool:
    """True for tensors whose class computes operators itself, such as DTensor and fake tensors: they have no memory."""
    return tensor is not None and type(tensor).__torch_dispatch__ is not _no_dispatch


@contextlib.contextmanager
def without_ambient_state() -> Iterator[None]:
    """`outside_tracing`, also without the caller's default device and autocast; for tensors that are cached.

    Factory functions still need an explicit dtype: the default dtype is global and stays in effect.
    """
    with outside_tracing(), torch._C.DisableTorchFunction(), without_autocast(torch.device("cpu")):
        yield


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Turns autocast off for ``device``: for GEMMs and factorizations that must run in float32."""
    on = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else contextlib.nullcontext()
