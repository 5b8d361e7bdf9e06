"""A pool of processes forked from this one: they share everything that it has loaded, without a copy.

A job and its answer are bytes in a pipe that belongs to one process. Answers come in the order of the jobs, and at most
`count` + 1 jobs are started and not yet answered, which bounds the memory that answers take. A process that dies is replaced;
its job's answer says how it died, and the other jobs are unaffected.

The processes are forked rather than spawned because a method is made of closures, which cannot be sent to another process,
and because the base need not be loaded again. Each computes on one thread, because a thread pool does not survive a fork.
docs/decisions/0003-worker-processes.md compares concurrent.futures, loky and pebble.
"""

import contextlib
import math
import multiprocessing
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import Self

import torch

Parts = Sequence[bytes]
Work = Callable[[Parts], Parts]


@dataclass(frozen=True)
class Died:
    """The answer to a job whose process died; `how` says of what."""

    how: str


@dataclass(frozen=True)
class _Worker:
    process: ForkProcess
    pipe: Connection


class ProcessPool:
    """`count` processes that do `work`.

    Args:
        count: how many.
        work: maps a job's parts to its answer's; runs in a process of the pool, which keeps its memory between jobs.

    Raises:
        RuntimeError: where a process cannot be forked.
    """

    def __init__(self, count: int, work: Work) -> None:
        if sys.platform != "linux":  # macOS has fork, but its own libraries do not survive it
            raise RuntimeError(f"worker processes need Linux, this is {sys.platform}")
        self._work = work
        self._workers = [self._start() for _ in range(count)]

    def map(self, jobs: Iterable[Parts], seconds: float = math.inf) -> Iterator[list[bytes] | Died]:
        """The answer to each job, in order.

        Args:
            jobs: what there is to do.
            seconds: how long a job may take; its process is then killed, as if it had died.

        Raises:
            RuntimeError: if `work` raised, with its traceback; the other jobs that have been started are given up.
        """
        waiting, ahead = iter(jobs), len(self._workers) + 1
        idle, busy, ends = list(self._workers), dict[_Worker, int](), dict[_Worker, float]()
        answers: dict[int, list[bytes] | Died] = {}
        started = turn = 0
        try:
            while True:
                while idle and started < turn + ahead and (job := next(waiting, None)) is not None:
                    busy[idle[-1]], ends[idle[-1]] = started, time.monotonic() + seconds
                    with contextlib.suppress(ConnectionError):  # it died while idle; `_answer` will notice
                        _send(idle.pop().pipe, job)
                    started += 1
                if turn in answers:
                    turn += 1
                    yield answers.pop(turn - 1)
                elif busy:
                    left = min(ends[worker] for worker in busy) - time.monotonic()
                    ready = wait([worker.pipe for worker in busy], None if left == math.inf else max(0.0, left))
                    late = [worker for worker in busy if not ready and ends[worker] <= time.monotonic()]
                    for worker in late or [worker for worker in busy if worker.pipe in ready]:
                        answer, worker_now = self._given_up(worker, seconds) if late else self._answer(worker)
                        answers[busy.pop(worker)] = answer
                        idle.append(worker_now)
                else:
                    return
        finally:
            for worker in set(busy) & set(self._workers):  # none are left if the pool was closed first
                self._replace(worker)

    def close(self) -> None:
        """End the processes; closing twice is fine."""
        while self._workers:
            _end(self._workers.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _answer(self, worker: _Worker) -> tuple[list[bytes] | Died, _Worker]:
        """A worker's answer, and the worker that takes its next job."""
        try:
            state, *parts = _receive(worker.pipe)
        except (EOFError, OSError):  # it died, perhaps in the middle of its answer
            worker.process.join()
            return Died(_how(worker.process.exitcode)), self._replace(worker)
        if state != b"done":
            raise RuntimeError(f"in a worker process:\n{parts[0].decode()}")
        return parts, worker

    def _given_up(self, worker: _Worker, seconds: float) -> tuple[Died, _Worker]:
        return Died(f"its process said nothing for {seconds:g} s (rounds.give_up_seconds)"), self._replace(worker)

    def _start(self) -> _Worker:
        ours, theirs = multiprocessing.Pipe()
        with warnings.catch_warnings():
            # Python >= 3.12 warns of forking beside other threads; the child needs none of them
            warnings.simplefilter("ignore", DeprecationWarning)
            process = ForkProcess(target=_serve, args=(theirs, self._work), daemon=True)
            process.start()
        theirs.close()  # only the worker holds its end, so that its death closes the pipe
        return _Worker(process, ours)

    def _replace(self, worker: _Worker) -> _Worker:
        _end(worker)
        fresh = self._start()
        self._workers[self._workers.index(worker)] = fresh
        return fresh


def _serve(pipe: Connection, work: Work) -> None:
    """Do jobs until the pipe closes, which also happens when the server dies."""
    _close_all_but(pipe.fileno())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the server, which then ends its workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            job = _receive(pipe)
            try:
                answer: Parts = [b"done", *work(job)]
            except Exception:
                answer = [b"broken", traceback.format_exc().encode()]
            _send(pipe, answer)


def _close_all_but(kept: int) -> None:
    """Close the server's other files, above all its lock on the run folder and the other workers' pipes."""
    os.closerange(3, kept)
    os.closerange(kept + 1, os.sysconf("SC_OPEN_MAX"))


def _end(worker: _Worker) -> None:
    worker.process.kill()
    worker.process.join()
    worker.process.close()
    worker.pipe.close()


def _how(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return f"its process was killed by {signal.Signals(-exit_code).name}"
    return f"its process ended with exit code {exit_code}"


def _send(pipe: Connection, parts: Parts) -> None:
    pipe.send_bytes(len(parts).to_bytes(4, "little"))
    for part in parts:
        pipe.send_bytes(part)


def _receive(pipe: Connection) -> list[bytes]:
    count = int.from_bytes(pipe.recv_bytes(), "little")
    return [pipe.recv_bytes() for _ in range(count)]
