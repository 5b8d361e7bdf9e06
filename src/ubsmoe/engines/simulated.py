"""Unequal clients on a virtual clock: who answers, and when, is settled before anybody trains, so waiting costs no time.

    seconds_c = FLOPs of its first round / (flops_per_second beta_c speed_c),    ln speed_c ~ N(0, speed_spread^2)

A client keeps its speed for the whole run; in each round it is silent with probability `dropout`. Among the others the first
`clients.per_round` to answer before the deadline count, and only they are trained. The network takes no time here.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cache

import torch

from ubsmoe.config import ConfigError, RunSettings
from ubsmoe.messages import Dropped, Engine, Profile, Reply, Stage, Task, Update
from ubsmoe.plan.forecast import flops_by_client
from ubsmoe.seeds import generator_for
from ubsmoe.server.federation import Federation

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
    """Virtual seconds of a client's round, from the FLOPs that `ubsmoe plan` foresees, its budget and its own speed."""
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


def losses(answers: Mapping[str, float | None], wanted: int, deadline: float | None) -> dict[str, tuple[Stage, str]]:
    """Which clients do not count, with stage and reason.

    Args:
        answers: seconds after which each client answers, None for never; earlier clients win a tie.
        wanted: how many answers the round is for.
        deadline: seconds it waits at most.

    >>> losses({"a": 3.0, "b": None, "c": 1.0, "d": 2.0, "e": 9.0}, wanted=2, deadline=5.0)["a"]
    ('deadline', 'answered after 3 s, when the round had its 2 updates')
    """
    lost: dict[str, tuple[Stage, str]] = {}
    count = 0
    for client in sorted(answers, key=lambda name: _or_never(answers[name])):
        seconds = answers[client]
        if seconds is None:
            lost[client] = "training", "no answer"
        elif deadline is not None and seconds > deadline:
            lost[client] = (
                "deadline",
                f"would have answered after {seconds:.4g} s, past rounds.deadline_seconds = {deadline:g}",
            )
        elif count == wanted:
            lost[client] = "deadline", f"answered after {seconds:.4g} s, when the round had its {wanted} updates"
        else:
            count += 1
    return lost


def _or_never(seconds: float | None) -> float:
    return math.inf if seconds is None else seconds


class SimulatedEngine:
    """An engine inside another: some of its clients are silent, some late; the inner one never hears of them.

    Holds a round's tasks at once; most methods give all clients the same tensors.
    """

    def __init__(self, inner: Engine, settings: RunSettings, seconds: Seconds) -> None:
        assert settings.simulation is not None
        self._inner, self._seconds = inner, seconds
        self._dropout, self._seed = settings.simulation.dropout, settings.seed
        self._wanted = None if settings.clients.sampling == "poisson" else settings.clients_per_round
        self._deadline = settings.rounds.deadline_seconds

    def clients(self) -> list[Profile]:
        """Those of the engine inside: who is silent or late was asked all the same."""
        return self._inner.clients()

    def exchange(self, tasks: Iterable[Task]) -> Iterator[Reply]:
        """Train those who count; an update's `seconds` are virtual."""
        asked = list(tasks)
        answers = {task.profile.client: self._answer(task) for task in asked}
        lost = losses(answers, len(asked) if self._wanted is None else self._wanted, self._deadline)
        replies = self._inner.exchange(task for task in asked if task.profile.client not in lost)
        for task in asked:
            client, seconds = task.profile.client, answers[task.profile.client]
            if seconds is None or client in lost:
                yield Dropped(client, task.round, *lost[client])
            else:
                reply = next(replies)
                yield replace(reply, seconds=seconds) if isinstance(reply, Update) else reply

    def _answer(self, task: Task) -> float | None:
        """When the client answers; never, if it drops out of this round."""
        key = (self._seed, task.profile.client, task.round, "dropout")
        silent = float(torch.rand((), generator=generator_for(*key))) < self._dropout
        return None if silent else self._seconds(task.profile)
