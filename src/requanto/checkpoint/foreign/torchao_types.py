"""The tensor classes of torchao 0.18 that its safetensors files can hold.

| class | parts | a weight is |
|---|---|---|
| ``Int4Tensor`` | ``qdata`` [N, K / 2], first code in the low nibble, two's complement; ``scale``, ``zero_point`` [K / g, N] | ``scale * code + zero_point`` |
| ``Int4TilePackedTo4dTensor`` | ``qdata`` [N / 8, K / 128, 32, 4] int32; ``scale_and_zero`` [K / g, N, 2] | ``scale * (code - 8) + zero`` |
| ``IntxUnpackedToInt8Tensor`` | ``qdata`` int8 of 1 to 8 bits; ``scale``, ``zero_point`` for each block | ``scale * (code - zero_point)`` |
| ``Int8Tensor`` | ``qdata`` int8; ``scale``, maybe ``zero_point`` | the same |
| ``Float8Tensor`` | ``qdata`` float8, ``scale`` for each block | ``scale * code`` |
| ``NVFP4Tensor`` | ``qdata`` [N, K / 2], ``scale`` e4m3, ``per_tensor_scale`` | their product |
| ``MXTensor`` | ``qdata`` float8, or uint8 with one 6-bit or two 4-bit codes; ``scale`` e8m0 | ``scale * code`` |

``act_pre_scale`` is multiplied with the inputs, so it is our column scale. Experts have a leading axis more.
"""  # noqa: E501  (a table)

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from requanto.checkpoint.foreign.found import ForeignActivation, ForeignCheckpoint, Parts
from requanto.checkpoint.foreign.source import Source
from requanto.checkpoint.foreign.torchao_entry import FLOATS, Entry, count_of, is_all
from requanto.checkpoint.foreign.torchao_floats import float8, mx, nvfp4
from requanto.checkpoint.foreign.torchao_parts import add_weight, rows_and_groups, spread
from requanto.checkpoint.foreign.torchao_tiles import codes_of_tiles
from requanto.checkpoint.format import CheckpointError
from requanto.dtypes.bit_packing import pack
from requanto.dtypes.qtypes import qtype, qtypes
from requanto.tensor.spec import WeightSpec

_INT8, _QINT8 = torch.int8, qtypes["qint8"]
#: classes whose layout is that of one device's kernels
REFUSED = {
    "Int4PlainInt32Tensor": "its codes are in an order of Intel's XPU or Huawei's NPU kernels. Quantize the float model "
    "again, with int4_packing_format='plain'",
    "Int4PreshuffledTensor": "its codes are in an order of CUDA kernels. Quantize the float model again, with "
    "int4_packing_format='plain'",
}


# ---------------------------------------------------------------------- int4


def int4(entry: Entry, found: ForeignCheckpoint) -> None:
    """``Int4Tensor``."""
    entry.known("block_size", "shape", "activation_dtype")
    shape = torch.Size(entry.sizes("shape"))
    group = entry.sizes("block_size", len(shape))[-1]
    *lead, length = shape
    if len(shape) < 2 or length % group or length % 2:
        raise entry.wrong("block_size", f"groups that divide rows of {length}")
    entry.expect("qdata", [*lead, length // 2], torch.int8, torch.uint8)
    scales = torch.Size([*lead[:-1], length // group, lead[-1]])
    entry.expect("scale", scales, *FLOATS)
    entry.expect("zero_point", scales, *FLOATS)
    activation = {"float8_e4m3fn": "qfloat8_e4m3fn", "bfloat16": None, None: None}
    kind = entry.get("activation_dtype")
    if kind not in activation:
        raise entry.wrong("activation_dtype", "bfloat16 or float8_e4m3fn")
    affine = bool(entry.small("zero_point").any())
    spec = WeightSpec(
        *(qtypes["qint4"], shape, torch.float32),
        axis=len(shape) - 2,
        group_size=group,
        affine=affine,
        activation=qtypes[activation[kind]] if activation[kind] else None,
    )
    names = tuple(map(entry.tensor, ("qdata", "scale", "zero_point")))
    add_weight(entry, found, spec, functools.partial(_int4_parts, names, affine))


def _int4_parts(names: tuple[str, ...], affine: bool, source: Source) -> Parts:
    codes, scale, zero = (source[name] for name in names)
    # Two's complement from -8 on becomes codes from 0 on: the sign bit of each nibble is flipped.
    parts = {"qdata": codes.view(torch.uint8) ^ 0x88, "scale": scale.mT.contiguous()}
    if affine:
        # Of 16 bits, scale and zero point together can need more digits than they have.
        parts["shift"] = 8 * parts["scale"].float() - zero.mT.float()
    return parts


def int4_tiles(entry: Entry, found: ForeignCheckpoint) -> None:
    """``Int4TilePackedTo4dTensor``."""
    entry.known("block_size", "shape")
    shape = torch.Size(entry.sizes("shape"))
    group = entry.sizes("block_size", len(shape))[-1]
    stored = entry.shape("qdata", torch.int32)
    *lead, rows, length = shape
    if stored[:-4] != torch.Size(lead) or len(stored) < 4 or stored[-2] != 32 or stored[-1] not in (1, 2, 4):
        entry.expect("qdata", [*lead, -(-rows // 8), -(-length // 1024) * 8, 32, 4], torch.int32)
    all_rows, whole = stored[-4] * 8, stored[-3] * stored[-1] * 32
    if all_rows < rows or whole < length or length % group or whole % group:
        raise entry.wrong("shape", f"at most {all_rows} x {whole}, in groups of {group}")
    entry.expect("scale_and_zero", [*lead, whole // group, all_rows, 2], *FLOATS)
    spec = WeightSpec(qtypes["qint4"], shape, torch.float32, axis=len(shape) - 2, group_size=group, affine=True)
    names = entry.tensor("qdata"), entry.tensor("scale_and_zero")
    add_weight(entry, found, spec, functools.partial(_tile_parts, names, spec))


def _tile_parts(names: tuple[str, str], spec: WeightSpec, source: Source) -> Parts:
    rows, length = spec.shape[-2:]
    codes = codes_of_tiles(source[names[0]])[..., :rows, :length]
    both = source[names[1]].float()[..., : spec.groups, :rows, :].transpose(-3, -2)
    scale, zero = both[..., 0], both[..., 1]
    return {"qdata": pack(codes.contiguous(), 4), "scale": scale.contiguous(), "shift": 8 * scale - zero}


# ---------------------------------------------------------------------- whole numbers


def intx(entry: Entry, found: ForeignCheckpoint) -> None:
    """``IntxUnpackedToInt8Tensor``."""
    entry.known("target_dtype", "block_size", "dtype", "activation_quantization")
    target = str(entry.get("target_dtype"))
    if target not in {f"int{bits}" for bits in range(1, 9)}:
        raise entry.wrong("target_dtype", "int1 to int8")
    note = ""
    if entry.get("activation_quantization") is not None:
        note = "torchao rounds the inputs of such layers to int8 with a zero point for each token; here they stay float"
    _integers(entry, found, int(target.removeprefix("int")), None, note)


def int8(entry: Entry, found: ForeignCheckpoint) -> None:
    """``Int8Tensor``."""
    entry.known("block_size", "dtype", "act_quant_kwargs", "reduce_range")
    activation, note, inputs = None, "", entry.get("act_quant_kwargs")
    if inputs is not None and inputs.get("mapping_type") != "SYMMETRIC":
        note = "torchao rounds the inputs of such layers to int8 with a zero point; here they stay float"
    elif inputs is not None and entry.has("act_quant_scale"):
        if not is_all(entry.shape("act_quant_scale", *FLOATS)):
            note = "torchao rounds the inputs of such layers with several fixed scales; here they stay float"
        else:
            name = entry.tensor("act_quant_scale")
            scale = ForeignActivation("qint8", (name,), functools.partial(_input_scale, name))
            found.activations[entry.module] = scale
    elif inputs is not None:
        activation = _QINT8
    _integers(entry, found, 8, activation, note)


def _input_scale(name: str, source: Source) -> torch.Tensor:
    return source[name].float().reshape(())


def _integers(entry: Entry, found: ForeignCheckpoint, bits: int, activation: qtype | None, note: str) -> None:
    """A weight whose codes are int8 numbers of ``bits`` bits."""
    shape = entry.shape("qdata", _INT8)
    block = entry.blocks(shape, entry.shape("scale", *FLOATS))
    counts = count_of(shape, block)
    if entry.shape("scale", *FLOATS) != counts and not (is_all(counts) and is_all(entry.shape("scale", *FLOATS))):
        entry.expect("scale", counts, *FLOATS)
    zero = entry.small("zero_point") if entry.has("zero_point") else None
    if zero is not None and zero.numel() != counts.numel():
        entry.expect("zero_point", counts, _INT8, *FLOATS)
    axis, group = rows_and_groups(entry, shape, block)
    low = -(2 ** (bits - 1))
    affine = bits == 1 or (zero is not None and bool(zero.any()))
    whole = affine and bits > 1 and zero is not None and not zero.is_floating_point()
    if whole and (int(zero.min()) < low or int(zero.max()) >= -low):
        raise CheckpointError(
            f"{entry.tensor('zero_point')} holds {int(zero.min())} to {int(zero.max())}, expected zero points of int{bits}: "
            f"it is damaged"
        )
    spec = WeightSpec(
        qtypes[f"q{'u' if affine and bits in (1, 8) else ''}int{bits}"],
        *(shape, torch.float32),
        axis=axis,
        group_size=group,
        affine=affine,
        activation=activation,
        zeros=whole,
    )
    zeros = entry.tensor("zero_point") if affine and zero is not None else None
    names = entry.tensor("qdata"), entry.tensor("scale"), zeros
    add_weight(entry, found, spec, functools.partial(_integer_parts, names, spec, block), note)


def _integer_parts(names: tuple[str, str, str | None], spec: WeightSpec, block: list[int], source: Source) -> Parts:
    codes, scale = source[names[0]], spread(source[names[1]], spec, block)
    bits = spec.qtype.bits
    low = -(2 ** (bits - 1))
    if codes.numel() and (int(codes.min()) < low or int(codes.max()) >= -low):
        raise CheckpointError(
            f"{names[0]} holds {int(codes.min())} to {int(codes.max())}, expected int{bits}: it is damaged"
        )
    parts = {"qdata": codes, "scale": scale}
    if spec.qtype is not _QINT8:
        unsigned = codes.view(torch.uint8) + (-low)  # modulo 256
        rows = unsigned.reshape(*spec.lead, spec.row_length)
        parts["qdata"] = pack(rows, bits) if bits < 8 else unsigned
    if not spec.affine:
        return parts
    zero = torch.zeros_like(scale) if names[2] is None else spread(source[names[2]], spec, block)
    if spec.zeros:
        zero = (zero.view(torch.uint8) + (-low)).contiguous()
        parts["shift"] = pack(zero, bits) if bits < 8 else zero
    else:
        parts["scale"] = scale.float()
        parts["shift"] = scale.float() * (zero.float() - low)
    return parts


TYPES: dict[str, Callable[[Entry, ForeignCheckpoint], None]] = {
    "Int4Tensor": int4,
    "Int4TilePackedTo4dTensor": int4_tiles,
    "IntxUnpackedToInt8Tensor": intx,
    "Int8Tensor": int8,
    "Float8Tensor": float8,
    "NVFP4Tensor": nvfp4,
    "MXTensor": mx,
}
