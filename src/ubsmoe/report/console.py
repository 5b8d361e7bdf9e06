"""A run in the terminal: a live line while it goes, plain lines when the output is not a terminal, a table at the end."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ubsmoe import progress
from ubsmoe.errors import printable
from ubsmoe.report.plain import average, formats_said
from ubsmoe.storage.events import EventTail
from ubsmoe.storage.record import Scores, Summary, TaskScore, TierCosts, loss_text
from ubsmoe.storage.runfolder import EVENTS, has_ended, read_run

if TYPE_CHECKING:
    from ubsmoe.messages import Task


class RunConsole:
    """Shows events of a run and the steps of its clients."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} clients"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._bar = self._progress.add_task("preparing", total=1)
        self._rounds = self._clients = self._done = self._trained = 0

    def __enter__(self) -> Self:
        self._watching = progress.watched(self._on_stage)
        self._watching.__enter__()
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        self._watching.__exit__(kind, error, trace)

    def _on_stage(self, what: str) -> None:
        self._progress.update(self._bar, description=what)

    def plan(self, rounds: int, clients: int) -> None:
        """Say how much work lies ahead, for the bar."""
        self._rounds, self._clients = rounds, clients
        self._progress.update(self._bar, total=rounds * clients)

    def on_step(self, task: "Task", step: int, num_steps: int, loss: float) -> None:
        """One optimiser step of one client; the round's updates are judged together, so their events come later."""
        self._trained += step == num_steps
        self._progress.update(
            self._bar,
            completed=(task.round - 1) * self._clients + self._trained + step / num_steps % 1,
            description=f"round {task.round}/{self._rounds}  {task.profile.client} K={task.profile.top_k}  "
            f"step {step}/{num_steps}  loss {loss:.3f}",
        )

    def on_event(self, event: str, round: int, fields: dict[str, Any]) -> None:
        """One event of the run, after it was written."""
        if event == "client":
            self._done += 1
            self._progress.update(self._bar, completed=(round - 1) * self._clients + max(self._done, self._trained))
        elif event == "round":
            self._done = self._trained = 0
            entropy = average(fields["entropy"])
            self._line(
                f"round {round}/{self._rounds}  loss {loss_text(fields['loss'])}  expert entropy {entropy:.3f}  "
                f"dead experts {fields['dead_experts']}  {fields['seconds']:.1f} s"
                + (f"  epsilon {fields['epsilon']:.3g} at delta {fields['delta']:g}" if "epsilon" in fields else "")
            )
        elif event == "validated":
            self._line(
                f"round {round}  validation loss {fields['loss']:.4f}  lowest after round {fields['best_round']}"
            )
        elif event == "evaluated":
            macro = fields["scores"]["macro"]
            self._line(
                f"{'before' if round == 0 else f'round {round}'}  tier {fields['tier'] + 1} (K={fields['top_k']})  "
                f"accuracy {_percent(macro['accuracy'])}  unparsed {_percent(macro['unparsed'])}  "
                f"MC accuracy {_percent(macro['mc_accuracy'])}  loss {macro['loss']:.4f}"
            )
        elif event == "dropped":
            client, stage, reason = (printable(str(fields[key])) for key in ("client", "stage", "reason"))
            self._line(f"round {round}  {client} does not count ({stage}): {reason}")
        elif event == "warning":
            self._line(f"round {round}  {printable(str(fields['client']))} {printable(str(fields['reason']))}")
        elif event == "resumed":
            self._line(f"resumed after round {fields['round']}")
            for key, (before, after) in fields.get("settings_changed", {}).items():
                self._line(f"  {key} was {before}, is {after}")
        elif event == "note":
            self._line(fields["reason"])

    def _line(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)


def watch(path: Path, shown: RunConsole, pause: Callable[[], None]) -> None:
    """Show a run's events, also those another process goes on writing, until the run has ended.

    Args:
        path: the run folder; it is only read.
        shown: where.
        pause: called between two looks.

    Raises:
        RunFolderError: if there is no run in the folder.
    """
    config, tail = read_run(path).config, EventTail(path / EVENTS)
    clients = config["clients"]
    shown.plan(config["train"]["rounds"], clients["per_round"] or clients["count"])
    while True:
        ended = has_ended(path)  # asked first: what a run writes before its summary is then among the new
        for event in tail.new():
            shown.on_event(event["event"], event["round"], event)
        if ended:
            return
        pause()


def result_table(summary: Summary, costs: Sequence[TierCosts] | None) -> Table:
    """Tier, K, FLOPs against the top tier, accuracy before and after: what a run is run for. A dash for unknown costs."""
    scores, tiers = summary["after"], summary["tiers"]
    assert scores, "a run without scores has no table"
    macro = scores[0]["macro"]
    nothing: list[Any] = [None] * len(tiers)
    tasks, own = len(scores[0]) - 1, [*macro.get("metrics", {})]
    table = empty_table(
        f"{summary['method']}: per tier, {tasks} task{'s' * (tasks > 1)}, {macro['examples']} questions, before → after",
        ("tier", "β", "K", "rank", "MFLOPs", "vs top", "accuracy %", "unparsed %", "MC acc. %", *own),
    )
    for profile, cost, before, after in zip(tiers, costs or nothing, summary["before"] or nothing, scores, strict=True):
        table.add_row(
            str(profile["tier"] + 1),
            f"{profile['budget']:g}",
            str(profile["top_k"]),
            str(profile["rank"]),
            f"{cost['train_flops_per_token'] / 1e6:.4g}" if cost else "–",
            f"{cost['relative_to_top']:.0%}" if cost else "–",
            *_changes(before and before["macro"], after["macro"]),
            *(_change(_own(before and before["macro"], name), _own(after["macro"], name), 1, 3) for name in own),
        )
    if macro["chance"] is not None:
        table.caption = (
            "MFLOPs: training, per token. MC acc.: multiple choice, by log-likelihood. "
            f"chance {_percent(macro['chance'])}, majority {_percent(macro['majority'])}{formats_said(tiers)}"
        )
    return table


def cost_table(model: str, tiers: Sequence[Mapping[str, Any]]) -> Table:
    """FLOPs, bytes and memory per tier."""
    table = empty_table(
        f"{model}: cost per tier",
        ("tier", "budget", "K", "rank", "forward", "training", "vs top", "MB up", "MB down", "GB memory"),
        caption="MFLOPs per token, 2 per multiply-add, without norms, softmax and look-ups; MB per round; GB at the peak"
        + formats_said(tiers),
    )
    for tier in tiers:
        table.add_row(
            str(tier["tier"] + 1),
            f"{tier['budget']:g}",
            str(tier["top_k"]),
            str(tier["rank"]),
            f"{tier['forward_flops_per_token'] / 1e6:,.4g}",
            f"{tier['train_flops_per_token'] / 1e6:,.4g}",
            f"{tier['relative_to_top']:.1%}",
            f"{tier['upload_bytes'] / 1e6:,.1f}",
            f"{tier['download_bytes'] / 1e6:,.1f}",
            f"{tier['peak_memory_bytes'] / 1e9:.2f}",
        )
    return table


def personal_table(clients: Sequence[Mapping[str, Any]]) -> Table:
    """Accuracy of the shared adapter and of each client's own, on the client's mix of tasks."""
    table = empty_table("each client on its own mix of tasks", ("tier", "examples", "accuracy %"), ("client",))
    for one in clients:
        change = _change(one["before"], one["after"])
        table.add_row(printable(one["client"]), str(one["tier"] + 1), str(one["examples"]), change)
    gain = 100 * average(one["after"] - one["before"] for one in clients)
    table.caption = f"shared adapter → the client's own; mean gain {gain:+.1f} points"
    return table


def task_table(results: Sequence[Scores], labels: Sequence[str]) -> Table:
    """Accuracy per task, one column per tier, beside chance and majority."""
    table = empty_table("accuracy % per task (unparsed %)", (*labels, "chance", "majority"), words=["task"])
    for task in results[0]:
        scores = [result[task] for result in results]
        cells = [f"{score['accuracy'] * 100:.1f} ({score['unparsed'] * 100:.1f})" for score in scores]
        table.add_row(escape(task), *cells, _percent(scores[0]["chance"]), _percent(scores[0]["majority"]))
    return table


def harness_table(results: Sequence[dict[str, dict[str, Any]]], labels: Sequence[str]) -> Table:
    """The harness' metrics, a row for each of a task's, one column per tier."""
    table = empty_table("lm-evaluation-harness", labels, words=["task", "metric"])
    for task, metrics in results[0].items():
        for name, value in metrics.items():
            if isinstance(value, float):
                table.add_row(
                    escape(task), name.removesuffix(",none"), *(f"{result[task][name]:.4f}" for result in results)
                )
    return table


def alignment_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Cosine of every signal with the missing gradient, per round and tier, weighted over experts, mean over runs."""
    signals = list(dict.fromkeys(row["signal"] for row in rows))
    table = empty_table("cosine with the gradient that top-K leaves out", ("round", "tier", "K", "experts", *signals))
    for place in sorted({(row["round"], row["tier"], row["top_k"], row["experts"]) for row in rows}):
        own = [row for row in rows if (row["round"], row["tier"], row["top_k"], row["experts"]) == place]
        by_signal = [[row for row in own if row["signal"] == signal] for signal in signals]
        means = [f"{sum(r['cosine'] for r in part) / len(part):.3f}" if part else "–" for part in by_signal]
        table.add_row(*map(str, place), *means)
    table.caption = (
        "some: used by part of the batch's tokens; never: by none. sampled q: a share q of the missing pairs is run"
    )
    return table


def empty_table(title: str, numbers: Sequence[str], words: Sequence[str] = (), caption: str | None = None) -> Table:
    """An empty table: columns of words, then of numbers, by their headings; with words there is no room to spare."""
    table = Table(title=title, caption=caption, box=SIMPLE_HEAD, padding=0 if words else (0, 1, 0, 0))
    for heading in words:
        table.add_column(heading, no_wrap=True)
    for heading in numbers:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def show(console: Console, table: Table) -> None:
    """Print a table at its own width: a narrow terminal breaks its lines, but no figure is cut off."""
    before = console.width
    console.width = 10_000
    console.width = max(before, console.measure(table).maximum)
    console.print(table, crop=False)
    console.width = before


def _changes(before: TaskScore | None, after: TaskScore) -> list[str]:
    """Accuracy, unparsed and MC accuracy, before and after."""
    return [
        _change(before and before["accuracy"], after["accuracy"]),
        _change(before and before["unparsed"], after["unparsed"]),
        _change(before and before["mc_accuracy"], after["mc_accuracy"]),
    ]


def _own(score: TaskScore | None, metric: str) -> float | None:
    """What a plug-in's metric gave, if it was asked."""
    return score.get("metrics", {}).get(metric) if score else None


def _change(before: float | None, after: float | None, scale: float = 100, decimals: int = 1) -> str:
    if after is None:
        return "–"
    text = f"{after * scale:.{decimals}f}"
    return text if before is None else f"{before * scale:.{decimals}f} → {text}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"
