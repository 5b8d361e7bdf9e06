"""A run: begun or gone back to its newest checkpoint, round by round, and what it leaves when it ends."""

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

from ubsmoe.config import RunSettings
from ubsmoe.messages import Engine, Task
from ubsmoe.methods.state import State, pack, unpack
from ubsmoe.server.evaluate import Score
from ubsmoe.server.federation import Federation
from ubsmoe.server.origin import origin
from ubsmoe.server.privacy import spent
from ubsmoe.server.rounds import Log, one_round, score, tasks_of
from ubsmoe.server.start import calibrated, noise_key, start_state
from ubsmoe.storage.checkpoints import Checkpoint
from ubsmoe.storage.runfolder import RunFolder

Report = Callable[[str, int, dict[str, Any]], None]
ScoreAll = Callable[[Iterable[Task]], Iterable[dict[str, Score]]]


def run(
    federation: Federation, folder: RunFolder, engine: Engine, report: Report, score_all: ScoreAll | None = None
) -> dict[str, Any]:
    """Carry out a run, or what is left of it, and write its adapter and summary. Arguments as for `Run`."""
    under_way = Run(federation, folder, engine, report, score_all)
    while under_way.done < federation.settings.train.rounds:
        under_way.round()
    return under_way.finish()


class Run:
    """A run under way: begun, or gone back to its newest checkpoint; then round by round.

    Args:
        federation: what `build_federation` made.
        folder: where everything is written; a run that was interrupted goes on after its newest checkpoint.
        engine: how clients are reached.
        report: called with every event (name, round, fields) after it is written.
        score_all: how the tiers are scored, given a task for each; one after another in this process when left out.

    Attributes:
        state: what the server holds.
        done: rounds that have ended.
    """

    state: State
    done: int

    def __init__(
        self,
        federation: Federation,
        folder: RunFolder,
        engine: Engine,
        report: Report,
        score_all: ScoreAll | None = None,
    ) -> None:
        self._federation, self._folder, self._engine, self._report = federation, folder, engine, report
        self._score_all = score_all or (lambda tasks: (score(federation, task) for task in tasks))
        self._seconds, self._began = 0.0, time.perf_counter()
        checkpoint = folder.resume(origin(federation))
        if checkpoint is None:
            self._begin()
        else:
            self._go_on(checkpoint)
        if federation.settings.privacy:
            folder.releases.check(self.done)

    def round(self) -> None:
        """Carry out the next round and save its state. Raises RoundError as `one_round`."""
        self._began = time.perf_counter()
        federation, folder, number = self._federation, self._folder, self.done + 1
        settings = federation.settings
        state = calibrated(federation, self.state, number) if number > 1 else self.state
        if settings.privacy:
            noise = noise_key(settings, folder.releases.begin(number))
            state = one_round(federation, self._engine, state, number, self.log, noise, folder.releases.release)
        else:
            state = one_round(federation, self._engine, state, number, self.log)
        self.state, self.done = state, number
        if _is_evaluated(settings, number):
            self._score()
        self._save()

    def finish(self) -> dict[str, Any]:
        """Write adapter and summary; gives the summary. The tiers are scored if they have not been, or otherwise than now asked."""
        federation, settings, now = self._federation, self._federation.settings, self._how(self.done)
        if settings.evaluate.after and self._scored[-1:] != [now]:
            self._score()
        facts = {
            "method": federation.method.name,
            "alpha": federation.shape.alpha,
            "base_sha256": federation.base_sha256,
        }
        summary = {
            "method": federation.method.name,
            "rounds": self.done,
            "seed": settings.seed,
            "seconds": self._spent(),
            "adapter_sha256": self._folder.write_adapter(pack(self.state), facts),
            "base_sha256": federation.base_sha256,
            "tiers": [asdict(profile) for profile in federation.tiers],
            # scores of other questions would be no comparison
            "before": self._history[0] if self._scored[0] == self._how(0) else None,
            "after": self._history[-1] if settings.evaluate.after else None,
        }
        if settings.privacy:
            count = self._folder.releases.count
            summary["privacy"] = {**settings.privacy.model_dump(exclude={"seed"}), **spent(settings, count)}
        self._folder.write_summary(summary)
        return summary

    def log(self, event: str, round: int, **fields: Any) -> None:
        """Write an event and report it."""
        self._folder.events.append(event, round, **fields)
        self._report(event, round, fields)

    def _begin(self) -> None:
        federation, settings = self._federation, self._federation.settings
        self.state, self.done = start_state(federation), 0
        self._history, self._scored = list[Any](), list[Any]()
        part = federation.partition
        clients = len(self._engine.clients())
        self.log("started", 0, rounds=settings.train.rounds, clients=clients, method=federation.method.name)
        self.log("partition", 0, report=part.to_json() if part else None)
        if federation.data_card:
            self._folder.write_data_card(federation.data_card)
        self.state = calibrated(federation, self.state, 1)
        if settings.evaluate.before:
            self._score()
        else:
            self._history, self._scored = [None], [None]
        self._save()

    def _go_on(self, checkpoint: Checkpoint) -> None:
        facts = checkpoint.facts
        self.state, self.done = unpack(checkpoint.tensors, self._federation.method.keeps), checkpoint.round
        self._history, self._seconds = facts["history"], facts["seconds"]
        # a checkpoint of an earlier version does not say how it was scored: as it is now, since nothing could change
        last = [self._how(self.done)] if _is_evaluated(self._federation.settings, self.done) else []
        self._scored = facts.get("scored", [self._how(0), *last])
        self._report("resumed", self.done, {"round": self.done, "settings_changed": self._folder.settings_changed})

    def _score(self) -> None:
        tasks = self._score_all(tasks_of(self._federation, self.state, self.done, self._federation.tiers))
        self._history.append(_tier_scores(self._federation, tasks, self.done, self.log))
        self._scored.append(self._how(self.done))

    def _how(self, number: int) -> list[Any]:
        """After which round scores are taken, and how."""
        evaluate = self._federation.settings.evaluate
        return [number, evaluate.model_dump(mode="json", exclude={"before", "after", "every"})]

    def _save(self) -> None:
        facts = {"history": self._history, "scored": self._scored, "seconds": self._spent()}
        self._folder.save_checkpoint(self.done, pack(self.state), facts, self._federation.settings.keep_checkpoints)

    def _spent(self) -> float:
        """Seconds of work so far; those between two rounds are not the run's."""
        now = time.perf_counter()
        self._seconds, self._began = self._seconds + now - self._began, now
        return self._seconds


def _is_evaluated(settings: RunSettings, number: int) -> bool:
    every = settings.evaluate.every
    return (number == settings.train.rounds and settings.evaluate.after) or bool(every and number % every == 0)


def _tier_scores(
    federation: Federation, scores: Iterable[dict[str, Score]], round: int, log: Log
) -> list[dict[str, dict[str, Any]]]:
    """Every tier's scores, logged: tasks by name, with "macro" among them."""
    results = []
    for profile, tasks in zip(federation.tiers, scores, strict=True):
        results.append({task: one.figures() for task, one in tasks.items()})
        said = [{"task": task, **answer} for task, one in tasks.items() for answer in one.answers]
        log("answers", round, tier=profile.tier, answers=said)
        log("evaluated", round, tier=profile.tier, top_k=profile.top_k, rank=profile.rank, scores=results[-1])
    return results
