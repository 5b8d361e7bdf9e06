"""A comparison as the table of a paper, in Markdown and in LaTeX (booktabs): the best of each tier bold, significance starred.

Nothing is bold where all are equal. A star marks a difference to the reference with p < 0.05 by a two-sided paired t-test over
seeds, not corrected for their number:

    t = mean(d) / (s_d / sqrt n),    d_s = score_s - reference_s
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ubsmoe.report.comparison import METRICS, Metric, Row, comparison_markdown, interval, own_metrics, points_of
from ubsmoe.report.plain import markdown_cell
from ubsmoe.storage.disk import atomic_write

LEVEL = 0.05
BEST_IS_SMALLEST = ("unparsed", "loss")
LATEX = {
    **{sign: f"\\{sign}" for sign in "&%_#${}"},
    **{"\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}"},
}


def paired_p(own: Sequence[float], other: Sequence[float]) -> float:
    """The p-value of a two-sided paired t-test; NaN for a single pair, or where all differences are zero.

    >>> round(paired_p([1.0, 2.0, 4.0], [0.0, 1.0, 2.0]), 4)  # t = 4 with 2 degrees of freedom
    0.0572
    """
    differences = [a - b for a, b in zip(own, other, strict=True)]
    if len(differences) < 2 or not any(differences):
        return math.nan
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    if error == 0:
        return 0.0
    from scipy.special import stdtr  # scipy.stats, whose t.sf this is, takes a second to import

    return 2 * float(stdtr(len(differences) - 1, -abs(statistics.fmean(differences)) / error))


def paper_table(
    rows: Sequence[Row], reference: str, form: Literal["markdown", "latex"], metric: str = "accuracy"
) -> str:
    """Method by tier, mean over tasks and seeds with its 95 % interval; the points of a grid one below the other.

    Args:
        rows: what `compare` returned.
        reference: the label of the method that the others are compared with, at each point.
        form: how it is written.
        metric: accuracy, mc_accuracy, unparsed, loss, or one of `own_metrics`.

    Raises:
        ValueError: for a reference or a metric that is not there.
    """
    shown = next((one for one in (*METRICS, *own_metrics(rows)) if one.name == metric), None)
    macro = [row for row in rows if row["task"] == "macro"]
    methods, tiers, seeds = (list(dict.fromkeys(_of(row, key) for row in macro)) for key in ("method", "tier", "seed"))
    if shown is None or reference not in methods:
        raise ValueError(f"there is no metric {metric!r}, or no method {reference!r} among {', '.join(methods)}")
    body = {point: _lines(own, shown, tiers, reference, form) for point, own in points_of(macro).items()}
    head = ["method", *(f"tier {tier}" for tier in tiers)]
    note = f"{shown.heading}, mean ± 95 % interval over {len(seeds)} seeds; * p < {LEVEL} against {reference}, paired t-test"
    return _latex(head, body, note) if form == "latex" else _markdown(head, body, note)


def write_tables(folder: Path, rows: Sequence[Row], reference: str, fixed: bool) -> None:
    """Write comparison.md, table.md and table.tex. Arguments as for `comparison_markdown`."""
    atomic_write(folder / "comparison.md", comparison_markdown(rows, reference, fixed).encode())
    metrics = ["accuracy", *(metric.name for metric in own_metrics(rows))]
    for name, write in (("table.md", markdown_table), ("table.tex", latex_table)):
        atomic_write(folder / name, "\n".join(write(rows, reference, metric) for metric in metrics).encode())


def markdown_table(rows: Sequence[Row], reference: str, metric: str = "accuracy") -> str:
    """`paper_table` in Markdown."""
    return paper_table(rows, reference, "markdown", metric)


def latex_table(rows: Sequence[Row], reference: str, metric: str = "accuracy") -> str:
    """`paper_table` in LaTeX; needs the package booktabs."""
    return paper_table(rows, reference, "latex", metric)


def _lines(rows: Sequence[Row], metric: Metric, tiers: Sequence[int], reference: str, form: str) -> list[list[str]]:
    """A line for each method, of rows that did the same work; a dash for a tier that they do not have."""
    methods, seeds = (list(dict.fromkeys(_of(row, key) for row in rows)) for key in ("method", "seed"))
    found = {(row["method"], row["tier"], row["seed"]): _of(row, metric.name) for row in rows}
    scores = {(m, t): [found.get((m, t, s)) for s in seeds] for m in methods for t in tiers}
    return [[m, *(_cell(scores, metric, m, t, methods, reference, form) for t in tiers)] for m in methods]


def _of(row: Row, column: str) -> Any:
    return row.get(column)


def _cell(
    scores: dict[tuple[str, int], list[Any]],
    metric: Metric,
    method: str,
    tier: int,
    methods: Sequence[str],
    reference: str,
    form: str,
) -> str:
    own = scores[method, tier]
    if any(value is None for other in methods for value in scores[other, tier]):
        return "–"
    mean, half = interval([value * metric.scale for value in own])
    text = f"{mean:.{metric.decimals}f}"
    means = [statistics.fmean(scores[other, tier]) for other in methods]
    best, worst = sorted((min(means), max(means)), reverse=metric.name not in BEST_IS_SMALLEST)
    if statistics.fmean(own) == best != worst:
        text = rf"\textbf{{{text}}}" if form == "latex" else f"**{text}**"
    if not math.isnan(half):
        text += rf" $\pm$ {half:.{metric.decimals}f}" if form == "latex" else f" ± {half:.{metric.decimals}f}"
    if method != reference and paired_p(own, scores[reference, tier]) < LEVEL:
        text += "$^*$" if form == "latex" else " *"
    return text


def _markdown(head: Sequence[str], body: Mapping[str, Sequence[Sequence[str]]], note: str) -> str:
    rows = [head, ["---", *["---:"] * (len(head) - 1)]]
    for point, lines in body.items():
        rows += [[f"*{markdown_cell(point)}*", *[""] * (len(head) - 1)]] if point else []
        rows += [[markdown_cell(line[0]), *line[1:]] for line in lines]
    return "\n".join(["| " + " | ".join(row) + " |" for row in rows] + ["", f"{note}."]) + "\n"


def _latex(head: Sequence[str], body: Mapping[str, Sequence[Sequence[str]]], note: str) -> str:
    lines = [rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}", r"\toprule", " & ".join(head) + r" \\"]
    for point, methods in body.items():
        lines.append(r"\midrule")
        lines += [rf"\multicolumn{{{len(head)}}}{{l}}{{\emph{{{_escaped(point)}}}}} \\"] if point else []
        lines += [" & ".join([_escaped(line[0]), *line[1:]]) + r" \\" for line in methods]
    return "\n".join([f"% {note}", *lines, r"\bottomrule", r"\end{tabular}"]).replace("–", "--") + "\n"


def _escaped(text: str) -> str:
    return "".join(LATEX.get(character, character) for character in text)
