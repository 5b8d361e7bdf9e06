"""Methods of unequal rank, answering with the compute of their tier: rank as trained, K = K_c experts per token instead of K_max.

They train and answer with all K_max experts, so tier 1 pays about as much as tier 4. A client that can afford K_c experts cannot
run that. The paper's table has FLoRA and FLoRIST, which give every tier one and the same model, at .0094 and .0112 in tier 1 and
.2996 and .2724 in tier 4: its tiers can only have differed in how they answered. That it was by K is our reading.

python bench/rank_budgets.py [COMPARISON] [--tiers 1 2] [--out FILE]     after `ubsmoe compare`; tidy rows as CSV
"""

import argparse
from pathlib import Path

from ubsmoe.costs.shape import budget_top_k
from ubsmoe.finished.run import evaluate_run
from ubsmoe.report.comparison import METRICS
from ubsmoe.storage.disk import atomic_write
from ubsmoe.storage.runfolder import read_run
from ubsmoe.study.compare import to_csv

METHODS = ("hetlora", "flexlora", "flora", "florist")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("comparison", type=Path, nargs="?", default=Path("out/confirmation-compare"))
    parser.add_argument("--tiers", type=int, nargs="+", default=[1])
    parser.add_argument("--out", type=Path, default=Path("rank_budgets.csv"))
    options = parser.parse_args()
    if not options.comparison.exists():
        return print(f"no {options.comparison}: runs/study/confirmation.toml says how it is made")
    rows = []
    for folder in sorted((options.comparison / "runs").iterdir()):
        record = read_run(folder)
        method, settings = record.config["method"]["name"], record.config
        if method not in METHODS:
            continue
        k_max = record.summary["tiers"][-1]["top_k"]
        for tier in options.tiers:
            top_k = budget_top_k(k_max, settings["tiers"]["budgets"][tier - 1])
            (found,) = evaluate_run(folder, {}, tier, top_k)
            score = found["scores"]["macro"]
            place = {"method": method, "seed": settings["seed"], "tier": tier, "top_k": top_k, "rank": found["rank"]}
            rows.append(place | {metric.name: score[metric.name] for metric in METRICS})
            print(*rows[-1].values(), flush=True)
    atomic_write(options.out, to_csv(rows).encode())


if __name__ == "__main__":
    main()
