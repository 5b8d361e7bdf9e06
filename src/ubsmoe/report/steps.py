"""How training went within rounds: loss and gradient norm of each tier's clients, over their optimiser steps."""

from collections.abc import Iterator, Sequence
from typing import Any

from ubsmoe.report.charts import Chart, line
from ubsmoe.report.plain import average
from ubsmoe.report.series import Series
from ubsmoe.storage.record import ClientEvent, StepsTold

MOST_POINTS = 200
"""Of a line, so that a long run stays small; clients with unlike numbers of steps fall together."""

Point = tuple[float, float, float]
"""Where a step lies, in rounds, its loss and its gradient norm."""


def steps_within_rounds(runs: Sequence[Series]) -> Iterator[Chart]:
    """A chart per tier of a single run; none where clients told no steps, as under [privacy] and [secure_aggregation]."""
    if len(runs) > 1:
        return  # each method's loss has a chart already, and lines of nine runs on two axes tell nothing
    (run,) = runs
    for tier in sorted({event["tier"] for event in run.record.clients}):
        told = [(event, event["steps"]) for event in run.record.clients if event["tier"] == tier and "steps" in event]
        points = [point for event, steps in told for point in _points(event, steps)]
        if points:
            rates = [rate for _, steps in told for rate in steps["learning_rate"]]
            yield _chart(tier, _binned(points, run.rounds[-1]), _rates(rates))


def _points(event: ClientEvent, steps: StepsTold) -> Iterator[Point]:
    for number, loss, norm in zip(steps["number"], steps["loss"], steps["gradient_norm"], strict=True):
        yield event["round"] - 1 + number / steps["number"][-1], loss, norm


def _binned(points: Sequence[Point], rounds: int) -> list[Point]:
    """The mean of what falls between two of MOST_POINTS marks, in order."""
    bins: dict[int, list[Point]] = {}
    for point in points:
        bins.setdefault(round(point[0] / rounds * MOST_POINTS), []).append(point)
    means = (tuple(average(column) for column in zip(*bins[key], strict=True)) for key in sorted(bins))
    return [(place, loss, norm) for place, loss, norm in means]


def _chart(tier: int, points: Sequence[Point], rates: str) -> Chart:
    places, losses, norms = ([round(value, 5) for value in column] for column in zip(*points, strict=True))
    traces: list[dict[str, Any]] = [
        line("loss", places, losses, 0),
        {**line("gradient norm", places, norms, 1), "yaxis": "y2"},
    ]
    layout = {
        "xaxis": {"title": {"text": "rounds done"}},
        "yaxis": {"title": {"text": "loss, nats per token"}},
        "yaxis2": {"title": {"text": "gradient norm"}, "overlaying": "y", "side": "right", "tickmode": "auto"},
    }
    caption = f"Mean loss and gradient norm (before clipping) of tier {tier + 1}'s clients, step by step; {rates}."
    return Chart(f"steps-{tier + 1}", f"Steps of tier {tier + 1}", caption, traces, layout)


def _rates(rates: Sequence[float]) -> str:
    """The learning rate in words, since most runs do not change it.

    >>> _rates([0.002, 0.001]), _rates([0.1])
    ('learning rate 0.002 to 0.001', 'learning rate 0.1')
    """
    return f"learning rate {rates[0]:g}" + (f" to {rates[-1]:g}" if len({*rates}) > 1 else "")
