"""A comparison as a Markdown table: method by tier, mean and 95 % interval over seeds, paired differences, costs."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict

from ubsmoe.report.plain import average, markdown_cell


class Balance(TypedDict):
    """How the last round of a run used its experts."""

    entropy: float | None
    gini: float | None
    dead_experts: int | None


class Row(Balance):
    """A row of comparison.csv: one task of one tier of one run; tiers count from 1, None stands for what was not measured.

    `point` names the point of a grid, where there is one.
    """

    point: NotRequired[str]
    method: str
    seed: int
    tier: int
    top_k: int
    rank: int
    task: str
    accuracy: float
    unparsed: float
    mc_accuracy: float | None
    loss: float
    accuracy_before: float | None
    unparsed_before: float | None
    mc_accuracy_before: float | None
    loss_before: float | None
    chance: float | None
    examples: int
    train_flops_per_token: float
    upload_bytes: int
    download_bytes: int
    client_seconds: float | None


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of the 95 % Student interval; the half-width is NaN for a single value.

    >>> mean, half = interval([1.0, 2.0, 3.0])
    >>> round(mean, 3), round(half, 3)
    (2.0, 2.484)
    """
    mean = average(values)
    if len(values) < 2 or not math.isfinite(mean):
        return mean, math.nan
    from scipy.special import stdtrit  # scipy.stats, whose t.ppf this is, takes a second to import

    error = statistics.stdev(values) / math.sqrt(len(values))
    return mean, float(stdtrit(len(values) - 1, 0.975)) * error


@dataclass(frozen=True)
class Metric:
    """How a score is shown: its name in the rows, a heading, what it is multiplied by, and how many decimals."""

    name: str
    heading: str
    scale: float
    decimals: int


METRICS = (
    Metric("accuracy", "Generation accuracy, %", 100, 1),
    Metric("mc_accuracy", "MC accuracy, %", 100, 1),
    Metric("unparsed", "Unparsed answers, %", 100, 1),
    Metric("loss", "Loss, nats per token of the right answer", 1, 4),
)
OWN = "metric."
"""How the columns of a plug-in's metrics begin."""
BALANCE = (
    Metric("entropy", "entropy / ln M", 1, 3),
    Metric("gini", "Gini", 1, 3),
    Metric("dead_experts", "dead", 1, 1),
)


def own_metrics(rows: Sequence[Row]) -> list[Metric]:
    """The metrics that a run file's plug-ins gave."""
    names = dict.fromkeys(name for row in rows for name in row if name.startswith(OWN))
    return [Metric(name, name.removeprefix(OWN), 1, 3) for name in names]


def comparison_markdown(rows: Sequence[Row], reference: str, fixed: bool = False) -> str:
    """Method by tier, mean over tasks: each metric, its differences to a reference paired by seed, then the costs.

    Args:
        rows: what `compare` returned; a dash stands where something was not measured. Each point of a grid has its own tables.
        reference: the label of the method that the others are compared with.
        fixed: whether all seeds have the same data and partition (data.seed).

    Raises:
        ValueError: if the reference is not among the methods.
    """
    return _per_point(rows, lambda own: _tables(own, reference, fixed))


def accuracy_markdown(rows: Sequence[Row], reference: str, fixed: bool = False) -> str:
    """The first table of `comparison_markdown`, for a terminal."""

    def table(own: Sequence[Row]) -> list[str]:
        macro, _ = _macro(own, reference)
        return [_introduction(macro, fixed), *_scores(macro, reference, METRICS[0])]

    return _per_point(rows, table)


def points_of(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows at each point of a grid; all of them under no name where there is none."""
    points: dict[str, list[Row]] = {}
    for row in rows:
        points.setdefault(row.get("point", ""), []).append(row)
    return points


def _per_point(rows: Sequence[Row], lines_of: Callable[[Sequence[Row]], list[str]]) -> str:
    parts = [
        "\n".join([*([f"## {markdown_cell(point)}", ""] if point else []), *lines_of(own)]) + "\n"
        for point, own in points_of(rows).items()
    ]
    return "\n".join(parts)


def _tables(rows: Sequence[Row], reference: str, fixed: bool) -> list[str]:
    macro, methods = _macro(rows, reference)
    lines = [_introduction(macro, fixed)]
    for metric in (*METRICS, *own_metrics(rows)):
        lines += _scores(macro, reference, metric)
    lines += _balance(macro, methods)
    costs = [[m, *(_cost(macro, m, t) for t in _distinct(macro, "tier"))] for m in methods]
    heading = "### Cost per tier: K, LoRA rank / training MFLOPs per token / MB up, MB down / client seconds per round"
    return [*lines, "", heading, "", *markdown_table(_head(macro), costs)]


def _macro(rows: Sequence[Row], reference: str) -> tuple[list[Row], list[str]]:
    """The rows of the means over tasks, and the methods. Raises ValueError if the reference is not among these."""
    macro = [row for row in rows if row["task"] == "macro"]
    methods = _distinct(macro, "method")
    if reference not in methods:
        raise ValueError(f"the reference {reference!r} is not among the methods: {', '.join(methods)}")
    return macro, methods


def _introduction(macro: Sequence[Row], fixed: bool) -> str:
    count = len(_distinct(macro, "seed"))
    same = " Data and partition are the same for all seeds (data.seed)." if fixed else ""
    return (
        f"Mean over tasks ± 95 % interval over {count} seed{'s' if count > 1 else ''}; tiers at their own budgets. "
        f"Chance: {_percent(macro, 'chance')} %.{same}"
    )


def _head(macro: Sequence[Row]) -> list[str]:
    return ["method", *(f"tier {tier}" for tier in _distinct(macro, "tier"))]


def _scores(macro: Sequence[Row], reference: str, metric: Metric) -> list[str]:
    """One metric: before training, of every method, its differences to the reference; a seed that a method lacks is left out."""
    methods, tiers, seeds = (_distinct(macro, key) for key in ("method", "tier", "seed"))
    by_seed = {(row["method"], row["tier"], row["seed"]): _of(row, metric.name) for row in macro}
    before = {(row["method"], row["tier"], row["seed"]): _of(row, f"{metric.name}_before") for row in macro}

    def cells(found: Mapping[Any, float | None], method: str) -> list[str]:
        return [score_cell(metric, [found[method, t, s] for s in seeds if (method, t, s) in found]) for t in tiers]

    body = [
        [f"before training, K = {ks}", *cells(before, m)]
        for ks, m in _first_of_each_k(macro).items()
        if any(value is not None for value in before.values())
    ]
    body += [[m, *cells(by_seed, m)] for m in methods]
    differences = [
        [m, *(score_cell(metric, _paired(by_seed, m, reference, t, seeds), signed=True) for t in tiers)]
        for m in methods
        if m != reference
    ]
    lines = ["", f"### {metric.heading}", "", *markdown_table(_head(macro), body)]
    if differences:
        lines += ["", f"Difference to {reference}, paired by seed:", "", *markdown_table(_head(macro), differences)]
    return lines


def _first_of_each_k(macro: Sequence[Row]) -> dict[str, str]:
    """The Ks of the tiers, as text, and the first method that runs them: before training all methods of one K are alike."""
    methods: dict[str, str] = {}
    for method in _distinct(macro, "method"):
        top_ks = _distinct([row for row in macro if row["method"] == method], "top_k")
        methods.setdefault(", ".join(map(str, top_ks)), method)
    return methods


def _balance(macro: Sequence[Row], methods: Sequence[str]) -> list[str]:
    """How evenly the last round used the experts: why a balancing method does what it does, or does not."""
    body = []
    for method in methods:
        runs = {row["seed"]: row for row in macro if row["method"] == method}.values()  # alike in every tier
        body.append([method, *(score_cell(metric, [_of(run, metric.name) for run in runs]) for metric in BALANCE)])
    if all(set(cells) == {"–"} for _, *cells in body):
        return []
    heading = "### Use of experts in the last round, mean over layers; dead: experts without a token, in all layers"
    return ["", heading, "", *markdown_table(["method", *(metric.heading for metric in BALANCE)], body)]


def _paired(
    values: Mapping[tuple[str, int, int], float | None], method: str, reference: str, tier: int, seeds: Sequence[int]
) -> list[float | None]:
    both = [seed for seed in seeds if (method, tier, seed) in values and (reference, tier, seed) in values]
    pairs = [(values[method, tier, seed], values[reference, tier, seed]) for seed in both]
    return [None if own is None or other is None else own - other for own, other in pairs]


def score_cell(metric: Metric, values: Sequence[float | None], signed: bool = False) -> str:
    """Mean ± half-width of the 95 % interval, as a cell; a dash where a value is missing, the mean alone of a single one."""
    known = [value * metric.scale for value in values if value is not None]
    if not known or len(known) < len(values):
        return "–"
    mean, half = interval(known)
    text = f"{mean:{'+' if signed else ''}.{metric.decimals}f}"
    return text if math.isnan(half) else f"{text} ± {half:.{metric.decimals}f}"


def _cost(macro: Sequence[Row], method: str, tier: int) -> str:
    rows = [row for row in macro if row["method"] == method and row["tier"] == tier]
    seconds = [row["client_seconds"] for row in rows if row["client_seconds"] is not None]
    measured = f"{statistics.median(seconds):.2f}" if seconds else "–"
    one = rows[0]
    sizes = f"{one['upload_bytes'] / 1e6:.2f}, {one['download_bytes'] / 1e6:.2f}"
    return f"{one['top_k']}, {one['rank']} / {one['train_flops_per_token'] / 1e6:.2f} / {sizes} / {measured}"


def _percent(macro: Sequence[Row], name: str) -> str:
    values = [value * 100 for value in (_of(row, name) for row in macro) if value is not None]
    return f"{average(values):.1f}" if values else "–"


def markdown_table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table; texts in the body are shown as they are."""
    return [
        "| " + " | ".join(head) + " |",
        "|---" * len(head) + "|",
        *("| " + " | ".join(map(markdown_cell, row)) + " |" for row in body),
    ]


def _distinct(rows: Sequence[Row], key: str) -> list[Any]:
    return list(dict.fromkeys(_of(row, key) for row in rows))


def _of(row: Row, column: str) -> Any:
    return row.get(column)  # of a plug-in's metric there is none before training
