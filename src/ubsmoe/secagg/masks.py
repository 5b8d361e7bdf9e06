"""Masks: pseudo-random words that are added to a vector of integers modulo 2^k and cancel in the sum.

A mask is the key stream of ChaCha20 under a 256-bit key that is used for nothing else. The words of a vector are int32 or int64,
and their sums wrap around: k is the width of the dtype.
"""

import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from jaxtyping import Int
from torch import Tensor

CHUNK = 1 << 20  # words made at a time, so that a mask takes no memory of its own


def add_mask(vector: Int[Tensor, " d"], key: bytes, sign: int) -> None:
    """vector <- vector + sign PRG(key)  mod 2^k, in place.

    Args:
        vector: the words.
        key: 32 bytes, of this mask alone.
        sign: 1 puts the mask on, -1 takes it off.

    >>> vector = torch.arange(3)
    >>> add_mask(vector, bytes(32), 1)
    >>> add_mask(vector, bytes(32), -1)
    >>> vector
    tensor([0, 1, 2])
    """
    stream = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()
    for part in vector.split(CHUNK):
        words = torch.frombuffer(bytearray(stream.update(bytes(part.nbytes))), dtype=vector.dtype)
        part.add_(words) if sign > 0 else part.sub_(words)
