"""The local engine: every client on this machine, one after another or in worker processes that share one base."""

import json
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict

import torch

from ubsmoe.client.train import ClientFailure, Trainer, train
from ubsmoe.config import ConfigError, RunSettings
from ubsmoe.data.tokens import Tokens
from ubsmoe.engines.processes import Died, Parts, Workers
from ubsmoe.messages import Dropped, Profile, Reply, Task, Update
from ubsmoe.server.evaluate import Score
from ubsmoe.server.federation import Federation
from ubsmoe.server.rounds import score
from ubsmoe.wire.codec import decode_task, decode_update, encode_task, encode_update
from ubsmoe.wire.packed import Packed

Progress = Callable[[Task, int, int, float], None]


class LocalEngine:
    """Runs tasks where they are asked for. Replies come back in the order of the tasks, few in memory at a time.

    An update passes through the wire's codec wherever that could change it, so that a run is the same run on a network.

    Args:
        trainer: what the clients share.
        examples: each client's data.
        progress: hears of every step of a client; not of those in worker processes.
        workers: what `federation_workers` made; without, clients train in this process, one update in memory at a time.
    """

    def __init__(
        self,
        trainer: Trainer,
        examples: Mapping[str, Sequence[Tokens]],
        clients: Sequence[Profile] = (),
        progress: Progress | None = None,
        workers: Workers | None = None,
    ) -> None:
        self._trainer, self._examples, self._progress, self._workers = trainer, examples, progress, workers
        self._clients = list(clients)

    def clients(self) -> list[Profile]:
        """All clients of the run."""
        return self._clients

    def exchange(self, tasks: Iterable[Task]) -> Iterator[Reply]:
        """Train every task's client; lazily, so that the server can forget an update before the next one exists."""
        if self._workers:
            yield from _exchange(self._workers, tasks)
            return
        for task in tasks:
            reply = reply_of(self._trainer, task, self._examples[task.profile.client], self._report(task.profile, task))
            if isinstance(reply, Update) and self._trainer.wire_dtype != "float32":
                packed = encode_update(reply, task.payload, self._trainer.wire_dtype)
                reply = decode_update(packed, sys.maxsize, task.payload)
            yield reply

    def _report(self, profile: Profile, task: Task) -> Callable[[int, int, float], None] | None:
        progress = self._progress
        if progress is None:
            return None
        return lambda step, num_steps, loss: progress(task, step, num_steps, loss)


def reply_of(
    trainer: Trainer, task: Task, examples: Sequence[Tokens], on_step: Callable[[int, int, float], None] | None = None
) -> Reply:
    """The client's update, or why there is none: a loss that is not finite, or too little memory."""
    try:
        return train(trainer, task, examples, on_step)
    except (ClientFailure, MemoryError, torch.OutOfMemoryError) as failure:
        return Dropped(task.profile.client, task.round, "training", str(failure) or "out of memory")


def check_workers(workers: int, settings: RunSettings) -> None:
    """Whether a run can have so many worker processes.

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
            f"--workers is {workers}, but threads is {settings.threads}: each worker computes on one thread, and a run's "
            "bits depend on their number; set threads = 1"
        )


@contextmanager
def federation_workers(federation: Federation, count: int) -> Iterator[Workers | None]:
    """Processes that train clients and score tiers on one base, the same bits as without; None if `count` is 1.

    Raises:
        ConfigError: as `check_workers`.
    """
    check_workers(count, federation.settings)

    def work(job: Parts) -> Parts:
        kind, *parts = job
        task = decode_task(Packed(*parts), sys.maxsize)
        if kind == b"score":
            return [json.dumps({name: asdict(one) for name, one in score(federation, task).items()}).encode()]
        reply = reply_of(federation.trainer, task, federation.examples[task.profile.client])
        if isinstance(reply, Dropped):
            return [reply.reason.encode()]
        packed = encode_update(reply, task.payload, federation.trainer.wire_dtype)
        return [packed.header, packed.tensors]

    if count == 1:
        yield None
    else:
        with Workers(count, work) as workers:
            yield workers


def score_in(workers: Workers, tasks: Iterable[Task]) -> Iterator[dict[str, Score]]:
    """The scores of each task's tier, in order.

    Raises:
        RuntimeError: if a worker dies of it.
    """
    for answer in workers.map(_job(b"score", task) for task in tasks):
        if isinstance(answer, Died):
            raise RuntimeError(f"a tier could not be scored: {answer.how}")
        yield {name: Score(**one) for name, one in json.loads(answer[0]).items()}


def _exchange(workers: Workers, tasks: Iterable[Task]) -> Iterator[Reply]:
    asked: deque[Task] = deque()

    def jobs() -> Iterator[Parts]:
        for task in tasks:
            asked.append(task)
            yield _job(b"train", task)

    for answer in workers.map(jobs()):
        task = asked.popleft()
        if isinstance(answer, Died):
            yield Dropped(task.profile.client, task.round, "training", answer.how)
        elif len(answer) == 1:
            yield Dropped(task.profile.client, task.round, "training", answer[0].decode())
        else:
            yield decode_update(Packed(*answer), sys.maxsize, task.payload)


def _job(kind: bytes, task: Task) -> Parts:
    packed = encode_task(task)
    return [kind, packed.header, packed.tensors]
