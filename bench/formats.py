"""The same trained adapter on plain, int8 and nf4 experts: accuracy and loss of every tier, without the noise of another training.

python bench/formats.py RUN... [--set KEY=VALUE]... [--out FILE.csv]

Finished runs. Prints means of the paired differences to the plain experts over the runs, with 95 % t-intervals; `--set` says how to
score, as for `ubsmoe eval`. A run whose rows are in the file already is left out of the work.
"""

import argparse
import csv
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from scipy.stats import t

from ubsmoe.cli.app import overrides
from ubsmoe.config import NamedFormat, format_named
from ubsmoe.finished.run import settings_of_run
from ubsmoe.methods.state import unpack
from ubsmoe.server.federation import build_server
from ubsmoe.server.rounds import evaluate_tier
from ubsmoe.storage.runfolder import read_adapter

SCORES = {"accuracy": 100, "mc_accuracy": 100, "loss": 1}  # points, points, nats per token


def scores(path: Path, changes: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each tier and format of one run."""
    tensors, _ = read_adapter(path)
    server = build_server(settings_of_run(path, changes), weights=True)
    state, rows = unpack(tensors, server.method.keeps), []
    for profile in server.tiers:
        for name in get_args(NamedFormat):
            found = evaluate_tier(server, state, replace(profile, experts=format_named(name)))["macro"]
            row = {"run": path.name, "tier": profile.tier + 1, "top_k": profile.top_k, "experts": name}
            rows.append(row | {key: round(value, 6) for key in SCORES if (value := getattr(found, key)) is not None})
    return rows


def interval(values: list[float]) -> str:
    """Mean and half the 95 % interval."""
    mean, count = statistics.mean(values), len(values)
    if count < 2:
        return f"{mean:+.4f} (one run)"
    return f"{mean:+.4f} ± {t.ppf(0.975, count - 1) * statistics.stdev(values) / count**0.5:.4f}"


def main() -> None:
    """Score the runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    if args.out and args.out.exists():
        with open(args.out, newline="") as file:
            rows = list(csv.DictReader(file))
    for path in args.runs:
        if not any(row["run"] == path.name for row in rows):
            rows += scores(path, overrides(args.set))
        if args.out:
            with open(args.out, "w", newline="") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)
    at = {(row["run"], int(row["tier"]), row["experts"]): row for row in rows}
    for tier in sorted({int(row["tier"]) for row in rows}):
        for name in ("int8", "nf4"):
            pairs = [(at[path.name, tier, name], at[path.name, tier, "plain"]) for path in args.runs]
            said = [
                f"{key} {interval([scale * (float(one[key]) - float(plain[key])) for one, plain in pairs])}"
                for key, scale in SCORES.items()
                if key in rows[0]
            ]
            print(f"tier {tier}  {name:<4}  {'  '.join(said)}", flush=True)


if __name__ == "__main__":
    main()
