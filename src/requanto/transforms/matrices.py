"""Orthogonal matrices for folded rotations: Hadamard matrices where one is known for the size, and their extensions."""

from __future__ import annotations

import torch

#: Sizes up to this are looked for among Paley's; the power of two multiplies them.
_LARGEST_PALEY = 512


def hadamard(size: int) -> torch.Tensor | None:
    """A matrix of +1 and -1 with orthogonal rows, float64 ``[size, size]``; None if no construction here has the size.

    Sylvester's doubling, Paley's two constructions over primes (order q + 1 for q = 3 mod 4, and 2 (q + 1) for q = 1 mod 4),
    and Kronecker products of those: 576 = 12 * 12 * 4, 640 = 20 * 32, 896 = 28 * 32.
    """
    if size == 1:
        return torch.ones(1, 1, dtype=torch.float64, device="cpu")
    if size == 2:
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64, device="cpu")
    if size % 4:
        return None
    if size & (size - 1):  # not a power of two
        for order in range(min(size, _LARGEST_PALEY), 11, -4):
            base = _paley(order) if size % order == 0 else None
            rest = None if base is None else hadamard(size // order)
            if base is not None and rest is not None:
                return torch.kron(rest, base)
        return None
    half = hadamard(size // 2)
    assert half is not None
    return torch.cat([torch.cat([half, half], 1), torch.cat([half, -half], 1)], 0)


def random_rotation(size: int, seed: int, keep_mean: bool = False) -> torch.Tensor:
    """A random orthogonal matrix Q, float64 ``[size, size]``; rows are rotated by ``x @ Q``.

    A Hadamard matrix with random signs, which spreads every channel evenly over all (QuaRot, Ashkboos et al. 2024,
    arXiv:2404.00456). For a size that has none, size = 2^k m: the Hadamard matrix of 2^k times a random orthogonal one of m.

    Args:
        seed: of the signs and of the random block.
        keep_mean: Q leaves the vector of ones unchanged, so that ``mean(x @ Q) = mean(x)`` and a LayerNorm without weights
            commutes with Q. Q is then a random rotation of the other ``size - 1`` directions.
    """
    generator = torch.Generator().manual_seed(seed)
    if keep_mean:
        mirror = torch.eye(
            size, dtype=torch.float64, device="cpu"
        )  # Householder's: it swaps the first axis and the vector of ones
        axis = torch.full((size,), -(size**-0.5), dtype=torch.float64, device="cpu")
        axis[0] += 1
        if size > 1:
            mirror -= 2 * torch.outer(axis, axis) / axis.dot(axis)
        inner = torch.eye(size, dtype=torch.float64, device="cpu")
        inner[1:, 1:] = _random_orthogonal(size - 1, generator)
        return mirror @ inner @ mirror
    signs = torch.randint(0, 2, (size,), generator=generator, device="cpu").double() * 2 - 1
    whole = hadamard(size)
    if whole is not None:
        return signs[:, None] * whole / size**0.5
    power = size & -size
    part = hadamard(power)
    assert part is not None
    return signs[:, None] * torch.kron(part / power**0.5, _random_orthogonal(size // power, generator))


def _random_orthogonal(size: int, generator: torch.Generator) -> torch.Tensor:
    q, r = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator, device="cpu"))
    return (q * r.diagonal().sign()).contiguous()  # makes it uniform over all orthogonal matrices


def _paley(order: int) -> torch.Tensor | None:
    """Paley's Hadamard matrix of this order over a prime field, or None."""
    prime, second = (order - 1, False) if _is_prime(order - 1) and (order - 1) % 4 == 3 else (order // 2 - 1, True)
    if not _is_prime(prime) or (second and prime % 4 != 1):
        return None
    squares = {x * x % prime for x in range(1, prime)}
    character = torch.tensor(
        [0.0] + [1.0 if x in squares else -1.0 for x in range(1, prime)], dtype=torch.float64, device="cpu"
    )
    index = torch.arange(prime, device="cpu")
    conference = torch.zeros(prime + 1, prime + 1, dtype=torch.float64, device="cpu")
    conference[1:, 1:] = character[(index[:, None] - index[None, :]) % prime]
    conference[0, 1:] = 1
    conference[1:, 0] = 1 if second else -1
    eye = torch.eye(prime + 1, dtype=torch.float64, device="cpu")
    if not second:
        return conference + eye
    one, two = (
        torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64, device="cpu"),
        torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64, device="cpu"),
    )
    return torch.kron(conference, one) + torch.kron(eye, two)


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % factor for factor in range(2, int(number**0.5) + 1))
