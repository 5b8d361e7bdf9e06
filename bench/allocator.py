"""What keeping freed memory is worth: the same client's training steps with and without it, each in a fresh process.

python bench/allocator.py            prints a table, writes bench/results/allocator.json
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEPS, REPEATS, SEED = 8, 3, 0


def measure(keep: bool) -> dict[str, float]:
    """CPU milliseconds per optimiser step by K, one thread, on the quickstart's clients."""
    import torch

    from ubsmoe.client.allocator import keep_freed_memory
    from ubsmoe.client.train import train
    from ubsmoe.config import load_run
    from ubsmoe.messages import Task
    from ubsmoe.server.federation import build_federation
    from ubsmoe.server.start import start_state

    if keep:
        keep_freed_memory()
    torch.set_num_threads(1)
    changes = {
        "seed": SEED,
        "train.local_steps": STEPS,
        "data.synthetic.train_examples": 800,
        "data.synthetic.test_examples": 8,
    }
    federation = build_federation(load_run(ROOT / "runs" / "study" / "small.toml", changes))
    state, times = start_state(federation), {}
    for repeat in range(REPEATS + 1):
        for profile in federation.clients[:4]:
            began = time.process_time()
            task = Task(1, profile, federation.method.dispatch(state, profile))
            train(federation.trainer, task, federation.examples[profile.client])
            if repeat:  # the first one warms up
                times.setdefault(f"K={profile.top_k}", []).append((time.process_time() - began) / STEPS * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1] == "keep")))
        return
    runs: dict[str, list[dict[str, float]]] = {"stock": [], "keep": []}
    for _ in range(2):  # side by side: a, b, a, b
        for name in runs:
            out = subprocess.run([sys.executable, __file__, name], check=True, capture_output=True, text=True).stdout
            runs[name].append(json.loads(out.splitlines()[-1]))
    best = {name: {k: min(run[k] for run in group) for k in group[0]} for name, group in runs.items()}
    print("CPU ms per step   " + "".join(f"{k:>9}" for k in best["stock"]))
    for name, row in best.items():
        print(f"{name:<18}" + "".join(f"{value:9.1f}" for value in row.values()))
    print(f"{'stock / keep':<18}" + "".join(f"{best['stock'][k] / best['keep'][k]:9.2f}" for k in best["keep"]))
    path = ROOT / "bench" / "results" / "allocator.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"seed": SEED, "steps": STEPS, "runs": runs, "best": best}, indent=2) + "\n")


if __name__ == "__main__":
    main()
