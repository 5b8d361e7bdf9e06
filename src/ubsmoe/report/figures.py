"""The paper's Figures 2-7 from run folders: SVG and PNG to print, CSV to plot otherwise.

Every method has a marker and a dash of its own beside its colour, told apart on a black-and-white print.
"""

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ubsmoe.report.plain import csv_row
from ubsmoe.report.series import (
    COLOURS,
    ENTROPY,
    GINI,
    PHI,
    PHI_RANKS,
    Array,
    Quantity,
    Series,
    correlation,
    mean,
    over_rounds,
)
from ubsmoe.storage.disk import atomic_write
from ubsmoe.storage.record import TierCosts

Rows = list[dict[str, Any]]

DASHES = ("-", "--", ":", "-.")
MARKERS = "osD^vPX*<>hd"
STYLE: Any = {  # typed by name in some releases of matplotlib and not in others
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "svg.hashsalt": "ubsmoe",  # equal data, equal file
}
OUTSIDE: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1.02, 0.5)}


def write_figures(runs: Sequence[Series], costs: dict[str, list[TierCosts]], out: Path) -> list[Path]:
    """Draw every figure the runs have data for.

    Args:
        runs: one or more, any methods and seeds.
        costs: tiers as `ubsmoe plan` counts them for OLMoE-1B-7B, under "rank" and "sparsity".
        out: a folder; made when missing.

    Returns:
        The files written: .svg, .png and .csv per figure. Figures 6 and 7 need a run with phi.
    """
    figures: dict[str, Callable[[], tuple[Figure, Rows]]] = {
        "fig2_entropy": lambda: balance_over_rounds(runs, "entropy", ENTROPY),
        "fig3_flops": lambda: flops_per_tier(runs, costs),
        "fig4_gini": lambda: balance_over_rounds(runs, "gini", GINI),
        "fig5_layer_entropy": lambda: layer_entropy(runs),
    }
    modulated = [run for run in runs if run.phi is not None]
    if modulated:
        figures["fig6_phi_correlation"] = lambda: phi_correlation(modulated)
        figures["fig7_phi_scatter"] = lambda: phi_scatter(modulated[0])
    with matplotlib.rc_context(STYLE):
        return [path for name, draw in figures.items() for path in save(*draw(), out / name)]


def save(figure: Figure, rows: Rows, stem: Path) -> list[Path]:
    """Write one figure as SVG, PNG (200 dots per inch) and its numbers as CSV."""
    paths = []
    kinds: dict[str, Any] = {".svg": {"metadata": {"Date": None}}, ".png": {"dpi": 200}}
    for suffix, options in kinds.items():
        picture = io.BytesIO()
        figure.savefig(picture, format=suffix[1:], bbox_inches="tight", **options)
        paths.append(stem.with_suffix(suffix))
        stem.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(paths[-1], picture.getvalue())
    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(map(csv_row, rows))
    atomic_write(stem.with_suffix(".csv"), table.getvalue().encode())
    return [*paths, stem.with_suffix(".csv")]


def balance_over_rounds(runs: Sequence[Series], name: str, quantity: Quantity) -> tuple[Figure, Rows]:
    """Figures 2 and 4: entropy or Gini of the experts' use, mean over layers, per method; bands span the seeds."""
    figure, (axes,) = panels(1, (5.6, 3.4))
    rows: Rows = []
    for index, (seeds, rounds, per_layer) in enumerate(over_rounds(runs, quantity)):
        values, style = per_layer.mean(2), look(index)
        axes.plot(rounds, values.mean(0), label=seeds[0].label, **style)
        if len(values) > 1:
            axes.fill_between(rounds, values.min(0), values.max(0), color=style["color"], alpha=0.12, lw=0)
        rows += [
            {"method": run.label, "seed": run.seed, "round": number, name: float(value)}
            for run, own in zip(seeds, values, strict=True)
            for number, value in zip(rounds, own, strict=True)
        ]
    axes.set(xlabel="round", ylabel=f"{quantity.title}, {quantity.unit}\n(mean over layers)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(**OUTSIDE)
    return figure, rows


def layer_entropy(runs: Sequence[Series]) -> tuple[Figure, Rows]:
    """Figure 5: entropy per layer after the last round, mean over seeds."""
    figure, (axes,) = panels(1, (5.6, 3.4))
    rows: Rows = []
    for index, (seeds, _, values) in enumerate(over_rounds(runs, ENTROPY)):
        last = values[:, -1].mean(0)
        axes.plot(range(1, len(last) + 1), last, label=seeds[0].label, **look(index))
        rows += [
            {"method": seeds[0].label, "layer": layer, "entropy": float(value)} for layer, value in enumerate(last, 1)
        ]
    axes.set(xlabel="SMoE layer", ylabel=f"{ENTROPY.title}, {ENTROPY.unit}\n(last round)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(**OUTSIDE)
    return figure, rows


def flops_per_tier(runs: Sequence[Series], costs: dict[str, list[TierCosts]]) -> tuple[Figure, Rows]:
    """Figure 3: training FLOPs per tier, counted for OLMoE-1B-7B, and the seconds of these runs' clients beside them."""
    figure, (counted, measured) = panels(2, (7.6, 3.2))
    seconds = {"rank": _tier_seconds(runs, "rank"), "sparsity": _tier_seconds(runs, "sparsity")}
    names = {"rank": "heterogeneous rank", "sparsity": "heterogeneous sparsity"}
    rows: Rows = []
    for index, kind in enumerate(names):
        flops = [tier["train_flops_per_token"] / 1e9 for tier in costs[kind]]
        places = [tier + 0.4 * (index - 0.5) for tier in range(len(flops))]
        style: dict[str, Any] = {
            "width": 0.38,
            "color": COLOURS[index],
            "hatch": ("", "///")[index],
            "edgecolor": "white",
        }
        bars = counted.bar(places, flops, label=names[kind], **style)
        counted.bar_label(bars, [f"{tier['relative_to_top']:.0%}" for tier in costs[kind]], fontsize=7, padding=1)
        rows += [
            {"kind": kind, "tier": tier + 1, "what": "train_gflops_per_token_olmoe_1b_7b", "value": value}
            for tier, value in enumerate(flops)
        ]
        tiers = sorted(seconds[kind])
        measured.bar([tier + 0.4 * (index - 0.5) for tier in tiers], [seconds[kind][t] for t in tiers], **style)
        rows += [
            {"kind": kind, "tier": tier + 1, "what": "client_seconds_per_round", "value": seconds[kind][tier]}
            for tier in tiers
        ]
    counted.set(ylabel="training GFLOPs per token", title="counted, OLMoE-1B-7B")
    measured.set(ylabel="seconds per client and round", title="measured in these runs")
    for axes in (counted, measured):
        num_tiers = len(costs["rank"])
        axes.set_xticks(range(num_tiers), [f"β{tier + 1}" for tier in range(num_tiers)])
        axes.set_xlabel("tier")
        axes.grid(axis="x", visible=False)
    figure.legend(*counted.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure, rows


def phi_correlation(runs: Sequence[Series]) -> tuple[Figure, Rows]:
    """Figure 6: Pearson and Spearman correlation of phi with use, over experts, round by round; bands span seeds and layers."""
    figure, both = panels(2, (7.6, 3.0), share_y=True)
    rows: Rows = []
    for axes, quantity in zip(both, (PHI, PHI_RANKS), strict=True):
        for index, (seeds, rounds, values) in enumerate(over_rounds(runs, quantity)):
            axes.plot(rounds, mean(values, (0, 2)), label=seeds[0].label, **look(index))
            known = np.ma.masked_invalid(values)
            axes.fill_between(
                rounds, known.min((0, 2)), known.max((0, 2)), color=look(index)["color"], alpha=0.12, lw=0
            )
            rows += [
                {
                    "method": run.label,
                    "seed": run.seed,
                    "round": number,
                    "layer": layer,
                    "measure": quantity.unit,
                    "value": float(value),
                }
                for run, own in zip(seeds, values, strict=True)
                for number, layers in zip(rounds, own, strict=True)
                for layer, value in enumerate(layers, 1)
            ]
        axes.set(xlabel="round", ylabel=quantity.unit, ylim=(-1.05, 0.3), title=f"{quantity.unit}: {quantity.title}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.axhline(0, color="#888888", lw=0.8)
    figure.legend(*both[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure, rows


def phi_scatter(run: Series, most: int = 6) -> tuple[Figure, Rows]:
    """Figure 7: phi against use, one point per expert, one panel per round; at most six rounds, evenly spread."""
    assert run.phi is not None, "only a run with phi has this figure"
    phi: Array = run.phi
    count = min(most, len(run.rounds))
    shown = np.linspace(0, len(run.rounds) - 1, count).round().astype(int)
    figure, grid = panels(
        count, (7.6, 2.6 if count <= 3 else 4.6), share_y=True, columns=min(3, count) if count != 4 else 2
    )
    for axes, index in zip(grid, shown, strict=True):
        for layer in range(phi.shape[1]):
            marks = look(layer)
            axes.scatter(
                run.utilization[index, layer], phi[index, layer], s=13, alpha=0.8, lw=0,
                color=marks["color"], marker=marks["marker"], label=f"layer {layer + 1}",
            )  # fmt: skip
        r = float(correlation(run.utilization[index].ravel(), phi[index].ravel()))
        axes.set_title(f"round {run.rounds[index]}, r = {r:.2f}")
    figure.supxlabel("utilization ũ (experts' share of tokens)", fontsize=9)
    figure.supylabel("modulation φ", fontsize=9)
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside right center")
    rows = [
        {
            "round": number,
            "layer": layer + 1,
            "expert": expert,
            "utilization": float(run.utilization[index, layer, expert]),
            "phi": float(phi[index, layer, expert]),
        }
        for index, number in enumerate(run.rounds)
        for layer in range(phi.shape[1])
        for expert in range(phi.shape[2])
    ]
    return figure, rows


def panels(count: int, size: tuple[float, float], share_y: bool = False, columns: int = 0) -> tuple[Figure, list[Axes]]:
    """An empty figure with so many panels; `columns` breaks the row."""
    columns = columns or count
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(-(-count // columns), columns, squeeze=False, sharey=share_y)
    every = [axes for line in grid for axes in line]
    for spare in every[count:]:
        spare.remove()
    return figure, every[:count]


def look(index: int) -> dict[str, Any]:
    """Colour, marker and dash of the index-th series."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "ls": DASHES[index // len(COLOURS) % len(DASHES)],
    }


def _tier_seconds(runs: Sequence[Series], kind: str) -> dict[int, float]:
    """Mean training seconds per client and round by tier, over the runs whose tiers differ in rank, or in K."""
    found: dict[int, list[float]] = {}
    for run in runs:
        clients = run.record.clients
        varied = {client["top_k"] if kind == "sparsity" else client["rank"] for client in clients}
        if len(varied) > 1:
            for client in clients:
                found.setdefault(client["tier"], []).append(client["seconds"])
    return {tier: sum(values) / len(values) for tier, values in found.items()}
