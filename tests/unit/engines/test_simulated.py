"""The virtual clock: who counts in a round, the same in every process, and a run that ends whatever its clients do."""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ubsmoe.config import ConfigError, RunSettings, parse_run, to_json, with_overrides
from ubsmoe.engines.local import LocalEngine
from ubsmoe.engines.simulated import SimulatedEngine, as_simulated, client_seconds, lost
from ubsmoe.errors import RoundError
from ubsmoe.messages import Dropped, Profile, Task, Update
from ubsmoe.plan.forecast import forecast
from ubsmoe.server.federation import build_federation
from ubsmoe.server.run import run
from ubsmoe.storage.runfolder import RunFolder

SECONDS = {"client-0": 4.0, "client-1": 1.0, "client-2": 9.0, "client-3": 2.0}


class Echo:
    """An engine that answers at once and keeps what it was asked."""

    def __init__(self) -> None:
        self.trained: list[str] = []

    def clients(self) -> list[Profile]:
        return [Profile(client, 0, 1.0, 1, 1) for client in SECONDS]

    def exchange(self, tasks: Iterable[Task]) -> Iterator[Update]:
        for task in tasks:
            self.trained.append(task.profile.client)
            yield Update(task.profile.client, task.round, 1, {}, None, 1, 1, 0.0, 0.0)  # type: ignore[arg-type]


def settings(**rounds: Any) -> RunSettings:
    return parse_run({"clients": {"count": 4, "per_round": 2}, "rounds": rounds, "simulation": {}})


def exchanged(engine: SimulatedEngine, number: int = 1) -> list[Any]:
    return list(engine.exchange(Task(number, profile, {}) for profile in engine.clients()))


def test_the_first_to_answer_before_the_deadline_count_and_only_they_train() -> None:
    echo = Echo()
    engine = SimulatedEngine(
        echo, settings(extra_clients=2, deadline_seconds=5.0), lambda profile: SECONDS[profile.client]
    )
    replies = exchanged(engine)
    assert [type(reply) for reply in replies] == [Dropped, Update, Dropped, Update]  # in the order of the tasks
    assert echo.trained == ["client-1", "client-3"] and [replies[1].seconds, replies[3].seconds] == [1.0, 2.0]
    assert (
        "when the round had its 2 updates" in replies[0].reason and "past rounds.deadline_seconds" in replies[2].reason
    )
    assert {reply.stage for reply in (replies[0], replies[2])} == {"deadline"}


@given(
    st.lists(st.one_of(st.none(), st.floats(0, 20)), min_size=1, max_size=8),
    st.integers(1, 8),
    st.one_of(st.none(), st.floats(0.1, 20)),
)
def test_nobody_counts_while_a_faster_one_does_not(answers: list[float | None], wanted: int, deadline: float) -> None:
    named = {f"client-{i}": seconds for i, seconds in enumerate(answers)}
    never_inf = {client: math.inf if seconds is None else seconds for client, seconds in named.items()}
    missing = lost(never_inf, wanted, deadline or math.inf)
    counted = [named[client] for client in named if client not in missing]
    in_time = sorted(s for s in answers if s is not None and (deadline is None or s <= deadline))
    assert sorted(s for s in counted if s is not None) == in_time[:wanted] and None not in counted


def test_dropout_is_a_seeded_draw_of_its_rate() -> None:
    table = with_overrides(settings().model_dump(mode="json"), {"simulation.dropout": 0.2})

    def silent(number: int) -> list[str]:
        replies = exchanged(SimulatedEngine(Echo(), parse_run(table), lambda _: 1.0), number)
        return [reply.client for reply in replies if isinstance(reply, Dropped) and reply.reason == "no answer"]

    rounds = [silent(number) for number in range(200)]
    assert rounds == [silent(number) for number in range(200)]
    assert abs(sum(map(len, rounds)) / 800 - 0.2) < 4 * math.sqrt(0.2 * 0.8 / 800)


@pytest.fixture
def quick(tiny_run: dict[str, Any]) -> dict[str, Any]:
    changes = {
        "train.local_steps": 1,
        "evaluate.max_examples": 1,
        "evaluate.max_new_tokens": 1,
        "data.synthetic.test_examples": 2,
        "simulation.flops_per_second": 1e9,
    }
    return with_overrides(tiny_run, changes)


def test_seconds_are_those_of_the_plan_and_follow_each_clients_speed(quick: dict[str, Any]) -> None:
    elastic = with_overrides(quick, {"tiers.elastic_share": 0.5, "train.local_steps": 3})
    federation = build_federation(parse_run(elastic))

    def seconds_in(table: dict[str, Any]) -> Callable[[Profile], float]:
        return client_seconds(replace(federation, settings=parse_run(table)))

    seconds, whole = seconds_in(elastic), seconds_in(with_overrides(quick, {"train.local_steps": 3}))
    planned = {tier["tier"]: tier["virtual_seconds"] for tier in forecast(federation.settings)["tiers"]}
    assert {profile.tier: pytest.approx(seconds(profile)) for profile in federation.clients} == planned
    assert seconds(federation.clients[-1]) < whole(federation.clients[-1])  # a step at K = 1 takes less time
    spread = seconds_in(with_overrides(elastic, {"simulation.speed_spread": 0.5}))
    ratios = [spread(profile) / seconds(profile) for profile in federation.clients]
    assert len(set(ratios)) == 4 and all(0.05 < ratio < 20 for ratio in ratios)


def carry_out(table: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    federation = build_federation(parse_run(table))
    engine = as_simulated(LocalEngine(federation.trainer, federation.examples, federation.clients), federation)
    with RunFolder.open_or_create(folder, to_json(federation.settings)) as opened:
        run(federation, opened, engine, lambda *_: None)
    return events(folder)


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def test_a_run_whose_clients_drop_out_ends_and_says_who_was_missing(quick: dict[str, Any], tmp_path: Path) -> None:
    table = with_overrides(quick, {"simulation.dropout": 0.3, "train.rounds": 3, "rounds.quorum": 0.25})
    seen = carry_out(table, tmp_path / "run")
    for number in (1, 2, 3):
        took = [e["client"] for e in seen if e["round"] == number and e["event"] in ("client", "dropped")]
        assert sorted(took) == ["client-0", "client-1", "client-2", "client-3"]
    assert any(event["event"] == "dropped" and event["reason"] == "no answer" for event in seen)


def test_below_the_quorum_the_run_stops_with_its_last_checkpoint(quick: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RoundError, match=r"round 1: 0 updates count, rounds\.quorum asks for 2; the checkpoint before"):
        carry_out(with_overrides(quick, {"simulation.dropout": 1.0}), tmp_path / "run")
    assert sum(event["event"] == "dropped" for event in events(tmp_path / "run")) == 4
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("round-*")] == ["round-00000"]
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_deadline_without_a_clock_and_extra_clients_without_a_draw_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"add a \[simulation\] section"):
        as_simulated(Echo(), SimpleNamespace(settings=parse_run({"rounds": {"deadline_seconds": 3.0}})))
    with pytest.raises(ConfigError, match=r"set clients\.per_round"):
        parse_run({"rounds": {"extra_clients": 2}, "simulation": {}})
