"""Accuracy against epsilon on the quickstart's testbed: one round of many clients, the same updates at every noise.

    python bench/privacy.py [--clients 24] [--quick] [--out FILE.csv]

There is one round, so the clients train once and only the noise differs; epsilon is that of one round with everybody in it. Rows
are written as points end.
"""

import argparse
import csv
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ubsmoe.allocator import keep_freed_memory
from ubsmoe.config import load_run
from ubsmoe.engines.local import LocalEngine
from ubsmoe.federation import Federation, build_federation
from ubsmoe.maths.robust import squared_norm
from ubsmoe.messages import Reply, Task, Update
from ubsmoe.protection import change_of
from ubsmoe.rounds import evaluate_tier, one_round, start_state

TESTBED = Path(__file__).parents[1] / "runs" / "quickstart.toml"
CHANGES = {
    "train.local_steps": 6,
    "train.batch_size": 8,
    "data.world.test_examples": 60,
    "data.partition.kind": "iid",
    "evaluate.likelihood": False,
}
NOISES = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)
"""Noise multipliers; 0 is no privacy at all: the plain mean."""


class Known:
    """An engine whose clients have answered already."""

    def __init__(self, replies: list[Reply]) -> None:
        self._replies = replies

    def exchange(self, tasks: Iterable[Task]) -> Iterator[Reply]:
        """Their answers, as those to these tasks."""
        for task, reply in zip(tasks, self._replies, strict=True):
            yield replace(reply, run=task.run) if isinstance(reply, Update) else reply


def scores(federation: Federation, replies: list[Reply]) -> list[Any]:
    state = one_round(federation, Known(replies), start_state(federation), 1, lambda *_, **__: None, noise="0")
    return [evaluate_tier(federation, state, tier)["macro"] for tier in federation.tiers]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--method", default="ubsmoe")
    parser.add_argument("--quick", action="store_true", help="four clients, two points")
    parser.add_argument("--out", type=Path, default=Path("privacy.csv"))
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    changes = CHANGES | {"clients.count": 4 if chosen.quick else chosen.clients, "method.name": chosen.method}
    federation = build_federation(load_run(TESTBED, changes))
    state = start_state(federation)
    engine = LocalEngine(federation.trainer, federation.examples)
    tasks = [
        Task(1, client, federation.method.dispatch(state, client), federation.run_id, federation.base_sha256)
        for client in federation.clients
    ]
    replies = list(engine.exchange(tasks))
    norms = sorted(squared_norm(change_of(one, state)) ** 0.5 for one in replies if isinstance(one, Update))
    clip = round(norms[len(norms) // 2], 2)  # the median: known here because this is a study
    print(
        f"trained after {time.process_time():.0f} s; norms {norms[0]:.2f} to {norms[-1]:.2f}, clip {clip}", flush=True
    )
    for noise in NOISES[::5] if chosen.quick else NOISES:
        private = {"privacy.noise_multiplier": noise, "privacy.clip_norm": clip, "privacy.seed": 0} if noise else {}
        settings = load_run(TESTBED, changes | private)
        one = replace(federation, settings=settings)
        epsilon = ""
        if noise:
            from ubsmoe.privacy import spent

            epsilon = f"{spent(settings, 1)['epsilon']:.4g}"
        for tier, score in enumerate(scores(one, replies)):
            row = {"method": chosen.method, "clients": len(replies), "clip_norm": clip, "noise_multiplier": noise}
            row |= {
                "epsilon": epsilon,
                "tier": tier + 1,
                "accuracy": f"{score.accuracy:.4f}",
                "loss": f"{score.loss:.4f}",
            }
            new = not chosen.out.exists()
            with chosen.out.open("a", newline="") as file:
                writer = csv.DictWriter(file, fieldnames=list(row), lineterminator="\n")
                if new:
                    writer.writeheader()
                writer.writerow(row)
        print(f"noise {noise:<6g} epsilon {epsilon or 'none':>10s}  after {time.process_time():.0f} s", flush=True)


if __name__ == "__main__":
    main()
