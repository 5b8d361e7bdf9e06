"""Secure rounds with clients that are simulated in this process: the messages and sums of a network, and no secrecy."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial

from ubsmoe.client.node_config import TRAIN
from ubsmoe.client.secure import SecureClient, task_in
from ubsmoe.config import RunSettings
from ubsmoe.errors import UserError
from ubsmoe.messages import Dropped, Reply, Task, Update
from ubsmoe.methods.method import Method
from ubsmoe.secagg.messages import Start
from ubsmoe.wire.packed import Packed

Answer = Packed | Dropped


class SecureClients:
    """Answers the messages of secure rounds for all clients of a run.

    Args:
        settings: the run.
        method: the run's.
        exchange: trains the clients of tasks, in order.
    """

    def __init__(
        self, settings: RunSettings, method: Method, exchange: Callable[[Iterable[Task]], Iterator[Reply]]
    ) -> None:
        self._settings, self._method, self._exchange = settings, method, exchange
        self._clients: dict[str, SecureClient] = {}

    def ask(self, kind: str, round: int, messages: Iterable[tuple[str, Packed]]) -> Iterator[tuple[str, Answer]]:
        """As `server.secure.Courier` says."""
        if kind == TRAIN:
            yield from self._train(round, messages)
            return
        for client, packed in messages:
            yield client, _answered(client, round, partial(self._client(client).answer, kind, packed))

    def _train(self, round: int, messages: Iterable[tuple[str, Packed]]) -> Iterator[tuple[str, Answer]]:
        started: deque[tuple[str, Start, Task]] = deque()

        def tasks() -> Iterator[Task]:
            for client, packed in messages:
                start = Start.read(packed.header)
                started.append((client, start, task_in(start, packed)))
                yield started[-1][2]

        for reply in self._exchange(tasks()):
            client, start, task = started.popleft()
            if isinstance(reply, Update):
                masked = partial(self._client(client).masked, start, task, reply, self._method)
                yield client, _answered(client, round, masked)
            else:
                yield client, reply

    def _client(self, client: str) -> SecureClient:
        if client not in self._clients:
            self._clients[client] = SecureClient(client, self._settings)
        return self._clients[client]


def _answered(client: str, round: int, answer: Callable[[], Packed]) -> Answer:
    """The client's answer, or why it gives none."""
    try:
        return answer()
    except UserError as refusal:
        return Dropped(client, round, "training", str(refusal))
