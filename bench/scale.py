"""Many clients a round on one machine: memory that stays flat, a cost that is linear in clients, a frame that costs little.

Each row is a process of its own: the shipped base, one round of N clients (K = 2, 4, 6, 8 in turn), after a warm-up round of
eight. Rows that are compared hold the same examples, so that they differ in clients alone.

    memory      peak resident set of the process after the round; one step of one example, so that many clients are soon done
    fit         CPU seconds of a round = constant + slope N, by least squares over the same rows
    frame       (the round's seconds - the sum of its clients' training) / that sum, in the quickstart's round: eight clients,
                ten steps of sixteen. What it is in rounds of a single step of eight or of one example is printed beside it
    speed-up    seconds of the round with one worker over two, side by side; one step of eight examples

    python bench/scale.py [--quick] [--out FILE]     about ten minutes on two idle cores; --quick under half a minute
"""

import argparse
import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "scale.json"
MEMORY_CLAIM, FRAME_CLAIM = 1.1, 0.05
QUICKSTART, QUICKSTART_EXAMPLES = (10, 16), 3000  # steps and batch of runs/study/small.toml


def one_round_of(clients: int, workers: int, steps: int, batch_size: int, examples: int) -> dict[str, Any]:
    """One row: a round in this process."""
    import torch

    from ubsmoe.client.allocator import keep_freed_memory
    from ubsmoe.config import parse_run
    from ubsmoe.engines.local import LocalEngine, process_pool
    from ubsmoe.server.federation import build_federation
    from ubsmoe.server.rounds import one_round
    from ubsmoe.server.start import start_state

    torch.set_num_threads(1)
    keep_freed_memory()
    settings = {
        "threads": 1,
        "clients": {"count": clients},
        "rounds": {"quorum": 0.0},  # the warm-up asks fewer
        "data": {"synthetic": {"train_examples": examples, "test_examples": 8, "entities": 16}},
        "train": {"local_steps": steps, "batch_size": batch_size},
    }
    federation = build_federation(parse_run(settings))
    state, took, round_seconds = start_state(federation), [], 0.0

    def note(event: str, number: int, **fields: Any) -> None:
        nonlocal round_seconds
        if (event, number) == ("client", 2):
            took.append(fields["seconds"])
        if event == "round":
            round_seconds = fields["seconds"]

    with process_pool(federation, workers) as pool:
        engine = LocalEngine(federation.trainer, federation.examples, federation.clients, pool=pool)
        few = LocalEngine(federation.trainer, federation.examples, federation.clients[:8], pool=pool)
        state = one_round(federation, few, state, 1, note)
        cpu = time.process_time()
        one_round(federation, engine, state, 2, note)
        cpu = time.process_time() - cpu
    return {
        "clients": clients,
        "workers": workers,
        "steps": steps,
        "batch_size": batch_size,
        "round_seconds": round_seconds,
        "clients_seconds": sum(took),
        "frame": (round_seconds - sum(took)) / sum(took) if workers == 1 else None,
        "cpu_seconds": cpu,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "counted": len(took),
    }


def in_processes(rows: Sequence[tuple[int, int, int, int]], examples: int) -> list[dict[str, Any]]:
    """The rows, each in a fresh process, one after another."""
    found = []
    for clients, workers, steps, batch_size in rows:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            found.append(process.submit(one_round_of, clients, workers, steps, batch_size, examples).result())
        row = found[-1]
        print(
            f"{clients:>6} clients  {workers} worker(s)  {steps:>2} x {batch_size:>2}  round {row['round_seconds']:8.2f} s  "
            f"per client {1e3 * row['round_seconds'] / clients:7.1f} ms  peak {row['peak_mib']:7.1f} MiB"
            + (f"  frame {row['frame']:.1%}" if workers == 1 else ""),
            flush=True,
        )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 and 24 clients; claims are not judged")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the record goes (default: %(default)s)")
    options = parser.parse_args()
    counts, pair, examples = ((4, 24), 12, 200) if options.quick else ((10, 100, 1000, 10_000), 40, 30_000)
    load = os.getloadavg()[0]
    repeats = 1 if options.quick else 3
    rows = in_processes([(count, 1, 1, 1) for count in counts], examples)
    beside = in_processes([(pair, 1, 1, 8), (pair, 2, 1, 8)] * repeats, examples)
    real = [] if options.quick else in_processes([(8, 1, *QUICKSTART)] * repeats, QUICKSTART_EXAMPLES)
    line = statistics.linear_regression([row["clients"] for row in rows], [row["cpu_seconds"] for row in rows])
    speed_ups = [
        one["round_seconds"] / two["round_seconds"] for one, two in zip(beside[::2], beside[1::2], strict=True)
    ]
    memory = rows[-1]["peak_mib"] / rows[0]["peak_mib"]
    frames = {
        name: [row["frame"] for row in those]
        for name, those in (("quickstart", real), ("one step of 8", beside[::2]), ("one step of 1", rows[-1:]))
        if those
    }
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "mode": "quick" if options.quick else "full",
        "machine": {"platform": platform.platform(), "python": platform.python_version(), "load_before": load},
        "rows": rows,
        "beside": beside,
        "real": real,
        "cpu_seconds_per_client": line.slope,
        "cpu_seconds_per_round": line.intercept,
        "memory_ratio": memory,
        "frames": frames,
        "speed_up_of_two_workers": speed_ups,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(
        f"a round: {line.intercept:.2f} + {1e3 * line.slope:.1f} ms CPU per client; memory {memory:.3f} x; "
        f"2 workers {statistics.median(speed_ups):.2f} x ({min(speed_ups):.2f} to {max(speed_ups):.2f})"
    )
    print("frame: " + ", ".join(f"{statistics.median(found):.1%} ({name})" for name, found in frames.items()))
    if options.quick:
        return 0  # too little of everything to judge
    frame = statistics.median(frames["quickstart"])
    broken = [f"memory {memory:.2f}"] * (memory > MEMORY_CLAIM) + [f"frame {frame:.1%}"] * (frame > FRAME_CLAIM)
    print("claims hold" if not broken else "claims broken: " + "; ".join(broken))
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
