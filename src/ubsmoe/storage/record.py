"""What a run folder holds, as types: its events, its scores, its summary, what its tiers cost."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from ubsmoe.storage.events import Event


class TaskScore(TypedDict):
    """One task's scores, as `server.evaluate.Score` describes them; None where nothing was measured."""

    examples: int
    loss: float
    accuracy: float
    unparsed: float
    mc_accuracy: float | None
    chance: float | None
    majority: float | None
    metrics: NotRequired[dict[str, float]]


Scores = dict[str, TaskScore]
"""Scores by task; "macro" is their mean."""


class StepsTold(TypedDict):
    """Some optimiser steps of a client in a round, as `messages.Step` describes them, a list for each of its fields."""

    number: list[int]
    loss: list[float]
    learning_rate: list[float]
    gradient_norm: list[float]


class ClientEvent(TypedDict):
    """An update that counted; `experts` is what the client's were quantised to.

    A private run tells neither tokens nor loss nor steps.
    """

    round: int
    client: str
    tier: int
    top_k: int
    rank: int
    experts: NotRequired[str | None]
    examples: int
    seconds: float
    download_bytes: int
    upload_bytes: NotRequired[int]
    tokens: NotRequired[int]
    assignments: NotRequired[int]
    loss: NotRequired[float]
    steps: NotRequired[StepsTold]


class DroppedEvent(TypedDict):
    """A client that does not count in a round, and why."""

    round: int
    client: str
    stage: str
    reason: str
    download_bytes: NotRequired[int]


class RoundEvent(TypedDict):
    """A round that has ended. Entropy (over ln M) and Gini stand per layer, utilization [L, M] and phi [L, M] per expert.

    A private run has no loss.
    """

    round: int
    seconds: float
    loss: float | None
    entropy: list[float]
    gini: list[float]
    dead_experts: int
    utilization: list[list[float]]
    phi: NotRequired[list[list[float]]]
    epsilon: NotRequired[float]
    delta: NotRequired[float]


def loss_text(loss: float | None) -> str:
    """A round's loss for the terminal; a private run tells none."""
    return "–" if loss is None else f"{loss:.4f}"


class EvaluatedEvent(TypedDict):
    """A tier's scores after a round; round 0 is before training."""

    round: int
    tier: int
    top_k: int
    rank: int
    scores: Scores


class TierFacts(TypedDict):
    """A tier: its budget and what follows from it."""

    tier: int
    budget: float
    top_k: int
    rank: int
    experts: NotRequired[str | None]


class TierCosts(TierFacts):
    """What a client of a tier costs, as `ubsmoe plan` counts it; FLOPs per token, bytes per round."""

    forward_flops_per_token: int
    train_flops_per_token: int
    relative_to_top: float
    upload_bytes: int
    download_bytes: int
    peak_memory_bytes: int


class Summary(TypedDict):
    """summary.json. `before` and `after` are None where nothing was evaluated then."""

    method: str
    rounds: int
    seed: int
    seconds: float
    adapter_sha256: str
    base_sha256: str
    tiers: list[TierFacts]
    before: list[Scores] | None
    after: list[Scores] | None
    validation: NotRequired["Validated"]


class Validated(TypedDict):
    """What early stopping went by: the loss after each round, mean over tiers, and the round whose adapter was kept."""

    losses: list[float]
    best_round: int


def kept_said(summary: Summary, planned: int) -> str:
    """Which round's adapter early stopping kept, and where it stopped; nothing without it.

    >>> kept_said({"rounds": 3, "validation": {"losses": [0.5, 0.25, 0.3], "best_round": 2}}, 9)
    'the adapter is that of round 2, whose validation loss was the lowest (0.2500); training stopped after round 3 of 9'
    """
    if (found := summary.get("validation")) is None:
        return ""
    best, rounds = found["best_round"], summary["rounds"]
    stopped = f"; training stopped after round {rounds} of {planned}" if rounds < planned else ""
    lowest = f"{found['losses'][best - 1]:.4f}"
    return f"the adapter is that of round {best}, whose validation loss was the lowest ({lowest}){stopped}"


@dataclass(frozen=True)
class RunRecord:
    """What a run folder tells a reader; `summary` is None until the run has ended, `costs` where nobody noted them."""

    path: Path
    config: dict[str, Any]
    versions: dict[str, str]
    events: list[Event]
    summary: Summary | None
    costs: list[TierCosts] | None = None

    @property
    def clients(self) -> list[ClientEvent]:
        """The updates that counted."""
        return cast(list[ClientEvent], self.named("client"))

    @property
    def dropped(self) -> list[DroppedEvent]:
        """The clients that did not."""
        return cast(list[DroppedEvent], self.named("dropped"))

    @property
    def rounds(self) -> list[RoundEvent]:
        """The rounds that have ended."""
        return cast(list[RoundEvent], self.named("round"))

    @property
    def evaluated(self) -> list[EvaluatedEvent]:
        """Every tier's scores, as often as they were taken."""
        return cast(list[EvaluatedEvent], self.named("evaluated"))

    def named(self, name: str) -> list[Event]:
        """The events of one kind, in order."""
        return [event for event in self.events if event["event"] == name]
