"""Fixed: a buffer of fixed size for tokens; the old ones are quantized, once, the last ones stay float.

Every step runs the same operations on the same shapes: what depends on the number of tokens is computed with tensors, so a
compiled step is compiled once, and CUDA graphs can replay it.
"""

from __future__ import annotations

import torch

from requanto.kv.codec import Codec, Coded


class Fixed:
    """Cached keys or values of one layer, in buffers that are allocated once and keep their addresses.

    The last ``window + block`` tokens are in a ring of floats, where token p has slot ``p % (window + block)``;
    quantized blocks are in a buffer with a place for each block, or in a ring of blocks if only the last tokens are
    needed. Each update quantizes as many blocks as may become old in it; those that did not are written to one spare
    block that is never read.

    Args:
        first: ``[batch, heads, any tokens, channels]``: gives shape, dtype and device.
        codec: None: all tokens stay float.
        window: at least so many of the last tokens stay float.
        block: tokens that are quantized together.
        capacity: most tokens; with ``sliding``, the number of last tokens that are needed.
        sliding: True: older tokens are overwritten.
    """

    def __init__(
        self, first: torch.Tensor, codec: Codec | None, window: int, block: int, capacity: int, sliding: bool = False
    ) -> None:
        self.window, self.block, self.capacity, self.sliding = window, block, capacity, sliding
        blocks = capacity // block + 2 if sliding else (capacity - window) // block
        self.ring_size = window + block
        if codec is None or blocks < 1 or self.ring_size > capacity:
            codec, blocks, self.ring_size = None, 0, capacity
        self.codec, self.blocks = codec, blocks
        batch, heads, _, channels = first.shape
        self.ring = first.new_zeros(batch, heads, self.ring_size, channels)
        self._coded: Coded | None = None
        if codec is not None:
            codes = torch.zeros(
                batch, heads, blocks + 1, block, codec.width(channels), dtype=codec.code_dtype, device=first.device
            )
            per_block = (codec.groups(channels),) if codec.per == "channel" else (block, codec.groups(channels))
            scale = first.new_zeros(batch, heads, blocks + 1, *per_block)
            self._coded = Coded(codes, scale, torch.zeros_like(scale) if codec.affine else None)

    @property
    def buffers(self) -> list[torch.Tensor]:
        """All tensors that hold tokens."""
        return [self.ring, *(part for part in self._coded or () if part is not None)]

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and floats."""
        return sum(part.nbytes for part in self.buffers)

    def quantized_after(self, length: torch.Tensor, quantized: torch.Tensor) -> torch.Tensor:
        """Number of quantized tokens once there are ``length`` tokens, if there are ``quantized`` now."""
        if self.codec is None:
            return quantized
        whole = (length - self.window).div(self.block, rounding_mode="floor") * self.block
        return torch.maximum(quantized, whole)

    def update(
        self, x: torch.Tensor, length: torch.Tensor, quantized: torch.Tensor, offset: torch.Tensor | int, size: int
    ) -> torch.Tensor:
        """Adds tokens and returns ``size`` tokens from token ``offset`` on, ``[batch, heads, size, channels]``.

        Tokens that are quantized by this update are returned as they were. Places after the last token are finite.

        Args:
            x: float tokens ``[batch, heads, new tokens, channels]``.
            length, quantized: number of tokens, and of quantized ones, before this update; integer scalars.
            offset: first token that is returned; 0 without ``sliding``.
        """
        count = x.shape[2]
        positions = torch.arange(count, device=x.device) + length
        if self.codec is None and not self.sliding:
            self.ring.index_copy_(2, positions, x)
            return self.ring
        out = self._read(length, quantized, offset, size).index_copy_(2, positions - offset, x)
        if self.codec is not None:
            self._quantize(out, length + count, quantized, offset, count)
        kept = min(count, self.ring_size)
        self.ring.index_copy_(2, positions[count - kept :] % self.ring_size, x[:, :, count - kept :])
        return out

    def read(
        self, length: torch.Tensor, quantized: torch.Tensor, offset: torch.Tensor | int, size: int
    ) -> torch.Tensor:
        """``size`` tokens from token ``offset`` on; places after the last token are finite."""
        return self.ring if self.codec is None and not self.sliding else self._read(length, quantized, offset, size)

    def select(self, index: torch.Tensor) -> None:
        """Row i of the batch becomes row ``index[i]``."""
        for part in self.buffers:
            part.copy_(part.index_select(0, index.to(part.device)))

    def zero(self) -> None:
        """Clears all tokens."""
        for part in self.buffers:
            part.zero_()

    def _read(
        self, length: torch.Tensor, quantized: torch.Tensor, offset: torch.Tensor | int, size: int
    ) -> torch.Tensor:
        device = self.ring.device
        if self.codec is None:
            # The ring has all tokens that are needed.
            return self.ring.index_select(2, (torch.arange(size, device=device) + offset) % self.ring_size)
        batch, heads, _, channels = self.ring.shape
        stored = self.blocks * self.block
        out = self.ring.new_empty(batch, heads, stored if self.sliding else size, channels)
        self.codec.decode(self._flat(), out[:, :, :stored])
        if self.sliding:
            out = out.index_select(2, (torch.arange(size, device=device) + offset) % stored)
        else:
            out[:, :, stored:].zero_()
        # Float tokens are among as many places as the ring has slots: from the first one that is not quantized on, or
        # the last places. Places before the first float token keep what was decoded.
        end = offset + size - self.ring_size
        start = torch.minimum(quantized, end if isinstance(end, torch.Tensor) else torch.full_like(quantized, end))
        places = start + torch.arange(self.ring_size, device=device)
        floats = self.ring.index_select(2, places % self.ring_size)
        index = places - offset
        decoded = (places < quantized).view(-1, 1)
        return out.index_copy_(2, index, torch.where(decoded, out.index_select(2, index), floats))

    def _quantize(
        self,
        out: torch.Tensor,
        length: torch.Tensor,
        quantized: torch.Tensor,
        offset: torch.Tensor | int,
        count: int,
    ) -> None:
        """Quantizes the blocks that ``count`` new tokens made old; ``out`` is the result of the update."""
        most = min((self.block - 1 + count) // self.block, self.blocks)
        after = self.quantized_after(length, quantized)
        first = after - most * self.block
        tokens = first + torch.arange(most * self.block, device=out.device) - offset
        new = self.codec.encode(out.index_select(2, tokens.clamp(0, out.shape[2] - 1)))  # type: ignore[union-attr]
        starts = first + torch.arange(most, device=out.device) * self.block
        block = starts.div(self.block, rounding_mode="floor") % self.blocks
        place = torch.where(starts >= quantized, block, torch.full_like(block, self.blocks))
        for part, buffer in zip(new, self._coded):  # type: ignore[arg-type]
            if part is not None:
                buffer.index_copy_(2, place, part.reshape(*part.shape[:2], most, *buffer.shape[3:]))

    def _flat(self) -> Coded:
        """All blocks but the spare one, with tokens in one axis."""
        assert self._coded is not None
        assert self.codec is not None
        codes, scale, shift = (None if part is None else part[:, :, : self.blocks] for part in self._coded)
        if self.codec.per == "token":
            scale, shift = (None if part is None else part.flatten(2, 3) for part in (scale, shift))
        return Coded(codes.flatten(2, 3), scale, shift)  # type: ignore[union-attr, arg-type]
