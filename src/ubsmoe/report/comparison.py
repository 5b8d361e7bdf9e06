"""A comparison as a Markdown table: method by tier, mean and 95 % interval over seeds, paired differences, costs."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from scipy import stats


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of the 95 % Student interval; the half-width is NaN for a single value.

    >>> mean, half = interval([1.0, 2.0, 3.0])
    >>> round(mean, 3), round(half, 3)
    (2.0, 2.484)
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan
    error = statistics.stdev(values) / math.sqrt(len(values))
    return mean, float(stats.t.ppf(0.975, len(values) - 1)) * error


def comparison_markdown(rows: Sequence[dict[str, Any]], reference: str, metric: str = "accuracy") -> str:
    """Tables of one metric over all tasks: means, differences to a reference paired by seed, and costs.

    Args:
        rows: what `compare` returned.
        reference: the label of the method that the others are compared with.
        metric: accuracy or likelihood (percent), unparsed (percent), or loss (nats per token); a dash where it was not
            measured.

    Raises:
        ValueError: if the reference is not among the methods.
    """
    macro = [row for row in rows if row["task"] == "macro"]
    methods, tiers = _distinct(macro, "method"), _distinct(macro, "tier")
    if reference not in methods:
        raise ValueError(f"the reference {reference!r} is not among the methods: {', '.join(methods)}")
    seeds = _distinct(macro, "seed")
    values = {(row["method"], row["tier"], row["seed"]): row for row in macro}

    def cell(method: str, tier: int, name: str, against: str | None = None) -> str:
        scale = 1 if name == "loss" else 100
        found = [values[method, tier, seed][name] for seed in seeds]
        if None in found:
            return "–"
        own = [value * scale for value in found]
        if against:
            own = [a - values[against, tier, seed][name] * scale for a, seed in zip(own, seeds, strict=True)]
        return _mean_text(*interval(own), signed=against is not None)

    chance = _mean_known(macro, "chance", 100)
    before = _mean_known(macro, f"{metric}_before", 1 if metric == "loss" else 100)
    head = ["method", *(f"tier {tier}" for tier in tiers)]
    unit = "nats per token" if metric == "loss" else "%"
    lines = [
        f"{metric}, {unit}, mean over tasks ± 95 % interval over {len(seeds)} seeds "
        f"(before training: {before}; chance: {chance} %)",
        "",
        *_table(
            [*head, "unparsed, all tiers"],
            [[m, *(cell(m, t, metric) for t in tiers), f"{_mean(macro, m, 'unparsed') * 100:.1f} %"] for m in methods],
        ),
        "",
        f"Difference to {reference}, paired by seed",
        "",
        *_table(head, [[m, *(cell(m, t, metric, reference) for t in tiers)] for m in methods if m != reference]),
        "",
        "Cost per tier: training MFLOPs per token / MB up / client seconds per round",
        "",
        *_table(head, [[m, *(_cost(macro, m, t) for t in tiers)] for m in methods]),
    ]
    return "\n".join(lines) + "\n"


def _cost(macro: Sequence[dict[str, Any]], method: str, tier: int) -> str:
    rows = [row for row in macro if row["method"] == method and row["tier"] == tier]
    seconds = [row["client_seconds"] for row in rows if row["client_seconds"] is not None]
    measured = f"{statistics.median(seconds):.2f}" if seconds else "–"
    return f"{rows[0]['train_flops_per_token'] / 1e6:.2f} / {rows[0]['upload_bytes'] / 1e6:.2f} / {measured}"


def _mean(macro: Sequence[dict[str, Any]], method: str, name: str) -> float:
    return statistics.fmean(row[name] for row in macro if row["method"] == method)


def _mean_known(macro: Sequence[dict[str, Any]], name: str, scale: float) -> str:
    values = [row[name] * scale for row in macro if row[name] is not None]
    return f"{statistics.fmean(values):.1f}" if values else "–"


def _mean_text(mean: float, half: float, signed: bool) -> str:
    text = f"{mean:+.2f}" if signed else f"{mean:.2f}"
    return text if math.isnan(half) else f"{text} ± {half:.2f}"


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *("| " + " | ".join(row) + " |" for row in body)]


def _distinct(rows: Sequence[dict[str, Any]], key: str) -> list[Any]:
    return list(dict.fromkeys(row[key] for row in rows))
