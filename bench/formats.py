"""The same trained adapter on plain, int8 and nf4 experts: accuracy and loss of every tier, without the noise of another training.

python bench/formats.py RUN... [--out FILE.csv]     finished runs; prints means of the paired differences to the plain experts
"""

import argparse
import csv
import statistics
from dataclasses import replace
from pathlib import Path
from typing import get_args

import torch

from ubsmoe.config import NamedFormat, format_named
from ubsmoe.finished.run import settings_of_run
from ubsmoe.methods.state import unpack
from ubsmoe.server.federation import build_server
from ubsmoe.server.rounds import evaluate_tier
from ubsmoe.storage.runfolder import read_adapter


def scores(path: Path) -> list[dict[str, object]]:
    """A row for each tier and format of one run."""
    tensors, _ = read_adapter(path)
    server = build_server(settings_of_run(path, {}), weights=True)
    state, rows = unpack(tensors, server.method.keeps), []
    for profile in server.tiers:
        for name in get_args(NamedFormat):
            found = evaluate_tier(server, state, replace(profile, experts=format_named(name)))["macro"]
            row = {"run": path.name, "tier": profile.tier + 1, "top_k": profile.top_k, "experts": name}
            rows.append({**row, "accuracy": round(found.accuracy, 6), "loss": round(found.loss, 6)})
    return rows


def main() -> None:
    """Score the runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for path in args.runs for row in scores(path)]
    at = {(row["run"], row["tier"], row["experts"]): row for row in rows}
    for tier in sorted({row["tier"] for row in rows}):  # type: ignore[type-var]
        for name in ("int8", "nf4"):
            pairs = [(at[path.name, tier, name], at[path.name, tier, "plain"]) for path in args.runs]
            points, loss = (
                statistics.mean(float(one[key]) - float(plain[key]) for one, plain in pairs)  # type: ignore[arg-type]
                for key in ("accuracy", "loss")
            )
            print(f"tier {tier}  {name:<4}  accuracy {100 * points:+.2f} points  loss {loss:+.4f}", flush=True)
    if args.out:
        with open(args.out, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
