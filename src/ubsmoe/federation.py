"""Everything a run needs, built once from its settings: the base, the method, the clients with their data, the questions."""

import hashlib
from dataclasses import dataclass
from typing import Any

from ubsmoe.client import Trainer
from ubsmoe.config import ConfigError, RunSettings, to_json
from ubsmoe.data.partition import PartitionReport, partition, partition_report
from ubsmoe.data.sources import load_examples
from ubsmoe.data.tokens import Tokens, pad_id, tokenize
from ubsmoe.evaluate import Question, prepare
from ubsmoe.messages import Profile
from ubsmoe.methods import build
from ubsmoe.methods.base import Base, Method
from ubsmoe.model.load import load_base, weights_sha256
from ubsmoe.model.surgery import SparseModel
from ubsmoe.plan import tier_ranks


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

    @property
    def run_id(self) -> str:
        """The same on every machine that was given the same run file."""
        return hashlib.sha256(to_json(self.settings).encode()).hexdigest()[:16]

    @property
    def trainer(self) -> Trainer:
        """What the clients share."""
        settings = self.settings
        return Trainer(
            self.model,
            self.method,
            settings.train,
            settings.tiers,
            settings.seed,
            pad_id(self.tokenizer),
            settings.data.loss_on_prompt,
            self.base_sha256,
            settings.wire.dtype,
        )


def build_federation(settings: RunSettings) -> Federation:
    """Load, split and tokenise everything a run needs.

    Raises:
        UserError: for any setting that cannot be met; nothing has been written by then.
    """
    model, tokenizer = load_base(settings.model, settings.tiers.rescale, settings.tiers.k_max)
    base, method, tiers = build_method(settings, model)
    splits = load_examples(settings.data, tokenizer, settings.seed)
    parts = partition(splits.train, settings.data.partition, settings.clients.count, settings.seed)
    tokens = tokenize(splits.train, tokenizer, settings.data, "train")
    names = [f"client-{i}" for i in range(settings.clients.count)]
    sizes = [len(part) for part in parts]
    return Federation(
        settings=settings,
        model=model,
        tokenizer=tokenizer,
        method=method,
        base=base,
        clients=[
            _profile(settings, method, base, name, i % len(settings.tiers.budgets), size)
            for i, (name, size) in enumerate(zip(names, sizes, strict=True))
        ],
        tiers=tiers,
        examples={name: [tokens[i] for i in part] for name, part in zip(names, parts, strict=True)},
        questions=prepare(splits.test, tokenizer, settings.data, settings.evaluate),
        partition=_report(splits.train, parts, settings.data.partition.field),
        base_sha256=weights_sha256(model.model),
    )


def build_method(settings: RunSettings, model: SparseModel) -> tuple[Base, Method, list[Profile]]:
    """The method of a run on a base that is loaded, and one profile per tier; needs no data.

    Raises:
        UserError: for a method or a setting of it that does not exist.
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
    )
    method = build(settings.method.name, base, settings.method.settings)
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
