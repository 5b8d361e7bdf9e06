"""`Federation`: train round by round, look at the run, change it, go on with it. torch is imported with the base, not before."""

import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, Unpack, cast, overload

from ubsmoe.config import ConfigError, RunSettings, to_json
from ubsmoe.errors import UserError
from ubsmoe.storage.copies import copy_run
from ubsmoe.storage.ending import final_summary, refuse_more
from ubsmoe.storage.events import Event
from ubsmoe.storage.record import RunRecord, Scores, Summary
from ubsmoe.storage.runfolder import RunFolderError, is_run, read_run
from ubsmoe.training.asked import Section, Sections, asked_settings

if TYPE_CHECKING:
    from torch import Tensor

    from ubsmoe.messages import Task
    from ubsmoe.server.federation import Federation as Loaded
    from ubsmoe.server.run import Run

OnEvent = Callable[[str, int, dict[str, Any]], None]
OnStep = Callable[["Task", int, int, float], None]


class Federation:
    """A federated run.

    Args:
        run: a run file, a run folder to go on with, or a run file's tables as a dict; every key has a default.
        out: the run folder, which keeps every round; a temporary one when left out, which goes with this object.
        workers: processes that train clients; results are bit-identical.
        on_event: called with (name, round, fields) of every event when it is written.
        on_step: called with (task, step, number of steps, loss) after every local step, but not with several workers.
        sections: sections of the run file, which go before `run`. A single value stands for the main key: model="a/b" for
            its base, method="fedavg" for its name, data=... for what to train on. Records may be given in the place of paths:
            a list of dicts, a `datasets.Dataset`, or a `DatasetDict` with train and test.

    Raises:
        UserError: for what is no run file, or no setting.

    >>> fed = Federation(data=[{"prompt": "1 + 1 =", "completion": " 2"}] * 9, method="fedavg", train={"rounds": 3})
    >>> fed.settings.method.name, fed.settings.train.rounds
    ('fedavg', 3)
    """

    def __init__(
        self,
        run: str | Path | Section | RunSettings | None = None,
        *,
        out: str | Path | None = None,
        workers: int = 1,
        on_event: OnEvent | None = None,
        on_step: OnStep | None = None,
        **sections: Unpack[Sections],
    ) -> None:
        resumed = run if isinstance(run, str | Path) and is_run(run) else None
        self.place = Path(out or resumed or tempfile.mkdtemp(prefix="ubsmoe-"))
        if not (out or resumed):
            weakref.finalize(self, shutil.rmtree, self.place, ignore_errors=True)
        self.settings, self._files = asked_settings(run, cast(dict[str, Any], sections), self.place)
        self._workers, self._on_event, self._on_step = workers, on_event, on_step
        self._events: list[Event] = []
        self._loaded: Loaded | None = None
        self._run: Run | None = None
        self._open: ExitStack | None = None
        self._phi: Tensor | None = None  # set since the last round

    @classmethod
    def resume(cls, folder: str | Path, *, workers: int = 1, **sections: Unpack[Sections]) -> Self:
        """Go on with a run folder, finished or not.

        Args:
            folder: where it is.
            workers: processes that train clients.
            sections: what is to change: train.rounds, train.patience, evaluate, clients.count (up), deadlines, label.

        Raises:
            RunFolderError: if there is no run, or for a setting that cannot change.
        """
        if not is_run(folder):
            raise RunFolderError(f"{folder} is no run folder; a run is begun with Federation(..., out={str(folder)!r})")
        return cls(folder, workers=workers, **sections)

    def round(self) -> Event:
        """Train one round; gives its event: loss, utilization and whatever the method tells. The last one ends the run.

        Raises:
            UserError: if all rounds are done, or too few clients answered.
        """
        if over := self._begun().over:
            raise UserError(f"{over}; for more, run(more_rounds=...)")
        self._carry_out(self._next_round)
        return next(event for event in self._new_events() if event["event"] == "round")

    def run(self, more_rounds: int = 0) -> Iterator[Event]:
        """Train the rounds that are left, round by round, then write adapter and summary.

        Args:
            more_rounds: rounds beyond train.rounds.

        Yields:
            The events of the run, as events.jsonl has them; those of a round once it is saved.
        """
        self._add_rounds(more_rounds)
        if self.summary is not None:
            return
        if self._opened().over:  # no round is left, but other scores are asked for
            self._carry_out(self._finish)
        yield from self._new_events()
        while not self._begun().over:
            self._carry_out(self._next_round)
            yield from self._new_events()

    def train(self, more_rounds: int = 0) -> Summary:
        """`run` to its end; gives the summary."""
        for _ in self.run(more_rounds):
            pass
        assert self.summary is not None
        return self.summary

    @overload
    def evaluate(self, tier: int) -> Scores: ...
    @overload
    def evaluate(self, tier: None = None) -> dict[int, Scores]: ...
    def evaluate(self, tier: int | None = None) -> Scores | dict[int, Scores]:
        """Score what the server holds now: gives scores by task, of all tiers by their number.

        Args:
            tier: counted from 1; all when left out.
        """
        from ubsmoe.server.rounds import evaluate_tier

        run, loaded = self._begun(), self._load()
        numbers = range(1, len(loaded.tiers) + 1)
        if tier is not None and tier not in numbers:
            raise ConfigError(f"tier must lie in 1..{len(loaded.tiers)}, got {tier!r}")

        def scores(number: int) -> Scores:
            found = evaluate_tier(loaded, run.state, loaded.tiers[number - 1])
            return cast(Scores, {task: one.figures() for task, one in found.items()})

        return scores(tier) if tier else {number: scores(number) for number in numbers}

    @property
    def done(self) -> int:
        """Rounds that have ended."""
        return self._begun().done

    @property
    def adapter(self) -> "dict[str, Tensor]":
        """The global adapter: `layers.{l}.{projection}.A` [M, r, in] and `.B` [M, out, r]."""
        return dict(self._begun().state.adapters)

    @property
    def utilization(self) -> "Tensor":
        """Share of the last round's tokens that used each expert, [L, M]; zero before the first round."""
        import torch

        rounds, shape = self.record.rounds if is_run(self.place) else [], self._load().shape
        return torch.tensor(rounds[-1]["utilization"]) if rounds else torch.zeros(shape.num_layers, shape.num_experts)

    @property
    def phi(self) -> "Tensor":
        """The modulation of the routers' logits, [L, M]. Set, it holds from the next round on and is saved with that.

        Raises:
            UserError: if the method does not modulate its routers.
        """
        return self._modulation().phi.clone()

    @phi.setter
    def phi(self, value: "Tensor") -> None:
        import torch

        shape = self._modulation().phi.shape
        try:
            phi = torch.as_tensor(value, dtype=torch.float32).detach().clone()
        except (TypeError, ValueError) as error:
            raise UserError(f"phi: expected {list(shape)} finite numbers, got {value!r} ({error})") from None
        if phi.shape != shape or not bool(phi.isfinite().all()):
            raise UserError(f"phi: expected {list(shape)} finite numbers, got a tensor of {list(phi.shape)}")
        self._phi = phi
        self._put_phi()

    @property
    def record(self) -> RunRecord:
        """What the run folder holds: settings, events, scores, summary."""
        return read_run(self.place)

    @property
    def summary(self) -> Summary | None:
        """The final figures; None while there are rounds to train, or settings to score by, that they do not know."""
        return final_summary(self.place, to_json(self.settings))

    def save(self, folder: str | Path) -> None:
        """Copy the run folder, so that `resume` goes on from there. Raises UserError if there is something at `folder`."""
        self._begun()
        copy_run(self.place, Path(folder))

    def close(self) -> None:
        """Let another process have the run folder; it is opened again when needed."""
        opened, self._open = self._open, None
        if opened:
            opened.close()

    def __repr__(self) -> str:
        return f"Federation({self.settings.method.name}, {self.settings.train.rounds} rounds, in {self.place})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _load(self) -> "Loaded":
        """The base, the method and the clients with their data, loaded once."""
        if self._loaded is None:
            from ubsmoe.training.opening import load

            self._loaded = load(self.settings, self.place, self._files, self._workers)
        return self._loaded

    def _carry_out(self, part: Callable[[], object]) -> None:
        """A part of the run. Where it fails, the next one begins at the newest checkpoint, and no event is told twice."""
        try:
            part()
        except BaseException:
            self.close()
            self._events.clear()
            raise

    def _next_round(self) -> None:
        run = self._opened()
        if self._phi is not None:
            run.log("set", run.done + 1, phi=self._phi.tolist())
        run.round()
        self._phi = None
        if run.over:
            self._finish()

    def _finish(self) -> None:
        self._opened().finish()
        self.close()

    def _begun(self) -> "Run":
        """The run as it stands, its folder open or not."""
        return self._run or self._opened()

    def _opened(self) -> "Run":
        """The run with its folder open for writing: begun, or gone back to its newest checkpoint."""
        if self._run is None or self._open is None:
            from ubsmoe.training.opening import opened

            loaded = self._load()
            with ExitStack() as opening:
                entered = opened(loaded, self.place, self._workers, self._heard, self._on_step)
                self._run = opening.enter_context(entered)
                self._open = opening.pop_all()
            self._put_phi()
        return self._run

    def _put_phi(self) -> None:
        if self._phi is not None and self._run:
            self._run.state = self._run.state.having(replace(self._modulation(), phi=self._phi))

    def _add_rounds(self, count: int) -> None:
        """Let the run have so many rounds more, from its newest checkpoint on."""
        if count < 0:
            raise ConfigError(f"more_rounds must be 0 or more, got {count}")
        if count:
            refuse_more(self.place, self.settings.train.patience)
            self.close()
            train = self.settings.train.model_copy(update={"rounds": self.settings.train.rounds + count})
            self.settings = self.settings.model_copy(update={"train": train})
            self._loaded = self._loaded and replace(self._loaded, settings=self.settings)

    def _modulation(self) -> Any:
        from ubsmoe.methods.modulation import ModulationState

        if ModulationState not in self._load().method.keeps:
            raise UserError(f"method {self.settings.method.name} has no phi; add [method.dmr], or choose ubsmoe")
        return self._begun().state.of(ModulationState)

    def _heard(self, event: str, round: int, fields: Mapping[str, Any]) -> None:
        self._events.append({"event": event, "round": round, **fields})
        if self._on_event:
            self._on_event(event, round, dict(fields))

    def _new_events(self) -> list[Event]:
        told, self._events = self._events, []
        return told
