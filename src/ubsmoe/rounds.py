"""A run: dispatch -> exchange -> aggregate -> evaluate, once a round, and nothing else."""

import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ubsmoe.config import ConfigError, RunSettings
from ubsmoe.evaluate import Score, evaluate
from ubsmoe.exports import read_peft
from ubsmoe.federation import Federation
from ubsmoe.messages import Dropped, Profile, Reply, Task, Update
from ubsmoe.methods.base import State
from ubsmoe.privacy import noisy_mean, spent
from ubsmoe.protection import protected
from ubsmoe.seeds import generator_for
from ubsmoe.storage.runfolder import RunFolder
from ubsmoe.tally import Tally
from ubsmoe.wire.change import upload_bytes
from ubsmoe.wire.gate import Gate, expected_form

Report = Callable[[str, int, dict[str, Any]], None]
ScoreAll = Callable[[Iterable[Task]], Iterable[dict[str, Score]]]


class Engine(Protocol):
    """How tasks reach clients and replies come back, in the order of the tasks."""

    def exchange(self, tasks: Iterable[Task]) -> Iterator[Reply]:
        """Yield each task's update, or why there is none."""
        ...


def run(
    federation: Federation, folder: RunFolder, engine: Engine, report: Report, score_all: ScoreAll | None = None
) -> dict[str, Any]:
    """Carry out a run, or what is left of it, and write its adapter and summary.

    Args:
        federation: what `build_federation` made.
        folder: where everything is written; a run that was interrupted goes on after its newest checkpoint.
        engine: how clients are reached.
        report: called with every event (name, round, fields) after it is written.
        score_all: how the tiers are scored, given a task for each; one after another in this process when left out.

    Returns:
        The summary that was written.
    """
    settings, method = federation.settings, federation.method
    score_all = score_all or (lambda tasks: (score(federation, task) for task in tasks))
    started = time.perf_counter()

    def note(event: str, round: int, **fields: Any) -> None:
        folder.events.append(event, round, **fields)
        report(event, round, fields)

    checkpoint = folder.resume()
    if checkpoint is None:
        state, history, seconds_before = start_state(federation), [], 0.0
        part = federation.partition
        note("started", 0, rounds=settings.train.rounds, clients=len(federation.clients), method=method.name)
        note("partition", 0, report=part.to_json() if part else None)
        if federation.data_card:
            folder.write_data_card(federation.data_card)
        history.append(_evaluate_tiers(federation, state, 0, score_all, note) if settings.evaluate.before else None)
        noise = noise_key(settings)
        so_far = {"history": history, "seconds": 0.0, "noise": noise}
        folder.save_checkpoint(0, _pack(state), so_far, settings.keep_checkpoints)
        done = 0
    else:
        state, done = unpack(checkpoint.tensors), checkpoint.round
        history, seconds_before = checkpoint.facts["history"], checkpoint.facts["seconds"]
        noise = checkpoint.facts["noise"]
        report("resumed", done, {"round": done})

    for number in range(done + 1, settings.train.rounds + 1):
        state = one_round(federation, engine, state, number, note, noise)
        every = settings.evaluate.every
        if number == settings.train.rounds or (every and number % every == 0):
            history.append(_evaluate_tiers(federation, state, number, score_all, note))
        seconds = seconds_before + time.perf_counter() - started
        so_far = {"history": history, "seconds": seconds, "noise": noise}
        folder.save_checkpoint(number, _pack(state), so_far, settings.keep_checkpoints)

    facts = {
        "method": method.name,
        "alpha": federation.base.alpha,
        "base_sha256": federation.base_sha256,
    }
    summary = {
        "method": method.name,
        "rounds": settings.train.rounds,
        "seed": settings.seed,
        "seconds": seconds_before + time.perf_counter() - started,
        "adapter_sha256": folder.write_adapter(_pack(state), facts),
        "base_sha256": federation.base_sha256,
        "tiers": [asdict(profile) for profile in federation.tiers],
        "before": history[0],
        "after": history[-1],
    }
    if settings.privacy:
        summary["privacy"] = {**settings.privacy.model_dump(exclude={"seed"}), **spent(settings, settings.train.rounds)}
    folder.write_summary(summary)
    return summary


def noise_key(settings: RunSettings) -> str:
    """What a private run's noise follows from: a secret of the server's, kept with its checkpoints, unless a seed is set."""
    if settings.privacy is None:
        return ""
    return secrets.token_hex(32) if settings.privacy.seed is None else str(settings.privacy.seed)


def sample_clients(federation: Federation, round: int, noise: str = "") -> list[Profile]:
    """The clients asked in a round, in client order: all, a seeded draw of so many, or each with the same probability.

    That probability is the one that epsilon is reckoned with, however many of the configured clients are there; and a
    private run draws from its `noise_key`, since epsilon holds against those who do not know who was drawn.
    """
    clients, settings = federation.clients, federation.settings
    if settings.clients.sampling == "poisson":
        draws = torch.rand(len(clients), generator=generator_for(noise or settings.seed, round, "sampling"))
        share = settings.clients_per_round / settings.clients.count
        return [client for client, draw in zip(clients, draws.tolist(), strict=True) if draw < share]
    asked = settings.clients_per_round + settings.rounds.extra_clients
    if asked >= len(clients):
        return clients
    draw = torch.randperm(len(clients), generator=generator_for(settings.seed, round, "sampling"))
    return [clients[i] for i in sorted(draw[:asked].tolist())]


def start_state(federation: Federation) -> State:
    """What the server holds before round 1: the method's start from an adapter of the largest tier's rank.

    It is a fresh one, or the PEFT adapter that adapter.start names.

    Raises:
        UserError: if that adapter does not fit the base or the run, or the method would not go on from it.
    """
    adapter = federation.settings.adapter
    if adapter.start is not None:
        return _start_from(federation, adapter.start)
    fresh = federation.model.fresh_adapter(
        max(profile.rank for profile in federation.tiers),
        generator_for(federation.settings.seed, "adapter"),
        shared_a=adapter.shared_a,
        router=adapter.router == "trained",
        attention=adapter.attention == "trained",
    )
    return federation.method.start(fresh)


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
    return state


def one_round(
    federation: Federation, engine: Engine, state: State, number: int, note: Callable[..., None], noise: str = ""
) -> State:
    """Dispatch to the round's clients, take what passes the gate as it comes, aggregate; `note` gets the events.

    `noise` is the `noise_key` of a private run, whose events tell nothing of what a client has but its size.

    Raises:
        RoundError: if too few updates count; the state before is what there is then.
    """
    began = time.perf_counter()
    settings = federation.settings
    profiles = {profile.client: profile for profile in sample_clients(federation, number, noise)}
    sent: dict[str, Task] = {}  # until its answer is there

    def tasks() -> Iterator[Task]:
        for task in _tasks(federation, state, number, profiles.values()):
            sent[task.profile.client] = task
            yield task

    def seen(update: Update) -> None:
        profile, task = profiles[update.client], sent.pop(update.client)
        told = {
            "tokens": update.tokens,
            "slots": update.slots,
            "loss": update.loss,
            "upload_bytes": upload_bytes(update, task, settings.wire.dtype),  # says how many experts were touched
        }
        note(
            "client",
            number,
            client=update.client,
            tier=profile.tier,
            top_k=profile.top_k,
            rank=profile.rank,
            examples=update.num_examples,
            seconds=update.seconds,
            download_bytes=task.num_bytes,
            **({} if settings.privacy else told),
        )

    def lost(reply: Dropped) -> None:
        task = sent.pop(reply.client, None)
        asked = {"download_bytes": task.num_bytes} if task else {}
        note("dropped", number, client=reply.client, stage=reply.stage, reason=reply.reason, **asked)

    tally = Tally(seen, torch.zeros(federation.base.num_layers, federation.base.num_experts, dtype=torch.float64))
    gate = gate_of(federation, len(profiles), lost)
    passed = gate.passed(engine.exchange(gate.ask(tasks())))
    if settings.privacy:
        counted: Iterable[Update] = [_noisy_mean(federation, tally.heard(passed), state, number, noise)]
    else:
        counted = tally.heard(protected(passed, state, settings.robust, lost))
    state = federation.method.aggregate(state, tally.over(counted))
    extras: dict[str, Any] = {"phi": state.extras["phi"].tolist()} if "phi" in state.extras else {}
    if settings.privacy:
        extras |= spent(settings, number)
    utilization = (tally.used / max(tally.examples, 1)).tolist()
    seconds = time.perf_counter() - began
    note("round", number, seconds=seconds, **tally.figures(), utilization=utilization, **extras)
    return state


def _noisy_mean(federation: Federation, updates: Iterable[Update], state: State, number: int, noise: str) -> Update:
    """One update that stands for a private round; its shape and K follow from what is public."""
    settings, clients, tier = federation.settings, federation.clients, federation.tiers[0]
    assert settings.privacy is not None
    return noisy_mean(
        updates,
        state,
        expected_form(federation.model, federation.method, Task(number, tier, federation.method.dispatch(state, tier))),
        settings.privacy,
        settings.clients_per_round,
        sum(client.top_k for client in clients) / len(clients),
        generator_for(noise, number, "noise"),
    )


def gate_of(federation: Federation, asked: int, drop: Callable[[Dropped], None]) -> Gate:
    """A gate for one round of this run, for which so many clients were drawn."""
    settings = federation.settings
    return Gate(
        lambda task: expected_form(federation.model, federation.method, task),
        settings.rounds,
        elastic=settings.tiers.elastic_share > 0,
        wanted=asked if settings.clients.sampling == "poisson" else settings.clients_per_round,
        drop=drop,
        fault=federation.method.fault,
    )


def _tasks(federation: Federation, state: State, number: int, profiles: Iterable[Profile]) -> Iterator[Task]:
    """One task per client, made when it is asked for."""
    for profile in profiles:
        payload = federation.method.dispatch(state, profile)
        yield Task(number, profile, payload, federation.run_id, federation.base_sha256)


def _evaluate_tiers(
    federation: Federation, state: State, round: int, score_all: ScoreAll, note: Callable[..., None]
) -> list[dict[str, dict[str, Any]]]:
    """Every tier's scores at its own budget, tasks by name, with "macro" among them."""
    results = []
    tasks = _tasks(federation, state, round, federation.tiers)
    for profile, scores in zip(federation.tiers, score_all(tasks), strict=True):
        results.append({task: asdict(one) for task, one in scores.items()})
        note("evaluated", round, tier=profile.tier, top_k=profile.top_k, rank=profile.rank, scores=results[-1])
    return results


def evaluate_tier(federation: Federation, state: State, profile: Profile) -> dict[str, Score]:
    """What a client of this tier would see: the payload it would get, at its own budget."""
    return score(federation, next(_tasks(federation, state, 0, [profile])))


def score(federation: Federation, task: Task) -> dict[str, Score]:
    """The scores of a task's payload at its profile's budget. The base is left as it was found."""
    model, settings = federation.model, federation.settings
    try:
        federation.method.install(model, task.payload, task.profile, generator_for(settings.seed, "evaluation"))
        return evaluate(model, federation.tokenizer, federation.questions, settings.evaluate)
    finally:
        model.clear()


def _pack(state: State) -> dict[str, Tensor]:
    """A state as one flat dict of tensors, for disk."""
    return {**state.adapters, **{f"server.{name}": value for name, value in state.extras.items()}}


def unpack(tensors: dict[str, Tensor]) -> State:
    """The state that a checkpoint's or a run's tensors hold."""
    extras = {name.removeprefix("server."): value for name, value in tensors.items() if name.startswith("server.")}
    return State({name: value for name, value in tensors.items() if not name.startswith("server.")}, extras)
