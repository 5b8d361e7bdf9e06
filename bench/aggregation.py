"""How much faster is the low-rank route to an aggregate than a dense SVD of the formed sum, and what does it hold?

    python bench/aggregation.py --quick     one 2048 x 1024 matrix under three stacks of clients, one layer of OLMoE
    python bench/aggregation.py             the same with more repeats, and all 16 layers (needs about 8 GB)

Claims: on one thread at least 100 times faster at R = 40 and 50 times at R = 160, with a relative error of at most
1e-5 (a second thread helps the dense route more: 45 times were seen at R = 160); an aggregation of OLMoE-1B-7B's
size, on all cores, holds less than 3 times the adapters' own size. The table goes to stdout, the record
to bench/results/aggregation.json.
"""

import argparse
import json
import platform
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from ubsmoe.client.allocator import keep_freed_memory
from ubsmoe.maths.lora import LoraPair
from ubsmoe.maths.spectra import truncated_svd

ROWS, COLUMNS = 2048, 1024
STACKS = {40: (4, 8, 12, 16), 120: (8, 16, 32, 64), 160: (64, 32, 16, 16, 8, 8, 4, 4, 4, 4)}
CLAIMED_SPEEDUP = {40: 100.0, 160: 50.0}
CLAIMED_ERROR = 1e-5
CLAIMED_MEMORY = 3.0

# OLMoE-1B-7B has 16 layers of 64 experts with three matrices each, [out, in]
LAYERS, EXPERTS = 16, 64
PROJECTIONS = {"gate": (1024, 2048), "up": (1024, 2048), "down": (2048, 1024)}
CLIENT_RANKS = (4, 8, 16, 32, 4, 8, 16, 32)
ALPHA = 16.0
RESULTS = Path(__file__).parent / "results" / "aggregation.json"


def draw_pair(experts: int, shape: tuple[int, int], rank: int, generator: torch.Generator) -> LoraPair:
    """A random client's fused factors in float32."""
    a = torch.randn(experts, rank, shape[1], generator=generator)
    return LoraPair(a=a, b=torch.randn(experts, shape[0], rank, generator=generator), scale=ALPHA / rank)


def dense_route(pairs: list[LoraPair], weights: list[float], rank: int, dtype: torch.dtype = torch.float32) -> LoraPair:
    """The straightforward way: form the sum, decompose all of it, keep the top."""
    total = torch.zeros(ROWS, COLUMNS, dtype=dtype)
    for pair, weight in zip(pairs, weights, strict=True):
        total.addmm_(pair.b[0].to(dtype), pair.a[0].to(dtype), alpha=weight * pair.scale)
    u, s, vt = torch.linalg.svd(total, full_matrices=False)
    return LoraPair(a=vt[None, :rank], b=(u[:, :rank] * s[:rank])[None])


def one_matrix(stacked: int, dense_repeats: int, our_repeats: int) -> dict[str, Any]:
    """Both routes to the rank-max(r_k) aggregate of one matrix, interleaved, and both errors against float64."""
    ranks, generator = STACKS[stacked], torch.Generator().manual_seed(stacked)
    pairs = [draw_pair(1, (ROWS, COLUMNS), rank, generator) for rank in ranks]
    weights = [1 / len(ranks)] * len(ranks)
    rank = max(ranks)
    routes: dict[str, Callable[[], LoraPair]] = {
        "dense": lambda: dense_route(pairs, weights, rank),
        "ours": lambda: truncated_svd(pairs, weights, rank).pair,
    }
    seconds: dict[str, list[float]] = {name: [] for name in routes}
    routes["ours"]()  # warm up; the first LAPACK call loads the library
    for _ in range(dense_repeats):
        for name, repeats in (("dense", 1), ("ours", our_repeats)):
            seconds[name] += [timed(routes[name]) for _ in range(repeats)]
    exact = dense_route(pairs, weights, rank, torch.float64).product()
    record: dict[str, Any] = {"R": stacked, "client_ranks": ranks, "kept_rank": rank}
    for name, route in routes.items():
        record[name] = spread(seconds[name])
        record[name]["relative_error"] = float((route().product() - exact).norm() / exact.norm())
    record["speedup"] = record["dense"]["median_seconds"] / record["ours"]["median_seconds"]
    return record


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def spread(seconds: list[float]) -> dict[str, Any]:
    low, _, high = statistics.quantiles(seconds, n=4)
    return {"median_seconds": statistics.median(seconds), "quartiles": [low, high], "repeats": len(seconds)}


def whole_model(layers: int, threads: int) -> dict[str, Any]:
    """Aggregate 8 clients' expert adapters to rank 32, everything in memory at once: run it in a process of its own.

    `held_bytes` is the growth of the process's peak resident size from before the adapters were drawn to the end: the
    adapters of all clients, the aggregate of all layers, and whatever the aggregation needed in between.
    """
    torch.set_num_threads(threads)
    keep_freed_memory()
    truncated_svd([draw_pair(1, (64, 32), 4, torch.Generator())], [1.0])  # loads LAPACK, which is not ours to count
    before, generator = peak_bytes(), torch.Generator().manual_seed(0)
    clients = [
        {
            (layer, name): draw_pair(EXPERTS, shape, rank, generator)
            for layer in range(layers)
            for name, shape in PROJECTIONS.items()
        }
        for rank in CLIENT_RANKS
    ]
    adapters = sum(pair.a.nbytes + pair.b.nbytes for client in clients for pair in client.values())
    weights, result, start = [1 / len(clients)] * len(clients), {}, time.perf_counter()
    for key in clients[0]:
        result[key] = truncated_svd([client[key] for client in clients], weights, rank=max(CLIENT_RANKS)).pair
    seconds, held = time.perf_counter() - start, peak_bytes() - before
    return {
        "threads": threads,
        "layers": layers,
        "matrices": layers * EXPERTS * len(PROJECTIONS),
        "clients": len(clients),
        "client_ranks": CLIENT_RANKS,
        "dtype": "float32",
        "seconds": seconds,
        "adapters_bytes": adapters,
        "result_bytes": sum(pair.a.nbytes + pair.b.nbytes for pair in result.values()),
        "held_bytes": held,
        "held_over_adapters": held / adapters,
    }


def peak_bytes() -> int:
    """The process's peak resident size (kilobytes on Linux, bytes on macOS)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def machine(threads: int) -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": len(names) or None,
        "threads": threads,
        "load_at_start": load_average(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def load_average() -> float | None:
    file = Path("/proc/loadavg")
    return float(file.read_text().split()[0]) if file.exists() else None


def print_table(matrices: list[dict[str, Any]], model: dict[str, Any]) -> None:
    print("   R   dense ms   ours ms      (quartiles)   faster  our error  dense error")
    for row in matrices:
        low, high = (1e3 * q for q in row["ours"]["quartiles"])
        print(
            f"{row['R']:>4} {1e3 * row['dense']['median_seconds']:>10.1f} {1e3 * row['ours']['median_seconds']:>9.2f} "
            f"{f'({low:.2f}-{high:.2f})':>16} {row['speedup']:>7.0f}x {row['ours']['relative_error']:>10.1e} "
            f"{row['dense']['relative_error']:>12.1e}"
        )
    print(
        f"OLMoE-1B-7B, {model['layers']} layer(s), {model['matrices']} matrices, {model['clients']} clients: "
        f"{model['seconds']:.1f} s; adapters {model['adapters_bytes'] / 1e9:.2f} GB, aggregate "
        f"{model['result_bytes'] / 1e9:.2f} GB, held {model['held_over_adapters']:.2f} x the adapters"
    )


def broken_claims(matrices: list[dict[str, Any]], model: dict[str, Any]) -> list[str]:
    broken = [
        f"R = {row['R']}: {row['speedup']:.0f}x, claimed {CLAIMED_SPEEDUP[row['R']]:.0f}x"
        for row in matrices
        if row["speedup"] < CLAIMED_SPEEDUP.get(row["R"], 0)
    ]
    broken += [
        f"R = {row['R']}: error above {CLAIMED_ERROR}"
        for row in matrices
        if row["ours"]["relative_error"] > CLAIMED_ERROR
    ]
    if model["held_over_adapters"] >= CLAIMED_MEMORY:
        broken.append(f"memory: {model['held_over_adapters']:.2f} x the adapters, claimed {CLAIMED_MEMORY}")
    return broken


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repeats and one layer; under 30 seconds")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of both routes on one matrix")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the record goes (default: %(default)s)")
    options = parser.parse_args()
    all_cores = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as `ubsmoe run` does; both routes gain
    facts = machine(options.threads)
    matrices = [one_matrix(stacked, *((3, 10) if options.quick else (9, 20))) for stacked in STACKS]
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as process:
        model = process.submit(whole_model, 1 if options.quick else LAYERS, all_cores).result()
    broken = broken_claims(matrices, model)
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "mode": "quick" if options.quick else "full",
        "machine": facts,
        "one_matrix": matrices,
        "whole_model": model,
        "broken_claims": broken,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print_table(matrices, model)
    print("claims hold" if not broken else "claims broken: " + "; ".join(broken))
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
