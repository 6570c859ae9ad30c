"""Registers the GPU implementations for activations that are quantized to 8 bits: int8 and float8.

In order of preference, before the weight-only ones (`requanto.linear.gpu.paths`):

    torch-scaled-mm     float8 x float8, many rows: the vendor's GEMM (`torch._scaled_mm`)
    torch-int-mm        int8 x int8: the vendor's GEMM (`torch._int_mm`), scaled by a second launch
    triton-scaled-mm    int8 x int8 and float8 x float8: one GEMM of 8-bit codes
    triton-w4a8         integer weights below 8 bits, or with groups, and int8 activations
    triton-rounded      other pairs of types: activations rounded to their codes, then weight-only

In all of them one launch quantizes x, per token or with a static scale. `requanto.linear.gpu.eight_bit_conditions` has the
conditions.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch

from requanto.dtypes.qtypes import qtype
from requanto.linear.gpu import eight_bit_conditions as rules
from requanto.linear.gpu import paths  # noqa: F401  (registered first: these are inserted before them)
from requanto.linear.gpu.layout import KernelParts, capturing, codes_of, kernel_parts
from requanto.linear.gpu.plans import recorded
from requanto.linear.registry import Gemm, Implementation, MakePlan, choose, problem_of, register
from requanto.runtime.tracing import outside_tracing
from requanto.tensor.qtensor import QTensor

logger = logging.getLogger(__name__)


def run_torch_scaled_mm(
    x: torch.Tensor,
    weight: QTensor,
    bias: torch.Tensor | None,
    activation: qtype | None = None,
    input_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """The vendor's GEMM of float8 codes, which adds scales and bias itself.

    ``use_fast_accum``: on sm_89 and sm_90 the matrix units' own sums, of about 14 bits, as in `scaled_mm`.
    """
    if not _is_aligned(codes_of(weight)[0]):
        return run_scaled_mm(x, weight, bias, activation, input_scale)
    return _torch_scaled(*quantized(x, activation, input_scale), weight, bias, x.dtype)


def _torch_scaled(
    codes: torch.Tensor, steps: torch.Tensor, weight: QTensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    return torch._scaled_mm(
        codes,
        codes_of(weight)[0].t(),
        steps.view(-1, 1),
        float32_scales(weight).view(1, -1),
        bias=None if bias is None else bias.to(dtype),
        out_dtype=dtype,
        use_fast_accum=True,
    )


def _is_aligned(codes: torch.Tensor) -> bool:
    """Whether the library takes these codes ``[N, K]``: base and rows of 16 bytes. Else one line is logged."""
    found = codes.data_ptr() % 16 == 0 and codes.stride(1) == 1 and codes.stride(0) % 16 == 0
    return found or _log_unaligned()


@functools.cache
def _log_unaligned() -> bool:
    logger.warning(
        "a float8 weight does not start at a multiple of 16 bytes, which torch._scaled_mm needs; triton-scaled-mm runs "
        "such weights. weight.contiguous() copies it to an aligned place."
    )
    return False


def float32_scales(weight: QTensor) -> torch.Tensor:
    """Scales of the rows, contiguous float32 ``[N]``: the stored ones, or a copy that the weight caches."""
    stored = weight.scale.reshape(-1)
    if stored.dtype == torch.float32:
        return stored.contiguous()
    # In a capture the copy becomes a part of the graph, which would not know that a cached one was dropped.
    if stored.is_inference() or capturing(stored.device):
        return stored.float()
    derived, key = weight._storage.derived, ("row scales", stored.data_ptr(), stored._version)
    found = derived.get(key)
    if found is None:
        from requanto_kernels._device import kept

        def copy() -> torch.Tensor:
            with outside_tracing():
                return stored.float()

        found = derived[key] = kept(copy, stored.device)
    return found


def run_torch_int_mm(
    x: torch.Tensor,
    weight: QTensor,
    bias: torch.Tensor | None,
    activation: qtype | None = None,
    input_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """The vendor's GEMM of int8 codes; its int32 result is scaled by one more launch."""
    return _torch_int(*quantized(x, activation, input_scale), weight, bias, x.dtype)


def _torch_int(
    codes: torch.Tensor, steps: torch.Tensor, weight: QTensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    from requanto_kernels import int_mm

    return int_mm(codes, codes_of(weight)[0], steps, weight.scale, bias, out_dtype=dtype)


def _torch_plan_of(gemm: Callable[..., torch.Tensor]) -> MakePlan:
    """Plans for one shape of x: a launch quantizes it, ``x * column`` if there is a column scale; then torch's operator."""

    def make_plan(weight: QTensor, rows: int, dtype: torch.dtype) -> Gemm | None:
        kind, length = weight.activation, weight.row_length
        if not _is_aligned(weight._storage.parts["qdata"]):
            return None

        def run(x: torch.Tensor, parts: KernelParts, bias: None) -> list[torch.Tensor]:
            return [*quantized(x.reshape(-1, length), kind, column=parts.column)]

        quantize = recorded(run, dtype)  # type: ignore[arg-type]

        def planned(x: torch.Tensor, weight: QTensor, bias: torch.Tensor | None) -> torch.Tensor:
            codes, steps = quantize(x, weight, None)
            with torch._C.DisableTorchFunctionSubclass():
                return gemm(codes, steps, weight, bias, dtype).view(*x.shape[:-1], -1)

        return planned

    return make_plan


def _scaled(
    codes: torch.Tensor, steps: torch.Tensor, parts: KernelParts, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """GEMM of 8-bit codes."""
    from requanto_kernels import scaled_mm

    return scaled_mm(codes, parts.codes, steps, parts.scale, bias, out_dtype=dtype)


def _w4a8(
    codes: torch.Tensor, steps: torch.Tensor, parts: KernelParts, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """GEMM of int8 activations and integer codes, with integer sums within each group."""
    from requanto_kernels import w4a8_gemm

    return w4a8_gemm(codes, steps, parts.codes, parts.scale, parts.shift, bias, out_dtype=dtype, **parts.how)


def _run_of(gemm: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`Implementation.run` in two launches: one quantizes x, the other is ``gemm(codes, steps, parts, bias, dtype)``."""

    def run(
        x: torch.Tensor,
        weight: QTensor,
        bias: torch.Tensor | None,
        activation: qtype | None = None,
        input_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return gemm(*quantized(x, activation, input_scale), kernel_parts(weight, x.dtype), bias, x.dtype)

    return run


run_scaled_mm, run_w4a8 = _run_of(_scaled), _run_of(_w4a8)


def _plan_of(gemm: Callable[..., torch.Tensor]) -> MakePlan:
    """Plans of two launches for one shape of x: one quantizes it, ``x * column`` if there is a column scale."""

    def make_plan(weight: QTensor, rows: int, dtype: torch.dtype) -> Gemm | None:
        kind = weight.activation

        def run(x: torch.Tensor, parts: KernelParts, bias: torch.Tensor | None) -> torch.Tensor:
            return gemm(*quantized(x, kind, column=parts.column), parts, bias, dtype)

        return recorded(run, dtype)

    return make_plan


def run_rounded(
    x: torch.Tensor,
    weight: QTensor,
    bias: torch.Tensor | None,
    activation: qtype | None = None,
    input_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rounds the activations to their codes, then runs the weight-only implementation."""
    from requanto_kernels import round_rows

    assert activation is not None
    x = round_rows(x, activation.dtype, static_scale=input_scale)
    return choose(problem_of(weight, x.dtype, x.shape[0])).implementation.run(x, weight, bias)


def make_plan_rounded(weight: QTensor, rows: int, dtype: torch.dtype) -> Gemm | None:
    """Plan of `run_rounded`: one launch more than that of the weight-only implementation."""
    from requanto_kernels import round_rows

    found, kind = choose(problem_of(weight, dtype, rows)).implementation, weight.activation
    inner = found.make_plan(weight, rows, dtype) if found.make_plan is not None else None
    if inner is None or kind is None:
        return None
    rounded = recorded(lambda x, parts, bias: round_rows(x, kind.dtype, column=parts.column), dtype)

    def gemm(x: torch.Tensor, weight: QTensor, bias: torch.Tensor | None) -> torch.Tensor:
        return inner(rounded(x, weight, None), weight, bias)

    return gemm


def quantized(
    x: torch.Tensor,
    kind: qtype | None,
    input_scale: torch.Tensor | None = None,
    column: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantizes x ``[..., K]``: its codes, and float32 scales ``[...]``, all of them the static one if there is one."""
    from requanto_kernels import quant_rows

    assert kind is not None
    return quant_rows(x, kind.dtype, static_scale=input_scale, column=column)


for _implementation in (
    Implementation(
        name="torch-scaled-mm",
        run=run_torch_scaled_mm,
        supports=rules.torch_float8,
        reason="many rows: the vendor's GEMM of float8 codes, torch._scaled_mm (threshold not measured)",
        make_plan=_torch_plan_of(_torch_scaled),
        takes_column=True,
    ),
    Implementation(
        name="torch-int-mm",
        run=run_torch_int_mm,
        supports=rules.torch_int8,
        reason="the vendor's GEMM of int8 codes, torch._int_mm, and one launch that scales it (threshold not measured)",
        make_plan=_torch_plan_of(_torch_int),
        takes_column=True,
    ),
    Implementation(
        name="triton-scaled-mm",
        run=run_scaled_mm,
        supports=rules.both_8_bit,
        reason="activations quantized in one launch, one GEMM of 8-bit codes",
        make_plan=_plan_of(_scaled),
        takes_column=True,
        plans_operators=True,
    ),
    Implementation(
        name="triton-w4a8",
        run=run_w4a8,
        supports=rules.int8_activations,
        reason="int8 activations times integer codes, exact sums within each group",
        make_plan=_plan_of(_w4a8),
        takes_column=True,
        plans_operators=True,
    ),
    Implementation(
        name="triton-rounded",
        run=run_rounded,
        supports=rules.rounded_activations,
        reason="no GEMM of these two types of codes here: activations are rounded to their codes, then weight-only",
        make_plan=make_plan_rounded,
        takes_column=True,
        plans_operators=True,
    ),
):
    register(_implementation, before="triton-dequantize")
