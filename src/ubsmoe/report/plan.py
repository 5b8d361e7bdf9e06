"""What `ubsmoe plan` prints."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from ubsmoe.report.console import empty_table
from ubsmoe.report.plain import formats_said


def plan_table(plan: dict[str, Any]) -> Table:
    """What a client of each tier needs in one round."""
    spread = f" within {plan['speed_spread']:.0%}" if plan["speed_spread"] else ""
    libraries = f"{plan['runtime_bytes'] / 2**30:.1g} GiB"
    table = empty_table(
        f"{plan['model']}, {plan['method']}: one client, one round",
        (
            *("tier", "β", "K", "rank", "clients", "steps", "tokens", "TFLOPs", "seconds"),
            *("MB up", "MB down", "GB memory", "fits"),
        ),
        caption=f"lengths: {plan['lengths']}; {plan['flops_per_second'] / 1e9:.4g} GFLOP/s, {plan['speed']}{spread}; "
        "MB up: at most, when no expert stays as it was; fits: the smallest of the usual devices that holds the tier and "
        f"{libraries} for python and its libraries{formats_said(plan['tiers'])}",
    )
    for tier in plan["tiers"]:
        table.add_row(
            str(tier["tier"] + 1),
            f"{tier['budget']:g}",
            str(tier["top_k"]),
            str(tier["rank"]),
            str(tier["clients"]),
            f"{tier['steps']:.4g}",
            f"{tier['tokens']:,.0f}",
            f"{tier['flops'] / 1e12:,.4g}",
            f"{tier['seconds']:,.3g}",
            f"{tier['upload_bytes'] / 1e6:,.1f}",
            f"{tier['download_bytes'] / 1e6:,.1f}",
            f"{tier['peak_memory_bytes'] / 1e9:.2f}",
            f"{tier['device_gib']} GiB" if tier["device_gib"] else "none",
        )
    return table


def plan_lines(plan: dict[str, Any]) -> list[str]:
    """The whole run, where the plan is of one, and what a given device holds, in words."""
    lines = []
    if run := plan.get("run"):
        rounds = f"{run['rounds']} round{'s' * (run['rounds'] > 1)}"
        lines = [
            f"the run: {rounds} of {run['clients_trained']:g} clients, {run['flops'] / 1e12:,.4g} TFLOPs of "
            f"training, {run['download_bytes'] / 1e9:.3g} GB down, {run['upload_bytes'] / 1e9:.3g} GB up",
            f"training takes {duration(run['seconds_one_after_another'])} one client after another, "
            f"{duration(run['seconds_side_by_side'])} side by side",
            _evaluation_line(plan["evaluation"]),
            "exports: "
            + "; ".join(
                f"{format} {cost['file_bytes'] / 1e9:.3g} GB, {cost['memory_bytes'] / 1e9:.3g} GB of memory"
                for format, cost in plan["exports"].items()
            )
            + " beside a base that is mapped",
        ]
    if secure := plan.get("secure_aggregation"):
        lines.append(secure["in_words"])
    if fits := plan.get("fits"):
        held, mapped = (", ".join(str(tier + 1) for tier in fits[kind]) or "none" for kind in ("tiers", "mapped_tiers"))
        more = f"; with a base that is mapped from disk, which a CPU can: {mapped}" if mapped != held else ""
        lines.append(f"a device of {fits['memory_bytes'] / 2**30:.3g} GiB holds tiers: {held}{more}")
    return lines


def _evaluation_line(cost: Mapping[str, Any] | None) -> str:
    if cost is None:
        return "evaluation is not counted: no data were read"
    return (
        f"evaluation: {cost['times']} times {cost['questions']} questions per tier, at most {duration(cost['seconds'])} and "
        f"{cost['memory_bytes'] / 1e9:.3g} GB of memory"
    )


def inventory_table(plan: dict[str, Any]) -> Table:
    """Of every machine the largest budget that it can train, how, and in what time."""
    table = empty_table(
        f"{plan['model']}: which machines can train it",
        ("memory", "tier", "K", "needs", "s per round"),
        words=["machine", "device", "with"],
    )
    table.caption = (
        "needs: GB at the peak, python and its libraries included; of a mapped base only what must be resident. "
        "int8 and nf4 change the base that a client trains on; micro-batches, checkpointing and mapping do not"
    )
    for one in plan["machines"]:
        best = max(one["tiers"], key=lambda tier: tier["budget"], default=None)
        left = one["device"], "no tier fits" if best is None else ", ".join(best["with"]) or "the run file as it is"
        cells = [f"{best['tier'] + 1}", f"{best['top_k']}", f"{best['memory_bytes'] / 1e9:.3g}"] if best else ["–"] * 3
        seconds = f"{best['seconds']:,.3g}" if best and best["seconds"] else "–"
        table.add_row(one["name"], *left, f"{one['memory_bytes'] / 1e9:.3g}", *cells, seconds)
    return table


def duration(seconds: float) -> str:
    """Seconds in a unit that people read.

    >>> duration(90), duration(600)
    ('90 s', '10 min')
    """
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.3g} {unit}"
    return f"{seconds:.3g} s"
