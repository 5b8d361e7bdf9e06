"""A run: begun or gone back to its newest checkpoint, round by round, and what it leaves when it ends."""

import statistics
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
from ubsmoe.server.rounds import Log, one_round, score, tasks_of, validation_losses
from ubsmoe.server.start import calibrated, noise_key, start_state
from ubsmoe.storage.checkpoints import Checkpoint, load_round
from ubsmoe.storage.ending import best_round, is_out_of_patience
from ubsmoe.storage.layout import CHECKPOINTS
from ubsmoe.storage.runfolder import RunFolder

Report = Callable[[str, int, dict[str, Any]], None]
ScoreAll = Callable[[Iterable[Task]], Iterable[dict[str, Score]]]


def run(
    federation: Federation, folder: RunFolder, engine: Engine, report: Report, score_all: ScoreAll | None = None
) -> dict[str, Any]:
    """Carry out a run, or what is left of it, and write its adapter and summary. Arguments as for `Run`."""
    under_way = Run(federation, folder, engine, report, score_all)
    while not under_way.over:
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
        losses: validation loss after each round, mean over tiers, where there is early stopping.
    """

    state: State
    done: int
    losses: list[float]

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
        # what clients keep goes back no further than the newest checkpoints
        most = federation.settings.keep_checkpoints if federation.method.client_state else None
        checkpoint = folder.resume(origin(federation), most)
        if checkpoint is None:
            self._begin()
        else:
            self._go_on(checkpoint)
        if federation.settings.privacy:
            folder.releases.check(self.done)

    @property
    def over(self) -> str:
        """Why there is no further round; nothing while there is one."""
        train = self._federation.settings.train
        if is_out_of_patience(self.losses, train.patience):
            return f"training stopped after round {self.done} (train.patience)"
        return f"all {self.done} rounds are done (train.rounds)" if self.done >= train.rounds else ""

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
        if settings.train.patience:
            self._validate()
        if _is_evaluated(settings, number):
            self._score(number)
        self._save()

    def finish(self) -> dict[str, Any]:
        """Write adapter and summary; gives the summary. The tiers are scored if they have not been, or otherwise than now asked.

        With early stopping the state is that of the best round from here on.
        """
        federation, settings = self._federation, self._federation.settings
        kept = best_round(self.losses) if self.losses else self.done
        if kept != self.done:
            self.state = unpack(load_round(self._folder.path / CHECKPOINTS, kept).tensors, federation.method.keeps)
        if settings.evaluate.after and self._scored[-1:] != [self._how(kept)]:
            self._score(kept)
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
        if self.losses:
            summary["validation"] = {"losses": self.losses, "best_round": kept}
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
        self._history, self._scored, self.losses = list[Any](), list[Any](), []
        part = federation.partition
        clients = len(self._engine.clients())
        self.log("started", 0, rounds=settings.train.rounds, clients=clients, method=federation.method.name)
        self.log("partition", 0, report=part.to_json() if part else None)
        if federation.data_card:
            self._folder.write_data_card(federation.data_card)
        self.state = calibrated(federation, self.state, 1)
        if settings.evaluate.before:
            self._score(0)
        else:
            self._history, self._scored = [None], [None]
        self._save()

    def _go_on(self, checkpoint: Checkpoint) -> None:
        facts = checkpoint.facts
        self.state, self.done = unpack(checkpoint.tensors, self._federation.method.keeps), checkpoint.round
        self._history, self._seconds, self.losses = facts["history"], facts["seconds"], facts.get("losses", [])
        # a checkpoint of an earlier version does not say how it was scored: as it is now, since nothing could change
        last = [self._how(self.done)] if _is_evaluated(self._federation.settings, self.done) else []
        self._scored = facts.get("scored", [self._how(0), *last])
        self._report("resumed", self.done, {"round": self.done, "settings_changed": self._folder.settings_changed})

    def _validate(self) -> None:
        losses = validation_losses(self._federation, self.state)
        self.losses = [*self.losses, statistics.fmean(losses)]
        self.log("validated", self.done, losses=losses, loss=self.losses[-1], best_round=best_round(self.losses))

    def _score(self, number: int) -> None:
        """Score the state, which is the one after round `number`."""
        tasks = self._score_all(tasks_of(self._federation, self.state, number, self._federation.tiers))
        self._history.append(_tier_scores(self._federation, tasks, number, self.log))
        self._scored.append(self._how(number))

    def _how(self, number: int) -> list[Any]:
        """After which round scores are taken, and how."""
        evaluate = self._federation.settings.evaluate
        return [number, evaluate.model_dump(mode="json", exclude={"before", "after", "every"})]

    def _save(self) -> None:
        keep = self._federation.settings.keep_checkpoints
        facts = {"history": self._history, "scored": self._scored, "seconds": self._spent(), "losses": self.losses}
        # the best so far as each checkpoint that stays knows it: the run may go back to any of them
        spared = {best_round(self.losses[:n]) for n in range(max(1, self.done - keep + 1), len(self.losses) + 1)}
        self._folder.save_checkpoint(self.done, pack(self.state), facts, keep, spared)

    def _spent(self) -> float:
        """Seconds of work so far; those between two rounds are not the run's."""
        now = time.perf_counter()
        self._seconds, self._began = self._seconds + now - self._began, now
        return self._seconds


def _is_evaluated(settings: RunSettings, number: int) -> bool:
    every = settings.evaluate.every
    last = number == settings.train.rounds and not settings.train.patience  # which may keep another round's adapter
    return (last and settings.evaluate.after) or bool(every and number % every == 0)


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
