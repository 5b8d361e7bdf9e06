"""What a client does with a task: `train(task) -> update`, the same function in every engine."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ubsmoe.client.allocator import give_back_freed_memory
from ubsmoe.client.schedule import batch_order, elastic_top_ks, in_pieces, step_size, steps_per_round, steps_told
from ubsmoe.config import RunSettings, TierSettings, TrainSettings, WireDtype, train_of_tier
from ubsmoe.data.tokens import IGNORED, Tokens, collate, pad_id
from ubsmoe.errors import UserError
from ubsmoe.messages import Step, Task, Tensors, Update, in_order
from ubsmoe.methods.hooks import OWN, Hooks
from ubsmoe.methods.method import Method
from ubsmoe.model.load import Bases
from ubsmoe.model.recompute import recomputing
from ubsmoe.model.surgery import SparseModel
from ubsmoe.seeds import generator_for


class Memory(Protocol):
    """What each client keeps for itself from its last round to its next (`storage.client_memory`)."""

    def recall(self, client: str) -> dict[str, Tensor]:
        """What a client kept last."""
        ...

    def keep(self, client: str, round: int, tensors: Tensors) -> None:
        """Keep it."""
        ...


@dataclass(frozen=True)
class Trainer:
    """All that clients share: the base (one per process), the method, how to train, how updates travel, and the whole run file.

    `bases` is the base in other formats of its experts, where clients have them. Without a `memory` nobody keeps anything.
    """

    model: SparseModel
    method: Method
    settings: TrainSettings
    tiers: TierSettings
    seed: int
    pad_id: int
    loss_on_prompt: bool = False
    base_sha256: str = ""
    wire_dtype: WireDtype = "float32"
    run: RunSettings | None = None
    bases: Bases | None = None
    memory: Memory | None = None


def make_trainer(
    settings: RunSettings,
    model: SparseModel,
    method: Method,
    tokenizer: Any,
    base_sha256: str,
    bases: Bases | None = None,
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
        settings,
        bases,
    )


class ClientFailure(UserError):
    """A client's training failed; carries client, round and stage."""


def train(
    trainer: Trainer, task: Task, examples: Sequence[Tokens], on_step: Callable[[int, int, float], None] | None = None
) -> Update:
    """Fine-tune the payload on one client's examples and return what changed.

    Args:
        trainer: the shared base and settings. The base is left exactly as it was found.
        task: the client's profile and payload.
        examples: the client's tokenised data.
        on_step: called with (step, number of steps, loss), for progress.

    Raises:
        ClientFailure: if the loss stops being finite.
    """
    started = time.perf_counter()
    client, tier = task.profile.client, task.profile.tier
    model = trainer.bases(task.profile.experts) if trainer.bases else trainer.model
    trainer = replace(trainer, model=model, settings=train_of_tier(trainer.settings, trainer.tiers, tier))
    key = (trainer.seed, client, task.round)
    try:
        payload = _with_own(task.payload, trainer.memory, client)
        hooks = trainer.method.install(model, payload, task.profile, generator_for(*key, "install"))
        for look in hooks.before_training:
            look(_in_order(trainer, examples))
        with model.counting(), recomputing(model) if trainer.settings.gradient_checkpointing else nullcontext():
            loss, tokens, assignments, steps = _steps(trainer, task, examples, hooks, on_step)
            give_back_freed_memory()  # once a task: page faults after it cost a step a tenth of its time
            if trainer.memory and (kept := hooks.keeps()):
                trainer.memory.keep(client, task.round, _copies(kept))
            return Update(
                client=client,
                round=task.round,
                num_examples=len(examples),
                adapters=_copies(model.adapter),
                expert_tokens=model.expert_tokens(),
                tokens=tokens,
                assignments=assignments,
                loss=loss,
                seconds=time.perf_counter() - started,
                extras=_copies(hooks.extras()),
                tier=tier,
                run=task.run,
                base=trainer.base_sha256,
                steps=() if _is_private(trainer.run) else steps,
            )
    finally:
        model.clear()


def _is_private(run: RunSettings | None) -> bool:
    """Whether nothing may leave a client that tells of its data alone."""
    return run is not None and bool(run.privacy or run.secure_aggregation)


def _with_own(payload: Tensors, memory: Memory | None, client: str) -> dict[str, Tensor]:
    """What a server sent and what the client kept; a server cannot send what is the client's."""
    own = memory.recall(client) if memory else {}
    sent = {name: value for name, value in payload.items() if not name.startswith(OWN)}
    return sent | {f"{OWN}{name}": value for name, value in own.items()}


def _copies(tensors: Tensors) -> dict[str, Tensor]:
    """What leaves a client: nothing that the next one's training could change."""
    return in_order({name: value.detach().cpu().clone() for name, value in tensors.items()})


def _steps(
    trainer: Trainer,
    task: Task,
    examples: Sequence[Tokens],
    hooks: Hooks,
    on_step: Callable[[int, int, float], None] | None,
) -> tuple[float, int, int, tuple[Step, ...]]:
    """The training loop. Gives the mean loss, the tokens seen, the (token, expert) choices per layer they made, and some steps."""
    model, settings = trainer.model, trainer.settings
    key = (trainer.seed, task.profile.client, task.round)
    parameters = [*model.adapter.values(), *hooks.parameters]
    optimizer = _optimizer(_by_ratio(model.adapter, hooks.parameters, settings.lora_plus_ratio or 1.0), settings)
    order = batch_order(settings, examples, generator_for(*key, "batches"))
    num_steps = steps_per_round(settings, len(examples))
    first = (task.round - 1) * num_steps
    budgets = elastic_top_ks(trainer.tiers, task.profile.top_k, first, num_steps, generator_for(*key, "elastic"))
    losses, tokens, assignments = list[float](), 0, 0
    told, steps = steps_told(num_steps), list[Step]()
    for step, top_k in enumerate(budgets):
        model.set_top_k(top_k)
        rate = settings.learning_rate * step_size(settings, task.round, step, num_steps)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["ratio"]
        optimizer.zero_grad(set_to_none=True)
        values: list[Tensor] = []  # read when the step is done: an accelerator would be waited for
        pieces = _micro_batches(trainer, examples, order)
        for batch, share in pieces:
            seen = int(batch["attention_mask"].sum())
            tokens, assignments = tokens + seen, assignments + seen * model.num_run
            value = language_loss(model, batch) * share
            total = value
            for penalty in hooks.penalties:
                total = total + penalty() / len(pieces)
            total.backward()
            values.append(value.detach())
        loss = sum(value.item() for value in values)
        if not torch.isfinite(torch.tensor(loss)):
            raise ClientFailure(
                f"client {task.profile.client}, round {task.round}, step {step}: the loss is {loss}; "
                "lower train.learning_rate or set train.clip_norm"
            )
        for act in hooks.before_step:
            act()
        norm = torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm) if settings.clip_norm else None
        if step in told:
            steps.append(Step(step + 1, loss, rate, float(_gradient_norm(parameters) if norm is None else norm)))
        optimizer.step()
        for correct in hooks.after_step:
            correct(rate)
        losses.append(loss)
        if on_step:
            on_step(step + 1, num_steps, loss)
    # a norm that no float holds makes an update that the server refuses by the tensor's name
    return sum(losses) / len(losses), tokens, assignments, tuple(step for step in steps if all(map(isfinite, step)))


def _gradient_norm(parameters: Sequence[Tensor]) -> Tensor:
    """The norm over all that is trained; what no token reached has no gradient."""
    return torch.nn.utils.get_total_norm([one.grad for one in parameters if one.grad is not None])


def _in_order(trainer: Trainer, examples: Sequence[Tokens]) -> Iterator[dict[str, Tensor]]:
    """The client's examples as they lie, in batches: whole ones, so that micro-batches change nothing that is found in them."""
    size = trainer.settings.batch_size
    for first in range(0, len(examples), size):
        yield collate(examples[first : first + size], trainer.pad_id)


def _micro_batches(
    trainer: Trainer, examples: Sequence[Tokens], order: Iterator[list[int]]
) -> list[tuple[dict[str, Tensor], float]]:
    """The pieces of one step, each with its share of the labelled tokens: their sum is the loss of one large batch."""
    settings = trainer.settings
    micro = [
        collate([examples[i] for i in piece], trainer.pad_id, trainer.loss_on_prompt)
        for _ in range(settings.gradient_accumulation)
        for piece in in_pieces(next(order), settings)
    ]
    labelled = [int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in micro]
    return [(batch, count / sum(labelled)) for batch, count in zip(micro, labelled, strict=True)]


def language_loss(model: SparseModel, batch: dict[str, Tensor]) -> Tensor:
    """Mean cross-entropy over the tokens that have a label. Only their logits are ever computed."""
    device = next(model.model.parameters()).device
    batch = {name: value.to(device) for name, value in batch.items()}
    predicts = batch["labels"][:, 1:] != IGNORED
    logits = model.logits_at(batch["input_ids"], batch["attention_mask"], predicts)
    return cross_entropy(logits.float(), batch["labels"][:, 1:][predicts])


def _by_ratio(adapter: Tensors, others: list[torch.nn.Parameter], ratio: float) -> list[dict[str, Any]]:
    """What is trained, in groups of one learning rate each: `ratio` times the run's for every B, 1 for the rest.

    Source: LoRA+ (Hayou et al. 2024, arXiv 2402.12354).
    """
    groups: dict[float, list[Tensor]] = {}
    for name, value in adapter.items():
        groups.setdefault(ratio if name.endswith(".B") else 1.0, []).append(value)
    groups[1.0] = [*groups.get(1.0, []), *others]
    return [{"params": values, "ratio": one} for one, values in groups.items() if values]


def _optimizer(groups: list[dict[str, Any]], settings: TrainSettings) -> torch.optim.Optimizer:
    if settings.optimizer == "sgd":
        return torch.optim.SGD(
            groups, settings.learning_rate, momentum=settings.momentum, weight_decay=settings.weight_decay
        )
    return torch.optim.AdamW(groups, settings.learning_rate, weight_decay=settings.weight_decay, fused=True)
