"""A run: dispatch -> exchange -> aggregate -> evaluate, once a round, and nothing else."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from typing import Any

import torch

from ubsmoe.messages import Dropped, Engine, Profile, Task, Update
from ubsmoe.methods.method import State, pack, unpack
from ubsmoe.seeds import generator_for
from ubsmoe.server.evaluate import Score, evaluate
from ubsmoe.server.federation import Federation
from ubsmoe.server.metrics import Tally
from ubsmoe.server.privacy import noisy_mean, spent
from ubsmoe.server.robust import robustify
from ubsmoe.server.start import noise_key, sample_clients, start_state
from ubsmoe.server.validator import Gate, update_spec
from ubsmoe.storage.runfolder import RunFolder
from ubsmoe.wire.change import upload_bytes

Report = Callable[[str, int, dict[str, Any]], None]
ScoreAll = Callable[[Iterable[Task]], Iterable[dict[str, Score]]]


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
        folder.save_checkpoint(0, pack(state), so_far, settings.keep_checkpoints)
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
        folder.save_checkpoint(number, pack(state), so_far, settings.keep_checkpoints)

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
        "adapter_sha256": folder.write_adapter(pack(state), facts),
        "base_sha256": federation.base_sha256,
        "tiers": [asdict(profile) for profile in federation.tiers],
        "before": history[0],
        "after": history[-1],
    }
    if settings.privacy:
        summary["privacy"] = {**settings.privacy.model_dump(exclude={"seed"}), **spent(settings, settings.train.rounds)}
    folder.write_summary(summary)
    return summary


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
            "assignments": update.assignments,
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
        counted = tally.heard(robustify(passed, state, settings.robust, lost))
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
        update_spec(federation.model, federation.method, Task(number, tier, federation.method.dispatch(state, tier))),
        settings.privacy,
        settings.clients_per_round,
        sum(client.top_k for client in clients) / len(clients),
        generator_for(noise, number, "noise"),
    )


def gate_of(federation: Federation, asked: int, drop: Callable[[Dropped], None]) -> Gate:
    """A gate for one round of this run, for which so many clients were drawn."""
    settings = federation.settings
    return Gate(
        lambda task: update_spec(federation.model, federation.method, task),
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
