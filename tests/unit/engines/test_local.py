"""The local engine: a client that fails is dropped, here and in worker processes, and workers change no bit."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from ubsmoe.client.train import Trainer
from ubsmoe.config import ConfigError, parse_run, to_json
from ubsmoe.engines import local
from ubsmoe.engines.local import LocalEngine, check_workers, process_pool, score_in
from ubsmoe.errors import RoundError
from ubsmoe.messages import Task, Update
from ubsmoe.methods.chosen import chosen_method, shape_of_model, tier_profiles
from ubsmoe.server.federation import Federation, build_federation
from ubsmoe.server.run import run
from ubsmoe.storage.runfolder import RunFolder


@pytest.fixture(scope="module")
def federation(random_base: Path) -> Federation:
    """Three clients in two tiers, two rounds of one step, on one thread; a question or two."""
    table = {
        "threads": 1,
        "model": {"base": str(random_base)},
        "adapter": {"rank": 3},
        "tiers": {"budgets": [0.25, 1.0], "ranks": [2, 3]},
        "clients": {"count": 3},
        "data": {"synthetic": {"train_examples": 40, "test_examples": 2, "entities": 8}},
        "train": {"rounds": 2, "local_steps": 1, "batch_size": 4},
        "evaluate": {"max_new_tokens": 1},
    }
    return build_federation(parse_run(table))


def with_method(federation: Federation, table: dict[str, Any]) -> Federation:
    settings = parse_run({**federation.settings.model_dump(mode="json"), "method": table})
    shape = shape_of_model(settings, federation.model)
    method = chosen_method(settings, shape)
    tiers = tier_profiles(settings, method, shape)
    clients = [
        replace(profile, top_k=tiers[profile.tier].top_k, rank=tiers[profile.tier].rank)
        for profile in federation.clients
    ]
    return replace(federation, settings=settings, shape=shape, method=method, tiers=tiers, clients=clients)


def carry_out(federation: Federation, folder: Path, workers: int) -> dict[str, Any]:
    with (
        process_pool(federation, workers) as pool,
        RunFolder.open_or_create(folder, to_json(federation.settings)) as opened,
    ):
        engine = LocalEngine(federation.trainer, federation.examples, federation.clients, pool=pool)
        return run(federation, opened, engine, lambda *_: None, partial(score_in, pool) if pool else None)


def events(folder: Path, name: str) -> list[dict[str, Any]]:
    lines = (folder / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == name]


@contextmanager
def train_as(does: Callable[[Trainer, Task, Any, Any], Update], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(local, "train", does)
        yield


@pytest.mark.parametrize(
    "method", [{"name": "flora"}, {"name": "ubsmoe", "pg": {"mode": "sampled"}, "dmr": {"phi": "trained"}}]
)
def test_one_two_and_four_workers_give_the_same_bits(
    federation: Federation, method: dict[str, Any], tmp_path: Path
) -> None:
    federation = with_method(federation, method)
    one, *others = [carry_out(federation, tmp_path / str(count), count) for count in (1, 2, 4)]
    for other in others:
        assert other["adapter_sha256"] == one["adapter_sha256"]
        assert (other["before"], other["after"]) == (one["before"], one["after"])
    for name in ("client", "round", "evaluated"):
        told = [
            [{key: value for key, value in event.items() if key not in ("time", "seconds")} for event in found]
            for found in (events(tmp_path / count, name) for count in "124")
        ]
        assert told[0] == told[1] == told[2] and told[0]


def test_a_run_over_an_int8_wire_is_the_same_here_and_in_workers_and_not_that_over_float32(
    federation: Federation, tmp_path: Path
) -> None:
    def over(dtype: str, workers: int) -> str:
        settings = parse_run({**federation.settings.model_dump(mode="json"), "wire": {"dtype": dtype}})
        done = carry_out(replace(federation, settings=settings), tmp_path / f"{dtype}-{workers}", workers)
        return str(done["adapter_sha256"])

    assert over("int8", 1) == over("int8", 2)
    assert len({over(dtype, 2) for dtype in ("float32", "bfloat16")} | {over("int8", 3)}) == 3


def fails(trainer: Trainer, task: Task, *rest: Any) -> Update:
    """The second client's second round ends badly, each time in another way."""
    if (task.profile.client, task.round) == ("client-1", 2):
        for name, error in {"memory": MemoryError(), "gpu": torch.OutOfMemoryError("no room left")}.items():
            if os.environ.get("FAILS") == name:
                raise error
        if os.environ.get("FAILS") == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        task = Task(2, task.profile, {name: value * float("nan") for name, value in task.payload.items()}, task.run)
    return honest_train(trainer, task, *rest)


honest_train = local.train


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("nan", "client client-1, round 2, step 0: the loss is nan; lower"),
        ("memory", "out of memory"),
        ("gpu", "no room left"),
        ("kill", "its process was killed by SIGKILL"),
    ],
)
def test_a_client_that_fails_is_dropped_and_the_round_goes_on(
    federation: Federation, how: str, reason: str, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "kill" and workers == 1:
        pytest.skip("a client that shares the server's process cannot die alone")
    monkeypatch.setenv("FAILS", how)
    with train_as(fails, monkeypatch):
        carry_out(federation, tmp_path / "run", workers)
    (lost,) = events(tmp_path / "run", "dropped")
    assert (lost["client"], lost["round"], lost["stage"]) == ("client-1", 2, "training")
    assert lost["reason"].startswith(reason)
    took = [(event["round"], event["client"]) for event in events(tmp_path / "run", "client")]
    assert took == [(1, "client-0"), (1, "client-1"), (1, "client-2"), (2, "client-0"), (2, "client-2")]


@pytest.mark.parametrize("workers", [1, 2])
def test_when_every_client_fails_the_run_stops_at_its_quorum(
    federation: Federation, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> Update:
        raise MemoryError

    with train_as(never, monkeypatch), pytest.raises(RoundError, match="round 1: 0 updates count"):
        carry_out(federation, tmp_path / "run", workers)
    assert len(events(tmp_path / "run", "dropped")) == 3


def test_a_bug_in_a_client_stops_the_run(
    federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*_: Any) -> Update:
        raise AttributeError("typo")

    with train_as(wrong, monkeypatch):
        with pytest.raises(AttributeError, match="typo"):
            carry_out(federation, tmp_path / "here", 1)
        with pytest.raises(RuntimeError, match=r"(?s)in a worker process.*AttributeError: typo"):
            carry_out(federation, tmp_path / "there", 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"--workers is 2, but threads is None: each worker computes on one thread.*set threads = 1"),
        ({"threads": 2}, r"threads is 2"),
        ({"threads": 1, "model": {"device": "cuda"}}, r"model.device is 'cuda'"),
    ],
)
def test_workers_need_one_cpu_thread(changes: dict[str, Any], message: str) -> None:
    settings = parse_run(changes)
    check_workers(1, settings)
    with pytest.raises(ConfigError, match=message):
        check_workers(2, settings)
