"""Does a testbed separate methods? Tiers must differ, experts be unevenly used and specialised, clients be unlike one another.

Measured on the base alone, before any training, for every run file given:

    by K          accuracy and loss on the world that the base was pretrained on, output scale as the run file says
    use           entropy over ln M, Gini and dead experts per layer, K = K_max, on the run's own training questions
    specialised   loss when every token gets the experts and weights chosen for another token of the batch, over the loss with
                  its own: 1 would mean that it does not matter who answers
    clients       mean total variation of their tasks from the whole

python bench/testbed.py [RUN.toml ...]     prints a table each, writes bench/results/testbed.json
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from ubsmoe.client.allocator import keep_freed_memory
from ubsmoe.config import load_run
from ubsmoe.data.synthetic import SyntheticQA
from ubsmoe.maths import balance
from ubsmoe.server.evaluate import evaluate, prepare
from ubsmoe.server.federation import Federation, build_federation

ROOT = Path(__file__).resolve().parent.parent
RUNS = [ROOT / "runs" / "tiers.toml", ROOT / "runs" / "study" / "confirmation.toml"]
ENTITIES, QUESTIONS = 48, 320  # of the pretraining world, whose answers the base knows


def by_budget(federation: Federation, permuted: bool = False) -> dict[int, dict[str, float]]:
    """Accuracy and loss of the untrained base at each tier's K, on what it was taught."""
    settings, model = federation.settings, federation.model
    known = {"known": SyntheticQA(0, ENTITIES, "pretraining").examples("test", QUESTIONS, seed=1)}
    questions = prepare(known, federation.tokenizer, settings.data, settings.evaluate)
    hooks = [layer.router.register_forward_hook(_swap) for layer in model.layers] if permuted else []
    found = {}
    for profile in federation.tiers:
        model.set_top_k(profile.top_k)
        score = evaluate(model, federation.tokenizer, questions, settings.evaluate)["macro"]
        found[profile.top_k] = {"accuracy": score.accuracy, "loss": score.loss}
    model.clear()
    for hook in hooks:
        hook.remove()
    return found


def _swap(_router: Any, _inputs: Any, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The router's output with its tokens in another order."""
    logits, weights, index = output
    order = torch.randperm(len(index), generator=torch.Generator().manual_seed(len(index)))
    return logits, weights[order], index[order]


@torch.no_grad()
def use(federation: Federation, examples: int = 640) -> torch.Tensor:
    """How often each layer's experts are chosen at K_max, [L, M]."""
    model = federation.model
    own = [tokens.input_ids for group in federation.examples.values() for tokens in group][:examples]
    with model.counting():
        for ids in own:
            model.model.model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long))
        counts = model.expert_tokens()
    model.clear()
    return counts.double()


def measure(path: Path) -> dict[str, Any]:
    """Everything above for one run file."""
    federation = build_federation(load_run(path))
    used, own, swapped = use(federation), by_budget(federation), by_budget(federation, permuted=True)
    part = federation.partition
    return {
        "by_top_k": own,
        "entropy": balance.normalised_entropy(used).tolist(),
        "gini": balance.gini(used).tolist(),
        "dead_experts": balance.dead_experts(used).double().tolist(),
        "loss_with_another_tokens_experts": {k: swapped[k]["loss"] / own[k]["loss"] for k in own},
        "mean_total_variation": part.to_json()["mean_total_variation"] if part else 0.0,
    }


def main() -> None:
    keep_freed_memory()
    torch.set_num_threads(1)
    paths = [Path(name).resolve() for name in sys.argv[1:]] or RUNS
    results = {str(path.relative_to(ROOT)): measure(path) for path in paths}
    for name, found in results.items():
        print(name)
        for k, score in found["by_top_k"].items():
            ratio = found["loss_with_another_tokens_experts"][k]
            print(
                f"  K = {k}: accuracy {score['accuracy']:.3f}, loss {score['loss']:.3f}; swapped experts x {ratio:.2f}"
            )
        for key in ("entropy", "gini", "dead_experts"):
            print(f"  {key:<13}" + "  ".join(f"{value:.3f}" for value in found[key]))
        print(f"  total variation of the clients {found['mean_total_variation']:.3f}")
    (ROOT / "bench" / "results" / "testbed.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
