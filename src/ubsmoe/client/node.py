"""One machine of a federation: the clients it is, their data, and the base, which the first task loads.

The configuration of a node (`client.node_config`) says which clients it is and where things lie on its machine.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from ubsmoe.client.node_config import EXPERTS, SECURE_STEPS, UNSIGNED, NodeConfig
from ubsmoe.client.node_config import TRAIN as SECURE_TRAIN
from ubsmoe.client.task_checks import REFUSED, checking_tasks
from ubsmoe.client.train import ClientFailure, Trainer, make_trainer, train
from ubsmoe.config import ConfigError, RunSettings
from ubsmoe.costs.workload import ExpertFormat, NamedFormat
from ubsmoe.data.partition import client_names, partition_clients
from ubsmoe.data.sources import load_examples, load_training
from ubsmoe.data.tokens import Tokens, tokenize
from ubsmoe.messages import Announcement, Task, Update
from ubsmoe.methods.chosen import chosen_method, shape_of_model
from ubsmoe.model.load import Bases, check_sha256, load_tokenizer
from ubsmoe.wire.codec import decode_task, encode_announcements, encode_update
from ubsmoe.wire.packed import MAX_MESSAGE_BYTES, Packed, disclose, enclose

if TYPE_CHECKING:
    from ubsmoe.secagg.member import Check, Sign


class Machine:
    """One process's base, loaded once, and the nodes that share it.

    Args:
        settings: the run file as this machine carries it out.
    """

    def __init__(self, settings: RunSettings) -> None:
        self.settings = settings
        self._nodes: dict[frozenset[tuple[str, object]], Node] = {}
        self._bases = Bases(settings.model, settings.tiers.rescale, settings.tiers.k_max)
        self._trainers: dict[ExpertFormat | None, Trainer] = {}
        if settings.threads:
            torch.set_num_threads(settings.threads)

    def node(self, identity: NodeConfig) -> "Node":
        """The node with this identity; it keeps its data from one message to the next."""
        return self._nodes.setdefault(frozenset(identity.items()), Node(self, identity))

    def trainer(self, experts: ExpertFormat | None) -> Trainer:
        """The base with such experts and the method; loaded by the first task that asks so, since announcing needs neither."""
        if experts not in self._trainers:
            settings, model = self.settings, self._bases(experts)
            check_sha256(settings.model, model.sha256)
            method = checking_tasks(chosen_method(settings, shape_of_model(settings, model)))
            method.check_stateless()
            self._trainers[experts] = make_trainer(settings, model, method, self._bases.tokenizer, model.sha256)
        return self._trainers[experts]


class Node:
    """Announces the clients of one machine, and trains them.

    Args:
        machine: where it runs.
        identity: the part of the node configuration that says which clients it is.
    """

    def __init__(self, machine: Machine, identity: NodeConfig) -> None:
        self._machine, self._settings, self._identity = machine, machine.settings, identity

    def answer(self, kind: str, packed: Packed) -> Packed:
        """Answer a message, bytes in and bytes out.

        Args:
            kind: "announce", "train" or one of SECURE_STEPS.
            packed: a task, if it is "train"; of a secure round the message, enclosed with its client and that one's memory.

        Raises:
            WireError: if the bytes are no task.
            UserError: as `announce` and `train`.
        """
        if kind == "announce":
            return encode_announcements(self.announce())
        if kind in SECURE_STEPS:
            return self._answer_secure(kind, packed)
        task = decode_task(packed, MAX_MESSAGE_BYTES)
        return encode_update(self.train(task), task.payload, self._settings.wire.dtype)

    def _answer_secure(self, kind: str, packed: Packed) -> Packed:
        """The answer to a message of a secure round, enclosed with the client's memory after it."""
        from ubsmoe.client.secure import SecureClient, task_in  # needs the extra secagg, which other runs need not
        from ubsmoe.secagg.messages import Start

        inner, (client, memory) = disclose(packed, "client", "memory")
        if client not in self._examples:
            raise ConfigError(f"client {client!r} is not on this machine, which has {', '.join(self._examples)}")
        if self._settings.secure_aggregation is None:
            raise ConfigError(
                "the server asks for secure aggregation, and the run file here has no [secure_aggregation]"
            )
        member = SecureClient(client, self._settings, memory, *_signing(self._identity))
        if kind == SECURE_TRAIN:
            start = Start.read(inner.header)
            member.expect(start)
            task = task_in(start, inner)
            answer = member.masked(start, task, self.train(task), self._machine.trainer(task.profile.experts).method)
        else:
            answer = member.answer(kind, inner)
        return enclose(answer, memory=member.memory)

    def announce(self) -> list[Announcement]:
        """The clients of this node; reads its data, not the base.

        Raises:
            ConfigError: if the configuration names no client of the run file, or its data cannot be read.
        """
        budget = None
        if "client" in self._identity:
            budget = _number(self._identity, "budget") if "budget" in self._identity else 1.0
        experts = cast("NamedFormat | None", self._identity.get(EXPERTS))
        return [Announcement(name, len(examples), budget, experts) for name, examples in self._examples.items()]

    def train(self, task: Task) -> Update:
        """One client's work in one round.

        Raises:
            ConfigError: if the client is not one of this node's.
            ClientFailure: if training fails, or the task is none that this run's server sends.
        """
        client = task.profile.client
        if client not in self._examples:
            raise ConfigError(f"client {client!r} is not on this machine, which has {', '.join(self._examples)}")
        if task.profile.tier >= len(self._settings.tiers.budgets):
            raise ClientFailure(f"{REFUSED}tier {task.profile.tier}, there are {len(self._settings.tiers.budgets)}")
        try:
            return train(self._machine.trainer(task.profile.experts), task, self._examples[client])
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise ClientFailure(str(error) or "out of memory") from error

    @cached_property
    def _examples(self) -> dict[str, Sequence[Tokens]]:
        settings, tokenizer = self._settings, load_tokenizer(self._settings.model)
        if "client" in self._identity:
            own = load_training(settings.data, tokenizer, settings.seed)
            return {str(self._identity["client"]): tokenize(own, tokenizer, settings.data, "train")}
        names = _share(client_names(settings), self._identity)
        pool = load_examples(settings.data, tokenizer, settings.seed).train
        parts = partition_clients(settings, pool)
        return {name: tokenize([pool[i] for i in parts[name]], tokenizer, settings.data, "train") for name in names}


def _share(names: Sequence[str], identity: NodeConfig) -> Sequence[str]:
    """The run file's clients that fall to one machine of several."""
    try:
        first, step = int(identity["partition-id"]), int(identity["num-partitions"])
    except (KeyError, ValueError):
        raise ConfigError(
            f"node configuration: expected client, or whole numbers partition-id and num-partitions, got {dict(identity)}"
        ) from None
    if not 0 <= first < step or first >= len(names):
        raise ConfigError(
            f"node configuration: partition-id {first} of num-partitions {step} has no client among {len(names)}"
        )
    return names[first::step]


def _signing(identity: NodeConfig) -> "tuple[Sign, Check]":
    """How this machine signs its keys and checks the others'."""
    from ubsmoe.secagg.signing import check_with, sign_with

    if {"signing-key", "peer-keys"} <= identity.keys():
        return sign_with(Path(str(identity["signing-key"]))), check_with(Path(str(identity["peer-keys"])))
    if not identity.get(UNSIGNED):
        raise ConfigError(
            "node configuration: [secure_aggregation] needs signing-key (this machine's private key) and peer-keys (a folder with "
            "everybody's public keys); or unsigned=true for a trial, in which a malicious server can read updates"
        )
    return (lambda one: one), (lambda one: None)


def _number(identity: NodeConfig, key: str) -> float:
    try:
        return float(identity[key])
    except ValueError:
        raise ConfigError(f"node configuration: {key} is {identity[key]!r}, expected a number") from None
