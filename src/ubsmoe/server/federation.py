"""Everything a run needs, built once from its settings: the base, the method, the clients with their data, the questions."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ubsmoe.client.train import Memory, Trainer, make_trainer
from ubsmoe.config import ConfigError, RunSettings, format_named, to_json
from ubsmoe.data.card import data_card
from ubsmoe.data.partition import PartitionReport, partition_clients, partition_report, tier_of_client
from ubsmoe.data.sources import by_task, load_examples, load_test
from ubsmoe.data.tasks import Example
from ubsmoe.data.tokens import Tokens, tokenize
from ubsmoe.messages import Announcement, Profile
from ubsmoe.methods.chosen import chosen_method, client_profile, shape_of_model, tier_profiles
from ubsmoe.methods.method import Method, RunShape
from ubsmoe.model.load import Bases, check_sha256, load_skeleton
from ubsmoe.model.presets import check_length
from ubsmoe.model.surgery import SparseModel
from ubsmoe.server.answers import Question
from ubsmoe.server.calibration import written_by_base
from ubsmoe.server.evaluate import prepare
from ubsmoe.server.validator import UpdateSpecs


@dataclass(frozen=True)
class Federation:
    """A run, ready to start.

    `clients` is one profile per client, `examples` its tokenised data; `tiers` is one profile per tier, which is what
    evaluation dispatches to. `shape` is what the method knows about the run. `skeleton` is the base without weights, on which
    the server looks at names and shapes; `model` is the same object where the server has no use for weights. `bases` is the base
    in every format that clients have, `model` the largest budget's. `memory` is what clients in this process keep between rounds.
    `validation` is what early stopping goes by.
    """

    settings: RunSettings
    model: SparseModel
    skeleton: SparseModel
    tokenizer: Any
    method: Method
    shape: RunShape
    clients: list[Profile]
    tiers: list[Profile]
    examples: dict[str, list[Tokens]]
    questions: dict[str, list[Question]]
    partition: PartitionReport | None
    base_sha256: str
    data_card: dict[str, Any] | None
    bases: Bases | None = None
    memory: Memory | None = None
    validation: Sequence[Question] = ()

    @property
    def run_id(self) -> str:
        """The same on every machine that was given the same run file."""
        return hashlib.sha256(to_json(self.settings).encode()).hexdigest()[:16]

    @property
    def trainer(self) -> Trainer:
        """What the clients share."""
        own = make_trainer(self.settings, self.model, self.method, self.tokenizer, self.base_sha256, self.bases)
        return replace(own, memory=self.memory)

    def model_of(self, profile: Profile) -> SparseModel:
        """The base as clients of this profile have it."""
        return self.bases(profile.experts) if self.bases else self.model

    @cached_property
    def specs(self) -> UpdateSpecs:
        """What an update to a task looks like."""
        return UpdateSpecs(self.skeleton, self.method)

    @cached_property
    def calibration_text(self) -> list[Tokens]:
        """What the base writes to fit a method's compensation on: the same before every round, so it is written once."""
        assert self.method.calibration, "only a method with a compensation is fitted"
        return written_by_base(self.model, self.tokenizer, self.settings, self.method.calibration.tokens)


def build_federation(settings: RunSettings) -> Federation:
    """Load, split and tokenise everything a run needs.

    Raises:
        UserError: for any setting that cannot be met; nothing has been written by then.
    """
    server = build_server(settings, weights=True)
    for tier in server.tiers:
        server.model_of(tier)  # loaded here, so that worker processes share it
    splits = load_examples(settings.data, server.tokenizer, settings.seed)
    train = splits.train
    parts = partition_clients(settings, train)
    tokens = tokenize(train, server.tokenizer, settings.data, "train")
    return replace(
        server,
        clients=[assign_tier(server, Announcement(name, len(part))) for name, part in parts.items()],
        examples={name: [tokens[i] for i in part] for name, part in parts.items()},
        partition=_report(train, list(parts.values()), settings.data.partition.field),
        data_card=data_card(settings.data, splits, tokens),
    )


def build_server(settings: RunSettings, weights: bool | None = None) -> Federation:
    """The same without clients and their data, which are elsewhere.

    Args:
        settings: the run.
        weights: whether to load the base's weights; when left out only if the run evaluates, or its method fits on text. Without
            them names and shapes are known, which is all that validation and aggregation need.

    Raises:
        UserError: as `build_federation`; and without weights if the run file does not say which base the clients must have.
    """
    place = settings.model, settings.tiers.rescale, settings.tiers.k_max
    bases: Bases | None = None
    skeleton = load_skeleton(*place)
    check_length(skeleton.model.config, settings.data.max_length, settings.model.base)
    shape = shape_of_model(settings, skeleton)
    method = chosen_method(settings, shape)  # refused, if it is, before any weights are loaded
    evaluate, tiers = settings.evaluate, tier_profiles(settings, method, shape)
    needed = evaluate.before or evaluate.after or evaluate.every or method.calibration or settings.train.patience
    if weights or (weights is None and needed):
        bases = Bases(*place)
        model = bases(max(tiers, key=lambda profile: profile.budget).experts)
        sha256, tokenizer = model.sha256, bases.tokenizer
        check_sha256(settings.model, sha256)
        questions = prepare(load_test(settings.data, tokenizer, settings.seed), tokenizer, settings.data, evaluate)
        validation = _validation(settings, tokenizer)
    else:
        model, tokenizer, questions, validation = skeleton, None, {}, []  # nothing is tokenised here
        if not (sha256 := settings.model.sha256 or ""):
            raise ConfigError(
                "model.sha256: this server evaluates nothing and loads no weights, so it cannot tell which base its clients must "
                f"have; set it to what `ubsmoe base hash BASE --set model.dtype={settings.model.dtype}` prints where the base is"
            )
    return Federation(
        settings=settings,
        model=model,
        skeleton=skeleton,
        tokenizer=tokenizer,
        method=method,
        shape=shape,
        clients=[],
        tiers=tiers,
        examples={},
        questions=questions,
        partition=None,
        base_sha256=sha256,
        data_card=None,
        bases=bases,
        validation=validation,
    )


def _validation(settings: RunSettings, tokenizer: Any) -> list[Question]:
    """What early stopping goes by: the loss of right answers alone, so that nothing else is read."""
    if not settings.train.patience:
        return []
    held_out = by_task(load_examples(settings.data, tokenizer, settings.seed).validation)
    alone = settings.evaluate.model_copy(update={"mc_accuracy": False, "max_examples": None})
    return [one for group in prepare(held_out, tokenizer, settings.data, alone).values() for one in group]


def assign_tier(federation: Federation, announced: Announcement) -> Profile:
    """What a client is asked to do: the largest tier that its budget affords, or the run file's tier for it.

    Raises:
        ConfigError: if it affords no tier, or the run file has no such client and it names no budget.
    """
    settings, own = federation.settings, tier_of_client(federation.settings)
    if announced.budget is not None:
        affordable = [(b, tier) for tier, b in enumerate(settings.tiers.budgets) if b <= announced.budget]
        if not affordable:
            raise ConfigError(
                f"{announced.client} affords a budget of {announced.budget:g}, the smallest of tiers.budgets is "
                f"{min(settings.tiers.budgets):g}"
            )
        tier = max(affordable)[1]
    elif announced.client in own:
        tier = own[announced.client]
    else:
        raise ConfigError(f"{announced.client} is not in the run file and announced no budget")
    profile = client_profile(
        settings, federation.method, federation.shape, announced.client, tier, announced.num_examples
    )
    named = announced.experts
    return replace(profile, experts=format_named(named) if named else federation.tiers[tier].experts)


def _report(examples: Sequence[Example], parts: list[list[int]], field: str) -> PartitionReport | None:
    """How unlike the clients are; None where the examples have no such field and the split did not need one."""
    try:
        return partition_report(examples, parts, field)
    except ConfigError:
        return None
