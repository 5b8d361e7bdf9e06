"""A client's work: the loss, one optimiser step, what it counts, and the base it leaves behind."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from ubsmoe.client.node_config import on_this_machine
from ubsmoe.client.schedule import elastic_top_ks, step_size, steps_per_round
from ubsmoe.client.train import ClientFailure, Trainer, language_loss, train
from ubsmoe.config import ConfigError, TierSettings, TrainSettings, parse_run, train_of_tier, with_overrides
from ubsmoe.data.tokens import Tokens, collate
from ubsmoe.errors import UserError
from ubsmoe.messages import Task
from ubsmoe.methods.chosen import chosen_method
from ubsmoe.methods.method import Hooks, install_adapter
from ubsmoe.model.identity import weights_sha256
from ubsmoe.seeds import generator_for
from ubsmoe.server.federation import Federation, build_federation

MIXED = [Tokens(tuple(range(5, 5 + length)), prompt) for length, prompt in ((12, 4), (7, 5), (20, 3), (9, 8), (15, 6))]
SGD = TrainSettings(local_steps=1, optimizer="sgd", momentum=0.0, learning_rate=0.5, clip_norm=None)


@pytest.fixture(scope="module")
def federation(random_base: Any) -> Federation:
    table = {
        "model": {"base": str(random_base)},
        "adapter": {"rank": 3, "alpha": 6.0},
        "clients": {"count": 4},
        "data": {"synthetic": {"train_examples": 24, "test_examples": 8, "entities": 8}},
        "method": {"name": "fedavg"},
    }
    return build_federation(parse_run(table))


@pytest.fixture
def task(federation: Federation) -> Task:
    adapter = federation.model.fresh_adapter(3, generator_for("adapter"), shared_a=True)
    gen = generator_for("B")
    adapter = {
        name: value if name.endswith(".A") else 0.1 * torch.randn(value.shape, generator=gen)
        for name, value in adapter.items()
    }
    return Task(1, federation.clients[1], adapter)


def trained(federation: Federation, task: Task, settings: TrainSettings, examples: list[Tokens], **change: Any) -> Any:
    trainer: Trainer = replace(federation.trainer, settings=settings, **change)
    return train(trainer, task, examples)


def test_the_loss_is_that_of_a_full_forward_pass(federation: Federation, task: Task) -> None:
    model = federation.model
    install_adapter(model, task.payload, task.profile, alpha=6.0)
    try:
        for on_prompt in (False, True):
            batch = collate(MIXED, pad_id=0, loss_on_prompt=on_prompt)
            with torch.no_grad():
                expected = model.model(**batch, use_cache=False).loss
            torch.testing.assert_close(language_loss(model, batch).detach(), expected)
    finally:
        model.clear()


def test_accumulated_micro_batches_are_one_large_batch(federation: Federation, task: Task) -> None:
    """Answers of unequal length too: a mean of means would weigh a short batch's tokens more."""
    large = trained(federation, task, SGD.model_copy(update={"batch_size": 6}), MIXED)
    # 2 + 2 + 1 of the five examples
    small = trained(federation, task, SGD.model_copy(update={"batch_size": 2, "gradient_accumulation": 3}), MIXED)
    assert small.loss == pytest.approx(large.loss, rel=1e-5)
    for name, value in large.adapters.items():
        assert not torch.equal(value, task.payload[name])
        torch.testing.assert_close(small.adapters[name], value, rtol=1e-4, atol=1e-6)


def test_a_penalty_counts_once_a_step_however_many_micro_batches_it_has(federation: Federation, task: Task) -> None:
    """0.3 |theta|^2 moves theta by -0.5 * 0.6 theta, whatever the data do."""

    def install(model: Any, *given: Any) -> Hooks:
        hooks = federation.method.install(model, *given)

        def squares() -> torch.Tensor:
            return torch.stack([value.square().sum() for value in model.adapter.values()]).sum()

        return hooks.and_then(Hooks(penalties=[lambda: 0.1 * squares(), lambda: 0.2 * squares()]))

    penalised = replace(federation.method, install=install)
    for sizes in ({"batch_size": 6}, {"batch_size": 2, "gradient_accumulation": 3}):
        settings = SGD.model_copy(update=sizes)
        plain = trained(federation, task, settings, MIXED)
        update = trained(federation, task, settings, MIXED, method=penalised)
        for name, start in task.payload.items():
            torch.testing.assert_close(update.adapters[name], plain.adapters[name] - 0.3 * start, rtol=1e-4, atol=1e-6)


def test_a_plain_step_is_the_learning_rate_times_the_gradient(federation: Federation, task: Task) -> None:
    model = federation.model
    install_adapter(model, task.payload, task.profile, alpha=6.0)
    language_loss(model, collate(MIXED, pad_id=0)).backward()
    expected = {name: value.detach() - 0.5 * value.grad for name, value in model.adapter.items()}
    model.clear()
    update = trained(federation, task, SGD.model_copy(update={"batch_size": 5}), MIXED)
    for name, value in expected.items():
        torch.testing.assert_close(update.adapters[name], value, rtol=1e-4, atol=1e-6)


def test_steps_tell_loss_rate_and_the_norm_of_the_gradient_before_it_is_clipped(
    federation: Federation, task: Task
) -> None:
    model = federation.model
    install_adapter(model, task.payload, task.profile, alpha=6.0)
    language_loss(model, collate(MIXED, pad_id=0)).backward()
    expected = torch.cat([value.grad.flatten() for value in model.adapter.values()]).norm()
    model.clear()
    settings = SGD.model_copy(update={"batch_size": 5, "warmup_steps": 4, "local_steps": 3})
    for clip in (None, 1e-3):
        update = trained(federation, task, settings.model_copy(update={"clip_norm": clip}), MIXED)
        assert [step.number for step in update.steps] == [1, 2, 3]
        assert [step.learning_rate for step in update.steps] == pytest.approx([0.125, 0.25, 0.375])
        assert sum(step.loss for step in update.steps) / 3 == pytest.approx(update.loss)
        assert update.steps[0].gradient_norm == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("private", [{"privacy": {"noise_multiplier": 1.0}}, {"secure_aggregation": {}}])
def test_a_client_of_a_private_run_tells_no_steps(federation: Federation, task: Task, private: dict[str, Any]) -> None:
    run = federation.settings.model_copy(update={name: object() for name in private})
    assert trained(federation, task, SGD, MIXED, run=run).steps == ()


def test_lora_plus_moves_b_by_its_ratio_and_a_as_before(federation: Federation, task: Task) -> None:
    plain = trained(federation, task, SGD, MIXED).adapters
    plus = trained(federation, task, SGD.model_copy(update={"lora_plus_ratio": 3.0}), MIXED).adapters
    for name, start in task.payload.items():
        ratio = 3.0 if name.endswith(".B") else 1.0
        torch.testing.assert_close(plus[name] - start, ratio * (plain[name] - start), rtol=1e-4, atol=1e-6)


def test_warm_up_starts_at_its_share_of_the_rate(federation: Federation, task: Task) -> None:
    full = trained(federation, task, SGD.model_copy(update={"batch_size": 5}), MIXED)
    warm = trained(federation, task, SGD.model_copy(update={"batch_size": 5, "warmup_steps": 4}), MIXED)
    for name, start in task.payload.items():
        torch.testing.assert_close(warm.adapters[name] - start, (full.adapters[name] - start) / 4, rtol=1e-3, atol=1e-6)


def test_clipping_bounds_the_whole_step(federation: Federation, task: Task) -> None:
    settings = SGD.model_copy(update={"batch_size": 5, "learning_rate": 1.0, "clip_norm": 1e-3})
    update = trained(federation, task, settings, MIXED)
    step = torch.cat([(value - task.payload[name]).flatten() for name, value in update.adapters.items()])
    assert float(step.norm()) == pytest.approx(1e-3, rel=1e-2)


def test_counts_are_tokens_times_experts_without_padding(federation: Federation, task: Task) -> None:
    update = trained(federation, task, SGD.model_copy(update={"batch_size": 5}), MIXED)
    assert update.tokens == 12 + 7 + 20 + 9 + 15
    assert update.assignments == update.tokens * task.profile.top_k
    assert update.expert_tokens.sum(dim=-1).tolist() == [update.assignments] * 2


def test_counts_of_elastic_steps_follow_the_experts_that_ran(federation: Federation, task: Task) -> None:
    tiers = TierSettings(elastic_share=0.5)
    settings = SGD.model_copy(update={"batch_size": 5, "local_steps": 2})
    update = trained(federation, task, settings, MIXED, tiers=tiers)
    assert update.assignments == 63 * task.profile.top_k + 63 * 1
    assert update.expert_tokens.sum(dim=-1).tolist() == [update.assignments] * 2


def test_training_leaves_the_base_as_it_was_and_repeats_bit_for_bit(federation: Federation, task: Task) -> None:
    before = weights_sha256(federation.model.model)
    settings = TrainSettings(local_steps=3, batch_size=2)
    first, second = (trained(federation, task, settings, MIXED) for _ in range(2))
    assert weights_sha256(federation.model.model) == before
    assert federation.model.adapter == {} and federation.model.layers[0].routing.top_k == federation.model.k_max
    assert all(torch.equal(value, second.adapters[name]) for name, value in first.adapters.items())
    assert first.loss == second.loss
    other = train(replace(federation.trainer, settings=settings, seed=1), task, MIXED)
    assert other.loss != first.loss


def test_progress_is_told_after_every_step(federation: Federation, task: Task) -> None:
    heard: list[tuple[int, int]] = []
    trainer = replace(federation.trainer, settings=TrainSettings(local_steps=3, batch_size=2))
    train(trainer, task, MIXED, lambda step, steps, loss: heard.append((step, steps)))
    assert heard == [(1, 3), (2, 3), (3, 3)]


def test_a_loss_that_is_no_number_stops_the_client_by_name(federation: Federation, task: Task) -> None:
    broken = replace(task, payload={name: value * float("nan") for name, value in task.payload.items()})
    with pytest.raises(ClientFailure, match=r"client client-1, round 1, step 0: the loss is nan; lower"):
        trained(federation, broken, SGD, MIXED)
    assert federation.model.adapter == {}


@pytest.mark.parametrize(
    ("change", "examples", "steps"),
    [
        ({"local_steps": 7, "local_epochs": 3.0}, 10, 7),
        ({"batch_size": 4}, 10, 3),  # batches of 4, 4 and 2
        ({"batch_size": 4, "local_epochs": 2.0}, 10, 6),
        ({"batch_size": 4, "local_epochs": 0.01}, 10, 1),
        ({"batch_size": 4, "gradient_accumulation": 3}, 10, 1),
        ({"batch_size": 5, "local_epochs": 0.5}, 40, 4),
    ],
)
def test_epochs_are_passes_over_the_clients_batches(change: dict[str, Any], examples: int, steps: int) -> None:
    assert steps_per_round(TrainSettings(**change), examples) == steps


@pytest.mark.parametrize("share", [0.0, 0.25, 0.3, 0.5, 1.0])
def test_elastic_steps_keep_their_share_and_are_spread(share: float) -> None:
    budgets = elastic_top_ks(TierSettings(elastic_share=share), 6, 0, 20, generator_for("elastic"))
    low = [step for step, top_k in enumerate(budgets) if top_k == 1]
    assert len(low) == round(20 * share) and set(budgets) <= {1, 6}
    if share == 0.25:
        assert low == [3, 7, 11, 15, 19]


def test_a_share_below_one_step_a_round_is_kept_over_the_rounds() -> None:
    tiers, generator = TierSettings(elastic_share=0.1), generator_for("elastic")
    rounds = [elastic_top_ks(tiers, 6, 4 * number, 4, generator) for number in range(10)]
    assert sum(top_k == 1 for budgets in rounds for top_k in budgets) == 4


def test_uniform_elastic_draws_stay_within_the_clients_budget() -> None:
    draw: Callable[[str], list[int]] = lambda key: elastic_top_ks(  # noqa: E731
        TierSettings(elastic_share=1.0, elastic_draw="uniform"), 5, 0, 400, generator_for(key)
    )
    budgets = draw("a")
    assert set(budgets) == {1, 2, 3, 4, 5} and budgets == draw("a") != draw("b")


@pytest.mark.parametrize("micro_batch", [1, 2, 3])
@pytest.mark.parametrize(
    "method",
    [
        {"name": "fedavg"},
        {"name": "ubsmoe"},
        {"name": "ubsmoe", "pg": {"mode": "self_ipw"}},
        {"name": "ubsmoe", "pg": {"mode": "oracle", "scope": ["experts", "hidden"]}},
        {"name": "hetlora"},
    ],
    ids=str,
)
def test_a_step_in_micro_batches_is_the_step_of_the_whole_batch(
    federation: Federation, task: Task, method: dict[str, Any], micro_batch: int
) -> None:
    """The same batches, masses, penalties, counts and loss; the sums in another order, so equal but for rounding."""
    settings = parse_run({**federation.settings.model_dump(), "method": method})
    built = chosen_method(settings, federation.shape)
    start = built.start(dict(task.payload))
    asked = replace(task, payload=built.dispatch(start, task.profile))
    pieces = SGD.model_copy(update={"batch_size": 6, "micro_batch": micro_batch})
    tiers = federation.settings.tiers
    whole = trained(federation, asked, SGD.model_copy(update={"batch_size": 6}), MIXED, method=built)
    small = trained(federation, asked, pieces, MIXED, method=built)
    by_tier = tiers.model_copy(update={"micro_batch": tuple([micro_batch] * len(tiers.budgets))})
    again = trained(
        federation, asked, pieces.model_copy(update={"micro_batch": None}), MIXED, method=built, tiers=by_tier
    )
    assert small.loss == pytest.approx(whole.loss, rel=1e-5) and small.loss == again.loss
    assert torch.equal(small.expert_tokens, whole.expert_tokens)
    assert (small.tokens, small.assignments) == (whole.tokens, whole.assignments)
    for name, value in whole.adapters.items():
        torch.testing.assert_close(small.adapters[name], value, rtol=1e-4, atol=2e-6)
        assert torch.equal(small.adapters[name], again.adapters[name])


@pytest.mark.parametrize(
    "method",
    [{"name": "smoe_llb"}, {"name": "smoe_glb"}, {"name": "hfedmoe"}, {"name": "ubsmoe", "pg": {"mode": "sampled"}}],
)
def test_micro_batches_are_refused_where_they_are_other_work(federation: Federation, method: dict[str, Any]) -> None:
    for change in ({"train.micro_batch": 4}, {"tiers.micro_batch": [16, 4, 2, 1]}):
        settings = parse_run(with_overrides({**federation.settings.model_dump(), "method": method}, change))
        with pytest.raises(UserError, match="micro_batch cannot be combined"):
            chosen_method(settings, federation.shape)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"train.micro_batch": 5}, "micro_batch is 5, which does not divide train.batch_size = 16; .* 1, 2, 4, 8, 16"),
        ({"tiers.micro_batch": [1, 2, 4, 32]}, "micro_batch is 32, which does not divide"),
        ({"tiers.micro_batch": [1, 2]}, "micro_batch has 2 entries and budgets 4; expected one per tier"),
        ({"tiers.gradient_checkpointing": [True]}, "gradient_checkpointing has 1 entries and budgets 4"),
    ],
)
def test_settings_of_tiers_that_make_no_sense_are_refused(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        parse_run(with_overrides({}, change))


def test_a_node_may_say_how_it_does_its_work_but_not_what() -> None:
    settings = parse_run({"tiers": {"micro_batch": [1, 2, 4, 8], "gradient_checkpointing": [True] * 4}})
    own = {"train.micro_batch": 4, "train.gradient_checkpointing": False, "threads": 2, "client": "me"}
    ours, identity = on_this_machine(settings, own)
    assert identity == {"client": "me"} and ours.threads == 2
    for tier in range(4):
        train = train_of_tier(ours.train, ours.tiers, tier)
        assert (train.micro_batch, train.gradient_checkpointing) == (4, False)
    for key in ("train.batch_size", "model.dtype", "tiers.budgets", "method.name"):
        with pytest.raises(
            ConfigError, match=f"{key}' would change this client's work; a node may say .*train.micro_batch"
        ):
            on_this_machine(settings, {key: 1})
    with pytest.raises(ConfigError, match=r"'train\.microbatch' is unknown"):
        on_this_machine(settings, {"train.microbatch": 1})
    with pytest.raises(ConfigError, match="does not divide"):
        on_this_machine(settings, {"train.micro_batch": 3})


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [1.0] * 5), ("linear", [1.0, 0.75, 0.5, 0.25, 0.0]), ("cosine", [1.0, 0.853553, 0.5, 0.146447, 0.0])],
)
def test_a_schedule_spans_the_rounds_and_warm_up_lies_over_it(schedule: str, expected: list[float]) -> None:
    settings = TrainSettings(schedule=schedule, schedule_rounds=2, rounds=9)
    places = [(1, 0), (1, 1), (2, 0), (2, 1), (3, 1)]
    assert [step_size(settings, number, step, 2) for number, step in places] == pytest.approx(expected, abs=1e-6)
    warm = TrainSettings(schedule=schedule, schedule_rounds=2, warmup_steps=2)
    assert step_size(warm, 2, 0, 2) == pytest.approx(expected[2] / 2)
