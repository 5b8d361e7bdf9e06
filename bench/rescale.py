"""The output scale of a layer at K < K_max: the shipped base without training, and after a short federated run.

python bench/rescale.py            prints two tables, writes bench/results/rescale.json
"""

import json
import statistics
from pathlib import Path

import torch

from ubsmoe.client.allocator import keep_freed_memory
from ubsmoe.config import load_run
from ubsmoe.data.synthetic import SyntheticQA
from ubsmoe.data.tasks import Example
from ubsmoe.engines.local import LocalEngine
from ubsmoe.server.evaluate import evaluate, prepare
from ubsmoe.server.federation import build_federation
from ubsmoe.server.rounds import evaluate_tier, one_round
from ubsmoe.server.start import start_state

ROOT = Path(__file__).resolve().parent.parent
MODES, TOP_KS, SEEDS = ("none", "mass"), (8, 6, 4, 2, 1), (0, 1)
CHANGES = {
    "method": {"name": "fedavg"},
    "train.rounds": 3,
    "data.synthetic.test_examples": 160,
    "evaluate.max_new_tokens": 8,
}


def pretraining_questions() -> dict[str, list[Example]]:
    """Questions about the world the base was pretrained on, which it can answer without training."""
    return {"pretraining": SyntheticQA(0, 48, "pretraining").examples("test", 240, seed=1)}


def base_losses(mode: str) -> dict[str, float]:
    """Nats per answer token of the untrained base, by K."""
    federation = build_federation(load_run(ROOT / "runs" / "study" / "small.toml", {**CHANGES, "tiers.rescale": mode}))
    settings = federation.settings
    questions = prepare(pretraining_questions(), federation.tokenizer, settings.data, settings.evaluate)
    losses = {}
    for top_k in TOP_KS:
        federation.model.set_top_k(top_k)
        losses[f"K={top_k}"] = evaluate(federation.model, federation.tokenizer, questions, settings.evaluate)[
            "macro"
        ].loss
    return losses


def trained_losses(mode: str, seed: int) -> dict[str, float]:
    """Nats per answer token of each tier after a short naive run on a new world, and accuracy."""
    changes = {**CHANGES, "tiers.rescale": mode, "seed": seed}
    federation = build_federation(load_run(ROOT / "runs" / "study" / "small.toml", changes))
    state, engine = start_state(federation), LocalEngine(federation.trainer, federation.examples, federation.clients)
    for number in range(1, federation.settings.train.rounds + 1):
        state = one_round(federation, engine, state, number, lambda *_, **__: None)
    scores = [evaluate_tier(federation, state, profile)["macro"] for profile in federation.tiers]
    tiers = [f"K={profile.top_k}" for profile in federation.tiers]
    return {
        **{tier: score.loss for tier, score in zip(tiers, scores, strict=True)},
        **{f"{tier} accuracy": score.accuracy for tier, score in zip(tiers, scores, strict=True)},
    }


def main() -> None:
    keep_freed_memory()
    torch.set_num_threads(1)
    base = {mode: base_losses(mode) for mode in MODES}
    runs = {mode: [trained_losses(mode, seed) for seed in SEEDS] for mode in MODES}
    after = {mode: {k: statistics.fmean(run[k] for run in group) for k in group[0]} for mode, group in runs.items()}
    for title, table in (("untrained base, loss", base), (f"after 3 rounds, mean of seeds {SEEDS}", after)):
        names = list(table["none"])
        print(f"{title}\n{'':<8}" + "".join(f"{name:>14}" for name in names))
        for mode, row in table.items():
            print(f"{mode:<8}" + "".join(f"{row[name]:14.4f}" for name in names))
    path = ROOT / "bench" / "results" / "rescale.json"
    path.write_text(json.dumps({"seeds": SEEDS, "base": base, "runs": runs, "mean": after}, indent=2) + "\n")


if __name__ == "__main__":
    main()
