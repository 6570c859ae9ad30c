"""WeightSpec: the description of a quantized weight, everything except its tensors.

Constructors, checkpoints, pickles, compiled graphs and custom operators all describe a weight by a WeightSpec, and check its
parts against it (`WeightSpec.check`). To add a property of weights, add a field here and its word in `words` and
`parse_words`.

The text form, e.g. ``"qint4 1536x576 group=64 affine"``, is that of checkpoints (docs/format.md).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from requanto.dtypes.bit_packing import packed_length
from requanto.dtypes.qtypes import qtype, qtypes, resolve_qtype
from requanto.scales.compact import check_scale_bits, stored_length
from requanto.scales.rotation import check_rotation

#: Possible dtypes of scales and low-rank factors.
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
#: Names of all parts of the plain layout. A weight has only those that it needs.
PART_NAMES = ("qdata", "scale", "shift", "up", "down", "codebook", "row_scale", "column", "row_shift", "order")
#: Parts with a number for each column, which the rows of a matrix share, and what messages call them.
PER_COLUMN = {"column": "a column scale", "order": "an order of columns"}
#: First letters of the words that follow ``rank=`` in the text form.
_AFTER_RANK = ("scales=", "rotation=", "columns", "zeros", "signed", "block=", "order")


@dataclass(frozen=True)
class WeightSpec:
    """Description of a quantized weight.

    Attributes:
        qtype: type of the codes.
        shape: stored shape (see ``transposed``).
        dtype: float dtype that the tensor shows.
        axis: last of the leading axes that have separate scales: 0, or 1 for experts.
        group_size: number of weights that share a scale; None: one scale per row.
        affine: True if there is a shift in addition to the scale.
        transposed: True if the tensor shows the last two axes swapped.
        activation: type to which inputs are quantized, per token; None: they stay float.
        scale_bits: bits in which scale and shift are stored; None: they are floats.
        rotation: size of the blocks in which rows were rotated before rounding; None: no rotation.
        zeros: True if the shift is stored as the code that stands for 0: a whole number of ``qtype.bits`` bits.
        column: True if there is a column scale, by which dequantized rows and the inputs of a GEMM are multiplied.
        signed: True if scales, and column scales, may be negative, as in files of other programs. With ``scale_block`` the
            codes of scales are signed too: a code c stands for ``c - 2^(scale_bits - 1)``.
        scale_block: number of weights that share a ``row_scale`` (and a ``row_shift``); None: those of a row. Of weights
            with ``scale_bits`` only.
        order: True if stored columns are in another order than the weight's: stored column j is column ``order[j]``.
    """

    qtype: qtype
    shape: torch.Size
    dtype: torch.dtype
    axis: int = 0
    group_size: int | None = None
    affine: bool = False
    transposed: bool = False
    activation: qtype | None = None
    scale_bits: int | None = None
    rotation: int | None = None
    column: bool = False
    zeros: bool = False
    signed: bool = False
    scale_block: int | None = None
    order: bool = False

    # ------------------------------------------------------------------ shapes

    @property
    def seen_shape(self) -> torch.Size:
        """The shape that the tensor shows."""
        return swapped(self.shape) if self.transposed else self.shape

    @property
    def strides(self) -> tuple[int, ...]:
        """Strides that a float tensor of this shape, transposed or not, would have."""
        strides, step = [], 1
        for size in reversed(self.shape):
            strides.insert(0, step)
            step *= max(size, 1)
        if self.transposed:
            strides[-1], strides[-2] = strides[-2], strides[-1]
        return tuple(strides)

    @functools.cached_property
    def lead(self) -> torch.Size:
        """Sizes of the leading axes that have separate scales."""
        return self.shape[: self.axis + 1]

    @functools.cached_property
    def row_length(self) -> int:
        """K: number of weights in a row."""
        return self.shape[self.axis + 1 :].numel()

    @property
    def groups(self) -> int:
        """Number of scales per row; one for an empty row."""
        return self.row_length // self.group_size if self.group_size and self.row_length else 1

    @property
    def scale_blocks(self) -> int:
        """Number of scales of scales per row: 1 without ``scale_block``."""
        return self.row_length // self.scale_block if self.scale_block and self.row_length else 1

    @functools.cached_property
    def scale_code_bits(self) -> int | None:
        """Bits of the code that a scale is stored as; None: scales are stored as floats."""
        return self.scale_bits if self.qtype.blocks is None else 8

    @functools.cached_property
    def shift_code_bits(self) -> int | None:
        """Bits of the code that a shift is stored as; None: shifts are stored as floats."""
        return self.qtype.bits if self.zeros else self.scale_bits

    @functools.cached_property
    def code_bits(self) -> dict[str, int]:
        """Bits of the parts that hold codes of groups, packed along the groups, by name."""
        bits = {"scale": self.scale_code_bits, "shift": self.shift_code_bits}
        return {name: count for name, count in bits.items() if count is not None}

    @functools.cached_property
    def matrix_shape(self) -> tuple[int, int]:
        """N and K of the stored codes as a matrix."""
        return self.lead.numel(), self.row_length

    @functools.cached_property
    def codes_shape(self) -> torch.Size:
        """Shape of the plain codes: the stored shape for 8 bits, else that of the packed bytes."""
        if not self.qtype.is_packed:
            return self.shape
        return torch.Size([*self.lead, packed_length(self.row_length, self.qtype.bits)])

    @functools.cached_property
    def key(self) -> WeightSpec:
        """The spec without what does not concern the stored tensors: dtype, activation and orientation."""
        return self.replace(dtype=torch.float32, activation=None, transposed=False)

    def replace(self, **changes: Any) -> WeightSpec:
        """A copy with other values for some fields."""
        return dataclasses.replace(self, **changes)

    # ------------------------------------------------------------------ parts

    @functools.cached_property
    def expected(self) -> dict[str, tuple[torch.Size, tuple[torch.dtype, ...]]]:
        """Shape and possible dtypes of each part, except the low-rank factors."""
        parts = {"qdata": (self.codes_shape, (self.qtype.storage_dtype,))}
        for name in ("scale", "shift") if self.affine else ("scale",):
            bits = self.code_bits.get(name)
            width = self.groups if bits is None else stored_length(self.groups, bits)
            parts[name] = torch.Size([*self.lead, width]), FLOATS if bits is None else (torch.uint8,)
        if self.qtype.is_learned:
            parts["codebook"] = (torch.Size([2**self.qtype.bits]), FLOATS)
        if self.scale_bits is not None or (self.qtype.blocks is not None and self.qtype.blocks.scale == "e4m3"):
            parts["row_scale"] = (torch.Size([*self.lead, self.scale_blocks]), FLOATS)
        if self.column:
            parts["column"] = (torch.Size([*self.lead[:-1], self.row_length]), FLOATS)
        if self.scale_block is not None and self.affine:
            parts["row_shift"] = (torch.Size([*self.lead, self.scale_blocks]), FLOATS)
        if self.order:
            parts["order"] = (torch.Size([*self.lead[:-1], self.row_length]), (torch.int32,))
        return parts

    def low_rank_shapes(self, rank: int) -> dict[str, torch.Size]:
        """Shapes of the factors of a low-rank term."""
        return {
            "up": torch.Size([*self.lead, rank]),
            "down": torch.Size([*self.lead[:-1], rank, self.row_length]),
        }

    def check(self, parts: Mapping[str, torch.Tensor], codes: tuple[torch.Size, torch.dtype] | None = None) -> None:
        """Checks that parts fit this spec.

        Kernels compute addresses from the spec alone, so all parts must be checked here before a kernel reads them.

        Args:
            parts: the tensors by name.
            codes: shape and dtype of ``qdata`` if its layout is not the plain one.

        Raises:
            ValueError: a part is missing or unexpected, or has another shape, dtype or device.
        """
        device = parts["qdata"].device if "qdata" in parts else None
        for name, (shape, dtypes) in self.expected.items():
            part = parts.get(name)
            if part is None:
                raise ValueError(
                    f"a {self.qtype.name} weight needs its {name}; found {', '.join(parts) or 'nothing'} for {self.text()}"
                )
            if name == "qdata" and codes is not None:
                shape, dtypes = codes[0], (codes[1],)
            if part.shape != shape or part.dtype not in dtypes:
                raise ValueError(
                    f"{self.text()}: {name} is {part.dtype} {tuple(part.shape)}, expected "
                    f"{' or '.join(map(str, dtypes))} {tuple(shape)}"
                )
            if part.device != device:
                raise ValueError(f"{self.text()}: {name} is on {part.device}, the codes on {device}; move one of them")
        up, down = parts.get("up"), parts.get("down")
        if up is not None or down is not None:
            self.check_low_rank(up, down)
            if up.device != device or down.device != device:  # type: ignore[union-attr]
                raise ValueError(f"{self.text()}: the low-rank factors are not on {device}, the device of the codes")
        for name in parts:
            if name not in self.expected and name not in ("up", "down") and parts[name] is not None:
                raise ValueError(
                    f"a {self.qtype.name} weight has no {name} ({self.text()}); found one of shape "
                    f"{tuple(parts[name].shape)}"
                )

    def check_low_rank(self, up: torch.Tensor | None, down: torch.Tensor | None) -> None:
        """Checks the factors of a low-rank term.

        Raises:
            ValueError: one of the two is missing, or their shapes do not fit the weight.
        """
        if up is None or down is None:
            raise ValueError("a low-rank term needs up and down together; one of them is None")
        wanted = self.low_rank_shapes(up.shape[-1] if up.dim() else 0)
        if (up.shape, down.shape) != (wanted["up"], wanted["down"]):
            raise ValueError(
                f"a low-rank term of up {tuple(up.shape)} and down {tuple(down.shape)} does not fit a quantized "
                f"weight of shape {tuple(self.seen_shape)}; expected up {tuple(wanted['up'])}, down "
                f"{tuple(wanted['down'])}"
            )
        if not (up.is_floating_point() and down.is_floating_point()):
            raise ValueError(f"a low-rank term must be float, found up {up.dtype} and down {down.dtype}")

    def __post_init__(self) -> None:
        # With inconsistent fields a kernel would read the wrong memory.
        count = len(self.shape)
        if count < 2 or not 0 <= self.axis < count - 1:
            raise ValueError(
                f"a quantized weight of shape {tuple(self.shape)} must have axis in 0..{count - 2}, found {self.axis}"
            )
        if self.transposed and self.axis != count - 2:
            raise ValueError(f"a weight of shape {tuple(self.shape)} with axis={self.axis} cannot be transposed")
        if not (self.dtype.is_floating_point and self.dtype.itemsize > 1):
            raise ValueError(f"the dtype of a quantized weight must be float of 16 bits or more, found {self.dtype}")
        length, group = self.row_length, self.group_size
        if group is not None and (group < 1 or (length and length % group)):
            raise ValueError(f"groups of {group} do not divide rows of {length} weights")
        if self.scale_bits is not None and check_scale_bits(self.scale_bits) is None:
            raise ValueError(f"scale_bits must be 4 to 8 or None, found {self.scale_bits}")
        if self.scale_bits is not None and self.qtype.blocks is not None:
            raise ValueError(f"{self.qtype.name} has scales of 8 bits; leave out scale_bits, found {self.scale_bits}")
        if self.zeros and not (self.affine and self.qtype.bits > 1):
            raise ValueError(f"{self.text()}: zeros are whole zero points of affine codes of 2 bits or more")
        if self.scale_block is not None:
            self._check_scale_block()
        elif self.signed and self.scale_code_bits is not None:
            raise ValueError(f"{self.text()}: signed scales are floats, or codes of scales in blocks (block=N)")
        block = self.rotation
        if block is not None and (block < 2 or block & (block - 1) or length % block):
            raise ValueError(f"rotation must be a power of two that divides rows of {length} weights, found {block}")
        if self.activation is not None and not self.activation.fits_activations:
            raise ValueError(
                f"activations are quantized to int8, float8, nvfp4 or an mx type, found {self.activation.name}"
            )
        if self.qtype.is_unsigned or self.qtype.is_codebook:
            self.qtype.affine(not self.affine)

    def _check_scale_block(self) -> None:
        block, group = self.scale_block, self.group_size
        if self.scale_bits is None or group is None or self.zeros:
            raise ValueError(
                f"{self.text()}: blocks of scales need groups, scales in few bits and shifts of their own: group=N, "
                f"scales=B, no zeros"
            )
        if block < 1 or block % group or self.row_length % block:  # type: ignore[operator]
            raise ValueError(
                f"{self.text()}: blocks of {block} must consist of whole groups of {group} and divide rows of "
                f"{self.row_length} weights"
            )

    # ------------------------------------------------------------------ text

    @functools.cached_property
    def words(self) -> str:
        """The text form without shape and dtype, which custom operators and compiled graphs get together with a shape."""
        words = [self.qtype.name]
        if self.group_size is not None:
            words.append(f"group={self.group_size}")
        if self.affine:
            words.append("affine")
        if self.axis:
            words.append(f"axis={self.axis}")
        if self.transposed:
            words.append("transposed")
        if self.activation is not None:
            words.append(f"activation={self.activation.name}")
        if self.scale_bits is not None:
            words.append(f"scales={self.scale_bits}")
        if self.rotation is not None:
            words.append(f"rotation={self.rotation}")
        if self.column:
            words.append("columns")
        if self.zeros:
            words.append("zeros")
        if self.signed:
            words.append("signed")
        if self.scale_block is not None:
            words.append(f"block={self.scale_block}")
        if self.order:
            words.append("order")
        return " ".join(words)

    def text(self, rank: int = 0) -> str:
        """The text form, with the shape that the tensor shows: ``"qint4 1536x576 group=64 affine"``."""
        name, *rest = self.words.split()
        words = [name, "x".join(map(str, self.seen_shape)), *rest]
        if rank:
            place = next((i for i, word in enumerate(words) if word.startswith(_AFTER_RANK)), len(words))
            words.insert(place, f"rank={rank}")
        return " ".join(words)

    def features(self) -> list[str]:
        """What belongs to the weight besides codes, scale and shift, for people: ``["column scale"]``."""
        found = {
            f"scales in {self.scale_bits} bits": self.scale_bits is not None,
            "whole zero points": self.zeros,
            f"blocks of {self.scale_block}": self.scale_block is not None,
            f"rotated in blocks of {self.rotation}": self.rotation is not None,
            "column scale": self.column,
            "columns in another order": self.order,
        }
        return [words for words, present in found.items() if present]

    @classmethod
    def from_words(cls, words: str, shape: Any, dtype: torch.dtype) -> WeightSpec:
        """The reverse of `words`; ``shape`` is the stored shape."""
        if all(type(size) is int for size in shape):
            return _from_words(words, tuple(shape), dtype)
        return cls(shape=torch.Size(shape), dtype=dtype, **parse_words(words))  # SymInt sizes cannot be cache keys


@functools.lru_cache(maxsize=4096)
def _from_words(words: str, shape: tuple[int, ...], dtype: torch.dtype) -> WeightSpec:
    return WeightSpec(shape=torch.Size(shape), dtype=dtype, **parse_words(words))


def swapped(shape: Any) -> torch.Size:
    """A shape with its last two axes swapped."""
    return torch.Size([*shape[:-2], shape[-1], shape[-2]])


def _number(text: str) -> int:
    """A size from its decimal digits; ``int`` would also take ``+8``, ``6_4`` and digits of other scripts.

    Raises:
        ValueError: it is something else, or larger than any size of a tensor.
    """
    if not (text.isascii() and text.isdigit() and len(text) <= 12):
        raise ValueError(f"{text!r} is no size")
    return int(text)


def parse_words(text: str) -> dict[str, Any]:
    """Fields of `WeightSpec` from `WeightSpec.words`; also ``rank``, if the text has it.

    Raises:
        KeyError, ValueError: a word is unknown, occurs twice, or has an invalid value.
    """
    kind, *words = text.split()
    fields: dict[str, Any] = {"qtype": qtypes[kind]}
    for word in words:
        key, _, value = word.partition("=")
        if word in ("affine", "transposed", "zeros", "signed", "order"):
            found: dict[str, Any] = {word: True}
        elif word == "columns":
            found = {"column": True}
        elif key == "block":
            found = {"scale_block": _number(value)}
        elif key == "group":
            found = {"group_size": _number(value)}
        elif key in ("axis", "rank"):
            found = {key: _number(value)}
        elif key == "scales":
            found = {"scale_bits": check_scale_bits(_number(value))}
        elif key == "rotation":
            found = {"rotation": check_rotation(_number(value))}
        elif key == "activation":
            found = {"activation": resolve_qtype(value)}
        else:
            raise KeyError(word)
        if found.keys() & fields.keys():
            raise ValueError(f"{word!r} occurs twice")
        fields |= found
    return fields


def parse_text(text: str, dtype: torch.dtype) -> tuple[WeightSpec, int]:
    """The reverse of `WeightSpec.text`: the spec and the rank of the low-rank term.

    Raises:
        KeyError, ValueError, IndexError: the text is not a valid spec.
    """
    if len(text.split()) < 2:
        raise ValueError("a type and a shape are needed")
    kind, shape, *words = text.split()
    fields = parse_words(" ".join([kind, *words]))
    rank = fields.pop("rank", 0)
    sizes = torch.Size(_number(size) for size in shape.split("x"))
    if math.prod(sizes) >= 2**48:
        raise ValueError(f"no tensor has {math.prod(sizes)} elements")
    stored = swapped(sizes) if fields.get("transposed") and len(sizes) > 1 else sizes
    return WeightSpec(shape=stored, dtype=dtype, **fields), rank
