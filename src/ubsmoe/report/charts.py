"""The report's charts as plotly's own plain data: traces and a layout, ready for JSON."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ubsmoe.report.comparison import interval
from ubsmoe.report.plain import average
from ubsmoe.report.series import COLOURS, ENTROPY, GINI, PHI, Array, Series, by_label, mean, over_rounds
from ubsmoe.storage.record import Scores, TierCosts

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "x", "star", "pentagon", "hexagon")
DASHES = ("solid", "dash", "dot", "dashdot")
MOST_SYMBOLS = 60  # on a line
MOST_HEAT_CELLS = 60_000  # about 400 kB of JSON; longer runs show every n-th round

COSTS = {  # unit -> title of its chart, and its axis
    "MFLOPs": ("Compute against accuracy", "training MFLOPs per token"),
    "seconds": ("Time against accuracy", "seconds of a client in a round"),
    "MB": ("Traffic against accuracy", "MB of a client in a round, both ways"),
}


@dataclass(frozen=True)
class Chart:
    """One chart: `caption` says in words what it shows, for those who do not see it too."""

    id: str
    title: str
    caption: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]


def informs(chart: Chart) -> bool:
    """Whether a chart says more than a number would: some line has two different places, or there are bars to compare."""
    return any(trace["type"] == "bar" or len(set(trace["x"])) > 1 for trace in chart.data)


def loss_over_rounds(runs: Sequence[Series]) -> Chart:
    """Training loss over rounds: per tier of a single run, else per method, mean over its tiers."""
    # a private run tells no client's loss
    points = [(run, [(c["round"], c["tier"], c["loss"]) for c in run.record.clients if "loss" in c]) for run in runs]
    caption = f"Mean loss of the clients{_each(runs)} while they trained, nats per token."
    return _over_rounds("loss", "Training loss", caption, "loss, nats per token", _learning(points))


def accuracy_over_rounds(runs: Sequence[Series]) -> Chart:
    """Test accuracy at the rounds that were evaluated: per tier of a single run, else per method, mean over its tiers."""
    points = [
        (run, [(e["round"], e["tier"], 100 * e["scores"]["macro"]["accuracy"]) for e in run.record.evaluated])
        for run in runs
    ]
    caption = f"Accuracy on the test questions{_each(runs)}, mean over tasks; round 0 is before training."
    return _over_rounds("accuracy", "Accuracy", caption, "accuracy, %", _learning(points))


def _each(runs: Sequence[Series]) -> str:
    if len(runs) == 1:
        return ", each tier at its own budget"
    return " of each method, mean over tiers and seeds, with 95 % intervals over seeds"


def _learning(points: Sequence[tuple[Series, list[tuple[int, int, float]]]]) -> list[dict[str, Any]]:
    """Lines through the means of (round, tier, value): over a tier's clients, or over tiers and then over a method's seeds."""
    lines: dict[str, dict[int, dict[int, list[float]]]] = {}
    for run, own in points:
        for number, tier, value in own:
            name = f"tier {tier + 1}" if len(points) == 1 else run.label
            lines.setdefault(name, {}).setdefault(number, {}).setdefault(run.seed, []).append(value)
    traces = []
    for index, (name, rounds) in enumerate(lines.items()):
        numbers = sorted(rounds)  # seeds may have been evaluated after different ones
        means = [[average(values) for values in rounds[number].values()] for number in numbers]
        traces.append(_with_bars(line(name, numbers, [average(one) for one in means], index), means))
    return traces


def _with_bars(trace: dict[str, Any], values: Sequence[Sequence[float]]) -> dict[str, Any]:
    """The line with the 95 % interval of each point over seeds, where there are two or more."""
    halves = [interval(one)[1] for one in values]
    if any(math.isfinite(half) for half in halves):
        trace["error_y"] = {"type": "data", "array": halves, "thickness": 1, "width": 3}
    return trace


def cost_against_accuracy(runs: Sequence[Series], costs: Sequence[list[TierCosts]], unit: str) -> Chart | None:
    """What a tier costs against its accuracy; one line per method, one point per tier; None if no run has ended."""
    traces = []
    ended = [(run, tiers) for run, tiers in zip(runs, costs, strict=True) if run.record.summary is not None]
    for index, seeds in enumerate(by_label([run for run, _ in ended]).values()):
        tiers = next(own for run, own in ended if run is seeds[0])
        last = [last_scores(run) for run in seeds]
        known = [tier for tier in tiers if all(tier["tier"] in one for one in last)]
        points = [(tier, tier_costs(seeds[0], tier)) for tier in known]
        points = [(tier, paid) for tier, paid in points if unit in paid]
        accuracy = [[100 * one[tier["tier"]]["macro"]["accuracy"] for one in last] for tier, _ in points]
        means = [average(one) for one in accuracy]
        trace = _with_bars(line(seeds[0].label, [paid[unit] for _, paid in points], means, index), accuracy)
        trace["customdata"] = [[t["tier"] + 1, t["top_k"], t["rank"]] for t, _ in points]
        trace["hovertemplate"] = (
            f"tier %{{customdata[0]}}, K = %{{customdata[1]}}, rank %{{customdata[2]}}: %{{x:.3g}} {unit}, %{{y:.1f}} %"
        )
        traces.append(trace)
    title, axis = COSTS[unit]
    layout = {"xaxis": {"title": {"text": axis}}, "yaxis": {"title": {"text": "accuracy, %"}}}
    caption = f"Accuracy of each tier against {axis}; the points of a finished run are its tiers."
    return Chart(f"cost-{unit}", title, caption, traces, layout) if traces else None


def tier_costs(run: Series, tier: TierCosts) -> dict[str, float]:
    """Costs of a client of a tier: MFLOPs per token as counted; seconds and MB per round as noted, MB else as planned."""
    own = [event for event in run.record.clients if event["tier"] == tier["tier"]]
    up = [event["upload_bytes"] for event in own if "upload_bytes" in event] or [tier["upload_bytes"]]
    down = [event["download_bytes"] for event in own] or [tier["download_bytes"]]
    found = {
        "MFLOPs": tier["train_flops_per_token"] / 1e6,
        "MB up": average(up) / 1e6,
        "MB down": average(down) / 1e6,
        "MB": (average(up) + average(down)) / 1e6,
    }
    return found | ({"seconds": average(event["seconds"] for event in own)} if own else {})


def expert_use(runs: Sequence[Series]) -> Iterator[Chart]:
    """Entropy and Gini of the experts' use, and phi against it where runs were modulated; mean over layers and seeds."""
    modulated = [run for run in runs if run.phi is not None]
    for id, quantity, drawn in (("entropy", ENTROPY, runs), ("gini", GINI, runs), ("phi", PHI, modulated)):
        traces = [
            line(seeds[0].label, rounds, _short(mean(values, (0, 2))), index)
            for index, (seeds, rounds, values) in enumerate(over_rounds(drawn, quantity))
        ]
        if traces:
            caption = f"{quantity.title}, {quantity.unit}, mean over layers and seeds: {quantity.meaning}."
            yield _over_rounds(id, quantity.title, caption, quantity.unit, traces)


def partitions(runs: Sequence[Series]) -> list[Chart]:
    """One chart for each different split of the data among the runs; none where the data have no kinds."""
    holders: list[tuple[dict[str, Any], list[Series]]] = []
    for run in runs:
        report = next((event["report"] for event in run.record.named("partition")), None)
        same = next((own for other, own in holders if other == report), None)
        if same is not None:
            same.append(run)
        elif report is not None:
            holders.append((report, [run]))
    return [
        _partition(f"partition-{number}", report, f" in {_these(own)}" if len(holders) > 1 else "")
        for number, (report, own) in enumerate(holders, 1)
    ]


def _these(runs: Sequence[Series]) -> str:
    if len(runs) == 1:
        return runs[0].name
    return f"{len(runs)} runs with seed {', '.join(map(str, sorted({run.seed for run in runs})))}"


def _partition(id: str, report: dict[str, Any], where: str) -> Chart:
    clients = [f"client-{client['client']}" for client in report["clients"]]
    traces = [
        {
            "type": "bar",
            "name": kind,
            "x": clients,
            "y": [client["counts"].get(kind, 0) for client in report["clients"]],
            "marker": {"color": COLOURS[index % len(COLOURS)], "pattern": {"shape": ("", "/", ".")[index // 7 % 3]}},
        }
        for index, kind in enumerate(report["clients"][0]["counts"])
    ]
    layout = {"barmode": "stack", "yaxis": {"title": {"text": "examples"}}}
    apart = report["mean_total_variation"]
    caption = f"Training examples of each client by {report['field']}; mean total variation {apart:.2f}."
    return Chart(id, f"Who holds what{where}", caption, traces, layout)


def heat_maps(runs: Sequence[Series]) -> list[dict[str, Any]]:
    """Use of the experts, and phi, per run and round, for the slider."""
    cells = sum(run.utilization.size * (1 if run.phi is None else 2) for run in runs)
    step = -(-cells // MOST_HEAT_CELLS)
    maps = []
    for run in runs:
        kept = sorted({*range(0, len(run.rounds), step), len(run.rounds) - 1})
        used = run.utilization[kept]
        with np.errstate(all="ignore"):  # what is not finite is shown as missing
            share = used / np.maximum(used.sum(-1, keepdims=True), 1e-300)
        phi = None if run.phi is None else run.phi[kept]
        maps.append(
            {
                "rounds": [run.rounds[i] for i in kept],
                "use": _short(share),
                "most": float(share.max()),
                "phi": None if phi is None else _short(phi),
                "span": 1.0 if phi is None else max(float(np.abs(phi).max()), 1e-6),
            }
        )
    return maps


def last_scores(run: Series) -> dict[int, Scores]:
    """Tier -> scores by task, at the last evaluation."""
    return {event["tier"]: event["scores"] for event in run.record.evaluated}


def line(name: str, x: list[Any], y: list[Any], index: int) -> dict[str, Any]:
    """A line in a colour, a dash and symbols of its own; without symbols where its points lie close."""
    return {
        "type": "scatter",
        "mode": "lines+markers" if len(x) <= MOST_SYMBOLS else "lines",
        "name": name,
        "x": x,
        "y": y,
        "line": {"color": COLOURS[index % len(COLOURS)], "dash": DASHES[index // len(COLOURS) % len(DASHES)]},
        "marker": {"symbol": SYMBOLS[index % len(SYMBOLS)], "size": 8},
    }


def _over_rounds(id: str, title: str, caption: str, unit: str, traces: list[dict[str, Any]]) -> Chart:
    last = max((trace["x"][-1] for trace in traces), default=0)
    ticks = {"dtick": max(1, last // 10)}  # whole rounds only
    layout = {"xaxis": {"title": {"text": "round"}, **ticks}, "yaxis": {"title": {"text": unit}}}
    return Chart(id, title, caption, traces, layout)


def _short(values: Array) -> list[Any]:
    """Nested lists with four digits behind the point; JSON knows no NaN."""
    return _rounded(values.tolist())


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return round(value, 4) if abs(value) < math.inf else None
