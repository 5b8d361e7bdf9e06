"""Two faults that federated frameworks have shipped: a rejected contribution that is in the saved model all the same, and a slow
client that gets half of two rounds.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message

from ubsmoe.config import parse_run, to_json, with_overrides
from ubsmoe.engines.flower.app import read_app
from ubsmoe.engines.flower.client import client_app
from ubsmoe.engines.flower.record import from_record, to_record
from ubsmoe.engines.flower.server import FlowerEngine
from ubsmoe.engines.local import LocalEngine
from ubsmoe.messages import Dropped, Reply, Task, Update
from ubsmoe.methods.state import pack
from ubsmoe.server.federation import Federation, build_federation, build_server
from ubsmoe.server.rounds import one_round
from ubsmoe.server.run import run
from ubsmoe.server.start import start_state
from ubsmoe.storage.checkpoints import load_newest
from ubsmoe.storage.runfolder import RunFolder, read_adapter
from ubsmoe.wire.codec import decode_task
from ubsmoe.wire.packed import Packed
from unit.engines.loop_grid import LoopGrid, as_process

BAD = "client-2"


class Engine(LocalEngine):
    """A local engine one of whose clients answers otherwise."""

    def __init__(self, federation: Federation, answer: Callable[[Task, Update], Reply]) -> None:
        super().__init__(federation.trainer, federation.examples, federation.clients)
        self._answer = answer

    def exchange(self, tasks: Iterable[Task]) -> Iterator[Reply]:
        asked = list(tasks)
        for task, reply in zip(asked, super().exchange(asked), strict=True):
            yield self._answer(task, reply) if task.profile.client == BAD and isinstance(reply, Update) else reply


def with_adapters(update: Update, change: Callable[[torch.Tensor], torch.Tensor]) -> Update:
    return replace(update, adapters={name: change(value) for name, value in update.adapters.items()})


REJECTED: dict[str, Callable[[Task, Update], Reply]] = {
    "not finite": lambda task, update: with_adapters(update, lambda value: value * torch.nan),
    "too far": lambda task, update: with_adapters(update, lambda value: value + 1e6),
    "another round": lambda task, update: replace(update, round=task.round + 1),
    "another shape": lambda task, update: with_adapters(update, lambda value: value[:, :1]),
    "false counts": lambda task, update: replace(update, tokens=update.tokens + 1),
}


@pytest.mark.parametrize("method", ["fedavg", "ubsmoe", "hetlora", "flora"])
@pytest.mark.parametrize("how", REJECTED)
def test_a_rejected_contribution_leaves_no_trace_in_any_saved_model(
    how: str, method: str, tiny_run: dict[str, Any], tmp_path: Path
) -> None:
    """The checkpoint, the state of the method's parts and the adapter are those of a run in which it never answered."""
    quick = {"evaluate.before": False, "evaluate.after": False, "method.name": method}
    federation = build_federation(parse_run(with_overrides(tiny_run, quick)))
    saved = []
    for name, answer in (
        ("rejected", REJECTED[how]),
        ("silent", lambda task, _: Dropped(task.profile.client, task.round, "training", "no answer")),
    ):
        with RunFolder.open_or_create(tmp_path / name, to_json(federation.settings)) as folder:
            run(federation, folder, Engine(federation, answer), lambda *_: None)
        checkpoint = load_newest(tmp_path / name / "checkpoints")
        assert checkpoint is not None
        saved.append((checkpoint.tensors, read_adapter(tmp_path / name)[0]))
    for one, other in zip(*saved, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.fixture
def site(tiny_run: dict[str, Any], write_toml: Callable[..., Path]) -> tuple[Federation, LoopGrid, FlowerEngine]:
    """A server and two nodes of two clients, on a clock of one second a look; a round waits twenty."""
    as_process()
    config = {"out": "unused", "join-seconds": 1, "rounds.deadline_seconds": 20.0}
    run_file, now = write_toml(tiny_run), iter(range(10**6))
    server = build_server(read_app(run_file, config))
    nodes = {70 - i: {"partition-id": i, "num-partitions": 2} for i in range(2)}
    grid = LoopGrid(client_app(run_file), nodes, config)
    engine = FlowerEngine(grid, server, lambda _: None, lambda: float(next(now)))
    engine.join(30)
    return server, grid, engine


@pytest.mark.parametrize("late", ["the old answer", "a mixture of two rounds"])
def test_a_slow_client_never_counts_with_half_of_two_rounds(
    late: str, site: tuple[Federation, LoopGrid, FlowerEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node sits on round 1's task until round 2, then answers that one with what it did in round 1: it does not count."""
    monkeypatch.setattr("ubsmoe.engines.flower.server.POLL_SECONDS", 0.0)
    server, grid, engine = site
    held: dict[str, Message] = {}

    def slow(message: Message, answer: Callable[[], Message]) -> list[Message]:
        client = read_client(message)
        if client not in held:
            held[client] = answer()
            return []
        if message.metadata.group_id == "1":
            return []
        content = from_record(held[client].content)
        if late == "a mixture of two rounds":
            content = Packed(from_record(answer().content).header, content.tensors)
        return [Message(to_record(content), reply_to=message)]

    grid.faults[69] = slow
    events: list[tuple[str, int, dict[str, Any]]] = []
    state = start_state(server)
    states = []
    for number in (1, 2):
        state = one_round(server, engine, state, number, lambda event, n, **fields: events.append((event, n, fields)))
        states.append(state)
    lost = [(number, fields["client"], fields["stage"]) for event, number, fields in events if event == "dropped"]
    stage = "wire" if late == "a mixture of two rounds" else "validation"
    assert lost == [
        (1, "client-1", "deadline"),
        (1, "client-3", "deadline"),
        (2, "client-1", stage),
        (2, "client-3", stage),
    ]
    counted = [(number, fields["client"]) for event, number, fields in events if event == "client"]
    assert counted == [(1, "client-0"), (1, "client-2"), (2, "client-0"), (2, "client-2")]

    grid.faults[69] = lambda message, answer: []
    alone, silent = start_state(server), lambda *_, **__: None
    for number, reached in zip((1, 2), states, strict=True):
        alone = one_round(server, engine, alone, number, silent)
        one, other = pack(alone), pack(reached)
        assert all(torch.equal(value, other[name]) for name, value in one.items())


def read_client(message: Message) -> str:
    return decode_task(from_record(message.content), 1 << 22).profile.client
