"""Quantized weights as initializers, and the nodes that dequantize them.

The initializers have the names of the checkpoint format (``layers.0.weight_qdata``, ``_scale``, ``_shift`` ...).
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import torch

from requanto.dtypes.bit_packing import pack, packed_length, unpack
from requanto.integrations.onnx.builder import Builder
from requanto.tensor.parts import float_scale, float_shift
from requanto.tensor.spec import WeightSpec

logger = logging.getLogger(__name__)

#: Sizes of groups that MatMulNBits supports: powers of two from 16. A larger group is split into groups of the same scale.
BLOCKS = (256, 128, 64, 32, 16)
#: Opset from which DequantizeLinear takes float8.
FLOAT8_OPSET = 19


@dataclass
class Weight:
    """A quantized weight without its low-rank term and rotation, as a matrix ``[N, K]``.

    Attributes:
        name: its name in the model.
        spec: description; the stored shape is ``spec.shape``.
        parts: its tensors, in the plain layout.
        looked_up: True if rows of it are looked up somewhere; the codes are then stored as bytes of the plain layout.
    """

    name: str
    spec: WeightSpec
    parts: dict[str, torch.Tensor]
    looked_up: bool = False
    scale: torch.Tensor = field(init=False)
    shift: torch.Tensor | None = field(init=False)

    def __post_init__(self) -> None:
        rows, groups = self.spec.matrix_shape[0], self.spec.groups
        self.scale = float_scale(self.spec, self.parts).float().reshape(rows, groups)
        shift = float_shift(self.spec, self.parts)
        self.shift = None if shift is None else shift.float().reshape(rows, groups)

    def expert(self, index: int) -> Weight:
        """One expert of a weight ``[experts, N, K]``."""
        spec = self.spec.replace(shape=self.spec.shape[1:], axis=self.spec.axis - 1)
        parts = {name: part if name == "codebook" else part[index] for name, part in self.parts.items()}
        return Weight(f"{self.name}.{index}", spec, parts)

    # ------------------------------------------------------------------ codes

    @property
    def codes(self) -> torch.Tensor:
        """Unpacked codes ``[N, K]``."""
        rows, length = self.spec.matrix_shape
        qdata, kind = self.parts["qdata"], self.spec.qtype
        stored = qdata.reshape(rows, -1) if qdata.numel() else qdata.new_empty(rows, 0)
        return unpack(stored, kind.bits, length) if kind.is_packed else stored

    def stored(self, to: Builder) -> ir.Value:
        """The initializer with the codes as the checkpoint stores them, ``[N, bytes]``; float8 codes as uint8."""
        rows, qdata = self.spec.matrix_shape[0], self.parts["qdata"]
        qdata = qdata.view(torch.uint8) if self.spec.qtype.is_floating_point else qdata
        return to.initializer(f"{self.name}_qdata", qdata.reshape(rows, -1))

    # ------------------------------------------------------------------ dequantization

    def values(self, to: Builder) -> ir.Value:
        """The dequantized matrix: float32 ``[N, K]``."""
        rows, length = self.spec.matrix_shape
        kind, groups = self.spec.qtype, self.spec.groups
        linear = kind.bits == 8 and self.shift is None and not kind.is_codebook and not kind.is_unsigned
        if not linear or self.looked_up or (kind.is_floating_point and to.opset < FLOAT8_OPSET):
            scale, shift = self._scale_and_shift(to)
            return self.dequantized(to, self.stored(to), scale, shift)
        name = f"{self.name}_qdata"
        codes = to.initializer(name, self.parts["qdata"].reshape(rows * groups, -1))
        scale = to.initializer(f"{self.name}_scale", self.scale.reshape(-1))
        values = to.op("DequantizeLinear", codes, scale, axis=0)
        return values if groups == 1 else to.reshape(values, rows, length)

    def rows(self, to: Builder, indices: ir.Value) -> ir.Value:
        """The dequantized rows ``indices``: float32 ``[len(indices), K]``."""
        parts = [self.stored(to), *self._scale_and_shift(to)]
        return self.dequantized(to, *(part and to.op("Gather", part, indices, axis=0) for part in parts))

    def _scale_and_shift(self, to: Builder) -> tuple[ir.Value, ir.Value | None]:
        shift = None if self.shift is None else to.initializer(f"{self.name}_shift", self.shift)
        return to.initializer(f"{self.name}_scale", self.scale), shift

    def dequantized(self, to: Builder, codes: ir.Value, scale: ir.Value, shift: ir.Value | None) -> ir.Value:
        """float32 ``[rows, K]`` of some rows.

        Args:
            codes: as in `stored`.
            scale, shift: float32 ``[rows, groups]``.
        """
        kind, (_, length), groups = self.spec.qtype, self.spec.matrix_shape, self.spec.groups
        codes = self._unpacked(to, codes) if kind.is_packed else codes
        if kind.is_codebook or kind.is_floating_point:
            values = to.op("Gather", self._table(to), to.cast(codes, ir.DataType.INT32), axis=0)
        else:
            values = to.cast(codes, ir.DataType.FLOAT)
            if shift is None and kind.zero_code:
                values = to.op("Sub", values, to.number(kind.zero_code))
        if groups == 1:
            values = to.op("Mul", values, scale)
            return values if shift is None else to.op("Sub", values, shift)
        values = to.op("Mul", to.reshape(values, -1, groups, length // groups), to.op("Unsqueeze", scale, to.ints([2])))
        if shift is not None:
            values = to.op("Sub", values, to.op("Unsqueeze", shift, to.ints([2])))
        return to.reshape(values, -1, length)

    def _table(self, to: Builder) -> ir.Value:
        """The value of each code: float32 ``[2^bits]``."""
        kind = self.spec.qtype
        if kind.is_learned:
            return to.initializer(f"{self.name}_codebook", self.parts["codebook"].float())
        if kind.is_floating_point:
            values = torch.arange(256, dtype=torch.int32, device="cpu").to(torch.uint8).view(kind.dtype).float()
        else:
            values = torch.tensor(kind.values, dtype=torch.float32, device="cpu")
        return to.initializer(f"requanto.{kind.name}", values)

    def _unpacked(self, to: Builder, stored: ir.Value) -> ir.Value:
        """One code in each element, int32 ``[rows, K]``, from packed bytes ``[rows, bytes]``.

        ``lanes`` codes fill ``count`` bytes. A code is in at most two neighbouring bytes.
        """
        bits, length = self.spec.qtype.bits, self.spec.row_length
        lanes = 8 // math.gcd(8, bits)
        count = lanes * bits // 8
        words = -(-length // lanes)
        missing = words * count - packed_length(length, bits)
        wide = to.cast(stored, ir.DataType.INT32)
        if missing:
            wide = to.op("Pad", wide, to.ints([0, 0, 0, missing]))
        wide = to.reshape(wide, -1, words, count)
        if count > 1:
            first = [lane * bits // 8 for lane in range(lanes)]
            low = to.op("Gather", wide, to.ints(first), axis=2)
            high = to.op("Gather", wide, to.ints([min(byte + 1, count - 1) for byte in first]), axis=2)
            wide = to.op("Add", low, to.op("Mul", high, to.number(256, np.int32)))
        steps = to.numbers([2 ** (bits * lane % 8) for lane in range(lanes)], np.int32)
        codes = to.op("Mod", to.op("Div", wide, steps), to.number(2**bits, np.int32))
        codes = to.reshape(codes, -1, words * lanes)
        if words * lanes == length:
            return codes
        return to.op("Slice", codes, to.ints([0]), to.ints([length]), to.ints([1]))

    # ------------------------------------------------------------------ MatMulNBits

    @property
    def block(self) -> int | None:
        """Size of a group in MatMulNBits; None if that operator cannot multiply with this weight."""
        kind, length = self.spec.qtype, self.spec.row_length
        if not kind.is_packed or kind.bits > 4 or kind.is_codebook or not length or not self.spec.matrix_shape[0]:
            return None
        group = self.spec.group_size or length
        return next((block for block in BLOCKS if group % block == 0), None)

    def times(self, to: Builder, x: ir.Value) -> ir.Value:
        """``x @ values.T`` by MatMulNBits.

        Args:
            x: float32 ``[rows, K]``.

        Returns:
            float32 ``[rows, N]``.
        """
        block, (rows, length) = self.block, self.spec.matrix_shape
        assert block is not None
        groups, bits = length // block, self.container
        middle = 2 ** (bits - 1)
        repeats = groups // self.spec.groups
        scale = self.scale.repeat_interleave(repeats, 1)
        inputs = [x, self._blocks(to, groups), to.initializer(f"{self.name}_scale", scale.reshape(-1))]
        rest = None
        if self.shift is not None:
            zero = self._integer_zeros()
            if zero is not None:
                zero = pack(zero.repeat_interleave(repeats, 1), bits)
                inputs.append(to.initializer(f"{self.name}_zero_point", zero.reshape(-1)))
            else:
                # ONNX Runtime is slow with float zero points. What differs from code - middle is the same in a group.
                rest = self.scale * middle - self.shift
        out = to.op(
            "MatMulNBits",
            *inputs,
            domain="com.microsoft",
            K=length,
            N=rows,
            bits=bits,
            block_size=block,
            accuracy_level=1,  # float32: x is not quantized
        )
        if rest is None:
            return out
        sums = to.op(
            "ReduceSum",
            to.reshape(x, -1, self.spec.groups, self.spec.row_length // self.spec.groups),
            to.ints([2]),
            keepdims=0,
        )
        return to.op("Add", out, to.op("MatMul", sums, to.initializer(f"{self.name}_offset", rest.T)))

    @property
    def container(self) -> int:
        """Bits of a code in MatMulNBits."""
        return 2 if self.spec.qtype.bits <= 2 else 4

    def _blocks(self, to: Builder, groups: int) -> ir.Value:
        """The codes as MatMulNBits takes them: uint8 ``[N, groups, bytes]``."""
        kind, bits = self.spec.qtype, self.container
        shape = self.spec.matrix_shape[0], groups, self.spec.row_length * bits // 8 // groups
        if kind.bits == bits:  # the same bytes as in the checkpoint
            if self.looked_up:
                return to.reshape(self.stored(to), *shape)
            return to.initializer(f"{self.name}_qdata", self.parts["qdata"].reshape(shape))
        name = f"{self.name}_qdata{bits}" if self.looked_up else f"{self.name}_qdata"
        offset = 0 if self.shift is not None else 2 ** (bits - 1) - kind.zero_code
        return to.initializer(name, pack(self.codes + offset, bits).reshape(shape))

    def _integer_zeros(self) -> torch.Tensor | None:
        """Zero points ``shift / scale`` as uint8, if all are exact integers that fit into a code, else None."""
        assert self.shift is not None
        zero = torch.where(self.scale == 0, 0, self.shift / self.scale).round()
        exact = torch.equal(zero * self.scale, self.shift) and bool(((zero >= 0) & (zero < 2**self.container)).all())
        return zero.to(torch.uint8) if exact else None
