"""One client step against PEFT's and against the frozen stock model: time by K and batch, and peak memory.

    ours      SparseModel with LoRA on all experts and counting, as a client trains; freed memory is kept, as the program does
    peft      transformers + PEFT `target_parameters` on the fused experts, experts by grouped_mm (its fastest way), as it comes
    frozen    stock transformers, nothing trained, gradient by the inputs alone: what one pays without any adapter
    rest      ours with experts that do nothing: attention, norms, routers, head, which no kernel for experts can shorten
    ... kept  peft and frozen with our allocator setting, which they do not have of their own: what the kernel alone is worth

What no kernel for experts can go below is therefore `rest` and the frozen experts' bare matrix products (experts_efficiency.py),
without LoRA or any sorting: PEFT's time over that sum is the most that could be reached, the table's `limit` (`full` only).

Two kinds of batches, a table each:

    full      random tokens, 128 a row, no padding, a label on every position: all there is to compute is asked for
    answers   fresh questions of the shipped world in LLM-Adapters' template, as a client gets them: 120 to 154 tokens a row, padded
              on the right, labels on the answer alone. We skip what no label reads; PEFT as its users run it does not

With --records, a third: the same from any file of records, such as one that `ubsmoe data commonsense` wrote.

A step is zero_grad, forward, loss, backward, and fused AdamW (but for `frozen`, which has nothing to step).
Each way has a process of its own, one thread; all see the same weights and the same fresh batches, and take turns step by step.
Times are the process's CPU time, so that other work on the machine counts as little as possible; wall time is in the JSON.

Beside it, in the same run: the expert part's FLOP/s over those of bare matrix products of its shapes (experts_efficiency.py).

python bench/client_step.py [--quick] [--records FILE] [--out FILE]    prints tables, writes bench/results/client_step.json
"""

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from experts_efficiency import efficiency
from torch import Tensor
from transformers import OlmoeConfig, OlmoeForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ubsmoe.client.allocator import keep_freed_memory
from ubsmoe.client.train import language_loss
from ubsmoe.config import parse_run
from ubsmoe.costs import workload
from ubsmoe.costs.flops import batch_flops
from ubsmoe.data.sources import load_training
from ubsmoe.data.tokens import IGNORED, batches, collate, pad_id, tokenize
from ubsmoe.model.load import load_tokenizer
from ubsmoe.model.presets import shape_from_config
from ubsmoe.model.surgery import SparseModel

RESULT = Path(__file__).resolve().parent / "results" / "client_step.json"
SEED, RANK, LENGTH = 0, 8, 128
VOCAB, WORDS = 1024, 4096  # of random tokens, and what the shipped tokenizer has
LAYERS, HIDDEN, WIDTH, EXPERTS = 4, 256, 256, 32
WARM_UP = 2  # steps that are not counted
SIZES = [(size, top_k) for size in (8, 1) for top_k in (8, 2, 1)]
NO_EXPERTS = "no-experts"
Batch = dict[str, Tensor]
Step = Callable[[Batch], None]


def olmoe_config(data: str) -> OlmoeConfig:
    """OLMoE's architecture, small: 4 layers, hidden 256, 32 experts of width 256, K_max 8."""
    return OlmoeConfig(
        vocab_size=VOCAB if data == "full" else WORDS,
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_experts=EXPERTS,
        num_experts_per_tok=8,
        max_position_embeddings=2 * LENGTH,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
    )


def olmoe_shaped(data: str = "full") -> OlmoeForCausalLM:
    """The same weights wherever it is called."""
    torch.manual_seed(SEED)
    return OlmoeForCausalLM(olmoe_config(data)).eval()


def fresh_batch(size: int, generator: torch.Generator) -> Batch:
    """Random tokens, no padding, a label everywhere."""
    ids = torch.randint(2, VOCAB, (size, LENGTH), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def fresh_batches(data: str, size: int) -> Iterator[Batch]:
    """The same for every way; `data` is full, answers, or a file of records."""
    generator = torch.Generator().manual_seed(SEED)
    while data == "full":
        yield fresh_batch(size, generator)
    source = {"train": "synthetic" if data == "answers" else data, "synthetic": {"train_examples": 2000}}
    settings = parse_run({"data": {"template": "llm_adapters", **source}})
    tokenizer = load_tokenizer(settings.model)
    tokens = tokenize(load_training(settings.data, tokenizer, SEED)[:2000], tokenizer, settings.data, "train")
    for chosen in batches(len(tokens), size, generator):
        yield collate([tokens[i] for i in chosen], pad_id(tokenizer))


def asked(batch: Batch) -> workload.Batch:
    """How much of a batch is real and labelled."""
    labelled = int((batch["labels"][:, 1:] != IGNORED).sum())
    return workload.Batch(*batch["input_ids"].shape, int(batch["attention_mask"].sum()), labelled)


def ours(data: str, top_k: int) -> Step:
    model = SparseModel(olmoe_shaped(data))
    model.load_adapter(model.fresh_adapter(RANK, torch.Generator().manual_seed(SEED), shared_a=True), alpha=16.0)
    model.set_top_k(top_k)
    optimizer = torch.optim.AdamW(model.adapter.values(), 1e-3, fused=True)

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        with model.counting():
            language_loss(model, batch).backward()
        optimizer.step()

    return step


def rest(data: str, top_k: int) -> Step:
    model = SparseModel(olmoe_shaped(data))
    model.load_adapter(model.fresh_adapter(RANK, torch.Generator().manual_seed(SEED), shared_a=True), alpha=16.0)
    model.set_top_k(top_k)
    model.model.set_experts_implementation(NO_EXPERTS)
    for layer in model.layers:
        layer.experts.dial = torch.nn.Parameter(torch.ones(()))

    def step(batch: Batch) -> None:
        with model.counting():
            language_loss(model, batch).backward()

    return step


def no_experts(module: torch.nn.Module, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """A scale in the experts' place, so that gradients go where they would: to the layers below and through the router."""
    return hidden * (module.dial * top_k_weights.sum(-1, keepdim=True))  # type: ignore[operator]


ALL_EXPERTS_FUNCTIONS.register(NO_EXPERTS, no_experts)


def peft(data: str, top_k: int) -> Step:
    from peft import LoraConfig, get_peft_model

    model = olmoe_shaped(data)
    model.set_experts_implementation("grouped_mm")
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    tuned = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=16, target_modules=[], target_parameters=targets))
    _set_top_k(model, top_k)
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], 1e-3, fused=True)

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        tuned(**batch, use_cache=False).loss.backward()
        optimizer.step()

    return step


def frozen(data: str, top_k: int) -> Step:
    model = olmoe_shaped(data).requires_grad_(False)
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


WAYS: dict[str, tuple[Callable[[str, int], Step], bool]] = {  # how to step, and whether freed memory is kept
    "ours": (ours, True),
    "rest": (rest, True),
    "peft": (peft, False),
    "peft kept": (peft, True),
    "frozen": (frozen, False),
    "frozen kept": (frozen, True),
}


class Worker:
    """A process of its own that steps one way whenever it is asked to, and answers in JSON."""

    def __init__(self, way: str) -> None:
        command = [sys.executable, "-W", "ignore", __file__, "--worker", way]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, *words: object) -> Any:
        """Send one line, and read the answer to it."""
        assert self.process.stdin and self.process.stdout
        print(*words, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"a worker ended with {self.process.wait()}")
        return json.loads(answer)

    def end(self) -> None:
        """Let it finish."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def work(way: str) -> None:
    """Obey lines: `row DATA BATCH K` builds a model, `step` takes one, `memory` and `efficiency BATCH K` measure."""
    build, keep = WAYS[way]
    torch.set_num_threads(1)
    if keep:
        keep_freed_memory()
    step: Step | None = None
    source, loaded = fresh_batches("full", 1), 0
    for line in sys.stdin:
        answer: Any = None
        match line.split():
            case ["row", data, batch, top_k]:
                step = None  # the last row's model goes first
                step, source = build(data, int(top_k)), fresh_batches(data, int(batch))
                loaded = resident_kib()
            case ["step"]:
                assert step, "a row comes first"
                batch = next(source)
                began, wall = time.process_time(), time.perf_counter()
                step(batch)
                answer = [(time.process_time() - began) * 1e3, (time.perf_counter() - wall) * 1e3]
            case ["memory"]:  # ru_maxrss (KiB) has also seen the model being built, so this can only be too large
                answer = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - loaded) / 1024
            case ["efficiency", batch, top_k]:
                answer = efficiency(LAYERS, EXPERTS, HIDDEN, WIDTH, RANK, int(batch) * LENGTH, int(top_k))
        print(json.dumps(answer), flush=True)


def resident_kib() -> int:
    """What the process holds now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1])
    raise OSError("no VmRSS in /proc/self/status")


def summary(times: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(times, n=4)
    return {"median": round(middle, 2), "q1": round(low, 2), "q3": round(high, 2)}


def measure(ways: list[str], rows: list[tuple[str, int, int]], repeats: int) -> dict[str, Any]:
    """One row per kind and size of batch and K; memory at the largest, where each process has had no other peak yet."""
    workers = {way: Worker(way) for way in ways}
    facts: dict[str, Any] = {"steps": [], "memory_mib": {}}
    for data, size, top_k in rows:
        times: dict[str, list[list[float]]] = {way: [] for way in ways}
        for worker in workers.values():
            worker.ask("row", data, size, top_k)
        steps = WARM_UP + repeats * (1 if size > 1 else 2)
        for _ in range(steps):
            for way, worker in workers.items():
                times[way].append(worker.ask("step"))
        if not facts["memory_mib"]:
            facts["memory_mib"] = {way: worker.ask("memory") for way, worker in workers.items()}
        row: dict[str, Any] = {"data": Path(data).name, "batch": size, "top_k": top_k}
        row |= what_is_asked([asked(batch) for batch in islice(fresh_batches(data, size), WARM_UP, steps)], data, top_k)
        for way, pairs in times.items():
            cpu, wall = (list(column) for column in zip(*pairs[WARM_UP:], strict=True))
            row[way] = {**summary(cpu), "wall": summary(wall)}
        if data == "full":
            row |= workers["ours"].ask("efficiency", size, top_k)
        facts["steps"].append(row)
        show(row, facts["steps"])
    for worker in workers.values():
        worker.end()
    return facts


def what_is_asked(seen: list[workload.Batch], data: str, top_k: int) -> dict[str, float]:
    """Shares of padding and of labelled tokens, and FLOPs of our step per token that is no padding."""
    shape, real = shape_from_config(olmoe_config(data)), sum(batch.real for batch in seen)
    flops = sum(batch_flops(shape, top_k, workload.Workload(RANK, batch)) for batch in seen)
    return {
        "padding": 1 - real / sum(batch.rows * batch.length for batch in seen),
        "labelled": sum(batch.labelled for batch in seen) / real,
        "mflops_per_token": flops / real / 1e6,
    }


def show(row: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """A line of its table, under the table's head if it is the first."""
    table = [other for other in rows if other["data"] == row["data"]]
    if len(table) == 1:
        print(f"{row['data']}: {row['padding']:.0%} padding, {row['labelled']:.0%} of the rest labelled")
        print("               CPU ms                              peft / ours         ours / frozen   ours over")
        print(
            "batch  K  ours (quartiles)       peft   frozen       as is  kept limit   as is  kept    K=8 (FLOPs)   efficiency"
        )
    top = next(other for other in table if other["batch"] == row["batch"])
    mine = row["ours"]["median"]

    def ratio(over: str, under: str) -> str:
        return f"{row[over]['median'] / row[under]['median']:.2f}" if over in row and under in row else "-"

    limit = "-"
    if "rest" in row and "bare_ms" in row:
        limit = f"{row['peft']['median'] / (row['rest']['median'] + row['bare_ms']):.2f}"
    print(
        f"{row['batch']:>5} {row['top_k']:>2} {mine:8.1f} ({row['ours']['q1']:.1f}-{row['ours']['q3']:.1f})"
        f" {row['peft']['median']:8.1f} {row['frozen']['median'] if 'frozen' in row else math.nan:8.1f}"
        f" {ratio('peft', 'ours'):>11} {ratio('peft kept', 'ours'):>5} {limit:>5}"
        f" {ratio('ours', 'frozen'):>7} {ratio('ours', 'frozen kept'):>5}"
        f" {mine / top['ours']['median']:8.2f} ({row['mflops_per_token'] / top['mflops_per_token']:.2f})"
        + (f" {row['efficiency']:12.2f}" if "efficiency" in row else ""),
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="one row per table, two steps, ours and PEFT alone")
    parser.add_argument("--records", type=Path, help="a third table, from this file")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--worker", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work(options.worker)
    torch.set_num_threads(1)
    kinds = ["full", "answers", *([str(options.records)] if options.records else [])]
    ways, sizes, repeats = (["ours", "peft"], [(8, 2)], 2) if options.quick else (list(WAYS), SIZES, 7)
    facts = measure(ways, [(data, *size) for data in kinds for size in sizes], repeats)
    memory = facts["memory_mib"]
    print(
        f"peak memory that a step adds, first row, MiB: {', '.join(f'{way} {value:.0f}' for way, value in memory.items())};"
        f" ours / peft {memory['ours'] / memory['peft']:.2f}"
    )
    head = {"seed": SEED, "threads": 1, "torch": torch.__version__, "quick": options.quick}
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(head | facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
