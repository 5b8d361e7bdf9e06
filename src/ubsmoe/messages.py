"""The nouns that cross the wire: an Announcement and a Profile say what a client can do, a Task goes down, an Update comes up.

All tensors are fused over experts: `layers.{l}.{projection}.A` is [M, r, in] and `.B` is [M, out, r], M experts, rank r.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

from torch import Tensor

from ubsmoe.costs.workload import ExpertFormat, NamedFormat

Tensors = Mapping[str, Tensor]
CLIENT_NAME = r"^[A-Za-z0-9_]([A-Za-z0-9_.-]{0,62}[A-Za-z0-9_])?$"
"""What a client may be called: letters, digits and _ . - between them, at most 64; a name stands in logs, files and tables."""
MOST_STEPS_TOLD = 16
"""Of how many steps of a round a client says how they went: an event stays small, whatever `train.local_steps` is."""
Stage = Literal["training", "deadline", "wire", "validation", "robust"]


def in_order(tensors: Tensors) -> dict[str, Tensor]:
    """The same tensors in the order of their names, each contiguous, as they come back from a file or the wire.

    A sum over several tensors depends on their order, and a kernel on how one lies in memory. Both are the same in every engine,
    and after a resumption, only if they do not depend on the way that the tensors came.
    """
    return {name: tensors[name].contiguous() for name in sorted(tensors)}


@dataclass(frozen=True)
class Announcement:
    """A client that a machine offers: how much data it holds and which fraction of K_max it can afford.

    Without a `budget` it is one of the run file's own clients, which belongs to the tier that the file gives it. `experts` says
    what its frozen experts are, where that is not its tier's matter.
    """

    client: str
    num_examples: int
    budget: float | None = None
    experts: NamedFormat | None = None


@dataclass(frozen=True)
class Profile:
    """What one client can afford: `top_k` experts per token and LoRA rank `rank`.

    `budget` is the fraction of K_max it declared, `tier` the index of that budget, `num_examples` the size of its data. `experts`
    is what its frozen experts are quantised to.
    """

    client: str
    tier: int
    budget: float
    top_k: int
    rank: int
    num_examples: int = 0
    experts: ExpertFormat | None = None


@dataclass(frozen=True)
class Task:
    """One client's work in one round: what the method sends it, in which run, on which base (SHA-256 of its weights)."""

    round: int
    profile: Profile
    payload: Tensors
    run: str = ""
    base: str = ""

    @property
    def num_bytes(self) -> int:
        """Bytes of its tensors; a header of a few hundred bytes is not in it."""
        return sum(tensor.nbytes for tensor in self.payload.values())


class Step(NamedTuple):
    """How one optimiser step of a round went: its number from 1, the loss in nats per token, the rate, and the gradient's norm.

    The norm is that of the whole gradient before it is clipped.
    """

    number: int
    loss: float
    learning_rate: float
    gradient_norm: float


@dataclass(frozen=True)
class Update:
    """What a client returns.

    `adapters` are its trained tensors (values, not differences). `expert_tokens` [L, M] counts, per SMoE layer, the tokens
    routed to each expert while training, padding left out; `tokens` is how many tokens it trained on and `assignments` how many
    (token, expert) choices that makes, so that each row of `expert_tokens` sums to `assignments`. `extras` holds what one method
    alone needs. `tier`, `run` and `base` say what work it answers; `base` is the hash of the client's own weights. `steps` are at
    most MOST_STEPS_TOLD of the round's steps, evenly spaced; a run with [privacy] or [secure_aggregation] tells none.
    """

    client: str
    round: int
    num_examples: int
    adapters: Tensors
    expert_tokens: Tensor
    tokens: int
    assignments: int
    loss: float
    seconds: float
    extras: Tensors = field(default_factory=dict)
    tier: int = 0
    run: str = ""
    base: str = ""
    steps: tuple[Step, ...] = ()


@dataclass(frozen=True)
class Dropped:
    """A client that does not count in this round: at which stage it was lost, and why."""

    client: str
    round: int
    stage: Stage
    reason: str


Reply = Update | Dropped


class Engine(Protocol):
    """How tasks reach clients and replies come back."""

    def clients(self) -> list[Profile]:
        """The clients that a round beginning now can draw from, in client order."""
        ...

    def exchange(self, tasks: Iterable[Task]) -> Iterator[Reply]:
        """Yield each task's update, or why there is none, in the order of the tasks."""
        ...
