"""The tables of the appendix, made at every build from docs/data/*.csv and bench/results: no number in them is typed.

`docs/conf.py` has each written below generated/tables/, and docs/tables.md includes it there.
"""

import csv
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from ubsmoe.report.comparison import METRICS, Metric, Row, comparison_markdown, interval, markdown_table, score_cell
from ubsmoe.report.plain import average

ROOT = Path(__file__).parent.parent
ACCURACY, MC_ACCURACY, UNPARSED, LOSS = METRICS
LOSS_3, LOSS_4 = (Metric("loss", "loss", 1, digits) for digits in (3, 4))
COMPARISONS = dict.fromkeys(
    ("confirmation", "tiers", "compensation_confirmed", "compensation_baselines", "compensation_selection"), "fedavg"
)
"""CSV files that hold every row of one `ubsmoe compare`, and the method that the others are compared with."""

Lines = Iterable[str]


def tables() -> dict[str, str]:
    """Every table, by the name of the file that holds it."""
    made: dict[str, Lines] = {
        name: [comparison_markdown(read_csv(name), reference)] for name, reference in COMPARISONS.items()
    }
    made |= {
        "testbed": testbed(),
        "screening": screening(read_csv("screening")),
        "learning_rates": learning_rates(read_csv("learning_rates")),
        "ubsmoe_at_tier_1": against_others(read_csv("confirmation"), "ubsmoe", tier=1),
        "rank_budgets": rank_budgets(read_csv("rank_budgets"), read_csv("confirmation")),
        "client_step": client_step(),
        "commonsense": per_task(read_csv("commonsense_tiny")),
        "smollm2": smollm2(),
        "alignment": alignment("alignment"),
        "alignment_study": alignment("alignment_study"),
        "bias_floor": bias_floor(),
        "formats_study": formats(read_csv("formats_study"), "method", "seed", ACCURACY),
        "formats_last_bits": formats(read_csv("formats_last_bits"), "method", "seed", ACCURACY),
        "formats_quickstart": formats(read_csv("formats_quickstart"), "method", "seed", ACCURACY),
        "formats_fixed_study": formats(read_csv("formats_fixed_study"), "experts", "run", MC_ACCURACY),
        "formats_fixed_smollm2": formats(read_csv("formats_fixed_smollm2"), "experts", "run", MC_ACCURACY),
    }
    return {name: "\n".join(lines) + "\n" for name, lines in made.items()}


def read_csv(name: str) -> list[Row]:
    """The rows of docs/data/NAME.csv with their numbers; None where nothing was measured, or a column is missing."""
    with (ROOT / "docs/data" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        missing: dict[str, Any] = dict.fromkeys(Row.__annotations__)
        rows = [missing | {key: _value(text) for key, text in row.items()} for row in csv.DictReader(file)]
    return cast(list[Row], rows)


def testbed() -> Lines:
    """The untrained bases of two run files, from bench/testbed.py."""
    found = _measured("testbed.json")
    body = [
        [
            "accuracy at K = 1, 2, 4, 8, %",
            *(_list(_of_budgets(base, "accuracy"), ".1f", 100) for base in found.values()),
        ],
        ["loss", *(_list(_of_budgets(base, "loss"), ".3f") for base in found.values())],
        ["entropy per layer / ln M", *(_list(base["entropy"], ".3f") for base in found.values())],
        ["Gini per layer", *(_list(base["gini"], ".3f") for base in found.values())],
        ["experts without a token", *(f"{sum(base['dead_experts']):.0f}" for base in found.values())],
        [
            "loss with another token's experts, ×",
            *(_list(base["loss_with_another_tokens_experts"].values(), ".0f") for base in found.values()),
        ],
        ["clients' total variation", *(f"{base['mean_total_variation']:.3f}" for base in found.values())],
    ]
    return markdown_table(["untrained base of", *(f"`{name}`" for name in found)], body)


def screening(rows: Sequence[Row]) -> Lines:
    """One line for each variant; differences to the first, paired by seed."""
    variants, tiers = _distinct(rows, "method"), _distinct(rows, "tier")
    reference = variants[0]
    body = []
    for variant in variants:
        line = [variant]
        line += ["/".join(_mean(rows, variant, metric, [tier]) for tier in tiers) for metric in (ACCURACY, LOSS_3)]
        for metric, where in ((ACCURACY, tiers[:1]), (ACCURACY, tiers[-1:]), (LOSS_3, tiers)):
            line.append("" if variant == reference else _difference(rows, variant, reference, metric, where))
        body.append([*line, *(_mean(rows, variant, Metric(name, "", 1, 3), tiers) for name in ("entropy", "gini"))])
    differences = [f"Δ accuracy at K = {_top_k(rows, tier)}" for tier in (tiers[0], tiers[-1])]
    return markdown_table(
        ["variant", "accuracy, %", "loss", *differences, "Δ loss, mean of tiers", "entropy", "Gini"], body
    )


def learning_rates(rows: Sequence[Row]) -> Lines:
    """Method by learning rate, mean of the tiers and of the seeds that ran: loss / accuracy."""
    tiers = _distinct(rows, "tier")
    cells: dict[str, dict[str, str]] = {}
    for label in _distinct(rows, "method"):
        method, rate = _without_rate(label)
        scores = [_mean(rows, label, metric, tiers) for metric in (LOSS_3, ACCURACY)]
        cells.setdefault(method, {})[rate] = " / ".join(scores)
    rates = sorted(next(iter(cells.values())), key=float)
    return markdown_table(
        ["method", *rates], [[method, *(own[rate] for rate in rates)] for method, own in cells.items()]
    )


def against_others(rows: Sequence[Row], own: str, tier: int) -> Lines:
    """One method against each other one in a tier, paired by seed; relative: points over the other's mean accuracy."""
    body = []
    for other in _distinct(rows, "method"):
        if other != own:
            points, half = interval(_paired(rows, own, other, "accuracy", [tier]))
            mean = average(_per_seed(rows, other, "accuracy", [tier]))
            relative = f"{100 * points / mean:+.1f} ± {100 * half / mean:.1f}"
            differences = [_difference(rows, own, other, metric, [tier]) for metric in (ACCURACY, LOSS_3)]
            body.append([other, f"{100 * mean:.1f}", differences[0], relative, differences[1]])
    mine = _mean(rows, own, ACCURACY, [tier])
    return markdown_table([f"{own} ({mine} %) against", "%", "points", "relative, %", "loss"], body)


def rank_budgets(rows: Sequence[Row], confirmation: Sequence[Row]) -> Lines:
    """Tier 1 of the rank-based methods: as they were trained and scored, and with the experts that the tier can afford."""
    body = []
    tier = [1]
    ubsmoe = _per_seed(confirmation, "ubsmoe", "accuracy", tier)
    for method in _distinct(rows, "method"):
        scores = [score_cell(m, _per_seed(rows, method, m.name, tier)) for m in (ACCURACY, UNPARSED, MC_ACCURACY)]
        accuracy = _per_seed(rows, method, "accuracy", tier)
        lead = [own - other for own, other in zip(ubsmoe, accuracy, strict=True)]
        multiple = f"{average(ubsmoe) / average(accuracy):.1f}"
        loss = f"{average(_per_seed(rows, method, 'loss', tier)):.2f}"
        at_k_max = _mean(confirmation, method, ACCURACY, tier)
        body.append([method, at_k_max, *scores, loss, score_cell(ACCURACY, lead, signed=True), multiple])
    head = ["K = 8: accuracy, %", "K = 1: accuracy, %", "unparsed, %", "MC accuracy, %", "loss"]
    return markdown_table(["method", *head, "UB-SMoE over it, points", "UB-SMoE over it, multiple"], body)


def client_step() -> Lines:
    """FLOPs and time of a step at few experts over those at K_max, from bench/client_step.py."""
    steps = {(s["data"], s["batch"], s["top_k"]): s for s in _measured("client_step.json")["steps"]}
    names = {"full": "random tokens, all labelled", "answers": "questions, answers labelled"}
    body = []
    for data, batch in dict.fromkeys(key[:2] for key in steps):
        full, line = steps[data, batch, 8], [f"{names[data]}, {batch} a batch"]
        for few in (steps[data, batch, 2], steps[data, batch, 1]):
            line.append(f"{few['mflops_per_token'] / full['mflops_per_token']:.2f}")
            line.append(f"{few['ours']['median'] / full['ours']['median']:.2f}")
        body.append(line)
    return markdown_table(["batches", "FLOPs, K = 2", "time, K = 2", "FLOPs, K = 1", "time, K = 1"], body)


def per_task(rows: Sequence[Row]) -> Iterator[str]:
    """Accuracy of every task, mean of the seeds, before training and after it with each method."""
    methods, tiers = _distinct(rows, "method"), _distinct(rows, "tier")
    tasks = sorted(_distinct(rows, "task"), key=lambda task: task == "macro")  # the mean last
    budgets = "K=" + "/".join(str(_top_k(rows, tier)) for tier in tiers)
    head = ["task", "chance", f"before, {budgets}", *(f"{method}, {budgets}" for method in methods)]
    for metric in (ACCURACY, MC_ACCURACY, UNPARSED):
        body = []
        for task in tasks:
            own = [row for row in rows if row["task"] == task]
            before = Metric(f"{metric.name}_before", "", metric.scale, metric.decimals)
            columns = [(methods[0], before), *((method, metric) for method in methods)]
            cells = [" / ".join(_mean(own, method, one, [tier]) for tier in tiers) for method, one in columns]
            body.append([task, f"{100 * cast(float, own[0]['chance']):.1f}", *cells])
        yield from ["", f"### {metric.heading}", "", *markdown_table(head, body)]


def smollm2() -> Lines:
    """The upcycled SmolLM2 by experts per token, from bench/upcycled_smollm2.py."""
    scored: dict[tuple[str, str], dict[int | None, Any]] = {}
    for row in _measured("upcycled_smollm2.jsonl"):
        model = "upcycled" if row["top_k"] is None or row["model"] == "smollm2-moe" else row["model"].split("-")[-1]
        scored.setdefault((row["task"], model), {})[row["top_k"]] = row
    budgets = [None, 4, 3, 2, 1]  # None: the dense model
    body = []
    for (task, model), by_k in sorted(scored.items(), key=lambda item: item[0][0]):
        cells = [by_k.get(k) for k in budgets]
        body.append(
            [
                f"{task}, {model}",
                *(f"{100 * c['accuracy']:.1f} ({100 * c['normalised']:.1f})" if c else "" for c in cells),
            ]
        )
    upcycled = {task: by_k for (task, model), by_k in scored.items() if model == "upcycled"}
    for task, by_k in upcycled.items():
        body.append([f"{task}: seconds of one core, upcycled", *(f"{by_k[k]['cpu_seconds']:.0f}" for k in budgets)])
    peaks = [max(by_k[k]["peak_mib"] for by_k in upcycled.values()) * 2**20 / 1e9 for k in budgets]
    return markdown_table(
        ["", "dense", *(f"K = {k}" for k in budgets[1:])],
        [*body, ["peak memory, GB, upcycled", *(f"{peak:.1f}" for peak in peaks)]],
    )


def alignment(name: str) -> Lines:
    """Cosine with the missing gradient by tier, mean over rounds after the first state, and over runs."""
    rows = [row for row in cast(list[dict[str, Any]], read_csv(name)) if row["experts"] == "some" and row["round"] > 0]
    signals = list(dict.fromkeys(row["signal"] for row in rows))
    body = []
    for tier, top_k in sorted({(row["tier"], row["top_k"]) for row in rows}):
        own = [row for row in rows if row["tier"] == tier]
        means = [average(row["cosine"] for row in own if row["signal"] == signal) for signal in signals]
        body.append([f"{tier}, K = {top_k}", *(f"{mean:z.3f}" for mean in means)])
    return markdown_table(["tier", *signals], body)


def bias_floor() -> Iterator[str]:
    """The lab's floors: loss above the optimum by experts per token, mean of the seeds."""
    rows = cast(list[dict[str, Any]], read_csv("bias_floor"))
    titles = {
        "dense": "Error of the full mixture, as the paper's analysis takes it",
        "sparse": "Error of the K active experts alone, which is what a client can compute",
    }
    budgets = list(dict.fromkeys(row["top_k"] for row in rows))
    signals = list(dict.fromkeys(row["signal"] for row in rows))
    lines = [(signal, signal, "measured") for signal in signals]
    lines += [(key, "off", key) for key in ("exact", "bound", "coarse")]
    for forward, title in titles.items():
        body = []
        for name, signal, column in lines:
            own = [row for row in rows if row["forward"] == forward and row["signal"] == signal]
            body.append([name, *(f"{average(r[column] for r in own if r['top_k'] == k):.4f}" for k in budgets)])
        yield from ["", f"### {title}", "", *markdown_table(["", *(f"K = {k}" for k in budgets)], body)]


def formats(rows: Sequence[Row], label: str, paired_by: str, accuracy: Metric) -> Iterator[str]:
    """What fewer bits change in each tier: differences to the plain experts, of accuracy and of loss.

    Args:
        rows: a row for each tier; a label is a format, or a method and its format behind a comma; pairs are equal in `paired_by`.
        label: the column of it.
        paired_by: a column.
        accuracy: which one.
    """
    every = [
        {**row, "method": row[label], "seed": row[paired_by]}
        for row in cast(Sequence[dict[str, Any]], rows)
        if row["task"] in ("macro", None)
    ]
    body = []
    for own in [name for name in _distinct(every, "method") if not name.endswith("plain")]:
        other = ", ".join([*own.split(", ")[:-1], "plain"])
        seeds = {row["seed"] for row in every if row["method"] == own} & {
            row["seed"] for row in every if row["method"] == other
        }
        pair = [row for row in every if row["seed"] in seeds]
        for metric in (accuracy, LOSS_4):
            cells = [_difference(pair, own, other, metric, [tier]) for tier in sorted(_distinct(every, "tier"))]
            body.append([f"{own} ({len(seeds)})", metric.heading, *cells])
    yield from markdown_table(["", "", *(f"K = {k}" for k in sorted(_distinct(every, "top_k")))], body)


def _per_seed(rows: Sequence[Row], method: str, column: str, tiers: Sequence[int]) -> list[float]:
    """A value for each seed, in order: the mean over some tiers."""
    own = [row for row in cast(Sequence[dict[str, Any]], rows) if row["method"] == method and row["tier"] in tiers]
    seeds = sorted({row["seed"] for row in own})
    return [average(row[column] for row in own if row["seed"] == seed) for seed in seeds]


def _paired(rows: Sequence[Row], own: str, other: str, column: str, tiers: Sequence[int]) -> list[float]:
    both = (_per_seed(rows, method, column, tiers) for method in (own, other))
    return [mine - its for mine, its in zip(*both, strict=True)]


def _difference(rows: Sequence[Row], own: str, other: str, metric: Metric, tiers: Sequence[int]) -> str:
    return score_cell(metric, _paired(rows, own, other, metric.name, tiers), signed=True)


def _mean(rows: Sequence[Row], method: str, metric: Metric, tiers: Sequence[int]) -> str:
    return score_cell(metric, [average(_per_seed(rows, method, metric.name, tiers))])


def _without_rate(label: str) -> tuple[str, str]:
    """A label of learning_rates.csv as variant and rate; the run file's own rate stands in no label."""
    start, _, rate = label.partition("train.learning_rate=")
    if not rate:
        return label, "1e-2"
    start = start.rstrip("(;")
    return start + ")" * ("(" in start), rate.rstrip(")")


def _top_k(rows: Sequence[Row], tier: int) -> int:
    return next(row["top_k"] for row in rows if row["tier"] == tier)


def _distinct(rows: Sequence[Row], column: str) -> list[Any]:
    return list(dict.fromkeys(cast(dict[str, Any], row)[column] for row in rows))


def _of_budgets(base: dict[str, Any], score: str) -> list[float]:
    return [scores[score] for scores in base["by_top_k"].values()]


def _list(values: Iterable[float], form: str, scale: float = 1) -> str:
    return ", ".join(format(scale * value, form) for value in values)


def _value(text: str) -> Any:
    """What a cell of a CSV file holds: nothing, a whole number, a number, or a text."""
    for kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            continue
        return value if math.isfinite(value) else None
    return text or None


def _measured(name: str) -> Any:
    """What a script in bench/ has left in bench/results: JSON, or a list of JSON lines."""
    text = (ROOT / "bench/results" / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if name.endswith(".jsonl") else json.loads(text)
