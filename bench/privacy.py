"""Accuracy against epsilon on the quickstart's testbed: many small clients, all of them in every round.

    python bench/privacy.py [--seed 0] [--method ubsmoe] [--noises "0, 0.5, 1"] [--quick] [--out FILE]
    python bench/privacy.py --table

Clients hold some twenty examples each, dealt at random, and take one step a round. The clip norm is the median length of the first
changes, which is known here because this is a study. Noise 0 is the plain mean, without clipping. A line of JSON is written as each
point ends; points that the file has are not run again.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ubsmoe.client.allocator import keep_freed_memory
from ubsmoe.config import load_run
from ubsmoe.engines.local import LocalEngine
from ubsmoe.maths.robust import squared_norm
from ubsmoe.messages import Task, Update
from ubsmoe.methods.sums import delta_of
from ubsmoe.server.federation import Federation, build_federation
from ubsmoe.server.privacy import spent
from ubsmoe.server.rounds import evaluate_tier, one_round
from ubsmoe.server.start import noise_key, start_state

TESTBED = Path(__file__).parents[1] / "runs" / "study" / "small.toml"
RESULTS = Path(__file__).with_name("results") / "privacy.jsonl"
CHANGES = {
    "clients.count": 128,
    "train.rounds": 5,
    "train.local_steps": 1,
    "train.batch_size": 8,
    "train.learning_rate": 2e-2,
    "data.partition.kind": "iid",
    "evaluate.mc_accuracy": False,
}
NOISES = "0, 0.5, 1, 2"
LOOKED_AT = 16  # clients whose first changes give the clip norm


def usual_length(federation: Federation) -> float:
    """Median norm of the first changes."""
    state = start_state(federation)
    tasks = (
        Task(1, client, federation.method.dispatch(state, client), federation.run_id, federation.base_sha256)
        for client in federation.clients[:LOOKED_AT]
    )
    replies = LocalEngine(federation.trainer, federation.examples, federation.clients).exchange(tasks)
    sent = federation.method.dispatch(state, federation.clients[0])  # the same for all
    return round(median(squared_norm(delta_of(one, sent)) ** 0.5 for one in replies if isinstance(one, Update)), 2)


def point(changes: dict[str, Any], noise: float) -> dict[str, Any]:
    """Every tier's scores after all rounds, and the epsilon of them."""
    federation, private = build_federation(load_run(TESTBED, changes)), {}
    if noise:
        private = {"privacy.noise_multiplier": noise, "privacy.clip_norm": usual_length(federation), "privacy.seed": 0}
        federation = build_federation(load_run(TESTBED, changes | private))
    settings, state = federation.settings, start_state(federation)
    engine = LocalEngine(federation.trainer, federation.examples, federation.clients)
    for number in range(1, settings.train.rounds + 1):
        state = one_round(federation, engine, state, number, lambda *_, **__: None, noise_key(settings))
    scores = [evaluate_tier(federation, state, tier)["macro"] for tier in federation.tiers]
    return {
        "clients": settings.clients.count,
        "rounds": settings.train.rounds,
        "weights": sum(value.numel() for value in state.adapters.values()),
        "clip_norm": private.get("privacy.clip_norm"),
        "epsilon": spent(settings, settings.train.rounds)["epsilon"] if noise else None,
        "tiers": [{name: round(getattr(one, name), 4) for name in ("accuracy", "unparsed", "loss")} for one in scores],
    }


def line_of(row: dict[str, Any]) -> str:
    """A row of the table in docs/robustness.md."""
    accuracy = " / ".join(f"{100 * tier['accuracy']:.0f}" for tier in row["tiers"])
    loss = sum(tier["loss"] for tier in row["tiers"]) / len(row["tiers"])
    epsilon = "∞" if row["epsilon"] is None else f"{row['epsilon']:.3g}"
    return f"| {row['method']} | {row['seed']} | {row['noise']:g} | {epsilon} | {accuracy} | {loss:.3f} |"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--method", default="ubsmoe")
    parser.add_argument("--noises", default=NOISES, help="noise multipliers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="four clients, one round, two points")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print what is there as a table, run nothing")
    chosen = parser.parse_args()
    rows = [json.loads(line) for line in chosen.out.read_text().splitlines()] if chosen.out.exists() else []
    if chosen.table:
        print(
            "| method | seed | noise multiplier | ε at δ = 1e-5 | accuracy %, tiers 1-4 | loss |\n|---|---|---|---|---|---|"
        )
        print("\n".join(map(line_of, sorted(rows, key=lambda row: (row["method"], row["seed"], row["noise"])))))
        return
    torch.set_num_threads(1)
    keep_freed_memory()
    changes = {**CHANGES, "seed": chosen.seed, "method.name": chosen.method}
    if chosen.quick:
        changes |= {"clients.count": 4, "train.rounds": 1}
    done = {(row["method"], row["seed"], row["noise"]) for row in rows}
    for noise in [0.0, 1.0] if chosen.quick else map(float, chosen.noises.split(",")):
        if (chosen.method, chosen.seed, noise) in done:
            continue
        row = {"method": chosen.method, "seed": chosen.seed, "noise": noise, **point(changes, noise)}
        with chosen.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(line_of(row), f"  {time.process_time():.0f} s", flush=True)


if __name__ == "__main__":
    main()
