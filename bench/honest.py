"""How far honest clients are apart: what the defaults of clients.max_weight and rounds.max_ratio have to leave room for.

    python bench/honest.py [--rounds 3] [--methods fedavg,flame] [--out FILE]

First, for every run file of runs/ whose data are on this machine: the most examples of a client over the clients' median. Then, for
methods of all kinds on runs/quickstart.toml and runs/tiers.toml: the largest size of a tensor's change over the median of the
round's first clients (server/peers.py), and how many updates the defaults drop, which must be none.
"""

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import median_low
from typing import Any

import torch

from ubsmoe.client.allocator import keep_freed_memory
from ubsmoe.config import load_run
from ubsmoe.engines.local import LocalEngine
from ubsmoe.errors import UserError
from ubsmoe.messages import Reply, Task, Update
from ubsmoe.server.federation import build_federation
from ubsmoe.server.peers import WINDOW, Limits, kind_of, sizes_of
from ubsmoe.server.rounds import one_round
from ubsmoe.server.start import calibrated, start_state
from ubsmoe.storage.disk import atomic_write
from ubsmoe.storage.json_text import encode_json

RUNS = Path(__file__).parents[1] / "runs"
RESULTS = Path(__file__).with_name("results") / "honest.json"
METHODS = ("ubsmoe", "fedavg", "hetlora", "flora", "flexlora", "fed_sb", "ffa_lora", "flame", "hfedmoe")
WORK: dict[str, dict[str, Any]] = {
    "quickstart": {},
    "tiers": {},
    "tiers, sgd": {"train.optimizer": "sgd", "train.learning_rate": 0.1},
    "tiers, one epoch": {"train.local_steps": None, "train.local_epochs": 0.25},
    "tiers, one step": {"train.local_steps": 1},
}


def spread_of_examples() -> dict[str, float]:
    """Per run file, the largest client's examples over the median."""
    found = {}
    for run_file in sorted(RUNS.rglob("*.toml")):
        try:
            clients = build_federation(load_run(run_file, {"evaluate.before": False})).clients
        except (UserError, OSError) as error:
            print(f"{run_file.name}: {str(error)[:90]}", flush=True)
            continue
        examples = [client.num_examples for client in clients]
        found[str(run_file.relative_to(RUNS))] = round(max(examples) / median_low(examples), 2)
        print(run_file.name, found[str(run_file.relative_to(RUNS))], flush=True)
    return found


def spread_of_changes(work: str, method: str, rounds: int) -> dict[str, Any]:
    """The largest ratio of root mean square and of largest entry, with the tensor's kind, and the drops."""
    run_file = RUNS / f"{work.split(',')[0]}.toml"
    changes = {key: value for key, value in WORK[work].items() if value is not None}
    federation = build_federation(load_run(run_file, {**changes, "method.name": method, "evaluate.max_examples": 1}))
    worst, dropped = [(0.0, ""), (0.0, "")], 0

    class Measuring(LocalEngine):
        def exchange(self, tasks: Iterable[Task]) -> Iterator[Reply]:
            sizes = []
            for task in tasks:
                (reply,) = super().exchange([task])
                assert isinstance(reply, Update)
                sizes.append(sizes_of(reply, task.payload, federation.method.judged))
                yield reply
            limits = Limits(sizes[:WINDOW], 1.0)
            for name, own in ((name, own) for client in sizes for name, own in client.items()):
                for i, times in enumerate(limits.times(name, own)):
                    worst[i] = max(worst[i], (times, kind_of(name)))

    def note(event: str, number: int, **fields: Any) -> None:
        nonlocal dropped
        if event == "dropped":
            dropped += 1
            print(fields["reason"], flush=True)

    state, engine = start_state(federation), Measuring(federation.trainer, federation.examples, federation.clients)
    for number in range(1, rounds + 1):
        state = calibrated(federation, state, number)
        state = one_round(federation, engine, state, number, note)
    rms, entry = ({"ratio": round(ratio, 2), "tensor": kind} for ratio, kind in worst)
    return {"work": work, "method": method, "rounds": rounds, "rms": rms, "entry": entry, "dropped": dropped}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    record: dict[str, Any] = {"examples": spread_of_examples(), "changes": []}
    for work in WORK:
        for method in chosen.methods.split(","):
            if "," in work and method not in ("ubsmoe", "fedavg", "hetlora", "flame"):
                continue
            record["changes"].append(spread_of_changes(work, method, chosen.rounds))
            print(json.dumps(record["changes"][-1]), flush=True)
            atomic_write(chosen.out, encode_json(record, indent=1))


if __name__ == "__main__":
    main()
