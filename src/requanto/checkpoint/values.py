"""Checks of a stored weight's values: numbers that no quantization writes are damage, also where there is no digest."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from requanto.checkpoint.format import CheckpointError
from requanto.dtypes.bit_packing import unpack
from requanto.scales.blocks import decoded
from requanto.scales.compact import unpack_codes
from requanto.tensor.parts import float_scale
from requanto.tensor.spec import WeightSpec

#: A weight larger than this, and larger than `RELATIVE` times the median of its tensor, is taken for damage. float16 ends
#: there, and trained weights stay far below.
ABSOLUTE = 2.0**16
RELATIVE = 2.0**20
#: A value of a learned codebook larger than this is taken for damage: they are fitted to weights between -1 and 1.
CODEBOOK = 2.0**10
_DAMAGED = "the checkpoint is damaged, download or save it again"


def check_values(spec: WeightSpec, parts: Mapping[str, torch.Tensor], name: str, codes: bool = True) -> None:
    """Checks the numbers in the parts of a weight, whose shapes and dtypes were checked before.

    Args:
        spec: its description.
        parts: its tensors, in the plain layout.
        name: its name, for messages.
        codes: also look for codes that are no numbers, which reads every code of a float8 weight.

    Raises:
        CheckpointError: NaN or Inf in a part or among float8 codes, a negative scale or a scale of 0 for codes that differ
            (neither of signed scales; of scales in blocks only the first), a column scale that is not positive (0, of signed
            ones), an order of columns that is no permutation, or a scale or shift that makes weights absurdly large.
    """
    if parts["qdata"].is_meta:
        return
    for part, found in parts.items():
        if part != "qdata" and found.is_floating_point() and not bool(torch.isfinite(found).all()):
            raise CheckpointError(f"{name}_{part} holds NaN or Inf: {_DAMAGED}")
    if codes and spec.qtype.is_floating_point and bool(_is_no_number(parts["qdata"]).any()):
        raise CheckpointError(f"{name}_qdata holds NaN among its {spec.qtype.name} codes: {_DAMAGED}")
    if spec.order:
        _check_order(parts["order"], name)
    if not parts["scale"].numel():
        return
    if spec.column and parts["column"].numel():
        least = float((parts["column"].abs() if spec.signed else parts["column"]).min())
        if least <= 0:
            wanted = "not 0" if spec.signed else "positive"
            raise CheckpointError(f"{name}_column holds {least:g}, and a column scale is {wanted}: {_DAMAGED}")
    if spec.qtype.blocks is not None:
        _check_scale_codes(parts["scale"], spec.qtype.blocks.scale, name)
    # Of MX types no scale is 0 or negative.
    rows = "row_scale" if "row_scale" in parts else "scale"
    smallest = 1.0 if rows == "scale" and spec.scale_code_bits is not None else float(parts[rows].min())
    if smallest < 0 and not spec.signed:
        raise CheckpointError(f"{name}_{rows} holds the negative scale {smallest:g}: {_DAMAGED}")
    # Other programs leave any codes where a scale is rounded to 0.
    foreign = spec.signed or spec.scale_block is not None
    if not foreign and (smallest == 0 or ("row_scale" in parts and bool((float_scale(spec, parts) == 0).any()))):
        _check_zeros(spec, parts, name)
    _check_size(spec, parts, name)


def _check_order(order: torch.Tensor, name: str) -> None:
    """An order of columns has each column once."""
    length = order.shape[-1]
    for index, one in enumerate(order.reshape(-1, length)):
        if not length or torch.equal(one.sort().values, torch.arange(length, dtype=torch.int32, device=one.device)):
            continue
        where = f" of expert {index}" if order.dim() > 1 else ""
        outside = (one < 0) | (one >= length)
        first = torch.zeros(length, dtype=torch.bool, device=one.device)
        for place, column in enumerate(one.tolist()):
            if bool(outside[place]):
                raise CheckpointError(
                    f"{name}_order{where} holds {column} at {place}, and the columns are 0 to {length - 1}: {_DAMAGED}"
                )
            if bool(first[column]):
                raise CheckpointError(
                    f"{name}_order{where} holds {column} a second time at {place}, and each column belongs there once: "
                    f"{_DAMAGED}"
                )
            first[column] = True


def _check_scale_codes(codes: torch.Tensor, form: str, name: str) -> None:
    """Scales stored as numbers of 8 bits: each must be one, and not negative."""
    numbers = decoded(codes.unique(), form)
    if bool(numbers.isnan().any()):
        raise CheckpointError(f"{name}_scale holds NaN among its {form} codes: {_DAMAGED}")
    if float(numbers.min()) < 0:
        raise CheckpointError(f"{name}_scale holds the negative scale {float(numbers.min()):g}: {_DAMAGED}")


def _is_no_number(codes: torch.Tensor) -> torch.Tensor:
    """True for NaN and Inf among float8 codes, from their bits: a comparison as floats would take four times the memory."""
    bits = codes.view(torch.uint8)
    if codes.dtype in (torch.float8_e4m3fnuz, torch.float8_e5m2fnuz):
        return bits == 0x80
    return (bits & 0x7F) >= (0x7C if codes.dtype == torch.float8_e5m2 else 0x7F)


def _check_zeros(spec: WeightSpec, parts: Mapping[str, torch.Tensor], name: str) -> None:
    """A scale of 0 is written for groups of equal codes only: weights of zeros, with some types and optimizers."""
    if spec.scale_bits is not None:
        zero = parts["row_scale"].reshape(-1) == 0
        stored = unpack_codes(parts["scale"], spec.scale_bits, spec.groups).reshape(zero.numel(), -1)
        damaged = bool((stored[zero] > 1).any())
    else:
        zero = float_scale(spec, parts).reshape(-1) == 0
        length = spec.row_length
        codes = parts["qdata"]
        codes = unpack(codes, spec.qtype.bits, length) if spec.qtype.is_packed else codes.view(torch.uint8)
        groups = codes.reshape(zero.numel(), -1)[zero]
        damaged = bool((groups != groups[:, :1]).any())
    if damaged:
        raise CheckpointError(f"{name} has a scale of 0 for weights that are not all the same: {_DAMAGED}")


def _columns_of_scales(spec: WeightSpec, parts: Mapping[str, torch.Tensor]) -> torch.Tensor | float:
    """The largest column scale that each stored scale is multiplied by."""
    if not spec.column or not parts["column"].numel():
        return 1.0
    column = parts["column"].float().abs().unsqueeze(-2)  # [..., 1, K]
    if spec.scale_bits is None and spec.rotation is None:
        return column.unflatten(-1, (spec.groups, -1)).amax(-1)
    return column.amax(-1, keepdim=True)


def _check_size(spec: WeightSpec, parts: Mapping[str, torch.Tensor], name: str) -> None:
    kind = spec.qtype
    steps = kind.span if kind.is_codebook else kind.qmax if kind.is_floating_point else 2.0 ** (kind.bits - 1)
    if kind.is_learned:
        largest = float(parts["codebook"].abs().max())
        if largest > CODEBOOK:
            raise CheckpointError(
                f"{name}_codebook holds {largest:g}, and its values are fitted to -1 to 1: {_DAMAGED}"
            )
    top = 2.0**spec.scale_bits - 1 if spec.scale_bits is not None else 1.0
    scales = float_scale(spec, parts) if spec.scale_bits is None else parts["row_scale"]
    columns = _columns_of_scales(spec, parts)
    scales = scales.float().abs() * (steps * top) * columns
    sizes = {"scale": scales}
    if spec.affine and spec.shift_code_bits is None:
        sizes["shift"] = parts["shift"].float().abs() * columns
    if "row_shift" in parts:
        sizes["row_shift"] = parts["row_shift"].float().abs() * top * columns
    if "up" in parts:
        sizes["up"], sizes["down"] = parts["up"].float().abs(), parts["down"].float().abs()
    for part, size in sizes.items():
        if not size.numel() or float(size.max()) <= ABSOLUTE:
            continue
        middle = float(scales[scales > 0].median()) if bool((scales > 0).any()) else 0.0
        bound = max(ABSOLUTE, RELATIVE * middle)
        if float(size.max()) > bound:
            raise CheckpointError(
                f"{name}_{part} makes weights of {float(size.max()):g}, and half of this tensor's are below {middle:g}: "
                f"{_DAMAGED}"
            )
