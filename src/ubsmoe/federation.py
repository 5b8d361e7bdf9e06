"""Everything a run needs, built once from its settings: the base, the method, the clients with their data, the questions."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ubsmoe.client import Trainer
from ubsmoe.config import ConfigError, RunSettings, to_json
from ubsmoe.data.card import data_card
from ubsmoe.data.partition import PartitionReport, partition, partition_report
from ubsmoe.data.sources import load_examples, load_test
from ubsmoe.data.tasks import Example
from ubsmoe.data.tokens import Tokens, pad_id, tokenize
from ubsmoe.evaluate import Question, prepare
from ubsmoe.messages import Announcement, Profile
from ubsmoe.methods import build
from ubsmoe.methods.base import Base, Method
from ubsmoe.model.load import load_base, weights_sha256
from ubsmoe.model.surgery import SparseModel
from ubsmoe.plan import tier_ranks
from ubsmoe.privacy import check_privacy
from ubsmoe.protection import check_protection, mean_of


@dataclass(frozen=True)
class Federation:
    """A run, ready to start.

    `clients` is one profile per client, `examples` its tokenised data; `tiers` is one profile per tier, which is what
    evaluation dispatches to.
    """

    settings: RunSettings
    model: SparseModel
    tokenizer: Any
    method: Method
    base: Base
    clients: list[Profile]
    tiers: list[Profile]
    examples: dict[str, list[Tokens]]
    questions: dict[str, list[Question]]
    partition: PartitionReport | None
    base_sha256: str
    data_card: dict[str, Any] | None

    @property
    def run_id(self) -> str:
        """The same on every machine that was given the same run file."""
        return hashlib.sha256(to_json(self.settings).encode()).hexdigest()[:16]

    @property
    def trainer(self) -> Trainer:
        """What the clients share."""
        return make_trainer(self.settings, self.model, self.method, self.tokenizer, self.base_sha256)


def build_federation(settings: RunSettings) -> Federation:
    """Load, split and tokenise everything a run needs.

    Raises:
        UserError: for any setting that cannot be met; nothing has been written by then.
    """
    server = build_server(settings)
    splits = load_examples(settings.data, server.tokenizer, settings.seed)
    train = splits.train
    parts = deal(settings, train)
    tokens = tokenize(train, server.tokenizer, settings.data, "train")
    return replace(
        server,
        clients=[admit(server, Announcement(name, len(part))) for name, part in parts.items()],
        examples={name: [tokens[i] for i in part] for name, part in parts.items()},
        partition=_report(train, list(parts.values()), settings.data.partition.field),
        data_card=data_card(settings.data, splits, tokens),
    )


def build_server(settings: RunSettings) -> Federation:
    """The same without clients and their data, which are elsewhere.

    Raises:
        UserError: as `build_federation`.
    """
    model, tokenizer = load_base(settings.model, settings.tiers.rescale, settings.tiers.k_max)
    base, method, tiers = build_method(settings, model)
    test = load_test(settings.data, tokenizer, settings.seed)
    return Federation(
        settings=settings,
        model=model,
        tokenizer=tokenizer,
        method=method,
        base=base,
        clients=[],
        tiers=tiers,
        examples={},
        questions=prepare(test, tokenizer, settings.data, settings.evaluate),
        partition=None,
        base_sha256=weights_sha256(model.model),
        data_card=None,
    )


def client_names(settings: RunSettings) -> list[str]:
    """The run file's own clients."""
    return [f"client-{i}" for i in range(settings.clients.count)]


def deal(settings: RunSettings, examples: Sequence[Example]) -> dict[str, list[int]]:
    """Which of the run's training examples each of its own clients holds."""
    parts = partition(examples, settings.data.partition, settings.clients.count, settings.seed)
    return dict(zip(client_names(settings), parts, strict=True))


def admit(federation: Federation, announced: Announcement) -> Profile:
    """What a client is asked to do: the largest tier that its budget affords, or the run file's tier for it.

    Raises:
        ConfigError: if it affords no tier, or the run file has no such client and it names no budget.
    """
    settings, names = federation.settings, client_names(federation.settings)
    if announced.budget is not None:
        affordable = [(b, tier) for tier, b in enumerate(settings.tiers.budgets) if b <= announced.budget]
        if not affordable:
            raise ConfigError(
                f"{announced.client} affords a budget of {announced.budget:g}, the smallest of tiers.budgets is "
                f"{min(settings.tiers.budgets):g}"
            )
        tier = max(affordable)[1]
    elif announced.client in names:
        tier = names.index(announced.client) % len(settings.tiers.budgets)
    else:
        raise ConfigError(f"{announced.client} is none of the run file's clients and says no budget")
    return _profile(settings, federation.method, federation.base, announced.client, tier, announced.num_examples)


def make_trainer(
    settings: RunSettings, model: SparseModel, method: Method, tokenizer: Any, base_sha256: str
) -> Trainer:
    """What clients of one process share."""
    return Trainer(
        model,
        method,
        settings.train,
        settings.tiers,
        settings.seed,
        pad_id(tokenizer),
        settings.data.loss_on_prompt,
        base_sha256,
        settings.wire.dtype,
    )


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
    return base, method, [_profile(settings, method, base, f"tier-{tier}", tier) for tier in tiers]


def _profile(settings: RunSettings, method: Method, base: Base, name: str, tier: int, num_examples: int = 0) -> Profile:
    rank = tier_ranks(settings, method)[tier]
    return method.profile(base, name, tier, settings.tiers.budgets[tier], rank, num_examples)


def _report(examples: list[Any], parts: list[list[int]], field: str) -> PartitionReport | None:
    """How unlike the clients are; None where the examples have no such field and the split did not need one."""
    try:
        return partition_report(examples, parts, field)
    except ConfigError:
        return None
