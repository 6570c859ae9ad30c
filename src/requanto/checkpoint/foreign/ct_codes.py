"""Codes and zero points of compressed-tensors' integer weights, from words or bytes to our form (see `ct_integers`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from requanto.checkpoint.foreign.found import Parts
from requanto.checkpoint.foreign.packing import codes_of_words, packed_rows, signed_bytes
from requanto.checkpoint.foreign.pieces import float_scale, joined, per_row
from requanto.checkpoint.foreign.source import Source
from requanto.checkpoint.format import CheckpointError


@dataclass(frozen=True)
class Stored:
    """How the parts of one weight are stored.

    Attributes:
        module: name of the module.
        bits: of a code.
        shape: N and K.
        groups: number of scales in a row.
        words: True if codes are packed in int32.
        dense: False if a word holds whole codes only.
        zeros: ``"words"``, ``"int8"`` or empty.
        symmetric: True if there are no zero points; stored ones must be 0.
        block: rows that share a scale; 0: none do.
        ordered: True if columns are sorted by their group.
    """

    module: str
    bits: int
    shape: torch.Size
    groups: int
    words: bool
    dense: bool = True
    zeros: str = ""
    symmetric: bool = True
    block: int = 0
    ordered: bool = False


def parts_of(source: Source, how: Stored) -> Parts:
    """Reads the tensors of a weight and returns its parts.

    Raises:
        CheckpointError: zero points are no codes, or not 0 where there should be none.
    """
    rows, bits = how.shape[0], how.bits
    scale = float_scale(source[joined(how.module, "weight_scale")])
    if how.block:
        row = torch.arange(rows, device=scale.device) // how.block
        scale = scale.index_select(0, row)
    elif how.groups == 1:
        scale = per_row(scale, (rows,))
    order = None
    if how.ordered:
        order = torch.argsort(source[joined(how.module, "weight_g_idx")], stable=True)
    parts = {"qdata": _codes(source, how, order), "scale": scale}
    zeros = _zero_codes(source, how)
    if bits == 1:
        parts["shift"] = scale * (1 if zeros is None else zeros.to(scale.dtype))
    elif zeros is not None:
        parts["shift"] = packed_rows(zeros, bits)
    if order is not None:
        parts["order"] = order.to(torch.int32)
    return parts


def _codes(source: Source, how: Stored, order: torch.Tensor | None) -> torch.Tensor:
    """Codes as our form has them; with as many words as bytes these are the stored bytes."""
    bits, length = how.bits, how.shape[1]
    if how.words:
        stored = source[joined(how.module, "weight_packed")]
        if order is None and how.dense and bits < 8:
            # The rest of a row's last word is empty: its bytes are not ours, its bits are zero as in ours.
            return stored.view(torch.uint8)[:, : -(-length * bits // 8)].contiguous()
        codes = _from_words(stored, bits, length, how.dense)
    else:
        name = joined(how.module, "weight")
        if order is None and bits == 8 and how.symmetric:
            return source[name]
        codes = _unsigned(source[name], bits, name)
    if order is not None:
        codes = codes.index_select(-1, order)
    return signed_bytes(codes) if bits == 8 and how.symmetric else packed_rows(codes, bits)


def _unsigned(codes: torch.Tensor, bits: int, name: str) -> torch.Tensor:
    """uint8 codes plus 2^(bits-1)."""
    if bits == 8 and codes.dtype == torch.int8:
        return codes.view(torch.uint8) ^ 0x80
    zero = 2 ** (bits - 1)
    whole = codes.to(torch.int64)
    low, high = (int(whole.min()), int(whole.max())) if whole.numel() else (0, 0)
    if low < -zero or high >= zero or (codes.is_floating_point() and not torch.equal(whole.to(codes.dtype), codes)):
        raise CheckpointError(
            f"{name} holds {low} to {high}, expected whole numbers from {-zero} to {zero - 1} for {bits} bits: it is "
            f"damaged, or does not belong to this config"
        )
    return (whole + zero).to(torch.uint8)


def _from_words(words: torch.Tensor, bits: int, length: int, dense: bool) -> torch.Tensor:
    """uint8 ``[..., length]`` from int32 ``[..., words]``."""
    if dense:
        return codes_of_words(words, bits, length)
    steps = torch.arange(32 // bits, dtype=torch.int32, device=words.device) * bits
    codes = (words.unsqueeze(-1) >> steps) & (2**bits - 1)
    return codes.flatten(-2)[..., :length].to(torch.uint8)


def _zero_codes(source: Source, how: Stored) -> torch.Tensor | None:
    """Zero points as codes, uint8 ``[N, G]``; None if there are none."""
    if not how.zeros:
        return None
    rows = how.shape[0]
    name = joined(how.module, "weight_zero_point")
    stored = source[name]
    if how.zeros == "words":
        codes = _from_words(stored.transpose(0, 1), how.bits, rows, how.dense)
        return codes.transpose(0, 1).contiguous()
    if how.symmetric:
        if bool(stored.any()):
            raise CheckpointError(f"{name} is not 0, but the config says symmetric=True: they do not belong together")
        return None
    codes = _unsigned(stored, how.bits, name)
    if how.block:
        return codes.index_select(0, torch.arange(rows, device=codes.device) // how.block)
    return codes if codes.numel() == rows * how.groups and codes.dim() == 2 else per_row(codes, (rows,))
