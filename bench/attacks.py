"""What 20 % of lying clients do to every tier's accuracy, under the plain mean and under each robust rule.

    python bench/attacks.py [--attacks "sign flip, ALIE"] [--rules "mean, median"] [--quick] [--out FILE.csv]

The quickstart's base, world and optimiser; ten clients, two of whom lie, as a wrapper around the engine: the product holds
none of it. Every lie passes the gate, or is dropped by it, as it would in a run. One row per cell and tier is written as soon as a
cell ends; cells that a file has already are not run again.
"""

import argparse
import csv
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import torch

from ubsmoe.allocator import keep_freed_memory
from ubsmoe.config import load_run
from ubsmoe.data.tokens import Tokens
from ubsmoe.engines.local import LocalEngine
from ubsmoe.federation import Federation, build_federation
from ubsmoe.messages import Reply, Task, Update
from ubsmoe.methods.base import State
from ubsmoe.rounds import Engine, evaluate_tier, one_round, start_state
from ubsmoe.seeds import generator_for

LIARS = ("client-3", "client-7")  # of client-0 to client-9: both in the top tier, which has two of the ten
TESTBED = Path(__file__).parents[1] / "runs" / "quickstart.toml"
CHANGES = {
    "clients.count": 10,
    "train.rounds": 3,
    "train.local_steps": 6,
    "train.batch_size": 8,
    "data.world.test_examples": 80,
    "evaluate.likelihood": False,
}
RULES: dict[str, dict[str, Any]] = {
    "mean": {},
    "clip": {"robust.clip_norm": 4.0},
    "trimmed_mean": {"robust.rule": "trimmed_mean", "robust.attackers": 2},
    "median": {"robust.rule": "median"},
    "multi_krum": {"robust.rule": "multi_krum", "robust.attackers": 2},
    "cap": {"robust.utilization_cap": 1.5},
}
Lie = Callable[[Update, State, list[Update]], Update]


def moved(update: Update, state: State, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Update:
    """The update with its change replaced."""
    adapters = {n: state.adapters[n] + change(n, v - state.adapters[n]) for n, v in update.adapters.items()}
    return replace(update, adapters=adapters)


def gaussian(update: Update, state: State, honest: list[Update]) -> Update:
    draw = generator_for(update.client, update.round, "lie")
    return moved(update, state, lambda _, d: 0.1 * torch.randn(d.shape, generator=draw))


def alie(update: Update, state: State, honest: list[Update]) -> Update:
    """A little is enough (Baruch et al. 2019): the honest mean less z deviations, z as large as still blends in."""
    n, liars = len(honest) + len(LIARS), len(LIARS)
    supporters = n // 2 + 1 - liars
    z = NormalDist().inv_cdf((n - liars - supporters) / (n - liars))

    def change(name: str, _: torch.Tensor) -> torch.Tensor:
        seen = torch.stack([one.adapters[name] - state.adapters[name] for one in honest])
        return seen.mean(0) - z * seen.std(0)

    return moved(update, state, change)


def counted(update: Update, share_of_first: float) -> Update:
    """All tokens, or none, to expert 0 of each layer, the other choices spread as evenly as whole numbers allow."""
    layers, experts = update.expert_tokens.shape
    first = round(update.tokens * share_of_first)
    each, left = divmod(update.slots - first, experts - 1)
    row = torch.tensor([first] + [each + (i < left) for i in range(experts - 1)])
    return replace(update, expert_tokens=row.expand(layers, -1).clone())


LIES: dict[str, Lie] = {
    "none": lambda update, state, honest: update,
    "sign flip": lambda update, state, honest: moved(update, state, lambda _, d: -4 * d),
    "x100": lambda update, state, honest: moved(update, state, lambda _, d: 100 * d),
    "Gaussian": gaussian,
    "ALIE": alie,
    "free rider": lambda update, state, honest: moved(update, state, lambda _, d: torch.zeros_like(d)),
    "utilization starve": lambda update, state, honest: counted(update, 1.0),
    "utilization flood": lambda update, state, honest: counted(update, 0.0),
    "label flip": lambda update, state, honest: update,  # the lie is in the data
}


@dataclass
class LyingEngine:
    """Two clients lie, knowing what the honest ones send (the strongest assumption)."""

    inner: Engine
    state: State
    lie: Lie

    def exchange(self, tasks: Iterable[Task]) -> Iterator[Reply]:
        """Honest replies, and the lies in their places."""
        replies = list(self.inner.exchange(tasks))
        honest = [one for one in replies if isinstance(one, Update) and one.client not in LIARS]
        for reply in replies:
            lies = isinstance(reply, Update) and reply.client in LIARS
            yield self.lie(reply, self.state, honest) if lies else reply


def flipped(examples: list[Tokens]) -> list[Tokens]:
    """Every question with the answer of another."""
    answers = [one.input_ids[one.prompt_length :] for one in examples]
    turned = [*answers[1:], answers[0]]
    return [
        replace(one, input_ids=one.input_ids[: one.prompt_length] + other)
        for one, other in zip(examples, turned, strict=True)
    ]


def cell(federation: Federation, attack: str, rounds: int) -> tuple[list[dict[str, Any]], int]:
    """Every tier's scores after some rounds with two liars, and how many answers did not count."""
    examples = dict(federation.examples)
    if attack == "label flip":
        examples |= {client: flipped(examples[client]) for client in LIARS}
    dropped, state = 0, start_state(federation)

    def note(event: str, number: int, **fields: Any) -> None:
        nonlocal dropped
        dropped += event == "dropped"

    for number in range(1, rounds + 1):
        engine = LyingEngine(LocalEngine(federation.trainer, examples), state, LIES[attack])
        state = one_round(federation, engine, state, number, note, noise="0")
    scores = [evaluate_tier(federation, state, tier)["macro"] for tier in federation.tiers]
    return [{"accuracy": score.accuracy, "unparsed": score.unparsed, "loss": score.loss} for score in scores], dropped


def append(path: Path, row: dict[str, Any]) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(row), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--attacks", default=",".join(LIES))
    parser.add_argument("--rules", default=",".join(RULES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="one round, one attack, two rules")
    parser.add_argument("--out", type=Path, default=Path("attacks.csv"))
    chosen = parser.parse_args()
    attacks = ["sign flip"] if chosen.quick else [name.strip() for name in chosen.attacks.split(",")]
    rules = ["mean", "median"] if chosen.quick else [name.strip() for name in chosen.rules.split(",")]
    torch.set_num_threads(1)
    keep_freed_memory()
    done = set()
    if chosen.out.exists():
        done = {(row["attack"], row["rule"], row["seed"]) for row in csv.DictReader(chosen.out.open())}
    for rule in rules:
        settings = load_run(TESTBED, {**CHANGES, "seed": chosen.seed, **RULES[rule]})
        federation = build_federation(settings)
        for attack in attacks:
            if (attack, rule, str(chosen.seed)) in done:
                continue
            began = time.process_time()
            scores, dropped = cell(federation, attack, 1 if chosen.quick else settings.train.rounds)
            for tier, score in enumerate(scores):
                row = {"attack": attack, "rule": rule, "seed": chosen.seed, "tier": tier + 1, "dropped": dropped}
                append(chosen.out, row | {name: f"{value:.4f}" for name, value in score.items()})
            macro = "  ".join(f"{100 * score['accuracy']:5.1f}" for score in scores)
            print(
                f"{rule:14s}{attack:20s}{macro}   dropped {dropped}   {time.process_time() - began:.0f} s", flush=True
            )


if __name__ == "__main__":
    main()
