"""What a pseudo-gradient adds to a client's step, by mode: the same model, the same fresh batches, in turns.

`client_mean` and `self_ipw` promise at most 5 %: they add sums over routing weights and one pass over the gradients.
`sampled` computes a fraction q of the missing assignments, so the share of FLOPs that it adds is printed beside its time.

python bench/pg_price.py [--quick] [--out FILE]    prints a table, writes bench/results/pg_price.json
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from client_step import LENGTH, RANK, SEED, Batch, Step, fresh_batch, olmoe_config, olmoe_shaped

from ubsmoe.client.allocator import keep_freed_memory
from ubsmoe.client.train import language_loss
from ubsmoe.costs.flops import backward_flops_per_token, forward_flops_per_token, pseudo_gradient_flops_per_token
from ubsmoe.costs.workload import Batch as BatchShape
from ubsmoe.costs.workload import Workload
from ubsmoe.messages import Profile
from ubsmoe.methods import build
from ubsmoe.methods.method import RunShape
from ubsmoe.model.presets import shape_from_config
from ubsmoe.model.surgery import SparseModel

RESULT = Path(__file__).resolve().parent / "results" / "pg_price.json"
MODES = ("off", "client_mean", "self_ipw", "sampled")
TOP_K, FRACTION = 2, 0.1


def stepper(mode: str) -> Step:
    """A client's step under UB-SMoE with this mode, DMR on, as client.py takes it."""
    model = SparseModel(olmoe_shaped())
    shape = RunShape(len(model.layers), model.num_experts, model.k_max, RANK, alpha=16.0)
    method = build("ubsmoe", shape, {"pg": {"mode": mode, "fraction": FRACTION}})
    adapter = model.fresh_adapter(RANK, torch.Generator().manual_seed(SEED), shared_a=True)
    profile = Profile("client-0", tier=0, budget=TOP_K / model.k_max, top_k=TOP_K, rank=RANK)
    payload = method.dispatch(method.start(adapter), profile)
    hooks = method.install(model, payload, profile, torch.Generator().manual_seed(SEED))
    optimizer = torch.optim.AdamW(model.adapter.values(), 1e-3, fused=True)

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        with model.counting():
            language_loss(model, batch).backward()
        for act in hooks.before_step:
            act()
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="batch 1 only, few steps")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    shape = shape_from_config(olmoe_config("full"))
    workload = Workload(RANK, BatchShape.full(1, LENGTH), pair_fraction=FRACTION)
    plain = sum(flops(shape, TOP_K, workload).total for flops in (forward_flops_per_token, backward_flops_per_token))
    promised = pseudo_gradient_flops_per_token(shape, TOP_K, workload) / plain
    steps, rows = {mode: stepper(mode) for mode in MODES}, []
    print(f"K={TOP_K}: time added to a step without pseudo-gradient, median of paired steps (quartiles)")
    for size, repeats in ((1, 9),) if options.quick else ((1, 30), (8, 15)):
        generator = torch.Generator().manual_seed(SEED)
        times: dict[str, list[float]] = {mode: [] for mode in MODES}
        for repeat in range(repeats + 2):
            batch = fresh_batch(size, generator)
            for mode, step in steps.items():
                began = time.process_time()
                step(batch)
                if repeat >= 2:  # the first two warm up
                    times[mode].append((time.process_time() - began) * 1e3)
        for mode in MODES[1:]:
            added = [with_it / without - 1 for with_it, without in zip(times[mode], times["off"], strict=True)]
            low, middle, high = statistics.quantiles(added, n=4)
            row = {
                "batch": size,
                "mode": mode,
                "off_ms": statistics.median(times["off"]),
                "added": middle,
                "q1": low,
                "q3": high,
            }
            rows.append(row | {"added_flops": promised if mode == "sampled" else 0.0})
            said = f", FLOPs {promised:+.0%}" if mode == "sampled" else ""
            print(f"batch {size}  {mode:<12} {middle:+7.1%} ({low:+.1%} to {high:+.1%}){said}", flush=True)
    facts = {"seed": SEED, "threads": 1, "quick": options.quick, "top_k": TOP_K, "fraction": FRACTION, "rows": rows}
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
