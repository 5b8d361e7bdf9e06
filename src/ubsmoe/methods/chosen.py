"""The method that a run file chooses, built once for everybody who asks: server, clients, plan."""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

from ubsmoe.config import ConfigError, RobustSettings, RunSettings
from ubsmoe.costs.shape import ModelShape
from ubsmoe.maths import robust
from ubsmoe.maths.means import Mean, WeightedMean
from ubsmoe.messages import Profile
from ubsmoe.methods import build
from ubsmoe.methods.method import Base, Method
from ubsmoe.model.load import checked_k_max
from ubsmoe.model.surgery import SparseModel


def build_method(settings: RunSettings, model: SparseModel) -> tuple[Base, Method, list[Profile]]:
    """The method of a run on a base that is loaded, and one profile per tier; needs no data.

    Raises:
        UserError: for a method or a setting of it that does not exist, or a protection that the method refuses.
    """
    adapter = settings.adapter
    base = Base(
        num_layers=len(model.layers),
        num_experts=model.num_experts,
        k_max=model.k_max,
        rank=adapter.rank,
        alpha=adapter.alpha,
        seed=settings.seed,
        shared_a=adapter.shared_a,
        attention=adapter.attention == "trained",
        mean=mean_of(settings.robust),
    )
    method = build(settings.method.name, base, settings.method.settings)
    check_protection(settings, method)
    check_privacy(settings, method)
    tiers = range(len(settings.tiers.budgets))
    return base, method, [profile_of(settings, method, base, f"tier-{tier}", tier) for tier in tiers]


def profile_of(
    settings: RunSettings, method: Method, base: Base, name: str, tier: int, num_examples: int = 0
) -> Profile:
    """One client of a tier, or the tier itself."""
    rank = tier_ranks(settings, method)[tier]
    return method.profile(base, name, tier, settings.tiers.budgets[tier], rank, num_examples)


def run_method(settings: RunSettings, shape: ModelShape) -> Method:
    """The run's method on a base of this shape. Raises UserError if there is none, or a setting of it is wrong."""
    k_max = checked_k_max(settings.tiers.k_max, shape.k_max, settings.model.base)
    adapter = settings.adapter
    base = Base(
        shape.num_moe_layers, shape.num_experts, k_max, adapter.rank, adapter.alpha,
        shared_a=adapter.shared_a, attention=adapter.attention == "trained",
    )  # fmt: skip
    return build(settings.method.name, base, settings.method.settings)


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


def mean_of(settings: RobustSettings) -> Callable[[], Mean]:
    """What methods average with under this rule."""
    if settings.rule in ("trimmed_mean", "median"):
        return partial(robust.TrimmedMean, settings.attackers, median=settings.rule == "median")
    return WeightedMean


def check_protection(settings: RunSettings, method: Method) -> None:
    """Refuse a protection that the method cannot run under.

    Raises:
        ConfigError: with the method's reason.
    """
    if settings.robust != RobustSettings() and (reason := method.refuses.get("robust")):
        raise ConfigError(f"[robust] cannot protect method {method.name}: {reason}")


def check_privacy(settings: RunSettings, method: Method) -> None:
    """Refuse what cannot be private.

    Raises:
        ConfigError: with the method's reason, or if the accountant is not installed.
    """
    if settings.privacy is None:
        return
    if reason := method.refuses.get("privacy"):
        raise ConfigError(f"[privacy] cannot cover method {method.name}: {reason}")
    if find_spec("dp_accounting") is None:
        raise ConfigError('[privacy] needs dp-accounting for its epsilon; pip install "ubsmoe[dp]"')
