"""The method that a run file chooses, built in one place for everybody who asks: server, clients, plan."""

from dataclasses import replace
from typing import Literal

from ubsmoe.config import ConfigError, RobustSettings, RunSettings, TierSettings
from ubsmoe.costs.secure import USE_BITS, word_bits
from ubsmoe.costs.shape import ModelShape, budget_top_k
from ubsmoe.errors import require
from ubsmoe.messages import Profile
from ubsmoe.methods import build
from ubsmoe.methods.averaging import mean_of
from ubsmoe.methods.method import Method, RunShape, by_examples, refuse
from ubsmoe.model.presets import checked_k_max, tier_formats
from ubsmoe.model.surgery import SparseModel


def run_shape(settings: RunSettings, num_layers: int, num_experts: int, k_max: int) -> RunShape:
    """What the run's method may know about the run.

    Args:
        settings: the run.
        num_layers: L, layers with experts.
        num_experts: M, experts per layer.
        k_max: K_max, experts per token at budget 1.
    """
    adapter = settings.adapter
    return RunShape(
        num_layers=num_layers,
        num_experts=num_experts,
        k_max=k_max,
        rank=adapter.rank,
        alpha=adapter.alpha,
        seed=settings.seed,
        shared_a=adapter.shared_a,
        attention=adapter.attention == "trained",
        mean=mean_of(settings.robust),
        # a round adds at most the directions of its clients' adapters
        side_rank=settings.train.rounds * settings.clients_per_round * max(adapter.rank, *settings.tiers.ranks),
        top_ks=_top_ks(settings.tiers, k_max),
        elastic=settings.tiers.elastic_share > 0,
        rank_at_budget=settings.tiers.rank_top_k == "budget",
        batch_tokens=settings.train.batch_size * settings.data.max_length,
        num_clients=settings.clients.count,
    )


def _top_ks(tiers: TierSettings, k_max: int) -> tuple[int, ...]:
    """The experts per token that some client may run; where nothing stands for skipped experts, 1 in place of 0."""
    own = {budget_top_k(k_max, budget, least=0) for budget in tiers.budgets}
    if tiers.elastic_share:
        own |= {1} if tiers.elastic_draw == "one" else set(range(1, max(own) + 1))
    return tuple(sorted(own))


def shape_of_model(settings: RunSettings, model: SparseModel) -> RunShape:
    """The same for a base that is there, with weights or without."""
    return run_shape(settings, len(model.layers), model.num_experts, model.k_max)


def shape_of_sizes(settings: RunSettings, sizes: ModelShape) -> RunShape:
    """The same for a base of which only the sizes are known. Raises ConfigError if tiers.k_max exceeds the base's own."""
    k_max = checked_k_max(settings.tiers.k_max, sizes.k_max, settings.model.base)
    return run_shape(settings, sizes.num_moe_layers, sizes.num_experts, k_max)


def chosen_method(settings: RunSettings, shape: RunShape) -> Method:
    """The run's method.

    Raises:
        UserError: for a method or a setting of it that does not exist, or sections that do not go together.
    """
    method = build(settings.method.name, shape, settings.method.settings)
    if settings.robust != RobustSettings():
        refuse(method, "robust")
    if settings.train.micro_batch or settings.tiers.micro_batch:
        refuse(method, "micro_batch")
    if settings.privacy is not None:
        refuse(method, "privacy")
        require("dp_accounting", "dp")
    if settings.secure_aggregation is not None:
        refuse(method, "secure_aggregation")
        require("cryptography", "secagg")
        secure_word(settings, weight_bits(settings, method))
    if any(profile.top_k == 0 for profile in tier_profiles(settings, method, shape)):
        _check_something_learns(settings, shape.k_max)
    return method


def _check_something_learns(settings: RunSettings, k_max: int) -> None:
    """Raise ConfigError where a tier that runs no expert would have nothing to train."""
    if "trained" not in (settings.adapter.attention, settings.adapter.router):
        raise ConfigError(
            f"tiers.budgets: {min(settings.tiers.budgets):g} of K_max = {k_max} runs no expert, and nothing but experts is "
            f'trained; set adapter.attention = "trained", or budgets of {1 / k_max:g} and more'
        )


def largest_weight(settings: RunSettings) -> int:
    """The most that one client weighs in a secure sum; alike for all in a private run."""
    assert settings.secure_aggregation is not None
    return 1 if settings.privacy else settings.secure_aggregation.max_examples


def weight_bits(settings: RunSettings, method: Method) -> int:
    """How many bits of a weight in a secure sum lie below one: none where clients weigh by whole examples."""
    return 0 if settings.privacy or method.weigh is by_examples else USE_BITS


def secure_word(settings: RunSettings, fraction: int) -> Literal[32, 64]:
    """The bits of a word of secure sums with so many bits of a weight below one. Raises ConfigError if none is wide enough."""
    secure, most = settings.secure_aggregation, largest_weight(settings)
    assert secure is not None
    clients = most_clients(settings)
    word = word_bits(clients, most, secure.bits, fraction)
    if word is None:
        raise ConfigError(
            f"secure_aggregation: sums of {clients} clients with up to {most} examples at {secure.bits} bits do not fit "
            "64-bit words; lower max_examples or bits"
        )
    return word


def most_clients(settings: RunSettings) -> int:
    """How many clients a round can have."""
    return settings.clients.count if settings.clients.sampling == "poisson" else settings.clients_per_round


def tier_profiles(settings: RunSettings, method: Method, shape: RunShape) -> list[Profile]:
    """One profile per tier, which is what evaluation dispatches to."""
    return [
        replace(client_profile(settings, method, shape, f"tier-{tier}", tier), experts=experts)
        for tier, experts in enumerate(tier_formats(settings))
    ]


def client_profile(
    settings: RunSettings, method: Method, shape: RunShape, name: str, tier: int, num_examples: int = 0
) -> Profile:
    """One client of a tier, with plain experts."""
    rank = tier_ranks(settings, method)[tier]
    return method.profile(shape, name, tier, settings.tiers.budgets[tier], rank, num_examples)


def tier_ranks(settings: RunSettings, method: Method) -> tuple[int, ...]:
    """The LoRA rank of each tier. Raises ConfigError if the method varies it and tiers.ranks has another length."""
    tiers = settings.tiers
    if method.varies != "rank":
        return (settings.adapter.rank,) * len(tiers.budgets)
    if len(tiers.ranks) != len(tiers.budgets):
        raise ConfigError(
            f"tiers.ranks has {len(tiers.ranks)} entries and tiers.budgets {len(tiers.budgets)}; "
            f"method {method.name} needs one rank per tier"
        )
    return tiers.ranks
