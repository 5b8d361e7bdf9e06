"""What 20 % of lying clients do to every tier's accuracy, under the plain mean and under each robust rule.

    python bench/attacks.py [--seed 0] [--attacks "sign flip, ALIE"] [--rules "mean, median"] [--quick] [--out FILE]
    python bench/attacks.py --table

The quickstart's base, world, clients' data and optimiser with ten clients, of whom two lie: a wrapper around the engine, nothing of
it is in the product. Honest rounds first, then rounds under attack; the honest updates of the first of these are the same in all
cells. phi has no memory here (momentum 0), so that a lie about use has its full effect at once. Every lie passes the validator or
is dropped by it, as it would in a run. A line of JSON is written as each cell ends; cells that the file has are not run again.
"""

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import torch

from ubsmoe.client.allocator import keep_freed_memory
from ubsmoe.config import load_run
from ubsmoe.data.tokens import Tokens
from ubsmoe.engines.local import LocalEngine
from ubsmoe.maths.robust import squared_norm
from ubsmoe.messages import Engine, Profile, Reply, Task, Tensors, Update
from ubsmoe.methods.chosen import chosen_method, shape_of_model, tier_profiles
from ubsmoe.methods.method import State
from ubsmoe.methods.sums import delta_of
from ubsmoe.seeds import generator_for
from ubsmoe.server.federation import Federation, build_federation
from ubsmoe.server.rounds import evaluate_tier, one_round
from ubsmoe.server.start import start_state

LIARS = ("client-3", "client-7")  # of client-0 to client-9; both in the top tier, and all of it
TESTBED = Path(__file__).parents[1] / "runs" / "study" / "small.toml"
RESULTS = Path(__file__).with_name("results") / "attacks.jsonl"
HONEST, ATTACKED = 20, 3
CHANGES = {
    "clients.count": 10,
    "train.local_steps": 5,
    "train.batch_size": 8,
    "evaluate.mc_accuracy": False,
    "method.dmr.momentum": 0.0,
}
RULES: dict[str, dict[str, Any]] = {
    "mean": {},  # a run file that says nothing
    "clip": {},  # at the median length of the honest changes
    "trimmed_mean": {"robust.rule": "trimmed_mean", "robust.attackers": len(LIARS)},
    "median": {"robust.rule": "median"},
    "multi_krum": {"robust.rule": "multi_krum", "robust.attackers": len(LIARS)},
    "cap": {"robust.utilization_cap": 1.5},
    "max_ratio 3": {"rounds.max_ratio": 3.0},
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
        return seen.mean(0) - max(z, 1.5) * seen.std(0)

    return moved(update, state, change)


def counted(update: Update, share_of_first: float) -> Update:
    """All tokens, or none, to expert 0 of each layer, the other choices spread as evenly as whole numbers allow."""
    layers, experts = update.expert_tokens.shape
    first = round(update.tokens * share_of_first)
    each, left = divmod(update.assignments - first, experts - 1)
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

    def clients(self) -> list[Profile]:
        """Those of the inner engine."""
        return self.inner.clients()

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
    sent: Tensors
    replies: list[Reply]

    @property
    def honest_length(self) -> float:
        """Median norm of the honest clients' changes."""
        honest = [one for one in self.replies if isinstance(one, Update) and one.client not in LIARS]
        return round(statistics.median(squared_norm(delta_of(one, self.sent)) ** 0.5 for one in honest), 2)

    def under(self, rule: str, seed: int) -> Federation:
        """The same federation under a rule."""
        changes = {**CHANGES, "seed": seed, **RULES[rule]}
        if rule == "clip":
            changes["robust.clip_norm"] = self.honest_length
        settings = load_run(TESTBED, changes)
        shape = shape_of_model(settings, self.federation.model)
        method = chosen_method(settings, shape)
        tiers = tier_profiles(settings, method, shape)
        return replace(self.federation, settings=settings, shape=shape, method=method, tiers=tiers)


def prepared(seed: int, honest_rounds: int) -> Testbed:
    federation = build_federation(load_run(TESTBED, {**CHANGES, "seed": seed}))
    engine, state = LocalEngine(federation.trainer, federation.examples, federation.clients), start_state(federation)
    for number in range(1, honest_rounds + 1):
        state = one_round(federation, engine, state, number, lambda *_, **__: None)
    recorded: list[Reply] = []

    class Recording(LocalEngine):
        def exchange(self, tasks: Iterable[Task]) -> Iterator[Reply]:
            for reply in super().exchange(tasks):
                recorded.append(reply)
                yield reply

    recording = Recording(federation.trainer, federation.examples, federation.clients)
    one_round(federation, recording, state, honest_rounds + 1, lambda *_, **__: None)
    sent = federation.method.dispatch(state, federation.clients[0])  # what all clients are sent
    return Testbed(federation, federation.examples, state, sent, recorded)


def cell(testbed: Testbed, rule: str, attack: str, seed: int, rounds: int) -> dict[str, Any]:
    """Every tier's scores after the rounds under attack, and how many answers did not count."""
    federation, dropped, state = testbed.under(rule, seed), 0, testbed.state

    def note(event: str, number: int, **fields: Any) -> None:
        nonlocal dropped
        dropped += event == "dropped"

    for number in range(rounds):
        inner = LocalEngine(federation.trainer, testbed.examples, federation.clients)
        engine = LyingEngine(inner, state, LIES[attack], None if number else testbed.replies)
        state = one_round(federation, engine, state, testbed.replies[0].round + number, note)
    scores = [evaluate_tier(federation, state, tier)["macro"] for tier in federation.tiers]
    tiers = [{name: round(getattr(one, name), 4) for name in ("accuracy", "unparsed", "loss")} for one in scores]
    return {"rule": rule, "attack": attack, "seed": seed, "rounds": rounds, "dropped": dropped, "tiers": tiers}


def table(rows: list[dict[str, Any]]) -> str:
    """Accuracy in % of the tiers, mean of the seeds, and +- the deviation of the tiers' mean between seeds."""
    cells = defaultdict(list)
    for row in rows:
        cells[row["attack"], row["rule"]].append(row["tiers"])
    lines = [f"| attack | {' | '.join(RULES)} |", "|---" * (len(RULES) + 1) + "|"]
    for attack in LIES:
        texts = [in_words(cells[attack, rule]) for rule in RULES]
        lines.append(f"| {attack} | {' | '.join(texts)} |")
    return "\n".join(lines)


def in_words(seeds: list[list[dict[str, float]]]) -> str:
    if not seeds:
        return ""
    tiers = zip(*seeds, strict=True)
    each = " / ".join(f"{100 * statistics.mean(one['accuracy'] for one in tier):.0f}" for tier in tiers)
    means = [100 * statistics.mean(one["accuracy"] for one in seed) for seed in seeds]
    loss = statistics.mean(one["loss"] for seed in seeds for one in seed)
    spread = f" ± {statistics.stdev(means):.1f}" if len(means) > 1 else ""
    return f"{each}{spread} ({loss:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--attacks", default=",".join(LIES))
    parser.add_argument("--rules", default=",".join(RULES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="two cells without honest rounds")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print what is there as a table, run nothing")
    chosen = parser.parse_args()
    rows = [json.loads(line) for line in chosen.out.read_text().splitlines()] if chosen.out.exists() else []
    if chosen.table:
        print(table(rows))
        return
    attacks = ["sign flip"] if chosen.quick else [name.strip() for name in chosen.attacks.split(",")]
    rules = ["mean", "median"] if chosen.quick else [name.strip() for name in chosen.rules.split(",")]
    torch.set_num_threads(1)
    keep_freed_memory()
    done = {(row["rule"], row["attack"]) for row in rows if row["seed"] == chosen.seed}
    left = [(rule, attack) for attack in attacks for rule in rules if (rule, attack) not in done]
    # a lie about weights alone is no matter for a cap on use, one about use none for clipping
    left = [one for one in left if one[0] != "cap" or one[1] in ("none", "utilization starve", "utilization flood")]
    left = [one for one in left if one[0] != "clip" or not one[1].startswith("utilization")]
    testbed = prepared(chosen.seed, 0 if chosen.quick else HONEST)
    print(f"prepared after {time.process_time():.0f} s, honest length {testbed.honest_length}", flush=True)
    for rule, attack in left:
        began = time.process_time()
        row = cell(testbed, rule, attack, chosen.seed, 1 if chosen.quick else ATTACKED)
        with chosen.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{rule:14s}{attack:20s}{in_words([row['tiers']])}   {time.process_time() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
