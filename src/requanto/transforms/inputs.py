"""Inputs for trials: random token ids or pixels for a library's models, a random tensor for others."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from requanto.methods.samples import Samples, Stop

#: sequences and tokens of a trial's input
ROWS, LENGTH = 2, 12


def trial_inputs(model: nn.Module, inputs: Any = None) -> tuple[tuple, dict[str, Any]]:
    """Returns arguments of the model's forward, on its device.

    Args:
        model: the model.
        inputs: None: made here, from what the model says about its inputs. Else what `requanto.quantize` takes as
            ``calibration``, of which the first input is used.

    Raises:
        ValueError: the model does not say what its inputs are, or ``inputs`` does not run it.
    """
    if inputs is None:
        return (), _own_inputs(model)
    found: list[tuple[tuple, dict[str, Any]]] = []

    def take(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        found.append((args, kwargs))
        raise Stop

    hook = model.register_forward_pre_hook(take, with_kwargs=True)
    try:
        for _ in Samples(_first(inputs)).run(model):
            break
    except Stop:
        pass
    finally:
        hook.remove()
    if not found:
        raise ValueError("the inputs given for folding did not run this model")
    return found[0]


def _first(inputs: Any) -> Any:
    if isinstance(inputs, (torch.Tensor, Mapping, str)) or not isinstance(inputs, Iterable):
        return inputs
    return list(itertools.islice(inputs, 1))


def _own_inputs(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    main = getattr(model, "main_input_name", None)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    generator = torch.Generator().manual_seed(0)
    vocabulary = getattr(text, "vocab_size", None)
    if main == "input_ids" and isinstance(vocabulary, int):
        # Not the lowest and highest ids, which are often special tokens: padding, images.
        first, last = vocabulary // 8, max(vocabulary // 8 + 1, vocabulary // 2)
        found = {"input_ids": torch.randint(first, last, (ROWS, LENGTH), generator=generator, device="cpu").to(device)}
        if getattr(config, "is_encoder_decoder", False):
            found["decoder_input_ids"] = torch.randint(
                first, last, (ROWS, LENGTH), generator=generator, device="cpu"
            ).to(device)
        return found
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", 3)
    if main == "pixel_values" and isinstance(size, (int, tuple, list)):
        height, width = (size, size) if isinstance(size, int) else size
        return {
            main: torch.randn(ROWS, channels, height, width, generator=generator, dtype=torch.float32, device="cpu").to(
                device, dtype
            )
        }
    first_layer = next((m for m in model.modules() if type(m) is nn.Linear), None)
    if main is None and config is None and first_layer is not None:
        return {
            _only_argument(model.forward): torch.randn(
                ROWS, LENGTH, first_layer.in_features, generator=generator, dtype=torch.float32, device="cpu"
            ).to(device, dtype)
        }
    raise ValueError(
        f"{type(model).__name__} does not say what its inputs are, and a fold is found by running the model: give one "
        f"input to requanto.quantize, as in fold_inputs={{'pixel_values': ...}} or fold_inputs=lambda model: pipe(...)"
    )


def _only_argument(forward: Callable) -> str:
    names = [
        name
        for name, p in inspect.signature(forward).parameters.items()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if len(names) != 1:
        raise ValueError(
            f"a fold is found by running the model, whose forward takes {len(names)} arguments ({', '.join(names)}): give "
            f"one input, as in fold_inputs=[(x, y)]"
        )
    return names[0]
