"""Unequal clients on a virtual clock: when each answers is computed before anybody trains, so waiting takes no real time.

    seconds_c = FLOPs of its first round / (flops_per_second beta_c speed_c),    ln speed_c ~ N(0, speed_spread^2)

A client keeps its speed for the whole run; in each round it is silent with probability `dropout`. Among the others the first
`clients.per_round` to answer before the deadline count, and only they are trained. The network takes no time here.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, cast

import torch

from ubsmoe.client.node_config import TRAIN
from ubsmoe.config import ConfigError, RunSettings
from ubsmoe.messages import Dropped, Engine, Profile, Reply, Stage, Task, Update
from ubsmoe.plan.forecast import flops_by_client
from ubsmoe.seeds import generator_for
from ubsmoe.server.federation import Federation
from ubsmoe.wire.packed import Packed

if TYPE_CHECKING:
    from ubsmoe.server.secure import Courier

Seconds = Callable[[Profile], float]


def as_simulated(engine: Engine, federation: Federation) -> Engine:
    """The engine under the run file's [simulation]; the engine itself if there is no such section.

    Raises:
        ConfigError: if the run file needs a clock and there is none.
    """
    settings = federation.settings
    if settings.simulation is not None:
        return SimulatedEngine(engine, settings, client_seconds(federation))
    if settings.rounds.extra_clients or settings.rounds.deadline_seconds:
        raise ConfigError(
            "rounds.extra_clients and rounds.deadline_seconds need a clock, and clients in one process have none of "
            "their own; add a [simulation] section"
        )
    return engine


def client_seconds(federation: Federation) -> Seconds:
    """Virtual seconds of a client's round, from the FLOPs that `ubsmoe plan` estimates, its budget and its own speed."""
    settings, flops_of = federation.settings, flops_by_client(federation.settings)
    simulation = settings.simulation
    assert simulation is not None

    @cache
    def flops(client: str, tier: int) -> float:
        return flops_of(client, tier, federation.examples[client])

    def seconds(profile: Profile) -> float:
        draw = torch.randn((), generator=generator_for(settings.seed, profile.client, "speed"), dtype=torch.float64)
        speed = simulation.flops_per_second * profile.budget * math.exp(simulation.speed_spread * float(draw))
        return flops(profile.client, profile.tier) / speed

    return seconds


def lost(answers: Mapping[str, float], wanted: int, deadline: float) -> dict[str, tuple[Stage, str]]:
    """Which clients do not count, with stage and reason.

    Args:
        answers: seconds after which each client answers, infinite for never; earlier clients win a tie.
        wanted: how many answers the round is for.
        deadline: seconds it waits at most.

    >>> lost({"a": 3.0, "b": math.inf, "c": 1.0, "d": 2.0, "e": 9.0}, wanted=2, deadline=5.0)["a"]
    ('deadline', 'answered after 3 s, when the round had its 2 updates')
    """
    in_time = sorted((client for client in answers if answers[client] <= deadline), key=answers.__getitem__)
    counted = {client for client in in_time[:wanted] if answers[client] < math.inf}
    return {client: _why_lost(answers[client], wanted, deadline) for client in answers if client not in counted}


def _why_lost(seconds: float, wanted: int, deadline: float) -> tuple[Stage, str]:
    if seconds == math.inf:
        return "training", "no answer"
    if seconds > deadline:
        return "deadline", f"would have answered after {seconds:.4g} s, past rounds.deadline_seconds = {deadline:g}"
    return "deadline", f"answered after {seconds:.4g} s, when the round had its {wanted} updates"


class SimulatedEngine:
    """An engine inside another: some of its clients are silent, some late; the inner one is never asked for these.

    Holds a round's tasks at once; most methods give all clients the same tensors.
    """

    def __init__(self, inner: Engine, settings: RunSettings, seconds: Seconds) -> None:
        assert settings.simulation is not None
        self._inner, self._seconds, self._settings = inner, seconds, settings
        self._dropout = settings.simulation.dropout

    def clients(self) -> list[Profile]:
        """Those of the inner engine."""
        return self._inner.clients()

    def exchange(self, tasks: Iterable[Task]) -> Iterator[Reply]:
        """Train the clients that count; an update's `seconds` are virtual."""
        asked, settings = list(tasks), self._settings
        answers = {task.profile.client: self._answer(task) for task in asked}
        wanted = len(asked) if settings.clients.sampling == "poisson" else settings.clients_per_round
        missing = lost(answers, wanted, settings.rounds.deadline_seconds or math.inf)
        replies = self._inner.exchange(task for task in asked if task.profile.client not in missing)
        for task in asked:
            client = task.profile.client
            if client in missing:
                yield Dropped(client, task.round, *missing[client])
            else:
                reply = next(replies)
                yield replace(reply, seconds=answers[client]) if isinstance(reply, Update) else reply

    def ask(
        self, kind: str, round: int, messages: Iterable[tuple[str, Packed]]
    ) -> Iterator[tuple[str, Packed | Dropped]]:
        """As `server.secure.Courier` says: keys and shares are there at once, and clients are silent or late in training."""
        courier = cast("Courier", self._inner)
        if kind != TRAIN:
            yield from courier.ask(kind, round, messages)
            return
        asked, profiles = dict(messages), {profile.client: profile for profile in self.clients()}
        answers = {client: self._answer(Task(round, profiles[client], {})) for client in asked}
        missing = lost(answers, len(asked), self._settings.rounds.deadline_seconds or math.inf)
        replies = courier.ask(kind, round, ((name, packed) for name, packed in asked.items() if name not in missing))
        for client in asked:
            yield (client, Dropped(client, round, *missing[client])) if client in missing else next(replies)

    def _answer(self, task: Task) -> float:
        """Seconds after which the client answers; infinite if it is silent in this round."""
        key = (self._settings.seed, task.profile.client, task.round, "dropout")
        silent = float(torch.rand((), generator=generator_for(*key))) < self._dropout
        return math.inf if silent else self._seconds(task.profile)
