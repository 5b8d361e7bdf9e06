"""How well does each pseudo-gradient point along the gradient that top-K leaves out?

    python bench/pg_cosines.py            three seeds, about a minute on one core
    python bench/pg_cosines.py --quick    one seed

A two-layer OLMoE (16 experts, K_max 8) is trained from scratch on number sequences, frozen, given an adapter and put
before other sequences, at K = 1, 2 and 4. The truth is the gradient under `oracle` minus the plain one. A mode's signal
is compared with it expert by expert, over the four tensors of the adapter together; the cosines are averaged over
experts and layers, then over seeds. "some": experts that some of the batch's 320 tokens used. "never": experts that
none of 20 tokens used; of a larger batch every expert sees a part.

Controls: a random direction, and another expert's plain gradient. The table goes to stdout, the record to
bench/results/.
"""

import argparse
import json
import platform
import statistics
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import OlmoeConfig, OlmoeForCausalLM

from ubsmoe.model.surgery import SparseModel
from ubsmoe.study.alignment import SIGNALS, layer_signals

NUMBERS, LENGTH, BATCH, RANK, ALPHA = 37, 20, 16, 4, 8.0
BUDGETS = (1, 2, 4)
RESULTS = Path(__file__).parent / "results" / "pg_cosines.json"


def sequences(task: str, draw: torch.Generator) -> Tensor:
    """x <- a x + b modulo a prime; the tasks differ in a."""
    factors = torch.tensor({"base": [2, 3, 5], "new": [7, 11]}[task])
    a = factors[torch.randint(len(factors), (BATCH,), generator=draw)]
    b = torch.randint(4, (BATCH,), generator=draw)
    rows = [torch.randint(NUMBERS, (BATCH,), generator=draw)]
    for _ in range(LENGTH - 1):
        rows.append((a * rows[-1] + b) % NUMBERS)
    return torch.stack(rows, dim=1)


def trained_base(seed: int, steps: int = 200) -> SparseModel:
    """A base that knows the first task."""
    config = OlmoeConfig(
        vocab_size=NUMBERS, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_experts=16, num_experts_per_tok=8, pad_token_id=None, bos_token_id=None, eos_token_id=None,
        output_router_logits=True, router_aux_loss_coef=0.01,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = OlmoeForCausalLM(config)
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(steps):
        ids = sequences("base", draw)
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.config.output_router_logits = False
    return SparseModel(model.eval())


def train_adapter(sparse: SparseModel, steps: int, draw: torch.Generator) -> dict[str, Tensor]:
    """Some steps of a client with the full budget; the adapter it ends with."""
    sparse.set_top_k(sparse.k_max)
    sparse.set_pseudo_gradient(None)
    optimizer = torch.optim.AdamW(sparse.adapter.values(), 1e-2, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        backward(sparse, sequences("new", draw))
        optimizer.step()
    return {name: value.detach().clone() for name, value in sparse.adapter.items()}


def backward(sparse: SparseModel, ids: Tensor) -> float:
    loss = sparse.model(input_ids=ids, labels=ids).loss
    loss.backward()
    return float(loss.detach())


def one_seed(seed: int) -> dict[str, dict[str, float]]:
    """Condition -> signal -> mean cosine over experts and layers."""
    sparse, rows = trained_base(seed), {}
    for shared_a in (True, False):
        for b_is_zero in (True, False):
            draw = torch.Generator().manual_seed(seed + 1)
            fresh = sparse.fresh_adapter(RANK, torch.Generator().manual_seed(seed + 2), shared_a=shared_a)
            sparse.load_adapter(fresh, ALPHA)
            start = fresh if b_is_zero else train_adapter(sparse, 30, draw)
            sparse.load_adapter(start, ALPHA)
            ids = sequences("new", draw)
            for top_k in BUDGETS:
                sparse.set_top_k(top_k)
                for group, batch in (("some", ids), ("never", ids[:1])):
                    draw_of_signals = torch.Generator().manual_seed(seed)
                    layers = layer_signals(sparse, lambda batch=batch: backward(sparse, batch), draw_of_signals)
                    picked = [layer.cosines(layer.used if group == "some" else ~layer.used) for layer in layers]
                    start_of = f"A {'shared' if shared_a else 'apart'}, B {'= 0' if b_is_zero else '!= 0'}"
                    key = f"{start_of}, K = {top_k}, {group}"
                    rows[key] = {name: mean([value for layer in picked for value in layer[name]]) for name in SIGNALS}
                    rows[key]["experts"] = float(sum(len(layer["random"]) for layer in picked))
            sparse.clear()
    return rows


def mean(values: list[float]) -> float:
    return statistics.mean(values) if values else float("nan")


def summary(by_seed: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, Any]]:
    """Mean and spread over the seeds in which the group has experts."""
    rows: dict[str, dict[str, Any]] = {}
    for key in by_seed[0]:
        rows[key] = {"experts": [int(seed[key]["experts"]) for seed in by_seed]}
        for name in SIGNALS:
            values = [seed[key][name] for seed in by_seed if seed[key]["experts"]]
            if values:
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                rows[key][name] = {"mean": round(statistics.mean(values), 3), "stdev": round(spread, 3)}
    return {key: row for key, row in rows.items() if len(row) > 1}


def print_table(rows: dict[str, dict[str, Any]]) -> None:
    print("| condition | experts | " + " | ".join(SIGNALS) + " |")
    print("|---" * (len(SIGNALS) + 2) + "|")
    for key, row in rows.items():
        cells = [f"{row[name]['mean']:.2f} ± {row[name]['stdev']:.2f}" for name in SIGNALS]
        print(f"| {key} | {'/'.join(map(str, row['experts']))} | " + " | ".join(cells) + " |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the record goes (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    seeds = [0] if options.quick else [0, 1, 2]
    rows = summary([one_seed(seed) for seed in seeds])
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "seeds": seeds,
        "mean_cosine_with_the_missing_gradient": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print_table(rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
