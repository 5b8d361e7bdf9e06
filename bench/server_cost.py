"""What one client of a round costs its server, by the size of its update, and so how many clients a round can have.

    send     the task as bytes, once a round for all clients that get the same adapter
    take     an update in float32 read from its bytes, checked as the validator does, and added to a running weighted mean

CPU seconds of one thread, median of nine; 16 layers of 64 experts, seed 0. A line through the sizes gives seconds per client and
per MB. Below it: hours of a round with so many clients, of the server's CPU and of a line of 10 Gbit/s, with updates of 235 MB,
OLMoE-1B-7B's at rank 8. What Flower's own servers add is in bench/flower.py.

python bench/server_cost.py [--out FILE]    prints, and writes bench/results/server_cost.json; a minute
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from replies import an_update

from ubsmoe.client.allocator import keep_freed_memory
from ubsmoe.maths.means import WeightedMean
from ubsmoe.server.update_checks import check_update
from ubsmoe.wire.codec import decode_update, encode_task, encode_update
from ubsmoe.wire.packed import MAX_MESSAGE_BYTES

RESULT = Path(__file__).resolve().parent / "results" / "server_cost.json"
WIDTHS, REPEATS, MB, CLIENTS, GIGABIT = (20, 512, 1792), 9, 1e6, (100, 10_000, 100_000), 10


def median_seconds(work: Callable[[], object]) -> float:
    found = []
    for _ in range(REPEATS):
        began = time.process_time()
        work()
        found.append(time.process_time() - began)
    return statistics.median(found)


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--out", type=Path, default=RESULT)
    asked = arguments.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    rows = []
    for width in WIDTHS:
        update, task, form = an_update(width)
        packed, mean = encode_update(update, task.payload), WeightedMean()

        def take() -> None:
            read = decode_update(packed, MAX_MESSAGE_BYTES, task.payload, form, "float32")  # noqa: B023
            check_update(read, task, form, max_change=1.0, run=(task.profile.top_k,), most_tokens=10_000)  # noqa: B023
            mean.add(read.adapters, read.num_examples)  # noqa: B023

        send = median_seconds(lambda: encode_task(task))  # noqa: B023
        rows.append({"mb": len(packed.tensors) / MB, "send": send, "take": median_seconds(take)})
        print("  ".join(f"{name} {value:.4f}" for name, value in rows[-1].items()), flush=True)
    line = statistics.linear_regression([row["mb"] for row in rows], [row["take"] for row in rows])
    print(f"a client: {line.intercept * 1e3:.1f} ms + {line.slope * 1e3:.2f} ms per MB")
    large, hours = rows[-1], []
    for clients in CLIENTS:
        cpu, wire = clients * large["take"] / 3600, clients * large["mb"] * MB * 8 / (GIGABIT * 1e9) / 3600
        hours.append({"clients": clients, "cpu_hours": cpu, "wire_hours_each_way": wire})
        print(f"{clients:>7} clients: {cpu:.2f} hours of CPU, {wire:.2f} hours of the line each way", flush=True)
    record = {"rows": rows, "seconds_per_client": line.intercept, "seconds_per_mb": line.slope, "rounds": hours}
    asked.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
