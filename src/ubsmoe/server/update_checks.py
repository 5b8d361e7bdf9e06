"""What an update has to keep to, one check each; the reason of a refusal names what came and what was expected."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ubsmoe.client.schedule import steps_per_round
from ubsmoe.config import RunSettings
from ubsmoe.messages import MOST_STEPS_TOLD, Step, Task, Tensors, Update
from ubsmoe.wire.form import Form, UpdateSpec
from ubsmoe.wire.form import spec_of as spec_of

MOST_LOSS = 1e4  # nats per token: e to its minus is no probability that a float holds
MOST_SECONDS = 1e7  # four months: no deadline is longer


class Rejected(ValueError):
    """An update that must not be counted; the text is the reason."""


def check_update(
    update: Update, task: Task, form: UpdateSpec, max_change: float, run: Sequence[int], most_tokens: float = math.inf
) -> None:
    """Every check, cheapest first.

    Args:
        update: what a client sent.
        task: what it was asked.
        form: names, shapes and dtypes that the method's own install gives for this task.
        max_change: largest root mean square by which a client may have changed what it was sent.
        run: experts per token that a step may run: of the client's K, and with elastic budgets of smaller ones.
        most_tokens: as `most_tokens` gives.

    Raises:
        Rejected: with the reason.
    """
    check_origin(update, task)
    check_form("adapters", update.adapters, form.adapters)
    check_form("extras", update.extras, form.extras)
    check_form("update", {"expert_tokens": update.expert_tokens}, {"expert_tokens": form.expert_tokens})
    check_numbers(update, task)
    if update.tokens > most_tokens:
        raise Rejected(f"{update.tokens} tokens, the round's steps hold at most {most_tokens}")
    check_utilization(update, run)
    check_finite(update)
    check_change(update, task.payload, max_change)


def check_origin(update: Update, task: Task) -> None:
    """The update answers this task: same run, round, base, tier."""
    asked = {"run": task.run, "round": task.round, "base": task.base, "tier": task.profile.tier}
    for name, expected in asked.items():
        if getattr(update, name) != expected:
            raise Rejected(f"{name} is {getattr(update, name)!r}, expected {expected!r}")


def check_form(part: str, tensors: Tensors, expected: Mapping[str, Form]) -> None:
    """Exactly these names, each with its shape and dtype: nothing may broadcast and nothing be cast."""
    if missing := sorted(expected.keys() - tensors.keys()):
        raise Rejected(f"{part} lack {missing[0]!r}")
    if unknown := sorted(tensors.keys() - expected.keys()):
        raise Rejected(f"{part} have {unknown[0]!r}, which was not asked for")
    for name, (shape, dtype) in expected.items():
        if tensors[name].shape != shape:
            raise Rejected(f"{name} has shape {[*tensors[name].shape]}, expected {[*shape]}")
        if tensors[name].dtype != dtype:
            raise Rejected(f"{name} is {tensors[name].dtype}, expected {dtype}")


def most_tokens(settings: RunSettings, num_examples: int) -> int:
    """The most tokens that a client with so many examples can train on in a round."""
    train = settings.train
    examples = steps_per_round(train, num_examples) * train.batch_size * train.gradient_accumulation
    return examples * settings.data.max_length


def check_numbers(update: Update, task: Task) -> None:
    """The examples it announced, a loss and a time that can be."""
    if type(update.num_examples) is not int or update.num_examples != task.profile.num_examples:
        raise Rejected(f"num_examples is {update.num_examples!r}, announced were {task.profile.num_examples}")
    for name, most in (("loss", MOST_LOSS), ("seconds", MOST_SECONDS)):
        if not 0 <= getattr(update, name) <= most:
            raise Rejected(f"{name} is {getattr(update, name)}, expected 0 to {most:g}")
    check_steps(update.steps)


def check_steps(steps: Sequence[Step]) -> None:
    """Few enough to log, one after another, and numbers that a chart can hold."""
    numbers = [step.number for step in steps]
    if (
        len(numbers) > MOST_STEPS_TOLD
        or numbers != sorted({*numbers})
        or any(not 1 <= number < 2**53 for number in numbers)
    ):
        raise Rejected(f"steps are numbered {numbers[:20]}, expected at most {MOST_STEPS_TOLD} that ascend from 1")
    if wrong := [step for step in steps if not all(map(math.isfinite, step))]:
        raise Rejected(f"step {wrong[0].number} holds NaN or infinity")


def check_utilization(update: Update, run: Sequence[int]) -> None:
    """Counts of a router: each token goes to K different experts, K any of `run`.

    Hence, per layer, 0 <= a_i <= tokens and sum_i a_i = assignments, which lies between the least and the most K, times tokens.
    """
    tokens, assignments, counts = update.tokens, update.assignments, update.expert_tokens
    if tokens < 1 or not tokens * min(run) <= assignments <= tokens * max(run):
        raise Rejected(f"{assignments} assignments for {tokens} tokens at K = {max(run)}")
    if (counts < 0).any() or (counts > tokens).any():
        raise Rejected(f"expert_tokens reach from {int(counts.min())} to {int(counts.max())}, expected 0 to {tokens}")
    if (wrong := counts.sum(-1) != assignments).any():
        layer = int(wrong.nonzero()[0])
        raise Rejected(
            f"expert_tokens of layer {layer} sum to {int(counts[layer].sum())}, expected assignments = {assignments}"
        )


def check_finite(update: Update) -> None:
    """No NaN and no infinity anywhere."""
    for name, tensor in {**update.adapters, **update.extras}.items():
        # one pass; squares of float32 cannot overflow float64, so the norm is finite just when every entry is
        if tensor.is_floating_point() and not torch.linalg.vector_norm(tensor, dtype=torch.float64).isfinite():
            raise Rejected(f"{name} holds NaN or infinity")


def check_change(update: Update, payload: Tensors, max_change: float) -> None:
    """The root mean square of what changed, over all tensors that were sent down; what was not sent is measured from 0."""
    squared, elements = 0.0, 0
    for name, tensor in sorted({**update.adapters, **update.extras}.items()):
        if tensor.is_floating_point():
            squared += float(_change(tensor, payload.get(name)).square().sum())
            elements += tensor.numel()
    change = math.sqrt(squared / max(elements, 1))
    if not change <= max_change:
        raise Rejected(
            f"weights changed by {change:.3g} (root mean square), at most {max_change:g} (rounds.max_change)"
        )


def _change(tensor: Tensor, before: Tensor | None) -> Tensor:
    return tensor.double() if before is None else tensor.double() - before.to(tensor.device).double()
