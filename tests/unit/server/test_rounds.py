"""Rounds: who is drawn, what is watched and written, what a resumed or a scored run does."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ubsmoe.config import ConfigError, parse_run, to_json, with_overrides
from ubsmoe.engines.local import LocalEngine
from ubsmoe.finished.run import evaluate_run
from ubsmoe.messages import Dropped, Reply, Task, Update
from ubsmoe.methods.method import Contribution, RunShape, State, contribution
from ubsmoe.methods.modulation import ModulationState
from ubsmoe.methods.state import pack, unpack
from ubsmoe.server.federation import Federation, build_federation
from ubsmoe.server.metrics import RoundMetrics
from ubsmoe.server.rounds import one_round
from ubsmoe.server.run import run
from ubsmoe.server.start import sample_clients, start_state
from ubsmoe.storage.runfolder import RunFolder


@pytest.fixture
def quick(tiny_run: dict[str, Any]) -> dict[str, Any]:
    """One tier, two clients, two rounds of one step; a question per task."""
    changes = {
        "tiers.budgets": [0.5],
        "clients.count": 3,
        "clients.per_round": 2,
        "train.local_steps": 1,
        "evaluate.max_examples": 1,
        "evaluate.max_new_tokens": 1,
        "data.synthetic.test_examples": 2,
    }
    return with_overrides(tiny_run, changes)


def carry_out(federation: Federation, folder: Path, report: Callable[..., None] = lambda *_: None) -> dict[str, Any]:
    with RunFolder.open_or_create(folder, to_json(federation.settings)) as opened:
        return run(federation, opened, LocalEngine(federation.trainer, federation.examples, federation.clients), report)


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def update(client: str, examples: int, counts: list[list[int]], loss: float) -> Update:
    tokens = sum(counts[0]) // 2
    return Update(client, 1, examples, {}, torch.tensor(counts), tokens, 2 * tokens, loss, 0.1)


def test_a_rounds_metrics_weigh_clients_by_their_examples() -> None:
    """Worked by hand: two clients, one layer of three experts, K = 2."""
    metrics = RoundMetrics(RunShape(num_layers=1, num_experts=3, k_max=2, rank=1, alpha=1.0))
    updates = [update("a", 1, [[4, 4, 0]], 1.0), update("b", 3, [[4, 4, 0]], 2.0)]
    contributions = [contribution(one) for one in updates]
    passed = list(metrics.accumulate(contributions))
    assert all(one is other for one, other in zip(passed, contributions, strict=True))
    figures = metrics.summary()
    # each token used experts 0 and 1: u = (1, 1, 0), sum u = K = 2
    assert metrics.utilization.tolist() == figures["utilization"] == [[1.0, 1.0, 0.0]]
    assert figures["loss"] == 1.75 and figures["dead_experts"] == 1
    assert figures["entropy"] == pytest.approx([0.6309297], abs=1e-6)  # ln 2 / ln 3
    assert figures["gini"] == pytest.approx([4 / 12])  # sum |u_i - u_j| = 4, 2 M sum u = 12


def test_metrics_hold_one_contribution_at_a_time_and_tell_no_loss_that_was_not_told() -> None:
    metrics = RoundMetrics(RunShape(num_layers=1, num_experts=3, k_max=2, rank=1, alpha=1.0))
    drawn: list[str] = []

    def lazily() -> Iterator[Contribution]:
        for name in "ab":
            drawn.append(name)
            yield replace(contribution(update(name, 1, [[4, 4, 0]], 1.0)), loss=None if name == "b" else 1.0)

    passing = metrics.accumulate(lazily())
    assert next(passing).client == "a" and drawn == ["a"]
    assert next(passing).client == "b" and metrics.summary()["loss"] is None


def test_a_state_survives_its_trip_to_disk() -> None:
    part = ModulationState(torch.zeros(1, 3), torch.ones(1, 3))
    state = State({"layers.0.up.A": torch.ones(2), "side.layers.0.up.A": torch.ones(1)}).having(part)
    packed = pack(state)
    assert packed.keys() == state.adapters.keys() | {"server.phi", "server.utilization"}
    back = unpack(packed, (ModulationState,))
    assert back.adapters.keys() == state.adapters.keys() and len(back.parts) == 1
    assert torch.equal(back.of(ModulationState).phi, part.phi)
    assert torch.equal(back.of(ModulationState).utilization, part.utilization)
    assert unpack(pack(State(state.adapters)), ()).parts == ()


def test_a_state_that_another_method_stored_is_refused_by_the_tensor_it_lacks() -> None:
    with pytest.raises(ValueError, match=r"the stored state has no tensor 'server\.phi', which this method keeps"):
        unpack({"layers.0.up.A": torch.ones(2)}, (ModulationState,))


def test_the_draw_of_clients_is_seeded_ordered_and_covers_all(quick: dict[str, Any]) -> None:
    settings = with_overrides(quick, {"clients.count": 6})
    federation = build_federation(parse_run(settings))

    def drawn(number: int) -> list[str]:
        return [profile.client for profile in sample_clients(federation.clients, federation.settings, number)]

    draws = [drawn(number) for number in range(40)]
    assert draws == [drawn(number) for number in range(40)]
    assert all(len(set(draw)) == 2 and draw == sorted(draw) for draw in draws)
    assert len({client for draw in draws for client in draw}) == 6 and len({tuple(draw) for draw in draws}) > 5


def test_a_round_counts_each_client_that_was_asked_once_and_says_why_others_do_not(quick: dict[str, Any]) -> None:
    """Of four clients one answers twice, one is replaced by a stranger, one sends infinity, one is lost on the way."""
    changes = {"clients.count": 4, "clients.per_round": 4, "rounds.quorum": 0.25, "method.name": "fedavg"}
    federation = build_federation(parse_run(with_overrides(quick, changes)))
    heard: list[dict[str, Any]] = []

    class Odd(LocalEngine):
        def exchange(self, tasks: Iterable[Task]) -> Iterator[Reply]:
            a, b, c, d = super().exchange(tasks)
            assert isinstance(a, Update) and isinstance(b, Update) and isinstance(c, Update)
            yield from (a, a, replace(b, client="stranger"))
            yield replace(c, adapters={name: value + torch.inf for name, value in c.adapters.items()})
            yield Dropped(d.client, 1, "deadline", "too late")

    engine, before = Odd(federation.trainer, federation.examples, federation.clients), start_state(federation)
    after = one_round(
        federation, engine, before, 1, lambda event, _, **fields: heard.append({"event": event, **fields})
    )
    counted = [one["client"] for one in heard if one["event"] == "client"]
    lost = {one["client"]: one for one in heard if one["event"] == "dropped"}
    assert counted == ["client-0"] and [one["event"] for one in heard][-1] == "round"
    assert {name: one["stage"] for name, one in lost.items()} == {
        "client-0": "validation",
        "stranger": "validation",
        "client-2": "validation",
        "client-3": "deadline",
    }
    assert "answered already" in lost["client-0"]["reason"] and "NaN or infinity" in lost["client-2"]["reason"]
    assert (
        "download_bytes" in lost["client-3"] and "download_bytes" not in lost["stranger"]
    )  # only who was asked got bytes
    (trained,) = LocalEngine(federation.trainer, federation.examples, federation.clients).exchange(
        [Task(1, federation.clients[0], federation.method.dispatch(before, federation.clients[0]))]
    )
    assert isinstance(trained, Update)
    assert all(torch.equal(value, trained.adapters[name]) for name, value in after.adapters.items())


def test_a_run_writes_what_happened_and_can_be_scored(quick: dict[str, Any], tmp_path: Path) -> None:
    out, heard = tmp_path / "run", []
    federation = build_federation(parse_run(with_overrides(quick, {"train.rounds": 3, "evaluate.every": 2})))
    summary = carry_out(federation, out, lambda event, number, fields: heard.append((event, number)))
    written = [(one["event"], one["round"]) for one in events(out)]
    assert [number for event, number in written if event == "evaluated"] == [0, 2, 3]
    assert [number for event, number in written if event == "client"] == [1, 1, 2, 2, 3, 3]
    assert heard == written
    assert json.loads((out / "summary.json").read_text()) == summary

    # again on a finished folder: nothing is trained, nothing changes
    again = carry_out(federation, out)
    assert again["adapter_sha256"] == summary["adapter_sha256"] and again["after"] == summary["after"]
    assert [one["event"] for one in events(out)][-1] == "resumed"

    (scored,) = evaluate_run(out, {})
    assert scored["scores"] == summary["after"][0]
    for wrong in ("train.rounds", "model.base", "model.dtype"):
        with pytest.raises(ConfigError, match=f"--set {wrong}: scoring a run can change"):
            evaluate_run(out, {wrong: 1})
    with pytest.raises(ConfigError, match=r"--tier must lie in 1..1, got 2"):
        evaluate_run(out, {}, tier=2)
    (fewer,) = evaluate_run(out, {}, top_k=1)
    assert fewer["top_k"] == 1 and fewer["scores"]["macro"]["loss"] != scored["scores"]["macro"]["loss"]
    with pytest.raises(ConfigError, match=r"--top-k must lie in 1..\d+, got 0"):
        evaluate_run(out, {}, top_k=0)


def test_a_run_stopped_between_rounds_goes_on_to_the_same_end(quick: dict[str, Any], tmp_path: Path) -> None:
    federation = build_federation(parse_run(quick))
    whole = carry_out(federation, tmp_path / "whole")

    def stop(event: str, number: int, fields: dict[str, Any]) -> None:
        if (event, number) == ("client", 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        carry_out(federation, tmp_path / "stopped", stop)
    assert not (tmp_path / "stopped" / "summary.json").exists()
    resumed = carry_out(federation, tmp_path / "stopped")
    assert resumed["adapter_sha256"] == whole["adapter_sha256"] and resumed["after"] == whole["after"]
    assert [one["round"] for one in events(tmp_path / "stopped") if one["event"] == "client"] == [1, 1, 2, 2]


def test_scoring_a_run_needs_its_test_questions_and_not_its_training_data(
    quick: dict[str, Any], tmp_path: Path
) -> None:
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    for path in (train, test):
        rows = [{"prompt": f"what is {path.stem} {i}", "completion": str(i), "task": "t"} for i in range(12)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"data.train": str(train), "data.test": str(test), "train.rounds": 1}
    summary = carry_out(build_federation(parse_run(with_overrides(quick, changes))), tmp_path / "run")
    train.unlink()
    (scored,) = evaluate_run(tmp_path / "run", {})
    assert scored["scores"] == summary["after"][0]


def test_a_run_may_leave_out_the_evaluation_before_round_1(quick: dict[str, Any], tmp_path: Path) -> None:
    whole, short = (
        carry_out(build_federation(parse_run(with_overrides(quick, {"evaluate.before": first}))), tmp_path / str(first))
        for first in (True, False)
    )
    assert short["before"] is None and whole["before"]
    assert (short["after"], short["adapter_sha256"]) == (whole["after"], whole["adapter_sha256"])
    assert {event["round"] for event in events(tmp_path / "False") if event["event"] == "evaluated"} == {2}
