"""The Flower engine over a Grid in this process: the same bits as the local engine, and what becomes of bad nodes."""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict

from acting import ACTING
from ubsmoe.config import ConfigError, load_run
from ubsmoe.engines.flower.app import read_app
from ubsmoe.engines.flower.client import client_app
from ubsmoe.engines.flower.record import from_record, to_record
from ubsmoe.engines.flower.server import FlowerEngine, server_app
from ubsmoe.engines.flower.teller import Teller, without_traceback
from ubsmoe.engines.local import LocalEngine
from ubsmoe.messages import Dropped, Reply, Task, Update
from ubsmoe.methods.state import pack
from ubsmoe.model.load import prepare_base
from ubsmoe.report import tracking
from ubsmoe.server.federation import Federation, build_federation, build_server
from ubsmoe.server.rounds import one_round
from ubsmoe.server.start import noise_key, start_state
from ubsmoe.storage.events import read_events
from ubsmoe.storage.json_text import decode_json, encode_json
from ubsmoe.wire.codec import decode_task, decode_update, encode_update
from ubsmoe.wire.packed import Packed, WireError
from unit.engines.loop_grid import LoopGrid, as_process

OUT = {"out": "unused", "join-seconds": 1}


@pytest.fixture(autouse=True)
def _process() -> None:
    as_process()


class Site:
    """A server and two machines with two of the run file's four clients each."""

    def __init__(
        self, run_file: Path, run_config: dict[str, Any], nodes: dict[int, dict[str, Any]] | None = None
    ) -> None:
        self.said: list[str] = []
        self.now = 0.0
        self.server: Federation = build_server(read_app(run_file, run_config))
        nodes = nodes or {70 - i: {"partition-id": i, "num-partitions": 2} for i in range(2)}
        self.grid = LoopGrid(client_app(run_file), nodes, run_config)
        self.engine = FlowerEngine(self.grid, self.server, self.said.append, self.clock)

    def clock(self) -> float:
        self.now += 1.0
        return self.now

    def replies(self) -> list[Reply]:
        state = start_state(self.server)
        tasks = (
            Task(1, profile, self.server.method.dispatch(state, profile), "run", self.server.base_sha256)
            for profile in self.engine.clients()
        )
        return list(self.engine.exchange(tasks))


@pytest.fixture
def site(tiny_run: dict[str, Any], write_toml: Callable[..., Path]) -> Callable[..., Site]:
    run_file = write_toml(tiny_run)
    return lambda nodes=None, **changes: Site(
        run_file, OUT | {key.replace("__", "."): value for key, value in changes.items()}, nodes
    )


ACTING_HERE = {
    f"{part}__{key}": value for part, keys in ACTING.items() if part != "clients" for key, value in keys.items()
}
PROTECTED = {
    "plain": {},
    "all that acts": ACTING_HERE,
    "all that acts, bfloat16": ACTING_HERE | {"model__dtype": "bfloat16"},
    "all that acts, robust": ACTING_HERE | {"robust__rule": "multi_krum", "robust__attackers": 1, "robust__clip_norm": 0.01},
    "unequal formats": {"tiers__experts": '["nf4", "plain", "int8", "nf4"]'},
    "trimmed mean": {"robust__rule": "trimmed_mean", "robust__attackers": 1, "robust__utilization_cap": 1.1},
    "multi-Krum, clipped": {"robust__rule": "multi_krum", "robust__attackers": 1, "robust__clip_norm": 0.05},
    "private": {"privacy__noise_multiplier": 0.5, "privacy__clip_norm": 0.1, "privacy__seed": 7},
    "private, drawn": {
        "privacy__noise_multiplier": 0.5, "privacy__clip_norm": 0.1, "privacy__seed": 7,
        "clients__per_round": 3, "clients__sampling": "poisson",
    },
}  # fmt: skip


@pytest.mark.parametrize("changes", PROTECTED.values(), ids=PROTECTED)
def test_two_rounds_give_the_bits_of_the_local_engine(site: Callable[..., Site], changes: dict[str, Any]) -> None:
    here = site(clients__count=5, **changes)  # seed 3 draws 4 of them, then 3, where 3 is the mean
    local = build_federation(here.server.settings)
    here.engine.join(10)
    assert here.engine.clients() == local.clients and here.server.clients == []  # who joined is the engine's to know
    engines = {
        "flower": (here.server, here.engine),
        "local": (local, LocalEngine(local.trainer, local.examples, local.clients)),
    }
    results, dropped = {}, dict[str, list[str]]()
    for name, (federation, engine) in engines.items():
        state, lost = start_state(federation), dropped.setdefault(name, [])
        for number in (1, 2):
            state = one_round(
                federation, engine, state, number,
                lambda event, _, lost=lost, **fields: lost.append(fields["client"]) if event == "dropped" else None,
                noise_key(federation.settings),
            )  # fmt: skip
        results[name] = pack(state)
    assert results["flower"].keys() == results["local"].keys()
    assert all(torch.equal(value, results["local"][key]) for key, value in results["flower"].items())
    assert dropped["flower"] == dropped["local"]
    assert len(dropped["local"]) == (2 if changes.get("robust__rule") == "multi_krum" else 0)
    assert "client-1 is node 69: 8 examples, tier 2" in here.said


def test_the_server_logs_the_metrics_of_a_deployed_run_where_its_configuration_says(
    tiny_run: dict[str, Any], write_toml: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points: dict[tuple[str, int], float] = {}
    logs = SimpleNamespace(
        log=lambda values, round: points.update({(name, round): value for name, value in values.items()}),
        close=lambda: points.update({("closed", 0): 1.0}),
    )
    monkeypatch.setitem(tracking.TRACKERS, "mlflow", lambda *_: logs)
    monkeypatch.setattr(tracking, "require", lambda *_: None)
    run_file = write_toml(tiny_run | {"evaluate": {"before": False, "max_new_tokens": 4}})
    config = {"out": str(tmp_path / "out"), "join-seconds": 1, "track": "mlflow", "train.rounds": 1}
    grid = LoopGrid(client_app(run_file), {70: {"partition-id": 0, "num-partitions": 1}}, config)
    server_app(run_file)(grid, Context(0, 1, {}, RecordDict(), config))
    (done,) = [event for event in read_events(tmp_path / "out/events.jsonl") if event["event"] == "round"]
    assert points["round/loss", 1] == done["loss"] and points["round/clients", 1] == 4 and points["closed", 0]
    assert {f"tier {tier}/gradient_norm" for tier in (1, 2, 3, 4)} <= {name for name, _ in points}


def test_a_nodes_own_format_is_that_of_a_tier_and_is_said(site: Callable[..., Site], tmp_path: Path) -> None:
    places = {70 - i: {"partition-id": i, "num-partitions": 2} for i in range(2)}
    saying = site({node: {**place, "model.experts": "nf4"} for node, place in places.items()})
    run_file = site(tiers__experts='["nf4", "nf4", "nf4", "nf4"]')
    replies = []
    for here in (saying, run_file):
        here.engine.join(10)
        assert {profile.experts for profile in here.engine.clients()} == {"nf4"}
        replies.append(here.replies())
    for one, other in zip(*replies, strict=True):
        assert isinstance(one, Update) and isinstance(other, Update)
        assert all(torch.equal(value, other.adapters[name]) for name, value in one.adapters.items())
    assert "client-1 is node 69: 10 examples, tier 2, nf4 experts" in saying.said
    settings = saying.server.settings.model.model_copy(update={"experts": "nf4"})
    folder = str(prepare_base(settings, tmp_path / "nf4"))
    silent = site({node: {**place, "model.base": folder} for node, place in places.items()})
    silent.engine.join(10)
    reasons = {reply.reason for reply in silent.replies() if isinstance(reply, Dropped)}
    assert len(reasons) == 1 and "was prepared as nf4, and plain experts are asked for" in reasons.pop()


def test_nodes_are_asked_who_they_are_before_anything_is_sent(site: Callable[..., Site]) -> None:
    here = site()
    here.engine.join(10)
    here.replies()
    kinds = [kind for _, kind in here.grid.asked]
    assert kinds == ["query.announce"] * 2 + ["train"] * 4


def edited(answer: Message, message: Message, **changes: Any) -> Message:
    payload = decode_task(from_record(message.content), 1 << 20).payload
    update = replace(decode_update(from_record(answer.content), 1 << 20, payload), **changes)
    return Message(to_record(encode_update(update, payload)), reply_to=message)


def raw(message: Message, header: Any, blob: bytes) -> Message:
    record = to_record(Packed(b"", blob))
    record["header"] = ConfigRecord({"json": header})
    return Message(record, reply_to=message)


def from_another(answer: Message, sender: int) -> Message:
    answer.metadata.__dict__["_src_node_id"] = sender
    return answer


FAULTS = {
    "is not who was asked": (lambda m, a: [from_another(a(), 70)], "wire", "node 70 answered for node 69"),
    "fails": (
        lambda m, a: [Message(Error(2, "out of\nmemory " + "x" * 999), reply_to=m)],
        "training",
        "out of memory x",
    ),
    "is away": (lambda m, a: [Message(Error(5, "gone"), reply_to=m)], "deadline", "its node is away"),
    "is too late for Flower": (
        lambda m, a: [Message(Error(3, "gone"), reply_to=m)],
        "deadline",
        "did not come in time",
    ),
    "says nothing": (lambda m, a: [], "deadline", "no answer within rounds.deadline_seconds = 40"),
    "claims another's name": (
        lambda m, a: [edited(a(), m, client="client-0")],
        "validation",
        "in the name of 'client-0'",
    ),
    "sends no record of ours": (lambda m, a: [Message(RecordDict(), reply_to=m)], "wire", "without our header"),
    "sends text for a header": (lambda m, a: [raw(m, "text", b"")], "wire", "header or blob is not bytes"),
    "sends a list": (
        lambda m, a: [Message(RecordDict({"blob": ArrayRecord()}), reply_to=m)],
        "wire",
        "without our header",
    ),
    "sends noise": (lambda m, a: [raw(m, b"{", b"noise")], "wire", "header, as a whole: Invalid JSON"),
}


@pytest.mark.parametrize(("fault", "stage", "reason"), FAULTS.values(), ids=FAULTS)
def test_what_a_bad_node_does_drops_its_clients_and_nobody_else(
    fault: Any, stage: str, reason: str, site: Callable[..., Site]
) -> None:
    here = site(rounds__deadline_seconds=40)
    here.engine.join(10)
    here.grid.faults[69] = fault
    one, two, three, four = here.replies()
    assert isinstance(one, Update) and isinstance(three, Update)
    for lost, name in ((two, "client-1"), (four, "client-3")):
        assert isinstance(lost, Dropped) and (lost.client, lost.round, lost.stage) == (name, 1, stage)
        assert reason in lost.reason and len(lost.reason) <= 300 and "\n" not in lost.reason


def test_a_second_answer_counts_for_nothing(site: Callable[..., Site]) -> None:
    here = site()
    here.engine.join(10)
    here.grid.faults[69] = lambda message, answer: [answer(), edited(answer(), message, loss=99.0)]
    assert [reply.client for reply in here.replies()] == [f"client-{i}" for i in range(4)]
    assert all(isinstance(reply, Update) and reply.loss < 99 for reply in here.replies())


def test_the_first_to_answer_count_when_more_are_asked_than_wanted(site: Callable[..., Site]) -> None:
    here = site(clients__per_round=2, rounds__extra_clients=2)
    here.engine.join(10)
    here.grid.faults[70] = lambda message, answer: []
    replies = here.replies()
    assert [isinstance(reply, Update) for reply in replies] == [False, True, False, True]
    lost = replies[0]
    assert (
        isinstance(lost, Dropped) and lost.stage == "deadline" and lost.reason == "the round had its 2 updates before"
    )


def test_a_node_that_went_and_came_back_is_asked_anew(site: Callable[..., Site]) -> None:
    here = site()
    here.engine.join(10)
    gone = here.grid.nodes.pop(69)
    assert [reply.client for reply in here.replies()] == ["client-0", "client-2"]  # who is away is not asked
    here.grid.nodes[71] = gone  # the same machine under another number
    assert all(isinstance(reply, Update) for reply in here.replies())


def test_a_client_that_missed_a_deadline_is_asked_again_once_its_node_has_answered(site: Callable[..., Site]) -> None:
    """A node that was killed looks online for a minute; the rounds of that minute do not wait for it."""
    here = site(rounds__deadline_seconds=40)
    here.engine.join(10)
    here.grid.faults[69], here.grid.faulty = (lambda message, answer: []), ""  # says nothing to anything
    assert [type(reply) for reply in here.replies()] == [Update, Dropped] * 2
    began = here.now
    assert [reply.client for reply in here.replies()] == ["client-0", "client-2"]
    assert here.now - began < 40
    del here.grid.faults[69]
    assert [type(reply) for reply in here.replies()] == [Update] * 4
    assert [kind for node, kind in here.grid.asked if node == 69].count("query.announce") == 2


def test_a_node_that_announces_and_never_trains_loses_its_place_to_one_that_does(site: Callable[..., Site]) -> None:
    here = named(site, {5: "ward-a", 6: "ward-b"}, {5: "", 6: ""}, rounds__deadline_seconds=40)
    here.grid.faults[6] = lambda message, answer: []
    for _ in range(4):
        here.replies()
    here.grid.nodes[7] = {"client": "ward-c"}
    here.replies()
    assert who(here)["ward-c"] == "7"


def test_the_number_of_a_node_is_told_in_full(site: Callable[..., Site]) -> None:
    here = site({2**64 - 1: {"partition-id": 0, "num-partitions": 1}})
    told: list[Any] = []
    here.engine.note = told.extend
    here.engine.join(10)
    here.engine.clients()
    assert decode_json(encode_json(told))[0]["node"] == "18446744073709551615"


def test_a_name_belongs_to_the_node_that_has_it(site: Callable[..., Site]) -> None:
    half = {"partition-id": 0, "num-partitions": 2}
    here = site({5: half, 6: {"client": "client-2"}})
    here.engine.join(1)
    assert [profile.client for profile in here.engine.clients()] == ["client-0", "client-2"]
    refused = [line for line in here.said if "refused" in line]
    assert len(refused) == 1 and "is that client already" in refused[0]


def named(site: Callable[..., Site], clients: dict[int, str], names: dict[int, str], **changes: Any) -> Site:
    """Nodes that say they are these clients, their keys registered under these names; all there from the start."""
    here = site({node: {"client": client} for node, client in clients.items()}, clients__count=2, **changes)
    here.grid.names = names
    here.engine.join(4)
    return here


def who(here: Site) -> dict[str, str]:
    """Which node is which client, by what was said last."""
    return {line.split()[0]: line.split()[3].rstrip(":") for line in here.said if " is node " in line}


def test_a_node_is_the_client_that_its_key_is_registered_as_and_no_other(site: Callable[..., Site]) -> None:
    here = named(site, {5: "ward-a", 6: "ward-b", 7: "ward-a"}, {5: "ward-a", 6: "ward-a", 7: "ward-c"})
    assert who(here) == {"ward-a": "5"}
    assert "node 6: client 'ward-b' is refused: its key is registered as 'ward-a'" in here.said
    assert "node 7: client 'ward-a' is refused: its key is registered as 'ward-c'" in here.said


def test_a_registered_name_is_not_for_a_nameless_node_even_when_its_own_is_away(site: Callable[..., Site]) -> None:
    here = named(site, {5: "ward-a", 6: "ward-a"}, {6: "ward-a"})
    assert who(here) == {"ward-a": "6"}
    del here.grid.nodes[6]
    here.grid.nodes[8] = {"client": "ward-a"}
    here.replies()
    here.replies()
    refusal = "client 'ward-a' is refused: another key is registered under this name; register this node's with --name"
    assert f"node 8: {refusal}" in here.said and who(here) == {"ward-a": "6"}


def test_a_new_key_of_the_same_name_takes_over_once_the_old_is_away(site: Callable[..., Site]) -> None:
    here = named(site, {5: "ward-a"}, {5: "ward-a", 6: "ward-a"})
    here.grid.nodes[6] = {"client": "ward-a"}
    here.replies()
    assert who(here) == {"ward-a": "5"}
    del here.grid.nodes[5], here.grid.nodes[6]
    here.replies()
    here.grid.nodes[6] = {"client": "ward-a"}
    here.replies()
    assert who(here) == {"ward-a": "6"}
    assert all(isinstance(reply, Update) for reply in here.replies())


def test_nobody_can_know_the_id_of_a_message_that_was_not_sent_to_him(site: Callable[..., Site]) -> None:
    here = site()
    here.engine.join(10)
    nonces: list[bytes] = []
    here.grid.faults = dict.fromkeys(
        (69, 70), lambda message, answer: nonces.append(message.content["nonce"]["bytes"]) or [answer()]
    )
    here.replies()
    assert len(set(nonces)) == 4 and {len(nonce) for nonce in nonces} == {16}


def test_a_machine_with_data_of_its_own_says_what_it_affords(site: Callable[..., Site], tmp_path: Path) -> None:
    record = {"instruction": "Say yes.", "input": "", "output": "yes"}
    (tmp_path / "mine.jsonl").write_text("\n".join(json.dumps(record) for _ in range(3)))
    own = {"client": "ward-b", "budget": 0.6, "data.train": str(tmp_path / "mine.jsonl")}
    here = site({8: own, 9: {"client": "ward-a", "budget": 0.2}}, clients__count=2)
    here.engine.join(10)
    (ward_b,) = here.engine.clients()
    assert (ward_b.client, ward_b.tier, ward_b.budget, ward_b.num_examples) == ("ward-b", 1, 0.5, 3)
    assert any("ward-a affords a budget of 0.2, the smallest of tiers.budgets is 0.25" in line for line in here.said)
    (update,) = here.replies()
    assert isinstance(update, Update) and update.num_examples == 3


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({}, "expected client, or whole numbers partition-id and num-partitions"),
        ({"partition-id": 4, "num-partitions": 9}, "partition-id 4 of num-partitions 9 has no client among 4"),
        ({"client": "a", "budget": "much"}, "budget is 'much', expected a number"),
        ({"client": "a", "worker-seconds": 9}, "'worker-seconds' is now called 'resident-seconds'"),
        ({"client": "a", "train.rounds": 9}, "'train.rounds' would change this client's work"),
        ({"client": "a", "data.train": "gone/ward.csv"}, "data.train: 'gone/ward.csv' does not exist"),
    ],
)
def test_a_node_configuration_that_makes_no_sense_is_an_answer_of_its_own(
    config: dict[str, Any], sentence: str, site: Callable[..., Site]
) -> None:
    here = site({3: config})
    with pytest.raises(ConfigError, match="0 clients came within 1 s"):
        here.engine.join(1)
    assert sentence in here.said[0]


def test_a_private_round_has_no_loss_to_tell(capsys: Any) -> None:
    tell = Teller(2).on_event
    tell("round", 1, {"loss": None, "seconds": 1.0})
    tell("round", 2, {"loss": 0.5, "seconds": 1.0})
    assert [line.split("loss ")[1] for line in capsys.readouterr().out.splitlines()] == [
        "– in 1.0 s, 0 updates",
        "0.5000 in 1.0 s, 0 updates",
    ]


def test_the_stream_tells_drops_accuracy_and_the_time_left(capsys: Any) -> None:
    now = iter([0.0, 10.0, 400.0])
    tell = Teller(4, lambda: next(now)).on_event
    tell("client", 1, {})
    tell("dropped", 1, {"client": "b", "stage": "deadline", "reason": "late"})
    tell("round", 1, {"loss": 0.5, "seconds": 9.0})
    tell("evaluated", 1, {"tier": 2, "top_k": 4, "scores": {"macro": {"accuracy": 0.25}}})
    tell("round", 2, {"loss": 0.25, "seconds": 390.0})
    assert capsys.readouterr().out.splitlines() == [
        "round 1/4: b dropped (deadline): late",
        "round 1/4: loss 0.5000 in 9.0 s, 1 updates, 1 dropped, about 30 s left",
        "round 1/4: tier 3 (K=4) accuracy 25.0%",
        "round 2/4: loss 0.2500 in 390.0 s, 0 updates, about 7 min left",
    ]


def test_a_users_mistake_is_one_sentence_in_flowers_log_and_a_fault_keeps_its_traceback(caplog: Any) -> None:
    logger = logging.Logger("like-flwr")
    logger.addFilter(without_traceback)
    logger.addHandler(caplog.handler)
    for error in (ConfigError("rank is 0, expected 1 or more"), KeyError("a fault")):
        logger.error("%s raised an exception", "ServerApp", exc_info=error)
    assert [(one.getMessage(), one.exc_info is None) for one in caplog.records] == [
        ("ubsmoe: rank is 0, expected 1 or more", True),
        ("ServerApp raised an exception", False),
    ]


def test_a_node_whose_base_is_another_says_so(site: Callable[..., Site]) -> None:
    nothing = {"evaluate__before": False, "evaluate__after": False, "evaluate__every": 0}  # a server without weights
    here = site(model__sha256="0" * 64, **nothing)
    here.engine.join(10)
    replies = here.replies()
    assert len(replies) == 4 and all(isinstance(reply, Dropped) for reply in replies)
    assert all("model.sha256 is 000" in reply.reason for reply in replies if isinstance(reply, Dropped))


def test_a_virtual_clock_is_refused(tiny_run: dict[str, Any], write_toml: Callable[..., Path]) -> None:
    run_file = write_toml(tiny_run | {"simulation": {}})
    load_run(run_file)
    with pytest.raises(ConfigError, match="virtual clock"):
        read_app(run_file, OUT)


def test_an_array_of_any_other_shape_is_a_wire_error() -> None:
    with pytest.raises(WireError):
        from_record(RecordDict({"header": ConfigRecord({"json": b""}), "blob": ArrayRecord()}))
