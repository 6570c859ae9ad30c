"""Runs two models of one architecture at the same time and compares their outputs layer by layer.

The first model runs in a separate thread and waits at every layer until the second model has reached it, so that only one
layer's output of each model is in memory.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

#: seconds between two checks of whether the other model still runs
_POLL = 0.05


class _Stopped(Exception):
    """Ends the first model's run because the second has ended."""


class Lockstep:
    """Runs two models and calls ``observe`` with every pair of layer outputs.

    Args:
        pairs: name -> (layer of the first model, same layer of the second).
        observe: called with (name, output of the first, output of the second), in the caller's thread.
    """

    def __init__(
        self, pairs: Mapping[str, tuple[nn.Module, nn.Module]], observe: Callable[[str, Tensor, Tensor], None]
    ) -> None:
        self.pairs, self.observe = pairs, observe
        self._queue: queue.Queue[tuple[str, Tensor]] = queue.Queue(maxsize=1)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._failed: BaseException | None = None
        self._result: Any = None

    def run(self, first: Callable[[], Any], second: Callable[[], Any]) -> tuple[Any, Any]:
        """Calls both functions without gradients; returns (result of the first, result of the second).

        Raises:
            ValueError: the models do not call the same layers in the same order.
            Exception: raised by one of the calls.
        """
        hooks = []
        for name, (one, other) in self.pairs.items():
            hooks.append(one.register_forward_hook(self._sender(name)))
            hooks.append(other.register_forward_hook(self._receiver(name)))
        self._stop.clear()
        self._failed, self._result, self._queue = None, None, queue.Queue(maxsize=1)
        self._thread = threading.Thread(target=self._first, args=(first,), name="requanto-lockstep", daemon=True)
        self._thread.start()
        try:
            with torch.inference_mode():
                answer = second()
            self._finish()
        finally:
            self._stop.set()
            self._thread.join()
            for hook in hooks:
                hook.remove()
        if self._failed is not None:
            raise self._failed
        return self._result, answer

    def _first(self, call: Callable[[], Any]) -> None:
        try:
            with torch.inference_mode():
                self._result = call()
        except _Stopped:
            pass
        except BaseException as error:
            self._failed = error

    def _finish(self) -> None:
        """Waits for the first model; raises if it still produces layer outputs after the second has ended."""
        thread = self._thread
        while thread is not None and thread.is_alive():
            thread.join(_POLL)
            if not self._queue.empty():
                name, _ = self._queue.get()
                raise ValueError(
                    f"the models do not run the same layers: the first one is at {name}, but the second one has finished"
                )

    def _sender(self, name: str) -> Callable:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            tensor = first_tensor(output)
            if tensor is None or threading.current_thread() is not self._thread:
                return
            while not self._stop.is_set():
                try:
                    return self._queue.put((name, tensor), timeout=_POLL)
                except queue.Full:
                    continue
            raise _Stopped

        return hook

    def _receiver(self, name: str) -> Callable:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            tensor = first_tensor(output)
            if tensor is None or threading.current_thread() is self._thread:
                return
            found, theirs = self._next(name)
            if found != name or theirs.shape != tensor.shape:
                raise ValueError(
                    f"the models do not run the same layers: the first one is at {found} {tuple(theirs.shape)}, the "
                    f"second one at {name} {tuple(tensor.shape)}"
                )
            self.observe(name, theirs, tensor)

        return hook

    def _next(self, name: str) -> tuple[str, Tensor]:
        while True:
            try:
                return self._queue.get(timeout=_POLL)
            except queue.Empty:
                if self._thread is None or self._thread.is_alive() or not self._queue.empty():
                    continue
                if self._failed is not None:
                    raise self._failed from None
                raise ValueError(
                    f"the models do not run the same layers: the first one has finished, but the second one is at {name}"
                ) from None


def first_tensor(output: Any) -> Tensor | None:
    """Returns a layer's output, or the first of several outputs, if it is a float tensor; else None."""
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    return output if isinstance(output, Tensor) and output.is_floating_point() else None
