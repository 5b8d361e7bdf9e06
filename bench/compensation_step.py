"""What a compensation costs: a client's step at K = 1 with it over one without, side by side, and the fit's own time and memory.

    without     tiers.rescale = "none": the router takes K experts, nothing stands for the others
    map, r=64   and with two slices to an expert
    stand-ins   r=64, at the study's width alone: at OLMoE's they cost a quarter of the step, and minutes to fit

One layer at OLMoE-1B-7B's width (hidden 2048, 64 experts of 1024, K_max 8) and one at the study base's; random weights, LoRA of
rank 8 on every expert, labels everywhere. A step is zero_grad, forward, loss, backward, and fused AdamW. Its input carries a
gradient, as that of every layer but the first does. All ways see the same batches and take turns step by step in one process, on
one thread; seconds are CPU time, ratios medians of those of single turns.

The fit is one layer's, at K = 1, map of r = 64 on 4,096 tokens; `fit_mib` is the highest private memory above that before it.

python bench/compensation_step.py [--turns 15] [--out FILE]     prints a table, writes bench/results/compensation_step.json
"""

import argparse
import json
import statistics
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from memory import private_peak
from torch import Tensor
from transformers import OlmoeConfig, OlmoeForCausalLM

from ubsmoe.client.allocator import keep_freed_memory
from ubsmoe.client.train import language_loss
from ubsmoe.costs.compensation import Skipped
from ubsmoe.costs.flops import batch_flops
from ubsmoe.costs.workload import Batch, Workload
from ubsmoe.model.compensation_fit import FormSettings, fit_compensation
from ubsmoe.model.presets import shape_from_config
from ubsmoe.model.surgery import SparseModel

RESULT = Path(__file__).resolve().parent / "results" / "compensation_step.json"
VOCAB, RANK, LENGTH, K_MAX = 1024, 8, 128, 8
WIDTHS = {"olmoe": (2048, 1024, 64, 16), "study": (128, 128, 32, 4)}  # hidden, expert, experts, heads
ROWS = {"olmoe": (4,), "study": (12,)}
WAYS = {
    "map, r=64": FormSettings(rank=64),
    "map, r=64, two slices": FormSettings(rank=64, slices=2),
    "stand-ins, r=64": FormSettings(form="stand_ins", rank=64),
}


def config_of(width: str) -> OlmoeConfig:
    hidden, expert, experts, heads = WIDTHS[width]
    return OlmoeConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=expert,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        num_experts=experts,
        num_experts_per_tok=K_MAX,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
    )


def one_layer(width: str) -> SparseModel:
    """Random weights, an adapter in place, the input's gradient asked for."""
    torch.manual_seed(0)
    model = SparseModel(OlmoeForCausalLM(config_of(width)).eval())
    model.load_adapter(model.fresh_adapter(RANK, torch.Generator().manual_seed(0), shared_a=True), 16.0)
    model.model.get_input_embeddings().weight.requires_grad_()
    return model


def batch_of(rows: int, generator: torch.Generator) -> dict[str, Tensor]:
    ids = torch.randint(2, VOCAB, (rows, LENGTH), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def use(model: SparseModel, tensors: Mapping[str, Tensor] | None) -> None:
    """One way: its compensation in place, or none at all."""
    if tensors is None:
        for layer in model.layers:
            layer.routing = replace(layer.routing, compensation=None)
    else:
        model.set_compensation(tensors)
    model.set_top_k(1)


def fitted(width: str, form: FormSettings) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The tensors, and what fitting them took."""
    model, generator = one_layer(width), torch.Generator().manual_seed(1)
    text = {n: v for n, v in batch_of(form.tokens // LENGTH, generator).items() if n != "labels"}
    found: dict[str, float] = {}
    began = time.process_time()
    with private_peak(found):
        tensors = fit_compensation(model, text, [1], form).tensors
    return tensors, {"fit_seconds": time.process_time() - began, "fit_mib": 1e9 * found["private_peak_gb"] / 2**20}


def measure(width: str, rows: int, turns: int, forms: Mapping[str, dict[str, Tensor]]) -> dict[str, dict[str, float]]:
    """Median seconds of a step of each way, and of its ratio to `without` in the same turn."""
    model, generator = one_layer(width), torch.Generator().manual_seed(2)
    optimizer = torch.optim.AdamW(model.adapter.values(), 1e-3, fused=True)
    ways: dict[str, dict[str, Tensor] | None] = {"without": None, **forms}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(turns + 2):
        batch = batch_of(rows, generator)
        for name, tensors in ways.items():
            use(model, tensors)
            began = time.process_time()
            optimizer.zero_grad(set_to_none=True)
            language_loss(model, batch).backward()
            optimizer.step()
            if turn >= 2:
                seconds[name].append(time.process_time() - began)
    ratios = {name: [a / b for a, b in zip(own, seconds["without"], strict=True)] for name, own in seconds.items()}
    return {
        name: {"seconds": statistics.median(own), "ratio": statistics.median(ratios[name])}
        for name, own in seconds.items()
    }


def flops(width: str, rows: int, form: FormSettings | None) -> float:
    """Computed FLOPs of a step of the layer, without a head."""
    skipped = Skipped(form.form, form.rank, form.slices, K_MAX) if form else None
    shape = replace(shape_from_config(config_of(width)), vocab=1)
    return batch_flops(shape, 1, Workload(RANK, Batch.full(rows, LENGTH), skipped=skipped))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--widths", nargs="+", default=list(WIDTHS))
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tried = [(width, name) for width in args.widths for name in WAYS if width == "study" or WAYS[name].form == "map"]
    fits = {
        way: fitted(way[0], WAYS[way[1]]) for way in tried
    }  # before freed memory is kept, which would hide its peak
    keep_freed_memory()
    results: list[dict[str, Any]] = []
    for width in args.widths:
        forms = {name: tensors for (own, name), (tensors, _) in fits.items() if own == width}
        for rows in ROWS[width]:
            for name, found in measure(width, rows, args.turns, forms).items():
                row: dict[str, Any] = {"width": width, "tokens": rows * LENGTH, "way": name, **found}
                if name in forms:
                    more = 100 * (flops(width, rows, WAYS[name]) / flops(width, rows, None) - 1)
                    size = sum(tensor.nbytes for tensor in forms[name].values())
                    row |= {"flops_percent": more, "bytes": size, **fits[width, name][1]}
                results.append({key: round(one, 4) if isinstance(one, float) else one for key, one in row.items()})
                print(*results[-1].values(), sep="  ", flush=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
