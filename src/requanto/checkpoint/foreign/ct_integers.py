"""Integer weights of compressed-tensors: packed in int32 words, or int8.

    value = scale * (code - zero)          code, zero in -2^(b-1) .. 2^(b-1) - 1

In words a code is stored plus 2^(b-1), as in our form. Words are dense: the bits of a row are one stream, low bits first, so
they are our bytes. Versions before 0.18 (June 2026) began each word with a code and left the rest of it empty: of 3 bits a
word has 10 codes. The number of words tells the two apart. Zero points are packed in the same way, down the rows.

With ``weight_g_idx`` (act-order) column k belongs to the group ``g_idx[k]``. We store the columns group after group.
"""

from __future__ import annotations

import functools

import torch
from packaging.version import InvalidVersion, Version

from requanto.checkpoint.foreign.ct_codes import Stored, parts_of
from requanto.checkpoint.foreign.ct_config import Args
from requanto.checkpoint.foreign.found import ForeignWeight
from requanto.checkpoint.foreign.pieces import FLOATS, joined, line, require, unfit
from requanto.checkpoint.foreign.source import Source
from requanto.checkpoint.format import CheckpointError

#: version of compressed-tensors from which on words are dense
DENSE_SINCE = Version("0.18.0.dev0")
_SCALES = (*FLOATS, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)


def integer_weight(
    source: Source, module: str, parts: set[str], args: Args, version: str, activation: str, note: str
) -> ForeignWeight:
    """Describes an integer weight.

    Args:
        module: its module.
        parts: last parts of the names of the module's tensors.
        args: how it is quantized.
        version: of the library that wrote it.
        activation: type of the inputs, quantized on the fly; empty: they stay float.
        note: see `ForeignWeight`.

    Raises:
        CheckpointError: config and tensors do not agree.
    """
    name, bits, words = joined(module, "weight"), args.bits, "weight_packed" in parts
    require(
        args.kind == "int" and bits <= 8 and (bits > 1 or words),
        f"{name} is stored as integers, but the config says {args.kind} of {bits} bits",
    )
    require(
        args.strategy in ("tensor", "channel", "group", "block"),
        f"the weights of {module} have the strategy {args.strategy!r}, and integers have one scale for a tensor, channel, "
        f"group or block",
    )
    shape = _shape(source, module, parts, args, words)
    rows, length = shape
    dense = True
    if words:
        stored = joined(module, "weight_packed")
        dense = _is_dense(source, stored, shape, bits, version, name)
    else:
        source.need_shape(name, name, shape, torch.int8)
    block, columns = args.block or (0, args.group or length)
    groups = length // columns
    scale_shape = (-(-rows // block) if block else rows, groups)
    scale = joined(module, "weight_scale")
    _require_scale(source, scale, name, scale_shape, args)
    zeros = _zeros(source, module, parts, args, scale_shape, dense)
    ordered = _is_ordered(source, module, parts, args, length)
    affine = not args.symmetric or bits == 1
    kind = f"qint{bits}" if bits in range(2, 8) or not affine else f"quint{bits}"
    text = line(
        name,
        kind,
        shape,
        "affine" if affine else "",
        f"activation={activation}" if activation else "",
        "zeros" if affine and bits > 1 else "",
        "order" if ordered else "",
        group=length // groups if groups > 1 else None,
    )
    how = Stored(
        module,
        bits,
        shape,
        groups,
        words,
        dense,
        zeros,
        args.symmetric,
        block,
        ordered,
    )
    needed = ("weight_packed" if words else "weight", "weight_scale", *sorted(parts & _EXTRA))
    return ForeignWeight(
        text, tuple(joined(module, part) for part in needed), functools.partial(parts_of, how=how), note
    )


_EXTRA = {"weight_zero_point", "weight_shape", "weight_g_idx"}


def _shape(source: Source, module: str, parts: set[str], args: Args, words: bool) -> torch.Size:
    """N and K: of the stored codes, or what ``weight_shape`` says."""
    name = joined(module, "weight")
    stored = joined(module, "weight_packed") if words else name
    found = source.need(stored, name)
    if len(found.shape) != 2:
        raise unfit(stored, found, "a matrix, which is what compressed-tensors quantizes")
    shape = found.shape
    if words:
        said = joined(module, "weight_shape")
        source.need(said, name)
        shape = torch.Size(source[said].flatten().tolist())
        require(
            len(shape) == 2 and shape[0] == found.shape[0] and shape[1] > 0,
            f"{said} is {tuple(shape)}, but {stored} has {found.shape[0]} rows: one of them is damaged",
        )
    columns = args.group or (args.block[1] if args.block else shape[1])
    require(
        shape[1] % columns == 0,
        f"{name} has rows of {shape[1]} weights, which groups of {columns} (config) do not divide",
    )
    return shape


def _word_counts(length: int, bits: int) -> tuple[int, int]:
    """Number of dense words for codes, and of words of whole codes."""
    return -(-length * bits // 32), -(-length // (32 // bits))


def _is_dense(source: Source, stored: str, shape: torch.Size, bits: int, version: str, whose: str) -> bool:
    """Whether words of codes are dense: from their number, else from the version."""
    found, (rows, length) = source.need(stored, whose), shape
    dense, loose = _word_counts(length, bits)
    if found.dtype != torch.int32 or tuple(found.shape) not in ((rows, dense), (rows, loose)):
        raise unfit(stored, found, f"int32 ({rows}, {dense}) for {length} codes of {bits} bits")
    if dense != loose or 32 % bits == 0 or dense <= 1:
        return found.shape[1] == dense
    try:
        return Version(version) >= DENSE_SINCE
    except InvalidVersion as error:
        raise CheckpointError(
            f"{stored}: {length} codes of {bits} bits take {dense} words in both packings of compressed-tensors, and "
            f"quantization_config.version, which tells them apart, is {version!r}: set it to that of the library that wrote "
            f"the files"
        ) from error


def _require_scale(source: Source, scale: str, name: str, shape: tuple[int, int], args: Args) -> None:
    found = source.need(scale, name)
    if args.strategy == "tensor":
        if found.shape.numel() != 1 or found.dtype not in _SCALES:
            raise unfit(scale, found, "one float for the tensor")
        return
    flat = len(found.shape) == 1 and shape[1] == 1
    source.need_shape(scale, name, shape[:1] if flat else shape, *_SCALES)


def _zeros(source: Source, module: str, parts: set[str], args: Args, shape: tuple[int, int], dense: bool) -> str:
    """How zero points are stored: ``"words"``, ``"int8"`` or not at all."""
    name, stored = joined(module, "weight"), joined(module, "weight_zero_point")
    if "weight_zero_point" not in parts:
        if not args.symmetric:
            source.need(stored, name)
        return ""
    found = source.header(stored)
    if found.dtype == torch.int32 and args.strategy in ("group", "channel") and not args.symmetric:
        count = _word_counts(shape[0], args.bits)[0 if dense else 1]
        source.need_shape(stored, name, (count, shape[1]), torch.int32)
        return "words"
    one = args.strategy == "tensor" and found.shape.numel() == 1
    source.need_shape(stored, name, found.shape if one else shape, torch.int8, torch.int32, torch.int64, *FLOATS)
    return "int8"


def _is_ordered(source: Source, module: str, parts: set[str], args: Args, length: int) -> bool:
    """Whether columns must be sorted by their group. -1 in ``weight_g_idx`` stands for columns in order."""
    if "weight_g_idx" not in parts:
        return False
    name, stored = joined(module, "weight"), joined(module, "weight_g_idx")
    source.need_shape(stored, name, (length,), torch.int32, torch.int64)
    groups = source[stored].to(torch.int64)
    if args.group is None or bool((groups == -1).any()):
        return False
    count = length // args.group
    if int(groups.min()) < 0 or int(groups.max()) >= count:
        raise CheckpointError(
            f"{stored} holds groups from {int(groups.min())} to {int(groups.max())}, and {name} has {count} groups: it is "
            f"damaged, download it again"
        )
    sizes = torch.bincount(groups, minlength=count)
    if bool((sizes != args.group).any()):
        raise CheckpointError(
            f"{stored} puts {int(sizes.min())} to {int(sizes.max())} columns of {name} into a group, expected {args.group} "
            f"in each: it is damaged, download it again"
        )
    return bool((groups.diff() < 0).any())
