"""Calls of the compiled CPU kernels, grouped in families.

Eager operators make several passes over a weight, a compiled kernel makes one. There are kernels for

* packed int4, int3 and int2: dequantize blocks to bfloat16 in oneDNN's layout;
* packed e4m3: the same, and GEMV (fused dequantize);
* int8 in oneDNN's blocked layout: the same two, from the bytes that oneDNN's int8 GEMM reads;
* int8 activations: quantize x (one call instead of six operators), scale the sums (one instead of three), and GEMV;
* plain int8, int4 and e4m3: dequantize to bfloat16, for weights that are not packed (`requanto.linear.cpu.dequantize`).

Their sources are in `cpu.aot.kernels`. Functions that return a function make the views of a weight's tensors once, for many
calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from requanto.linear.cpu import onednn_bf16, onednn_int8
from requanto.linear.cpu.aot import cache
from requanto.linear.cpu.aot.kernels import SOURCES, left_shifts, nibble_masks, nibble_units
from requanto.tensor.qtensor import QTensor

if TYPE_CHECKING:
    from requanto.linear.cpu.onednn_bf16 import BlockedWeight, Fill

#: Families of kernels, which are compiled together and fail together.
NIBBLES, FLOAT8, INT8, INT8_INT8 = "int4", "float8", "int8", "int8 x int8"
STORED_INT8, STORED_INT4, STORED_FLOAT8 = "stored int8", "stored int4", "stored float8"
_FAMILIES = {
    family: {name: SOURCES[name] for name in names}
    for family, names in {
        NIBBLES: ("nibbles",),
        FLOAT8: ("e4m3", "row"),
        INT8: ("int8", "int8-row"),
        INT8_INT8: ("rows-to-int8", "finished", "int8-int8-row"),
        STORED_INT8: ("stored-int8",),
        STORED_INT4: ("stored-int4",),
        STORED_FLOAT8: ("stored-e4m3",),
    }.items()
}
cache.families.update(_FAMILIES)


def kernels_for_this_cpu() -> dict[str, cache.Source]:
    """Sources of the kernels that GEMMs on this CPU may call, by name."""
    families = {STORED_INT8, STORED_INT4, STORED_FLOAT8}
    if onednn_bf16.works():
        families |= {NIBBLES, FLOAT8, INT8}
    if onednn_int8.works():
        families.add(INT8_INT8)
    return {name: source for family in _FAMILIES if family in families for name, source in _FAMILIES[family].items()}


def _kernel(name: str) -> cache.Kernel:
    return cache.kernel(name, SOURCES[name])


def ready(family: str) -> bool:
    """Loads the kernels of a family, compiling them if necessary; False if that fails (`aot.cache.ready`)."""
    return cache.ready(family, _FAMILIES[family])


def fill_nibbles(codes: torch.Tensor, groups: int, scales: Callable[[QTensor], torch.Tensor]) -> Fill:
    """Returns a function that dequantizes packed int4 blocks: ``(code - 8) * scale + zero point``.

    Args:
        codes: uint8 ``[blocks, K, 32]``, row r and row r + 32 of a block in one byte.
        groups: number of groups in a row.
        scales: ``scales(weight)`` returns int32 ``[blocks * groups, 1, 2, 32]``: a bfloat16 scale in the lower half of each
            word, the zero point in the upper half.
    """
    blocks, length, half = codes.shape
    pairs = length // groups // 2
    codes, shape = codes.view(-1, pairs, 2, half), (blocks * groups, pairs, 2 * half)
    run, masks, units = _kernel("nibbles").run, nibble_masks(), nibble_units()

    def fill(buffer: BlockedWeight, weight: QTensor) -> None:
        run([codes, masks, units, scales(weight), buffer.view(shape)])

    return fill


def fill_e4m3(codes: torch.Tensor, scale: torch.Tensor) -> Fill:
    """Returns a function that dequantizes e4m3 blocks.

    Args:
        codes: bytes ``[blocks, K, 64]``.
        scale: float32 ``[blocks, 64]``.
    """
    blocks, length, rows = codes.shape
    codes, scale = codes.view(blocks, -1, 2, rows), scale.view(blocks, 1, 1, rows)
    run, shape = _kernel("e4m3").run, (blocks, length // 2, rows)

    def fill(buffer: BlockedWeight, weight: QTensor) -> None:
        run([codes, scale, buffer.view(shape)])

    return fill


def e4m3_row(codes: torch.Tensor, scale: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns a GEMV: one row of x, float32 in any shape, times e4m3 -> float32 ``[blocks, 64]``.

    Args:
        codes: bytes ``[blocks, K, 64]``.
        scale: float32 ``[blocks * 64]``.
    """
    run, length, scale = _kernel("row").run, codes.shape[1], scale.view(len(codes), -1)
    return lambda x: run([x.contiguous().view(length, 1), codes, scale])[0]


def fill_int8(codes: torch.Tensor, scale: torch.Tensor) -> Fill:
    """Returns a function that dequantizes int8 blocks.

    Args:
        codes: int32 ``[blocks, K / 4, 64]``, four codes along K in each.
        scale: float32 ``[blocks, 64]``.
    """
    blocks, quads, rows = codes.shape
    codes, scale, shape = codes.view(blocks, quads, 1, rows), scale.view(blocks, 1, 1, rows), (blocks, quads, 2, rows)
    run, (even, odd) = _kernel("int8").run, left_shifts()

    def fill(buffer: BlockedWeight, weight: QTensor) -> None:
        run([codes, even, odd, scale, buffer.view(shape)])

    return fill


def int8_row(
    codes: torch.Tensor, scale: torch.Tensor, *, quantized: bool = False
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns a GEMV: one row of x, in any shape, times int8 as in `fill_int8` -> float32 ``[blocks, 4, 16]``.

    Args:
        quantized: True if x is bfloat16 and is to be quantized to int8; False if it is float32.
    """
    run, quads, scale = _kernel("int8-int8-row" if quantized else "int8-row").run, codes.shape[1], scale.view(-1, 4, 16)
    return lambda x: run([x.contiguous().view(quads, 4), codes, scale])[0]


def rows_to_int8(x: torch.Tensor, codes: torch.Tensor, steps: torch.Tensor) -> None:
    """Quantizes x to int8 with one scale per row.

    Args:
        x: bfloat16 ``[rows, K]``, contiguous.
        codes: output, codes + 128, uint8 ``[rows, K]``.
        steps: output, scales, float32 ``[rows, 1]``.
    """
    _kernel("rows-to-int8").run([x, codes, steps])


def finish(sums: torch.Tensor, steps: torch.Tensor, bias: torch.Tensor, out: torch.Tensor) -> None:
    """Computes ``out = sums * steps + bias`` in float32, rounded once.

    Args:
        sums: float32 ``[rows, N]``, contiguous.
        steps: scales of x, float32 ``[rows, 1]``.
        bias: float32 ``[N]``.
        out: output, bfloat16 ``[rows, N]``, contiguous.
    """
    _kernel("finished").run([sums, steps, bias, out])


def stored_int8(codes: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
    """Dequantizes plain int8: ``out = codes * scale``, rounded once.

    Args:
        codes: int8 ``[rows * groups, group_size]``, contiguous.
        scale: float32 ``[rows * groups, 1]``.
        out: output, bfloat16 of the shape of ``codes``, contiguous.
    """
    _kernel("stored-int8").run([codes, scale, out])


def stored_int4(codes: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, out: torch.Tensor) -> None:
    """Dequantizes plain int4: ``out = codes * scale - shift``, rounded once.

    Args:
        codes: uint8 ``[rows * groups, group_size / 2]``, two codes in each byte, contiguous.
        scale, shift: float32 ``[rows * groups, 1]``.
        out: output, bfloat16 ``[rows * groups, group_size]``, contiguous.
    """
    _kernel("stored-int4").run([codes, scale, shift, out.view(torch.int32)])


def stored_e4m3(codes: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
    """Dequantizes plain e4m3: ``out = codes * scale``.

    Args:
        codes: bytes ``[rows * groups, group_size]``, contiguous.
        scale: float32 ``[rows * groups, 1]``.
        out: output, float32 of the shape of ``codes``, contiguous.
    """
    _kernel("stored-e4m3").run([codes, scale, out])
