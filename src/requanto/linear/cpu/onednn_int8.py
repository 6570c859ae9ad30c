"""int8 weights in oneDNN's blocked layout, and oneDNN's int8 GEMM on them (`requanto.linear.cpu.int8_gemm` uses it).

The packed codes are ordinary bytes, the memory of oneDNN's opaque tensor. They can be converted back to the plain codes bit
for bit (`tests/linear`), so they replace them.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from weakref import WeakValueDictionary

import torch

from requanto.dtypes.qtypes import qint8
from requanto.linear.cpu.aot import cache
from requanto.linear.cpu.onednn_bf16 import padded
from requanto.runtime.tracing import without_ambient_state
from requanto.tensor.layout import LOCK, Layout, Parts, register_layout
from requanto.tensor.qtensor import QTensor
from requanto.tensor.spec import WeightSpec

logger = logging.getLogger(__name__)

#: Largest K for which an int32 sum of products of 255 * 128 cannot overflow.
MAX_K = 2**31 // (255 * 128)


class Int8Layout(Layout):
    """int8 ``[N, K]`` in oneDNN's usual layout, as bytes: blocks of 64 rows, four codes along K (`words`).

    Every machine can read it, even if oneDNN uses another layout there.
    """

    name = "onednn-int8"
    rows_are_views = False

    def accepts(self, spec: WeightSpec) -> bool:
        return spec.qtype == qint8 and not spec.affine and spec.group_size is None

    def pack(self, spec: WeightSpec, parts: Parts) -> dict[str, torch.Tensor]:
        codes = parts["qdata"].reshape(spec.matrix_shape)
        packed = bytes_of(_prepacked(codes))
        expected = self.codes_shape_dtype(spec)[0].numel()
        if packed.numel() != expected or not _reads_as(packed, codes):
            raise RuntimeError(
                f"oneDNN's layout of an int8 weight of shape {tuple(codes.shape)} is not the expected one: set "
                "requanto.settings.pack_on_first_use = False (REQUANTO_PACK=0), and please report it"
            )
        return {"qdata": packed}

    def unpack(self, spec: WeightSpec, parts: Parts) -> torch.Tensor:
        return self.codes(spec, parts, 0, spec.matrix_shape[0]).reshape(spec.codes_shape)

    def codes(self, spec: WeightSpec, parts: Parts, start: int, stop: int) -> torch.Tensor:
        rows, length = spec.matrix_shape
        first = start // 64
        blocks = words(parts["qdata"], rows, length)[first : -(-stop // 64)]
        codes = blocks.transpose(1, 2).contiguous().view(torch.int8).view(-1, 4 * blocks.shape[1])
        return codes[start - 64 * first : stop - 64 * first, :length].contiguous()

    def gather(self, spec: WeightSpec, parts: Parts, index: torch.Tensor) -> torch.Tensor:
        rows, length = spec.matrix_shape
        index = checked_index(index, rows)
        found = words(parts["qdata"], rows, length)[index // 64, :, index % 64]
        return found.contiguous().view(torch.int8).view(len(index), -1)[:, :length].contiguous()

    def clone(self, spec: WeightSpec, parts: Parts) -> dict[str, torch.Tensor]:
        return {"qdata": parts["qdata"].clone()}  # oneDNN's tensor is made when a GEMM needs it: `qlinear_weight`

    def codes_shape_dtype(self, spec: WeightSpec) -> tuple[torch.Size, torch.dtype]:
        rows, length = (padded(size) for size in spec.matrix_shape)
        return torch.Size([rows * length + (4 * rows if _holds_sums(spec.row_length) else 0)]), torch.uint8


class OpaqueInt8Layout(Int8Layout):
    """An unknown layout of oneDNN. Its name includes a digest of the machine, so that other machines refuse to load it."""

    def __init__(self) -> None:
        self.name = f"onednn-int8-{cache.machine()}"

    def pack(self, spec: WeightSpec, parts: Parts) -> dict[str, torch.Tensor]:
        return {"qdata": bytes_of(_prepacked(parts["qdata"].reshape(spec.matrix_shape)))}

    def codes(self, spec: WeightSpec, parts: Parts, start: int, stop: int) -> torch.Tensor:
        return opaque(parts["qdata"], *spec.matrix_shape).to_dense().t()[start:stop].contiguous()

    def gather(self, spec: WeightSpec, parts: Parts, index: torch.Tensor) -> torch.Tensor:
        return torch.index_select(self.codes(spec, parts, 0, spec.matrix_shape[0]), 0, index)

    def codes_shape_dtype(self, spec: WeightSpec) -> tuple[torch.Size, torch.dtype]:
        return torch.Size([_nbytes(*spec.matrix_shape)]), torch.uint8


BLOCKED = register_layout(Int8Layout())


def checked_index(index: torch.Tensor, rows: int) -> torch.Tensor:
    """The index as int64, checked to be in range; advanced indexing would take -1 for the last row.

    Raises:
        IndexError: an index is out of range.
    """
    if index.numel() and (int(index.min()) < 0 or int(index.max()) >= rows):
        raise IndexError(f"index out of range: found {int(index.min())}..{int(index.max())} for {rows} rows")
    return index.long()


def _prepacked(codes: torch.Tensor) -> torch.Tensor:
    return torch.ops.onednn.qlinear_prepack(codes.contiguous(), None)


@functools.lru_cache(maxsize=1024)
def _nbytes(rows: int, length: int) -> int:
    with without_ambient_state():
        return int(torch.ops.mkldnn._nbytes(_prepacked(torch.zeros(rows, length, dtype=torch.int8, device="cpu"))))


#: oneDNN's tensors by the address of their memory, as long as a tensor made by `bytes_of` keeps them alive.
_opaque: WeakValueDictionary[int, torch.Tensor] = WeakValueDictionary()


def _bytes_of_opaque(packed: torch.Tensor) -> int:
    return int(torch.ops.mkldnn._nbytes(packed))


def bytes_of(packed: torch.Tensor) -> torch.Tensor:
    """A uint8 tensor over the memory of oneDNN's tensor, which it keeps alive."""
    address, size = torch.ops.mkldnn.data_ptr(packed), _bytes_of_opaque(packed)
    memory = (ctypes.c_char * size).from_address(address)
    memory.owner = packed
    _opaque[address] = packed
    return torch.frombuffer(memory, dtype=torch.uint8)


def opaque(codes: torch.Tensor, rows: int, length: int) -> torch.Tensor:
    """oneDNN's tensor for these bytes; with a copy of them if oneDNN did not allocate them (e.g. loaded from a file)."""
    found = _opaque.get(codes.data_ptr())
    if found is not None and tuple(found.shape) == (length, rows) and codes.numel() == _bytes_of_opaque(found):
        return found
    with without_ambient_state():
        packed = _prepacked(torch.zeros(rows, length, dtype=torch.int8, device="cpu"))
        bytes_of(packed).copy_(codes)
    return packed


def words(codes: torch.Tensor, rows: int, length: int) -> torch.Tensor:
    """View of the bytes of `Int8Layout` as int32 ``[ceil(N / 64), ceil(K / 64) * 16, 64]``, four codes along K in each."""
    wide, long = padded(rows), padded(length)
    return codes[: wide * long].view(torch.int32).view(wide // 64, long // 4, 64)


@functools.cache
def works() -> bool:
    """True if oneDNN's int8 GEMM exists, is exact, and its weights can be read and unpacked; checked with a small matrix.

    Without VNNI, oneDNN adds pairs of products in 16 bits, which overflow. Whether it does depends on both the CPU and
    ONEDNN_MAX_CPU_ISA.
    """
    with without_ambient_state():
        try:
            codes = torch.full((48, 80), 127, dtype=torch.int8, device="cpu")
            codes[:, ::3] = -128
            packed = _prepacked(codes)
            x = torch.full((5, 80), 255, dtype=torch.uint8, device="cpu")
            out = int8_gemm(x, QLinearWeight(packed, 48), torch.ones(48, dtype=torch.float32, device="cpu"))
            exact = torch.equal(out.double(), (x.double() - 128) @ codes.double().t())
            bytes_of(packed)
            if exact and torch.equal(packed.to_dense().t().contiguous(), codes):
                return True
            why = "its sums saturate (no VNNI), or its weights cannot be unpacked"
        except (RuntimeError, AttributeError, NotImplementedError) as error:
            why = str(error).splitlines()[0]
    logger.info("oneDNN's int8 GEMM is not used on this machine: %s", why)
    return False


def layout(rows: int, length: int) -> Int8Layout | None:
    """The layout of a weight of that shape on this machine; None if oneDNN's int8 GEMM is not available."""
    if not works():
        return None
    return BLOCKED if _probed(min(rows, 128 + rows % 64), length) is not None else _opaque_layout()


@functools.cache
def _opaque_layout() -> OpaqueInt8Layout:
    logger.info("compiled kernels cannot read packed int8 weights on this machine: oneDNN uses an unknown layout")
    found = OpaqueInt8Layout()
    register_layout(found)
    return found


@functools.lru_cache(maxsize=1024)
def _probed(rows: int, length: int) -> int | None:
    """Extra bytes per row after the codes of `Int8Layout`; None if oneDNN has another layout for this shape (tested)."""
    with without_ambient_state():
        codes = torch.randint(-128, 128, (rows, length), dtype=torch.int8, generator=torch.Generator(), device="cpu")
        memory, wide = bytes_of(_prepacked(codes)), padded(rows)
        behind, left = divmod(memory.numel() - wide * padded(length), wide)
        # Either no extra bytes or one int32 sum per row; small weights are padded differently.
        return behind if not left and behind in (0, 4) and _reads_as(memory, codes) else None


def _holds_sums(length: int) -> bool:
    return bool(_probed(128, length)) if works() else False


def _reads_as(memory: torch.Tensor, codes: torch.Tensor) -> bool:
    """True if the first and the last block of the bytes are these codes in `Int8Layout`, padded with zeros."""
    rows, length = codes.shape
    blocks, long = words(memory, rows, length), padded(length)
    for block in {0, len(blocks) - 1}:
        part = codes[64 * block : 64 * (block + 1)]
        part = torch.nn.functional.pad(part, (0, long - length, 0, 64 - len(part)))
        expected = part.view(64, long // 4, 4).transpose(0, 1).contiguous()
        if not torch.equal(blocks[block], expected.view(torch.int32).squeeze(-1)):
            return False
    return True


class QLinearWeight:
    """Arguments of oneDNN's operator that belong to one weight.

    Attributes:
        packed: oneDNN's tensor.
        zeros: int32 ``[N]``, the zero points of the rows.
    """

    __slots__ = ("packed", "zeros")

    def __init__(self, packed: torch.Tensor, rows: int) -> None:
        self.packed = packed
        with without_ambient_state():
            self.zeros = torch.zeros(rows, dtype=torch.int32, device="cpu")

    @property
    def nbytes(self) -> int:
        """Bytes in addition to the weight, whose memory oneDNN's tensor uses."""
        return self.zeros.nbytes


def qlinear_weight(weight: QTensor) -> QLinearWeight:
    """The `QLinearWeight` of a weight in this layout, cached in its storage."""
    storage, (rows, length) = weight._storage, weight.matrix_shape
    derived = storage.derived  # before the parts: a change in another thread replaces this dictionary
    found = derived.get("int8 gemm")
    if found is None:
        layout, parts = storage.state
        packed = opaque(parts["qdata"], rows, length)
        if torch.ops.mkldnn.data_ptr(packed) != parts["qdata"].data_ptr():
            # The codes are a clone: its memory is replaced by that of oneDNN's tensor, so that they are stored once.
            with LOCK:
                if storage.state[1] is parts and storage.base is None:
                    storage.set({**parts, "qdata": bytes_of(packed)}, layout, weight._spec)
                    derived = storage.derived
        found = derived["int8 gemm"] = QLinearWeight(packed, rows)
    return found


def words_of(weight: QTensor) -> torch.Tensor | None:
    """`words` of a weight; None if its layout is not `BLOCKED`, so that compiled kernels cannot read it."""
    layout, parts = weight._storage.state
    return words(parts["qdata"], *weight.matrix_shape) if layout is BLOCKED and weight.numel() else None


def int8_gemm(x: torch.Tensor, packed: QLinearWeight, scale: torch.Tensor, step: float = 1.0) -> torch.Tensor:
    """Computes ``(x - 128) @ w.T * scale * step`` in float32. x: uint8 ``[rows, K]``; scale: float32 ``[N]``."""
    return torch.ops.onednn.qlinear_pointwise(
        x, step, 128, packed.packed, scale, packed.zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )


def int8_gemm_into(sums: torch.Tensor, x: torch.Tensor, packed: QLinearWeight, scale: torch.Tensor) -> torch.Tensor:
    """`int8_gemm` that writes into ``sums`` ``[rows, N]``: zeroing and adding is faster than page faults of a new tensor."""
    return torch.ops.onednn.qlinear_pointwise.binary(
        x, 1.0, 128, packed.packed, scale, packed.zeros, sums.zero_(), None, 1.0, 0, torch.float32, 1.0, 0, "sum", 1.0,
        "none", [], "",
    )  # fmt: skip
