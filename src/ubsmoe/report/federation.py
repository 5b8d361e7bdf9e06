"""A federation in the terminal, for machines, and for Prometheus: who is there, what each client did last, how far the run is."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from ubsmoe.errors import printable, require
from ubsmoe.report.console import empty_table
from ubsmoe.report.plain import average
from ubsmoe.report.plan import duration
from ubsmoe.storage.events import Event
from ubsmoe.storage.record import RunRecord, TierCosts


@dataclass(frozen=True)
class ClientStatus:
    """A client as the run's events tell it. `node` and `online` are None where no server of Flower said."""

    client: str
    node: str | None = None
    online: bool | None = None
    tier: int | None = None
    examples: int | None = None
    last_round: int | None = None
    seconds: float | None = None
    counted: int = 0
    dropped: int = 0
    why: str = ""
    planned_bytes: int | None = None


@dataclass(frozen=True)
class Status:
    """A run and its clients; `seconds_left` is None before the first round, `accuracy` by tier of the last evaluation.

    A run that has not `ended` and is not `running` was stopped, or failed.
    """

    round: int
    rounds: int
    ended: bool
    running: bool
    loss: float | None
    seconds_left: float | None
    accuracy: dict[int, float]
    clients: list[ClientStatus]


def status_of(record: RunRecord, costs: Sequence[TierCosts], running: bool = True) -> Status:
    """What a run's events say of it now.

    Args:
        record: of the run.
        costs: what a client of each tier needs, as planned; may be empty.
        running: whether a process carries it out.
    """
    rounds, planned = record.rounds, record.config["train"]["rounds"]
    done = rounds[-1]["round"] if rounds else 0
    return Status(
        done,
        planned,
        record.summary is not None,
        running and record.summary is None,
        rounds[-1]["loss"] if rounds else None,
        seconds_left(record.events, planned) if rounds else None,
        {event["tier"] + 1: event["scores"]["macro"]["accuracy"] for event in record.evaluated},
        _clients(record, {tier["tier"]: tier["peak_memory_bytes"] for tier in costs}),
    )


def seconds_left(events: Sequence[Event], planned: int) -> float:
    """What the rounds to come will take: as the last five did, evaluations and waiting included."""
    ends = [datetime.fromisoformat(event["time"]) for event in events if event["event"] == "round"]
    begun = next((event["time"] for event in events if event["event"] == "started"), None)
    times = ([datetime.fromisoformat(begun)] if begun and len(ends) < 6 else []) + ends
    last = times[-6:]
    each = (last[-1] - last[0]).total_seconds() / max(len(last) - 1, 1)
    number = max(event["round"] for event in events if event["event"] == "round")
    return max(planned - number, 0) * each


def _clients(record: RunRecord, planned: Mapping[int, int]) -> list[ClientStatus]:
    known: dict[str, dict[str, Any]] = {}
    for event in record.named("nodes")[-1:]:
        for one in event["nodes"]:
            facts = {"node": str(one["node"]), "online": one["online"], "tier": one["tier"] + 1}
            known[one["client"]] = {**facts, "examples": one["examples"]}
    for client in record.clients:
        own = known.setdefault(client["client"], {})
        own |= {"tier": client["tier"] + 1, "examples": client["examples"], "seconds": client["seconds"]}
        own |= {"last_round": client["round"], "counted": own.get("counted", 0) + 1}
    for lost in record.dropped:
        own = known.setdefault(lost["client"], {})
        own |= {
            "dropped": own.get("dropped", 0) + 1,
            "why": f"round {lost['round']}, {lost['stage']}: {lost['reason']}",
        }
    for own in known.values():
        own["planned_bytes"] = planned.get((own.get("tier") or 0) - 1)
    return [ClientStatus(name, **known[name]) for name in sorted(known, key=lambda name: (len(name), name))]


def as_json(status: Status) -> dict[str, Any]:
    """The same for machines."""
    return asdict(status)


def in_a_line(status: Status) -> str:
    """How far the run is."""
    there = [one for one in status.clients if one.online]
    told = [one for one in status.clients if one.online is not None]
    parts = [f"round {status.round} of {status.rounds}"]
    parts += [f"{len(there)} of {len(told)} clients online"] if told else []
    parts += [f"loss {status.loss:.4f}"] if status.loss is not None else []
    parts += [f"accuracy {average(status.accuracy.values()):.1%}"] if status.accuracy else []
    if status.ended:
        parts.append("ended")
    elif not status.running:
        parts.append("stopped")
    elif status.seconds_left is not None:
        parts.append(f"about {duration(status.seconds_left)} left")
    return ", ".join(parts)


def status_table(status: Status, width: int) -> Table:
    """A row per client; the last reason only where the terminal has room for it."""
    wide = width >= 110
    words = ["client", "node", "state"]
    table = empty_table(in_a_line(status), ("tier", "examples", "round", "s", "done", "drops", "MB"), words=words)
    table.padding = (0, 1, 0, 0)
    table.min_width = min(width, len(str(table.title)))  # the title stays one line where the terminal has room
    table.caption = "round, s: of the last update that counted; done: updates that counted; MB: planned peak of memory"
    if wide:
        table.add_column("last drop", overflow="ellipsis", no_wrap=True, max_width=width - 76)
    for one in status.clients:
        state = "–" if one.online is None else "online" if one.online else "away"
        table.add_row(
            printable(one.client, 20),
            (one.node or "–")[-8:],
            state,
            *(_text(value) for value in (one.tier, one.examples, one.last_round)),
            "–" if one.seconds is None else f"{one.seconds:.3g}",
            str(one.counted),
            str(one.dropped),
            "–" if one.planned_bytes is None else f"{one.planned_bytes / 1e6:.0f}",
            *([escape(printable(one.why, 200))] if wide else []),
        )
    return table


def _text(value: int | None) -> str:
    return "–" if value is None else str(value)


GAUGES: dict[str, tuple[str, Callable[[ClientStatus], float | None]]] = {
    "online": ("1 if the client's node is online", lambda one: None if one.online is None else float(one.online)),
    "examples": ("training examples", lambda one: one.examples),
    "last_round": ("round of the last update that counted", lambda one: one.last_round),
    "seconds": ("seconds of the last update that counted", lambda one: one.seconds),
    "counted": ("updates that counted", lambda one: one.counted),
    "dropped": ("updates that did not count", lambda one: one.dropped),
    "planned_bytes": ("peak of memory, as planned", lambda one: one.planned_bytes),
}
"""What Prometheus is told of every client, and from where."""


def write_prometheus(status: Status, out: Path) -> None:
    """Write a file for the textfile collector of Prometheus' node exporter; it appears whole.

    Raises:
        UserError: without prometheus-client.
    """
    require("prometheus_client", "prometheus")
    from prometheus_client import CollectorRegistry, Gauge, write_to_textfile

    registry = CollectorRegistry()
    gauges: dict[str, Gauge] = {}

    def gauge(name: str, what: str, value: float | None, **labels: str) -> None:
        if value is not None:
            if name not in gauges:  # one for all clients
                gauges[name] = Gauge(f"ubsmoe_{name}", what, list(labels), registry=registry)
            (gauges[name].labels(**labels) if labels else gauges[name]).set(value)

    gauge("round", "rounds done", status.round)
    gauge("rounds_planned", "rounds of the run", status.rounds)
    gauge("ended", "1 if the run has ended", float(status.ended))
    gauge("running", "1 if a process carries it out", float(status.running))
    gauge("loss", "mean training loss of the last round", status.loss)
    gauge("seconds_left", "estimate of what is left", status.seconds_left)
    for tier, accuracy in status.accuracy.items():
        gauge("accuracy", "accuracy of a tier at the last evaluation", accuracy, tier=str(tier))
    for one in status.clients:
        for name, (what, value) in GAUGES.items():
            gauge(f"client_{name}", what, value(one), client=one.client)
    write_to_textfile(str(out), registry)


def follow(
    look: Callable[[], Status], show: Callable[[Status], None], pause: Callable[[], None] | None = None
) -> Status:
    """Show a status whenever it has changed, until the run has ended or is stopped; gives the last one.

    A run that nobody carries out yet is waited for: its server may be about to start.

    Args:
        look: reads it.
        show: gets it.
        pause: called between two looks; two seconds when left out.
    """
    before, has_run = None, False
    while True:
        status = look()
        if status != before:
            show(status)
        has_run |= status.running
        if status.ended or (has_run and not status.running):
            return status
        before = status
        (pause or (lambda: time.sleep(2)))()
