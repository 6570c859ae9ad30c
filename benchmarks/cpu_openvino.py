"""A compressed weight in OpenVINO: a model of one multiplication, as its weight compression writes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import openvino as ov
import torch
from openvino import opset13 as ops

GROUP = 64


def compiled(whole: torch.Tensor, kind: str, threads: int) -> Callable[[Any], Any]:
    """A compiled x @ weight.T: int8 with one scale a row, int4 with a scale and zero point a group of 64."""
    rows, length = whole.shape
    bits, group = (8, length) if kind == "int8" else (4, GROUP)
    if length % group:
        raise ValueError(f"groups of {group} need a K that they divide, K is {length}")
    grouped = whole.float().numpy().reshape(rows, length // group, group)
    low, high = grouped.min(-1, keepdims=True), grouped.max(-1, keepdims=True)
    scale = (high - low) / (2**bits - 1)
    zero = np.clip(np.round(-low / scale), 0, 2**bits - 1)
    codes = np.clip(np.round(grouped / scale) + zero, 0, 2**bits - 1).astype(np.uint8)
    element = ov.Type.u8 if bits == 8 else ov.Type.u4
    weight = ops.convert(_constant(codes, element), "f16")
    weight = ops.subtract(weight, ops.convert(_constant(zero.astype(np.uint8), element), "f16"))
    weight = ops.multiply(weight, ops.constant(scale.astype(np.float16)))
    weight = ops.reshape(weight, np.array([rows, length]), False)
    x = ops.parameter([-1, length], np.float32)
    product = ops.matmul(x, ops.convert(weight, "f32"), False, True)
    model = ov.Model([product], [x])
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
    request = ov.Core().compile_model(model, "CPU", options).create_infer_request()

    def call(numbers: Any) -> Any:
        return request.infer([numbers], share_inputs=True, share_outputs=True)

    return call


def _constant(codes: Any, element: Any) -> Any:
    if element == ov.Type.u8:
        return ops.constant(codes)
    flat = codes.reshape(-1)
    packed = (flat[0::2] | flat[1::2] << 4).astype(np.uint8)
    return ops.constant(ov.Tensor(packed, list(codes.shape), element), shared_memory=False)
