"""What 20 % of lying clients do to every tier's accuracy, under the plain mean and under each robust rule.

    python bench/attacks.py [--attacks "sign flip, ALIE"] [--rules "mean, median"] [--jobs 2] [--quick] [--out FILE.csv]

The quickstart's base, world and optimiser with ten clients, of whom two lie: a wrapper around the engine, nothing of it is in
the product. Three honest rounds, then one under attack, for which the honest updates are the same in all cells. phi has no memory
here (momentum 0), so that a lie about use has its full effect at once. Every lie passes the gate, or is dropped by it, as it would
in a run. Rows are written as cells end; cells that the file has already are not run again.
"""

import argparse
import csv
import os
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
from ubsmoe.federation import Federation, build_federation, build_method
from ubsmoe.messages import Reply, Task, Update
from ubsmoe.methods.base import State
from ubsmoe.rounds import Engine, evaluate_tier, one_round, start_state
from ubsmoe.seeds import generator_for

LIARS = ("client-3", "client-7")  # of client-0 to client-9; both in the top tier, and all of it
TESTBED = Path(__file__).parents[1] / "runs" / "quickstart.toml"
HONEST, ATTACKED = 3, 1
CHANGES = {
    "clients.count": 10,
    "train.local_steps": 8,
    "train.batch_size": 8,
    "data.world.test_examples": 60,
    "evaluate.likelihood": False,
    "method.momentum": 0.0,
}
RULES: dict[str, dict[str, Any]] = {
    "mean": {},
    "clip": {"robust.clip_norm": 4.0},
    "trimmed_mean": {"robust.rule": "trimmed_mean", "robust.attackers": len(LIARS)},
    "median": {"robust.rule": "median"},
    "multi_krum": {"robust.rule": "multi_krum", "robust.attackers": len(LIARS)},
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
        return seen.mean(0) - max(z, 1.0) * seen.std(0)

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
}


@dataclass
class LyingEngine:
    """Two clients lie, knowing what the honest ones send (the strongest assumption); known replies are not trained again."""

    inner: Engine
    state: State
    lie: Lie
    known: list[Reply] | None = None

    def exchange(self, tasks: Iterable[Task]) -> Iterator[Reply]:
        """Honest replies, and the lies in their places."""
        asked = list(tasks)
        replies = self.known or list(self.inner.exchange(asked))
        honest = [one for one in replies if isinstance(one, Update) and one.client not in LIARS]
        for task, reply in zip(asked, replies, strict=True):
            if isinstance(reply, Update):
                reply = replace(reply, run=task.run)
                yield self.lie(reply, self.state, honest) if reply.client in LIARS else reply
            else:
                yield reply


@dataclass(frozen=True)
class Testbed:
    """The federation after its honest rounds, and what its clients would send next."""

    federation: Federation
    examples: dict[str, list[Tokens]]
    state: State
    replies: list[Reply]

    def under(self, rule: str, seed: int) -> Federation:
        """The same federation under a rule."""
        settings = load_run(TESTBED, {**CHANGES, "seed": seed, **RULES[rule]})
        base, method, tiers = build_method(settings, self.federation.model)
        return replace(self.federation, settings=settings, base=base, method=method, tiers=tiers)


def prepared(seed: int, honest_rounds: int) -> Testbed:
    federation = build_federation(load_run(TESTBED, {**CHANGES, "seed": seed}))
    engine, state = LocalEngine(federation.trainer, federation.examples), start_state(federation)
    for number in range(1, honest_rounds + 1):
        state = one_round(federation, engine, state, number, lambda *_, **__: None)
    recorded: list[Reply] = []

    class Recording(LocalEngine):
        def exchange(self, tasks: Iterable[Task]) -> Iterator[Reply]:
            for reply in super().exchange(tasks):
                recorded.append(reply)
                yield reply

    recording = Recording(federation.trainer, federation.examples)
    one_round(federation, recording, state, honest_rounds + 1, lambda *_, **__: None)
    return Testbed(federation, federation.examples, state, recorded)


def cell(testbed: Testbed, rule: str, attack: str, seed: int, rounds: int) -> tuple[list[dict[str, Any]], int]:
    """Every tier's scores after the rounds under attack, and how many answers did not count."""
    federation, dropped, state = testbed.under(rule, seed), 0, testbed.state

    def note(event: str, number: int, **fields: Any) -> None:
        nonlocal dropped
        dropped += event == "dropped"

    for number in range(rounds):
        inner = LocalEngine(federation.trainer, testbed.examples)
        engine = LyingEngine(inner, state, LIES[attack], None if number else testbed.replies)
        state = one_round(federation, engine, state, testbed.replies[0].round + number, note)
    scores = [evaluate_tier(federation, state, tier)["macro"] for tier in federation.tiers]
    return [{"accuracy": score.accuracy, "unparsed": score.unparsed, "loss": score.loss} for score in scores], dropped


def append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a", newline="") as file:
        csv.DictWriter(file, fieldnames=list(row), lineterminator="\n").writerow(row)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--attacks", default=",".join(LIES))
    parser.add_argument("--rules", default=",".join(RULES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="processes, one thread each")
    parser.add_argument("--quick", action="store_true", help="one attack, two rules, no honest rounds")
    parser.add_argument("--out", type=Path, default=Path("attacks.csv"))
    chosen = parser.parse_args()
    attacks = ["sign flip"] if chosen.quick else [name.strip() for name in chosen.attacks.split(",")]
    rules = ["mean", "median"] if chosen.quick else [name.strip() for name in chosen.rules.split(",")]
    torch.set_num_threads(1)
    keep_freed_memory()
    columns = ("rule", "attack", "seed", "tier", "dropped", "accuracy", "unparsed", "loss")
    if not chosen.out.exists():
        chosen.out.write_text(",".join(columns) + "\n")
    done = {(row["rule"], row["attack"], row["seed"]) for row in csv.DictReader(chosen.out.open())}
    grid = [(rule, attack) for attack in attacks for rule in rules]
    # a lie about weights alone is no matter for a cap on use, one about use none for clipping
    grid = [one for one in grid if one[0] != "cap" or one[1] in ("none", "utilization starve", "utilization flood")]
    grid = [one for one in grid if one[0] != "clip" or not one[1].startswith("utilization")]
    left = [one for one in grid if (*one, str(chosen.seed)) not in done]
    testbed = prepared(chosen.seed, 0 if chosen.quick else HONEST)
    print(f"prepared after {time.process_time():.0f} s", flush=True)
    job = 0
    for number in range(1, chosen.jobs):
        if os.fork() == 0:
            job = number
            break
    for rule, attack in left[job :: chosen.jobs]:
        began = time.process_time()
        scores, dropped = cell(testbed, rule, attack, chosen.seed, 1 if chosen.quick else ATTACKED)
        for tier, score in enumerate(scores):
            row = {"rule": rule, "attack": attack, "seed": chosen.seed, "tier": tier + 1, "dropped": dropped}
            append(chosen.out, row | {name: f"{value:.4f}" for name, value in score.items()})
        macro = "  ".join(f"{100 * score['accuracy']:5.1f}" for score in scores)
        print(f"{rule:14s}{attack:20s}{macro}   dropped {dropped}   {time.process_time() - began:.0f} s", flush=True)
    if job:
        os._exit(0)
    for _ in range(1, chosen.jobs):
        os.wait()


if __name__ == "__main__":
    main()
