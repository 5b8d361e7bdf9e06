"""One client step against PEFT's and against the frozen stock model: time, by K and batch, and peak memory.

    ours     SparseModel with LoRA on all experts and counting, as a client trains
    peft     transformers + PEFT `target_parameters` on the fused experts, experts by grouped_mm (its fastest way)
    frozen   stock transformers, nothing trained, gradient by the inputs alone: what one pays without any adapter

A step is zero_grad, forward, loss on every position, backward, and AdamW (but for `frozen`, which has nothing to step). All see
the same weights, the same fresh batches, and take turns within a step, so that a busy machine slows them alike.

python bench/client_step.py [--quick]    prints tables, writes bench/results/client_step.json
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import OlmoeConfig, OlmoeForCausalLM

from ubsmoe.allocator import keep_freed_memory
from ubsmoe.client import language_loss
from ubsmoe.maths.costs import backward_flops_per_token, forward_flops_per_token
from ubsmoe.model.presets import shape_from_config
from ubsmoe.model.surgery import SparseModel

RESULTS = Path(__file__).resolve().parent / "results"
SEED, RANK, LENGTH, VOCAB = 0, 8, 128, 1024
TOP_KS, BATCHES = (8, 2, 1), (8, 1)
Batch = dict[str, torch.Tensor]
Step = Callable[[Batch], None]


def olmoe_shaped() -> OlmoeForCausalLM:
    """OLMoE's architecture, small: 4 layers, hidden 256, 32 experts of width 256, K_max 8."""
    torch.manual_seed(SEED)
    config = OlmoeConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_experts=32,
        num_experts_per_tok=8,
        max_position_embeddings=LENGTH,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
    )
    return OlmoeForCausalLM(config).eval()


def fresh_batch(size: int, generator: torch.Generator) -> Batch:
    """Random tokens, no padding, a label everywhere."""
    ids = torch.randint(2, VOCAB, (size, LENGTH), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def ours(top_k: int) -> Step:
    model = SparseModel(olmoe_shaped())
    model.load_adapter(model.fresh_adapter(RANK, torch.Generator().manual_seed(SEED), shared_a=True), alpha=16.0)
    model.set_top_k(top_k)
    optimizer = torch.optim.AdamW(model.adapter.values(), 1e-3)

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        with model.counting():
            language_loss(model, batch).backward()
        optimizer.step()

    return step


def peft(top_k: int) -> Step:
    model = olmoe_shaped()
    model.set_experts_implementation("grouped_mm")
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    tuned = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=16, target_modules=[], target_parameters=targets))
    _set_top_k(model, top_k)
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], 1e-3)

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        tuned(**batch, use_cache=False).loss.backward()
        optimizer.step()

    return step


def frozen(top_k: int) -> Step:
    model = olmoe_shaped().requires_grad_(False)
    model.set_experts_implementation("grouped_mm")
    _set_top_k(model, top_k)

    def step(batch: Batch) -> None:
        inputs = model.get_input_embeddings()(batch["input_ids"]).requires_grad_()
        rest = {name: value for name, value in batch.items() if name != "input_ids"}
        model(inputs_embeds=inputs, **rest, use_cache=False).loss.backward()

    return step


def _set_top_k(model: Any, top_k: int) -> None:
    for layer in model.model.layers:
        layer.mlp.gate.top_k = top_k


WAYS: dict[str, Callable[[int], Step]] = {"ours": ours, "peft": peft, "frozen": frozen}


def interleaved(steps: dict[str, Step], size: int, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each step on the same fresh batches, in turns, after two rounds of warming up."""
    generator = torch.Generator().manual_seed(SEED)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 2):
        batch = fresh_batch(size, generator)
        for name, step in steps.items():
            began = time.perf_counter()
            step(batch)
            if repeat >= 2:
                times[name].append((time.perf_counter() - began) * 1e3)
    return times


def summary(times: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(times, n=4)
    return {"median": round(middle, 2), "q1": round(low, 2), "q3": round(high, 2)}


def step_times(repeats: int) -> list[dict[str, Any]]:
    """One row per batch size and K."""
    shape, rows = shape_from_config(olmoe_shaped().config), []
    for size in BATCHES:
        for top_k in TOP_KS:
            steps = {name: way(top_k) for name, way in WAYS.items()}
            times = interleaved(steps, size, repeats if size > 1 else 3 * repeats)
            flops = forward_flops_per_token(shape, top_k, RANK, LENGTH).total
            flops += backward_flops_per_token(shape, top_k, RANK, LENGTH).total
            rows.append({"batch": size, "top_k": top_k, "mflops_per_token": flops / 1e6})
            rows[-1] |= {name: summary(values) for name, values in times.items()}
    return rows


def peak_memory(way: str, top_k: int) -> float:
    """MiB that three steps at batch 8 add to what the loaded model already takes, in a process of its own."""
    command = [sys.executable, __file__, "--memory", way, str(top_k)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure_memory(way: str, top_k: int) -> None:
    """Print that number. ru_maxrss (KiB) has also seen the model being built, so this can only be too large."""
    step, generator = WAYS[way](top_k), torch.Generator().manual_seed(SEED)
    loaded = resident_kib()
    for _ in range(3):
        step(fresh_batch(8, generator))
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - loaded) / 1024)


def resident_kib() -> int:
    """What the process holds now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1])
    raise OSError("no VmRSS in /proc/self/status")


def main() -> None:
    torch.set_num_threads(1)
    if "--memory" in sys.argv:
        return measure_memory(sys.argv[2], int(sys.argv[3]))
    quick = "--quick" in sys.argv
    memory = {f"K={k}": {way: peak_memory(way, k) for way in ("ours", "peft")} for k in TOP_KS[: 1 if quick else None]}
    keep_freed_memory()
    rows = step_times(3 if quick else 9)
    print("batch  K   ours ms (quartiles)      peft   frozen   peft/ours   frozen/ours   time/K=8   FLOPs/K=8")
    for row in rows:
        top = next(other for other in rows if other["batch"] == row["batch"])
        mine = row["ours"]["median"]
        print(
            f"{row['batch']:>5} {row['top_k']:>2} {mine:9.1f} ({row['ours']['q1']:.1f}-{row['ours']['q3']:.1f})"
            f" {row['peft']['median']:12.1f} {row['frozen']['median']:8.1f} {row['peft']['median'] / mine:10.2f}"
            f" {row['frozen']['median'] / mine:12.2f} {mine / top['ours']['median']:12.2f}"
            f" {row['mflops_per_token'] / top['mflops_per_token']:10.2f}"
        )
    for name, value in memory.items():
        ratio = value["ours"] / value["peft"]
        print(
            f"peak memory of a step at batch 8, {name}: ours {value['ours']:.0f} MiB, peft {value['peft']:.0f}, {ratio:.2f}"
        )
    facts = {
        "seed": SEED,
        "threads": 1,
        "torch": torch.__version__,
        "quick": quick,
        "steps": rows,
        "memory_mib": memory,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "client_step.json").write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
