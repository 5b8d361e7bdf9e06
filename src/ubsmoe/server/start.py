"""How a run and each of its rounds begin: the server's first state, and which clients are asked."""

import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ubsmoe.config import ConfigError, RunSettings
from ubsmoe.config.plug_ins import load, plug_in
from ubsmoe.data.tokens import pad_id
from ubsmoe.export.save_load import read_peft
from ubsmoe.messages import Profile, in_order
from ubsmoe.methods.compensation import CompensationState
from ubsmoe.methods.compensation_sums import FitState
from ubsmoe.methods.method import Method, State
from ubsmoe.methods.state import pack, unpack, with_stored
from ubsmoe.seeds import generator_for
from ubsmoe.server.calibration import in_one_batch
from ubsmoe.server.federation import Federation
from ubsmoe.storage.runfolder import is_run, read_adapter, read_config


def start_state(federation: Federation) -> State:
    """What the server holds before round 1: the method's start from an adapter of the largest tier's rank.

    It is a fresh one, the PEFT adapter that adapter.start names, or all that the run which it names ended with.

    Raises:
        UserError: if that adapter does not fit the base or the run, or the method would not go on from it.
    """
    adapter, method = federation.settings.adapter, federation.method
    if adapter.start is not None and not is_run(adapter.start):
        return _start_from(federation, adapter.start)
    fresh = federation.skeleton.fresh_adapter(
        max(profile.rank for profile in federation.tiers),
        generator_for(federation.settings.seed, "adapter"),
        shared_a=adapter.shared_a,
        router=adapter.router == "trained",
        attention=adapter.attention == "trained",
    )
    state = method.start(fresh)
    return settled(_from_run(federation, Path(adapter.start), state) if adapter.start else state, method)


def _from_run(federation: Federation, folder: Path, fresh: State) -> State:
    """What a finished run ended with: its adapter, and as many parts of its state as this run's method keeps.

    What was fitted for the K of its tiers is left out where they or the method are others, and fitted anew.
    """
    tensors, facts = read_adapter(folder)
    if facts["base_sha256"] != federation.base_sha256:
        raise ConfigError(f"adapter.start: {folder} was trained on another base than {federation.settings.model.base}")
    method = federation.method
    fitted = () if _goes_on_alike(federation.settings) else (CompensationState, FitState)
    anew = {*method.client_state, *fitted}  # what goes with the clients' own, which begins with them
    stored = with_stored(fresh, tensors, [kind for kind in method.keeps if kind not in anew])
    theirs = {**_shapes(stored), "adapter.alpha": facts["alpha"]}
    ours = {**_shapes(fresh), "adapter.alpha": federation.shape.alpha}
    for name in sorted(theirs.keys() | ours.keys()):
        if theirs.get(name) != ours.get(name):
            raise ConfigError(
                f"adapter.start: {folder}, a run of {facts['method']}, has {name} of {theirs.get(name)}, this run has "
                f"{ours.get(name)}; set method, tiers.ranks and [adapter] as its config.json says them"
            )
    return stored


def _shapes(state: State) -> dict[str, Any]:
    """Shape by name of the adapter; a side factor's is left open, since its rank grows with the rounds."""
    return {name: tuple(value.shape) if name.startswith("layers.") else () for name, value in state.adapters.items()}


def _goes_on_alike(settings: RunSettings) -> bool:
    """Whether it begins from the end of a run with the same [method] and [tiers], so that nothing of its state is made anew."""
    if (start := settings.adapter.start) is None or not is_run(start):
        return False
    theirs, ours = read_config(start), settings.model_dump(mode="json")
    return all(theirs.get(section) == ours[section] for section in ("method", "tiers"))


def settled(state: State, method: Method) -> State:
    """The state as a checkpoint would give it back, so that a resumed run goes on from the very same one."""
    return unpack(in_order(pack(state)), method.keeps)


def _start_from(federation: Federation, folder: str) -> State:
    settings, method = federation.settings.adapter, federation.method
    adapter, alpha = read_peft(Path(folder), federation.model, federation.base_sha256)
    rank = max(profile.rank for profile in federation.tiers)
    theirs = next(value.shape[1] for name, value in adapter.items() if name.endswith(".A"))
    if (theirs, alpha) != (rank, settings.alpha):
        raise ConfigError(
            f"adapter.start: {folder} has rank {theirs} and alpha {alpha:g}, this run {rank} and {settings.alpha:g}; "
            f"set adapter.rank = {theirs} (or the top of tiers.ranks) and adapter.alpha = {alpha:g}"
        )
    for key, wanted in (("router", settings.router), ("attention", settings.attention)):
        if (wanted == "trained") != any(name.split(".")[2] == key for name in adapter):
            raise ConfigError(f"adapter.{key} is {wanted!r}, but {folder} says otherwise; set it to match")
    state = method.start(adapter)
    if not all(name in state.adapters and torch.equal(state.adapters[name], value) for name, value in adapter.items()):
        raise ConfigError(f"adapter.start: {method.name} begins from an adapter of its own; choose another method")
    return settled(state, method)


def calibrated(federation: Federation, state: State, number: int) -> State:
    """The state with what the method fits on text, where a fit is due before round `number`; else the same state."""
    calibration, settings = federation.method.calibration, federation.settings
    if calibration is None or not (number == 1 or (calibration.every and (number - 1) % calibration.every == 0)):
        return state
    if number == 1 and _goes_on_alike(settings):
        return state
    text = in_one_batch(federation.calibration_text, pad_id(federation.tokenizer))
    top = max(federation.tiers, key=lambda profile: profile.budget)
    draw = generator_for(settings.seed, number, "calibration")
    fitted = calibration.fit(state, federation.model, text, top, draw)
    return settled(fitted, federation.method)


def noise_key(settings: RunSettings, salt: str = "") -> str:
    """What draws and noise of one attempt at a private round follow from: its `salt`, or privacy.seed where that is set."""
    if settings.privacy is None:
        return ""
    return salt or secrets.token_hex(32) if settings.privacy.seed is None else str(settings.privacy.seed)


def sample_clients(clients: Sequence[Profile], settings: RunSettings, round: int, noise: str = "") -> Sequence[Profile]:
    """The clients asked in a round, in client order: all, a seeded draw of so many, or each with the same probability.

    That probability is the one that epsilon is reckoned with, however many of the configured clients are there; and a
    private run draws from its `noise_key`, since epsilon holds against those who do not know who was drawn.
    """
    if settings.clients.sampling == "poisson":
        draws = torch.rand(len(clients), generator=generator_for(noise or settings.seed, round, "sampling"))
        share = settings.clients_per_round / settings.clients.count
        return [client for client, draw in zip(clients, draws.tolist(), strict=True) if draw < share]
    asked = settings.clients_per_round + settings.rounds.extra_clients
    if plug_in(settings.clients.sampling):
        return _own_sample(clients, settings, round, min(asked, len(clients)))
    if asked >= len(clients):
        return clients
    draw = torch.randperm(len(clients), generator=generator_for(settings.seed, round, "sampling"))
    return [clients[i] for i in sorted(draw[:asked].tolist())]


def _own_sample(clients: Sequence[Profile], settings: RunSettings, round: int, count: int) -> Sequence[Profile]:
    """What a plug-in draws: `sample(clients, count, round, generator)` gives so many of the clients, or their names."""
    name, generator = settings.clients.sampling, generator_for(settings.seed, round, "sampling")
    drawn = load(name, "clients.sampling")(list(clients), count, round, generator)
    names = [getattr(one, "client", one) for one in drawn]
    if len(set(names)) != count or len(names) != count or not set(names) <= {client.client for client in clients}:
        raise ConfigError(f"clients.sampling: {name} drew {names} in round {round}; expected {count} different clients")
    return [client for client in clients if client.client in names]
