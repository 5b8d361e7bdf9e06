"""The local engine: every client on this machine, one after another or in a pool of processes that share one base."""

import json
import math
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

import torch

from ubsmoe.client.train import ClientFailure, Trainer, train
from ubsmoe.config import ConfigError, RunSettings
from ubsmoe.data.tokens import Tokens
from ubsmoe.engines.processes import Died, Parts, ProcessPool
from ubsmoe.messages import Dropped, Profile, Reply, Task, Update
from ubsmoe.server.evaluate import Score
from ubsmoe.server.federation import Federation
from ubsmoe.server.rounds import score
from ubsmoe.wire.codec import decode_task, decode_update, encode_task, encode_update
from ubsmoe.wire.packed import Packed

if TYPE_CHECKING:
    from ubsmoe.engines.secure import SecureClients

Progress = Callable[[Task, int, int, float], None]
TRAIN, SCORE = b"train", b"score"  # kinds of a job
UPDATE, DROPPED, SCORES = b"update", b"dropped", b"scores"  # kinds of an answer


class LocalEngine:
    """Trains clients on this machine. Replies come back in the order of the tasks, few in memory at a time.

    An update passes through the wire's codec wherever that could change it, so that a run gives the same result on a network.

    Args:
        trainer: what the clients share.
        examples: each client's data.
        clients: their profiles, in client order.
        progress: called with (task, step, number of steps, loss) after every step, but not in a process pool.
        pool: a `process_pool`; without one, clients train in this process, one update in memory at a time.
        give_up_seconds: after which a process of the pool that trains is given up.
    """

    def __init__(
        self,
        trainer: Trainer,
        examples: Mapping[str, Sequence[Tokens]],
        clients: Sequence[Profile],
        progress: Progress | None = None,
        pool: ProcessPool | None = None,
        give_up_seconds: float = math.inf,
    ) -> None:
        self._give_up_seconds = give_up_seconds
        self._trainer, self._examples, self._clients = trainer, examples, clients
        self._progress, self._pool = progress, pool
        self._secure: SecureClients | None = None

    def clients(self) -> list[Profile]:
        """All clients, in every round."""
        return list(self._clients)

    def exchange(self, tasks: Iterable[Task]) -> Iterator[Reply]:
        """Train every task's client; lazily, so that the server can drop an update before the next one exists."""
        return _in_pool(self._pool, tasks, self._give_up_seconds) if self._pool else map(self._reply, tasks)

    def ask(
        self, kind: str, round: int, messages: Iterable[tuple[str, Packed]]
    ) -> Iterator[tuple[str, Packed | Dropped]]:
        """As `server.secure.Courier` says."""
        if self._secure is None:
            from ubsmoe.engines.secure import SecureClients  # needs the extra secagg, which other runs need not

            assert self._trainer.run is not None
            self._secure = SecureClients(self._trainer.run, self._trainer.method, self.exchange)
        return self._secure.ask(kind, round, messages)

    def _reply(self, task: Task) -> Reply:
        on_step = partial(self._progress, task) if self._progress else None
        reply = reply_of(self._trainer, task, self._examples[task.profile.client], on_step)
        if isinstance(reply, Update) and self._trainer.wire_dtype != "float32":  # float32 comes back as it went
            packed = encode_update(reply, task.payload, self._trainer.wire_dtype)
            return decode_update(packed, sys.maxsize, task.payload)
        return reply


def reply_of(
    trainer: Trainer, task: Task, examples: Sequence[Tokens], on_step: Callable[[int, int, float], None] | None = None
) -> Reply:
    """The client's update, or a Dropped if its loss is not finite or its memory does not suffice."""
    try:
        return train(trainer, task, examples, on_step)
    except (ClientFailure, MemoryError, torch.OutOfMemoryError) as failure:
        return Dropped(task.profile.client, task.round, "training", str(failure) or "out of memory")


def check_workers(workers: int, settings: RunSettings) -> None:
    """Check that a run can have so many worker processes (option --workers).

    Raises:
        ConfigError: if it computes on anything but one CPU thread, or the system is not Linux.
    """
    if workers == 1:
        return
    if sys.platform != "linux":
        raise ConfigError(f"--workers is {workers}, but worker processes need Linux; leave it at 1")
    if settings.model.device != "cpu":
        raise ConfigError(
            f"--workers is {workers}, but model.device is {settings.model.device!r}: worker processes share a CPU; "
            "leave it at 1"
        )
    if settings.threads != 1:
        raise ConfigError(
            f"--workers is {workers}, but threads is {settings.threads}: each worker computes on one thread, and the "
            "number of threads changes a run's results; set threads = 1"
        )


@contextmanager
def process_pool(federation: Federation, count: int) -> Iterator[ProcessPool | None]:
    """Processes that train clients and score tiers on one base, with bit-identical results; None if `count` is 1.

    Raises:
        ConfigError: as `check_workers`.
    """
    check_workers(count, federation.settings)
    if count == 1:
        yield None
    else:
        with ProcessPool(count, partial(_work, federation)) as pool:
            yield pool


def _work(federation: Federation, job: Parts) -> Parts:
    """One job, in a process of the pool."""
    kind, *parts = job
    task = decode_task(Packed(*parts), sys.maxsize)
    if kind == SCORE:
        scores = {name: asdict(one) for name, one in score(federation, task).items()}
        return [SCORES, json.dumps(scores).encode()]
    reply = reply_of(federation.trainer, task, federation.examples[task.profile.client])
    if isinstance(reply, Dropped):
        return [DROPPED, reply.reason.encode()]
    packed = encode_update(reply, task.payload, federation.trainer.wire_dtype)
    return [UPDATE, packed.header, packed.tensors]


def score_in(pool: ProcessPool, tasks: Iterable[Task]) -> Iterator[dict[str, Score]]:
    """The scores of each task's tier, in order.

    Raises:
        RuntimeError: if a process dies while scoring.
    """
    for answer in pool.map(_job(SCORE, task) for task in tasks):
        if isinstance(answer, Died):
            raise RuntimeError(f"a tier could not be scored: {answer.how}")
        yield {name: Score(**one) for name, one in json.loads(answer[1]).items()}


def _in_pool(pool: ProcessPool, tasks: Iterable[Task], seconds: float) -> Iterator[Reply]:
    asked: deque[Task] = deque()

    def jobs() -> Iterator[Parts]:
        for task in tasks:
            asked.append(task)
            yield _job(TRAIN, task)

    for answer in pool.map(jobs(), seconds):
        yield _read(answer, asked.popleft())


def _read(answer: list[bytes] | Died, task: Task) -> Reply:
    """The reply that a process of the pool gave to a task."""
    if isinstance(answer, Died):
        return Dropped(task.profile.client, task.round, "training", answer.how)
    kind, *parts = answer
    if kind == DROPPED:
        return Dropped(task.profile.client, task.round, "training", parts[0].decode())
    return decode_update(Packed(*parts), sys.maxsize, task.payload)


def _job(kind: bytes, task: Task) -> Parts:
    packed = encode_task(task)
    return [kind, packed.header, packed.tensors]
