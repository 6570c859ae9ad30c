"""Bit packing: codes of 1 to 7 bits <-> bytes.

The bits of a row are one stream, low bits first: code k is bits ``k * b .. (k + 1) * b``. So a byte of 4-bit codes has code
2k in its low nibble and code 2k+1 in its high one, and 8 codes of 3 bits fill 3 bytes. The last byte of a row is padded
with zero bits, which unpacking drops.
"""

from __future__ import annotations

import torch

#: number of codes in a byte -> integer dtype with one byte for each of them
_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
#: bit widths that divide a byte
_WHOLE = (1, 2, 4)


def packed_length(length: int, bits: int) -> int:
    """Number of bytes for ``length`` codes of ``bits`` bits (1 to 7)."""
    return -(-length * bits // 8)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Packs unsigned codes.

    Args:
        codes: uint8 ``[..., K]``, each in ``0 .. 2^bits - 1``.
        bits: 1 to 7.

    Returns:
        uint8 ``[..., ceil(K * bits / 8)]``.
    """
    if codes.dtype != torch.uint8:
        raise ValueError(f"codes to pack must be uint8, found {codes.dtype}")
    if not 1 <= bits <= 7:
        raise ValueError(f"codes of 1 to 7 bits are packed, found bits={bits}")
    length = codes.shape[-1]
    if codes.numel() == 0:
        return codes.new_empty(*codes.shape[:-1], packed_length(length, bits))
    per_word = 8 // bits if bits in _WHOLE else 8
    missing = -length % per_word
    if missing:
        codes = torch.nn.functional.pad(codes, (0, missing))
    # The codes of one packed byte are read as one little-endian word (code i at bit 8i) and shifted to bit bits*i: one pass
    # over contiguous words, instead of several strided passes over every second or fourth code.
    word = codes.contiguous().view(_WORDS[per_word])
    if bits not in _WHOLE:
        return _bytes_of(_slide_together(word, bits), bits)[..., : packed_length(length, bits)]
    packed = word.clone()
    for lane in range(1, per_word):
        packed |= word >> ((8 - bits) * lane)
    return packed.to(torch.uint8)


def unpack(packed: torch.Tensor, bits: int, length: int) -> torch.Tensor:
    """The reverse of :func:`pack`: uint8 ``[..., length]``."""
    if packed.dtype != torch.uint8:
        raise ValueError(f"packed codes must be uint8, found {packed.dtype}")
    if packed.numel() == 0:
        return packed.new_empty(*packed.shape[:-1], length)
    if bits not in _WHOLE:
        return _slide_apart(_words_of(packed, bits), bits, 8).view(torch.uint8)[..., :length]
    per_byte = 8 // bits
    # Bytes with any strides become words side by side.
    word = packed.to(_WORDS[per_byte], memory_format=torch.contiguous_format)
    spread = word.clone()
    for lane in range(1, per_byte):
        spread |= word << ((8 - bits) * lane)
    # One code in the low bits of every byte of the word.
    spread &= sum((2**bits - 1) << (8 * lane) for lane in range(per_byte))
    return spread.view(torch.uint8)[..., :length]


def unpack_pairs(packed: torch.Tensor, bits: int, length: int) -> torch.Tensor:
    """Unpacks pairs of codes as ``code[2k] + 2^bits * code[2k+1]``: ``[..., ceil(length / 2)]``.

    The dtype is uint8 up to 4 bits, else int16. A table lookup of pairs takes half the time of one of single codes.
    """
    pairs = -(-length // 2)
    if bits == 4:
        return packed[..., :pairs]
    if bits < 4:
        return unpack(packed, 2 * bits, pairs)
    return _slide_apart(_words_of(packed, bits), bits, 16).view(torch.int16)[..., :pairs]


# ---------------------------------------------------------------------- widths that do not divide a byte
#
# 8 codes are one int64 word: unpacked, one in each of its 8 bytes; packed, in its low 8 * bits bits. Three steps convert
# between the two, each of which merges or splits pairs of fields with a few operators on whole words.


def _words_of(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """``[..., bytes]`` -> int64 ``[..., ceil(bytes / bits)]``: ``bits`` bytes in the low bytes of each word."""
    missing = -packed.shape[-1] % bits
    if missing:
        packed = torch.nn.functional.pad(packed, (0, missing))
    parts = packed.unflatten(-1, (-1, bits))
    words = parts.new_zeros(*parts.shape[:-1], 8)
    for byte in range(bits):  # a few long strided copies are faster than one copy with an inner loop of a few bytes
        words[..., byte] = parts[..., byte]
    return words.view(torch.int64).squeeze(-1)


def _bytes_of(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The reverse of :func:`_words_of`."""
    parts = words.unsqueeze(-1).view(torch.uint8)
    packed = parts.new_empty(*words.shape, bits)
    for byte in range(bits):
        packed[..., byte] = parts[..., byte]
    return packed.flatten(-2)


def _slide_apart(words: torch.Tensor, bits: int, lane: int) -> torch.Tensor:
    """Spreads adjacent fields of ``bits`` bits to lanes of 8 bits, or pairs of them to lanes of 16 bits, in place.

    With a new tensor for each step, page faults would take most of the time.
    """
    high = torch.empty_like(words)
    for width, wide in ((4 * bits, 32), (2 * bits, 16), (bits, 8)):
        if wide < lane:
            break
        low = _repeated(width, 2 * wide)
        high.copy_(words).bitwise_left_shift_(wide - width).bitwise_and_(_signed(low << wide))
        words.bitwise_and_(_signed(low)).bitwise_or_(high)
    return words


def _slide_together(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Moves the codes in the bytes of a word together into its low bits."""
    for width, wide in ((bits, 8), (2 * bits, 16), (4 * bits, 32)):
        low = _repeated(width, 2 * wide)
        # Codes have at most 7 bits, so words are not negative and a right shift inserts zeros.
        high = (words >> (wide - width)).bitwise_and_(_signed(low << width))
        words = high.bitwise_or_(words & _signed(low))
    return words


def _repeated(width: int, lane: int) -> int:
    """A mask of ``width`` ones in each lane of a 64-bit word."""
    return sum((2**width - 1) << start for start in range(0, 64, lane))


def _signed(mask: int) -> int:
    return mask - 2**64 if mask >= 2**63 else mask
