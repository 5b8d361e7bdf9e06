"""What a server does with what goes wrong: every fault, the declared outcome, the observed one. Ends with 1 if they differ.

    python bench/faults.py [--quick] [--only ABF] [--out FILE]

Each family of faults is a file in fault_cases/. Where flwr is installed, its own FedAvg gets the same 15 bad replies beside ours.
G, deployment, starts a SuperLink and SuperNodes and takes minutes; --quick leaves it out. kill -9 at random points: bench/kill.py.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from fault_cases import clients, disk, environment, mutations, one_client, replies, variants
from fault_cases.matrix import FAMILIES, Row
from fault_cases.round_of_five import Round
from fault_cases.small_run import small_settings, write_base
from fault_cases.stock_flower import in_flower
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ubsmoe.server.federation import build_federation
from ubsmoe.storage.json_text import encode_json
from ubsmoe.storage.runfolder import atomic_write


def matrix(families: str, quick: bool, root: Path) -> Iterator[Row]:
    """The rows of these families."""
    world, share = Round(), 10 if quick else 1
    if "A" in families:
        yield from clients.deaths(world)
        yield from clients.silences(world)
        yield from clients.dropout(world, 50)
    if set("BCD") & set(families):
        yield from (row for row in replies.bad_replies(world) if row.family in families)
    if "D" in families:
        yield from replies.order_and_pace(world)
        yield from mutations.fuzz(world, 20_000 // share)
    if "F" in families:
        yield from clients.lies(world)
    if "M" in families:
        yield from one_client.malice(world, quick)
        yield from variants.variants(world)
    if set("EGH") & set(families):
        base = write_base(root / "base")
    if "G" in families:
        from fault_cases.deployment import deployment  # the only family that cannot do without flwr

        yield from deployment(root, base)
    if set("EH") & set(families):
        federation = build_federation(small_settings(base))
        if "E" in families:
            yield from disk.server_and_disk(federation, root, 1000 // share, 100 // share)
        if "H" in families:
            yield from environment.environment(world, federation, base, root)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a tenth of the mutations and damages, no G")
    parser.add_argument("--only", help="families, such as ABF")
    parser.add_argument(
        "--out", type=Path, help="write the matrix as JSON; families that are not run keep the rows they have there"
    )
    chosen = parser.parse_args()
    families = chosen.only or "".join(FAMILIES).replace("G" if chosen.quick else "", "")
    if unknown := set(families) - set(FAMILIES):
        parser.error(f"--only: there is no family {', '.join(sorted(unknown))}; there are {', '.join(FAMILIES)}")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        found = matrix(families, chosen.quick, Path(root))
        rows = sorted((replace(row, reason=row.reason.replace(root, "")) for row in found), key=lambda row: row.family)
    stock = in_flower(Round()) if "B" in families else None
    undeclared = [row for row in rows if not row.holds]

    console, table = Console(width=200), Table("", "fault", "declared", "observed", "what was said")
    for row in rows:
        cells = (row.family + "+" * row.beyond, row.fault, row.declared, row.observed, row.reason)
        table.add_row(*(escape(cell[:70]) for cell in cells))
    console.print(table)
    named = {row.fault: row for row in rows}
    if stock and {"B", "C"} <= set(families):
        beside = Table("bad reply, one of five", "here", "flwr FedAvg")
        for name in filter(named.__contains__, replies.FIFTEEN):
            beside.add_row(name, "contained" if named[name].holds else "COUNTED", stock[name])
        console.print(beside)
    if {"B", "C"} <= set(families):
        contained = sum(named[name].holds for name in replies.FIFTEEN)
        console.print(f"bad replies contained: {contained} of {len(replies.FIFTEEN)}")
    for family, (title, count) in FAMILIES.items():
        if family not in families:
            console.print(f"{family}  {title}: {count} faults, not run; --only {family} runs them")
            continue
        own = [row for row in rows if row.family == family and not row.beyond]
        console.print(f"{family}  {title}: {len(own)} of {count} faults, {sum(row.holds for row in own)} as declared")
    console.print(f"rows: {len(rows)}, undeclared: {len(undeclared)}")
    if chosen.out:
        before = json.loads(chosen.out.read_text()) if chosen.out.exists() else {"faults": [], "flwr_fedavg": None}
        kept = [row for row in before["faults"] if row["family"] not in families]
        merged = sorted([*kept, *map(asdict, rows)], key=lambda row: row["family"])
        record = {"faults": merged, "flwr_fedavg": stock or before["flwr_fedavg"]}
        atomic_write(chosen.out, encode_json(record, indent=1))
    sys.exit(bool(undeclared))


if __name__ == "__main__":
    main()
