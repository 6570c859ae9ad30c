"""Kernels made by torch's compiler (`cpu.aot.cache`), for products that eager operators are slow at on a CPU.

Eager operators pass over the weight once each; compiled, it is read once and written once:

* int4, int3 and int2 in their packed form, some rows: blocks become bfloat16 in oneDNN's order, which then multiplies;
* e4m3, more than two rows: the same;
* e4m3, one or two rows of x: times x, nothing is written;
* int8 in oneDNN's blocked form: both of these, from the same bytes that oneDNN's own product reads;
* x that becomes int8, and int32 sums that become bfloat16: one call each in place of six operators and three;
* int8, int4 and e4m3 as they are stored, for weights that have no packed form (`requanto.linear.cpu.dequantize`).

What they compute is `cpu.aot.kernels`. A kernel here is bound to a weight: views are made once, not at each product.
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

#: Families, whose kernels are made, or fail, together.
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


def useful() -> dict[str, cache.Source]:
    """The kernels that products on this processor may call, by name."""
    families = {STORED_INT8, STORED_INT4, STORED_FLOAT8}
    if onednn_bf16.works():
        families |= {NIBBLES, FLOAT8, INT8}
    if onednn_int8.works():
        families.add(INT8_INT8)
    return {name: source for family in _FAMILIES if family in families for name, source in _FAMILIES[family].items()}


def _kernel(name: str) -> cache.Kernel:
    return cache.kernel(name, SOURCES[name])


def ready(family: str) -> bool:
    """Makes or loads the kernels of a family. False: they cannot be had (`requanto.linear.cpu.aot.cache.ready`)."""
    return cache.ready(family, _FAMILIES[family])


def fill_nibbles(codes: torch.Tensor, groups: int, scales: Callable[[QTensor], torch.Tensor]) -> Fill:
    """Makes ``(nibble - 8) * scale + zero point`` of packed blocks.

    Args:
        codes: uint8 ``[blocks, K, 32]``, row r and row r + 32 of a block in one byte.
        groups: of a row.
        scales: ``scales(weight)`` gives int32 ``[blocks * groups, 1, 2, 32]``, each a bfloat16 scale and above it the zero
            point.
    """
    blocks, length, half = codes.shape
    pairs = length // groups // 2
    codes, shape = codes.view(-1, pairs, 2, half), (blocks * groups, pairs, 2 * half)
    run, masks, units = _kernel("nibbles").run, nibble_masks(), nibble_units()

    def fill(buffer: BlockedWeight, weight: QTensor) -> None:
        run([codes, masks, units, scales(weight), buffer.view(shape)])

    return fill


def fill_e4m3(codes: torch.Tensor, scale: torch.Tensor) -> Fill:
    """Makes a weight of e4m3.

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
    """A row of x, float32 in any shape, times e4m3 ``[blocks, K, 64]``, scaled (float32 ``[blocks * 64]``):
    float32 ``[blocks, 64]``."""
    run, length, scale = _kernel("row").run, codes.shape[1], scale.view(len(codes), -1)
    return lambda x: run([x.contiguous().view(length, 1), codes, scale])[0]


def fill_int8(codes: torch.Tensor, scale: torch.Tensor) -> Fill:
    """Makes a weight of int8.

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
    """A row of x, in any shape, times int8 as in `fill_int8`, scaled: float32 ``[blocks, 4, 16]``.

    Args:
        quantized: x is bfloat16 and becomes int8 on the way; else it is float32.
    """
    run, quads, scale = _kernel("int8-int8-row" if quantized else "int8-row").run, codes.shape[1], scale.view(-1, 4, 16)
    return lambda x: run([x.contiguous().view(quads, 4), codes, scale])[0]


def rows_to_int8(x: torch.Tensor, codes: torch.Tensor, steps: torch.Tensor) -> None:
    """x as int8 codes with a scale a row.

    Args:
        x: bfloat16 ``[rows, K]``, contiguous.
        codes: uint8 ``[rows, K]``, codes + 128, written.
        steps: float32 ``[rows, 1]``, written.
    """
    _kernel("rows-to-int8").run([x, codes, steps])


def finish(sums: torch.Tensor, steps: torch.Tensor, bias: torch.Tensor, out: torch.Tensor) -> None:
    """``out = sums * steps + bias``, rounded once.

    Args:
        sums: float32 ``[rows, N]``, contiguous.
        steps: float32 ``[rows, 1]``.
        bias: float32 ``[N]``.
        out: bfloat16 ``[rows, N]``, contiguous, written.
    """
    _kernel("finished").run([sums, steps, bias, out])


def stored_int8(codes: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
    """``out = codes * scale``, rounded once.

    Args:
        codes: int8 ``[groups of all rows, group]``, contiguous.
        scale: float32 ``[groups of all rows, 1]``.
        out: bfloat16 like ``codes``, contiguous, written.
    """
    _kernel("stored-int8").run([codes, scale, out])


def stored_int4(codes: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, out: torch.Tensor) -> None:
    """``out = codes * scale - shift``, rounded once.

    Args:
        codes: uint8 ``[groups of all rows, group / 2]``, two codes in each, contiguous.
        scale, shift: float32 ``[groups of all rows, 1]``.
        out: bfloat16 ``[groups of all rows, group]``, contiguous, written.
    """
    _kernel("stored-int4").run([codes, scale, shift, out.view(torch.int32)])


def stored_e4m3(codes: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
    """``out = codes * scale``.

    Args:
        codes: bytes ``[groups of all rows, group]``, contiguous.
        scale: float32 ``[groups of all rows, 1]``.
        out: float32 like ``codes``, contiguous, written.
    """
    _kernel("stored-e4m3").run([codes, scale, out])
