"""Linear layers of Nunchaku: SVDQuant's with 4-bit inputs, and AWQ's with 16-bit inputs.

SVDQuant (Li et al. 2024, arXiv:2411.05007), with codes Q of the weight whose columns were multiplied by ``smooth``:

    y = Q (x / smooth) + up (down x) + bias

so the low-rank term sees x itself, and 1 / smooth is our column scale. Old files call ``proj_down``, ``proj_up`` and
``smooth_factor`` ``lora_down``, ``lora_up`` and ``smooth``. `nunchaku_tiles` has the order of all tensors. Q is

    int4     wscales * code                       groups of 64 (times wcscales of the row, if there)
    nvfp4    wscales * wtscale * wcscales * e2m1  groups of 16, wscales in e4m3; wcscales of the row

AWQ: ``wscales * code + wzeros`` in groups of 64, codes from 0 on.
"""

from __future__ import annotations

import torch

from requanto.checkpoint.foreign import nunchaku_tiles as tiles
from requanto.checkpoint.foreign.found import Parts
from requanto.checkpoint.foreign.pieces import joined
from requanto.checkpoint.foreign.source import Source
from requanto.checkpoint.format import CheckpointError
from requanto.dtypes.bit_packing import pack, unpack
from requanto.dtypes.qtypes import qtypes
from requanto.tensor.spec import WeightSpec

#: our name of a part -> its names in files
_PARTS = {
    **{name: (name,) for name in ("qweight", "wscales", "wcscales", "wtscale", "wzeros", "bias")},
    "down": ("proj_down", "lora_down"),
    "up": ("proj_up", "lora_up"),
    "smooth": ("smooth_factor", "smooth"),
}
#: what nothing is made of: the smoothing that was folded into the layer before
UNUSED = ("smooth_factor_orig", "smooth_orig")
#: what belongs to codes, in all spellings
NEEDS_CODES = (*(one for part in _PARTS if part not in ("qweight", "bias") for one in _PARTS[part]), *UNUSED)
_HALF = (torch.bfloat16, torch.float16)
#: added to the inputs of a layer behind GELU, which makes them positive
GELU_SHIFT = 0.171875
#: rows whose codes are unpacked at once
_CHUNK = 256


class Stored:
    """A linear layer as it is stored.

    Args:
        module: its name in the file.
        source: the stored tensors; headers are read here, and the smoothing.

    Attributes:
        rows, length: N and K.
        rank: of the low-rank term; 0: there is none.
        is_awq: True for 16-bit inputs.
        is_nvfp4: True for e2m1 codes.
        has_column: True if it is smoothed.
        has_row_scale: True if scales have a factor of each row.

    Raises:
        CheckpointError: tensors are missing, or do not fit each other.
    """

    def __init__(self, module: str, source: Source) -> None:
        self.module = module
        self._names: dict[str, str] = {}
        for part, spellings in _PARTS.items():
            name = next((joined(module, one) for one in spellings if joined(module, one) in source), None)
            if name is not None:
                self._names[part] = name
        stored = source.need(joined(module, "qweight"), module)
        self.is_awq = stored.dtype == torch.int32
        self.rank, self.is_nvfp4, self.has_column, self.has_row_scale = 0, False, False, False
        if self.is_awq:
            self._check_awq(source)
        else:
            self._check_svdq(source)

    def _need(self, source: Source, part: str, shape: tuple[int, ...], *dtypes: torch.dtype) -> None:
        source.need_shape(self._names.get(part, joined(self.module, _PARTS[part][0])), self.module, shape, *dtypes)

    def _check_awq(self, source: Source) -> None:
        blocks, half = source.header(self._names["qweight"]).shape
        self.rows, self.length = 4 * blocks, 2 * half
        groups = source.need(joined(self.module, "wscales"), self.module).shape[0]
        if self.length % 64 or groups < self.length // 64:
            self._need(source, "wscales", (self.length // 64, self.rows), *_HALF)
        for part in ("wscales", "wzeros"):
            self._need(source, part, (groups, self.rows), *_HALF)

    def _check_svdq(self, source: Source) -> None:
        rows, half = source.header(self._names["qweight"]).shape
        self.rows, self.length = rows, 2 * half
        self._need(source, "qweight", (-(-rows // 128) * 128, -(-half // 64) * 64), torch.int8)
        scale = source.need(joined(self.module, "wscales"), self.module)
        self.is_nvfp4 = scale.dtype == torch.float8_e4m3fn
        kinds = (torch.float8_e4m3fn,) if self.is_nvfp4 else _HALF
        self._need(source, "wscales", (self.length // self.group, rows), *kinds)
        if "down" in self._names or "up" in self._names:
            self.rank = source.need(self._names.get("down", joined(self.module, "proj_down")), self.module).shape[-1]
            padded = -(-self.rank // 16) * 16
            self._need(source, "down", (self.length, padded), *_HALF)
            self._need(source, "up", (rows, padded), *_HALF)
        for part, count in (("bias", rows), ("wcscales", rows), ("smooth", self.length)):
            if part in self._names:
                self._need(source, part, (count,), *_HALF)
        if "wtscale" in self._names:
            shape = source.header(self._names["wtscale"]).shape
            self._need(source, "wtscale", () if not shape else (1,), torch.float32, *_HALF)
            if not self.is_nvfp4:
                raise CheckpointError(
                    f"{self._names['wtscale']} is in the files, and int4 layers of Nunchaku have none"
                )
        if "smooth" not in self._names and (lost := [one for one in UNUSED if joined(self.module, one) in source]):
            source.need(joined(self.module, lost[0].removesuffix("_orig")), self.module)
        self.has_row_scale = "wcscales" in self._names
        # Where it was folded into the layer before, it is 1 everywhere.
        self.has_column = "smooth" in self._names and not bool((source[self._names["smooth"]] == 1).all())

    @property
    def group(self) -> int:
        """Weights that share a scale."""
        return 16 if self.is_nvfp4 else 64

    @property
    def bias(self) -> str | None:
        """Name of the bias, if there is one."""
        return self._names.get("bias")

    def sources(self, *but: str) -> tuple[str, ...]:
        """Names of its stored tensors without some parts."""
        return tuple(name for part, name in self._names.items() if part not in but)

    # ------------------------------------------------------------------ values

    def _get(self, source: Source, part: str) -> torch.Tensor | None:
        return source[self._names[part]] if part in self._names else None

    def codes(self, source: Source) -> torch.Tensor:
        """The bytes of our rows, uint8 ``[N, K / 2]``."""
        stored = source[self._names["qweight"]]
        if self.is_awq:
            return pack(tiles.codes_of_words(stored), 4)
        # int4: two's complement from -8 on becomes codes from 0 on
        rows = tiles.rows_of_codes(stored)
        return rows if self.is_nvfp4 else rows ^ 0x88

    def scales(self, source: Source) -> torch.Tensor:
        """Scales of groups ``[N, K / g]``: of nvfp4 the bytes of e4m3."""
        stored = source[self._names["wscales"]]
        if self.is_awq:
            return stored[: self.length // 64].t().contiguous()
        if self.is_nvfp4:
            return tiles.rows_of_small_scales(stored.view(torch.uint8)).contiguous()
        scale, row = tiles.rows_of_scales(stored).contiguous(), self._get(source, "wcscales")
        return scale if row is None else scale.float() * tiles.vector(row).float().unsqueeze(-1)

    def float_scales(self, source: Source) -> torch.Tensor:
        """Scales of groups as float32, of nvfp4."""
        return self.scales(source).view(torch.float8_e4m3fn).float() * self.row_scale(source)

    def row_scale(self, source: Source) -> torch.Tensor:
        """float32 factor of the scales of each row ``[N, 1]``, of nvfp4."""
        row, all_rows = self._get(source, "wcscales"), self.tensor_scale(source)
        if row is None:
            return torch.full((self.rows, 1), all_rows, dtype=torch.float32, device="cpu")
        return tiles.vector(row).float().unsqueeze(-1) * all_rows

    def tensor_scale(self, source: Source) -> float:
        """Factor of all scales, of nvfp4."""
        found = self._get(source, "wtscale")
        return 1.0 if found is None else float(found)

    def shift(self, source: Source) -> torch.Tensor:
        """What is subtracted, of AWQ ``[N, K / 64]``."""
        return -source[self._names["wzeros"]][: self.length // 64].t().contiguous()

    def column(self, source: Source) -> torch.Tensor:
        """float32 column scale ``[K]``."""
        found = self._get(source, "smooth")
        if found is None:
            return torch.ones(self.length, dtype=torch.float32, device="cpu")
        return 1 / tiles.vector(found).float()

    def low_rank(self, source: Source) -> tuple[torch.Tensor, torch.Tensor]:
        """``[N, r]`` and ``[r, K]``; r is 0 if there is none."""
        if not self.rank:
            empty = torch.zeros(0, dtype=torch.bfloat16, device="cpu")
            return empty.reshape(self.rows, 0), empty.reshape(0, self.length)
        up, down = source[self._names["up"]], source[self._names["down"]]
        return tiles.up_factor(up).contiguous(), tiles.down_factor(down).contiguous()

    def bias_values(self, source: Source, shifted: bool) -> torch.Tensor:
        """The bias ``[N]`` for inputs as they are.

        Args:
            shifted: Nunchaku adds `GELU_SHIFT` to the inputs of Q, and its bias is that for such inputs.
        """
        stored = source[self._names["bias"]]
        if self.is_awq:
            return stored
        bias = tiles.vector(stored)
        if not shifted or self.is_nvfp4:
            return bias.contiguous()
        return bias_without_shift(bias, self.codes(source), self.scales(source), self.column(source))


def bias_without_shift(
    bias: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, column: torch.Tensor
) -> torch.Tensor:
    """The bias ``[N]`` for inputs as they are, from that for inputs to which `GELU_SHIFT` was added.

    Args:
        bias: ``[N]``.
        packed: int4 codes, the bytes of our rows.
        scale: ``[N, K / g]``.
        column: ``[K]``.
    """
    rows, groups = scale.shape
    length = column.numel()
    scale, column = scale.double(), column.double().reshape(groups, -1)
    found = bias.double()
    for start in range(0, rows, _CHUNK):
        some = slice(start, start + _CHUNK)
        codes = unpack(packed[some], 4, length).double().sub_(8).unflatten(-1, (groups, -1))
        found[some] += GELU_SHIFT * ((codes * column).sum(-1) * scale[some]).sum(-1)
    return found.to(bias.dtype)


def weight_spec(pieces: list[Stored], rows: int) -> WeightSpec:
    """Description of the weight that some layers side by side (along K) are.

    Args:
        pieces: the layers.
        rows: N, of which each may have more.

    Raises:
        CheckpointError: the layers cannot be one.
    """
    first, length = pieces[0], sum(piece.length for piece in pieces)
    if any(
        (piece.is_nvfp4, piece.is_awq, piece.rows) != (first.is_nvfp4, first.is_awq, first.rows) for piece in pieces
    ):
        raise CheckpointError(
            f"{' and '.join(piece.module for piece in pieces)} are one layer in Diffusers, and differ in type or rows"
        )
    several = first.is_nvfp4 and len(pieces) > 1
    # Rows of one weight have one factor, and here they have two: scales become floats.
    floats = several and any(piece.has_row_scale for piece in pieces)
    kind = qtypes["qfp4_e2m1" if floats else "qnvfp4" if first.is_nvfp4 else "qint4"]
    column = any(piece.has_column for piece in pieces) or (several and not floats)
    return WeightSpec(
        *(kind, torch.Size([rows, length]), torch.float32),
        group_size=first.group,
        affine=first.is_awq,
        column=column,
    )


def weight_parts(pieces: list[Stored], rows: slice, order: int, spec: WeightSpec, source: Source) -> Parts:
    """The parts of a weight.

    Args:
        pieces: the layers that it consists of, along K.
        rows: those that it has of them.
        order: 1, or the number of modulations whose rows alternate: row i d + j is row i of modulation j, of d.
        spec: its description.
    """
    first = pieces[0]

    def put(values: list[torch.Tensor]) -> torch.Tensor:
        found = torch.cat(values, dim=-1)[rows] if len(values) > 1 else values[0][rows]
        return in_turns(found, order).contiguous()

    parts = {"qdata": put([piece.codes(source) for piece in pieces])}
    blocks = spec.qtype.blocks is not None
    scales = [piece.scales(source) if blocks or not piece.is_nvfp4 else piece.float_scales(source) for piece in pieces]
    widest = torch.float32 if any(scale.dtype == torch.float32 for scale in scales) else scales[0].dtype
    parts["scale"] = put([scale.to(widest) for scale in scales])
    if spec.affine:
        parts["shift"] = put([first.shift(source)])
    columns = [piece.column(source) for piece in pieces] if spec.column else []
    if blocks:
        parts["row_scale"] = put([first.row_scale(source)])
        # One number for each row: what the others have more goes to their columns.
        for place, piece in enumerate(pieces[1:], 1):
            columns[place] = columns[place] * (piece.tensor_scale(source) / first.tensor_scale(source))
    if spec.column:
        parts["column"] = torch.cat(columns)
    if any(piece.rank for piece in pieces):
        factors = [piece.low_rank(source) for piece in pieces]
        parts["up"] = put([up for up, _ in factors])
        parts["down"] = torch.block_diag(*(down for _, down in factors)) if len(factors) > 1 else factors[0][1]
    return parts


def in_turns(values: torch.Tensor, order: int) -> torch.Tensor:
    """Rows that alternate between ``order`` modulations, one modulation after the other."""
    if order == 1:
        return values
    return values.unflatten(0, (-1, order)).transpose(0, 1).flatten(0, 1)
