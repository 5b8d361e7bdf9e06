"""The server: `rounds.run` with clients that a Flower Grid reaches.

Nodes announce their clients before they are sent a task. An announced name is checked against the name that the node's key was
registered with at the SuperLink. The sender of an answer is known from Flower's message, not from what the answer says.
"""

import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message
from flwr.serverapp import Grid, ServerApp

from ubsmoe.config import ConfigError, to_json
from ubsmoe.data.partition import client_names
from ubsmoe.engines.flower.app import read_app
from ubsmoe.engines.flower.record import from_record, to_record
from ubsmoe.errors import UserError
from ubsmoe.messages import Announcement, Dropped, Profile, Reply, Task, Update
from ubsmoe.server.federation import Federation, assign_tier, build_server
from ubsmoe.server.rounds import run
from ubsmoe.storage.runfolder import RunFolder
from ubsmoe.wire.codec import decode_announcements, decode_update, encode_task
from ubsmoe.wire.packed import Packed, WireError

ANNOUNCE = "query.announce"
TRAIN = "train"
POLL_SECONDS = 0.2
LONGEST_REASON = 300  # characters of a node's error text that go into the events


class FlowerEngine:
    """Reaches clients over a Grid.

    A client that fails, is silent or comes too late is a Dropped; its answer, should it come later, is never asked for.

    Args:
        grid: Flower's.
        federation: the server's side of the run.
        log: called with a line for each client that joins or is refused.
        clock: seconds, for deadlines.
    """

    def __init__(
        self,
        grid: Grid,
        federation: Federation,
        log: Callable[[str], None] = print,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._grid, self._federation, self._log, self._clock = grid, federation, log, clock
        self._settings = federation.settings
        self._clients: list[Profile] = []  # in client order, which is not the order of joining
        self._nodes: dict[str, int] = {}
        self._registered: dict[int, str] = {}
        self._greeted: set[int] = set()
        self._unanswered: dict[str, int] = {}

    def join(self, seconds: float) -> None:
        """Wait for the run file's number of clients, at most so long. Later ones take part from the next round.

        Raises:
            ConfigError: if fewer came than a round's quorum.
        """
        count, end = self._settings.clients.count, self._clock() + seconds
        self._look_around()
        while len(self._clients) < count and self._clock() < end:
            time.sleep(POLL_SECONDS)
            self._look_around()
        if len(self._clients) < max(1, self._settings.rounds.quorum * self._settings.clients_per_round):
            raise ConfigError(
                f"{len(self._clients)} clients came within {seconds:g} s, clients.count is {count} and rounds.quorum "
                f"{self._settings.rounds.quorum:g}; start more nodes, or wait longer (join-seconds)"
            )

    def clients(self) -> list[Profile]:
        """The clients that have joined."""
        return list(self._clients)

    def exchange(self, tasks: Iterable[Task]) -> Iterator[Reply]:
        """Send every task, yield replies in the order of the tasks.

        Answers that are not asked for yet stay with Flower, so the server holds one at a time, unless more clients are asked
        than wanted: then the first to answer count, and all answers must be looked at.
        """
        self._look_around()
        began, limit = self._clock(), self._settings.rounds.deadline_seconds
        asked, waiting, replies = self._send(tasks, limit)
        wanted = len(asked) if self._settings.clients.sampling == "poisson" else self._settings.clients_per_round
        race, count = len(asked) > wanted, 0
        for task in asked:
            client = task.profile.client
            while client not in replies:
                late = limit is not None and self._clock() - began > limit
                ids = [message_id for message_id, other in waiting.items() if race or late or other is task]
                came = [self._reply_of(message, other) for message, other in self._pull(ids, waiting)]
                for reply in came:
                    count += isinstance(reply, Update)
                    too_many = isinstance(reply, Update) and count > wanted
                    replies[reply.client] = _lost(reply.client, task.round, wanted) if too_many else reply
                if client not in replies and (late or count >= wanted):
                    replies[client] = _lost(client, task.round, wanted, limit if late else None)
                elif not came:
                    time.sleep(POLL_SECONDS)
            yield replies.pop(client)

    def _send(
        self, tasks: Iterable[Task], seconds: float | None
    ) -> tuple[list[Task], dict[str, Task], dict[str, Reply]]:
        """Push every task. Gives all of them, those under way by message id, and a reply for each that Flower refused."""
        asked, waiting, refused = list[Task](), dict[str, Task](), dict[str, Reply]()
        for task in tasks:
            client = task.profile.client
            asked.append(task)
            message_id = self._push(TRAIN, self._nodes[client], encode_task(task), str(task.round), seconds)
            if message_id is None:
                refused[client] = Dropped(client, task.round, "wire", "Flower did not take the task")
            else:
                waiting[message_id] = task
        return asked, waiting, refused

    def _pull(self, ids: list[str], waiting: dict[str, Any]) -> list[tuple[Message, Any]]:
        """The answers that are there, each with its entry of `waiting`; a second answer to a message is ignored."""
        messages = self._grid.pull_messages(ids) if ids else ()
        found = [(message, waiting.pop(message.metadata.reply_to_message_id, None)) for message in messages]
        return [(message, whose) for message, whose in found if whose is not None]

    def _reply_of(self, message: Message, task: Task) -> Reply:
        """The reply in a message. Its client is the one that was asked, whatever the message claims."""
        client = task.profile.client
        if message.has_error():
            return Dropped(client, task.round, "training", _short(message.error.reason or "no reason given"))
        try:
            most = self._federation.specs(task).most_bytes
            update = decode_update(_content(message, self._nodes[client]), most, task.payload)
        except WireError as error:
            return Dropped(client, task.round, "wire", _short(str(error)))
        if update.client != client:
            return Dropped(client, task.round, "validation", _short(f"answered in the name of {update.client!r}"))
        return update

    def _look_around(self) -> None:
        """Ask new nodes for their clients and read what has been announced; does not wait."""
        here = {node.node_id: node.name for node in self._grid.get_nodes()}
        self._registered |= here
        online = set(here)
        self._greeted &= online  # a node that returns is asked again: its clients may differ
        for node in online - self._greeted:
            message_id = self._push(ANNOUNCE, node, Packed(b"", b""), "announce", None)
            if message_id is not None:
                self._greeted.add(node)
                self._unanswered[message_id] = node
        for message, node in self._pull(list(self._unanswered), self._unanswered):
            self._read_announcements(message, node, online)

    def _read_announcements(self, message: Message, node: int, online: set[int]) -> None:
        try:
            announced = decode_announcements(_content(message, node))
        except WireError as error:
            return self._log(f"node {node} is refused: {error}")
        for one in announced:
            try:
                self._add_client(one, node, online)
            except UserError as error:
                self._log(f"node {node}: client {one.client!r} is refused: {error}")

    def _add_client(self, one: Announcement, node: int, online: set[int]) -> None:
        profile = assign_tier(self._federation, one)
        name, holder = self._registered[node], self._nodes.get(one.client)
        if name and name != one.client:
            raise ConfigError(f"its key is registered as {name!r}")
        if not name and one.client in self._registered.values():
            raise ConfigError("another key is registered as that; register this node's with --name")
        if holder != node and holder in online and self._registered[holder] == name:
            raise ConfigError(f"node {holder} is that client already")
        others = [other for other in self._clients if other.client != one.client]
        if len(others) >= self._settings.clients.count:
            raise ConfigError(f"clients.count = {self._settings.clients.count} are there")
        self._nodes[one.client] = node
        names = client_names(self._settings)
        self._clients = sorted([*others, profile], key=lambda p: (_place(p.client, names), p.client))
        self._log(f"{one.client} is node {node}: {one.num_examples} examples, tier {profile.tier + 1}")

    def _push(self, kind: str, node: int, packed: Packed, group: str, seconds: float | None) -> str | None:
        content = to_record(packed)
        # an answer names its message's id, which is a hash over the message: the nonce keeps other nodes from guessing it
        content["nonce"] = ConfigRecord({"bytes": secrets.token_bytes(16)})
        message = Message(content, node, kind, ttl=seconds, group_id=group)
        return next(iter(self._grid.push_messages([message])), None)


def _place(client: str, names: list[str]) -> int:
    return names.index(client) if client in names else len(names)


def _content(message: Message, node: int) -> Packed:
    """The content of an answer, if it comes from the node that was asked; the SuperLink checks that too."""
    if message.has_error():
        raise WireError(_short(message.error.reason or "no reason given"))
    if message.metadata.src_node_id != node:
        raise WireError(f"node {message.metadata.src_node_id} answered for node {node}")
    return from_record(message.content)


def _lost(client: str, number: int, wanted: int, limit: float | None = None) -> Dropped:
    reason = f"the round had its {wanted} updates before"
    if limit is not None:
        reason = f"no answer within rounds.deadline_seconds = {limit:g}"
    return Dropped(client, number, "deadline", reason)


def _short(text: str) -> str:
    return " ".join(text.split())[:LONGEST_REASON]


def server_app(run_file: Path) -> ServerApp:
    """The app that runs beside the SuperLink: `rounds.run`, with its clients on the nodes."""
    app = ServerApp()

    def main(grid: Grid, context: Context) -> None:
        import torch

        settings = read_app(run_file, context.run_config)
        if settings.threads:
            torch.set_num_threads(settings.threads)
        federation = build_server(settings)
        engine = FlowerEngine(grid, federation, _print)
        with RunFolder.open_or_create(str(context.run_config["out"]), to_json(settings)) as folder:
            engine.join(float(context.run_config["join-seconds"]))
            summary = run(federation, folder, engine, _tell)
        _print(f"adapter {folder.path / 'adapter.safetensors'}  sha256 {summary['adapter_sha256']}")

    app.main()(main)
    return app


def _tell(event: str, round: int, fields: dict[str, Any]) -> None:
    if event == "dropped":
        _print(f"round {round}: {fields['client']} dropped ({fields['stage']}): {fields['reason']}")
    elif event == "round":
        _print(f"round {round}: loss {fields['loss']:.4f} in {fields['seconds']:.1f} s")
    elif event == "evaluated":
        _print(f"round {round}: tier {fields['tier'] + 1} evaluated")


def _print(text: str) -> None:
    print(text, flush=True)
