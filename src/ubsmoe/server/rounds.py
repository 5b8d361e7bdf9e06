"""A round: dispatch, train, validate, aggregate; and how its state scores at each tier."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from ubsmoe.config import RunSettings
from ubsmoe.errors import printable
from ubsmoe.messages import Dropped, Engine, Profile, Step, Task, Update, in_order
from ubsmoe.methods.method import Contribution, State
from ubsmoe.methods.sums import private_vector
from ubsmoe.model.surgery import SparseModel
from ubsmoe.seeds import generator_for
from ubsmoe.server.evaluate import Score, answer_loss, evaluate
from ubsmoe.server.federation import Federation
from ubsmoe.server.metrics import RoundMetrics
from ubsmoe.server.peers import without_outliers
from ubsmoe.server.privacy import noisy_mean, spent
from ubsmoe.server.robust import Answer, most_examples, robustify
from ubsmoe.server.start import sample_clients, settled
from ubsmoe.server.validator import Validator
from ubsmoe.wire.change import upload_bytes

if TYPE_CHECKING:
    from ubsmoe.server.secure import Courier

Log = Callable[..., None]


def one_round(
    federation: Federation,
    engine: Engine,
    state: State,
    number: int,
    log: Log,
    noise: str = "",
    release: Callable[[int], int] = int,
) -> State:
    """One round, from the draw of clients to the next state.

    Args:
        federation: the run.
        engine: how clients are reached.
        state: what the round begins with.
        number: of the round, from 1.
        log: gets the events; those of a private run tell nothing of what a client has but its size.
        noise: the `noise_key` of this attempt at a private round.
        release: called with the round before anything that follows from a private round's updates leaves; gives how many such
            models have gone out, which epsilon counts.

    Returns:
        The next state.

    Raises:
        RoundError: if too few updates count; the state before is what there is then.
    """
    began = time.perf_counter()
    settings, method = federation.settings, federation.method
    everybody = engine.clients()
    clients = sample_clients(everybody, settings, number, noise)
    wanted = len(clients) if settings.clients.sampling == "poisson" else settings.clients_per_round
    validator, metrics = Validator(federation.specs, settings, method, wanted), RoundMetrics(federation.shape)
    asked: dict[str, Task] = {}  # the tasks that are out

    def tasks() -> Iterator[Task]:
        for task in tasks_of(federation, state, number, clients):
            asked[task.profile.client] = task
            yield task

    def drop(reply: Dropped, task: Task | None = None) -> None:
        size = {"download_bytes": task.num_bytes} if task else {}
        log("dropped", number, client=reply.client, stage=reply.stage, reason=printable(reply.reason), **size)

    def valid() -> Iterator[Answer]:
        for reply in engine.exchange(tasks()):
            task = asked.pop(reply.client, None)
            lost = reply if isinstance(reply, Dropped) else validator.fault(reply, task, number)
            if lost:
                drop(lost, task)
            elif isinstance(reply, Update) and task:
                yield task, reply

    def answers() -> Iterator[Answer]:
        """The updates that count. Aggregation pulls them one at a time, so that few are in memory."""
        count, ratio = 0, None if settings.privacy else settings.rounds.max_ratio
        judged = valid()
        if ratio:
            judged = without_outliers(judged, ratio, lambda lost, answer: drop(lost, answer[0]), method.judged)
        for task, update in judged:
            log("client", number, **_client_fields(update, task, settings))
            count += 1
            yield task, update
        validator.check_quorum(count, number)

    def private(vectors: Iterable[Mapping[str, Tensor]]) -> Contribution:
        return _noisy_mean(federation, everybody, vectors, state, number, noise)

    def secure_sum() -> Iterator[Contribution]:
        """The only contribution of a round in which no single update is seen."""
        from ubsmoe.server.secure import SecureRound  # needs the extra secagg, which other runs need not

        trial = SecureRound(federation, cast("Courier", engine), number, log)
        of, enough = partial(tasks_of, federation, state, number), partial(validator.check_quorum, number=number)
        yield trial.contribution(clients, of, state, lambda sums: private([sums]), enough, most)

    most = most_examples(everybody, settings.clients.max_weight)
    if settings.secure_aggregation:
        contributions = secure_sum()
    elif settings.privacy:
        longest = settings.privacy.clip_norm
        contributions = iter([private(private_vector(one, task.payload, longest) for task, one in answers())])
    else:
        contributions = robustify(answers(), settings.robust, drop, most)
    state = settled(method.aggregate(state, metrics.accumulate(contributions)), method)

    if dominant := metrics.dominant():
        log("warning", number, **dominant)
    fields = metrics.summary() | method.event(state) | (spent(settings, release(number)) if settings.privacy else {})
    log("round", number, seconds=time.perf_counter() - began, **fields)
    return state


def _client_fields(update: Update, task: Task, settings: RunSettings) -> dict[str, Any]:
    """What the event of a client's update says; of a private run nothing that follows from the client's data."""
    profile = task.profile
    public = {
        "client": update.client,
        "tier": profile.tier,
        "top_k": profile.top_k,
        "rank": profile.rank,
        "experts": profile.experts,
        "examples": update.num_examples,
        "seconds": update.seconds,
        "download_bytes": task.num_bytes,
    }
    if settings.privacy:
        return public
    size = upload_bytes(update, task, settings.wire.dtype)  # says how many experts were touched
    return public | {
        "tokens": update.tokens,
        "assignments": update.assignments,
        "loss": update.loss,
        "upload_bytes": size,
        "steps": _columns(update.steps),
    }


def _columns(steps: Sequence[Step]) -> dict[str, list[float]]:
    """Steps as an event holds them: a list per field, five digits, which no chart can tell from all."""
    names = Step._fields[1:]
    rest = {name: [float(f"{getattr(step, name):.5g}") for step in steps] for name in names}
    return {"number": [step.number for step in steps], **rest}


def _noisy_mean(
    federation: Federation,
    clients: list[Profile],
    vectors: Iterable[Mapping[str, Tensor]],
    state: State,
    number: int,
    noise: str,
) -> Contribution:
    """The contribution that stands for a private round; its shape and K follow from what is public."""
    settings, tier = federation.settings, federation.tiers[0]
    assert settings.privacy is not None
    task = Task(number, tier, federation.method.dispatch(state, tier))
    mean_top_k = sum(client.top_k for client in clients) / len(clients)
    key = (noise, number)
    return noisy_mean(
        vectors, task.payload, federation.specs(task), settings.privacy, settings.clients_per_round, mean_top_k, key
    )


def tasks_of(federation: Federation, state: State, number: int, profiles: Iterable[Profile]) -> Iterator[Task]:
    """One task per client, made when it is asked for."""
    for profile in profiles:
        payload = in_order(federation.method.dispatch(state, profile))
        yield Task(number, profile, payload, federation.run_id, federation.base_sha256)


def evaluate_tier(federation: Federation, state: State, profile: Profile) -> dict[str, Score]:
    """What a client of this tier would see: the payload it would get, at its own budget."""
    return score(federation, next(tasks_of(federation, state, 0, [profile])))


def score(federation: Federation, task: Task) -> dict[str, Score]:
    """The scores of a task's payload at its profile's budget. The base is left as it was found."""
    with installed(federation, task) as model:
        return evaluate(model, federation.tokenizer, federation.questions, federation.settings.evaluate)


def validation_losses(federation: Federation, state: State) -> list[float]:
    """The loss of each tier on what early stopping goes by."""
    size = federation.settings.evaluate.batch_size
    losses = []
    for task in tasks_of(federation, state, 0, federation.tiers):
        with installed(federation, task) as model:
            losses.append(answer_loss(model, federation.validation, size))
    return losses


@contextmanager
def installed(federation: Federation, task: Task) -> Iterator[SparseModel]:
    """The base with a task's payload in place, as the client would have it; without, again, at the end."""
    model = federation.model_of(task.profile)
    try:
        generator = generator_for(federation.settings.seed, "evaluation")
        federation.method.install(model, task.payload, task.profile, generator)
        yield model
    finally:
        model.clear()
