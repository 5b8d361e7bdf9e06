"""The node configuration: which clients one machine of a federation is, and where things lie on it. Needs no torch.

A machine is told which clients it is in one of two ways:

    partition-id, num-partitions   every num-partitions-th client of the run file, from partition-id on, with the
                                   examples that the run file deals them: several machines share one data set
    client, budget                 one client of that name that affords that budget (1 when left out); all of
                                   data.train on this machine is its own, and no other machine sees it

It may say what its frozen experts are, of which the server is told and which every round's events record, since it trains on
another function then:

    model.experts                  "plain", "int8" or "nf4", which goes before what [tiers] says

For [secure_aggregation] it names the keys, which no server sends (docs/robustness.md):

    signing-key, peer-keys         this machine's registered private key; a folder with everybody's public ones
    unsigned                       true for a trial without keys, in which the server could listen

Plug-ins are code: one that the run file names is run only if the node names it too.

    plug-ins                       "module:function" or "/a/file.py:function" of each, with commas between them; "*" for a
                                   simulation on the machine of the run file

It may also say where things lie (model.base, model.device, data.train) and how it does its work (threads, train.micro_batch,
train.gradient_checkpointing), which then goes before what [tiers] says. What would change the work it is refused.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from ubsmoe.config import ConfigError, RunSettings, parse_run, with_overrides
from ubsmoe.config.plug_ins import ANY as ANY
from ubsmoe.config.plug_ins import plug_ins
from ubsmoe.costs.workload import NamedFormat

NodeConfig = Mapping[str, str | int | float | bool]

UNSIGNED, EXPERTS = "unsigned", "model.experts"
PLUG_INS = "plug-ins"
IDENTITY_KEYS = ("partition-id", "num-partitions", "client", "budget", EXPERTS, "signing-key", "peer-keys", UNSIGNED)
LOCATION_KEYS = ("model.base", "model.device", "data.train", "threads")
WORK_KEYS = ("train.micro_batch", "train.gradient_checkpointing")  # the same work in less memory; [tiers] has them too

KEYS, SHARES_OF_KEYS, TRAIN, UNMASK = "secure_keys", "secure_shares", "secure_train", "secure_unmask"
SECURE_STEPS = (KEYS, SHARES_OF_KEYS, TRAIN, UNMASK)
"""The kinds of message of a secure round, in order."""


def on_this_machine(settings: RunSettings, config: NodeConfig) -> tuple[RunSettings, NodeConfig]:
    """The run file as this machine carries it out, and the part of its configuration that says which clients it is.

    Raises:
        ConfigError: for an unknown key, or a place that the run file could not name either.
    """
    if "worker-seconds" in config:
        raise ConfigError("node configuration: 'worker-seconds' is now called 'resident-seconds'")
    config, own = dict(config), _own_plug_ins(settings, config)
    config.pop(PLUG_INS, None)
    known = IDENTITY_KEYS + LOCATION_KEYS + WORK_KEYS
    if unknown := [key for key in config if key not in known]:
        fault = "would change this client's work" if _is_setting(settings, unknown[0]) else "is unknown"
        raise ConfigError(
            f"node configuration: {unknown[0]!r} {fault}; a node may say {', '.join(known)}, resident-seconds"
        )
    if (experts := config.get(EXPERTS)) not in (None, *get_args(NamedFormat)):
        raise ConfigError(
            f"node configuration: {EXPERTS} is {experts!r}, expected {', '.join(map(repr, get_args(NamedFormat)))}"
        )
    places: dict[str, Any] = {key: value for key, value in config.items() if key in LOCATION_KEYS + WORK_KEYS}
    places = own | places
    places |= {key.replace("train.", "tiers."): None for key in config if key in WORK_KEYS}
    identity = {key: value for key, value in config.items() if key in IDENTITY_KEYS}
    return parse_run(with_overrides(settings.model_dump(mode="json"), places)), identity


def _own_plug_ins(settings: RunSettings, config: NodeConfig) -> dict[str, Any]:
    """The plug-ins that a client's work needs, by setting, as this node's configuration says where they lie.

    Raises:
        ConfigError: for one that it does not name; nothing of it has been imported then.
    """
    said = [name.strip() for name in str(config.get(PLUG_INS, "")).split(",")]
    allowed = {_short(name): name for name in said if name}
    needed = plug_ins(settings.model_dump(mode="json"))
    own: dict[str, Any] = {}
    for key, name in needed.items():
        if key in config or key.startswith(("evaluate.", "clients.", "method.server.")):
            continue  # the node says its own, or only the server runs it
        if _short(name) not in allowed and ANY not in allowed:
            raise ConfigError(
                f"node configuration: the run file names the plug-in {_short(name)!r} ({key}), which is code; "
                f'to run it here set plug-ins="{_short(name)}"'
            )
        own[key] = allowed.get(_short(name), name)
    return own


def _short(name: str) -> str:
    """A plug-in without the folder of its file: "/home/me/mine.py:split" is "mine:split"."""
    return Path(name).name.replace(".py:", ":")


def _is_setting(settings: RunSettings, key: str) -> bool:
    """Whether a dotted key is one of the run file's."""
    place: object = settings.model_dump()
    for part in key.split("."):
        if not isinstance(place, dict) or part not in place:
            return False
        place = place[part]
    return True
