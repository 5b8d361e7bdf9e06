"""Shamir's secret sharing over a prime field: any `threshold` shares give the secret, fewer tell nothing about it.

    f(x) = secret + c_1 x + ... + c_{t-1} x^{t-1}  mod p,   share_i = f(i),   secret = sum_i f(i) prod_{j != i} j / (j - i)

p = 2^521 - 1, a prime above every 32-byte secret; coefficients come from the system's generator.

Source: Shamir 1979, How to share a secret.
"""

import secrets
from collections.abc import Mapping

PRIME = 2**521 - 1
SECRET_BYTES = 32
SHARE_BYTES = 66


def split(secret: bytes, threshold: int, count: int) -> list[bytes]:
    """`count` shares of a secret, those of x = 1, 2, ..., of which any `threshold` give it back.

    >>> shares = split(b"s" * 32, threshold=2, count=3)
    >>> combine({1: shares[0], 3: shares[2]})
    b'ssssssssssssssssssssssssssssssss'
    """
    drawn = (secrets.randbelow(PRIME) for _ in range(threshold - 1))
    coefficients = [int.from_bytes(secret, "big"), *drawn]
    return [_at(coefficients, x).to_bytes(SHARE_BYTES, "big") for x in range(1, count + 1)]


def combine(shares: Mapping[int, bytes]) -> bytes:
    """The secret of these shares by their x: the wrong one, or ValueError, if they are too few or not of one secret."""
    total = 0
    for i, share in shares.items():
        above = below = 1
        for j in shares:
            if j != i:
                above, below = above * j % PRIME, below * (j - i) % PRIME
        total += int.from_bytes(share, "big") * above * pow(below, -1, PRIME)
    try:
        return (total % PRIME).to_bytes(SECRET_BYTES, "big")
    except OverflowError:
        raise ValueError("these shares are not of one secret") from None


def _at(coefficients: list[int], x: int) -> int:
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * x + coefficient) % PRIME
    return value
