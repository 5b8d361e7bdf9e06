"""The server: `server.run.run` with clients that a Flower Grid reaches.

Nodes announce their clients before they are sent a task. An announced name is checked against the name that the node's key was
registered with at the SuperLink. The sender of an answer is known from Flower's message, not from what the answer says.
"""

import logging
import math
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message
from flwr.serverapp import Grid, ServerApp

from ubsmoe.client.node_config import TRAIN as SECURE_TRAIN
from ubsmoe.config import ConfigError, to_json
from ubsmoe.engines.flower.app import read_app
from ubsmoe.engines.flower.record import DATA_ERRORS, Unreadable, content_of, failure, to_record
from ubsmoe.engines.flower.roster import Roster
from ubsmoe.engines.flower.secure import carried
from ubsmoe.engines.flower.teller import Teller, say, without_traceback
from ubsmoe.errors import printable
from ubsmoe.messages import Dropped, Profile, Reply, Task, Update
from ubsmoe.report.tracking import Tracking
from ubsmoe.server.federation import Federation, build_server
from ubsmoe.server.origin import made_with
from ubsmoe.server.run import run
from ubsmoe.storage.runfolder import RunFolder
from ubsmoe.wire.codec import decode_announcements, decode_update, encode_task
from ubsmoe.wire.packed import Packed, WireError, enclose

ANNOUNCE = "query.announce"
TRAIN = "train"
POLL_SECONDS = 0.2
SECURE_SECONDS = 120.0  # for a step of a secure round in which nobody trains


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
        self._roster = Roster(federation, log)
        self._patience = 0.0  # seconds that a round waits for the clients of a quorum
        self.note: Callable[[list[dict[str, Any]]], None] = lambda nodes: None  # told of the roster when it has changed
        self._noted: list[dict[str, Any]] = []
        self._greeted: set[int] = set()
        self._unanswered: dict[str, int] = {}

    def join(self, seconds: float) -> None:
        """Wait for the run file's number of clients, at most so long. Later ones take part from the next round.

        Raises:
            ConfigError: if fewer came than a round's quorum.
        """
        self._patience, rounds = seconds, self._settings.rounds
        there = self._wait_for(self._settings.clients.count, seconds)
        if len(there) < self._quorum:
            raise ConfigError(
                f"{len(there)} clients came within {seconds:g} s, clients.count is {self._settings.clients.count} and "
                f"rounds.quorum {rounds.quorum:g}; start more nodes, or wait longer (join-seconds)"
            )

    @property
    def _quorum(self) -> int:
        return math.ceil(max(1, self._settings.rounds.quorum * self._settings.clients_per_round))

    def _wait_for(self, count: int, seconds: float) -> list[Profile]:
        """The clients that are there, once there are so many or the time is over."""
        end = self._clock() + seconds
        self._look_around()
        while len(there := self._roster.here()) < count and self._clock() < end:
            time.sleep(POLL_SECONDS)
            self._look_around()
        return there

    def clients(self) -> list[Profile]:
        """The clients that have joined and are online; as long as they are too few for a round, it waits for others to return."""
        there = self._wait_for(self._quorum, self._patience)
        if (nodes := self._roster.nodes()) != self._noted:
            self._noted = nodes
            self.note(nodes)
        return there

    def exchange(self, tasks: Iterable[Task]) -> Iterator[Reply]:
        """Send every task, yield replies in the order of the tasks.

        Answers that are not asked for yet stay with Flower, so the server holds one at a time, unless more clients are asked
        than wanted: then the first to answer count, and all answers must be looked at.
        """
        began, (limit, setting) = self._clock(), self._settings.rounds.longest_wait
        asked, waiting, replies = self._send(tasks, limit)
        wanted = len(asked) if self._settings.clients.sampling == "poisson" else self._settings.clients_per_round
        race, count = len(asked) > wanted, 0
        for task in asked:
            client = task.profile.client
            while client not in replies:
                late = self._clock() - began > limit
                ids = [message_id for message_id, other in waiting.items() if race or late or other is task]
                came = [self._reply_of(message, other) for message, other in self._pull(ids, waiting)]
                for reply in came:
                    self._heard(reply.client, reply)
                    count += isinstance(reply, Update)
                    too_many = isinstance(reply, Update) and count > wanted
                    replies[reply.client] = _lost(reply.client, task.round, wanted) if too_many else reply
                if client not in replies and (late or count >= wanted):
                    if late:
                        self._missed(client)
                    replies[client] = _lost(client, task.round, wanted, f"{setting} = {limit:g}" if late else None)
                elif not came:
                    time.sleep(POLL_SECONDS)
            yield replies.pop(client)

    def ask(
        self, kind: str, round: int, messages: Iterable[tuple[str, Packed]]
    ) -> Iterator[tuple[str, Packed | Dropped]]:
        """As `server.secure.Courier` says. Steps without training have SECURE_SECONDS, training the run file's longest wait."""
        training = kind == SECURE_TRAIN
        limit, setting = self._settings.rounds.longest_wait if training else (SECURE_SECONDS, "")
        said = f"{setting} = {limit:g} s" if setting else f"{limit:g} s"
        word = f"{'train' if training else 'query'}.{kind}"

        def push(client: str, packed: Packed) -> str | None:
            node = self._roster.node_of(client)
            return None if node is None else self._push(word, node, enclose(packed, client=client), str(round), limit)

        node_of = self._roster.node_of
        read = partial(_answer_of, number=round, node_of=node_of)
        waited = carried(messages, round, node_of, push, self._pull, read, (limit, said), self._clock, POLL_SECONDS)
        for client, answer in waited:
            self._heard(client, answer)
            yield client, answer

    def _send(self, tasks: Iterable[Task], seconds: float) -> tuple[list[Task], dict[str, Task], dict[str, Reply]]:
        """Push every task. Gives all of them, those under way by message id, and a reply for each that Flower refused."""
        asked, waiting, refused = list[Task](), dict[str, Task](), dict[str, Reply]()
        for task in tasks:
            client = task.profile.client
            asked.append(task)
            node = self._roster.node_of(client)
            message_id = None if node is None else self._push(TRAIN, node, encode_task(task), str(task.round), seconds)
            if message_id is None:
                refused[client] = Dropped(client, task.round, "wire", "Flower did not take the task")
            else:
                waiting[message_id] = task
        return asked, waiting, refused

    def _pull(self, ids: list[str], waiting: dict[str, Any]) -> list[tuple[Message | Unreadable, Any]]:
        """The answers that are there, each with its entry of `waiting`; a second answer to a message is ignored."""
        found: list[tuple[Message | Unreadable, Any]] = []
        for message_id in ids:  # one by one: Flower forgets all that it read beside a message it cannot build
            try:
                messages = list(self._grid.pull_messages([message_id]))
            except DATA_ERRORS as error:
                found.append((Unreadable(f"{type(error).__name__}: {error}"), waiting.pop(message_id)))
                continue
            whose = [(message, waiting.pop(message.metadata.reply_to_message_id, None)) for message in messages]
            found += [(message, one) for message, one in whose if one is not None]
        return found

    def _look_around(self) -> None:
        """Ask new nodes for their clients and read what has been announced; does not wait."""
        here = {node.node_id: node.name for node in self._grid.get_nodes()}
        self._greeted &= here.keys()  # a node that returns is asked again: its clients may differ
        self._roster.see(here)
        for node in here.keys() - self._greeted:
            self._greet(node)
        for message, node in self._pull(list(self._unanswered), self._unanswered):
            try:
                self._roster.announce(node, decode_announcements(content_of(message, node)))
            except WireError as error:
                if node in here:  # of one that has gone Flower says so itself
                    self._roster.refuse(node, printable(str(error)))

    def _greet(self, node: int) -> None:
        """Ask a node which clients it is."""
        message_id = self._push(ANNOUNCE, node, Packed(b"", b""), "announce", None)
        if message_id is not None:
            self._greeted.add(node)
            self._unanswered[message_id] = node

    def _heard(self, client: str, reply: Reply | Packed) -> None:
        if isinstance(reply, Dropped) and reply.stage == "deadline":
            self._missed(client)
        else:
            self._roster.heard(client, answered=True)

    def _missed(self, client: str) -> None:
        """A client said nothing in time: it is asked again when its node has shown that it is there."""
        self._roster.heard(client, answered=False)
        if (node := self._roster.node_of(client)) is not None and node not in self._unanswered.values():
            self._greet(node)

    def _reply_of(self, message: "Message | Unreadable", task: Task) -> Reply:
        """The reply in a message. Its client is the one that was asked, whatever the message claims."""
        client, node = task.profile.client, self._roster.node_of(task.profile.client)
        if isinstance(message, Message) and message.has_error():
            return Dropped(client, task.round, *failure(message))
        try:
            if node is None:
                raise WireError("its place was given up")
            spec, dtype = self._federation.specs(task), self._settings.wire.dtype
            update = decode_update(content_of(message, node), spec.most_bytes, task.payload, spec, dtype)
        except WireError as error:
            return Dropped(client, task.round, "wire", printable(str(error)))
        if update.client != client:
            return Dropped(client, task.round, "validation", f"answered in the name of {update.client!r}")
        return update

    def _push(self, kind: str, node: int, packed: Packed, group: str, seconds: float | None) -> str | None:
        content = to_record(packed)
        # an answer names its message's id, which is a hash over the message: the nonce keeps other nodes from guessing it
        content["nonce"] = ConfigRecord({"bytes": secrets.token_bytes(16)})
        message = Message(content, node, kind, ttl=seconds, group_id=group)
        return next(iter(self._grid.push_messages([message])), None)


def _answer_of(
    message: Message | Unreadable, client: str, number: int, node_of: Callable[[str], int | None]
) -> Packed | Dropped:
    """What a message of a secure round holds; the protocol reads it."""
    if isinstance(message, Message) and message.has_error():
        return Dropped(client, number, *failure(message))
    try:
        if (node := node_of(client)) is None:
            raise WireError("its place was given up")
        return content_of(message, node)
    except WireError as error:
        return Dropped(client, number, "wire", printable(str(error)))


def _lost(client: str, number: int, wanted: int, limit: str | None = None) -> Dropped:
    reason = f"no answer within {limit}" if limit else f"the round had its {wanted} updates before"
    return Dropped(client, number, "deadline", reason)


def server_app(run_file: Path) -> ServerApp:
    """The app that runs beside the SuperLink: `server.run.run`, with its clients on the nodes."""
    app = ServerApp()

    def main(grid: Grid, context: Context) -> None:
        import torch

        logging.getLogger("flwr").addFilter(without_traceback)
        settings = read_app(run_file, context.run_config)
        if settings.threads:
            torch.set_num_threads(settings.threads)
        out, named = Path(str(context.run_config["out"])), str(context.run_config.get("track", ""))
        tracking = Tracking([name for name in named.split(",") if name], out, settings.model_dump(mode="json"))
        federation = build_server(settings)
        federation.method.check_stateless()
        engine = FlowerEngine(grid, federation, say)
        tell = Teller(settings.train.rounds)
        seconds, setting = settings.rounds.longest_wait
        say(f"a client that does not answer within {seconds:g} s is dropped ({setting})")

        def on_event(event: str, round: int, fields: dict[str, Any]) -> None:
            tell.on_event(event, round, fields)
            tracking.on_event(event, round, fields)

        with RunFolder.open_or_create(out, to_json(settings), made_with(settings)) as folder, tracking:
            engine.note = lambda nodes: folder.events.append("nodes", None, nodes=nodes)
            wait = float(context.run_config["join-seconds"])
            say(f"waits at most {wait:g} s (join-seconds) for {settings.clients.count} clients")
            engine.join(wait)
            summary = run(federation, folder, engine, on_event)
        say(f"adapter {folder.path / 'adapter.safetensors'}  sha256 {summary['adapter_sha256']}")

    app.main()(main)
    return app
