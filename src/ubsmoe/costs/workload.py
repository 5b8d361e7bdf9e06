"""What a client trains in one step, and how: all that a cost depends on beside the base's shape and K."""

from dataclasses import dataclass
from typing import Literal, Self

from ubsmoe.costs.compensation import Skipped
from ubsmoe.costs.shape import EXPERTS_ONLY, Trained

WireDtype = Literal["float32", "bfloat16", "int8"]
"""Precisions in which an update can travel."""

ExpertFormat = Literal["int8", "nf4"]
"""What the frozen experts can be quantised to."""

NamedFormat = Literal["plain", "int8", "nf4"]
"""The same where "as in the checkpoint" needs a name, since one of several clients has its experts so."""


def format_named(name: NamedFormat) -> ExpertFormat | None:
    """What that name says: None for plain experts."""
    return None if name == "plain" else name


@dataclass(frozen=True)
class Batch:
    """The shape of one forward pass: sequences, their padded length, tokens that are no padding, positions with a label."""

    rows: int
    length: int
    real: int
    labelled: int

    @classmethod
    def full(cls, rows: int, length: int) -> Self:
        """The batch of this size that costs most: no padding, a label at every position."""
        return cls(rows, length, rows * length, rows * length)

    @property
    def tokens(self) -> int:
        """Tokens, padding included."""
        return self.rows * self.length


@dataclass(frozen=True)
class Workload:
    """One training step of a client.

    Attributes:
        rank: LoRA rank of every expert matrix; 0 for none.
        batch: of one forward pass.
        trained: what is trained beside the experts, and travels.
        dtype_bytes: of an element of the base and of the activations: 4 for float32, 2 for bfloat16.
        pair_fraction: q, the share of the missing (token, expert) pairs that a pseudo-gradient runs too, in [0, 1].
        pairs_reach_input: whether these pairs also send a gradient to the layer's input; if not, to their adapters only.
        optimizer_moments: float32 numbers kept per trained element: 2 for AdamW, 1 for SGD with momentum.
        accumulating: whether gradients of an earlier forward pass are there already.
        recomputing: gradient checkpointing: layers keep their input alone and run a second time, without the head.
        wire_dtype: precision of an update; a task travels in float32.
        experts: what the frozen experts are quantised to; None for `dtype_bytes`.
        side_elements: float32 numbers of a frozen side factor beside the adapter.
        skipped: what stands for skipped experts, if anything does.

    Raises:
        ValueError: if rank, length or fraction is impossible.
    """

    rank: int
    batch: Batch
    trained: Trained = EXPERTS_ONLY
    dtype_bytes: int = 4
    pair_fraction: float = 0.0
    pairs_reach_input: bool = False
    optimizer_moments: int = 2
    accumulating: bool = False
    recomputing: bool = False
    wire_dtype: WireDtype = "float32"
    experts: ExpertFormat | None = None
    side_elements: int = 0
    skipped: Skipped | None = None

    def __post_init__(self) -> None:
        if self.rank < 0 or self.batch.length < 1:
            raise ValueError(f"rank must be >= 0 and length >= 1; got {self.rank} and {self.batch.length}")
        if not 0 <= self.pair_fraction <= 1:
            raise ValueError(
                f"pair_fraction is a share of the missing pairs, expected 0 to 1; got {self.pair_fraction}"
            )
