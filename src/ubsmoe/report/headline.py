"""The report's first screen: what came of the runs in one sentence, and the figures that it rests on, method by tier."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ubsmoe.report.charts import tier_costs
from ubsmoe.report.comparison import interval
from ubsmoe.report.plain import average
from ubsmoe.report.series import Series, by_label
from ubsmoe.report.tables import Table, accuracy_interval
from ubsmoe.storage.record import Scores, TierCosts, kept_said

Groups = Mapping[str, Sequence[Series]]
"""The seeds of each method."""


WHY: dict[str, str] = {
    "training": "failed in training",
    "deadline": "late or away",
    "wire": "unreadable",
    "validation": "refused by validation",
    "robust": "set aside by the robust rule",
}
"""What the stage says, in which an update was lost."""


@dataclass(frozen=True)
class Cell:
    """Accuracy of a method in a tier, in percent: after training, its 95 % interval, before training."""

    after: str
    interval: str = ""
    before: str = ""


@dataclass(frozen=True)
class Headline:
    """What a reader sees first.

    `rows` has one row per method and `costs` one per unit, or per unit and method where methods differ; both have a cell per tier.
    """

    sentence: str
    remarks: Sequence[str]
    tiers: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell]]]
    costs: Sequence[tuple[str, Sequence[str]]]
    differences: Table | None


def headline(runs: Sequence[Series], costs: Sequence[list[TierCosts]]) -> Headline:
    """The first screen of these runs; the first method is the one that others are compared with."""
    groups = by_label(runs)
    first = next(iter(groups))
    facts = {tier["tier"]: tier for own in costs for tier in own}
    tiers = sorted({event["tier"] for run in runs for event in run.record.evaluated} | facts.keys())
    return Headline(
        _comparison(groups, first) if len(groups) > 1 else _alone(first, groups[first]),
        list(_remarks(runs, groups, first)),
        [f"tier {tier + 1}" for tier in tiers],
        [(label, [_cell(own, tier) for tier in tiers]) for label, own in groups.items()],
        list(_costs(runs, costs, tiers)),
        _differences(groups, first, tiers) if len(groups) > 1 else None,
    )


def after(run: Series) -> dict[int, Scores]:
    """Tier -> scores at the last evaluation after a round."""
    return {event["tier"]: event["scores"] for event in run.record.evaluated if event["round"]}


def before(run: Series) -> dict[int, Scores]:
    """Tier -> scores before training."""
    return {event["tier"]: event["scores"] for event in run.record.evaluated if not event["round"]}


def over_tiers(scores: Mapping[int, Scores]) -> float:
    """Accuracy in percent, mean over tasks and tiers; NaN of nothing."""
    return 100 * average(one["macro"]["accuracy"] for one in scores.values())


def paired(own: Sequence[Series], others: Sequence[Series], tier: int | None = None) -> list[float]:
    """Differences in accuracy, in points, seed by seed: of a tier, or mean over tiers."""
    there = {run.seed: after(run) for run in others}
    pairs = [(after(run), there[run.seed]) for run in own if run.seed in there]
    if tier is None:
        return [over_tiers(one) - over_tiers(two) for one, two in pairs if one and two]
    return [_accuracy(one, tier) - _accuracy(two, tier) for one, two in pairs if tier in one and tier in two]


def signed(values: Sequence[float]) -> str:
    """Points with their sign, and the 95 % interval over seeds where there are two or more.

    >>> signed([1.0, 2.0, 3.0]), signed([-1.0])
    ('+2.0 (-0.5 to +4.5)', '-1.0')
    """
    mean, half = interval(values)
    return f"{mean:+.1f}" if math.isnan(half) else f"{mean:+.1f} ({mean - half:+.1f} to {mean + half:+.1f})"


def _accuracy(scores: Mapping[int, Scores], tier: int) -> float:
    return 100 * scores[tier]["macro"]["accuracy"]


def _alone(label: str, seeds: Sequence[Series]) -> str:
    ends = [over_tiers(after(run)) for run in seeds if after(run)]
    starts = [over_tiers(before(run)) for run in seeds if before(run)]
    rounds = f"{len(seeds[0].rounds)} round{'s' if len(seeds[0].rounds) > 1 else ''}"
    if not ends:
        losses = [event["loss"] for event in seeds[0].record.rounds if event["loss"] is not None]
        fell = f", training loss {losses[0]:.3f} → {losses[-1]:.3f}" if losses else ""
        return f"{label}: {rounds}{fell}; accuracy was not measured after training"
    change = f"{average(starts):.1f} → {average(ends):.1f}" if starts else f"{average(ends):.1f}"
    many = f", {len(seeds)} seeds" if len(seeds) > 1 else ""
    return f"{label}: accuracy {change} % in {rounds}, mean over tiers{many}"


def _comparison(groups: Groups, first: str) -> str:
    """The best method against the first one, or the first one, if it is best, against the next."""
    means = {label: average(over_tiers(after(run)) for run in seeds if after(run)) for label, seeds in groups.items()}
    known = sorted((label for label in means if not math.isnan(means[label])), key=lambda label: -means[label])
    if len(known) < 2:
        return f"{', '.join(groups)}: not yet measured side by side"
    best = known[0]
    other = first if best != first and first in known else known[1]
    differences = paired(groups[best], groups[other])
    said = f"{best} {means[best]:.1f} % accuracy, {other} {means[other]:.1f} %"
    if not differences:
        return f"{said}; they have no seed in common"
    mean, half = interval(differences)
    if math.isnan(half):
        return f"{said}: {mean:+.1f} points with one seed, which cannot tell methods apart"
    apart = "" if abs(mean) > half else ": not told apart"
    return f"{said}: {signed(differences)} points, 95 % over {len(differences)} seeds{apart}"


def _remarks(runs: Sequence[Series], groups: Groups, first: str) -> Iterator[str]:
    """What was trained, what the figures were compared with, and what a reader must know to trust them."""
    yield f"{_setup(runs)}."
    scores = [(run, tier, one["macro"]) for run in runs for tier, one in after(run).items()]
    if scores:
        run, _, macro = scores[0]
        chance = "" if macro["chance"] is None else f", chance {macro['chance']:.1%}"
        tasks = len(next(iter(after(run).values()))) - 1
        others = ["the same budget before training"] if any(map(before, runs)) else []
        others += [f"{first}, seed by seed"] if len(groups) > 1 else []
        compared = f"Compared with {', and with '.join(others)}. " if others else ""
        yield (
            f"{compared}{macro['examples']} questions in {tasks} task"
            f"{'s' if tasks > 1 else ''}{chance}. Intervals: 95 %, over "
            + ("seeds." if max(map(len, groups.values())) > 1 else "questions.")
        )
    asked = sum(len(run.record.clients) + len(run.record.dropped) for run in runs)
    if lost := Counter(event["stage"] for run in runs for event in run.record.dropped):
        stages = ", ".join(f"{count} {WHY[stage]}" for stage, count in lost.most_common())
        clients = {event["client"] for run in runs for event in run.record.dropped}
        whose = f"all of {clients.pop()}" if len(clients) == 1 else f"of {len(clients)} clients"
        yield f"{lost.total()} of {asked} updates did not count: {stages}, {whose}."
    if any(run.record.config.get("simulation") for run in runs):
        yield "Seconds are those of a virtual clock ([simulation])."
    for run in runs:
        planned = run.record.config["train"]["rounds"]
        if run.record.summary and (said := kept_said(run.record.summary, planned)):
            yield f"{run.name}: {said}."
        if run.record.summary is None:
            yield f"{run.name} has not finished: round {run.rounds[-1]} of {planned}."


def _setup(runs: Sequence[Series]) -> str:
    """Base, data, clients, tiers and rounds; where runs differ, all that there are."""

    def each(of: Callable[[Mapping[str, Any]], object]) -> str:
        return " or ".join(dict.fromkeys(str(of(run.record.config)) for run in runs))

    base = each(lambda config: Path(config["model"]["base"]).name)
    data = each(lambda config: Path(config["data"]["train"]).name)
    clients, tiers = (
        each(lambda config: config["clients"]["count"]),
        each(lambda config: len(config["tiers"]["budgets"])),
    )
    return f"{base} on {data} data: {clients} clients in {tiers} tiers, {each(lambda c: c['train']['rounds'])} rounds"


def _cell(seeds: Sequence[Series], tier: int) -> Cell:
    ends = [after(run)[tier]["macro"] for run in seeds if tier in after(run)]
    starts = [_accuracy(before(run), tier) for run in seeds if tier in before(run)]
    first = f"{average(starts):.1f}" if starts else ""
    if not ends:
        return Cell("–", before=first)
    mean, low, high = accuracy_interval([one["accuracy"] for one in ends], ends[0]["examples"])
    return Cell(f"{100 * mean:.1f}", f"{100 * low:.1f}–{100 * high:.1f}", first)


def _costs(
    runs: Sequence[Series], costs: Sequence[list[TierCosts]], tiers: Sequence[int]
) -> Iterator[tuple[str, Sequence[str]]]:
    """What each tier pays; methods that pay alike share a row."""
    table: dict[str, dict[str, list[str]]] = {}
    for run, own in {run.label: (run, own) for run, own in zip(runs, costs, strict=True) if own}.values():
        facts = {tier["tier"]: tier for tier in own}
        for unit in ("K", "FLOPs, % of top", "client s a round", "client MB a round"):
            cells = [_cost(run, facts[tier], unit) if tier in facts else "–" for tier in tiers]
            table.setdefault(unit, {})[run.label] = cells
    for unit, by_method in table.items():
        alike: dict[tuple[str, ...], list[str]] = {}
        for label, own_cells in by_method.items():
            alike.setdefault(tuple(own_cells), []).append(label)
        for cells_alike, labels in alike.items():
            yield unit if len(alike) == 1 else f"{unit}: {'; '.join(labels)}", cells_alike


def _cost(run: Series, tier: TierCosts, unit: str) -> str:
    paid = tier_costs(run, tier)
    if unit == "K":
        return str(tier["top_k"])
    if unit.startswith("FLOPs"):
        return f"{tier['relative_to_top']:.0%}"
    if unit.startswith("client s"):
        return f"{paid['seconds']:.2g}" if "seconds" in paid else "–"
    return f"{paid['MB']:.3g}"


def _differences(groups: Groups, first: str, tiers: Sequence[int]) -> Table:
    rows = []
    for label, seeds in groups.items():
        if label != first:
            found = [*(paired(seeds, groups[first], tier) for tier in tiers), paired(seeds, groups[first])]
            rows.append([label, *((signed(one), average(one)) if one else "–" for one in found)])
    head = ["method", *(f"tier {tier + 1}" for tier in tiers), "mean over tiers"]
    note = "Points of accuracy, same seed and same data; 95 % Student interval over seeds. One that holds 0 tells nothing apart."
    return Table(f"Difference to {first}", head, rows, note)
