"""Growing: a buffer of tokens that grows; the old ones are quantized, once, the last ones stay float."""

from __future__ import annotations

from collections.abc import Callable

import torch

from requanto.kv.codec import Codec, Coded


class Growing:
    """Cached keys or values of one layer.

    Tokens are appended as floats. As soon as ``window`` plus one block of them are float, the oldest block is
    quantized. Nothing is quantized a second time: a block keeps its codes and scales until it is removed, so errors do
    not add up.

    Args:
        first: ``[batch, heads, any tokens, channels]``: gives shape, dtype and device; its tokens are not appended.
        codec: None: all tokens stay float.
        window: at least so many of the last tokens stay float.
        block: tokens that are quantized together.
    """

    def __init__(self, first: torch.Tensor, codec: Codec | None, window: int, block: int) -> None:
        self.codec, self.window, self.block = codec, window, block
        self._recent = first[:, :, :0].detach()
        self._coded: Coded | None = None
        # Tokens of each quantized block: crop() leaves shorter ones, whose scales stay as they are.
        self._sizes: list[int] = []
        #: Tokens of the first block that are gone already: drop_front() removes whole blocks.
        self._skipped = 0

    @property
    def shape(self) -> torch.Size:
        """``[batch, heads, tokens, channels]``."""
        batch, heads, _, channels = self._recent.shape
        return torch.Size([batch, heads, self.length, channels])

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the values that are read."""
        return self._recent.dtype

    @property
    def device(self) -> torch.device:
        """Where the tokens are now."""
        return self._recent.device

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.quantized + self._recent.shape[2]

    @property
    def quantized(self) -> int:
        """Number of quantized tokens."""
        return sum(self._sizes) - self._skipped

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and floats."""
        return sum(part.nbytes for part in self._tensors())

    def append(self, x: torch.Tensor) -> None:
        """Adds float tokens ``[batch, heads, new tokens, channels]``."""
        self._recent = torch.cat([self._recent, x], dim=2)

    def read(self) -> torch.Tensor:
        """All tokens as floats, ``[batch, heads, tokens, channels]``; those in the window exactly as they were appended."""
        if self._coded is None:
            return self._recent
        stored = sum(self._sizes)
        batch, heads, recent, channels = self._recent.shape
        out = self._recent.new_empty(batch, heads, stored + recent, channels)
        self.codec.decode(self._spread(self._coded), out[:, :, :stored])  # type: ignore[union-attr]
        if self._recent.requires_grad:
            return torch.cat([out[:, :, self._skipped : stored], self._recent], dim=2)
        out[:, :, stored:] = self._recent
        return out[:, :, self._skipped :]

    def quantize_old(self) -> None:
        """Quantizes the whole blocks of float tokens that lie before the window."""
        count = (self._recent.shape[2] - self.window) // self.block
        if self.codec is None or count <= 0:
            return
        tokens = count * self.block
        new = self.codec.encode(self._recent[:, :, :tokens].detach())
        # A copy: a view would keep the memory of the tokens before it.
        self._recent = self._recent[:, :, tokens:].clone()
        old = self._coded
        self._coded = new if old is None else _map(lambda a, b: torch.cat([a, b], dim=2), old, new)
        self._sizes += [self.block] * count

    def crop(self, tokens: int) -> None:
        """Removes the last tokens, all of them if there are fewer. Codes and scales of the others do not change."""
        recent = self._recent.shape[2]
        self._recent = self._recent[:, :, : max(0, recent - tokens)]
        left = min(tokens - recent, self.quantized)
        if left <= 0 or self._coded is None:
            return
        kept = sum(self._sizes) - left
        while sum(self._sizes) - self._sizes[-1] >= kept > 0:
            self._sizes.pop()
        if kept - self._skipped <= 0:
            self._coded, self._sizes, self._skipped = None, [], 0
            return
        self._sizes[-1] -= sum(self._sizes) - kept
        self._coded = self._sliced(self._coded, slice(0, kept), slice(0, len(self._sizes)))

    def drop_front(self, tokens: int) -> None:
        """Removes the first tokens, all of them if there are fewer."""
        stored = min(tokens, self.quantized)
        if self._coded is not None:
            self._skipped += stored
            gone = 0
            while gone < len(self._sizes) and self._skipped >= self._sizes[gone]:
                self._skipped -= self._sizes[gone]
                gone += 1
            if gone == len(self._sizes):
                self._coded, self._sizes, self._skipped = None, [], 0
            elif gone:
                start = sum(self._sizes[:gone])
                self._coded = self._sliced(self._coded, slice(start, None), slice(gone, None))
                self._sizes = self._sizes[gone:]
        if tokens > stored:
            self._recent = self._recent[:, :, tokens - stored :]

    def select(self, index: torch.Tensor) -> None:
        """Keeps the rows ``index`` of the batch, in this order; a row may come several times."""
        self._apply(lambda part: part.index_select(0, index.to(part.device)))

    def repeat(self, times: int) -> None:
        """Repeats each row of the batch."""
        self._apply(lambda part: part.repeat_interleave(times, dim=0))

    def to(self, device: torch.device | str) -> None:
        """Moves all tokens."""
        self._apply(lambda part: part.to(device, non_blocking=True))

    def _apply(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._recent = function(self._recent)
        if self._coded is not None:
            self._coded = _map(function, self._coded)

    def _tensors(self) -> list[torch.Tensor]:
        return [self._recent, *(part for part in self._coded or () if part is not None)]

    def _sliced(self, coded: Coded, tokens: slice, blocks: slice) -> Coded:
        scales = blocks if self.codec.per == "channel" else tokens  # type: ignore[union-attr]
        # Copies, so that the removed part is freed.
        scale, shift = _slice(coded.scale, scales), _slice(coded.shift, scales)
        return Coded(coded.codes[:, :, tokens].clone(), scale, shift)  # type: ignore[arg-type]

    def _spread(self, coded: Coded) -> Coded:
        """The same with one scale for each token where blocks differ in size."""
        if self.codec.per == "token" or all(size == self.block for size in self._sizes):  # type: ignore[union-attr]
            return coded
        sizes = torch.tensor(self._sizes, dtype=torch.int64, device="cpu")
        block = torch.repeat_interleave(torch.arange(len(sizes), device="cpu"), sizes).to(coded.codes.device)
        return Coded(
            coded.codes,
            *(None if part is None else part.index_select(2, block) for part in coded[1:]),  # type: ignore[arg-type]
        )


def _map(function: Callable[..., torch.Tensor], *coded: Coded) -> Coded:
    return Coded(*(None if parts[0] is None else function(*parts) for parts in zip(*coded)))  # type: ignore[arg-type]


def _slice(part: torch.Tensor | None, index: slice) -> torch.Tensor | None:
    return None if part is None else part[:, :, index].clone()
