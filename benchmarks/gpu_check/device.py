"""The device's description, its two ceilings, and the vendor's rates for codes of 8 bits."""

from __future__ import annotations

import platform
import sys
from typing import Any

import torch
import triton

from gpu_check.timing import time_calls
from gpu_check.weights import Place

#: Bytes that are copied, rows of the square products.
COPY_BYTES, SQUARE = 4 << 30, 8192


def describe(place: Place) -> dict[str, Any]:
    """What runs the cases: hardware and versions."""
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "gpu": "none: a dry run, its times mean nothing",
    }
    if place.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        major, minor = torch.cuda.get_device_capability()
        found |= {
            "gpu": properties.name,
            "capability": f"{major}.{minor}",
            "multiprocessors": properties.multi_processor_count,
            "l2": getattr(properties, "L2_cache_size", 0),
            "memory": properties.total_memory,
            "cuda": torch.version.cuda or torch.version.hip,
        }
    try:
        import transformers

        found["transformers"] = transformers.__version__
    except Exception as error:  # models are then rows with a fault
        print(f"transformers: {type(error).__name__}: {error}", file=sys.stderr)
    return found


def ceiling(case: dict[str, Any], place: Place) -> dict[str, Any]:
    """``rate``: bytes a second, read and written, of a large copy; operations a second of a large product of random data."""
    what, side = case["op"], 64 if place.dry else SQUARE
    if what == "copy":
        size = 1 << 16 if place.dry else COPY_BYTES
        a = torch.randint(0, 256, (size,), dtype=torch.uint8, device=place.device)
        b = torch.empty_like(a)
        timing = time_calls([lambda: b.copy_(a)] * 2, place.device)
        return timing.row() | {"rate": 2 * size / timing.us * 1e6}
    x, w = (torch.randn(side, side, device=place.device, dtype=torch.float32) for _ in range(2))
    if what == "bf16":
        x, w = x.to(place.dtype), w.to(place.dtype)
        timing = time_calls([lambda: x @ w.t()] * 4, place.device)
    elif what == "int8":
        x, w = ((t * 30).clamp(-127, 127).to(torch.int8) for t in (x, w))
        timing = time_calls([lambda: torch._int_mm(x, w.t())] * 4, place.device)
    else:
        x, w = (t.to(torch.float8_e4m3fn) for t in (x, w))
        ones = torch.ones(side, 1, dtype=torch.float32, device=place.device)
        timing = time_calls(
            [lambda: torch._scaled_mm(x, w.t(), ones, ones.t(), out_dtype=place.dtype)] * 4, place.device
        )
    return timing.row() | {"rate": 2 * side**3 / timing.us * 1e6}
