"""What a step holds on a CPU, beside what `ubsmoe plan` counts: OLMoE-1B-7B's shape, by format, K, batch and rank.

Random weights (big_base.py's checkpoint), mapped; a client's process trains six steps of random tokens, all labelled. Its own
memory is sampled every 5 ms; the plan's is that of python and its libraries, and `own_memory_bytes` without the task, which a run
alone holds. "over" is measured over planned. Seed 0, one thread; needs 33 GB of disk in --folder, and bitsandbytes for its NF4.

python bench/step_memory.py [--folder DIR] [--layers N] [--out FILE]    half an hour; writes bench/results/step_memory.json
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from big_base import SEED, make_checkpoint, status

from ubsmoe.client.allocator import keep_freed_memory
from ubsmoe.config import ModelSettings
from ubsmoe.costs.memory import own_memory_bytes
from ubsmoe.costs.workload import Batch, Workload
from ubsmoe.model.load import load_base
from ubsmoe.model.presets import model_shape
from ubsmoe.plan.devices import RUNTIME_BYTES

RESULT = Path(__file__).resolve().parent / "results" / "step_memory.json"
STEPS, LENGTH = 6, 128
CASES = [(2, 1, 8), (1, 1, 8), (8, 1, 8), (2, 1, 32), (2, 4, 8), (1, 4, 8), (8, 4, 8), (2, 8, 8), (2, 16, 8)]
"""K, sequences and rank."""


def measured(folder: str, format: str, top_k: int, rows: int, rank: int) -> dict[str, float]:
    """One row, in this process."""
    peak = [0.0]

    def watch() -> None:
        while True:
            peak[0] = max(peak[0], status(os.getpid())["own_gb"])
            time.sleep(0.005)

    threading.Thread(target=watch, daemon=True).start()
    experts = None if format == "bf16" else format
    sparse, _ = load_base(ModelSettings(base=folder, dtype="bfloat16", experts=experts))
    keep_freed_memory()
    generator = torch.Generator().manual_seed(SEED)
    sparse.load_adapter(sparse.fresh_adapter(rank, generator, shared_a=True), alpha=2 * rank)
    sparse.set_top_k(top_k)
    optimizer = torch.optim.AdamW(sparse.adapter.values(), lr=2e-3, fused=True)
    ids = torch.randint(10, sparse.model.config.vocab_size, (rows, LENGTH), generator=generator)
    began = time.process_time()
    for _ in range(STEPS):
        optimizer.zero_grad()
        logits = sparse.logits_at(ids, torch.ones_like(ids), torch.ones_like(ids[:, :-1], dtype=torch.bool))
        torch.nn.functional.cross_entropy(logits.float(), ids[:, 1:].reshape(-1)).backward()
        del logits
        optimizer.step()
    workload = Workload(rank, Batch.full(rows, LENGTH), dtype_bytes=2, experts=experts)
    shape = model_shape(folder)
    adapter = 4 * shape.trained_elements(rank, workload.trained)
    planned = (RUNTIME_BYTES + own_memory_bytes(shape, top_k, workload) - adapter) / 1e9
    seconds = (time.process_time() - began) / STEPS
    return {"own_gb": peak[0], "planned_gb": round(planned, 2), "over": round(peak[0] / planned, 3), "seconds": seconds}


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--folder", type=Path)
    arguments.add_argument("--layers", type=int, default=16)
    arguments.add_argument("--out", type=Path, default=RESULT)
    arguments.add_argument("--one", nargs=5)
    asked = arguments.parse_args()
    if asked.one:
        folder, format, *numbers = asked.one
        return print(json.dumps(measured(folder, format, *map(int, numbers))))
    place = Path(tempfile.mkdtemp(dir=asked.folder, prefix="step-memory-"))
    os.environ["HF_HOME"] = str(place / "cache")
    rows: list[dict[str, Any]] = []
    try:
        make_checkpoint(place, asked.layers)
        for format in ("bf16", "nf4"):
            prepare = [sys.executable, "-m", "ubsmoe", "base", "prepare", place, "--set", "model.dtype=bfloat16"]
            prepare += ["--set", f"model.experts={format}"] if format != "bf16" else []
            subprocess.run([str(one) for one in prepare], check=True)
            for top_k, sequences, rank in CASES:
                command = [sys.executable, __file__, "--one", place, format, top_k, sequences, rank]
                out = subprocess.run(
                    [str(one) for one in command], check=True, stdout=subprocess.PIPE, text=True
                ).stdout
                row = {"experts": format, "top_k": top_k, "tokens": sequences * LENGTH, "rank": rank}
                rows.append(row | json.loads(out.splitlines()[-1]))
                print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
                asked.out.write_text(json.dumps(rows, indent=1) + "\n")
    finally:
        shutil.rmtree(place)


if __name__ == "__main__":
    main()
