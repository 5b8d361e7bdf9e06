"""Rounds: who is drawn, what is watched and written, what a resumed or a scored run does."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ubsmoe.config import ConfigError, parse_run, to_json, with_overrides
from ubsmoe.engines.local import LocalEngine
from ubsmoe.finished.run import evaluate_run
from ubsmoe.messages import Update
from ubsmoe.methods.method import State, pack, unpack
from ubsmoe.server.federation import Federation, build_federation
from ubsmoe.server.metrics import Tally
from ubsmoe.server.rounds import run
from ubsmoe.server.start import sample_clients
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


def test_the_tally_weighs_clients_by_their_examples() -> None:
    """Worked by hand: two clients, one layer of three experts, K = 2."""
    seen: list[str] = []
    tally = Tally(lambda one: seen.append(one.client), torch.zeros(1, 3, dtype=torch.float64))
    updates = [update("a", 1, [[4, 4, 0]], 1.0), update("b", 3, [[4, 4, 0]], 2.0)]
    assert list(tally.over(tally.heard(updates))) == updates and seen == ["a", "b"]
    figures = tally.figures()
    # each token used experts 0 and 1: u = (1, 1, 0), sum u = K = 2
    assert (tally.used / tally.examples).tolist() == [[1.0, 1.0, 0.0]]
    assert figures["loss"] == 1.75 and figures["dead_experts"] == 1
    assert figures["entropy"] == pytest.approx([0.6309297], abs=1e-6)  # ln 2 / ln 3
    assert figures["gini"] == pytest.approx([4 / 12])  # sum |u_i - u_j| = 4, 2 M sum u = 12


def test_a_state_survives_its_trip_to_disk() -> None:
    state = State({"layers.0.up.A": torch.ones(2), "side.layers.0.up.A": torch.ones(1)}, {"phi": torch.zeros(3)})
    back = unpack(pack(state))
    assert back.adapters.keys() == state.adapters.keys() and back.extras.keys() == {"phi"}


def test_the_draw_of_clients_is_seeded_ordered_and_covers_all(quick: dict[str, Any]) -> None:
    settings = with_overrides(quick, {"clients.count": 6})
    federation = build_federation(parse_run(settings))
    draws = [
        [profile.client for profile in sample_clients(federation.clients, federation.settings, number)]
        for number in range(40)
    ]
    assert draws == [
        [profile.client for profile in sample_clients(federation.clients, federation.settings, number)]
        for number in range(40)
    ]
    assert all(len(set(draw)) == 2 and draw == sorted(draw) for draw in draws)
    assert len({client for draw in draws for client in draw}) == 6 and len({tuple(draw) for draw in draws}) > 5


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
