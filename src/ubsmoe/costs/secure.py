"""What secure aggregation costs: how wide a word of the sum is, bytes of vectors and of keys, and how many masks are made.

n clients in a round, h of them (itself among them) hold shares of a client's secrets, d words in a vector of k bits each.
"""

from dataclasses import asdict, dataclass
from typing import Literal

from ubsmoe.costs.shape import ModelShape

USE_BITS = 16  # of a weight below one example, where clients weigh by their use of experts

OFFER_BYTES = 600  # a client's keys, commitment and signature as JSON
BOX_BYTES = 400  # two shares in a box, in hex, with a name
SHARE_BYTES = 170  # one share in hex, with a name


def word_bits(clients: int, max_weight: int, bits: int, fraction: int) -> Literal[32, 64] | None:
    """k, the bits of a word: 32 or 64, whichever holds the largest sum; None if neither does.

        clients max_weight 2^fraction 2^(bits-1) < 2^(k-1)

    >>> word_bits(15, 4096, bits=16, fraction=0), word_bits(16, 4096, bits=16, fraction=0), word_bits(9, 2**40, 30, 0)
    (32, 64, None)
    """
    largest = clients * (max_weight << fraction) << (bits - 1)
    words: tuple[Literal[32, 64], ...] = (32, 64)
    return next((word for word in words if largest < 1 << (word - 1)), None)


@dataclass(frozen=True)
class SecureCost:
    """What a client has beside its task in a secure round, at most; `masks` are vectors of pseudo-random words that it makes."""

    vector_bytes: int
    key_upload_bytes: int
    key_download_bytes: int
    masks: int

    def as_dict(self) -> dict[str, int]:
        """Ready for JSON."""
        return asdict(self)


def secure_cost(shape: ModelShape, elements: int, word: int, clients: int, holders: int) -> SecureCost:
    """The cost of a client's secure round.

        d <= elements + L (6 M + K_max + 16) + 3 L M + 4      numbers; a weight for each row; use and counts; loss and totals

    Args:
        shape: the base; L layers of M experts.
        elements: numbers of a client's update, of all experts.
        word: k.
        clients: n.
        holders: h.
    """
    layers, experts = shape.num_moe_layers, shape.num_experts
    words = elements + layers * (6 * experts + shape.k_max + 16) + 3 * layers * experts + 4
    return SecureCost(
        vector_bytes=words * word // 8,
        key_upload_bytes=OFFER_BYTES + (holders - 1) * BOX_BYTES + holders * SHARE_BYTES,
        key_download_bytes=clients * OFFER_BYTES + (holders - 1) * BOX_BYTES,
        masks=holders,
    )
