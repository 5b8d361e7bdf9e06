"""Figures of what is measured beside the runs themselves: the lab's floors, the alignment of pseudo-gradients."""

from pathlib import Path
from typing import cast

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ubsmoe.config import parse_run
from ubsmoe.plan.tiers import run_costs
from ubsmoe.report.figures import STYLE, Rows, look, panels, save
from ubsmoe.storage.record import TierCosts


def olmoe_costs() -> dict[str, list[TierCosts]]:
    """Figure 3's bars: OLMoE-1B-7B with heterogeneous rank and with heterogeneous sparsity, at the run file's defaults."""

    def tiers(method: str) -> list[TierCosts]:
        settings = parse_run({"model": {"base": "olmoe-1b-7b"}, "method": {"name": method}})
        return cast(list[TierCosts], [cost.as_dict() for cost in run_costs(settings)])

    return {"rank": tiers("hetlora"), "sparsity": tiers("fedavg")}


def write_bias_floor(rows: Rows, out: Path) -> list[Path]:
    """The lab's floors as a figure and a table."""
    with matplotlib.rc_context(STYLE):
        return save(bias_floor(rows), rows, out / "bias_floor")


def bias_floor(rows: Rows) -> Figure:
    """The lab's floors against M - K, one panel per forward pass, with the paper's bound where it applies."""
    forwards = list(dict.fromkeys(row["forward"] for row in rows))
    num_experts = max(row["top_k"] for row in rows)
    figure, grid = panels(len(forwards), (7.6, 3.6), share_y=True)
    for axes, forward in zip(grid, forwards, strict=True):
        own = [row for row in rows if row["forward"] == forward]
        for index, signal in enumerate(dict.fromkeys(row["signal"] for row in own)):
            missing, means = _means_by_missing(own, signal, "measured", num_experts)
            axes.plot(missing, means, label="top-K alone" if signal == "off" else signal, **look(index))
        for key, text, dash in (("bound", "2‖B‖²/μ′", "-"), ("coarse", "2G²(M−K)/μ′", "--")):
            missing, means = _means_by_missing(own, "off", key, num_experts)
            axes.plot(missing[:-1], means[:-1], label=text, color="#888888", ls=dash, lw=1.2)
        axes.set(
            xlabel="experts left out, M − K", yscale="log", title=f"error of the {forward} mixture", ylim=(1e-4, None)
        )
    grid[0].set_ylabel("floor: loss above the optimum")
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside right center")
    return figure


def write_alignment(rows: Rows, out: Path) -> list[Path]:
    """The cosines of `ubsmoe study alignment` as a figure and a table."""
    with matplotlib.rc_context(STYLE):
        return save(alignment(rows), rows, out / "alignment")


def alignment(rows: Rows) -> Figure:
    """Cosine over rounds, one panel per tier, experts that some tokens used, mean over seeds."""
    rows = [row for row in rows if row["experts"] == "some"]
    tiers = sorted({(row["tier"], row["top_k"]) for row in rows})
    figure, grid = panels(len(tiers), (2.4 * len(tiers) + 1.6, 3.2), share_y=True)
    for axes, (tier, top_k) in zip(grid, tiers, strict=True):
        own = [row for row in rows if row["tier"] == tier]
        for index, signal in enumerate(dict.fromkeys(row["signal"] for row in own)):
            points: dict[int, list[float]] = {}
            for row in own:
                if row["signal"] == signal:
                    points.setdefault(row["round"], []).append(row["cosine"])
            rounds = sorted(points)
            axes.plot(rounds, [sum(points[r]) / len(points[r]) for r in rounds], label=signal, **look(index))
        axes.set(xlabel="state after round", title=f"tier {tier}, K = {top_k}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    grid[0].set_ylabel("cosine with the missing gradient")
    figure.legend(*grid[-1].get_legend_handles_labels(), loc="outside right center")
    return figure


def _means_by_missing(rows: Rows, signal: str, key: str, num_experts: int) -> tuple[list[int], list[float]]:
    missing = list(range(num_experts - 1, -1, -1))
    values = [[r[key] for r in rows if r["signal"] == signal and r["top_k"] == num_experts - m] for m in missing]
    return missing, [sum(group) / len(group) for group in values]
