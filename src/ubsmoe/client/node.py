"""One machine of a federation: the clients it is, their data, and the base, which the first task loads.

A machine is told by its node configuration who it is, in one of two ways:

    partition-id, num-partitions   every num-partitions-th client of the run file, from partition-id on, with the
                                   examples that the run file deals them: several machines share one data set
    client, budget                 one client of that name that affords that budget (1 when left out); all of
                                   data.train on this machine is its own, and no other machine sees it

It may also say where things lie on it: model.base, model.device, data.train, threads. Nothing else of a run file is a
machine's to change.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache

import torch

from ubsmoe.client.train import ClientFailure, Trainer, make_trainer, train
from ubsmoe.config import ConfigError, RunSettings, parse_run, to_json, with_overrides
from ubsmoe.data.partition import client_names, partition_clients
from ubsmoe.data.sources import load_examples, load_training
from ubsmoe.data.tokens import Tokens, tokenize
from ubsmoe.messages import Announcement, Task, Update
from ubsmoe.methods.chosen import chosen_method, shape_of_model
from ubsmoe.model.load import load_base, load_tokenizer, weights_sha256
from ubsmoe.wire.codec import decode_task, encode_announcements, encode_update
from ubsmoe.wire.packed import MAX_MESSAGE_BYTES, Packed

NodeConfig = Mapping[str, str | int | float | bool]

IDENTITY_KEYS = ("partition-id", "num-partitions", "client", "budget")
LOCATION_KEYS = ("model.base", "model.device", "data.train", "threads")


class Node:
    """What one machine does in a federation: say who it is, and train.

    Args:
        settings: the run file.
        config: the node configuration.

    Raises:
        ConfigError: if it cannot be made sense of.
    """

    def __init__(self, settings: RunSettings, config: NodeConfig) -> None:
        if unknown := [key for key in config if key not in IDENTITY_KEYS + LOCATION_KEYS]:
            raise ConfigError(
                f"node configuration: unknown key {unknown[0]!r}; known are {', '.join(IDENTITY_KEYS + LOCATION_KEYS)}"
            )
        where = {key: value for key, value in config.items() if key in LOCATION_KEYS}
        self._settings = parse_run(with_overrides(settings.model_dump(mode="json"), where))
        self._config = config
        if self._settings.threads:
            torch.set_num_threads(self._settings.threads)

    def answer(self, kind: str, packed: Packed) -> Packed:
        """Bytes in, bytes out: "announce" or "train". Raises WireError too, for bytes that are no task."""
        if kind == "announce":
            return encode_announcements(self.announce())
        task = decode_task(packed, MAX_MESSAGE_BYTES)
        return encode_update(self.train(task), task.payload, self._settings.wire.dtype)

    def announce(self) -> list[Announcement]:
        """The clients of this machine; reads its data, not the base."""
        budget = None
        if "client" in self._config:
            budget = _number(self._config, "budget") if "budget" in self._config else 1.0
        return [Announcement(name, len(examples), budget) for name, examples in self._examples.items()]

    def train(self, task: Task) -> Update:
        """One client's work in one round.

        Raises:
            ConfigError: if the client is not one of this machine's.
            ClientFailure: if training fails.
        """
        client = task.profile.client
        if client not in self._examples:
            raise ConfigError(f"client {client!r} is not on this machine, which has {', '.join(self._examples)}")
        try:
            return train(_trainer(to_json(self._settings)), task, self._examples[client])
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise ClientFailure(str(error) or "out of memory") from error

    @cached_property
    def _examples(self) -> dict[str, Sequence[Tokens]]:
        settings, tokenizer = self._settings, load_tokenizer(self._settings.model)
        if "client" in self._config:
            own = load_training(settings.data, tokenizer, settings.seed)
            return {str(self._config["client"]): tokenize(own, tokenizer, settings.data, "train")}
        names = _share(client_names(settings), self._config)
        pool = load_examples(settings.data, tokenizer, settings.seed).train
        parts = partition_clients(settings, pool)
        return {name: tokenize([pool[i] for i in parts[name]], tokenizer, settings.data, "train") for name in names}


@lru_cache(maxsize=64)
def _node(settings: str, config: str) -> Node:
    return Node(parse_run(json.loads(settings)), json.loads(config))


def node_of(settings: RunSettings, config: NodeConfig) -> Node:
    """The node of this configuration; in one process what one message has loaded the next one finds. Errors as `Node`."""
    return _node(to_json(settings), json.dumps(config, sort_keys=True))


@lru_cache(maxsize=1)
def _trainer(settings: str) -> Trainer:
    """The base, shared by the nodes of one process that train the same way on the same device."""
    run = parse_run(json.loads(settings))
    model, tokenizer = load_base(run.model, run.tiers.rescale, run.tiers.k_max)
    method = chosen_method(run, shape_of_model(run, model))
    return make_trainer(run, model, method, tokenizer, weights_sha256(model.model))


def _share(names: Sequence[str], config: NodeConfig) -> Sequence[str]:
    """The run file's clients that fall to one machine of several."""
    try:
        first, step = int(config["partition-id"]), int(config["num-partitions"])
    except (KeyError, ValueError):
        raise ConfigError(
            f"node configuration: expected client, or whole numbers partition-id and num-partitions, got {dict(config)}"
        ) from None
    if not 0 <= first < step or first >= len(names):
        raise ConfigError(
            f"node configuration: partition-id {first} of num-partitions {step} has no client among {len(names)}"
        )
    return names[first::step]


def _number(config: NodeConfig, key: str) -> float:
    try:
        return float(config[key])
    except ValueError:
        raise ConfigError(f"node configuration: {key} is {config[key]!r}, expected a number") from None
