"""The server: `rounds.run` with clients that a Flower Grid reaches.

Nodes are asked who they are before they are sent anything. What they say is held against the name that whoever runs the
SuperLink registered their key with, and who answers a task is known from Flower's message, not from what the answer says.
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
from ubsmoe.wire.packed import MAX_MESSAGE_BYTES, Packed, WireError

ANNOUNCE = "query.announce"
TRAIN = "train"
POLL_SECONDS = 0.2
LONGEST_REASON = 300  # characters of a node's error text that go into the events


class FlowerEngine:
    """Reaches clients over a Grid.

    A client that fails, is silent or comes too late is a Dropped; its answer, should it come later, is never asked for.

    Args:
        grid: Flower's.
        federation: the server's side of the run; clients are added to it, in client order, as they join.
        say: told who comes and who is refused.
        clock: seconds, for deadlines.
    """

    def __init__(
        self,
        grid: Grid,
        federation: Federation,
        say: Callable[[str], None] = print,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clients: list[Profile] = []
        self._grid, self._federation, self._say, self._clock = grid, federation, say, clock
        self._settings = federation.settings
        self._nodes: dict[str, int] = {}
        self._registered: dict[int, str] = {}
        self._greeted: set[int] = set()
        self._unanswered: dict[str, int] = {}

    def join(self, seconds: float) -> None:
        """Wait for the run file's number of clients, at most so long. Who comes later takes part from the next round.

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
        """Those that have joined so far, in client order."""
        return self._clients

    def exchange(self, tasks: Iterable[Task]) -> Iterator[Reply]:
        """Send every task, yield replies in the order of the tasks.

        Answers that nobody has asked for yet stay with Flower, so the server holds one at a time, unless more clients are
        asked than wanted: then the first to answer count and all must be looked at.
        """
        self._look_around()
        began, limit = self._clock(), self._settings.rounds.deadline_seconds
        asked: dict[str, tuple[Task, int]] = {}
        waiting: dict[str, str] = {}
        replies: dict[str, Reply] = {}
        for task in tasks:
            client = task.profile.client
            asked[client] = task, self._nodes[client]
            message_id = self._push(TRAIN, self._nodes[client], encode_task(task), str(task.round), limit)
            if message_id is None:
                replies[client] = Dropped(client, task.round, "wire", "Flower did not take the task")
            else:
                waiting[message_id] = client
        wanted = len(asked) if self._settings.clients.sampling == "poisson" else self._settings.clients_per_round
        race, counted = len(asked) > wanted, 0
        for client, (task, _) in asked.items():
            while client not in replies:
                late = limit is not None and self._clock() - began > limit
                ids = [ours for ours, whose in waiting.items() if race or late or whose == client]
                came = [_reply_of(message, *asked[whose]) for message, whose in self._pull(ids, waiting)]
                for reply in came:
                    counted += isinstance(reply, Update)
                    too_many = isinstance(reply, Update) and counted > wanted
                    replies[reply.client] = _lost(reply.client, task.round, wanted) if too_many else reply
                if client not in replies and (late or counted >= wanted):
                    replies[client] = _lost(client, task.round, wanted, limit if late else None)
                elif not came:
                    time.sleep(POLL_SECONDS)
            yield replies.pop(client)

    def _pull(self, ids: list[str], waiting: dict[str, Any]) -> list[tuple[Message, Any]]:
        """The answers that are there, each with what `waiting` says of it; a second answer to the same message is nothing."""
        messages = self._grid.pull_messages(ids) if ids else ()
        found = [(message, waiting.pop(message.metadata.reply_to_message_id, None)) for message in messages]
        return [(message, whose) for message, whose in found if whose is not None]

    def _look_around(self) -> None:
        """Greet nodes that are new, hear those that answer; nobody is waited for."""
        here = {node.node_id: node.name for node in self._grid.get_nodes()}
        self._registered |= here
        online = set(here)
        self._greeted &= online  # who comes back is asked again: it may have changed
        for node in online - self._greeted:
            message_id = self._push(ANNOUNCE, node, Packed(b"", b""), "announce", None)
            if message_id is not None:
                self._greeted.add(node)
                self._unanswered[message_id] = node
        for message, node in self._pull(list(self._unanswered), self._unanswered):
            self._hear(message, node, online)

    def _hear(self, message: Message, node: int, online: set[int]) -> None:
        try:
            announced = decode_announcements(_content(message, node))
        except WireError as error:
            return self._say(f"node {node} is refused: {error}")
        for one in announced:
            try:
                self._admit(one, node, online)
            except UserError as error:
                self._say(f"node {node}: client {one.client!r} is refused: {error}")

    def _admit(self, one: Announcement, node: int, online: set[int]) -> None:
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
        self._say(f"{one.client} is node {node}: {one.num_examples} examples, tier {profile.tier + 1}")

    def _push(self, kind: str, node: int, packed: Packed, group: str, seconds: float | None) -> str | None:
        content = to_record(packed)
        # an answer names its message's id, a hash of it all; with this only the node that was sent it can know the id
        content["nonce"] = ConfigRecord({"bytes": secrets.token_bytes(16)})
        message = Message(content, node, kind, ttl=seconds, group_id=group)
        return next(iter(self._grid.push_messages([message])), None)


def _place(client: str, names: list[str]) -> int:
    return names.index(client) if client in names else len(names)


def _content(message: Message, node: int) -> Packed:
    """What the node that was asked has sent; the SuperLink refuses other senders too."""
    if message.has_error():
        raise WireError(_short(message.error.reason or "no reason given"))
    if message.metadata.src_node_id != node:
        raise WireError(f"node {message.metadata.src_node_id} answered for node {node}")
    return from_record(message.content)


def _reply_of(message: Message, task: Task, node: int) -> Reply:
    """What a message says. The client is who was asked, whatever the message claims."""
    client = task.profile.client
    if message.has_error():
        return Dropped(client, task.round, "training", _short(message.error.reason or "no reason given"))
    try:
        update = decode_update(_content(message, node), MAX_MESSAGE_BYTES, task.payload)
    except WireError as error:
        return Dropped(client, task.round, "wire", _short(str(error)))
    if update.client != client:
        return Dropped(client, task.round, "validation", _short(f"answered in the name of {update.client!r}"))
    return update


def _lost(client: str, number: int, wanted: int, limit: float | None = None) -> Dropped:
    reason = f"the round had its {wanted} updates before"
    if limit is not None:
        reason = f"no answer within rounds.deadline_seconds = {limit:g}"
    return Dropped(client, number, "deadline", reason)


def _short(text: str) -> str:
    return " ".join(text.split())[:LONGEST_REASON]


def server_app(run_file: Path) -> ServerApp:
    """The app that runs beside the SuperLink: the whole of `rounds.run`, its clients elsewhere."""
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
