"""Personalisation: each client goes on alone from a finished run's adapter, on its own examples, and sends nothing.

    theta_i = theta after n local steps of client i         (FedAvg + fine-tuning: arXiv 1909.12488, arXiv 2002.04758)

What it gains is weighed by the client's own mix of tasks: accuracy on each task's test questions, which nobody trains on, times
the task's share of its examples.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ubsmoe import progress
from ubsmoe.client.train import train
from ubsmoe.config import ConfigError
from ubsmoe.export.installed import read_installed
from ubsmoe.export.save_load import Origin, write
from ubsmoe.export.sidecar import Format
from ubsmoe.finished.run import settings_of_run
from ubsmoe.messages import Task
from ubsmoe.methods.state import unpack
from ubsmoe.server.evaluate import Score, evaluate
from ubsmoe.server.federation import Federation, build_federation
from ubsmoe.server.rounds import installed, tasks_of
from ubsmoe.storage.exportfolder import check_free
from ubsmoe.storage.runfolder import read_adapter


@dataclass(frozen=True)
class Personal:
    """One client: its tier, counted from 0, and its accuracy with the run's adapter and with its own, on its own mix of tasks."""

    client: str
    tier: int
    examples: int
    before: float
    after: float


def personalise(
    path: Path, steps: int, out: Path | None = None, clients: Sequence[str] = (), format: Format = "peft"
) -> Iterator[Personal]:
    """Train a finished run's adapter on each client's own examples, one client after another.

    Args:
        path: the run folder.
        steps: optimiser steps of each client, with the run's batch size and learning rate.
        out: a new folder that gets an export of every client's adapter, under its name; none is kept when left out.
        clients: their names; all when left out.
        format: of the exports.

    Yields:
        What each gained, once its adapter is written.

    Raises:
        ConfigError: for a client that the run does not have, or a base that is not the run's.
        RunFolderError: if the folder holds no finished run.
    """
    if out is not None:
        check_free(out)
    tensors, facts = read_adapter(path)
    changes = {"train.local_steps": steps, "train.schedule": "constant", "train.schedule_rounds": None}
    federation = build_federation(settings_of_run(path, changes))
    if facts["base_sha256"] != federation.base_sha256:
        raise ConfigError(f"model.base: {path} was trained on another base than {federation.settings.model.base}")
    names = [profile.client for profile in federation.clients]
    if unknown := [name for name in clients if name not in names]:
        raise ConfigError(f"{path} has no client {unknown[0]!r}; it has {', '.join(names)}")
    chosen = [profile for profile in federation.clients if not clients or profile.client in clients]
    state = unpack(tensors, federation.method.keeps)
    after = federation.settings.train.rounds + 1  # draws of its own
    for task in progress.through(list(tasks_of(federation, state, after, chosen)), "personalises"):
        yield _one(federation, task, out, format)


def _one(federation: Federation, task: Task, out: Path | None, format: Format) -> Personal:
    name, examples = task.profile.client, federation.examples[task.profile.client]
    shared = _scores(federation, task, {})
    update = train(federation.trainer, task, examples)
    own = _scores(federation, task, update.adapters, out and out / name, format)
    mix = _mix(federation, name)
    return Personal(name, task.profile.tier, len(examples), weighed_accuracy(shared, mix), weighed_accuracy(own, mix))


def _scores(
    federation: Federation, task: Task, own: Mapping[str, Tensor], out: Path | None = None, format: Format = "peft"
) -> dict[str, Score]:
    """The scores of a client's adapter at its budget, which is exported too where `out` is given."""
    settings = federation.settings
    with installed(federation, task) as model:
        for name, value in own.items():
            model.adapter[name].data.copy_(value)
        if out is not None:
            origin = Origin(settings.model, federation.base_sha256, federation.method.name, task.profile.tier + 1)
            write(model, federation.tokenizer, read_installed(model), origin, format, out)
        return evaluate(model, federation.tokenizer, federation.questions, settings.evaluate)


def _mix(federation: Federation, client: str) -> dict[str, float]:
    """How many of a client's examples are of each task; the same of all if the partition does not go by task."""
    found = federation.partition
    if found is None or found.field != "task":
        return dict.fromkeys(federation.questions, 1.0)
    index = [profile.client for profile in federation.clients].index(client)
    own = {task: float(count) for task, count in found.clients[index].counts.items() if task in federation.questions}
    return own or dict.fromkeys(federation.questions, 1.0)


def weighed_accuracy(scores: Mapping[str, Score], mix: Mapping[str, float]) -> float:
    """The mean of the tasks' accuracies with these weights.

    >>> a, b = (Score(1, 0.0, accuracy, 0.0, None, None, None) for accuracy in (0.5, 0.1))
    >>> round(weighed_accuracy({"a": a, "b": b, "macro": b}, {"a": 3, "b": 1}), 3)
    0.4
    """
    return sum(share * scores[task].accuracy for task, share in mix.items()) / sum(mix.values())
