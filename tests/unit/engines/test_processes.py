"""The process pool: answers in order, a bound on what exists at once, and a process that dies without stopping the others."""

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator

import pytest

from ubsmoe.engines.processes import Died, Parts, ProcessPool


def number(value: int) -> list[bytes]:
    return [str(value).encode()]


def square(job: Parts) -> list[bytes]:
    value = int(job[0])
    time.sleep(0.05 if value % 3 == 0 else 0.0)  # some are slow, so that answers overtake one another
    return number(value * value)


def fragile(job: Parts) -> list[bytes]:
    if job[0] == b"die":
        os.kill(os.getpid(), signal.SIGKILL)
    if job[0] == b"half":  # an answer of 100 bytes is announced, and 10 are sent
        announced = (4).to_bytes(4, "big") + (1).to_bytes(4, "little") + (100).to_bytes(4, "big")
        for descriptor in range(3, 1024):  # the pipe is the one file that a worker has open
            with contextlib.suppress(OSError):
                os.write(descriptor, announced + b"ten bytes!")
        os.kill(os.getpid(), signal.SIGKILL)
    if job[0] == b"exit":
        os._exit(7)
    if job[0] == b"raise":
        raise KeyError("no such thing")
    return [job[0], str(os.getpid()).encode()]


def test_answers_come_in_the_order_of_the_jobs() -> None:
    with ProcessPool(3, square) as pool:
        assert list(pool.map(number(i) for i in range(20))) == [number(i * i) for i in range(20)]
        assert list(pool.map(iter([]))) == []
        assert list(pool.map([number(5)])) == [number(25)]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_no_more_than_one_job_beyond_the_workers_is_ever_ahead(count: int) -> None:
    taken = 0

    def jobs() -> Iterator[list[bytes]]:
        nonlocal taken
        for i in range(12):
            taken += 1
            yield number(i)

    with ProcessPool(count, square) as pool:
        for done, _ in enumerate(pool.map(jobs())):
            assert taken <= done + count + 1


def test_a_worker_that_dies_is_an_answer_and_is_replaced() -> None:
    with ProcessPool(2, fragile) as pool:
        jobs = [[b"a"], [b"die"], [b"b"], [b"exit"], [b"half"], [b"c"]]
        answers = list(pool.map(jobs))
        assert [answers[i] for i in (1, 3, 4)] == [
            Died("its process was killed by SIGKILL"),
            Died("its process ended with exit code 7"),
            Died("its process was killed by SIGKILL"),
        ]
        assert [answers[i][0] for i in (0, 2, 5)] == [b"a", b"b", b"c"]
        pids = {int(answer[1]) for answer in pool.map([[b"d"]] * 4)}
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_worker_killed_between_two_rounds_is_found_out() -> None:
    with ProcessPool(1, fragile) as pool:
        ((_, pid),) = pool.map([[b"a"]])
        os.kill(int(pid), signal.SIGKILL)
        time.sleep(0.05)
        first, second = pool.map([[b"b"], [b"c"]])
        assert first == Died("its process was killed by SIGKILL") and second[0] == b"c"


def test_answers_given_up_after_the_pool_was_closed_start_no_process() -> None:
    pool = ProcessPool(2, square)
    answers = pool.map(number(i) for i in range(9))
    next(answers)
    pool.close()
    answers.close()  # type: ignore[attr-defined]
    assert not multiprocessing.active_children()


def test_a_bug_in_a_worker_is_raised_here_with_its_traceback() -> None:
    with ProcessPool(2, fragile) as pool:
        with pytest.raises(RuntimeError, match=r"(?s)in a worker process:.*in fragile.*KeyError: 'no such thing'"):
            list(pool.map([[b"a"], [b"raise"], [b"b"]]))
        assert next(pool.map([[b"a"]]))[0] == b"a"


def test_workers_hold_no_file_of_the_server(tmp_path) -> None:
    def open_files(job: Parts) -> list[bytes]:
        numbers = [fd for fd in os.listdir("/proc/self/fd") if fd not in "012"]
        return [os.path.realpath(f"/proc/self/fd/{fd}").encode() for fd in numbers]

    with (tmp_path / "lock").open("w") as held, ProcessPool(2, open_files) as pool:
        assert not held.closed
        for answer in pool.map([[b""], [b""]]):
            assert len(answer) <= 2 and not any(b"lock" in name for name in answer)  # its pipe, and the listing itself
