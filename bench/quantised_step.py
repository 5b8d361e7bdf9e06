"""What dequantising costs: one layer's experts at OLMoE's width, forward and backward with LoRA, bfloat16 against int8 and NF4.

64 experts, hidden 2048, width 1024, rank 8, rows of 128 tokens; one thread, CPU time. In each of five turns every format computes
the same batch; "over" is the median of a format's ratio to bfloat16 within a turn, with the smallest and the largest.
NF4 is measured by bitsandbytes, where it is installed, and by the plain version in maths/nf4.py.

python bench/quantised_step.py [--out FILE]    prints a table, writes bench/results/quantised_step.json
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

from ubsmoe.client.allocator import keep_freed_memory
from ubsmoe.model import quantised
from ubsmoe.model.expert_weights import ExpertWeights, Lora, matrix_names
from ubsmoe.model.kernel import run_assignments

RESULT = Path(__file__).resolve().parent / "results" / "quantised_step.json"
EXPERTS, HIDDEN, WIDTH, RANK, LENGTH, REPEATS = 64, 2048, 1024, 8, 128, 5


def experts(format: Any) -> ExpertWeights:
    config = SimpleNamespace(num_local_experts=EXPERTS, hidden_size=HIDDEN, intermediate_size=WIDTH, hidden_act="silu")
    module: Any = OlmoeExperts(config).to(torch.bfloat16).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for weight in module.parameters():
        weight.normal_(0, 0.02, generator=generator)
    if format:
        quantised.quantise_in_place(module, matrix_names(module), format)
    return ExpertWeights.of(module)


def seconds(base: ExpertWeights, lora: Lora, rows: int, top_k: int, seed: int) -> float:
    """CPU seconds of one forward and backward pass."""
    generator = torch.Generator().manual_seed(seed)
    tokens = rows * LENGTH
    hidden = torch.randn(tokens, HIDDEN, generator=generator).to(torch.bfloat16).requires_grad_()
    choice = torch.rand(tokens, EXPERTS, generator=generator).topk(top_k, dim=-1)
    token, weight = torch.arange(tokens).repeat_interleave(top_k), choice.values.reshape(-1).requires_grad_()
    began = time.process_time()
    run_assignments(hidden, token, choice.indices.reshape(-1), weight, base, lora).sum().backward()
    return time.process_time() - began


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--out", type=Path, default=RESULT)
    asked = arguments.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    generator = torch.Generator().manual_seed(1)
    shapes = (RANK, HIDDEN), (2 * WIDTH, RANK), (RANK, WIDTH), (HIDDEN, RANK)
    lora = Lora(
        *(torch.randn(EXPERTS, *shape, generator=generator).mul_(0.02).requires_grad_() for shape in shapes), scale=2.0
    )
    has_fast = quantised._has_bitsandbytes()
    ways: dict[str, tuple[Any, bool]] = {"bf16": (None, False), "int8": ("int8", False), "nf4 plain": ("nf4", False)}
    ways |= {"nf4": ("nf4", True)} if has_fast else {}
    bases = {name: experts(format) for name, (format, _) in ways.items()}
    found = []
    for rows in (1, 8):
        for top_k in (8, 2, 1):
            times: dict[str, list[float]] = {name: [] for name in ways}
            for repeat in range(REPEATS + 1):
                for name, (_, fast) in ways.items():
                    quantised._has_bitsandbytes = lambda fast=fast: fast
                    times[name].append(seconds(bases[name], lora, rows, top_k, repeat))
            medians = {name: round(statistics.median(many[1:]), 4) for name, many in times.items()}
            over = {name: spread(many[1:], times["bf16"][1:]) for name, many in times.items() if name != "bf16"}
            found.append({"rows": rows, "top_k": top_k, "seconds": medians, "over_bf16": over})
            words = "  ".join(f"{n} x{v} ({low}-{high})" for n, (v, low, high) in over.items())
            print(f"batch {rows}  K {top_k}  bf16 {medians['bf16']:.3f} s  {words}", flush=True)
            asked.out.write_text(json.dumps(found, indent=2))


def spread(many: list[float], plain: list[float]) -> tuple[float, float, float]:
    """Median, smallest and largest ratio of two series."""
    ratios = [one / other for one, other in zip(many, plain, strict=True)]
    return round(statistics.median(ratios), 2), round(min(ratios), 2), round(max(ratios), 2)


if __name__ == "__main__":
    main()
