"""[robust] in a run: which updates change, which are left out, what is refused."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from ubsmoe.config import ConfigError, RobustSettings, parse_run, with_overrides
from ubsmoe.engines.local import LocalEngine
from ubsmoe.errors import RoundError, UserError
from ubsmoe.maths.means import WeightedMean
from ubsmoe.maths.robust import TrimmedMean
from ubsmoe.messages import Dropped, Profile, Task, Tensors, Update
from ubsmoe.methods.averaging import mean_of
from ubsmoe.methods.method import Contribution
from ubsmoe.plan.tiers import run_costs
from ubsmoe.server.federation import build_federation
from ubsmoe.server.robust import Answer, robustify
from ubsmoe.server.rounds import one_round
from ubsmoe.server.start import start_state

A = "layers.0.up.A"
B = "layers.0.up.B"
SENT = {A: torch.full((2, 3), 1.0), B: torch.zeros(2, 1), "phi": torch.zeros(1, 2)}
TASK = Task(3, Profile("a", tier=0, budget=1.0, top_k=1, rank=1), SENT)


def update(client: str, by: float, counts: tuple[int, int] = (6, 4), phi: float = 0.0) -> Update:
    adapters = {A: SENT[A] + by, B: SENT[B].clone()}
    extras = {"phi": torch.full((1, 2), phi)}
    return Update(client, 3, 5, adapters, torch.tensor([counts]), 10, 10, 1.0, 1.0, extras)


def through(updates: list[Update], sent: Tensors = SENT, **robust: Any) -> tuple[list[Contribution], list[Dropped]]:
    dropped: list[Dropped] = []
    answers = [(replace(TASK, payload=sent), update) for update in updates]
    return list(robustify(answers, RobustSettings(**robust), dropped.append)), dropped


def test_without_rules_the_updates_pass_one_by_one_as_they_are() -> None:
    updates = [update("a", 1.0), update("b", 2.0)]
    asked: list[str] = []

    def answers() -> Iterator[Answer]:
        for one in updates:
            asked.append(one.client)
            yield TASK, one

    lazily = robustify(answers(), RobustSettings(), lambda _: None)
    for number, one in enumerate(updates):
        passed = next(lazily)
        assert passed.client == one.client and passed.adapters is one.adapters and len(asked) == number + 1
    assert isinstance(mean_of(RobustSettings())(), WeightedMean)


def test_a_long_change_is_shortened_with_the_methods_own_tensors() -> None:
    """By hand: six weights moved by 2 and two of phi by 4 are sqrt(24 + 32) long; at most sqrt(14) halves them."""
    (long, short), _ = through([update("a", 2.0, phi=4.0), update("b", 0.1)], clip_norm=14**0.5)
    torch.testing.assert_close(long.adapters[A], torch.full((2, 3), 2.0))
    torch.testing.assert_close(long.extras["phi"], torch.full((1, 2), 2.0))
    assert torch.equal(long.adapters[B], SENT[B])
    assert {value.dtype for value in long.adapters.values()} == {torch.float32}
    assert short.adapters[A].tolist() == update("b", 0.1).adapters[A].tolist()


def test_multi_krum_leaves_out_the_farthest_and_says_so() -> None:
    updates = [update("a", 0.1), update("b", 0.2), update("c", 9.0), update("d", 0.15), update("e", 0.12)]
    kept, dropped = through(updates, rule="multi_krum", attackers=1)
    assert [one.client for one in kept] == ["a", "b", "d", "e"]
    assert [(one.client, one.round, one.stage) for one in dropped] == [("c", 3, "robust")]
    with pytest.raises(RoundError, match=r"multi_krum.* needs 5 updates, 4 count"):
        through(updates[:4], rule="multi_krum", attackers=1)


def test_multi_krum_measures_by_what_all_clients_have() -> None:
    """FLAME's scale has the name of its client's K."""
    updates = [update(name, by) for name, by in zip("abcde", (0.1, 0.2, 9.0, 0.15, 0.12), strict=True)]
    for number, one in enumerate(updates):
        one.extras[f"scale.{1 + number % 2}"] = torch.ones(1)
    sent = SENT | {"scale.1": torch.zeros(1), "scale.2": torch.zeros(1)}
    kept, _ = through(updates, sent, rule="multi_krum", attackers=1)
    assert [one.client for one in kept] == ["a", "b", "d", "e"]


def test_counts_are_held_to_the_clients_median() -> None:
    kept, _ = through([update(name, 0.0) for name in "abcd"] + [update("liar", 0.0, (10, 0))], utilization_cap=1.25)
    capped = torch.stack([one.expert_tokens for one in kept]).squeeze(1)
    torch.testing.assert_close(capped, torch.tensor([[6.0, 4.0]] * 4 + [[7.5, 3.2]], dtype=torch.float64))


def test_trimmed_mean_and_median_are_what_methods_average_with() -> None:
    assert isinstance(mean_of(RobustSettings(rule="trimmed_mean", attackers=2))(), TrimmedMean)
    median = mean_of(RobustSettings(rule="median"))()
    for value in (1.0, 5.0, 70.0):
        median.add({"x": torch.tensor([value])}, 1.0)
    assert median.result({"x": torch.zeros(1)})["x"].item() == 5.0
    with pytest.raises(RoundError, match="needs 3 updates, 2 count"):
        through([update("a", 0.0), update("b", 0.0)], rule="trimmed_mean", attackers=1)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"robust.rule": "trimmed_mean"}, "robust: attackers is 0 with rule 'trimmed_mean'"),
        ({"robust.attackers": 1}, "robust: attackers is 1 with rule 'mean'"),
        ({"robust.rule": "multi_krum", "robust.attackers": 1}, "needs 5 clients in a round, there are 4"),
        ({"robust.rule": "trimmed_mean", "robust.attackers": 2}, "needs 5 clients in a round, there are 4"),
        ({"robust.utilization_cap": 0.5}, "robust.utilization_cap: .*greater than or equal to 1"),
        ({"robust.clipnorm": 1.0}, "unknown setting 'robust.clipnorm'; did you mean 'clip_norm'"),
        ({"simulation.dropuot": 0.1}, "unknown setting 'simulation.dropuot'; did you mean 'dropout'"),
    ],
)
def test_settings_that_protect_nothing_are_refused(
    changes: dict[str, Any], sentence: str, tiny_run: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        parse_run(with_overrides(tiny_run, changes))


@pytest.mark.parametrize("name", ["flora", "florist", "flexlora", "fedex_lora", "hetlora", "fedit"])
def test_methods_on_single_factors_refuse_with_a_reason(name: str, tiny_run: dict[str, Any]) -> None:
    settings = parse_run(with_overrides(tiny_run, {"robust.clip_norm": 1.0, "method.name": name}))
    with pytest.raises(
        UserError, match=rf"\[robust\] cannot be combined with method {name}: it needs each client's own factors"
    ):
        run_costs(settings)


def test_a_round_with_a_liar_stays_within_the_honest_range(tiny_run: dict[str, Any]) -> None:
    """Four clients train; one returns its weights turned round. Under the median no weight leaves the others' range."""
    run = parse_run(with_overrides(tiny_run, {"robust.rule": "median", "method.name": "fedavg", "adapter.rank": 4}))
    federation = build_federation(run)
    state, seen = start_state(federation), []

    class Lying(LocalEngine):
        def exchange(self, tasks):
            for reply in super().exchange(tasks):
                if reply.client == "client-2":
                    turned = {name: 2 * state.adapters[name] - value for name, value in reply.adapters.items()}
                    yield replace(reply, adapters=turned)
                else:
                    seen.append(reply.adapters)
                    yield reply

    engine = Lying(federation.trainer, federation.examples, federation.clients)
    after = one_round(federation, engine, state, 1, lambda *_, **__: None)
    for name, value in after.adapters.items():
        honest = torch.stack([one[name] for one in seen])
        assert (value >= honest.amin(0)).all() and (value <= honest.amax(0)).all()
    assert any(not torch.equal(value, state.adapters[name]) for name, value in after.adapters.items())
